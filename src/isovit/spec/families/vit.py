"""ViT: Vision Transformer.

Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", arXiv:2010.11929.
Two dialects of it are in use, and each difference between them is a field. *timm*: convolution as
patch embedding, q, k, v with bias, heads that fill the width, epsilon 1e-6. *vit-pytorch*:
LayerNorm, dense, LayerNorm over flattened patches, no qkv bias, free head width, epsilon 1e-5.

DeiT is the same model trained otherwise (Touvron et al. 2021, "Training data-efficient image
transformers & distillation through attention", arXiv:2012.12877). Its distilled form has a second
token and a second head, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from isovit.spec.blocks import TransformerConfig, backbone, head, output_shape
from isovit.spec.config import Pair, PositionTable, Positive, Preprocess, require
from isovit.spec.param import Init, Param, ParamTree, Role, conv, dense, layer_norm
from isovit.spec.positions import sincos_positions
from isovit.spec.published import Published
from isovit.spec.scheme import Scheme


class ViTConfig(TransformerConfig, frozen=True, kw_only=True, tag="vit"):
    """Config of a ViT; fields of the backbone as in ``TransformerConfig``.

    Attributes:
        patch_size: height and width of a patch, in pixels.
        patch_embed: ``conv``, a convolution of stride ``patch_size``; or ``norm_linear_norm``,
            which normalises each flattened patch, order (height, width, channel), before and
            after the product.
        pos_embed: a ``learned`` table of positions, or the fixed one of ``sincos_positions``
            (He et al. 2022, arXiv:2111.06377, appendix A).
        pos_embed_tokens: which tokens get a position: ``all``, or the ``patches`` alone.
        dist_token: whether a learned distillation token stands between the class token and the
            patches.
        dist_head: whether that token has a head of its own; the logits are then the mean of both
            heads', in training too (``forward_heads`` gives them apart).
        pre_logits_dim: width of a product with bias, then tanh, between the pooled vector and the
            head (Dosovitskiy et al. 2021, section 3.1: the hidden layer of pre-training); None
            for no such.
    """

    patch_size: Pair = (16, 16)
    patch_embed: Literal["conv", "norm_linear_norm"] = "conv"
    pos_embed: Literal["learned", "sincos"] = "learned"
    pos_embed_tokens: Literal["all", "patches"] = "all"
    dist_token: bool = False
    dist_head: bool = False
    pre_logits_dim: Positive | None = None

    def check(self) -> None:
        """Check that patches tile the image, the rules of the backbone, and of what is added."""
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
            self.pos_embed == "learned" or self.embed_dim % 4 == 0,
            "embed_dim",
            self.embed_dim,
            "must be divisible by 4: pos_embed=sincos has sine and cosine of rows and of columns",
        )
        require(
            not self.dist_token or self.class_token,
            "dist_token",
            self.dist_token,
            "stands behind the class token: needs class_token=true",
        )
        normed_tokens = self.pool == "cls" and self.final_norm == "tokens"
        require(
            not self.dist_head or (self.dist_token and self.num_classes > 0 and normed_tokens),
            "dist_head",
            self.dist_head,
            "needs dist_token=true, num_classes > 0, pool=cls and final_norm=tokens",
        )
        require(
            self.pre_logits_dim is None or (self.pool != "none" and not self.dist_head),
            "pre_logits_dim",
            self.pre_logits_dim,
            "needs one pooled vector: pool other than none, and dist_head=false",
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def patch_dim(self) -> int:
        """Numbers in a flattened patch."""
        return math.prod(self.patch_size) * self.in_channels

    @property
    def patches(self) -> int:
        """Number of patches."""
        return math.prod(self.grid)

    @property
    def tokens(self) -> int:
        """Number of tokens in the blocks: the patches and those before them."""
        return self.prefix_tokens + self.patches

    @property
    def prefix_tokens(self) -> int:
        """Number of tokens before the patches: class token, distillation token."""
        return int(self.class_token) + int(self.dist_token)

    @property
    def feature_dim(self) -> int:
        """Width of the features, which the head gets."""
        return self.pre_logits_dim or self.embed_dim

    @property
    def position_tables(self) -> Mapping[str, PositionTable]:
        """See ``Config.position_tables``."""
        return {"pos_embed": PositionTable(self.grid, self.positions - self.patches)}

    @property
    def positions(self) -> int:
        """Rows of the table of positions."""
        return self.tokens if self.pos_embed_tokens == "all" else self.patches

    @property
    def sincos_table(self) -> np.ndarray:
        """The fixed positions, (1, positions, embed_dim); of tokens before the patches zeros."""
        return sincos_positions(self.grid, self.embed_dim, self.positions - self.patches)[None]


def param_tree(config: ViTConfig, tokens: int | None = None) -> ParamTree:
    """The modules of a ViT with their parameters, output shapes and multiply-adds.

    Args:
        config: of the model.
        tokens: how many go through the blocks; None for all.
    """
    scheme, dim, tokens = Scheme(config.init_scheme), config.embed_dim, tokens or config.tokens
    learned = config.pos_embed == "learned"
    positions = scheme.positions() if learned else Init("sincos_2d", 10000.0, config.grid)
    shape = (1, config.positions, dim)
    params = [Param("pos_embed", shape, Role.OWN, positions, trainable=learned)]
    for name, wanted in (("dist_token", config.dist_token), ("cls_token", config.class_token)):
        if wanted:
            params.insert(0, Param(name, (1, 1, dim), Role.OWN, scheme.class_token()))
    return ParamTree(
        name="",
        params=tuple(params),
        children=(
            patch_embed(config, scheme),
            *backbone(config, tokens, scheme),
            *_pre_logits(config, scheme),
            *head("head", config, scheme),
            *(head("head_dist", config, scheme) if config.dist_head else ()),
        ),
        output=output_shape(config, tokens),
    )


def patch_embed(config: ViTConfig, scheme: Scheme) -> ParamTree:
    """The patch embedding, whose tokens are the patches row by row."""
    grid, dim, patch_dim = config.grid, config.embed_dim, config.patch_dim
    if config.patch_embed == "conv":
        kernel, bias = scheme.conv_kernel(patch_dim), scheme.conv_bias(patch_dim)
        proj = conv("proj", grid, config.patch_size, config.in_channels, dim, kernel, bias)
        return ParamTree("patch_embed", children=(proj,), output=(config.patches, dim))
    lead = (config.patches,)
    kernel, bias = scheme.dense_kernel(patch_dim, dim), scheme.dense_bias(patch_dim)
    children = (
        layer_norm("norm1", lead, patch_dim),
        dense("proj", lead, patch_dim, dim, kernel, bias),
        layer_norm("norm2", lead, dim),
    )
    return ParamTree("patch_embed", children=children, output=(config.patches, dim))


def _pre_logits(config: ViTConfig, scheme: Scheme) -> tuple[ParamTree, ...]:
    if config.pre_logits_dim is None:
        return ()
    dim, width = config.embed_dim, config.pre_logits_dim
    kernel, bias = scheme.dense_kernel(dim, width), scheme.dense_bias(dim)
    return (dense("pre_logits", (), dim, width, kernel, bias),)


SIZES: dict[str, dict[str, Any]] = {
    "ti": dict(embed_dim=192, depth=12, num_heads=3, mlp_dim=768),  # Touvron et al. 2021, table 1
    "s": dict(embed_dim=384, depth=12, num_heads=6, mlp_dim=1536),  # Touvron et al. 2021, table 1
    "b": dict(embed_dim=768, depth=12, num_heads=12, mlp_dim=3072),  # Dosovitskiy 2021, table 1
    "l": dict(embed_dim=1024, depth=24, num_heads=16, mlp_dim=4096),  # Dosovitskiy 2021, table 1
    "h": dict(embed_dim=1280, depth=32, num_heads=16, mlp_dim=5120),  # Dosovitskiy 2021, table 1
}

# The AugReg checkpoints (Steiner et al. 2022, arXiv:2106.10270) were trained on pixels in [-1, 1].
AUGREG = Preprocess(crop_fraction=0.9, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


VIT_PYTORCH = ViTConfig(
    image_size=(256, 256),
    patch_size=(32, 32),
    patch_embed="norm_linear_norm",
    embed_dim=1024,
    depth=6,
    num_heads=8,
    head_dim=64,
    qkv_bias=False,
    mlp_dim=2048,
    norm_eps=1e-5,
    init_scheme="vit_pytorch",
)
"""The ViT of vit-pytorch's README, which its objectives train, without dropout."""


