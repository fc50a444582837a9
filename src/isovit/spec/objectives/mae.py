"""MAE: a ViT learns by painting the patches of an image that it was not shown.

Source: He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners", arXiv:2111.06377,
section 3 and appendix A; the official code (facebookresearch/mae, CC BY-NC) and transformers'
``ViTMAEForPreTraining`` for what the paper leaves open; vit-pytorch's ``mae.py`` (MIT).

The encoder sees the patches that are kept; the decoder sees a shared mask token in the place of
each of the others, and its answer for those is compared with their pixels. Both forms are one
config: the official one has a class token, fixed positions and normalised pixels; vit-pytorch's has
no class token, learned positions, and the pixels as they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np

from isovit.spec.blocks import BlockConfig, block
from isovit.spec.config import BaseConfig, NonNegative, Positive, Rate, require
from isovit.spec.families import vit
from isovit.spec.families.vit import SIZES, VIT_PYTORCH, ViTConfig
from isovit.spec.param import Init, Param, ParamTree, Role, dense, layer_norm, repeat
from isovit.spec.positions import sincos_positions
from isovit.spec.published import Published
from isovit.spec.scheme import Scheme

PIXEL_EPS = 1e-6
"""Added to the variance of the pixels of a patch, where they are normalised."""


class MAEConfig(BaseConfig, frozen=True, kw_only=True, tag="mae"):
    """Config of a masked autoencoder.

    Called with (batch, height, width, channels) images and ``order``, (batch, patches) integers: a
    permutation of the patches of each image, of which the first ``kept`` are shown.

    Attributes:
        encoder: the ViT that learns: without a head, and its class token, if it has one, goes
            through the decoder too. Positions of the decoder are of the same kind as its own.
        mask_ratio: fraction of the patches that is hidden.
        mask_rounds_down: which number is the whole part of its product: of patches ``kept``
            (official) or ``hidden`` (vit-pytorch).
        decoder_embed: whether a product leads from the encoder's width to the decoder's;
            vit-pytorch leaves it out between equal widths.
        decoder_dim: width of the decoder.
        decoder_depth: its blocks, which have the encoder's epsilon, activation and qkv bias.
        decoder_num_heads: its attention heads.
        decoder_head_dim: width of a head; None for decoder_dim / decoder_num_heads.
        decoder_mlp_dim: hidden width of its MLP.
        normalized_pixels: whether the pixels of a patch are given mean 0 and variance 1, that of a
            sample, before they are compared.
    """

    encoder: ViTConfig = ViTConfig(num_classes=0, pos_embed="sincos")
    mask_ratio: Rate = 0.75
    mask_rounds_down: Literal["kept", "hidden"] = "kept"
    decoder_embed: bool = True
    decoder_dim: Positive = 512
    decoder_depth: NonNegative = 8
    decoder_num_heads: Positive = 16
    decoder_head_dim: Positive | None = None
    decoder_mlp_dim: Positive = 2048
    normalized_pixels: bool = True

    def check(self) -> None:
        """Check that the encoder can be one, that some patches are hidden, and that heads fit."""
        check_encoder("encoder", self.encoder)
        require(
            0 < self.kept < self.encoder.patches,
            "mask_ratio",
            self.mask_ratio,
            f"must keep and hide one or more of {self.encoder.patches} patches",
        )
        require(
            self.decoder_head_dim is not None or self.decoder_dim % self.decoder_num_heads == 0,
            "decoder_dim",
            self.decoder_dim,
            f"must be divisible by decoder_num_heads={self.decoder_num_heads}, "
            "unless decoder_head_dim is given",
        )
        require(
            self.decoder_embed or self.decoder_dim == self.encoder.embed_dim,
            "decoder_embed",
            self.decoder_embed,
            f"decoder_dim={self.decoder_dim} other than the encoder's {self.encoder.embed_dim} "
            "needs the product",
        )
        require(
            self.encoder.pos_embed == "learned" or self.decoder_dim % 4 == 0,
            "decoder_dim",
            self.decoder_dim,
            "must be divisible by 4: positions are sine and cosine of rows and of columns",
        )
        require(
            not self.normalized_pixels or self.encoder.patch_dim > 1,
            "normalized_pixels",
            self.normalized_pixels,
            "a patch of one number has no variance",
        )

    @property
    def kept(self) -> int:
        """Number of patches that the encoder sees."""
        patches = self.encoder.patches
        if self.mask_rounds_down == "kept":
            return int(patches * (1 - self.mask_ratio))
        return patches - int(patches * self.mask_ratio)

    @property
    def hidden(self) -> int:
        """Number of patches that the decoder paints."""
        return self.encoder.patches - self.kept

    @property
    def decoder_blocks(self) -> tuple[BlockConfig, ...]:
        """The numbers of the decoder's blocks."""
        head_dim = self.decoder_head_dim or self.decoder_dim // self.decoder_num_heads
        numbers = replace(
            self.encoder.block,
            dim=self.decoder_dim,
            num_heads=self.decoder_num_heads,
            head_dim=head_dim,
            attn_proj=True,
            attn_scale=head_dim**-0.5,
            mlp_dim=self.decoder_mlp_dim,
            layer_scale_init=None,
        )
        return (numbers,) * self.decoder_depth

    @property
    def sincos_table(self) -> np.ndarray:
        """The decoder's fixed positions, (1, tokens, decoder_dim)."""
        grid, prefix = self.encoder.grid, self.encoder.prefix_tokens
        return sincos_positions(grid, self.decoder_dim, prefix)[None]

    def draw(self, batch: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """An order of the patches for each image, all orders alike."""
        return {"order": draw_order(batch, self.encoder.patches, rng)}


def check_encoder(name: str, encoder: ViTConfig) -> None:
    """Check that a ViT can learn from its patches: it has neither a head nor what is before it."""
    for field, wanted in (
        ("num_classes", 0),
        ("dist_token", False),
        ("pre_logits_dim", None),
        ("embed_dropout_rate", 0.0),
    ):
        value = getattr(encoder, field)
        require(value == wanted, f"{name}.{field}", value, f"must be {wanted} here")
    require(
        encoder.final_norm != "pooled",
        f"{name}.final_norm",
        encoder.final_norm,
        "nothing is pooled here: must be tokens or none",
    )


def draw_order(batch: int, patches: int, rng: np.random.Generator) -> np.ndarray:
    """A permutation of the patches for each image, (batch, patches) int32."""
    return np.argsort(rng.random((batch, patches)), axis=1).astype(np.int32)


def param_tree(config: MAEConfig) -> ParamTree:
    """The modules of a masked autoencoder; it returns a number for each image."""
    encoder, dim, lead = config.encoder, config.decoder_dim, (config.encoder.tokens,)
    scheme, learned = Scheme(encoder.init_scheme), encoder.pos_embed == "learned"
    positions = scheme.positions() if learned else Init("sincos_2d", 10000.0, encoder.grid)
    numbers = config.decoder_blocks
    shown = encoder.prefix_tokens + config.kept
    kernel, bias = scheme.dense_kernel(encoder.embed_dim, dim), scheme.dense_bias(encoder.embed_dim)
    embed = dense("decoder_embed", (shown,), encoder.embed_dim, dim, kernel, bias)
    kernel, bias = scheme.dense_kernel(dim, encoder.patch_dim), scheme.dense_bias(dim)
    return ParamTree(
        name="",
        params=(
            Param("mask_token", (1, 1, dim), Role.OWN, scheme.class_token()),
            Param("decoder_pos_embed", (1, *lead, dim), Role.OWN, positions, trainable=learned),
        ),
        children=(
            replace(vit.param_tree(encoder, shown), name="encoder", output=None),
            *((embed,) if config.decoder_embed else ()),
            repeat("decoder_blocks", len(numbers), lambda i: block(numbers[i], *lead, scheme)),
            layer_norm("decoder_norm", lead, dim),
            dense("decoder_pred", (config.hidden,), dim, encoder.patch_dim, kernel, bias),
        ),
        output=(),
    )


def _official(size: str, patch_size: int) -> MAEConfig:
    encoder = ViTConfig(
        patch_size=(patch_size, patch_size), num_classes=0, pos_embed="sincos", **SIZES[size]
    )
    return MAEConfig(encoder=encoder)


# README of vit-pytorch, section "Masked Autoencoder"; its ViT pools by the mean.
PYTORCH: dict[str, Any] = dict(
    encoder=VIT_PYTORCH.replace(num_classes=0, class_token=False, pool="mean"),
    mask_rounds_down="hidden",
    decoder_dim=512,
    decoder_depth=6,
    decoder_num_heads=8,
    decoder_head_dim=64,
    decoder_mlp_dim=2048,
    normalized_pixels=False,
)

MAE_PAPER = "He et al. 2022, arXiv:2111.06377, table 3"

VARIANTS: dict[str, MAEConfig] = {
    "mae_vit_b16": _official("b", 16),  # He et al. 2022, section 4 and appendix A.2
    "mae_vit_l16": _official("l", 16),
    "mae_vit_h14": _official("h", 14),
    "mae_vit_pytorch": MAEConfig(**PYTORCH),
}

# The encoder, fine-tuned.
PUBLISHED: dict[str, Published] = {
    "mae_vit_b16": Published(MAE_PAPER, 83.6),
    "mae_vit_l16": Published(MAE_PAPER, 85.9),
    "mae_vit_h14": Published(MAE_PAPER, 86.9),
}

ALIASES: dict[str, str] = {
    "mae_vit_base_patch16": "mae_vit_b16",
    "mae_vit_large_patch16": "mae_vit_l16",
    "mae_vit_huge_patch14": "mae_vit_h14",
}
