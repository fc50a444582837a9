"""Every module of both families once more, in NumPy loops and float64: slow, and plainly right.

Written from the papers and the facts about the published code, not from a backend. Attention runs
over one image and one head at a time; a soft split visits one patch after another.

All of it is analytic, so it takes complex numbers too, and gives derivatives by them: the imaginary
part of f(x + ihd) / h is the derivative along d, without a difference in which digits are lost
(Squire & Trapp 1998, "Using complex variables to estimate derivatives of real functions").
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from isovit.spec.blocks import BlockConfig, TransformerConfig
from isovit.spec.families.t2t_vit import SoftSplit, T2TViTConfig
from isovit.spec.families.vit import ViTConfig

Array = np.ndarray

TINY = 1e-30j
"""A complex step. Its square is nothing beside 1, so there is no truncation either."""


def reference(
    config: TransformerConfig, weights: Mapping[str, Array], images: Array
) -> dict[str, Array]:
    """Output of every module by path, ``""`` for the model's own."""
    return Reference(config, weights).run(images)


def derivative(
    config: TransformerConfig,
    weights: Mapping[str, Array],
    images: Array,
    directions: Mapping[str, Array],
) -> Array:
    """Derivative of the output along a direction in the space of weights and ``images``."""
    moved = {path: array + TINY * directions.get(path, 0.0) for path, array in weights.items()}
    return reference(config, moved, images + TINY * directions["images"])[""].imag / abs(TINY)


def soft_split(image: Array, split: SoftSplit) -> Array:
    """Patches of one (rows, columns, dim) image, each as (channel, height, width), row by row."""
    kernel, stride, padding = split
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    rows, columns, _ = padded.shape
    return np.array(
        [
            [padded[i + di, j + dj, c] for c in range(image.shape[2])
             for di in range(kernel) for dj in range(kernel)]
            for i in range(0, rows - kernel + 1, stride)
            for j in range(0, columns - kernel + 1, stride)
        ]
    )  # fmt: skip


