"""CrossViT in NumPy loops."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
from hypothesis import strategies as st

from isovit.spec.families.crossvit import STEMS, Branch, CrossViTConfig, Fusion
from parity_tests.families.crossvit import IMAGES, PATCHES, STEM_IMAGES, tilings
from parity_tests.oracles import pairs
from parity_tests.oracles.arrays import ACTIVATIONS, Array
from parity_tests.oracles.arrays import Reference as Base
from parity_tests.oracles.fitting import Fields, Fit
from parity_tests.oracles.originals import Original
from parity_tests.oracles.pairs import Pair


def cubic(t: float) -> list[float]:
    """Weights of the four neighbours at -1, 0, 1 and 2 of a point at t, for a = -3/4."""
    return [
        (-3 * t + 6 * t**2 - 3 * t**3) / 4,
        (4 - 9 * t**2 + 5 * t**3) / 4,
        (3 * t + 6 * t**2 - 5 * t**3) / 4,
        (-3 * t**2 + 3 * t**3) / 4,
    ]


def bicubic(x: Array, size: int, axis: int) -> Array:
    """One axis brought to another size, one output after another; centres of pixels on halves."""
    x, lines = np.moveaxis(x, axis, 0), []
    for i in range(size):
        at = (2 * i + 1) * len(x) / (2 * size) - 0.5
        below = math.floor(at)
        neighbours = [min(max(below + offset, 0), len(x) - 1) for offset in (-1, 0, 1, 2)]
        lines.append(sum(w * x[n] for w, n in zip(cubic(at - below), neighbours, strict=True)))
    return np.moveaxis(np.stack(lines), 0, axis)


def relu(x: Array) -> Array:
    """The positive part; of a complex number, by its real part."""
    return np.where(x.real > 0, x, 0)


class Reference(Base):
    """CrossViT; the class token's attention one image and one head at a time."""

    config: CrossViTConfig

    def output(self, images: Array) -> Array:
        """See ``Reference.output``."""
        config = self.config
        branches = [self.embed(f"embeds.{b}", x, images) for b, x in enumerate(config.branches)]
        for s, stage in enumerate(config.stages):
            for b in range(2):
                path = f"stages.{s}.encoders.{b}"
                for i, block in enumerate(stage.blocks[b]):
                    branches[b] = self.block(f"{path}.blocks.{i}", block, branches[b])
                if config.stage_norm:
                    branches[b] = self.norm(f"{path}.norm", branches[b])
                self.keep(path, branches[b])
            tokens = [
                self.fusion(
                    f"stages.{s}.fusions.{b}", stage.fusions[b], branches[b], branches[1 - b]
                )
                for b in range(2)
            ]
            for b in range(2):
                branches[b] = np.concatenate([tokens[b], branches[b][:, 1:]], axis=1)
        features = []
        for b in range(2):
            x = self.norm(f"norm.{b}", branches[b])
            features.append(x[:, 0] if config.pool == "cls" else average(x[:, 1:]))
        if not config.num_classes:
            return np.concatenate(features, axis=-1)
        logits = [self.dense(f"head.{b}", features[b]) for b in range(2)]
        return (logits[0] + logits[1]) * (0.5 if config.logits == "mean" else 1.0)

    def embed(self, path: str, branch: Branch, images: Array) -> Array:
        """Images to the tokens of a branch."""
        x, (height, width) = images, branch.image_size
        if branch.scaling == "bicubic":
            x = self.keep(f"{path}.resize", bicubic(bicubic(x, width, 2), height, 1))
        elif branch.scaling == "crop":
            top, left = round((x.shape[1] - height) / 2), round((x.shape[2] - width) / 2)
            x = x[:, top : top + height, left : left + width]
        x = self.patch_embed(f"{path}.patch_embed", branch, x)
        token = np.repeat(self.weights[f"{path}.cls_token"], len(x), axis=0)
        x = np.concatenate([token, x], axis=1) + self.weights[f"{path}.pos_embed"]
        return self.keep(path, x)

    def patch_embed(self, path: str, branch: Branch, x: Array) -> Array:
        """Patches to tokens, row by row."""
        side = branch.patch_size
        if self.config.patch_embed == "conv":
            x = self.conv(f"{path}.proj", x, (side, side), (0, 0))
        elif self.config.patch_embed == "conv_stem":
            x = relu(self.conv(f"{path}.conv1", x, (4, 4), (3, 3)))
            if side == 12:
                x = relu(self.conv(f"{path}.conv2", x, (3, 3), (0, 0)))
                x = self.conv(f"{path}.conv3", x, (1, 1), (1, 1))
            else:
                x = relu(self.conv(f"{path}.conv2", x, (2, 2), (1, 1)))
                x = self.conv(f"{path}.conv3", x, (2, 2), (1, 1))
        else:
            rows, columns = branch.grid
            patches = [
                x[:, i * side : (i + 1) * side, j * side : (j + 1) * side].reshape(len(x), -1)
                for i in range(rows)
                for j in range(columns)
            ]
            x = self.norm(f"{path}.norm1", np.stack(patches, axis=1))
            x = self.norm(f"{path}.norm2", self.dense(f"{path}.proj", x))
        return self.keep(path, x.reshape(len(x), -1, branch.dim))

    def fusion(self, path: str, fusion: Fusion, own: Array, other: Array) -> Array:
        """The class token of a branch, after it has seen the patches of the other."""
        token, patches = own[:, :1], other[:, 1:]
        gelu = ACTIVATIONS[self.config.activation]
        if self.config.fusion == "projected":
            x = self.dense(f"{path}.proj_in", gelu(self.norm(f"{path}.norm_in", token)))
            context = self.norm(f"{path}.norm", np.concatenate([x, patches], axis=1))
            x = x + self.cross(f"{path}.attn", fusion, context[:, :1], context)
            x = self.dense(f"{path}.proj_out", gelu(self.norm(f"{path}.norm_out", x)))
            return self.keep(path, x)
        for i in range(self.config.cross_depth):
            layer, projects = f"{path}.layers.{i}", fusion.dim != fusion.other_dim
            x = self.dense(f"{layer}.proj_in", token) if projects else token
            x = self.norm(f"{layer}.norm", x)
            x = self.cross(f"{layer}.attn", fusion, x, np.concatenate([x, patches], axis=1))
            x = self.dense(f"{layer}.proj_out", x) if projects else x
            token = token + self.keep(layer, x)
        return self.keep(path, token)

    def cross(self, path: str, fusion: Fusion, token: Array, context: Array) -> Array:
        """Softmax attention of one token."""
        q, kv = self.dense(f"{path}.q", token), self.dense(f"{path}.kv", context)
        k, v = kv[..., : fusion.inner_dim], kv[..., fusion.inner_dim :]
        out = np.zeros_like(q)
        for b in range(len(q)):
            for h in range(fusion.num_heads):
                columns = slice(h * fusion.head_dim, (h + 1) * fusion.head_dim)
                scores = k[b, :, columns] @ q[b, 0, columns] / math.sqrt(fusion.head_dim)
                powers = np.exp(scores - scores.real.max())
                out[b, 0, columns] = powers / powers.sum() @ v[b, :, columns]
        return self.keep(path, self.dense(f"{path}.proj", out))


