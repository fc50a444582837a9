"""Efficient ViT in NumPy loops, and what vit-pytorch's can hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
from hypothesis import strategies as st

from isovit.spec.blocks import BlockConfig
from isovit.spec.families.efficient_vit import EfficientViTConfig
from parity_tests.oracles.arrays import Array, TransformerReference, attend
from parity_tests.oracles.fitting import Fields, Fit, projects
from parity_tests.oracles.originals import Original
from parity_tests.oracles.pairs import (
    HEADS,
    Pair,
    channel_counts,
    depths,
    grids,
    head_counts,
    statistics,
    widths,
)


class Reference(TransformerReference):
    """A ViT with one of four mixers; one image, one head and one token after another."""

    config: EfficientViTConfig

    def output(self, images: Array) -> Array:
        """See ``Reference.output``."""
        return self.classify(self.encode(self.embed(images)))

    def embed(self, images: Array) -> Array:
        """Every token, with its position."""
        return self.positioned(self.patch_embed(images), positions_first=False)

    def encode(self, x: Array) -> Array:
        """The transformer, and the final norm if it is over tokens."""
        for i, block in enumerate(self.config.blocks):
            x = self.block(f"transformer.blocks.{i}", block, x)
        x = self.norm("transformer.norm", x) if self.config.transformer_norm else x
        x = self.keep("transformer", x)
        return self.norm("norm", x) if self.config.final_norm == "tokens" else x

    def patch_embed(self, images: Array) -> Array:
        """Patches, row by row, to tokens."""
        path, (height, width), (rows, columns) = (
            "patch_embed", self.config.patch_size, self.config.grid
        )  # fmt: skip
        patches = [
            images[:, i * height : (i + 1) * height, j * width : (j + 1) * width]
            for i in range(rows)
            for j in range(columns)
        ]
        x = np.stack([patch.reshape(len(patch), -1) for patch in patches], axis=1)
        x = self.dense(f"{path}.proj", self.norm(f"{path}.norm1", x))
        return self.keep(path, self.norm(f"{path}.norm2", x))

    def block(self, path: str, config: BlockConfig, x: Array) -> Array:
        """The pre-norm block around a mixer."""
        y = self.attention(f"{path}.attn", config, self.norm(f"{path}.norm1", x))
        x = x + self.scale(f"{path}.layer_scale1", y)
        y = self.mlp(f"{path}.mlp", config.activation, self.norm(f"{path}.norm2", x))
        return self.keep(path, x + self.scale(f"{path}.layer_scale2", y))

    def attention(self, path: str, config: BlockConfig, x: Array) -> Array:
        """The mixer, and the projection behind it."""
        qkv = self.dense(f"{path}.qkv", x)
        if self.config.mixer == "full":
            y = attend(qkv, config.num_heads, config.attn_scale)
        else:
            mix = {"nystrom": self.nystrom, "performer": self.performer, "linear": self.linear}
            # (parts, images, heads, tokens, head_dim)
            parts = qkv.reshape(*qkv.shape[:2], 3, config.num_heads, -1).transpose(2, 0, 3, 1, 4)
            y = mix[self.config.mixer](path, config, *parts)
            y = y.swapaxes(1, 2).reshape(*x.shape[:2], -1)
        return self.keep(path, self.dense(f"{path}.proj", y) if config.attn_proj else y)

    def nystrom(self, path: str, config: BlockConfig, q: Array, k: Array, v: Array) -> Array:
        """Nyström attention; zeros are put first, and their tokens cut off at the end."""
        tokens, number = q.shape[2], self.config.num_landmarks
        length = math.ceil(tokens / number)
        zeros = number * length - tokens
        q, k, v = (np.pad(x, ((0, 0), (0, 0), (zeros, 0), (0, 0))) for x in (q, k, v))
        q = q * config.attn_scale
        middles = {}
        for b, h in np.ndindex(*q.shape[:2]):
            middles[b, h] = softmax(means(q[b, h], length) @ means(k[b, h], length).T)
        y = np.zeros_like(v)
        for (b, h), middle in middles.items():
            beside = middles.values() if self.config.pinv_norm == "batch" else [middle]
            inverse = self.pseudo_inverse(middle, largest(beside, 0) * largest(beside, 1))
            first = softmax(q[b, h] @ means(k[b, h], length).T)
            last = softmax(means(q[b, h], length) @ k[b, h].T)
            y[b, h] = first @ inverse @ last @ v[b, h]
        y, v = y[:, :, zeros:], v[:, :, zeros:]
        return y if self.config.residual_kernel is None else y + self.residual(path, v)

    def pseudo_inverse(self, a: Array, norm: Any) -> Array:
        """So many steps towards it as the config has."""
        z, eye = a.T / norm, np.eye(len(a))
        for _ in range(self.config.pinv_iterations):
            az = a @ z
            z = z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))) / 4
        return z

    def residual(self, path: str, v: Array) -> Array:
        """The convolution of v over the tokens, each head by itself."""
        padding = (self.config.residual_kernel or 0) // 2, 0
        v = v.transpose(0, 2, 3, 1)  # (batch, tokens, head_dim, heads)
        y = self.conv(f"{path}.residual_conv", v, (1, 1), padding, groups=v.shape[-1])
        return y.transpose(0, 3, 1, 2)

    def performer(self, path: str, config: BlockConfig, q: Array, k: Array, v: Array) -> Array:
        """Attention by random features: a matrix of weights for each head, never formed there."""
        features = self.weights[f"{path}.random_features"]

        def exponents(x: Array) -> Array:
            return np.stack([x @ w - (x * x).sum(-1) / 2 for w in features], axis=-1)

        y = np.zeros_like(v)
        for b, h in np.ndindex(*v.shape[:2]):
            of_q = exponents(q[b, h] * config.attn_scale**0.5)
            of_k = exponents(k[b, h] * config.attn_scale**0.5)
            if self.config.performer_stabilized:  # by constants
                of_q = of_q - of_q.real.max(axis=1, keepdims=True)
                of_k = of_k - of_k.real.max()
            weights = np.exp(of_q) @ np.exp(of_k).T / len(features)
            total = weights.sum(axis=1, keepdims=True) + self.config.performer_eps
            y[b, h] = weights / total @ v[b, h]
        return y

    def linear(self, _: str, config: BlockConfig, q: Array, k: Array, v: Array) -> Array:
        """Efficient attention: one matrix of weights for each head."""
        y = np.zeros_like(v)
        for b, h in np.ndindex(*v.shape[:2]):
            y[b, h] = softmax(q[b, h]) @ softmax(k[b, h].T) @ v[b, h]
        return y


def softmax(scores: Array) -> Array:
    """Over the last axis."""
    powers = np.exp(scores - scores.real.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def means(x: Array, length: int) -> Array:
    """Of so many rows at a time."""
    return np.stack([x[i : i + length].mean(axis=0) for i in range(0, len(x), length)])


def largest(matrices: Iterable[Array], axis: int) -> Any:
    """The largest sum along an axis of any of them."""
    return max((total for a in matrices for total in a.sum(axis=axis)), key=np.real)


@st.composite
def vit_pytorch_efficient_vits(draw: st.DrawFn, mixer: str) -> Pair:
    """vit-pytorch's efficient ViT around its own Transformer or a Nystromformer."""
    side, (rows, columns), channels = draw(st.integers(3, 5)), draw(grids), draw(channel_counts)
    dim, heads = draw(widths), draw(head_counts)
    depth = draw(depths if mixer == "full" else st.integers(1, 2))
    dim_head = draw(st.sampled_from([dim, 5, 8]))
    pool, num_classes = draw(pools), draw(st.integers(1, 5))
    own: dict[str, Any] = dict(dim=dim, depth=depth, heads=heads, dim_head=dim_head)
    full: Fields = dict(num_heads=heads, head_dim=dim_head, depth=depth)
    if mixer == "full":
        own["mlp_dim"] = full["mlp_dim"] = draw(widths)
        full |= dict(transformer_norm=True, attn_proj=not (heads == 1 and dim_head == dim))
        untold = ("num_heads", *HEADS[depth > 0])
    else:
        landmarks, kernel = draw(st.integers(1, 5)), draw(st.sampled_from([None, 1, 3, 33]))
        own |= dict(
            num_landmarks=landmarks, pinv_iterations=draw(st.integers(1, 6)),
            attn_values_residual=kernel is not None,
            attn_values_residual_conv_kernel=kernel or 33,
        )  # fmt: skip
        full |= dict(
            mixer="nystrom", num_landmarks=landmarks, pinv_iterations=own["pinv_iterations"],
            pinv_norm="batch", residual_kernel=kernel, mlp_dim=4 * dim,
        )  # fmt: skip
        untold = ("num_landmarks", "pinv_iterations") if kernel else None
    arguments = dict(
        image_size=(rows * side, columns * side), patch_size=side, num_classes=num_classes,
        pool=pool, channels=channels, dim=dim, transformer=own,
    )  # fmt: skip
    config = EfficientViTConfig(
        image_size=(rows * side, columns * side), patch_size=(side, side), in_channels=channels,
        preprocess=statistics(channels), num_classes=num_classes, embed_dim=dim, qkv_bias=False,
        norm_eps=1e-5, final_norm="pooled", pool=pool, **full,
    )  # fmt: skip
    told = ("image_size", "patch_size", "pool")
    return Pair(arguments, config, None if untold is None else (*told, *untold))


