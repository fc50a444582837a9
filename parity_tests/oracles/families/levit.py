"""LeViT in NumPy loops, and the originals that it is compared with."""

from __future__ import annotations

import functools
import math
from types import ModuleType

import numpy as np
from hypothesis import strategies as st
from torch import Tensor, nn

from isovit.spec.families.levit import VIT_PYTORCH, AttentionConfig, LeViTConfig
from parity_tests.oracles.arrays import ACTIVATIONS, Array
from parity_tests.oracles.arrays import Reference as Base
from parity_tests.oracles.fitting import Fields, Fit
from parity_tests.oracles.originals import Original
from parity_tests.oracles.pairs import (
    Pair,
    channel_counts,
    class_counts,
    head_counts,
    statistics,
    widths,
)


class Reference(Base):
    """LeViT; attention goes over one image, one head and one query at a time."""

    config: LeViTConfig

    def output(self, images: Array) -> Array:
        """See ``Reference.output``."""
        config, x = self.config, self.stem(images)
        for i, stage in enumerate(config.stages):
            path = f"stages.{i}"
            if stage.downsample is not None:
                x = self.block(f"{path}.downsample", stage.downsample, x)
            for j in range(stage.depth):
                x = self.block(f"{path}.blocks.{j}", stage.attention, x)
            self.keep(path, x)
        x = sum(x[:, t] for t in range(x.shape[1])) / x.shape[1]
        if not config.num_classes:
            return x
        names = ("head", "head_dist") if config.dist_head else ("head",)
        return sum(self.head(name, x) for name in names) / len(names)

    def stem(self, images: Array) -> Array:
        """Convolutions of stride 2."""
        x = images
        for i in range(len(self.config.stem_dims) + 1):
            path = f"stem.convs.{i}"
            if i > 0 and self.config.stem == "conv_norm":
                x = ACTIVATIONS["hardswish"](x)
            if f"{path}.norm.scale" in self.weights:
                x = self.conv(f"{path}.conv", x, (2, 2), (1, 1))
                x = self.keep(path, self.normed(path, x))
            else:
                x = self.conv(path, x, (2, 2), (1, 1))
                self.keep(path, x)
        return self.keep("stem", x.reshape(len(x), -1, x.shape[-1]))

    def block(self, path: str, numbers: AttentionConfig, x: Array) -> Array:
        """Attention, alone where it shrinks the grid; then the MLP."""
        y = self.attention(f"{path}.attn", numbers, x)
        x = y if numbers.stride == 2 else x + y
        hidden = self.product(f"{path}.mlp.fc1", x)
        y = self.product(f"{path}.mlp.fc2", ACTIVATIONS["hardswish"](hidden))
        return self.keep(path, x + self.keep(f"{path}.mlp", y))

    def attention(self, path: str, numbers: AttentionConfig, x: Array) -> Array:
        """Query by query; a bias is looked up by how far apart two tokens are."""
        (rows, columns), stride = numbers.grid, numbers.stride
        key_dim, value_dim = numbers.key_dim, numbers.value_dim
        keys = [(i, j) for i in range(rows) for j in range(columns)]
        queries = [(i, j) for i in range(0, rows, stride) for j in range(0, columns, stride)]
        if stride == 1:
            of_keys = of_queries = self.product(f"{path}.qkv", x)
            width, k_from = 2 * key_dim + value_dim, key_dim
        else:
            of_keys = self.product(f"{path}.kv", x)
            of_queries = self.product(f"{path}.q", x[:, [keys.index(query) for query in queries]])
            width, k_from = key_dim + value_dim, 0
        q_width = width if stride == 1 else key_dim
        biases, scale = self.weights[f"{path}.attention_biases"], 1 / math.sqrt(key_dim)
        biases = biases / scale if self.config.attn_bias_over_scale else biases
        y = np.zeros((len(x), len(queries), numbers.num_heads * value_dim), of_keys.dtype)
        for b, h, t in np.ndindex(len(x), numbers.num_heads, len(queries)):
            q = of_queries[b, t, h * q_width :][:key_dim]
            k = of_keys[b, :, h * width + k_from :][:, :key_dim]
            v = of_keys[b, :, h * width + k_from + key_dim :][:, :value_dim]
            offsets = [abs(queries[t][0] - i) * columns + abs(queries[t][1] - j) for i, j in keys]
            scores = k @ q * scale + biases[h, offsets]
            powers = np.exp(scores - scores.real.max())
            y[b, t, h * value_dim : (h + 1) * value_dim] = powers @ v / powers.sum()
        y = ACTIVATIONS[self.config.attn_activation](y)
        return self.keep(path, self.product(f"{path}.proj", y))

    def product(self, path: str, x: Array) -> Array:
        """A product with its BatchNorm, or without where there is none."""
        if f"{path}.norm.scale" not in self.weights:
            return self.dense(path, x)
        return self.keep(path, self.normed(path, self.dense(f"{path}.linear", x)))

    def head(self, path: str, x: Array) -> Array:
        """A BatchNorm, where there is one, with its product."""
        if f"{path}.norm.scale" not in self.weights:
            return self.dense(path, x)
        return self.keep(path, self.dense(f"{path}.linear", self.normed(path, x)))

    def normed(self, path: str, x: Array) -> Array:
        """The BatchNorm of a module."""
        return self.batch_norm(f"{path}.norm", x, self.config.batch_norm_eps)