def average(x: Array) -> Array:
    """The mean over tokens."""
    return sum(x[:, t] for t in range(x.shape[1])) / x.shape[1]


# Originals


@st.composite
def timm_models(draw: st.DrawFn, official: bool = False) -> Pair:
    """timm's CrossVit; or the official model, for square images and without later options.

    Both want blocks in either branch, and as many or more in the second.
    """
    multi_conv = draw(st.booleans())
    images = STEM_IMAGES if multi_conv else IMAGES
    height, width = draw(st.sampled_from([(h, w) for h, w in images if h == w or not official]))
    fitting = st.sampled_from(tilings((height, width), tuple(STEMS) if multi_conv else PATCHES))
    (small_patch, small_scale), (large_patch, large_scale) = draw(fitting), draw(fitting)
    depth, small_depth = draw(pairs.depths), draw(st.integers(1, 2))
    branch_depth = (small_depth, draw(st.integers(small_depth, 2)))
    heads = draw(st.tuples(pairs.head_counts, pairs.head_counts))
    dims = (draw(pairs.divisible(heads[0])), draw(pairs.divisible(heads[1])))
    ratios = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    channels, qkv_bias = draw(pairs.channel_counts), draw(st.booleans())
    num_classes = draw(st.integers(1, 5) if official else pairs.class_counts)
    arguments: dict[str, Any] = dict(
        patch_size=(small_patch, large_patch), in_chans=channels, num_classes=num_classes,
        embed_dim=dims, depth=depth * [[*branch_depth, 0]], num_heads=heads,
        mlp_ratio=(*ratios, 1), qkv_bias=qkv_bias, multi_conv=multi_conv,
    )  # fmt: skip
    scaling, pool = "bicubic", "cls"
    if official:
        sides = [int(height * scale) for scale in (small_scale, large_scale)]
        arguments |= dict(img_size=sides)
    else:
        scaling = draw(st.sampled_from(["bicubic", "crop"]))
        pool = draw(st.sampled_from(["cls", "mean_patches"]))
        arguments |= dict(
            img_size=(height, width), img_scale=(small_scale, large_scale),
            crop_scale=scaling == "crop", global_pool="token" if pool == "cls" else "avg",
        )  # fmt: skip
    config = CrossViTConfig(
        image_size=(height, width), image_scale=(small_scale, large_scale), scaling=scaling,
        patch_size=(small_patch, large_patch), patch_embed="conv_stem" if multi_conv else "conv",
        in_channels=channels, preprocess=pairs.statistics(channels), num_classes=num_classes,
        depth=depth, branch_depth=branch_depth, embed_dim=dims, num_heads=heads,
        qkv_bias=qkv_bias, mlp_dim=(dims[0] * ratios[0], dims[1] * ratios[1]), pool=pool,
    )  # fmt: skip
    told_by_image = height == width and small_scale == 1.0
    untold = [
        *["num_heads", "scaling", "pool"],
        *["image_size"] * (not told_by_image),
        *["image_scale"] * (small_scale != 1.0),
        *["patch_size"] * multi_conv,
        *["branch_depth", "mlp_dim", "qkv_bias"][: 3 * (depth == 0)],
    ]
    return Pair(arguments, config, tuple(untold))