pools = st.sampled_from(["cls", "mean"])


def with_transformer(module: str, name: str) -> Callable[[ModuleType], Callable[..., Any]]:
    """Makers of vit-pytorch's efficient ViT with a transformer of some library.

    Args:
        module: that the transformer is in.
        name: of its class, which takes the arguments ``transformer``.
    """

    def maker(library: ModuleType) -> Callable[..., Any]:
        def make(transformer: dict[str, Any], **arguments: Any) -> Any:
            plugged = getattr(import_module(module), name)(**transformer)
            return import_module("vit_pytorch.efficient").ViT(transformer=plugged, **arguments)

        return make

    return maker


FULL = with_transformer("vit_pytorch.vit", "Transformer")
NYSTROM = with_transformer("nystrom_attention", "Nystromformer")

ORIGINALS = {
    "vit_pytorch": Original(
        "vit_pytorch", "vit_pytorch.vit", FULL, lambda: vit_pytorch_efficient_vits("full")
    ),
    "nystrom_attention": Original(
        "vit_pytorch", "nystrom_attention", NYSTROM, lambda: vit_pytorch_efficient_vits("nystrom")
    ),
}


# What each format can hold


def vit_pytorch(draw: st.DrawFn, config: EfficientViTConfig) -> Fields:
    """Square patches, always a class token and a head, and one of two transformers."""
    side, (rows, columns), nystrom = config.patch_size[0], config.grid, config.mixer == "nystrom"
    fields: Fields = dict(
        image_size=(rows * side, columns * side), patch_size=side,
        mixer="nystrom" if nystrom else "full", transformer_norm=not nystrom, pinv_norm="batch",
        head_dim=config.block.head_dim, qkv_bias=False, attn_scale=None, layer_scale_init=None,
        class_token=True, final_norm="pooled", pool=draw(pools),
        num_classes=config.num_classes or 1,
    )  # fmt: skip
    if nystrom:
        return fields | dict(attn_proj=True, mlp_dim=4 * config.embed_dim)
    return fields | dict(attn_proj=projects(config))


