"""ViT in PyTorch.

Source: Dosovitskiy et al. 2021, arXiv:2010.11929, section 3.1; both dialects, see the spec. The
distillation token: Touvron et al. 2021, arXiv:2012.12877, section 4.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from isovit.backends.torch.layers import Block, Conv, Linear, pool
from isovit.spec.config import require
from isovit.spec.families.vit import ViTConfig


def flatten_patches(
    images: Float[Tensor, "batch height width channels"], config: ViTConfig
) -> Float[Tensor, "batch patches patch"]:
    """Patches row by row, each flattened as (height, width, channel)."""
    height, width = config.patch_size
    rows, columns = images.shape[1] // height, images.shape[2] // width
    x = images.unflatten(2, (columns, width)).unflatten(1, (rows, height))
    x = x.transpose(2, 3)  # (batch, rows, columns, height, width, channels)
    return x.flatten(3).flatten(1, 2)


class ConvPatchEmbed(nn.Module):
    """A convolution whose stride is its kernel."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.proj = Conv(
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
        x = self.proj(images)  # (batch, rows, columns, dim)
        return x.flatten(1, 2)


class NormLinearNormPatchEmbed(nn.Module):
    """LayerNorm, dense, LayerNorm over patches flattened as (height, width, channel)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.norm1 = nn.LayerNorm(config.patch_dim, eps=config.norm_eps)
        self.proj = Linear(config.patch_dim, config.embed_dim, bias=True)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)

    def forward(
        self, images: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch tokens dim"]:
        x = flatten_patches(images, self.config)  # (batch, patches, height * width * channels)
        return self.norm2(self.proj(self.norm1(x)))


PATCH_EMBEDS = {"conv": ConvPatchEmbed, "norm_linear_norm": NormLinearNormPatchEmbed}


class ViT(nn.Module):
    """Vision Transformer.

    Called with (batch, height, width, channels) images of ``config.image_size``; returns
    (batch, num_classes) logits, or the pooled features where the config has no head. The logits of
    two heads are averaged; ``forward_heads`` gives them apart.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.embed_dim
        self.patch_embed = PATCH_EMBEDS[config.patch_embed](config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if config.class_token else None
        self.dist_token = nn.Parameter(torch.zeros(1, 1, dim)) if config.dist_token else None
        learned, positions = config.pos_embed == "learned", torch.zeros(1, config.positions, dim)
        if not learned:
            positions = torch.tensor(config.sincos_table)
        self.pos_embed = nn.Parameter(positions, requires_grad=learned)
        self.dropout = nn.Dropout(config.embed_dropout_rate)
        self.blocks = nn.ModuleList(Block(block) for block in config.blocks)
        has_norm, has_head = config.final_norm != "none", config.num_classes > 0
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps) if has_norm else nn.Identity()
        self.pre_logits = (
            Linear(dim, config.pre_logits_dim, bias=True) if config.pre_logits_dim else None
        )
        dim, classes = config.feature_dim, config.num_classes
        self.head = Linear(dim, classes, bias=True) if has_head else nn.Identity()
        self.head_dist = Linear(dim, classes, bias=True) if config.dist_head else nn.Identity()

    def embed(
        self, images: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """Every token, with its position: class token, distillation token, patches."""
        self.config.check_images(images.shape)
        return self.positioned(self.patch_embed(images))

    def positioned(
        self,
        x: Float[Tensor, "batch patches dim"],
        pos_embed: Float[Tensor, "1 positions dim"] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Patches with positions, behind the other tokens: class token, distillation token.

        Positions are the model's own, or those of patches on another grid.
        """
        pos_embed = self.pos_embed if pos_embed is None else pos_embed
        if self.config.pos_embed_tokens == "patches":
            x = x + pos_embed
        prefix = [token for token in (self.cls_token, self.dist_token) if token is not None]
        x = torch.cat([*(token.expand(x.shape[0], -1, -1) for token in prefix), x], dim=1)
        if self.config.pos_embed_tokens == "all":
            x = x + pos_embed
        return x

    def encode(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """Every token behind the blocks, and behind the norm if that is over tokens."""
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        return x if self.config.final_norm == "pooled" else self.norm(x)

    def classify(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch ..."]:
        """Logits of such tokens; features where there is no head."""
        if self.config.dist_head:
            return (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2
        x = pool(x, self.config)
        if self.config.final_norm == "pooled":
            x = self.norm(x)
        if self.pre_logits is not None:
            x = torch.tanh(self.pre_logits(x))
        return self.head(x)

    def forward_heads(
        self, images: Float[Tensor, "batch height width channels"]
    ) -> tuple[Float[Tensor, "batch classes"], Float[Tensor, "batch classes"]]:
        """Logits of the class token and of the distillation token, each for a loss of its own."""
        require(self.config.dist_head, "dist_head", False, "the model has one head")
        x = self.encode(self.embed(images))
        return self.head(x[:, 0]), self.head_dist(x[:, 1])

    def forward(
        self, images: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch ..."]:
        return self.classify(self.encode(self.embed(images)))
