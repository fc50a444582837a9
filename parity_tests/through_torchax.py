"""PyTorch models on JAX by torchax: ``python -m parity_tests.through_torchax``.

torchax changes torch for the whole process (torch.compile is lost): hence a process of its own.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from isovit.backends.torch import on_jax, runtime
from parity_tests.apart import Results, answer
from parity_tests.examples import EXAMPLES
from parity_tests.lowering import PLATFORMS
from parity_tests.strategies import Case

STEPS = 3


def run(case: Case, dtype: str) -> dict[str, Any]:
    """Outputs and losses of a case by torch itself and by torchax, and its programs."""
    labels = np.arange(len(case.images)) % case.config.num_classes

    def model() -> Any:
        return runtime.build(case.config, case.weights, dtype=dtype, device="cpu")

    other, subject = model(), model()
    with runtime.torch.no_grad():
        next(other.blocks[0].attn.qkv.parameters()).mul_(1.001)
    images = runtime.put(subject, case.images)
    found: dict[str, Any] = {
        "torch": runtime.forward(subject, case.images),
        "torchax": runtime.inference(subject, images, "torchax")(),
        "torchax, other weights": runtime.inference(other, images, "torchax")(),
    }
    weights, forward = on_jax._function(subject, jax.devices()[0])
    with on_jax._precision():
        traced = jax.jit(forward).trace(weights, on_jax.put(images, images.dtype, jax.devices()[0]))
    for platform in PLATFORMS:
        found[f"for {platform}"] = traced.lower(lowering_platforms=(platform,)).as_text()
    if dtype == "float64":
        for way in ("eager", "torchax"):
            trained = model()
            batch = images, runtime.put(trained, labels)
            step = runtime.training(trained, *batch, way)
            found[f"losses by {way}"] = np.array([float(step()) for _ in range(STEPS)])
    return {
        key: np.asarray(value, np.float64) if getattr(value, "dtype", "") == "bfloat16" else value
        for key, value in found.items()
    }


def everything(_: str) -> Results:
    """What is found of all models in all dtypes."""
    runtime.exact_arithmetic()
    results: dict[str, Any] = {}
    for dtype in ("bfloat16", "float32", "float64"):  # the last makes the process a 64-bit one
        for name in ("vit_timm", "t2t_performer"):
            for key, value in run(EXAMPLES[name], dtype).items():
                results[f"{name} {dtype} {key}"] = np.asarray(value)
    return results


if __name__ == "__main__":
    answer(everything)
