"""Attention maps: who looks at whom, in every attention of a model.

The softmax is inside a module in every framework, often inside one operator that never has it
whole. But what it is computed from are outputs of modules, which every backend traces. So the maps
are computed here, once for all backends, in float64 NumPy, and no model has to know of them.

Source of the rollout: Abnar & Zuidema 2020, "Quantifying Attention Flow in Transformers",
arXiv:2005.00928, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from isovit.backends import backend_of, get_backend
from isovit.errors import InputError
from isovit.spec.config import Config, require_model

Array = np.ndarray
Grid = tuple[int, int]

PADDING = -1
"""The number of what is no token, but one of the zeros that fill a window."""


@dataclass(frozen=True, kw_only=True)
class Attention:
    """The weights of one attention, and which tokens they are of.

    Tokens are numbered as the image has them: first those that are of no place in it, class or
    regional tokens, then the grid, row by row. Where only some tokens see each other, they are a
    group; an attention of all to all has one.

    Attributes:
        path: of the module.
        weights: (batch, groups, heads, queries, keys), by which v is multiplied: the softmax, or
            what the family makes of it. Nothing is dropped out.
        values: v, (batch, groups, heads, keys, width).
        queries: (groups, queries), numbers of the tokens that look; ``PADDING`` for none.
        keys: (groups, keys), numbers of those that are looked at; ``PADDING`` for none.
        prefix: how many tokens come before the grid.
        grid: rows and columns of the tokens that look.
        key_prefix: how many come before the grid of those that are looked at.
        key_grid: rows and columns of these; fewer where keys summarise.
        spread: (keys, tokens), which tokens a key summarises, in rows that sum to 1; None where
            keys are tokens themselves.
        order: numbers of the tokens in the order in which they go in and come out.
        has_class_token: whether the first token stands for the whole image.
    """

    path: str
    weights: Array
    values: Array
    queries: Array
    keys: Array
    prefix: int
    grid: Grid
    key_prefix: int
    key_grid: Grid
    spread: Array | None
    order: Array
    has_class_token: bool

    @property
    def tokens(self) -> int:
        """Number of tokens that could look."""
        return self.prefix + math.prod(self.grid)

    @property
    def key_tokens(self) -> int:
        """Number of keys, of all groups together."""
        return self.key_prefix + math.prod(self.key_grid)

    @property
    def among_its_tokens(self) -> bool:
        """Whether the keys are the tokens that look, or summaries of them."""
        return self.spread is not None or self.key_grid == self.grid

    def matrix(self) -> Array:
        """(batch, heads, tokens, keys): what each token gives to each key; 0 where it sees none."""
        batch, groups, heads = self.weights.shape[:3]
        whole = np.zeros((batch, heads, self.tokens, self.key_tokens))
        for group in range(groups):
            queries, keys, weights = self._real(group)
            whole[:, :, queries[:, None], keys] = weights
        return whole

    def _real(self, group: int) -> tuple[Array, Array, Array]:
        """Queries, keys and weights of a group without what is padding."""
        asks, seen = self.queries[group] != PADDING, self.keys[group] != PADDING
        weights = self.weights[:, group][..., asks, :][..., seen]
        return self.queries[group][asks], self.keys[group][seen], weights

    def seen(self) -> Array:
        """What is looked at: (batch, heads, rows, columns) of the keys' grid.

        It is what the class token gives to each place, or without one the mean of what the tokens
        give that see it.
        """
        if self.has_class_token and (self.queries == 0).any():
            given = self.matrix()[:, :, 0]
        else:
            batch, groups, heads = self.weights.shape[:3]
            given, askers = np.zeros((batch, heads, self.key_tokens)), np.zeros(self.key_tokens)
            for group in range(groups):
                queries, keys, weights = self._real(group)
                given[:, :, keys] += weights.sum(axis=-2)
                askers[keys] += len(queries)
            given = given / np.maximum(askers, 1)
        return given[..., self.key_prefix :].reshape(*given.shape[:2], *self.key_grid)


Maps = dict[str, Attention]


def attention(model: Any, images: Array) -> Maps:
    """The attention maps of a model that ``isovit.build`` made, in any framework.

    Args:
        model: of torch, Flax or Keras.
        images: (batch, height, width, channels), normalised.

    Returns:
        Maps by the path of the module, in the order in which they run.

    Raises:
        InputError: if it is no model of isovit's, or has no softmax to show.
    """
    backend = get_backend(backend_of(model))
    require_model(model.config, "attention")
    return attention_maps(model.config, backend.read(model), backend.trace(model, images))


def activations(model: Any, images: Array) -> dict[str, Array]:
    """Outputs of every module of a model by path, ``""`` for the model's own; see ``attention``."""
    return get_backend(backend_of(model)).trace(model, images)


