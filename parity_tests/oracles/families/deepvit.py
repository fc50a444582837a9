"""DeepViT in NumPy loops."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
from hypothesis import strategies as st

from isovit.spec.blocks import BlockConfig
from isovit.spec.families.deepvit import DeepViTConfig
from parity_tests.oracles.arrays import Array, TransformerReference, attend
from parity_tests.oracles.fitting import Fields, Fit, filled, ratio
from parity_tests.oracles.originals import Original
from parity_tests.oracles.pairs import (
    Pair,
    channel_counts,
    class_counts,
    depths,
    divisible,
    grids,
    head_counts,
    patches,
    statistics,
    widths,
)
from parity_tests.strategies import MIN_WIDTH


class Reference(TransformerReference):
    """DeepViT; one head and one patch after another."""

    config: DeepViTConfig

    def output(self, images: Array) -> Array:
        """See ``Reference.output``."""
        return self.backbone(self.patch_embed(self.config, images), positions_first=False)

    def patch_embed(self, config: DeepViTConfig, images: Array) -> Array:
        """Patches to tokens."""
        path, (height, width), (rows, columns) = "patch_embed", config.patch_size, config.grid
        if config.patch_embed == "norm_linear_norm":
            patches = [
                images[:, i * height : (i + 1) * height, j * width : (j + 1) * width]
                for i in range(rows)
                for j in range(columns)
            ]
            x = np.stack([patch.reshape(len(patch), -1) for patch in patches], axis=1)
            x = self.dense(f"{path}.proj", self.norm(f"{path}.norm1", x))
            return self.keep(path, self.norm(f"{path}.norm2", x))
        x = images
        if config.patch_embed == "convs":
            x = self.conv(f"{path}.conv1", x, stride=(2, 2), padding=(3, 3))
            x = relu(self.batch_norm(f"{path}.bn1", x, config.batch_norm_eps))
            x = self.conv(f"{path}.conv2", x, stride=(1, 1), padding=(1, 1))
            x = relu(self.batch_norm(f"{path}.bn2", x, config.batch_norm_eps))
            height, width = height // 2, width // 2
        x = self.conv(f"{path}.proj", x, stride=(height, width), padding=(0, 0))
        return self.keep(path, x.reshape(len(x), rows * columns, -1))

    def block(self, path: str, config: BlockConfig, x: Array) -> Array:
        """The pre-norm block with a scale around each branch."""
        scale = self.config.branch_scale
        y = self.attention(f"{path}.attn", config, self.norm(f"{path}.norm1", x * scale))
        x = x + self.scale(f"{path}.layer_scale1", y) / scale
        y = self.mlp(f"{path}.mlp", config.activation, self.norm(f"{path}.norm2", x * scale))
        return self.keep(path, x + self.scale(f"{path}.layer_scale2", y) / scale)

    def attention(self, path: str, config: BlockConfig, x: Array) -> Array:
        """Re-attention where there is a mixture of heads, else attention."""
        qkv = self.dense(f"{path}.qkv", x)
        if f"{path}.mix.kernel" in self.weights:
            y = self.re_attend(path, config, qkv)
        else:
            y = attend(qkv, config.num_heads, config.attn_scale)
        return self.keep(path, self.dense(f"{path}.proj", y) if config.attn_proj else y)

    def re_attend(self, path: str, config: BlockConfig, qkv: Array) -> Array:
        """Every head's weights from all heads' weights, normalised; then times v."""
        batch, tokens, _ = qkv.shape
        heads, kernel = config.num_heads, self.weights[f"{path}.mix.kernel"]
        q, k, v = (part.reshape(batch, tokens, heads, -1) for part in np.split(qkv, 3, axis=-1))
        weights = [softmax(config.attn_scale * (q[:, :, h] @ k[:, :, h].swapaxes(1, 2)))
                   for h in range(heads)]  # fmt: skip
        mixed = [sum(weights[h] * kernel[h, g] for h in range(heads)) for g in range(heads)]
        x = np.stack(mixed, axis=-1) + self.weights.get(f"{path}.mix.bias", 0.0)
        x = self.keep(f"{path}.mix", x)  # (batch, tokens, tokens, heads)
        if self.config.re_attention_norm == "batch_norm":
            x = self.batch_norm(f"{path}.mix_norm", x, self.config.batch_norm_eps)
        else:
            x = self.norm(f"{path}.mix_norm", x)
        x = x * self.config.re_attention_scale
        return np.concatenate([x[..., h] @ v[:, :, h] for h in range(heads)], axis=-1)


def softmax(scores: Array) -> Array:
    """Over the last axis."""
    powers = np.exp(scores - scores.real.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def relu(x: Array) -> Array:
    """The positive part; analytic but at 0."""
    return np.where(x.real > 0, x, 0.0)


many_heads = st.integers(MIN_WIDTH, MIN_WIDTH + 2)
pools = st.sampled_from(["cls", "mean"])


@st.composite
def vit_pytorch_deepvits(draw: st.DrawFn) -> Pair:
    """vit-pytorch's DeepViT: square images and patches, a class token even for the mean.

    Its LayerNorm over the heads wants many of them; without a block nothing tells it from a ViT.
    """
    side, grid, channels = draw(st.integers(3, 5)), draw(st.integers(1, 3)), draw(channel_counts)
    depth, heads = draw(depths), draw(many_heads)
    dim, mlp_dim, dim_head = draw(widths), draw(widths), draw(st.integers(1, 4))
    pool, num_classes = draw(pools), draw(st.integers(1, 5))
    arguments = dict(
        image_size=grid * side, patch_size=side, channels=channels, num_classes=num_classes,
        dim=dim, depth=depth, heads=heads, dim_head=dim_head, mlp_dim=mlp_dim, pool=pool,
    )  # fmt: skip
    config = DeepViTConfig(
        image_size=(grid * side, grid * side), patch_size=(side, side), in_channels=channels,
        preprocess=statistics(channels), num_classes=num_classes, patch_embed="norm_linear_norm",
        embed_dim=dim, depth=depth, num_heads=heads, head_dim=dim_head, qkv_bias=False,
        mlp_dim=mlp_dim, norm_eps=1e-5, re_attention_bias=False, re_attention_norm="layer_norm",
        final_norm="pooled", pool=pool,
    )  # fmt: skip
    return Pair(arguments, config, ("patch_size", "image_size", "pool") if depth else None)


@st.composite
def dvit_deepvits(draw: st.DrawFn) -> Pair:
    """The official DeepViT; with neither its stem nor a mixture it would be timm's ViT."""
    convs, least = draw(st.sampled_from([(True, 0), (False, 1)]))
    side, (rows, columns) = draw(st.sampled_from([4, 6])), draw(grids)
    patch_size = (side, side) if convs else draw(patches)
    image_size = (rows * patch_size[0], columns * patch_size[1])
    depth, heads, channels = draw(st.integers(least, 2)), draw(head_counts), draw(channel_counts)
    dim, mlp_ratio = draw(divisible(heads)), draw(st.integers(1, 3))
    mixing, num_classes, qkv_bias = (
        draw(st.integers(least, depth)),
        draw(class_counts),
        draw(st.booleans()),
    )
    qk_scale, transform_scale = draw(st.sampled_from([None, 0.3])), draw(st.booleans())
    branch_scale = draw(st.sampled_from([1.0, 0.5]))
    arguments = dict(
        img_size=image_size, patch_size=side if convs else patch_size, in_chans=channels,
        num_classes=num_classes, embed_dim=dim,
        apply_transform=[False] * (depth - mixing) + [True] * mixing, num_heads=heads,
        mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, qk_scale=qk_scale, use_cnn_embed=convs,
        transform_scale=transform_scale, scale_adjustment=branch_scale,
    )  # fmt: skip
    scale = qk_scale or (dim // heads) ** -0.5
    config = DeepViTConfig(
        image_size=image_size, patch_size=patch_size, in_channels=channels,
        preprocess=statistics(channels), num_classes=num_classes,
        patch_embed="convs" if convs else "conv", embed_dim=dim, depth=depth, num_heads=heads,
        qkv_bias=qkv_bias, attn_scale=qk_scale, mlp_dim=dim * mlp_ratio, norm_eps=1e-6,
        re_attention_depth=None if mixing == depth else mixing,
        re_attention_scale=scale if transform_scale else 1.0, branch_scale=branch_scale,
    )  # fmt: skip
    untold = ["image_size", "attn_scale", "re_attention_scale", "branch_scale"]
    untold += ["num_heads"] * (mixing == 0) + ["mlp_dim", "qkv_bias"] * (depth == 0)
    return Pair(arguments, config, tuple(untold))


ORIGINALS = {
    "vit_pytorch": Original(
        "vit_pytorch", "vit_pytorch.deepvit", lambda m: m.DeepViT, vit_pytorch_deepvits
    ),
    "dvit": Original(
        "dvit", "parity_tests.oracles.dvit", lambda m: m.DeepVisionTransformer, dvit_deepvits
    ),
}


# What each format can hold


def dvit(_: st.DrawFn, config: DeepViTConfig) -> Fields:
    """Heads that fill the width and are mixed with bias; square patches behind convolutions."""
    convs, side = config.patch_embed == "convs", config.patch_size[0]
    full = config.replace(**filled(config))
    square: Fields = dict(patch_size=side, image_size=(2 * side, side), stem_dim=64)
    return (square if convs else {}) | dict(
        **filled(config), patch_embed="convs" if convs else "conv", class_token=True, pool="cls",
        final_norm="tokens", layer_scale_init=None, re_attention_bias=True,
        re_attention_norm="batch_norm",
        re_attention_scale=1.0 if config.re_attention_scale == 1.0 else full.block.attn_scale,
    )  # fmt: skip


def vit_pytorch(draw: st.DrawFn, config: DeepViTConfig) -> Fields:
    """Square images and patches, many heads in every block, always a class token and a head."""
    side = config.patch_size[0]
    return dict(
        patch_size=side, image_size=2 * side, patch_embed="norm_linear_norm", attn_proj=True,
        head_dim=config.block.head_dim, num_heads=draw(many_heads), qkv_bias=False,
        attn_scale=None, layer_scale_init=None, re_attention_depth=None, re_attention_bias=False,
        re_attention_norm="layer_norm", re_attention_scale=1.0, branch_scale=1.0,
        class_token=True, final_norm="pooled", pool=draw(pools),
        num_classes=config.num_classes or 1,
    )  # fmt: skip


def dvit_model(official: ModuleType, config: DeepViTConfig) -> Any:
    """Its sizes are the config's."""
    convs = config.patch_embed == "convs"
    return official.DeepVisionTransformer(
        img_size=config.image_size, in_chans=config.in_channels, num_classes=config.num_classes,
        patch_size=config.patch_size[0] if convs else config.patch_size, use_cnn_embed=convs,
        embed_dim=config.embed_dim, num_heads=config.num_heads, mlp_ratio=ratio(config),
        apply_transform=[config.re_attends(index) for index in range(config.depth)],
        qkv_bias=config.qkv_bias, qk_scale=config.attn_scale,
        transform_scale=config.re_attention_scale != 1.0, scale_adjustment=config.branch_scale,
    )  # fmt: skip


def vit_pytorch_model(library: ModuleType, config: DeepViTConfig) -> Any:
    """Its sizes are the config's."""
    return library.DeepViT(
        image_size=config.image_size[0], patch_size=config.patch_size[0],
        channels=config.in_channels, num_classes=config.num_classes, dim=config.embed_dim,
        depth=config.depth, heads=config.num_heads, dim_head=config.block.head_dim,
        mlp_dim=config.mlp_dim, pool=config.pool,
    )  # fmt: skip


FITS = {
    "dvit": Fit(dvit, "parity_tests.oracles.dvit", dvit_model),
    "vit_pytorch": Fit(vit_pytorch, "vit_pytorch.deepvit", vit_pytorch_model),
}

PARAMETERS = {
    "deepvit_16": (24_426_664, 24_426_664),
    "deepvit_24": (36_261_448, 36_261_448),
    "deepvit_32": (48_096_232, 48_096_232),
    "deepvit_s": (27_312_632, 27_312_632),
    "deepvit_l": (58_883_708, 58_883_708),
    "deepvit_l_384": (59_043_308, 59_043_308),
    "deepvit_pytorch": (54_632_104, 54_632_104),
}
"""Total and trainable, counted in ``oracles.dvit`` and in vit-pytorch 1.26.11, each instantiated.

The official README rounds those of 24 and 32 blocks to 36.3 and 48.1 million, and has 24.5 for 16
blocks, where 24.4 would be right. For S and L it repeats the counts of the models of 16 and 32
blocks, though its code makes S and L wider and gives them a stem.
"""
