"""Attention of CvT, whose keys are convolutions of the tokens, with a stride."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from isovit.look.attention import Array, Attention, Run, among, softmax, split_heads
from isovit.spec.blocks import BlockConfig
from isovit.spec.families.cvt import StageConfig


def attentions(run: Run) -> Iterator[Attention]:
    """One for each block."""
    for s, stage in enumerate(run.config.stages):
        for i, block in enumerate(stage.blocks):
            yield _attention(run, f"stages.{s}.blocks.{i}.attn", stage, block)


def _attention(run: Run, path: str, stage: StageConfig, block: BlockConfig) -> Attention:
    heads, prefix = block.num_heads, int(stage.class_token)
    (q,) = split_heads(run.output(f"{path}.q"), 1, heads)
    if run.config.kv_convs == "one":
        k, v = split_heads(run.output(f"{path}.kv"), 2, heads)
    else:
        (k,) = split_heads(run.output(f"{path}.k"), 1, heads)
        (v,) = split_heads(run.output(f"{path}.v"), 1, heads)
    weights = softmax(q, k, block.attn_scale)
    found = among(path, weights, v, prefix=prefix, grid=stage.grid, cls=stage.class_token)
    keys = np.arange(prefix + math.prod(stage.kv_grid))
    return replace(found, keys=keys[None], key_grid=stage.kv_grid, spread=_windows(stage, prefix))


def _windows(stage: StageConfig, prefix: int) -> Array:
    """(keys, tokens): the mean over the tokens under the kernel of a key; the class token's own."""
    (rows, columns), reach = stage.grid, stage.kernel_size // 2
    spread = np.zeros((prefix + math.prod(stage.kv_grid), prefix + rows * columns))
    spread[:prefix, :prefix] = np.eye(prefix)
    for number, (row, column) in enumerate(np.ndindex(*stage.kv_grid)):
        seen = np.zeros((rows, columns))
        top, left = row * stage.kv_stride - reach, column * stage.kv_stride - reach
        down, right = top + stage.kernel_size, left + stage.kernel_size
        seen[max(top, 0) : down, max(left, 0) : right] = 1
        spread[prefix + number, prefix:] = (seen / seen.sum()).reshape(-1)
    return spread
