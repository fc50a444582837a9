"""Every module once more, in NumPy loops and float64: slow, and plainly right.

Written from the papers and the facts about the published code, not from a backend. Attention runs
over one image and one head at a time. Here is what families share; each has a ``Reference`` of its
own in ``families``.

All of it is analytic, so it takes complex numbers too, and gives derivatives by them: the imaginary
part of f(x + ihd) / h is the derivative along d, without a difference in which digits are lost
(Squire & Trapp 1998, "Using complex variables to estimate derivatives of real functions").
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import import_module
from typing import Any, TypeVar

import numpy as np

from isovit.backends.protocol import NO_OTHERS
from isovit.spec.blocks import BlockConfig, TransformerConfig
from isovit.spec.config import BaseConfig
from isovit.spec.families import home

Array = np.ndarray

TINY = 1e-30j
"""A complex step. Its square is nothing beside 1, so there is no truncation either."""


def reference(
    config: BaseConfig,
    weights: Mapping[str, Array],
    images: Array,
    others: Mapping[str, Array] = NO_OTHERS,
) -> dict[str, Array]:
    """Output of every module by path, ``""`` for the model's own."""
    family = import_module(f"parity_tests.oracles.{home(config.family)}")
    return family.Reference(config, weights).run(images, **others)


def derivative(
    config: BaseConfig,
    weights: Mapping[str, Array],
    images: Array,
    directions: Mapping[str, Array],
    others: Mapping[str, Array] = NO_OTHERS,
) -> Array:
    """Derivative of the output along a direction in the space of weights and ``images``."""
    moved = {path: array + TINY * directions.get(path, 0.0) for path, array in weights.items()}
    images = images + TINY * directions["images"]
    return reference(config, moved, images, others)[""].imag / abs(TINY)


Model = TypeVar("Model", bound="Reference")


