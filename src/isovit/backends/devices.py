"""Devices by name: what a process must know before it loads a framework, and one that is absent."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from isovit.errors import InputError, reason

REMEDIES = {
    ("torch", "cuda"): "the CUDA build of torch on a machine with an NVIDIA GPU",
    ("tensorflow", "cuda"): 'pip install "tensorflow[and-cuda]" on a machine with an NVIDIA GPU',
    ("jax", "cuda"): 'pip install "jax[cuda13]" on a machine with an NVIDIA GPU',
    ("jax", "tpu"): 'pip install "jax[tpu]" on a machine with a TPU',
    ("torch", "tpu"): "--backend flax or keras:jax, which reach one",
    ("tensorflow", "tpu"): "--backend flax or keras:jax, which reach one",
    ("onnxruntime", "cuda"): "the package onnxruntime-gpu on a machine with an NVIDIA GPU",
}
"""What a library needs for a device, where no other device will do."""


def kind_of(device: str) -> str:
    """The name without an index: ``cuda:1`` is a ``cuda``."""
    return device.partition(":")[0]


def worker_environment(device: str | None, inherited: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that runs on one kind of device.

    Args:
        device: ``cpu``, ``cuda``, ``tpu``; None leaves the choice to the framework.
        inherited: of this process.

    Returns:
        It and this process's module path, without the folder where it stands: a file ``code.py``
        there would be taken for Python's own. What is not the device is hidden: a framework that
        finds the device missing must say so, not take another. JAX and TensorFlow take memory as
        they need it, so that the most they have taken is a figure; NVIDIA's libraries round no
        product of float32.
    """
    changed = {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "PYTHONSAFEPATH": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TF_FORCE_GPU_ALLOW_GROWTH": "true",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "NVIDIA_TF32_OVERRIDE": "0",
    }
    if device is not None:
        kind = kind_of(device)
        changed["JAX_PLATFORMS"] = "cpu" if kind == "cpu" else f"{kind},cpu"
        if kind in ("cpu", "tpu"):
            changed["CUDA_VISIBLE_DEVICES"] = "-1"
    return {**inherited, **changed}


def missing(device: str, library: str, found: str) -> InputError:
    """The line about a device that a library does not find.

    Args:
        device: that was asked for.
        library: that has not got it.
        found: what it says, or what it has.
    """
    remedy = REMEDIES.get((library, kind_of(device)))
    return InputError(
        f"device {device}: {library} finds no such device here ({found}); use --device cpu"
        + (f", or {remedy}" if remedy else "")
    )


def jax_device(name: str) -> Any:
    """A device of JAX in this process.

    Raises:
        InputError: with what JAX says, if there is none.
    """
    import jax

    kind, _, index = name.partition(":")
    try:
        return jax.local_devices(backend=kind)[int(index or 0)]
    except (RuntimeError, ValueError, IndexError) as error:
        found = reason(error).partition(" (set ")[0].rstrip(".")
        platforms = os.environ.get("JAX_PLATFORMS")
        if platforms and kind not in platforms.split(","):
            found += f", and JAX_PLATFORMS={platforms} hides others"
        raise missing(name, "jax", found) from None


def jax_precision() -> str:
    """JAX's switch for products of float32, as this process has it."""
    import jax

    chosen = getattr(jax.config, "jax_default_matmul_precision", None)
    return f"jax_default_matmul_precision={chosen or 'default'}"
