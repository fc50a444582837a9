"""CvT in NumPy loops."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
from hypothesis import strategies as st

from isovit.spec.blocks import BlockConfig
from isovit.spec.families.cvt import VIT_PYTORCH, CvTConfig, StageConfig
from parity_tests.oracles import arrays, pairs
from parity_tests.oracles.arrays import Array
from parity_tests.oracles.fitting import Fields, Fit
from parity_tests.oracles.originals import Original
from parity_tests.oracles.pairs import Pair


class Reference(arrays.Reference):
    """CvT; one head and one query after another."""

    config: CvTConfig

    def output(self, images: Array) -> Array:
        """See ``Reference.output``."""
        x, config = images, self.config
        for s, stage in enumerate(config.stages):
            if s > 0:
                x = x.reshape(len(x), *stage.in_grid, -1)
            x = self.stage(f"stages.{s}", stage, x)
        x = self.norm("norm", x) if config.final_norm == "tokens" else x
        if config.pool == "cls":
            x = x[:, 0]
        elif config.pool == "mean":
            x = sum(x[:, t] for t in range(x.shape[1])) / x.shape[1]
        return self.dense("head", x) if config.num_classes else x

    def stage(self, path: str, stage: StageConfig, x: Array) -> Array:
        """An image, or a grid of tokens, to tokens."""
        stride, pad = stage.patch_stride, stage.patch_padding
        x = flat(self.conv(f"{path}.patch_embed.proj", x, (stride, stride), (pad, pad)))
        x = self.keep(f"{path}.patch_embed", self.norm(f"{path}.patch_embed.norm", x))
        if stage.class_token:
            x = np.concatenate([np.repeat(self.weights[f"{path}.cls_token"], len(x), 0), x], axis=1)
        for i, numbers in enumerate(stage.blocks):
            block = f"{path}.blocks.{i}"
            x = x + self.attention(f"{block}.attn", stage, numbers, self.norm(f"{block}.norm1", x))
            y = self.norm(f"{block}.norm2", x)
            x = self.keep(block, x + self.mlp(f"{block}.mlp", self.config.activation, y))
        return self.keep(path, x)

    def attention(self, path: str, stage: StageConfig, numbers: BlockConfig, x: Array) -> Array:
        """Each query with every key."""
        q = self.projection(f"{path}.q", stage, 1, x)
        if self.config.kv_convs == "one":
            k, v = np.split(self.projection(f"{path}.kv", stage, stage.kv_stride, x), 2, axis=-1)
        else:
            k = self.projection(f"{path}.k", stage, stage.kv_stride, x)
            v = self.projection(f"{path}.v", stage, stage.kv_stride, x)
        y = np.zeros_like(q)
        for b, t, h in np.ndindex(*q.shape[:2], numbers.num_heads):
            head = slice(h * numbers.head_dim, (h + 1) * numbers.head_dim)
            scores = numbers.attn_scale * (k[b, :, head] @ q[b, t, head])
            powers = np.exp(scores - scores.real.max())
            y[b, t, head] = powers / powers.sum() @ v[b, :, head]
        return self.keep(path, self.dense(f"{path}.proj", y))

    def projection(self, path: str, stage: StageConfig, stride: int, x: Array) -> Array:
        """The class token past the convolution, all others through it."""
        first, pad = int(stage.class_token), stage.kernel_size // 2
        image = x[:, first:].reshape(len(x), *stage.grid, -1)
        y = self.conv(f"{path}.conv", image, (stride, stride), (pad, pad), groups=stage.dim)
        y = flat(self.batch_norm(f"{path}.norm", y, self.config.batch_norm_eps))
        y = np.concatenate([x[:, :first], y], axis=1)
        return self.keep(path, self.dense(f"{path}.proj", y))


def flat(x: Array) -> Array:
    """A grid of tokens as a row of tokens."""
    return x.reshape(len(x), -1, x.shape[-1])


# The originals

DEPTHS = st.integers(1, 2)


@st.composite
def geometries(draw: st.DrawFn, number: int) -> tuple[tuple[int, int], Fields]:
    """An image, and the convolutions of so many stages: the fields that speak of them."""
    sizes = [draw(st.integers(2, 4)) for _ in range(number)]
    paddings = [draw(st.integers(0, size - 1)) for size in sizes]
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(2, 4))  # of the last grid
    patch_strides = [draw(st.integers(1, 2)) for _ in range(number)]
    for size, stride, padding in reversed(list(zip(sizes, patch_strides, paddings, strict=True))):
        rows = max((rows - 1) * stride + size - 2 * padding, 1)
        columns = max((columns - 1) * stride + size - 2 * padding, 1)
    return (rows, columns), dict(
        patch_sizes=tuple(sizes), patch_strides=tuple(patch_strides),
        patch_paddings=tuple(paddings),
        qkv_kernel_sizes=tuple(draw(st.sampled_from([3, 1, 5])) for _ in range(number)),
        kv_strides=tuple(draw(st.integers(1, 3)) for _ in range(number)),
    )  # fmt: skip


@st.composite
def official_configs(draw: st.DrawFn) -> tuple[CvTConfig, list[int]]:
    """What the official code and transformers have in common, with the ratios of the MLPs."""
    number, channels = draw(st.integers(1, 3)), draw(pairs.channel_counts)
    image_size, geometry = draw(geometries(number))
    heads = [draw(pairs.head_counts) for _ in range(number)]
    dims = [draw(pairs.divisible(count)) for count in heads]
    ratios = [draw(st.integers(1, 3)) for _ in range(number)]
    class_token = draw(st.booleans())
    config = CvTConfig(
        image_size=image_size, in_channels=channels, preprocess=pairs.statistics(channels),
        num_classes=draw(st.integers(1, 5)), embed_dims=tuple(dims),
        depths=tuple(draw(DEPTHS) for _ in range(number)),
        num_heads=tuple(heads),
        mlp_dims=tuple(dim * ratio for dim, ratio in zip(dims, ratios, strict=True)),
        qkv_bias=draw(st.booleans()), class_token=class_token,
        pool="cls" if class_token else "mean", **geometry,
    )  # fmt: skip
    return config, ratios


OFFICIAL_UNTOLD = ("image_size", "num_heads", "patch_strides", "patch_paddings", "kv_strides")


@st.composite
def microsoft_cvts(draw: st.DrawFn) -> Pair:
    """The official CvT."""
    config, ratios = draw(official_configs())
    return Pair(microsoft_arguments(config, ratios), config, OFFICIAL_UNTOLD)


def microsoft_arguments(config: CvTConfig, ratios: list[Any]) -> Fields:
    """Of the official constructor."""
    each, last = len(config.stages), config.class_token
    spec = dict(
        DIM_EMBED=config.embed_dims, DEPTH=config.depths, NUM_HEADS=config.num_heads,
        MLP_RATIO=ratios, PATCH_SIZE=config.patch_sizes, PATCH_STRIDE=config.patch_strides,
        PATCH_PADDING=config.patch_paddings, KERNEL_QKV=config.qkv_kernel_sizes,
        STRIDE_KV=config.kv_strides, QKV_BIAS=[config.qkv_bias] * each,
        CLS_TOKEN=[False] * (each - 1) + [last],
    )  # fmt: skip
    return dict(in_chans=config.in_channels, num_classes=config.num_classes, spec=spec)


@st.composite
def hf_cvts(draw: st.DrawFn) -> Pair:
    """transformers' CvT; ``config.json`` tells all but the size of the image.

    It cannot run without a class token. Its constructor looks for the rate of stochastic depth of
    every block at the number of the stage, so that there must be as many blocks.
    """
    config, ratios = draw(official_configs())
    depths = [depth + s for s, depth in enumerate(config.depths)]
    config = config.replace(activation="gelu", class_token=True, pool="cls", depths=depths)
    each, padding = len(config.stages), [size // 2 for size in config.qkv_kernel_sizes]
    arguments = dict(
        num_channels=config.in_channels, num_labels=config.num_classes,
        patch_sizes=config.patch_sizes, patch_stride=config.patch_strides,
        patch_padding=config.patch_paddings, embed_dim=config.embed_dims,
        num_heads=config.num_heads, depth=config.depths, mlp_ratio=list(map(float, ratios)),
        attention_drop_rate=[0.0] * each, drop_rate=[0.0] * each, drop_path_rate=[0.0] * each,
        qkv_bias=[config.qkv_bias] * each,
        cls_token=[False] * (each - 1) + [config.class_token],
        qkv_projection_method=["dw_bn"] * each, kernel_qkv=config.qkv_kernel_sizes,
        padding_kv=padding, stride_kv=config.kv_strides, padding_q=padding, stride_q=[1] * each,
    )  # fmt: skip
    return Pair(arguments, config, ("image_size",))


@st.composite
def vit_pytorch_cvts(draw: st.DrawFn) -> Pair:
    """vit-pytorch's CvT: three stages, heads of width 64."""
    image_size, geometry = draw(geometries(3))
    channels, num_classes = draw(pairs.channel_counts), draw(st.integers(1, 5))
    geometry["patch_paddings"] = tuple(size // 2 for size in geometry["patch_sizes"])
    dims, heads, depths, ratios = (
        tuple(draw(numbers) for _ in range(3))
        for numbers in (pairs.widths, st.integers(1, 2), DEPTHS, st.integers(1, 3))
    )
    config = CvTConfig(
        image_size=image_size, in_channels=channels, preprocess=pairs.statistics(channels),
        num_classes=num_classes, embed_dims=dims, num_heads=heads, depths=depths,
        mlp_dims=tuple(dim * ratio for dim, ratio in zip(dims, ratios, strict=True)),
        **{**geometry, **VIT_PYTORCH},
    )  # fmt: skip
    untold = ("image_size", "patch_strides", "kv_strides")
    return Pair(vit_pytorch_arguments(config), config, untold)


def vit_pytorch_arguments(config: CvTConfig) -> Fields:
    """Of ``CvT``."""
    arguments: Fields = dict(num_classes=config.num_classes, channels=config.in_channels)
    for s, stage in enumerate(config.stages, start=1):
        arguments |= {
            f"s{s}_emb_dim": stage.dim, f"s{s}_emb_kernel": stage.patch_size,
            f"s{s}_emb_stride": stage.patch_stride, f"s{s}_proj_kernel": stage.kernel_size,
            f"s{s}_kv_proj_stride": stage.kv_stride, f"s{s}_heads": stage.blocks[0].num_heads,
            f"s{s}_depth": len(stage.blocks),
            f"s{s}_mlp_mult": stage.blocks[0].mlp_dim // stage.dim,
        }  # fmt: skip
    return arguments


ORIGINALS = {
    "microsoft": Original(
        "microsoft", "parity_tests.oracles.microsoft", lambda m: m.CvT, microsoft_cvts
    ),
    "vit_pytorch": Original("vit_pytorch", "vit_pytorch.cvt", lambda m: m.CvT, vit_pytorch_cvts),
}

HF = {"CvtForImageClassification": hf_cvts}
"""Classes of transformers, and what to make of each."""


# What each format can hold


def official(_: st.DrawFn, config: CvTConfig) -> Fields:
    """Heads that fill the width, and a head behind them."""
    heads = zip(config.embed_dims, config.num_heads, strict=True)
    dims = tuple(-(-dim // count) * count for dim, count in heads)
    pooled = config.pool != "none"
    return dict(
        embed_dims=dims, head_dim=None, attn_scale="embed_dims", kv_convs="two",
        batch_norm_eps=1e-5, final_norm="tokens", num_classes=config.num_classes or 3,
        pool=config.pool if pooled else "cls" if config.class_token else "mean",
    )  # fmt: skip


def hf(draw: st.DrawFn, config: CvTConfig) -> Fields:
    """The same with the numbers that its class has whatever ``config.json`` says."""
    return official(draw, config) | dict(
        activation="gelu",
        norm_eps=1e-5,
        class_token=True,
        pool="cls",
        depths=tuple(range(1, len(config.depths) + 1)),
    )


def vit_pytorch(_: st.DrawFn, config: CvTConfig) -> Fields:
    """Three stages, as drawn the first and the last."""
    sizes = (*config.patch_sizes, *config.patch_sizes[-1:] * 2)[:3]
    fields: Fields = {
        name: (*getattr(config, name), *getattr(config, name)[-1:] * 2)[:3]
        for name in ("embed_dims", "depths", "qkv_kernel_sizes", "kv_strides", "patch_strides")
    }
    return {
        **VIT_PYTORCH, **fields, "image_size": (20, 24), "num_heads": (1, 2, 1),
        "mlp_dims": tuple(2 * dim for dim in fields["embed_dims"]), "patch_sizes": sizes,
        "patch_paddings": tuple(size // 2 for size in sizes), "batch_norm_eps": 1e-5,
        "num_classes": config.num_classes or 3,
    }  # fmt: skip


def microsoft_model(library: ModuleType, config: CvTConfig) -> Any:
    """Ratios of which it makes the config's widths again: it cuts to an integer."""
    widths = zip(config.mlp_dims, config.embed_dims, strict=True)
    ratios = [(hidden + 0.5) / dim for hidden, dim in widths]
    return library.CvT(**microsoft_arguments(config, ratios))


FITS = {
    "microsoft": Fit(official, "parity_tests.oracles.microsoft", microsoft_model),
    "hf": Fit(hf),
    "vit_pytorch": Fit(
        vit_pytorch,
        "vit_pytorch.cvt",
        lambda library, config: library.CvT(**vit_pytorch_arguments(config)),
    ),
}

PARAMETERS = {
    "cvt_13": (19_997_480, 19_992_744),
    "cvt_21": (31_622_696, 31_614_888),
    "cvt_13_384": (19_997_480, 19_992_744),
    "cvt_21_384": (31_622_696, 31_614_888),
    "cvt_w24_384": (277_196_392, 277_172_072),
    "cvt_pytorch": (19_936_296, 19_936_296),
}
"""Total and trainable, counted in transformers 5.23 and vit-pytorch 1.26.11, each instantiated.

The difference is biases of keys, which no softmax sees and which train there all the same: that of
every product to k, and without a class token that of the BatchNorm before it.
"""