class Reference:
    """A model: its weights in float64, and the outputs of its modules as they come."""

    def __init__(self, config: Any, weights: Mapping[str, Array]) -> None:
        self.config = config
        self.weights = {path: widen(array) for path, array in weights.items()}
        self.outputs: dict[str, Array] = {}

    def run(self, images: Array, **others: Array) -> dict[str, Array]:
        """Output of every module by path."""
        self.keep("", self.output(widen(images), **others))
        return self.outputs

    def output(self, images: Array, **others: Array) -> Array:
        """The model's own output; every family and every objective has its own."""
        raise NotImplementedError

    def part(self, name: str, kind: type[Model], config: BaseConfig) -> Model:
        """A model within this one, whose outputs are kept with its own."""
        prefix = f"{name}."
        inner = {p.removeprefix(prefix): a for p, a in self.weights.items() if p.startswith(prefix)}
        model = kind(config, inner)
        model.keep = lambda path, x: self.keep(prefix + path, x)  # type: ignore[method-assign]
        return model

    def block(self, path: str, config: BlockConfig, x: Array) -> Array:
        """The pre-norm block that families share."""
        eps = config.norm_eps
        qkv = self.dense(f"{path}.attn.qkv", self.norm(f"{path}.norm1", x, eps))
        y = attend(qkv, config.num_heads, config.attn_scale)
        y = self.dense(f"{path}.attn.proj", y) if config.attn_proj else y
        x = x + self.scale(f"{path}.layer_scale1", self.keep(f"{path}.attn", y))
        y = self.mlp(f"{path}.mlp", config.activation, self.norm(f"{path}.norm2", x, eps))
        return self.keep(path, x + self.scale(f"{path}.layer_scale2", y))

    def mlp(self, path: str, activation: str, x: Array) -> Array:
        """Dense, activation, dense."""
        hidden = ACTIVATIONS[activation](self.dense(f"{path}.fc1", x))
        return self.keep(path, self.dense(f"{path}.fc2", hidden))

    def scale(self, path: str, x: Array) -> Array:
        """A factor per channel, where there is one."""
        gamma = self.weights.get(f"{path}.gamma")
        return x if gamma is None else self.keep(path, x * gamma)

    def dense(self, path: str, x: Array) -> Array:
        """x·W + b."""
        y = x @ self.weights[f"{path}.kernel"]
        return self.keep(path, y + self.weights.get(f"{path}.bias", 0.0))

    def norm(self, path: str, x: Array, eps: float | None = None) -> Array:
        """LayerNorm over the last axis; epsilon of the config unless another is given."""
        centred = x - x.mean(-1, keepdims=True)
        variance = (centred**2).mean(-1, keepdims=True)
        y = centred / np.sqrt(variance + (self.config.norm_eps if eps is None else eps))
        return self.keep(path, y * self.weights[f"{path}.scale"] + self.weights[f"{path}.bias"])

    def batch_norm(self, path: str, x: Array, eps: float) -> Array:
        """BatchNorm over the last axis at evaluation."""
        scale, bias, mean, var = (
            self.weights[f"{path}.{leaf}"] for leaf in ("scale", "bias", "mean", "var")
        )
        return self.keep(path, (x - mean) / np.sqrt(var + eps) * scale + bias)

    def conv(
        self,
        path: str,
        x: Array,
        stride: tuple[int, int],
        padding: tuple[int, int],
        groups: int = 1,
    ) -> Array:
        """A convolution, one output pixel after another; a depthwise one has a group a channel."""
        kernel, bias = self.weights[f"{path}.kernel"], self.weights.get(f"{path}.bias", 0.0)
        (height, width, in_dim, out_dim), (down, right) = kernel.shape, stride
        x = np.pad(x, ((0, 0), *((n, n) for n in padding), (0, 0)))
        rows = (x.shape[1] - height) // down + 1
        columns = (x.shape[2] - width) // right + 1
        y = np.zeros((len(x), rows, columns, out_dim), np.result_type(x, kernel))
        for i, j in np.ndindex(rows, columns):
            patch = x[:, i * down : i * down + height, j * right : j * right + width]
            for g in range(groups):
                inside = patch[..., g * in_dim : (g + 1) * in_dim]
                outside = slice(g * out_dim // groups, (g + 1) * out_dim // groups)
                y[:, i, j, outside] = np.einsum("bhwi,hwio->bo", inside, kernel[..., outside])
        return self.keep(path, y + bias)

    def keep(self, path: str, x: Array) -> Array:
        """Note the output of a module."""
        self.outputs[path] = x
        return x


class TransformerReference(Reference):
    """A model with the shared backbone: tokens before the patches, blocks, and heads."""

    config: TransformerConfig

    def backbone(self, x: Array, positions_first: bool) -> Array:
        """Patches to logits.

        Args:
            x: (batch, patches, dim).
            positions_first: whether positions are added before the other tokens are put first.
        """
        return self.classify(self.encode(self.positioned(x, positions_first)))

    def positioned(self, x: Array, positions_first: bool) -> Array:
        """The other tokens before the patches, and positions; arguments as above."""
        positions = self.weights["pos_embed"]
        x = x + positions if positions_first else x
        for name in ("dist_token", "cls_token"):  # each is put before all others
            if name in self.weights:
                token = np.repeat(self.weights[name], len(x), axis=0)
                x = np.concatenate([token, x], axis=1)
        return x if positions_first else x + positions

    def encode(self, x: Array) -> Array:
        """Blocks, and the final norm if it is over tokens."""
        for i, block in enumerate(self.config.blocks):
            x = self.block(f"blocks.{i}", block, x)
        return self.norm("norm", x) if self.config.final_norm == "tokens" else x

    def head(self, x: Array) -> Array:
        """The final norm, if it is over tokens, and ``classify``."""
        return self.classify(self.norm("norm", x) if self.config.final_norm == "tokens" else x)

    def classify(self, x: Array) -> Array:
        """Pooling, the final norm if it is behind that, and heads."""
        config = self.config
        if "head_dist.kernel" in self.weights:
            return (self.dense("head", x[:, 0]) + self.dense("head_dist", x[:, 1])) / 2
        if config.pool == "cls":
            x = x[:, 0]
        elif config.pool == "mean":
            x = sum(x[:, t] for t in range(x.shape[1])) / x.shape[1]
        elif config.pool == "mean_patches":
            start = sum(name in self.weights for name in ("cls_token", "dist_token"))
            x = sum(x[:, t] for t in range(start, x.shape[1])) / (x.shape[1] - start)
        x = self.norm("norm", x) if config.final_norm == "pooled" else x
        if "pre_logits.kernel" in self.weights:
            x = np.tanh(self.dense("pre_logits", x))
        return self.dense("head", x) if config.num_classes else x


def attend(qkv: Array, num_heads: int, scale: float) -> Array:
    """Softmax attention; q, k and v side by side, each with its heads side by side."""
    batch, tokens, width = qkv.shape
    head_dim = width // 3 // num_heads
    out = np.zeros((batch, tokens, width // 3), qkv.dtype)
    for b in range(batch):
        for h in range(num_heads):
            columns = slice(h * head_dim, (h + 1) * head_dim)
            q, k, v = (part[:, columns] for part in np.split(qkv[b], 3, axis=-1))
            scores = scale * (q @ k.T)
            powers = np.exp(scores - scores.real.max(-1, keepdims=True))
            out[b, :, columns] = powers / powers.sum(-1, keepdims=True) @ v
    return out


def gelu(x: Array) -> Array:
    """x·Φ(x), by the error function of the C library, which is real: Φ' is the density."""
    cdf = np.vectorize(lambda z: (1 + math.erf(z / math.sqrt(2))) / 2)(x.real)
    if np.iscomplexobj(x):
        cdf = cdf + 1j * x.imag * np.exp(-(x.real**2) / 2) / math.sqrt(2 * math.pi)
    return x * cdf


def gelu_tanh(x: Array) -> Array:
    """The tanh approximation; Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2."""
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def quick_gelu(x: Array) -> Array:
    """The approximation by the logistic function; the same paper and section."""
    return x / (1 + np.exp(-1.702 * x))


def hardswish(x: Array) -> Array:
    """0 up to -3, x from 3 on, x·(x + 3) / 6 between; analytic but for the two kinks."""
    return np.where(x.real <= -3, 0, np.where(x.real >= 3, x, x * (x + 3) / 6))


def widen(array: Array) -> Array:
    return array.astype(np.result_type(array, np.float64))


ACTIVATIONS = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "hardswish": hardswish,
}
