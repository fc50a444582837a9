"""Attention of CaiT: talking heads among the patches, then the class token's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from isovit.look.attention import Attention, Run, among, softmax, split_heads


def attentions(run: Run) -> Iterator[Attention]:
    """One for each block; weights are those behind the second mix of the heads."""
    config, grid = run.config, run.config.stem.grid
    for i in range(config.depth):
        path = f"blocks.{i}.attn"
        v = split_heads(run.output(f"{path}.qkv"), 3, config.num_heads)[2]
        weights = run.output(f"{path}.talking_heads.proj_w")
        found = among(path, weights, v, prefix=0, grid=grid, cls=True)
        # The class token is there from the start, but neither looks nor is looked at.
        patches = found.queries + 1
        yield replace(
            found, queries=patches, keys=patches, prefix=1, key_prefix=1, order=patches[0]
        )
    for i in range(config.cls_depth):
        path = f"cls_blocks.{i}.attn"
        k, v = split_heads(run.output(f"{path}.kv"), 2, config.num_heads)
        if config.cls_talking_heads:
            weights = run.output(f"{path}.talking_heads.proj_w")
        else:
            (q,) = split_heads(run.output(f"{path}.q"), 1, config.num_heads)
            weights = softmax(q, k, config.attn_scale)
        found = among(path, weights, v, prefix=1, grid=grid, cls=True)
        yield replace(found, queries=found.queries[:, :1], order=found.order[:1])
