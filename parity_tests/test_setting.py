"""What a record says of precision is read back from the switches, so that it cannot be untrue."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from parity_tests.examples import EXAMPLES
from parity_tests.subject import Subject

EXACT = {
    "torch": "float32_matmul_precision=highest",
    "flax": "jax_default_matmul_precision=highest",
    "keras:tensorflow": "tensor_float_32_execution=False",
    "keras:jax": "jax_default_matmul_precision=highest",
    "keras:torch": "float32_matmul_precision=highest",
}
ROUNDED = {
    "torch": "float32_matmul_precision=high",
    "flax": "jax_default_matmul_precision=default",
    "keras:tensorflow": "tensor_float_32_execution=True",
    "keras:jax": "jax_default_matmul_precision=default",
    "keras:torch": "float32_matmul_precision=high",
}


@contextmanager
def rounded(backend: Subject) -> Iterator[None]:
    """Within it products of float32 are rounded, by the framework's own switch."""
    if backend.name in ("torch", "keras:torch"):
        import torch

        torch.set_float32_matmul_precision("high")
    elif backend.name == "keras:tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_tensor_float_32_execution(True)
    else:
        import jax

        jax.config.update("jax_default_matmul_precision", None)
    try:
        yield
    finally:
        backend.runtime.exact_arithmetic()


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_the_statement_follows_the_switches(backend: Subject, dtype: str) -> None:
    model = backend.build(EXAMPLES["vit_timm"], dtype)
    way = backend.runtime.WAYS[0]
    assert backend.runtime.setting(model, way) == ("cpu", f"{dtype}; {EXACT[backend.name]}")
    with rounded(backend):
        assert backend.runtime.setting(model, way).precision == f"{dtype}; {ROUNDED[backend.name]}"


def test_nobody_counts_the_memory_of_a_cpu(backend: Subject) -> None:
    model = backend.build(EXAMPLES["vit_timm"], "float32")
    assert backend.runtime.device_memory(model, backend.runtime.WAYS[0]) is None
