"""CaiT in NumPy loops."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
from hypothesis import strategies as st

from isovit.spec.config import Preprocess
from isovit.spec.families.cait import CaiTConfig
from parity_tests.oracles.arrays import Array
from parity_tests.oracles.families import vit
from parity_tests.oracles.fitting import Fields, Fit
from parity_tests.oracles.originals import Original
from parity_tests.oracles.pairs import (
    Pair,
    channel_counts,
    class_counts,
    depths,
    divisible,
    head_counts,
    patches,
    statistics,
    widths,
)


class Reference(vit.Reference):
    """CaiT; heads are mixed one pair after another."""

    config: CaiTConfig

    def output(self, images: Array) -> Array:
        """See ``Reference.output``."""
        config = self.config
        x = self.patch_embed(config.stem, images) + self.weights["pos_embed"]
        for i in range(config.depth):
            x = self.patch_block(f"blocks.{i}", x)
        cls = np.repeat(self.weights["cls_token"], len(x), axis=0)
        for i in range(config.cls_depth):
            cls = self.cls_block(f"cls_blocks.{i}", cls, x)
        x = self.norm("norm", np.concatenate([cls, x], axis=1))
        if config.pool != "none":
            count = x.shape[1]
            tokens = {"cls": [0], "mean": range(count), "mean_patches": range(1, count)}
            pooled = tokens[config.pool]
            x = sum(x[:, t] for t in pooled) / len(pooled)
        return self.dense("head", x) if config.num_classes else x

    def patch_block(self, path: str, x: Array) -> Array:
        """A block over the patches."""
        inner = self.config.inner_dim
        qkv = self.dense(f"{path}.attn.qkv", self.norm(f"{path}.norm1", x))
        q, k, v = (qkv[..., i * inner : (i + 1) * inner] for i in range(3))
        y = self.talk(f"{path}.attn.talking_heads", q, k, v)
        y = self.keep(f"{path}.attn", self.dense(f"{path}.attn.proj", y))
        return self.keep(path, self.branches(path, x, y))

    def cls_block(self, path: str, cls: Array, x: Array) -> Array:
        """A block over the class token."""
        config, inner = self.config, self.config.inner_dim
        if config.cls_norm == "tokens":
            u = self.norm(f"{path}.norm1", np.concatenate([cls, x], axis=1))
        else:
            u = np.concatenate([self.norm(f"{path}.norm1", cls), x], axis=1)
        q = self.dense(f"{path}.attn.q", u[:, :1])
        kv = self.dense(f"{path}.attn.kv", u)
        k, v = kv[..., :inner], kv[..., inner:]
        talks = config.cls_talking_heads
        y = self.talk(f"{path}.attn.talking_heads", q, k, v) if talks else self.silent(q, k, v)
        y = self.keep(f"{path}.attn", self.dense(f"{path}.attn.proj", y))
        return self.keep(path, self.branches(path, cls, y))

    def branches(self, path: str, x: Array, y: Array) -> Array:
        """Both branches of a block, of which the attention ``y`` is there already."""
        x = x + self.scale(f"{path}.layer_scale1", y)
        y = self.mlp(f"{path}.mlp", self.config.activation, self.norm(f"{path}.norm2", x))
        return x + self.scale(f"{path}.layer_scale2", y)

    def talk(self, path: str, q: Array, k: Array, v: Array) -> Array:
        """Attention whose heads are mixed before the softmax and behind it."""
        logits = self.mix(f"{path}.proj_l", self.logits(q, k))
        weights = self.mix(f"{path}.proj_w", [softmax(z) for z in logits])
        y = [w @ v for w, v in zip(weights, self.heads(v), strict=True)]
        self.keep(path, np.stack(y, axis=1))
        return self.merge(y)

    def silent(self, q: Array, k: Array, v: Array) -> Array:
        """Attention whose heads do not talk."""
        weights = [softmax(z) for z in self.logits(q, k)]
        return self.merge([w @ v for w, v in zip(weights, self.heads(v), strict=True)])

    def logits(self, q: Array, k: Array) -> list[Array]:
        """q·k / √d of each head."""
        scale = (self.config.inner_dim // self.config.num_heads) ** -0.5
        pairs = zip(self.heads(q), self.heads(k), strict=True)
        return [scale * (q @ k.swapaxes(1, 2)) for q, k in pairs]

    def mix(self, path: str, heads: list[Array]) -> list[Array]:
        """Each head's sum over all heads, by one number for every pair."""
        kernel, count = self.weights[f"{path}.kernel"], len(heads)
        bias = self.weights.get(f"{path}.bias", np.zeros(count))
        mixed = [sum(heads[h] * kernel[h, g] for h in range(count)) + bias[g] for g in range(count)]
        self.keep(path, np.stack(mixed, axis=1))
        return mixed

    def heads(self, x: Array) -> list[Array]:
        """(batch, tokens, head_dim) of each head."""
        return np.split(x, self.config.num_heads, axis=-1)

    def merge(self, heads: list[Array]) -> Array:
        """The heads side by side."""
        return np.concatenate(heads, axis=-1)


