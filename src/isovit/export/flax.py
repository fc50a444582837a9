"""Forms of a Flax model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from isovit.backends.onnx.layout import BATCH
from isovit.export.forms import Target

PLATFORMS = ("cpu", "cuda", "tpu")


def write_onnx(model: Any, path: Path, target: Target) -> None:
    """Write ONNX."""
    from isovit.export.from_jax import write

    write(model, model.config, path, target)


def write_stablehlo(model: Any, path: Path, target: Target) -> None:
    """Write what ``jax.export`` serialises, weights included, for all platforms."""
    config, (graphdef, state) = model.config, nnx.split(model)
    batch = target.batch or jax.export.symbolic_shape(BATCH)[0]
    images = jax.ShapeDtypeStruct((batch, *config.image_size, config.in_channels), np.float32)
    function = jax.jit(lambda images: nnx.merge(graphdef, state)(images))
    path.write_bytes(jax.export.export(function, platforms=PLATFORMS)(images).serialize())


def open_stablehlo(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """The function of such a file."""
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    return lambda images: np.asarray(exported.call(images))