def vit_pytorch_model(_: ModuleType, config: EfficientViTConfig) -> Any:
    """Its sizes are the config's."""
    own: dict[str, Any] = dict(
        dim=config.embed_dim, depth=config.depth, heads=config.num_heads,
        dim_head=config.block.head_dim,
    )  # fmt: skip
    if config.mixer == "full":
        own["mlp_dim"] = config.mlp_dim
    else:
        own |= dict(
            num_landmarks=config.num_landmarks, pinv_iterations=config.pinv_iterations,
            attn_values_residual=config.residual_kernel is not None,
            attn_values_residual_conv_kernel=config.residual_kernel or 33,
        )  # fmt: skip
    make = (FULL if config.mixer == "full" else NYSTROM)(_)
    return make(
        transformer=own, image_size=config.image_size, patch_size=config.patch_size[0],
        channels=config.in_channels, num_classes=config.num_classes, dim=config.embed_dim,
        pool=config.pool,
    )  # fmt: skip


FITS = {"vit_pytorch": Fit(vit_pytorch, "nystrom_attention", vit_pytorch_model)}

PARAMETERS = {
    "efficient_vit_full": (22_052_200, 22_052_200),
    "efficient_vit_nystrom": (22_054_576, 22_054_576),
    "efficient_vit_performer": (22_101_352, 22_052_200),
    "efficient_vit_linear": (22_052_200, 22_052_200),
    "efficient_vit_nystrom_pytorch": (42_006_088, 42_006_088),
}
"""Total and trainable. The last is counted in vit-pytorch 1.26.11 with nystrom-attention 0.0.14,
instantiated. The others are ViT-S/16 over 196 tokens (22,050,664 published, less a token and its
position) with two LayerNorms in the stem; 12 blocks of 6 kernels of 33, or of 64 · 64 features."""