@st.composite
def vit_pytorch_models(draw: st.DrawFn) -> Pair:
    """vit-pytorch's CrossViT; without dense layers around a fusion of branches of one width."""
    small_patch, large_patch = draw(st.tuples(*2 * [st.sampled_from([3, 4, 6])]))
    depth, branch_depth = draw(pairs.depths), draw(st.tuples(pairs.depths, pairs.depths))
    dims = draw(st.tuples(pairs.widths, pairs.widths) | pairs.widths.map(lambda n: (n, n)))
    mlp_dim = draw(st.tuples(pairs.widths, pairs.widths))
    heads = draw(st.tuples(pairs.head_counts, pairs.head_counts))
    head_dim = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    cross_depth, cross_heads, cross_head_dim = draw(
        st.tuples(st.integers(1, 2), pairs.head_counts, st.integers(1, 6))
    )
    channels, num_classes = draw(pairs.channel_counts), draw(st.integers(1, 5))
    arguments = dict(
        image_size=12, channels=channels, num_classes=num_classes, depth=depth,
        sm_dim=dims[0], sm_patch_size=small_patch, sm_enc_depth=branch_depth[0],
        sm_enc_heads=heads[0], sm_enc_mlp_dim=mlp_dim[0], sm_enc_dim_head=head_dim[0],
        lg_dim=dims[1], lg_patch_size=large_patch, lg_enc_depth=branch_depth[1],
        lg_enc_heads=heads[1], lg_enc_mlp_dim=mlp_dim[1], lg_enc_dim_head=head_dim[1],
        cross_attn_depth=cross_depth, cross_attn_heads=cross_heads,
        cross_attn_dim_head=cross_head_dim,
    )  # fmt: skip
    config = CrossViTConfig(
        image_size=(12, 12), image_scale=(1.0, 1.0), patch_size=(small_patch, large_patch),
        patch_embed="norm_linear_norm", in_channels=channels,
        preprocess=pairs.statistics(channels), num_classes=num_classes, depth=depth,
        branch_depth=branch_depth, embed_dim=dims, num_heads=heads, head_dim=head_dim,
        qkv_bias=False, mlp_dim=mlp_dim, stage_norm=True, fusion="residual",
        cross_depth=cross_depth, cross_num_heads=cross_heads, cross_head_dim=cross_head_dim,
        norm_eps=1e-5, logits="sum", embed_dropout_rate=0.1, dropout_rate=0.1,
        attn_dropout_rate=0.1,
    )  # fmt: skip
    untold = [
        *["patch_size", "num_heads", "cross_num_heads"],
        *["head_dim", "mlp_dim"][: 2 * (depth * min(branch_depth) == 0)],
        *["branch_depth", "cross_depth", "cross_head_dim"][: 3 * (depth == 0)],
    ]
    return Pair(arguments, config, tuple(untold))


