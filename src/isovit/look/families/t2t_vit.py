"""Attention of T2T-ViT: of the token mixers that have a softmax, and of the blocks."""

from __future__ import annotations

from collections.abc import Iterator

from isovit.look.attention import Attention, Run
from isovit.look.families import vit


def attentions(run: Run) -> Iterator[Attention]:
    """Mixers, then blocks."""
    yield from mixers(run)
    yield from vit.attentions(run)


def mixers(run: Run) -> Iterator[Attention]:
    """Those of the stem. A performer never has weights of single tokens: it shows none."""
    config = run.config
    for i, stage in enumerate(config.stages[:-1]):
        if config.token_mixer == "transformer":
            scale = (stage.dim if config.token_scale == "input_dim" else config.token_dim) ** -0.5
            path, heads = f"tokens_to_token.mixers.{i}.attn", 1
        elif config.token_mixer == "full":
            block = config.full_mixer(stage.dim)
            scale, heads = block.attn_scale, block.num_heads
            path = f"tokens_to_token.mixers.{i}.block.attn"
        else:
            continue
        yield run.self_attention(path, heads, scale, prefix=0, grid=stage.grid, cls=False)
