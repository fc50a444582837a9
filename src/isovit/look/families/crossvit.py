"""Attention of CrossViT: in both branches, and of each class token to the other's patches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from isovit.look.attention import Attention, Run, among, softmax, split_heads


def attentions(run: Run) -> Iterator[Attention]:
    """Stage by stage: the blocks of the first branch, those of the second, then the fusions.

    A class token looks at itself, at the other branch's width, and at the other branch's patches.
    """
    config, branches = run.config, run.config.branches
    for s, stage in enumerate(config.stages):
        for b, (branch, blocks) in enumerate(zip(branches, stage.blocks, strict=True)):
            for i, block in enumerate(blocks):
                yield run.self_attention(
                    f"stages.{s}.encoders.{b}.blocks.{i}.attn",
                    block.num_heads,
                    block.attn_scale,
                    prefix=1,
                    grid=branch.grid,
                    cls=True,
                )
        for b, fusion in enumerate(stage.fusions):
            layers = [f".layers.{i}" for i in range(config.cross_depth)]
            for layer in [""] if config.fusion == "projected" else layers:
                path, scale = f"stages.{s}.fusions.{b}{layer}.attn", fusion.head_dim**-0.5
                (q,) = split_heads(run.output(f"{path}.q"), 1, fusion.num_heads)
                k, v = split_heads(run.output(f"{path}.kv"), 2, fusion.num_heads)
                weights = softmax(q, k, scale)
                other = branches[1 - b]
                found = among(path, weights, v, prefix=1, grid=other.grid, cls=True)
                yield replace(found, queries=found.queries[:, :1], order=found.order[:1])
