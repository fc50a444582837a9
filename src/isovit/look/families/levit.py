"""Attention of LeViT, with its biases; those that shrink the grid are among them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from isovit.look.attention import Array, Attention, Run, among, softmax
from isovit.spec.families.levit import AttentionConfig


def attentions(run: Run) -> Iterator[Attention]:
    """Stage by stage: the attention that leads to it, then one for each block."""
    for s, stage in enumerate(run.config.stages):
        if stage.downsample is not None:
            yield _attention(run, f"stages.{s}.downsample.attn", stage.downsample)
        for i in range(stage.depth):
            yield _attention(run, f"stages.{s}.blocks.{i}.attn", stage.attention)


def _attention(run: Run, path: str, numbers: AttentionConfig) -> Attention:
    heads, key_dim, scale = numbers.num_heads, numbers.key_dim, numbers.key_dim**-0.5
    if numbers.stride == 1:
        q, k, v = np.split(_heads(run.output(f"{path}.qkv"), heads), [key_dim, 2 * key_dim], -1)
    else:
        k, v = np.split(_heads(run.output(f"{path}.kv"), heads), [key_dim], axis=-1)
        q = _heads(run.output(f"{path}.q"), heads)
    bias = _offset_biases(run.weight(f"{path}.attention_biases"), numbers)
    bias = bias / scale if run.config.attn_bias_over_scale else bias
    found = among(path, softmax(q, k, scale, bias), v, prefix=0, grid=numbers.grid, cls=False)
    if numbers.stride == 1:
        return found
    queries = np.arange(numbers.out_tokens)
    return replace(found, queries=queries[None], grid=numbers.out_grid, order=queries)


def _heads(x: Array, num_heads: int) -> Array:
    """(batch, heads, tokens, width); a head has its own numbers side by side."""
    return x.reshape(*x.shape[:2], num_heads, -1).swapaxes(1, 2)


def _offset_biases(biases: Array, numbers: AttentionConfig) -> Array:
    """(heads, queries, keys): the bias of the offset, in rows and in columns, between the two."""
    places = np.indices(numbers.grid).reshape(2, -1)  # row and column of each key
    asking = np.indices(numbers.out_grid).reshape(2, -1) * numbers.stride
    rows, columns = np.abs(asking[:, :, None] - places[:, None, :])
    return biases[:, rows * numbers.grid[1] + columns]