ORIGINALS = {
    "vit_pytorch": Original(
        "vit_pytorch", "vit_pytorch.cross_vit", lambda m: m.CrossViT, vit_pytorch_models
    ),
    "timm": Original("timm", "timm.models.crossvit", lambda m: m.CrossVit, timm_models),
    "ibm": Original(
        "ibm",
        "parity_tests.oracles.ibm_crossvit",
        lambda m: m.VisionTransformer,
        lambda: timm_models(official=True),
    ),
}


# What each format can hold


def timm(_: st.DrawFn, config: CrossViTConfig) -> Fields:
    """Heads that fill the widths, blocks in both branches, and the one kind of fusion."""
    dims = (-(-dim // n) * n for dim, n in zip(config.embed_dim, config.num_heads, strict=True))
    small, large = config.branch_depth
    return dict(
        embed_dim=tuple(dims), head_dim=None, cross_num_heads=None, cross_head_dim=None,
        branch_depth=(max(small, 1), max(small, large, 1)), stage_norm=False, fusion="projected",
        cross_depth=1, logits="mean",
        patch_embed="conv_stem" if config.patch_embed == "conv_stem" else "conv",
    )  # fmt: skip


def ibm(draw: st.DrawFn, config: CrossViTConfig) -> Fields:
    """The same for square images, with a head on every class token."""
    stem = config.patch_embed == "conv_stem"
    return timm(draw, config) | dict(
        image_size=48 if stem else 12, image_scale=draw(st.sampled_from([(1.0, 1.0), (1.0, 2.0)])),
        patch_size=config.patch_size if stem else draw(st.sampled_from([(3, 4), (6, 3)])),
        scaling="bicubic", pool="cls", num_classes=config.num_classes or 1,
    )  # fmt: skip


def vit_pytorch(draw: st.DrawFn, config: CrossViTConfig) -> Fields:
    """One square image for both branches; heads of one kind in all fusions."""
    return dict(
        image_size=12, image_scale=(1.0, 1.0), patch_size=draw(st.sampled_from([(3, 4), (6, 3)])),
        patch_embed="norm_linear_norm", qkv_bias=False, stage_norm=True, fusion="residual",
        cross_num_heads=config.num_heads[0], cross_head_dim=4, pool="cls", logits="sum",
        num_classes=config.num_classes or 1,
    )  # fmt: skip


def official_arguments(config: CrossViTConfig) -> Fields:
    """Of the constructors of the official code and of timm."""
    ratios = [
        (hidden + 0.5) / dim for hidden, dim in zip(config.mlp_dim, config.embed_dim, strict=True)
    ]
    return dict(
        patch_size=config.patch_size, in_chans=config.in_channels, num_classes=config.num_classes,
        embed_dim=config.embed_dim, depth=config.depth * [[*config.branch_depth, 0]],
        num_heads=config.num_heads, mlp_ratio=[*ratios, 1], qkv_bias=config.qkv_bias,
        multi_conv=config.patch_embed == "conv_stem",
    )  # fmt: skip


def ibm_model(official: ModuleType, config: CrossViTConfig) -> Any:
    """Told the image of each branch."""
    sides = [branch.image_size[0] for branch in config.branches]
    return official.VisionTransformer(img_size=sides, **official_arguments(config))


def timm_model(crossvit: ModuleType, config: CrossViTConfig) -> Any:
    """Told the image and its scales."""
    return crossvit.CrossVit(
        img_size=config.image_size, img_scale=config.image_scale,
        crop_scale=config.scaling == "crop",
        global_pool="token" if config.pool == "cls" else "avg",
        **official_arguments(config),
    )  # fmt: skip


def vit_pytorch_model(library: ModuleType, config: CrossViTConfig) -> Any:
    """Its sizes are the config's."""
    (small, large), (small_depth, large_depth) = config.embed_dim, config.branch_depth
    (small_hidden, large_hidden), (small_heads, large_heads) = config.mlp_dim, config.num_heads
    small_width, large_width = config.head_dim or (small // small_heads, large // large_heads)
    return library.CrossViT(
        image_size=config.image_size[0], channels=config.in_channels,
        num_classes=config.num_classes, depth=config.depth,
        sm_dim=small, sm_patch_size=config.patch_size[0], sm_enc_depth=small_depth,
        sm_enc_heads=small_heads, sm_enc_mlp_dim=small_hidden, sm_enc_dim_head=small_width,
        lg_dim=large, lg_patch_size=config.patch_size[1], lg_enc_depth=large_depth,
        lg_enc_heads=large_heads, lg_enc_mlp_dim=large_hidden, lg_enc_dim_head=large_width,
        cross_attn_depth=config.cross_depth, cross_attn_heads=config.cross_num_heads,
        cross_attn_dim_head=config.cross_head_dim,
    )  # fmt: skip


FITS = {
    "timm": Fit(timm, "timm.models.crossvit", timm_model),
    "ibm": Fit(ibm, "parity_tests.oracles.ibm_crossvit", ibm_model),
    "vit_pytorch": Fit(vit_pytorch, "vit_pytorch.cross_vit", vit_pytorch_model),
}

PARAMETERS = {
    "crossvit_tiny": (7_014_800, 7_014_800),
    "crossvit_small": (26_856_272, 26_856_272),
    "crossvit_base": (105_025_232, 105_025_232),
    "crossvit_9": (8_553_296, 8_553_296),
    "crossvit_9_dagger": (8_776_592, 8_776_592),
    "crossvit_15": (27_528_464, 27_528_464),
    "crossvit_15_dagger": (28_209_008, 28_209_008),
    "crossvit_15_dagger_408": (28_500_080, 28_500_080),
    "crossvit_18": (43_271_408, 43_271_408),
    "crossvit_18_dagger": (44_266_976, 44_266_976),
    "crossvit_18_dagger_408": (44_606_560, 44_606_560),
    "crossvit_pytorch": (55_180_176, 55_180_176),
}
"""Total and trainable, counted in timm 1.0.31, the last in vit-pytorch 1.26.11, each model
instantiated."""
