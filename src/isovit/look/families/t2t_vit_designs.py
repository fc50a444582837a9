"""Attention of T2T-ViT with designs of convolutional networks: of the mixers and of the blocks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from isovit.look.attention import Array, Attention, Run, among, softmax, split_heads
from isovit.look.families import t2t_vit
from isovit.spec.blocks import BlockConfig


def attentions(run: Run) -> Iterator[Attention]:
    """Those of the stem's mixers that have a softmax, then one for each block."""
    yield from t2t_vit.mixers(run)
    config = run.config
    for i, numbers in enumerate(config.layers):
        if isinstance(numbers, BlockConfig):
            q, k, v = split_heads(_qkv(run, f"blocks.{i}.attn"), 3, numbers.num_heads)
            yield among(
                f"blocks.{i}.attn",
                softmax(q, k, numbers.attn_scale),
                v,
                prefix=config.prefix_tokens,
                grid=config.grid,
                cls=config.class_token,
            )


def _qkv(run: Run, path: str) -> Array:
    """All of q, k and v: in the ghost design the second half of each is the copy of the first."""
    made = run.output(f"{path}.qkv")
    if run.config.design != "ghost":
        return made
    copied = run.output(f"{path}.cheap")
    parts = zip(np.split(made, 3, axis=-1), np.split(copied, 3, axis=-1), strict=True)
    return np.concatenate([half for part in parts for half in part], axis=-1)
