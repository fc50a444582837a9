"""From a JAX function to ONNX, for Flax and for Keras on JAX.

jax2onnx holds orbax at an older release than isovit's other tests have, so it is an extra of its
own: docs/decisions/onnx-extras.md.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax2onnx import to_onnx  # pyright: ignore[reportMissingImports] -- in its own environment

from isovit.backends.onnx import graph
from isovit.backends.onnx.layout import BATCH, INPUT, OUTPUT
from isovit.export.forms import Target
from isovit.spec.config import Config


def write(function: Callable[[Any], Any], config: Config, path: Path, target: Target) -> None:
    """Write the ONNX form of a function of images, or of an nnx.Module."""
    images = (target.batch or BATCH, *config.image_size, config.in_channels)
    found = to_onnx(
        function,
        [images],
        opset=target.opset,
        return_mode="ir",
        input_names=[INPUT],
        output_names=[OUTPUT],
    )
    graph.write(graph.finish(found, config, fused_attention=target.fused_attention), path)
