"""Forms of a torch model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isovit.backends.onnx.from_torch import dynamic_shapes
from isovit.backends.onnx.layout import HEADER, header
from isovit.export.forms import Target

EXTRA = f"{HEADER}.json"
"""The file in a ``.pt2`` archive that says the config."""


def write_onnx(model: Any, path: Path, target: Target) -> None:
    """Write ONNX."""
    from isovit.backends.onnx import from_torch, graph

    found = from_torch.to_graph(model, model.config, opset=target.opset, batch=target.batch)
    graph.write(graph.finish(found, model.config, fused_attention=target.fused_attention), path)


def write_pt2(model: Any, path: Path, target: Target) -> None:
    """Write the archive of ``torch.export``."""
    config = model.config
    images = torch.zeros(target.batch or 2, *config.image_size, config.in_channels)
    shapes = None if target.batch else dynamic_shapes()
    program = torch.export.export(model, (images,), dynamic_shapes=shapes)
    torch.export.save(program, path, extra_files={EXTRA: header("pt2", config)})


def open_pt2(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """The function of an archive."""
    module = torch.export.load(path).module()

    def function(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return module(torch.from_numpy(images)).numpy()

    return function
