"""Attention of DeepViT: re-attention where a block has it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from isovit.look.attention import Attention, Run
from isovit.look.families import vit


def attentions(run: Run) -> Iterator[Attention]:
    """One for each block. Mixed weights may be below zero, and do not sum to 1."""
    for i, found in enumerate(vit.attentions(run)):
        if run.config.re_attends(i):
            mixed = run.output(f"{found.path}.mix_norm")  # (batch, queries, keys, heads)
            weights = np.moveaxis(mixed, -1, 1) * run.config.re_attention_scale
            yield replace(found, weights=weights[:, None])
        else:
            yield found
