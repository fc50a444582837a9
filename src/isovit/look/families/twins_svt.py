"""Attention of Twins-SVT: within windows, and to a summary of each square of tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from isovit.look.attention import (
    PADDING,
    Array,
    Attention,
    Run,
    among,
    softmax,
    split_heads,
    windows,
)
from isovit.spec.blocks import BlockConfig
from isovit.spec.families.twins_svt import StageConfig


def attentions(run: Run) -> Iterator[Attention]:
    """One for each block."""
    for s, stage in enumerate(run.config.stages):
        for i, block in enumerate(stage.blocks):
            path = f"stages.{s}.blocks.{i}.attn"
            yield (_local if stage.is_local(i) else _global)(run, path, stage, block)


def _local(run: Run, path: str, stage: StageConfig, block: BlockConfig) -> Attention:
    """Windows; the zeros that fill the last ones are keys too, and queries that come to nothing."""
    side, (rows, columns) = stage.window_size, stage.padded_grid
    qkv = run.output(f"{path}.qkv")
    qkv = qkv.reshape(len(qkv), rows * columns, -1)
    places = windows(stage.padded_grid, (side, side))  # (windows, tokens), of the padded grid
    q, k, v = split_heads(qkv[:, places], 3, block.num_heads)
    weights = softmax(q, k, block.attn_scale)
    numbers = _numbers(stage)[places]
    found = among(path, weights, v, prefix=0, grid=stage.grid, cls=False)
    return replace(found, weights=weights, values=v, queries=numbers, keys=numbers)


def _numbers(stage: StageConfig) -> Array:
    """Of each place of the padded grid, row by row, the number of its token."""
    (rows, columns), (padded_rows, padded_columns) = stage.grid, stage.padded_grid
    numbers = np.full((padded_rows, padded_columns), PADDING)
    numbers[:rows, :columns] = np.arange(rows * columns).reshape(rows, columns)
    return numbers.reshape(-1)


def _global(run: Run, path: str, stage: StageConfig, block: BlockConfig) -> Attention:
    """Summaries; rows and columns beyond the last whole square are in none."""
    (q,) = split_heads(run.output(f"{path}.q"), 1, block.num_heads)
    kv = run.output(f"{path}.kv")
    k, v = split_heads(kv.reshape(len(kv), math.prod(stage.reduced_grid), -1), 2, block.num_heads)
    weights = softmax(q, k, block.attn_scale)
    found = among(path, weights, v, prefix=0, grid=stage.grid, cls=False)
    if stage.reduction == 1:
        return found
    keys = np.arange(math.prod(stage.reduced_grid))
    return replace(found, keys=keys[None], key_grid=stage.reduced_grid, spread=_squares(stage))


def _squares(stage: StageConfig) -> Array:
    """(summaries, tokens): the mean over the tokens of a square."""
    side, (rows, columns) = stage.reduction, stage.reduced_grid
    numbers = np.arange(math.prod(stage.grid)).reshape(stage.grid)
    numbers = numbers[: rows * side, : columns * side]
    squares = numbers.reshape(-1)[windows((rows * side, columns * side), (side, side))]
    spread = np.zeros((rows * columns, math.prod(stage.grid)))
    np.put_along_axis(spread, squares, 1 / side**2, axis=1)
    return spread
