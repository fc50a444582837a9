"""From a torch module to an ONNX graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from isovit.backends.onnx.layout import BATCH, INPUT, OUTPUT
from isovit.spec.config import Config

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 20
"""The exporter's own choice: the first in which LayerNormalization and Gelu are one operator."""


def to_graph(
    module: nn.Module, config: Config, *, opset: int = OPSET, batch: int | None = None
) -> ir.Model:
    """The graph of a module that takes one batch of images.

    Args:
        module: in evaluation mode, on the CPU.
        config: of its model.
        opset: to write in.
        batch: number of images; None for any.
    """
    # An example of one image would be taken for a fixed batch.
    images = torch.zeros(batch or 2, *config.image_size, config.in_channels)
    program = torch.onnx.export(
        module,
        (images,),
        dynamo=True,
        opset_version=opset,
        dynamic_shapes=None if batch else dynamic_shapes(),
        input_names=[INPUT],
        output_names=[OUTPUT],
        verbose=False,
    )
    assert program is not None
    return program.model


def dynamic_shapes() -> tuple[dict[int, torch.export.Dim]]:
    """A first axis of any length, as ``torch.export`` wants to be told."""
    return ({0: torch.export.Dim(BATCH, min=1)},)
