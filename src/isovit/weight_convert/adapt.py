"""A checkpoint for another number of classes or another size of the image."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np

from isovit.errors import InputError
from isovit.spec.blocks import TransformerConfig
from isovit.spec.families import param_tree
from isovit.spec.initialize import draw
from isovit.weight_convert.checkpoint import Checkpoint
from isovit.weight_convert.resize import METHODS, resize_table
from isovit.weight_convert.tensors import Spec, Tensors

HEADS = ("head.", "head_dist.")
POSITIONS = "pos_embed"
RECOMPUTE = "recompute"


def adapt(
    checkpoint: Checkpoint,
    *,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    resize: str,
    seed: int = 0,
) -> Checkpoint:
    """Give a checkpoint another head, or positions for another grid; all else stays as it is.

    Args:
        checkpoint: to start from.
        num_classes: width of the head wanted; where it is the checkpoint's, the head is kept.
        image_size: height and width wanted, in pixels.
        resize: how positions are resized, a name in ``resize.METHODS``; or ``recompute``, for a
            fixed table that follows from the config.
        seed: of the new head, drawn as ``init`` draws it.

    Returns:
        A checkpoint whose notes tell what was changed.

    Raises:
        InputError: if there can be no such config, or no such resizing.
    """
    if resize not in (*METHODS, RECOMPUTE):
        raise InputError(f"resize={resize!r}: wanted {', '.join(METHODS)} or {RECOMPUTE}")
    config = cast("TransformerConfig", checkpoint.config)
    notes = list(checkpoint.source.notes)
    changes: dict[str, Any] = {}
    if num_classes is not None and num_classes != config.num_classes:
        changes["num_classes"] = num_classes
        notes.append(_about_head(config.num_classes, num_classes, seed))
    if image_size is not None:
        changes["image_size"] = image_size
    if not changes:
        return checkpoint
    target = config.replace(**changes)
    if target.grid != config.grid:
        notes.append(_about_positions(config, target, resize))
    source = Tensors.of(checkpoint.weights)
    params = param_tree(target).parameters()
    new_head = target.num_classes != config.num_classes
    specs = {
        path: Spec(param.shape, source.specs[path].dtype if path in source else _dtype(source))
        for path, param in params.items()
    }

    def fetch(path: str) -> np.ndarray:
        if new_head and path.startswith(HEADS):
            return draw(params[path], path, seed).astype(specs[path].dtype)
        if path != POSITIONS or target.grid == config.grid:
            return source[path]
        if resize == RECOMPUTE:
            return draw(params[path], path, seed).astype(specs[path].dtype)
        table = source[path]
        prefix = table.shape[1] - config.grid[0] * config.grid[1]
        return resize_table(table, config.grid, target.grid, resize, prefix)

    weights = Tensors(specs, fetch)
    return replace(
        checkpoint,
        config=target,
        weights=weights,
        source=replace(checkpoint.source, notes=tuple(notes)),
    )


def _about_head(before: int, after: int, seed: int) -> str:
    if not after:
        return f"left out the head of {before} classes"
    return f"the head of {before} classes is replaced by a new one of {after}, seed {seed}"


def _about_positions(config: TransformerConfig, target: TransformerConfig, method: str) -> str:
    if method == RECOMPUTE and getattr(target, "pos_embed", "learned") != "sinusoidal":
        raise InputError("resize=recompute is for fixed positions; these are learned")
    grids = [f"{rows}x{columns}" for rows, columns in (config.grid, target.grid)]
    return f"positions are resized from {grids[0]} to {grids[1]} patches by {method}"


def _dtype(tensors: Tensors) -> np.dtype:
    """The dtype of most weights."""
    dtypes = [spec.dtype for spec in tensors.specs.values()]
    return max(set(dtypes), key=dtypes.count) if dtypes else np.dtype(np.float32)