class Reference:
    """A model: its weights in float64, and the outputs of its modules as they come."""

    def __init__(self, config: TransformerConfig, weights: Mapping[str, Array]) -> None:
        self.config = config
        self.weights = {path: _widen(array) for path, array in weights.items()}
        self.outputs: dict[str, Array] = {}

    def run(self, images: Array) -> dict[str, Array]:
        """Output of every module by path."""
        config, images = self.config, _widen(images)
        if isinstance(config, T2TViTConfig):
            x, first = self._tokens_to_token(config, images), True
        else:
            assert isinstance(config, ViTConfig)
            x, first = self._patch_embed(config, images), config.pos_embed_tokens == "all"
        positions = self.weights["pos_embed"]
        x = x if first else x + positions
        for name in ("dist_token", "cls_token"):  # each is put before all others
            if name in self.weights:
                token = np.repeat(self.weights[name], len(x), axis=0)
                x = np.concatenate([token, x], axis=1)
        x = x + positions if first else x
        for i, block in enumerate(config.blocks):
            x = self._block(f"blocks.{i}", block, x)
        self._keep("", self._head(x))
        return self.outputs

    def _head(self, x: Array) -> Array:
        config = self.config
        x = self._norm("norm", x) if config.final_norm == "tokens" else x
        if "head_dist.kernel" in self.weights:
            return (self._dense("head", x[:, 0]) + self._dense("head_dist", x[:, 1])) / 2
        if config.pool == "cls":
            x = x[:, 0]
        elif config.pool == "mean":
            x = sum(x[:, t] for t in range(x.shape[1])) / x.shape[1]
        elif config.pool == "mean_patches":
            start = sum(name in self.weights for name in ("cls_token", "dist_token"))
            x = sum(x[:, t] for t in range(start, x.shape[1])) / (x.shape[1] - start)
        x = self._norm("norm", x) if config.final_norm == "pooled" else x
        if "pre_logits.kernel" in self.weights:
            x = np.tanh(self._dense("pre_logits", x))
        return self._dense("head", x) if config.num_classes else x

    def _patch_embed(self, config: ViTConfig, images: Array) -> Array:
        (height, width), (rows, columns) = config.patch_size, config.grid
        patches = [
            images[:, i * height : (i + 1) * height, j * width : (j + 1) * width]
            for i in range(rows)
            for j in range(columns)
        ]
        if config.patch_embed == "conv":
            kernel, bias = (self.weights[f"patch_embed.proj.{leaf}"] for leaf in ("kernel", "bias"))
            x = np.stack([np.einsum("bhwi,hwio->bo", p, kernel) + bias for p in patches], axis=1)
            self._keep("patch_embed.proj", x.reshape(len(x), rows, columns, -1))
        else:
            x = np.stack([patch.reshape(len(patch), -1) for patch in patches], axis=1)
            x = self._norm("patch_embed.norm1", x)
            x = self._norm("patch_embed.norm2", self._dense("patch_embed.proj", x))
        return self._keep("patch_embed", x)

    def _tokens_to_token(self, config: T2TViTConfig, images: Array) -> Array:
        mixers = {
            "performer": self._performer,
            "transformer": self._transformer,
            "full": self._full,
        }
        *mixed, last = config.stages
        x = images
        for j, stage in enumerate(mixed):
            x = np.stack([soft_split(image, stage.split) for image in x])
            x = mixers[config.token_mixer](f"tokens_to_token.mixers.{j}", config, x)
            x = x.reshape(len(x), *stage.grid, -1)
        x = np.stack([soft_split(image, last.split) for image in x])
        return self._keep("tokens_to_token", self._dense("tokens_to_token.project", x))

    def _performer(self, path: str, config: T2TViTConfig, x: Array) -> Array:
        kqv = self._dense(f"{path}.kqv", self._norm(f"{path}.norm1", x))
        k, q, v = (kqv[..., i * config.token_dim : (i + 1) * config.token_dim] for i in range(3))
        features = self.weights[f"{path}.random_features"]

        def phi(z: Array) -> Array:
            exponents = [z @ w - (z * z).sum(-1) / 2 for w in features]
            return np.exp(np.stack(exponents, axis=-1)) / math.sqrt(len(features))

        kernel = np.einsum("bqm,bkm->bqk", phi(q), phi(k))  # of every token with every other
        y = np.einsum("bqk,bkd->bqd", kernel, v)
        y = y / (kernel.sum(-1, keepdims=True) + config.performer_eps)
        y = v + self._dense(f"{path}.proj", y)
        y = y + self._mlp(f"{path}.mlp", config.activation, self._norm(f"{path}.norm2", y))
        return self._keep(path, y)

    def _transformer(self, path: str, config: T2TViTConfig, x: Array) -> Array:
        scale = (x.shape[-1] if config.token_scale == "input_dim" else config.token_dim) ** -0.5
        qkv = self._dense(f"{path}.attn.qkv", self._norm(f"{path}.norm1", x))
        v = qkv[..., 2 * config.token_dim :]
        y = self._dense(f"{path}.attn.proj", attend(qkv, 1, scale))
        y = self._keep(f"{path}.attn", v + y)
        y = y + self._mlp(f"{path}.mlp", config.activation, self._norm(f"{path}.norm2", y))
        return self._keep(path, y)

    def _full(self, path: str, config: T2TViTConfig, x: Array) -> Array:
        x = self._block(f"{path}.block", config.full_mixer(x.shape[-1]), x)
        return self._keep(path, self._norm(f"{path}.norm", x))

    def _block(self, path: str, config: BlockConfig, x: Array) -> Array:
        qkv = self._dense(f"{path}.attn.qkv", self._norm(f"{path}.norm1", x))
        y = attend(qkv, config.num_heads, config.attn_scale)
        y = self._dense(f"{path}.attn.proj", y) if config.attn_proj else y
        x = x + self._scale(f"{path}.layer_scale1", self._keep(f"{path}.attn", y))
        y = self._mlp(f"{path}.mlp", config.activation, self._norm(f"{path}.norm2", x))
        return self._keep(path, x + self._scale(f"{path}.layer_scale2", y))

    def _mlp(self, path: str, activation: str, x: Array) -> Array:
        hidden = ACTIVATIONS[activation](self._dense(f"{path}.fc1", x))
        return self._keep(path, self._dense(f"{path}.fc2", hidden))

    def _scale(self, path: str, x: Array) -> Array:
        gamma = self.weights.get(f"{path}.gamma")
        return x if gamma is None else self._keep(path, x * gamma)

    def _dense(self, path: str, x: Array) -> Array:
        y = x @ self.weights[f"{path}.kernel"]
        return self._keep(path, y + self.weights.get(f"{path}.bias", 0.0))

    def _norm(self, path: str, x: Array) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        variance = (centred**2).mean(-1, keepdims=True)
        y = centred / np.sqrt(variance + self.config.norm_eps)
        return self._keep(path, y * self.weights[f"{path}.scale"] + self.weights[f"{path}.bias"])

    def _keep(self, path: str, x: Array) -> Array:
        self.outputs[path] = x
        return x


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


def _widen(array: Array) -> Array:
    return array.astype(np.result_type(array, np.float64))


ACTIVATIONS = {"gelu": gelu, "gelu_tanh": gelu_tanh}