def _augreg(size: str, patch_size: int) -> ViTConfig:
    return ViTConfig(patch_size=(patch_size, patch_size), preprocess=AUGREG, **SIZES[size])


def _deit(size: str, *, distilled: bool) -> ViTConfig:
    return ViTConfig(dist_token=distilled, dist_head=distilled, **SIZES[size])


VARIANTS: dict[str, ViTConfig] = {
    **{
        f"vit_{size}{patch_size}": _augreg(size, patch_size)
        for size, patch_size in [
            ("ti", 16),
            ("s", 16),
            ("s", 32),
            ("b", 8),
            ("b", 16),
            ("b", 32),
            ("l", 16),
            ("l", 32),
            ("h", 14),
        ]
    },
    # Touvron et al. 2021, table 1; crop of 0.875 as in DeiT's own evaluation, where timm has 0.9.
    **{f"deit_{size}16": _deit(size, distilled=False) for size in ("ti", "s", "b")},
    **{f"deit_{size}16_distilled": _deit(size, distilled=True) for size in ("ti", "s", "b")},
}

AUGREG_PAGE = "README of google-research/vision_transformer"
DEIT_PAPER = "Touvron et al. 2021, arXiv:2012.12877"

# After pre-training on ImageNet-21k, fine-tuned at 384.
PUBLISHED: dict[str, Published] = {
    "vit_ti16": Published(AUGREG_PAGE, 78.22, 384),
    "vit_s16": Published(AUGREG_PAGE, 83.73, 384),
    "vit_s32": Published(AUGREG_PAGE, 79.58, 384),
    "vit_b16": Published(AUGREG_PAGE, 85.49, 384),
    "vit_b32": Published(AUGREG_PAGE, 83.59, 384),
    "vit_l16": Published(AUGREG_PAGE, 85.59, 384),
    "deit_ti16": Published(DEIT_PAPER, 72.2),
    "deit_s16": Published(DEIT_PAPER, 79.9),
    "deit_b16": Published(DEIT_PAPER, 81.8),
    "deit_ti16_distilled": Published(DEIT_PAPER, 74.5),
    "deit_s16_distilled": Published(DEIT_PAPER, 81.2),
    "deit_b16_distilled": Published(DEIT_PAPER, 83.4),
}

ALIASES = {
    "vit_tiny_patch16_224": "vit_ti16",
    "vit_small_patch16_224": "vit_s16",
    "vit_small_patch32_224": "vit_s32",
    "vit_base_patch8_224": "vit_b8",
    "vit_base_patch16_224": "vit_b16",
    "vit_base_patch32_224": "vit_b32",
    "vit_large_patch16_224": "vit_l16",
    "vit_large_patch32_224": "vit_l32",
    "vit_huge_patch14_224": "vit_h14",
    "deit_tiny_patch16_224": "deit_ti16",
    "deit_small_patch16_224": "deit_s16",
    "deit_base_patch16_224": "deit_b16",
    "deit_tiny_distilled_patch16_224": "deit_ti16_distilled",
    "deit_small_distilled_patch16_224": "deit_s16_distilled",
    "deit_base_distilled_patch16_224": "deit_b16_distilled",
}
"""The names of timm."""
