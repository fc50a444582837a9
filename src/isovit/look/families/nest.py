"""Attention of NesT, within blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from isovit.look.attention import Attention, Run, among, softmax, split_heads, windows


def attentions(run: Run) -> Iterator[Attention]:
    """One for each layer of each level; tokens come block after block."""
    for i, level in enumerate(run.config.levels):
        places = windows(level.grid, level.block_size)  # (blocks, tokens)
        for j, layer in enumerate(level.layers):
            path = f"levels.{i}.blocks.{j}.attn"
            qkv = run.output(f"{path}.qkv")
            qkv = qkv.reshape(len(qkv), *places.shape, -1)  # (batch, blocks, tokens, 3 * inner)
            q, k, v = split_heads(qkv, 3, layer.num_heads)
            weights = softmax(q, k, layer.attn_scale)
            found = among(path, weights, v, prefix=0, grid=level.grid, cls=False)
            yield replace(
                found,
                weights=weights,
                values=v,
                queries=places,
                keys=places,
                order=places.reshape(-1),
            )
