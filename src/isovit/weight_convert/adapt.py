"""A checkpoint for another number of classes or another size of the image."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from isovit.errors import InputError
from isovit.spec.config import Config, PositionTable, require_model
from isovit.spec.families import param_tree
from isovit.spec.initialize import draw
from isovit.spec.param import Param
from isovit.weight_convert.checkpoint import Checkpoint
from isovit.weight_convert.resize import METHODS, resize_table
from isovit.weight_convert.tensors import Spec, Tensors

HEADS = ("head.", "head_dist.")
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
    if num_classes is None and image_size is None:
        return checkpoint
    config = require_model(checkpoint.config, "another head or image size")
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
    params = param_tree(target).parameters()
    moved = _moved_tables(config, target)
    notes += [_about_positions(path, params[path], *moved[path], resize) for path in moved]
    source = Tensors.of(checkpoint.weights)
    new_head = target.num_classes != config.num_classes
    for path, param in params.items():
        is_new = new_head and path.startswith(HEADS)
        if not is_new and path not in moved and param.shape != source.specs[path].shape:
            raise InputError(
                f"image_size={target.image_size}: {path} would have the shape {param.shape}, not "
                f"{source.specs[path].shape}, and is no table of positions that can be resized"
            )
    specs = {
        path: Spec(param.shape, source.specs[path].dtype if path in source else _dtype(source))
        for path, param in params.items()
    }

    def fetch(path: str) -> np.ndarray:
        if new_head and path.startswith(HEADS):
            return draw(params[path], path, seed).astype(specs[path].dtype)
        if path not in moved:
            return source[path]
        if resize == RECOMPUTE:
            return draw(params[path], path, seed).astype(specs[path].dtype)
        before, after = moved[path]
        return resize_table(source[path], before.grid, after.grid, resize, before.prefix)

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


def _moved_tables(config: Config, target: Config) -> dict[str, tuple[PositionTable, PositionTable]]:
    """The tables of positions whose grid changes, by path, as they were and as they will be."""
    before, after = config.position_tables, target.position_tables
    return {
        path: (before[path], after[path])
        for path in after
        if path in before and before[path].grid != after[path].grid
    }


def _about_positions(
    path: str, param: Param, before: PositionTable, after: PositionTable, method: str
) -> str:
    if method == RECOMPUTE and param.trainable:
        raise InputError("resize=recompute is for fixed positions; these are learned")
    grids = [f"{rows}x{columns}" for rows, columns in (before.grid, after.grid)]
    name = "positions" if path == "pos_embed" else path
    return f"{name} are resized from {grids[0]} to {grids[1]} patches by {method}"


def _dtype(tensors: Tensors) -> np.dtype:
    """The dtype of most weights."""
    dtypes = [spec.dtype for spec in tensors.specs.values()]
    return max(set(dtypes), key=dtypes.count) if dtypes else np.dtype(np.float32)