# Models of the original libraries


@st.composite
def official_pairs(draw: st.DrawFn, *, timm: bool = False, distilled: bool = False) -> Pair:
    """The official code, and timm's models, which take other channels and any shape of image."""
    stages, key_dim, ratio = (draw(st.integers(1, 3)) for _ in range(3))
    rows, columns = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    size = (16 * rows, 16 * (columns if timm else rows))
    dims = (draw(st.sampled_from([8, 16])), *(draw(widths) for _ in range(stages - 1)))
    depth = (1, *(draw(st.integers(0, 1)) for _ in range(stages - 1)))
    heads = tuple(draw(head_counts) for _ in range(stages))
    channels = draw(channel_counts) if timm else 3
    num_classes = draw(class_counts)
    mlp_ratio = draw(st.integers(1, 3))
    common: Fields = dict(
        num_classes=num_classes, embed_dim=dims, key_dim=key_dim, depth=depth, num_heads=heads,
        attn_ratio=ratio, mlp_ratio=mlp_ratio,
    )  # fmt: skip
    config = LeViTConfig(
        image_size=size, in_channels=channels, preprocess=statistics(channels),
        num_classes=num_classes, stem_dims=(dims[0] // 8, dims[0] // 4, dims[0] // 2),
        embed_dims=dims, depths=depth, num_heads=heads, key_dim=key_dim, value_dim=ratio * key_dim,
        mlp_ratio=mlp_ratio, dist_head=distilled and num_classes > 0, **shrinking(dims, key_dim),
    )  # fmt: skip
    own = dict(img_size=size, in_chans=channels) if timm else dict(img_size=size[0])
    own |= {} if timm else dict(distillation=distilled)
    return Pair(common | own, config, untold(config, *["image_size"] * timm))


def shrinking(dims: tuple[int, ...], key_dim: int) -> Fields:
    """What the official code makes of the attention between two stages."""
    heads = tuple(dim // key_dim for dim in dims[:-1])
    return dict(down_heads=heads, **(dict(down_value_dim=4 * key_dim) if heads else {}))


def untold(config: LeViTConfig, *others: str) -> tuple[str, ...]:
    """What weights do not tell: the heads of a stage that has no block."""
    return (*others, *["num_heads"] * (0 in config.depths))


@st.composite
def vit_pytorch_pairs(draw: st.DrawFn, distilled: bool = False) -> Pair:
    """vit-pytorch: its dropout is out of use, and its second head has as many classes."""
    stages, side = draw(st.integers(1, 3)), 16 * draw(st.integers(1, 4))
    dims, heads = (tuple(draw(drawn) for _ in range(stages)) for drawn in (widths, head_counts))
    depth = (1, *(draw(st.integers(0, 1)) for _ in range(stages - 1)))
    num_classes, mlp_mult = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    dim_key, dim_value = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    arguments = dict(
        image_size=side, num_classes=num_classes, dim=dims, depth=depth, heads=heads,
        mlp_mult=mlp_mult, stages=stages, dim_key=dim_key, dim_value=dim_value,
        num_distill_classes=num_classes if distilled else None,
    )  # fmt: skip
    config = LeViTConfig(
        image_size=(side, side), num_classes=num_classes, embed_dims=dims, depths=depth,
        num_heads=heads, key_dim=dim_key, value_dim=dim_value,
        down_heads=tuple(2 * n for n in heads[:-1]), mlp_ratio=mlp_mult, dist_head=distilled,
        **(dict(down_value_dim=dim_value) if stages > 1 else {}), **VIT_PYTORCH,
    )  # fmt: skip
    return Pair(arguments, config, untold(config))


def averaging(library: ModuleType) -> type[nn.Module]:
    """vit-pytorch's LeViT, which returns the logits of two heads apart, with their mean."""

    class Averaging(library.LeViT):
        def forward(self, img: Tensor) -> Tensor:
            output = super().forward(img)
            return sum(output) / 2 if isinstance(output, tuple) else output

    return Averaging


@st.composite
def hf_pairs(draw: st.DrawFn, kind: str) -> Pair:
    """A model of transformers by the name of its class; it has three stages, whatever it is told.

    ``config.json`` tells the heads of a stage without blocks, which no weight shows.
    """
    key_dim, ratio, mlp_ratio = (draw(st.integers(1, 3)) for _ in range(3))
    side, channels = 16 * draw(st.integers(1, 4)), draw(channel_counts)
    dims = (draw(st.sampled_from([8, 16])), draw(widths), draw(widths))
    depths = (1, draw(st.integers(0, 1)), draw(st.integers(0, 1)))
    heads = tuple(draw(head_counts) for _ in range(3))
    classes = 0 if kind.endswith("Model") else draw(st.integers(1, 5))
    arguments = dict(
        image_size=side, num_channels=channels, num_labels=classes, hidden_sizes=dims,
        depths=depths, num_attention_heads=heads, key_dim=[key_dim] * 3,
        attention_ratio=[ratio] * 3, mlp_ratio=[mlp_ratio] * 3,
    )  # fmt: skip
    config = LeViTConfig(
        image_size=side, in_channels=channels, preprocess=statistics(channels),
        num_classes=classes, stem_dims=(dims[0] // 8, dims[0] // 4, dims[0] // 2),
        embed_dims=dims, depths=depths, num_heads=heads, key_dim=key_dim,
        value_dim=ratio * key_dim, mlp_ratio=mlp_ratio, dist_head=kind.endswith("Teacher"),
        **shrinking(dims, key_dim),
    )  # fmt: skip
    return Pair(arguments, config)


HF = {
    kind: functools.partial(hf_pairs, kind)
    for kind in (
        "LevitForImageClassification",
        "LevitForImageClassificationWithTeacher",
        "LevitModel",
    )
}

OFFICIAL, TIMM, VP = "parity_tests.oracles.levit", "timm.models.levit", "vit_pytorch.levit"

ORIGINALS = {
    "levit": Original("levit", OFFICIAL, lambda m: m.LeViT, official_pairs),
    "levit, distilled": Original(
        "levit", OFFICIAL, lambda m: m.LeViT, lambda: official_pairs(distilled=True)
    ),
    "timm": Original("timm", TIMM, lambda m: m.Levit, lambda: official_pairs(timm=True)),
    "timm, distilled": Original(
        "timm", TIMM, lambda m: m.LevitDistilled, lambda: official_pairs(timm=True, distilled=True)
    ),
    "vit_pytorch": Original("vit_pytorch", VP, averaging, vit_pytorch_pairs),
    "vit_pytorch, distilled": Original(
        "vit_pytorch", VP, averaging, lambda: vit_pytorch_pairs(distilled=True)
    ),
}


# The other way round: configs that a format can hold, and what its library makes of them


def official_changes(draw: st.DrawFn, config: LeViTConfig) -> Fields:
    """Square images, widths that follow from a few numbers, BatchNorm everywhere."""
    first = draw(st.sampled_from([8, 16]))
    dims = (first, *config.embed_dims[1:])
    return dict(
        image_size=16 * draw(st.integers(1, 3)), in_channels=3, preprocess=statistics(3),
        embed_dims=dims, stem="conv_norm", stem_dims=(first // 8, first // 4, first // 2),
        value_dim=config.key_dim * draw(st.integers(1, 3)), mlp_norm=True, head_norm=True,
        attn_activation="hardswish", attn_bias_over_scale=False, attn_proj_bias=False, fused=False,
        batch_norm_eps=1e-5, down_mlp_ratio=2, **shrinking(dims, config.key_dim),
    )  # fmt: skip


def timm_changes(draw: st.DrawFn, config: LeViTConfig) -> Fields:
    """The same with any channels and any shape of image."""
    grid = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    anything = dict(
        image_size=[16 * n for n in grid],
        in_channels=config.in_channels,
        preprocess=config.preprocess,
    )
    return official_changes(draw, config) | anything


def hf_changes(draw: st.DrawFn, config: LeViTConfig) -> Fields:
    """Three stages, square images of any channels."""
    dims = tuple(draw(widths) for _ in range(3))
    three: Fields = dict(
        embed_dims=dims, depths=[draw(st.integers(0, 1)) for _ in dims],
        num_heads=[draw(head_counts) for _ in dims], down_heads=(1, 1),
    )  # fmt: skip
    colours = dict(in_channels=config.in_channels, preprocess=config.preprocess)
    return three | official_changes(draw, config.replace(**three)) | colours


def vit_pytorch_changes(draw: st.DrawFn, config: LeViTConfig) -> Fields:
    """Square images, a stem whose widths never change, one width of v."""
    return dict(
        image_size=16 * draw(st.integers(1, 3)), in_channels=3, preprocess=statistics(3),
        fused=False, batch_norm_eps=1e-5, num_classes=config.num_classes or 1, down_mlp_ratio=2,
        down_value_dim=config.value_dim, down_heads=[2 * n for n in config.num_heads[:-1]],
        **{name: value for name, value in VIT_PYTORCH.items() if name != "init_scheme"},
    )  # fmt: skip


def official_arguments(config: LeViTConfig) -> Fields:
    """Of the official class and of timm's, but for the size of the image."""
    return dict(
        num_classes=config.num_classes, embed_dim=config.embed_dims, key_dim=config.key_dim,
        depth=config.depths, num_heads=config.num_heads, mlp_ratio=config.mlp_ratio,
        attn_ratio=config.value_dim // config.key_dim,
    )  # fmt: skip


def make_official(library: ModuleType, config: LeViTConfig) -> nn.Module:
    """The official model of a config."""
    own: Fields = dict(img_size=config.image_size[0], distillation=config.dist_head)
    return library.LeViT(**official_arguments(config), **own)


def make_timm(library: ModuleType, config: LeViTConfig) -> nn.Module:
    """Timm's model of a config."""
    make = library.LevitDistilled if config.dist_head else library.Levit
    own: Fields = dict(img_size=config.image_size, in_chans=config.in_channels)
    return make(**official_arguments(config), **own)


def make_vit_pytorch(library: ModuleType, config: LeViTConfig) -> nn.Module:
    """vit-pytorch's model of a config."""
    return averaging(library)(
        image_size=config.image_size[0], num_classes=config.num_classes, dim=config.embed_dims,
        depth=config.depths, heads=config.num_heads, mlp_mult=config.mlp_ratio,
        stages=len(config.embed_dims), dim_key=config.key_dim, dim_value=config.value_dim,
        num_distill_classes=config.num_classes if config.dist_head else None,
    )  # fmt: skip


FITS = {
    "levit": Fit(official_changes, OFFICIAL, make_official),
    "timm": Fit(timm_changes, TIMM, make_timm),
    "hf": Fit(hf_changes),
    "vit_pytorch": Fit(vit_pytorch_changes, VP, make_vit_pytorch),
}

PARAMETERS = {
    "levit_128s": (7_777_058, 7_777_058),
    "levit_128": (9_213_936, 9_213_936),
    "levit_192": (10_947_069, 10_947_069),
    "levit_256": (18_893_876, 18_893_876),
    "levit_384": (39_128_836, 39_128_836),
    "levit_pytorch": (17_348_972, 17_348_972),
}
"""Total and trainable, counted in timm 1.0.31, both heads included, and in vit-pytorch 1.26.11;
each model instantiated."""
