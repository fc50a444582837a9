"""T2T-ViT in NumPy loops."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
from hypothesis import strategies as st

from isovit.spec.families.t2t_vit import SoftSplit, T2TViTConfig
from parity_tests.oracles import pairs
from parity_tests.oracles.arrays import Array, TransformerReference, attend
from parity_tests.oracles.fitting import Fields, Fit, filled, projects, ratio
from parity_tests.oracles.originals import Original


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


class Reference(TransformerReference):
    """T2T-ViT; a soft split visits one patch after another."""

    config: T2TViTConfig

    def output(self, images: Array) -> Array:
        """See ``Reference.output``."""
        return self.classify(self.encode(self.embed(images)))

    def embed(self, images: Array) -> Array:
        """Every token, with its position."""
        return self.positioned(self.tokens_to_token(self.config, images), positions_first=False)

    def tokens_to_token(self, config: T2TViTConfig, images: Array) -> Array:
        """The stem."""
        mixers = {
            "performer": self.performer,
            "transformer": self.transformer,
            "full": self.full,
        }
        *mixed, last = config.stages
        x = images
        for j, stage in enumerate(mixed):
            x = np.stack([soft_split(image, stage.split) for image in x])
            x = mixers[config.token_mixer](f"tokens_to_token.mixers.{j}", config, x)
            x = x.reshape(len(x), *stage.grid, -1)
        x = np.stack([soft_split(image, last.split) for image in x])
        return self.keep("tokens_to_token", self.dense("tokens_to_token.project", x))

    def performer(self, path: str, config: T2TViTConfig, x: Array) -> Array:
        """Linear attention, by the kernel of every token with every other."""
        kqv = self.dense(f"{path}.kqv", self.norm(f"{path}.norm1", x))
        k, q, v = (kqv[..., i * config.token_dim : (i + 1) * config.token_dim] for i in range(3))
        features = self.weights[f"{path}.random_features"]

        def phi(z: Array) -> Array:
            exponents = [z @ w - (z * z).sum(-1) / 2 for w in features]
            return np.exp(np.stack(exponents, axis=-1)) / math.sqrt(len(features))

        kernel = np.einsum("bqm,bkm->bqk", phi(q), phi(k))  # of every token with every other
        y = np.einsum("bqk,bkd->bqd", kernel, v)
        y = y / (kernel.sum(-1, keepdims=True) + config.performer_eps)
        y = v + self.dense(f"{path}.proj", y)
        y = y + self.mlp(f"{path}.mlp", config.activation, self.norm(f"{path}.norm2", y))
        return self.keep(path, y)

    def transformer(self, path: str, config: T2TViTConfig, x: Array) -> Array:
        """Softmax attention whose residual is v."""
        scale = (x.shape[-1] if config.token_scale == "input_dim" else config.token_dim) ** -0.5
        qkv = self.dense(f"{path}.attn.qkv", self.norm(f"{path}.norm1", x))
        v = qkv[..., 2 * config.token_dim :]
        y = self.dense(f"{path}.attn.proj", attend(qkv, 1, scale))
        y = self.keep(f"{path}.attn", v + y)
        y = y + self.mlp(f"{path}.mlp", config.activation, self.norm(f"{path}.norm2", y))
        return self.keep(path, y)

    def full(self, path: str, config: T2TViTConfig, x: Array) -> Array:
        """A block at full width."""
        x = self.block(f"{path}.block", config.full_mixer(x.shape[-1]), x)
        return self.keep(path, self.norm(f"{path}.norm", x))


ORIGINALS = {
    "vit_pytorch": Original(
        "vit_pytorch", "vit_pytorch.t2t", lambda m: m.T2TViT, pairs.vit_pytorch_t2t_vits
    ),
    "yitu": Original("yitu", "parity_tests.oracles.yitu", lambda m: m.T2TViT, pairs.yitu_vits),
}


# What each format can hold


def vit_pytorch(draw: st.DrawFn, config: T2TViTConfig) -> Fields:
    """Square images, always a class token and a head."""
    side = config.image_size[0]
    layers = tuple(SoftSplit(k, s, s // 2) for k, s in draw(pairs.t2t_layers(side)))
    return dict(
        image_size=side, t2t_layers=layers, token_mixer="full", pool=draw(st.sampled_from(POOLS)),
        class_token=True, final_norm="tokens", num_classes=config.num_classes or 1,
        layer_scale_init=None, attn_scale=None, qkv_bias=False, attn_proj=projects(config),
    )  # fmt: skip


POOLS = ("cls", "mean")
OFFICIAL = ((7, 4, 2), (3, 2, 1), (3, 2, 1))


def yitu(draw: st.DrawFn, config: T2TViTConfig) -> Fields:
    """Square images that 16 divides, token modules whose widths follow from one number."""
    return dict(
        **filled(config), image_size=draw(st.sampled_from([16, 32])), t2t_layers=OFFICIAL,
        token_mixer=draw(st.sampled_from(["performer", "transformer"])), token_scale="input_dim",
        token_mlp_dim=config.token_dim, performer_features=config.token_dim // 2, pool="cls",
        class_token=True, final_norm="tokens", layer_scale_init=None, qkv_bias=False,
    )  # fmt: skip


def vit_pytorch_model(library: ModuleType, config: T2TViTConfig) -> Any:
    """Its sizes are the config's."""
    return library.T2TViT(
        image_size=config.image_size[0], num_classes=config.num_classes, dim=config.embed_dim,
        depth=config.depth, heads=config.num_heads, mlp_dim=config.mlp_dim, pool=config.pool,
        channels=config.in_channels, dim_head=config.block.head_dim,
        t2t_layers=tuple((split.kernel, split.stride) for split in config.t2t_layers),
    )  # fmt: skip


def yitu_model(official: ModuleType, config: T2TViTConfig) -> Any:
    """Its sizes are the config's."""
    return official.T2TViT(
        img_size=config.image_size[0], tokens_type=config.token_mixer, in_chans=config.in_channels,
        num_classes=config.num_classes, embed_dim=config.embed_dim, depth=config.depth,
        num_heads=config.num_heads, mlp_ratio=ratio(config), token_dim=config.token_dim,
        qk_scale=config.attn_scale,
    )  # fmt: skip


FITS = {
    "yitu": Fit(yitu, "parity_tests.oracles.yitu", yitu_model),
    "vit_pytorch": Fit(vit_pytorch, "vit_pytorch.t2t", vit_pytorch_model),
}

PARAMETERS = {
    "t2t_vit_7": (4_310_222, 4_255_694),
    "t2t_vit_10": (5_889_230, 5_834_702),
    "t2t_vit_12": (6_941_902, 6_887_374),
    "t2t_vit_14": (21_545_550, 21_465_806),
    "t2t_vit_19": (39_177_422, 39_085_070),
    "t2t_vit_24": (64_105_934, 64_000_974),
    "t2t_vit_t_14": (21_541_070, 21_465_422),
    "t2t_vit_t_19": (39_172_942, 39_084_686),
    "t2t_vit_t_24": (64_101_454, 64_000_590),
    "t2t_vit_14_resnext": (21_545_550, 21_465_806),
    "t2t_vit_14_wide": (25_156_302, 25_000_910),
    "t2t_vit_pytorch": (23_465_986, 23_465_986),
}
"""Total and trainable, counted in the official code, whose README rounds the trainable ones, and
in vit-pytorch 1.26.11; each model instantiated."""