def softmax(x: Array) -> Array:
    """Over the last axis."""
    powers = np.exp(x - x.real.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


@st.composite
def timm_caits(draw: st.DrawFn) -> Pair:
    """timm's Cait, with one kind of block at least: without, nothing tells it from a ViT."""
    (height, width), rows, columns = draw(patches), draw(st.integers(1, 3)), draw(st.integers(2, 3))
    depth, heads, channels = draw(depths), draw(head_counts), draw(channel_counts)
    dim, mlp_ratio, cls_mlp_ratio = draw(divisible(heads)), draw(ratios), draw(ratios)
    num_classes, qkv_bias = draw(class_counts), draw(st.booleans())
    cls_depth = draw(st.integers(int(depth == 0), 2))
    pools = {"token": "cls"} if cls_depth else {"avg": "mean_patches"}
    pools |= {} if num_classes else {"": "none"}
    global_pool = draw(st.sampled_from(sorted(pools)))
    arguments: dict[str, Any] = dict(
        img_size=(rows * height, columns * width), patch_size=(height, width), in_chans=channels,
        num_classes=num_classes, global_pool=global_pool, embed_dim=dim, depth=depth,
        num_heads=heads, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, depth_token_only=cls_depth,
        mlp_ratio_token_only=cls_mlp_ratio,
    )  # fmt: skip
    differs = depth > 0 and cls_depth > 0 and cls_mlp_ratio != mlp_ratio
    config = CaiTConfig(
        image_size=(rows * height, columns * width), patch_size=(height, width),
        in_channels=channels, preprocess=statistics(channels), num_classes=num_classes,
        embed_dim=dim, depth=depth, cls_depth=cls_depth, num_heads=heads, qkv_bias=qkv_bias,
        mlp_dim=dim * (mlp_ratio if depth else cls_mlp_ratio),
        cls_mlp_dim=dim * cls_mlp_ratio if differs else None, norm_eps=1e-6,
        pool=pools[global_pool],
    )  # fmt: skip
    return Pair(arguments, config, ("image_size", "pool", *["num_heads"] * (depth == 0)))


ratios = st.integers(1, 3)


@st.composite
def vit_pytorch_caits(draw: st.DrawFn) -> Pair:
    """vit-pytorch's CaiT: square images in colour."""
    patch_size, side = draw(st.integers(3, 5)), draw(st.integers(2, 3))
    depth, cls_depth, heads = draw(depths), draw(st.integers(1, 2)), draw(head_counts)
    dim, mlp_dim, dim_head = draw(widths), draw(widths), draw(st.sampled_from([5, 8]))
    num_classes = draw(st.integers(1, 5))
    arguments: dict[str, Any] = dict(
        image_size=side * patch_size, patch_size=patch_size, num_classes=num_classes, dim=dim,
        depth=depth, cls_depth=cls_depth, heads=heads, mlp_dim=mlp_dim, dim_head=dim_head,
    )  # fmt: skip
    config = CaiTConfig(
        image_size=2 * (side * patch_size,), patch_size=2 * (patch_size,), num_classes=num_classes,
        patch_embed="norm_linear_norm", embed_dim=dim, depth=depth, cls_depth=cls_depth,
        num_heads=heads, head_dim=dim_head, qkv_bias=False, talking_heads_bias=False,
        cls_talking_heads=True, cls_norm="cls", mlp_dim=mlp_dim, norm_eps=1e-5,
        layer_scale_init=None, mixed_dropout=False,
    )  # fmt: skip
    return Pair(arguments, config)


ORIGINALS = {
    "timm": Original("timm", "timm.models.cait", lambda m: m.Cait, timm_caits),
    "vit_pytorch": Original("vit_pytorch", "vit_pytorch.cait", lambda m: m.CaiT, vit_pytorch_caits),
}


# What each format can hold


def timm(_: st.DrawFn, config: CaiTConfig) -> Fields:
    """Heads that fill the width and talk over the patches alone, with bias."""
    dim = -(-config.embed_dim // config.num_heads) * config.num_heads
    return dict(
        embed_dim=dim, head_dim=None, patch_embed="conv", talking_heads_bias=True,
        cls_talking_heads=False, cls_norm="tokens",
        pool="mean_patches" if config.pool == "mean" else config.pool,
    )  # fmt: skip


def deit(draw: st.DrawFn, config: CaiTConfig) -> Fields:
    """The same, and always the class token."""
    return timm(draw, config) | dict(pool="cls", cls_depth=config.cls_depth or 1)


def vit_pytorch(_: st.DrawFn, config: CaiTConfig) -> Fields:
    """Square images in colour, heads that talk everywhere and without bias."""
    side = config.patch_size[0]
    return dict(
        image_size=2 * side, patch_size=side, in_channels=3, preprocess=Preprocess(),
        patch_embed="norm_linear_norm", qkv_bias=False, talking_heads_bias=False,
        cls_talking_heads=True, cls_norm="cls", cls_depth=config.cls_depth or 1, cls_mlp_dim=None,
        pool="cls", num_classes=config.num_classes or 1,
    )  # fmt: skip


def timm_model(library: ModuleType, config: CaiTConfig) -> Any:
    """The hidden widths are multiples of the width, which the library cuts to an integer."""
    return library.Cait(
        img_size=config.image_size, patch_size=config.patch_size, in_chans=config.in_channels,
        num_classes=config.num_classes, embed_dim=config.embed_dim, depth=config.depth,
        num_heads=config.num_heads, qkv_bias=config.qkv_bias, depth_token_only=config.cls_depth,
        mlp_ratio=(config.mlp_dim + 0.5) / config.embed_dim,
        mlp_ratio_token_only=(config.cls_mlp_width + 0.5) / config.embed_dim,
        global_pool={"cls": "token", "none": ""}.get(config.pool, "avg"),
    )  # fmt: skip


def vit_pytorch_model(library: ModuleType, config: CaiTConfig) -> Any:
    """Its sizes are the config's."""
    return library.CaiT(
        image_size=config.image_size[0], patch_size=config.patch_size[0],
        num_classes=config.num_classes, dim=config.embed_dim, depth=config.depth,
        cls_depth=config.cls_depth, heads=config.num_heads, mlp_dim=config.mlp_dim,
        dim_head=config.inner_dim // config.num_heads,
    )  # fmt: skip


FITS = {
    "timm": Fit(timm, "timm.models.cait", timm_model),
    "deit": Fit(deit, "timm.models.cait", timm_model),
    "vit_pytorch": Fit(vit_pytorch, "vit_pytorch.cait", vit_pytorch_model),
}

PARAMETERS = {
    "cait_xxs24": (11_956_264, 11_956_168),
    "cait_xxs24_384": (12_029_224, 12_029_128),
    "cait_xxs36": (17_299_720, 17_299_576),
    "cait_xxs36_384": (17_372_680, 17_372_536),
    "cait_xs24_384": (26_670_088, 26_669_944),
    "cait_s24": (46_916_200, 46_916_008),
    "cait_s24_384": (47_062_120, 47_061_928),
    "cait_s36_384": (68_366_632, 68_366_344),
    "cait_m36_384": (271_221_352, 271_220_776),
    "cait_m48_448": (356_460_520, 356_459_752),
    "cait_pytorch": (121_839_592, 121_839_592),
}
"""Total and trainable, counted in timm 1.0.31 and in vit-pytorch 1.26.11, each model instantiated.

The trainable ones lack the bias before the softmax, one number for each head of a block: timm's
trains, to no effect, and that of the spec does not.
"""
