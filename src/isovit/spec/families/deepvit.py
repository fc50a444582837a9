"""DeepViT: a vision transformer whose heads exchange their attention weights.

Source: Zhou et al. 2021, "DeepViT: Towards Deeper Vision Transformer", arXiv:2103.11886, section
4.2. *Re-attention* stands between softmax and v: every head's weights become a learned mixture of
all heads' weights, which is then normalised. Two forms of it are in use, and each difference
between them is a field:

* the official code (zhoudaquan/dvit_repo, MIT): the mixture has a bias, a BatchNorm normalises it.
  Around it is timm's ViT; the models S and L add a stem of convolutions and scaled branches, and
  re-attend in their last blocks alone;
* vit-pytorch's ``deepvit.py`` (MIT): no bias, a LayerNorm over the heads, in vit-pytorch's ViT.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

from isovit.spec.blocks import TransformerConfig, attention, block, head, output_shape
from isovit.spec.config import Epsilon, NonNegative, Pair, Positive, Preprocess, Rate, require
from isovit.spec.families.vit import ViTConfig, patch_embed
from isovit.spec.param import (
    Init,
    Param,
    ParamTree,
    Role,
    batch_norm,
    conv,
    dense,
    layer_norm,
    repeat,
)
from isovit.spec.published import Published
from isovit.spec.scheme import Scheme


class DeepViTConfig(TransformerConfig, frozen=True, kw_only=True, tag="deepvit"):
    """Config of a DeepViT; fields of the backbone as in ``TransformerConfig``.

    Attributes:
        patch_size: height and width of a patch, in pixels.
        patch_embed: ``conv`` or ``norm_linear_norm``, as in ``ViTConfig``; or ``convs``, two
            convolutions with BatchNorm and ReLU, the first of stride 2, before one of stride
            ``patch_size`` / 2 (official S and L).
        stem_dim: width of the two convolutions of ``convs``.
        re_attention_depth: how many blocks at most, the last ones, re-attend, where the others
            attend as in a ViT; None for all.
        re_attention_bias: whether the mixture of heads has a bias.
        re_attention_norm: over the heads, behind the mixture: ``batch_norm`` (official) or
            ``layer_norm`` (vit-pytorch).
        re_attention_scale: factor on the normalised mixture; 1/√head_dim in the official S.
        branch_scale: factor on the tokens before norm1 and norm2; the outputs of attention and MLP
            are divided by it (``scale_adjustment`` in the official code, 0.5 in its S and L).
        batch_norm_eps: epsilon of every BatchNorm.
        batch_norm_momentum: weight of a new batch in the running statistics.
    """

    patch_size: Pair = (16, 16)
    patch_embed: Literal["conv", "convs", "norm_linear_norm"] = "conv"
    stem_dim: Positive = 64
    re_attention_depth: NonNegative | None = None
    re_attention_bias: bool = True
    re_attention_norm: Literal["batch_norm", "layer_norm"] = "batch_norm"
    re_attention_scale: Epsilon = 1.0
    branch_scale: Epsilon = 1.0
    batch_norm_eps: Epsilon = 1e-5
    batch_norm_momentum: Rate = 0.1

    def check(self) -> None:
        """Check that patches tile the image, and the rules of the backbone."""
        super().check()
        sizes = zip(("height", "width"), self.image_size, self.patch_size, strict=True)
        for axis, size, patch in sizes:
            require(
                size % patch == 0,
                "image_size",
                self.image_size,
                f"{axis} {size} must be divisible by the {axis} of patch_size={self.patch_size}",
            )
        require(
            self.patch_embed != "convs" or all(patch % 2 == 0 for patch in self.patch_size),
            "patch_size",
            self.patch_size,
            "must be even: the first of patch_embed=convs has a stride of 2",
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def patches(self) -> int:
        """Number of patches."""
        return math.prod(self.grid)

    @property
    def stem(self) -> ViTConfig:
        """The patch embedding, where it is that of a ViT, as the config of one."""
        return ViTConfig(
            image_size=self.image_size,
            in_channels=self.in_channels,
            preprocess=self.preprocess,
            patch_size=self.patch_size,
            patch_embed="conv" if self.patch_embed == "conv" else "norm_linear_norm",
            embed_dim=self.embed_dim,
            num_heads=1,
            norm_eps=self.norm_eps,
            init_scheme=self.init_scheme,
        )

    @property
    def tokens(self) -> int:
        """Number of tokens in the blocks, the class token included."""
        return self.prefix_tokens + self.patches

    def re_attends(self, index: int) -> bool:
        """Whether the block of an index re-attends; blocks are counted from 0."""
        return self.re_attention_depth is None or index >= self.depth - self.re_attention_depth


def param_tree(config: DeepViTConfig) -> ParamTree:
    """The modules of a DeepViT with their parameters, output shapes and multiply-adds."""
    scheme, dim, tokens = Scheme(config.init_scheme), config.embed_dim, config.tokens
    params = [Param("pos_embed", (1, tokens, dim), Role.OWN, scheme.positions())]
    if config.class_token:
        params.insert(0, Param("cls_token", (1, 1, dim), Role.OWN, scheme.class_token()))
    children = [
        _convs(config, scheme)
        if config.patch_embed == "convs"
        else patch_embed(config.stem, scheme),
        repeat("blocks", config.depth, lambda i: _block(config, i, scheme)),
    ]
    if config.final_norm != "none":
        lead = () if config.final_norm == "pooled" else (tokens,)
        children.append(layer_norm("norm", lead, dim))
    return ParamTree(
        name="",
        params=tuple(params),
        children=(*children, *head("head", config, scheme)),
        output=output_shape(config, tokens),
    )


def _convs(config: DeepViTConfig, scheme: Scheme) -> ParamTree:
    stem, in_dim, dim = config.stem_dim, config.in_channels, config.embed_dim
    size, patch = _half(config.image_size), _half(config.patch_size)
    fan_in = math.prod(patch) * stem
    kernel, bias = scheme.conv_kernel(fan_in), scheme.conv_bias(fan_in)
    children = (
        conv("conv1", size, (7, 7), in_dim, stem, scheme.conv_kernel(49 * in_dim), bias=None),
        batch_norm("bn1", size, stem),
        conv("conv2", size, (3, 3), stem, stem, scheme.conv_kernel(9 * stem), bias=None),
        batch_norm("bn2", size, stem),
        conv("proj", config.grid, patch, stem, dim, kernel, bias),
    )
    return ParamTree("patch_embed", children=children, output=(config.patches, dim))


def _half(size: Pair) -> tuple[int, int]:
    return size[0] // 2, size[1] // 2


def _block(config: DeepViTConfig, index: int, scheme: Scheme) -> ParamTree:
    attn = _re_attention(config, scheme) if config.re_attends(index) else None
    return block(config.block, config.tokens, scheme, attn)


def _re_attention(config: DeepViTConfig, scheme: Scheme) -> ParamTree:
    tree = attention("attn", config.block, config.tokens, scheme)
    qkv, *proj = tree.children
    heads, lead = config.num_heads, (config.tokens, config.tokens)
    vit_pytorch = config.init_scheme == "vit_pytorch"
    kernel = Init("normal", 1.0) if vit_pytorch else scheme.conv_kernel(heads)
    bias = scheme.conv_bias(heads) if config.re_attention_bias else None
    norm = batch_norm if config.re_attention_norm == "batch_norm" else layer_norm
    mix = dense("mix", lead, heads, heads, kernel, bias)
    return replace(tree, children=(qkv, mix, norm("mix_norm", lead, heads), *proj))


# The conventions of the official code beside its sizes: ``models/deep_vision_transformer.py``.
DVIT: dict[str, Any] = dict(
    num_heads=12,
    qkv_bias=True,
    norm_eps=1e-6,
    init_scheme="yitu",
    preprocess=Preprocess(crop_fraction=0.9, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
)
STEM: dict[str, Any] = dict(patch_embed="convs", branch_scale=0.5)

# The models of the official code, by their numbers of blocks; S and L have the stem.
SIZES: dict[str, dict[str, Any]] = {
    "16": dict(embed_dim=384, depth=16, mlp_dim=1152),
    "24": dict(embed_dim=384, depth=24, mlp_dim=1152),
    "32": dict(embed_dim=384, depth=32, mlp_dim=1152),
    "s": dict(
        embed_dim=396,
        depth=16,
        mlp_dim=1188,
        re_attention_depth=5,
        re_attention_scale=33**-0.5,  # 1/√head_dim
        **STEM,
    ),
    "l": dict(embed_dim=420, depth=32, mlp_dim=1260, re_attention_depth=12, **STEM),
}

VARIANTS: dict[str, DeepViTConfig] = {
    **{f"deepvit_{size}": DeepViTConfig(**DVIT, **row) for size, row in SIZES.items()},
    "deepvit_l_384": DeepViTConfig(**DVIT, **SIZES["l"]).replace(
        **{"image_size": 384, "preprocess.crop_fraction": 1.0}
    ),
    # The example model of vit-pytorch's README.
    "deepvit_pytorch": DeepViTConfig(
        image_size=(256, 256),
        patch_size=(32, 32),
        patch_embed="norm_linear_norm",
        embed_dim=1024,
        depth=6,
        num_heads=16,
        head_dim=64,
        mlp_dim=2048,
        qkv_bias=False,
        norm_eps=1e-5,
        re_attention_bias=False,
        re_attention_norm="layer_norm",
        final_norm="pooled",
        init_scheme="vit_pytorch",
    ),
}

PAGE = "README of zhoudaquan/dvit_repo, after Zhou et al. 2021, arXiv:2103.11886"

PUBLISHED: dict[str, Published] = {
    "deepvit_16": Published(PAGE, 79.10),
    "deepvit_24": Published(PAGE, 79.99),
    "deepvit_32": Published(PAGE, 80.90),
    "deepvit_s": Published(PAGE, 82.3),
    "deepvit_l": Published(PAGE, 83.1),
    "deepvit_l_384": Published(PAGE, 84.25, image_size=384),
}

ALIASES = {
    "deepvit_patch16_224_re_attn_16b": "deepvit_16",
    "deepvit_patch16_224_re_attn_24b": "deepvit_24",
    "deepvit_patch16_224_re_attn_32b": "deepvit_32",
    "deepvit_S": "deepvit_s",
    "deepvit_L": "deepvit_l",
    "deepvit_L_384": "deepvit_l_384",
}
"""The names of the official code."""
