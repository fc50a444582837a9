"""ViT in PyTorch.

Source: Dosovitskiy et al. 2021, arXiv:2010.11929, section 3.1; both dialects, see the spec.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from isovit.backends.torch.layers import Block, pool
from isovit.spec.families.vit import ViTConfig


class ConvPatchEmbed(nn.Module):
    """A convolution whose stride is its kernel."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(
            config.in_channels,
            config.embed_dim,
            kernel_size=config.patch_size,
            stride=config.patch_size,
            padding=0,
            bias=True,
        )

    def forward(
        self, images: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch tokens dim"]:
        x = self.proj(images.permute(0, 3, 1, 2))  # (batch, dim, rows, columns)
        return x.flatten(2).mT


class NormLinearNormPatchEmbed(nn.Module):
    """LayerNorm, dense, LayerNorm over patches flattened as (height, width, channel)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.patch_size, self.grid = config.patch_size, config.grid
        self.norm1 = nn.LayerNorm(config.patch_dim, eps=config.norm_eps)
        self.proj = nn.Linear(config.patch_dim, config.embed_dim, bias=True)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)

    def forward(
        self, images: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch tokens dim"]:
        (height, width), (rows, columns) = self.patch_size, self.grid
        x = images.unflatten(2, (columns, width)).unflatten(1, (rows, height))
        x = x.transpose(2, 3)  # (batch, rows, columns, height, width, channels)
        x = x.flatten(3).flatten(1, 2)  # (batch, patches, height * width * channels)
        return self.norm2(self.proj(self.norm1(x)))


PATCH_EMBEDS = {"conv": ConvPatchEmbed, "norm_linear_norm": NormLinearNormPatchEmbed}


class ViT(nn.Module):
    """Vision Transformer.

    Called with (batch, height, width, channels) images of ``config.image_size``; returns
    (batch, num_classes) logits, or the pooled features where the config has no head.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.embed_dim
        self.patch_embed = PATCH_EMBEDS[config.patch_embed](config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if config.class_token else None
        self.pos_embed = nn.Parameter(torch.zeros(1, config.positions, dim))
        self.dropout = nn.Dropout(config.embed_dropout_rate)
        self.blocks = nn.ModuleList(Block(block) for block in config.blocks)
        has_norm, has_head = config.final_norm != "none", config.num_classes > 0
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps) if has_norm else nn.Identity()
        self.head = nn.Linear(dim, config.num_classes, bias=True) if has_head else nn.Identity()

    def forward(
        self, images: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch ..."]:
        self.config.check_images(images.shape)
        x = self.patch_embed(images)  # (batch, patches, dim)
        if self.config.pos_embed_tokens == "patches":
            x = x + self.pos_embed
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        if self.config.pos_embed_tokens == "all":
            x = x + self.pos_embed
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        if self.config.final_norm == "pooled":
            x = self.norm(pool(x, self.config))
        else:
            x = pool(self.norm(x), self.config)
        return self.head(x)