def attention_maps(
    config: Config, weights: Mapping[str, Array], outputs: Mapping[str, Array]
) -> Maps:
    """The attention maps of a model, from what its modules put out.

    Args:
        config: of the model.
        weights: canonical.
        outputs: of its modules, by path, as every backend's ``trace`` gives them.
    """
    family = import_module(f"isovit.look.families.{config.family}")
    run = Run(config, weights, outputs)
    maps = {found.path: found for found in family.attentions(run)}
    if not maps:
        raise InputError(f"a {config.family} of this config has no attention to show")
    return maps


@dataclass(frozen=True)
class Run:
    """A model that ran: its config, its weights, and what its modules put out.

    Attributes:
        config: of the model.
        weights: canonical.
        outputs: by path.
    """

    config: Any
    weights: Mapping[str, Array]
    outputs: Mapping[str, Array]

    def output(self, path: str) -> Array:
        """Output of a module, in float64."""
        return np.asarray(self.outputs[path], np.float64)

    def weight(self, path: str) -> Array:
        """A parameter, in float64."""
        return np.asarray(self.weights[path], np.float64)

    def self_attention(
        self, path: str, num_heads: int, scale: float, *, prefix: int, grid: Grid, cls: bool
    ) -> Attention:
        """An attention of all tokens to all, whose q, k and v are one product."""
        q, k, v = split_heads(self.output(f"{path}.qkv"), 3, num_heads)
        return among(path, softmax(q, k, scale), v, prefix=prefix, grid=grid, cls=cls)


def split_heads(x: Array, parts: int, num_heads: int) -> tuple[Array, ...]:
    """(..., tokens, parts · heads · width) as so many (..., heads, tokens, width)."""
    x = x.reshape(*x.shape[:-1], parts, num_heads, -1)
    x = np.moveaxis(x, -3, 0)  # (parts, ..., tokens, heads, width)
    return tuple(np.swapaxes(x, -3, -2))


def softmax(q: Array, k: Array, scale: float, bias: Array | float = 0.0) -> Array:
    """Weights of each query over the keys: the softmax of q·kᵀ · scale + bias."""
    scores = (q * scale) @ np.swapaxes(k, -2, -1) + bias
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def among(
    path: str, weights: Array, values: Array, *, prefix: int, grid: Grid, cls: bool
) -> Attention:
    """An attention of all tokens to all: (batch, heads, tokens, tokens) weights."""
    numbers = np.arange(prefix + math.prod(grid))
    return Attention(
        path=path,
        weights=weights[:, None],
        values=values[:, None],
        queries=numbers[None],
        keys=numbers[None],
        prefix=prefix,
        grid=grid,
        key_prefix=prefix,
        key_grid=grid,
        spread=None,
        order=numbers,
        has_class_token=cls,
    )


def windows(grid: Grid, window: Grid) -> Array:
    """(windows, tokens in one): places of a grid, row by row, cut into windows row by row."""
    (rows, columns), (height, width) = grid, window
    places = np.arange(rows * columns).reshape(rows // height, height, columns // width, width)
    return places.transpose(0, 2, 1, 3).reshape(-1, height * width)


def rollout(maps: Sequence[Attention]) -> Array:
    """How much of each place of the image is in the output, along all paths of attention.

    The product of ½I + ½A over the attentions of the last grid, A the mean over the heads: half of
    what leaves a block came by its residual. Weights below zero, which mixed heads can have, count
    as none. A key that summarises tokens passes to each its share.

    Returns:
        (batch, rows, columns) of the last grid: what the class token holds, or without one the
        mean over all tokens. The sum is 1, or 0 where the class token holds nothing of the image.
    """
    last = list(maps)[-1]
    prefix, grid = last.prefix, last.grid
    mixed = np.eye(last.tokens)
    for found in maps:
        if (found.prefix, found.grid) == (prefix, grid) and found.among_its_tokens:
            mixed = _residual(found) @ mixed
    held = mixed[..., 0, :] if last.has_class_token else mixed[..., prefix:, :].mean(axis=-2)
    held = np.broadcast_to(held, (len(last.weights), last.tokens))[:, prefix:]  # of the grid alone
    total = held.sum(axis=1, keepdims=True)
    return (held / np.where(total > 0, total, 1.0)).reshape(-1, *grid)


def _residual(found: Attention) -> Array:
    """½I + ½A, (batch, tokens, tokens); a token that does not look keeps what it has."""
    weights = np.maximum(found.matrix().mean(axis=1), 0.0)
    if found.spread is not None:
        weights = weights @ found.spread
    total = weights.sum(axis=-1, keepdims=True)
    same = np.eye(found.tokens)
    looked = total > 0
    weights = np.where(looked, weights / np.where(looked, total, 1.0), same)
    return 0.5 * same + 0.5 * weights
