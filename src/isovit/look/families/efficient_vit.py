"""Attention of efficient ViT: of three mixers the matrix that they never form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from isovit.look.attention import Array, Attention, Run, softmax, split_heads


def attentions(run: Run) -> Iterator[Attention]:
    """One for each block; what v is multiplied by, whichever way that is computed.

    Weights of ``nystrom`` may be below zero and do not sum to 1; its convolution over v is among
    them.
    """
    config, numbers = run.config, run.config.block
    for i in range(config.depth):
        path = f"transformer.blocks.{i}.attn"
        found = run.self_attention(
            path,
            numbers.num_heads,
            numbers.attn_scale,
            prefix=config.prefix_tokens,
            grid=config.grid,
            cls=config.class_token,
        )
        if config.mixer == "full":
            yield found
            continue
        q, k, _ = split_heads(run.output(f"{path}.qkv"), 3, numbers.num_heads)
        yield replace(found, weights=WEIGHTS[config.mixer](run, path, q, k)[:, None])


def _nystrom(run: Run, path: str, q: Array, k: Array) -> Array:
    """Softmax to the landmarks, pseudo-inverse, softmax from them, and the convolution's band."""
    config, tokens = run.config, run.config.tokens
    scale, first = config.block.attn_scale, ((0, 0), (0, 0), (config.padding, 0), (0, 0))
    keys = np.pad(k, first)
    q_landmarks, k_landmarks = (
        x.reshape(*x.shape[:2], config.num_landmarks, -1, x.shape[-1]).mean(axis=3)
        for x in (np.pad(q, first), keys)
    )
    inverse = _pseudo_inverse(run, softmax(q_landmarks, k_landmarks, scale))
    weights = softmax(q, k_landmarks, scale) @ inverse @ softmax(q_landmarks, keys, scale)
    weights = weights[..., config.padding :]
    if config.residual_kernel is None:
        return weights
    kernel = run.weight(f"{path}.residual_conv.kernel")[:, 0, 0].T  # (heads, tokens)
    offset = np.arange(tokens) - np.arange(tokens)[:, None] + config.residual_kernel // 2
    inside = (offset >= 0) & (offset < config.residual_kernel)
    return weights + np.where(inside, kernel[:, np.where(inside, offset, 0)], 0.0)


def _pseudo_inverse(run: Run, a: Array) -> Array:
    """The steps of the config towards it."""
    columns, eye = a.sum(axis=-2, keepdims=True), np.eye(a.shape[-1])
    axis = None if run.config.pinv_norm == "batch" else -1
    z = np.swapaxes(a, -2, -1) / columns.max(axis=axis, keepdims=True)
    for _ in range(run.config.pinv_iterations):
        az = a @ z
        z = z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))) / 4
    return z


def _performer(run: Run, path: str, q: Array, k: Array) -> Array:
    """φ(q)·φ(k), divided by their sum over the keys."""
    config, features = run.config, run.weight(f"{path}.random_features")
    root = np.sqrt(config.block.attn_scale)

    def exponent(x: Array) -> Array:
        x = x * root
        return x @ features.T - (x**2).sum(axis=-1, keepdims=True) / 2

    of_q, of_k = exponent(q), exponent(k)
    if config.performer_stabilized:
        of_q = of_q - of_q.max(axis=-1, keepdims=True)
        of_k = of_k - of_k.max(axis=(-2, -1), keepdims=True)
    weights = np.exp(of_q) @ np.swapaxes(np.exp(of_k), -2, -1) / len(features)
    return weights / (weights.sum(axis=-1, keepdims=True) + config.performer_eps)


def _linear(_run: Run, _path: str, q: Array, k: Array) -> Array:
    """Softmax of q over its width times softmax of k over the tokens."""
    return _softmax(q, axis=-1) @ np.swapaxes(_softmax(k, axis=-2), -2, -1)


def _softmax(x: Array, axis: int) -> Array:
    powers = np.exp(x - x.max(axis=axis, keepdims=True))
    return powers / powers.sum(axis=axis, keepdims=True)


WEIGHTS = {"nystrom": _nystrom, "performer": _performer, "linear": _linear}
