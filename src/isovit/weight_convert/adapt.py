"""A checkpoint for another number of classes or another size of the image."""

from __future__ import annotations

import math
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
RECOMPUTE, FIRST = "recompute", "first"


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
            fixed table that follows from the config; or ``first``, which takes as many as are
            wanted from the front, whatever their rows, as vit-pytorch does for smaller images.
        seed: of the new head, drawn as ``init`` draws it.

    Returns:
        A checkpoint whose notes tell what was changed.

    Raises:
        InputError: if there can be no such config, or no such resizing.
    """
    if resize not in (*METHODS, RECOMPUTE, FIRST):
        known = f"{', '.join(METHODS)}, {RECOMPUTE} or {FIRST}"
        raise InputError(f"resize={resize!r}: wanted {known}")
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
        rows = _row_by_row(source[path], before)
        if resize == FIRST:
            rows = rows[:, : after.prefix + math.prod(after.grid)]
        else:
            rows = resize_table(rows, before.grid, after.grid, resize, before.prefix)
        return _by_window(rows, after).reshape(params[path].shape)

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


def _row_by_row(table: np.ndarray, about: PositionTable) -> np.ndarray:
    """Positions in one axis, (1, prefix + rows * columns, dim), whatever windows they go by."""
    if about.windows == (1, 1):
        return table.reshape(1, about.prefix + math.prod(about.grid), -1)
    (down, across), (rows, columns) = about.windows, about.grid
    x = table.reshape(down, across, rows // down, columns // across, -1)
    return x.swapaxes(1, 2).reshape(1, rows * columns, -1)


def _by_window(table: np.ndarray, about: PositionTable) -> np.ndarray:
    """The inverse of ``_row_by_row``, but for the shape."""
    (down, across), (rows, columns) = about.windows, about.grid
    if about.windows == (1, 1):
        return table
    return table.reshape(down, rows // down, across, columns // across, -1).swapaxes(1, 2)


def _about_positions(
    path: str, param: Param, before: PositionTable, after: PositionTable, method: str
) -> str:
    if method == RECOMPUTE and param.trainable:
        raise InputError("resize=recompute is for fixed positions; these are learned")
    if method == FIRST and math.prod(after.grid) > math.prod(before.grid):
        raise InputError("resize=first is for smaller images: there are too few positions")
    if method == FIRST and (before.windows, after.windows) != ((1, 1), (1, 1)):
        raise InputError("resize=first is for positions row by row; these go window by window")
    grids = [f"{rows}x{columns}" for rows, columns in (before.grid, after.grid)]
    name = "positions" if path == "pos_embed" else path
    return f"{name} are resized from {grids[0]} to {grids[1]} patches by {method}"


def _dtype(tensors: Tensors) -> np.dtype:
    """The dtype of most weights."""
    dtypes = [spec.dtype for spec in tensors.specs.values()]
    return max(set(dtypes), key=dtypes.count) if dtypes else np.dtype(np.float32)
