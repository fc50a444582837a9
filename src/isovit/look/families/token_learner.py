"""Attention of TokenLearner: among the patches, and the maps of what is learned of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from isovit.look.attention import Array, Attention, Run, among
from isovit.spec.families.token_learner import CONVS


def attentions(run: Run) -> Iterator[Attention]:
    """One for each block over the grid, then one for each TokenLearner, a head for each token.

    The blocks behind a TokenLearner are not among them: their tokens are of no place.
    """
    config, numbers = run.config, run.config.block
    over_grid = config.learner_loc if config.num_learners else config.depth
    for i in range(min(over_grid, config.depth)):
        found = run.self_attention(
            f"blocks.{i}.attn",
            numbers.num_heads,
            numbers.attn_scale,
            prefix=0,
            grid=config.grid,
            cls=False,
        )
        yield _behind_learned(found) if config.num_learners else found
    for i in range(config.num_learners):
        yield _learner(run, i)


def _behind_learned(found: Attention) -> Attention:
    """The same where the first token is the learned ones, which neither look nor are looked at."""
    patches = found.queries + 1
    return replace(
        found,
        queries=patches,
        keys=patches,
        prefix=1,
        key_prefix=1,
        order=patches[0],
        has_class_token=True,
    )


def _learner(run: Run, index: int) -> Attention:
    """The learned tokens as the heads of one, which is before the grid and looks at it."""
    path, config = f"learners.{index}", run.config
    maps = _maps(run, path)  # (batch, learned tokens, places)
    x = np.broadcast_to(_input(run, index)[:, None], (*maps.shape, config.embed_dim))
    found = among(path, maps[:, :, None], x, prefix=1, grid=config.grid, cls=True)
    return replace(found, queries=found.queries[:, :1], keys=found.keys[:, 1:], order=np.arange(1))


def _maps(run: Run, path: str) -> Array:
    """What each learned token takes of each place."""
    if run.config.learner == "mlp":
        scores = np.swapaxes(run.output(f"{path}.mask"), 1, 2)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return weights / weights.sum(axis=-1, keepdims=True)
    last = run.output(f"{path}.convs.{CONVS - 1}")  # (batch, rows, columns, tokens)
    maps = 1 / (1 + np.exp(-np.moveaxis(last, -1, 1)))
    maps = maps.reshape(*maps.shape[:2], -1)
    return maps / math.prod(run.config.grid) if run.config.learner_pool == "mean" else maps


def _input(run: Run, index: int) -> Array:
    """The tokens that a TokenLearner gets: with fusers a sum, which no module puts out."""
    loc = run.config.learner_loc
    if loc:
        x = run.output(f"blocks.{loc - 1}")
    else:
        x = run.output("patch_embed") + run.weight("pos_embed")
    return x + sum(run.output(f"fusers.{i}") for i in range(index))
