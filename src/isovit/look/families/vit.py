"""Attention of ViT's blocks."""

from __future__ import annotations

from collections.abc import Iterator

from isovit.look.attention import Attention, Run


def attentions(run: Run) -> Iterator[Attention]:
    """One for each block, over the tokens before the patches and the patches."""
    config = run.config
    for i, block in enumerate(config.blocks):
        yield run.self_attention(
            f"blocks.{i}.attn",
            block.num_heads,
            block.attn_scale,
            prefix=config.prefix_tokens,
            grid=config.grid,
            cls=config.class_token,
        )
