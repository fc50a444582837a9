"""ViT: Vision Transformer.

Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", arXiv:2010.11929.
Two dialects of it are in use, and each difference between them is a field. *timm*: convolution as
patch embedding, q, k, v with bias, heads that fill the width, epsilon 1e-6. *vit-pytorch*:
LayerNorm, dense, LayerNorm over flattened patches, no qkv bias, free head width, epsilon 1e-5.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from isovit.spec.blocks import TransformerConfig, backbone, output_shape
from isovit.spec.config import Pair, Preprocess, require
from isovit.spec.param import Param, ParamTree, Role, conv, dense, layer_norm
from isovit.spec.scheme import Scheme


class ViTConfig(TransformerConfig, frozen=True, kw_only=True, tag="vit"):
    """Config of a ViT; fields of the backbone as in ``TransformerConfig``.

    Attributes:
        patch_size: height and width of a patch, in pixels.
        patch_embed: ``conv``, a convolution of stride ``patch_size``; or ``norm_linear_norm``,
            which normalises each flattened patch, order (height, width, channel), before and
            after the product.
        pos_embed_tokens: which tokens get a learned position: ``all``, or the ``patches`` alone.
    """

    patch_size: Pair = (16, 16)
    patch_embed: Literal["conv", "norm_linear_norm"] = "conv"
    pos_embed_tokens: Literal["all", "patches"] = "all"

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
        """Number of tokens in the blocks: patches, and the class token where there is one."""
        return self.patches + int(self.class_token)

    @property
    def positions(self) -> int:
        """Rows of the table of positions."""
        return self.tokens if self.pos_embed_tokens == "all" else self.patches


def param_tree(config: ViTConfig) -> ParamTree:
    """The modules of a ViT with their parameters, output shapes and multiply-adds."""
    scheme, dim = Scheme(config.init_scheme), config.embed_dim
    params = [Param("pos_embed", (1, config.positions, dim), Role.OWN, scheme.positions())]
    if config.class_token:
        params.insert(0, Param("cls_token", (1, 1, dim), Role.OWN, scheme.class_token()))
    return ParamTree(
        name="",
        params=tuple(params),
        children=(_patch_embed(config, scheme), *backbone(config, config.tokens, scheme)),
        output=output_shape(config, config.tokens),
    )


def _patch_embed(config: ViTConfig, scheme: Scheme) -> ParamTree:
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


SIZES: dict[str, dict[str, Any]] = {
    "ti": dict(embed_dim=192, depth=12, num_heads=3, mlp_dim=768),  # Touvron et al. 2021, table 1
    "s": dict(embed_dim=384, depth=12, num_heads=6, mlp_dim=1536),  # Touvron et al. 2021, table 1
    "b": dict(embed_dim=768, depth=12, num_heads=12, mlp_dim=3072),  # Dosovitskiy 2021, table 1
    "l": dict(embed_dim=1024, depth=24, num_heads=16, mlp_dim=4096),  # Dosovitskiy 2021, table 1
    "h": dict(embed_dim=1280, depth=32, num_heads=16, mlp_dim=5120),  # Dosovitskiy 2021, table 1
}

# The AugReg checkpoints (Steiner et al. 2022, arXiv:2106.10270) were trained on pixels in [-1, 1].
AUGREG = Preprocess(crop_fraction=0.9, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def _variant(size: str, patch_size: int) -> ViTConfig:
    return ViTConfig(patch_size=(patch_size, patch_size), preprocess=AUGREG, **SIZES[size])


VARIANTS: dict[str, ViTConfig] = {
    f"vit_{size}{patch_size}": _variant(size, patch_size)
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
}
"""The names of timm."""
