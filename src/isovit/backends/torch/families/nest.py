"""NesT in PyTorch.

Source: Zhang et al. 2022, arXiv:2105.12723, section 3; the official code (Apache-2.0) and
vit-pytorch's ``nest.py`` (MIT); see the spec for the differences.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from isovit.backends.torch.layers import Block, Conv, Linear, attention
from isovit.spec.blocks import BlockConfig
from isovit.spec.families.nest import POOL_KERNEL, POOL_STRIDE, Level, NesTConfig


def to_blocks(
    x: Float[Tensor, "batch rows columns dim"], level: Level
) -> Float[Tensor, "batch blocks tokens dim"]:
    """An image cut into blocks, row by row, and each block into tokens, row by row."""
    (down, across), (height, width) = level.block_grid, level.block_size
    x = x.unflatten(2, (across, width)).unflatten(1, (down, height))
    x = x.transpose(2, 3)  # (batch, down, across, height, width, dim)
    return x.flatten(3, 4).flatten(1, 2)


def to_image(
    x: Float[Tensor, "batch tokens dim"], level: Level
) -> Float[Tensor, "batch rows columns dim"]:
    """The image again, from its tokens, block after block."""
    x = x.unflatten(1, (*level.block_grid, *level.block_size))
    x = x.transpose(2, 3)  # (batch, down, height, across, width, dim)
    return x.flatten(3, 4).flatten(1, 2)


def max_pool(
    x: Float[Tensor, "batch rows columns dim"], padding: tuple[int, int]
) -> Float[Tensor, "batch half_rows half_columns dim"]:
    """The largest of 3 x 3 numbers, at every second; ``padding`` before and after both axes."""
    x = F.pad(x, (0, 0, *padding, *padding), value=-torch.inf)
    x = F.max_pool2d(x.permute(0, 3, 1, 2), POOL_KERNEL, POOL_STRIDE)
    return x.permute(0, 2, 3, 1)


class ConvPatchEmbed(nn.Module):
    """A convolution whose stride is its kernel."""

    def __init__(self, config: NesTConfig) -> None:
        super().__init__()
        self.proj = Conv(
            config.in_channels,
            config.embed_dims[0],
            kernel_size=config.patch_size,
            stride=config.patch_size,
            padding=0,
            bias=True,
        )

    def forward(
        self, images: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch rows columns dim"]:
        return self.proj(images)


class NormLinearNormPatchEmbed(nn.Module):
    """LayerNorm, dense, LayerNorm over patches flattened as (height, width, channel)."""

    def __init__(self, config: NesTConfig) -> None:
        super().__init__()
        dim, eps = config.embed_dims[0], config.norm_eps
        self.patch_size, self.grid = config.patch_size, config.grid
        self.norm1 = nn.LayerNorm(config.patch_dim, eps=eps)
        self.proj = Linear(config.patch_dim, dim, bias=True)
        self.norm2 = nn.LayerNorm(dim, eps=eps)

    def forward(
        self, images: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch rows columns dim"]:
        (height, width), (rows, columns) = self.patch_size, self.grid
        x = images.unflatten(2, (columns, width)).unflatten(1, (rows, height))
        x = x.transpose(2, 3)  # (batch, rows, columns, height, width, channels)
        return self.norm2(self.proj(self.norm1(x.flatten(3))))


PATCH_EMBEDS = {"conv": ConvPatchEmbed, "norm_linear_norm": NormLinearNormPatchEmbed}


class BlockAttention(nn.Module):
    """Multi-head self-attention within each block; section 3.1.

    It gets the tokens of all blocks, one after another: nothing else in a layer knows of blocks.
    """

    def __init__(self, config: BlockConfig, blocks: int) -> None:
        super().__init__()
        self.num_heads, self.blocks = config.num_heads, blocks
        self.scale = config.attn_scale
        self.qkv = Linear(config.dim, 3 * config.inner_dim, bias=config.qkv_bias)
        self.attn_dropout = nn.Dropout(config.attn_dropout_rate)
        self.proj = Linear(config.inner_dim, config.dim, bias=True)
        self.proj_dropout = nn.Dropout(config.dropout_rate)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).unflatten(1, (self.blocks, -1))
        qkv = qkv.permute(3, 0, 1, 4, 2, 5)  # (3, batch, blocks, heads, tokens, head_dim)
        q, k, v = qkv.flatten(2, 3)  # each (batch, blocks * heads, tokens, head_dim)
        x = attention(q, k, v, self.scale, self.attn_dropout)
        x = x.unflatten(1, (self.blocks, self.num_heads))
        x = x.transpose(2, 3)  # (batch, blocks, tokens, heads, head_dim)
        x = x.flatten(3).flatten(1, 2)  # (batch, blocks * tokens, heads * head_dim)
        return self.proj_dropout(self.proj(x))


class ConvPool(nn.Module):
    """Block aggregation: convolution, LayerNorm, max pooling over the whole image; section 3.1."""

    def __init__(self, config: NesTConfig, input_dim: int, dim: int) -> None:
        super().__init__()
        self.padding = (0, 1) if config.pool_padding == "end" else (1, 1)
        self.conv = Conv(input_dim, dim, POOL_KERNEL, stride=1, padding=1, bias=True)
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps)

    def forward(
        self, x: Float[Tensor, "batch rows columns dim"]
    ) -> Float[Tensor, "batch half_rows half_columns dim_out"]:
        return max_pool(self.norm(self.conv(x)), self.padding)


class NesTLevel(nn.Module):
    """One level of the hierarchy: aggregation, but in the first, positions, layers."""

    def __init__(self, config: NesTConfig, level: Level) -> None:
        super().__init__()
        self.level = level
        self.pos_embed = nn.Parameter(
            torch.zeros(level.pos_embed_shape), requires_grad=level.pos_embed_trains
        )
        self.pool = (
            nn.Identity()
            if level.input_dim is None
            else ConvPool(config, level.input_dim, level.dim)
        )
        self.blocks = nn.ModuleList(
            Block(layer, BlockAttention(layer, level.blocks)) for layer in level.layers
        )

    def forward(
        self, x: Float[Tensor, "batch rows columns dim"]
    ) -> Float[Tensor, "batch rows_out columns_out dim_out"]:
        x = to_blocks(self.pool(x), self.level)  # (batch, blocks, tokens, dim)
        x = x + (self.pos_embed if self.level.per_channel else self.pos_embed[:, None])
        x = x.flatten(1, 2)  # (batch, blocks * tokens, dim)
        for block in self.blocks:
            x = block(x)
        return to_image(x, self.level)


class NesT(nn.Module):
    """Nested Hierarchical Transformer.

    Called with (batch, height, width, channels) images of ``config.image_size``; returns
    (batch, num_classes) logits, or the pooled features where the config has no head.
    """

    def __init__(self, config: NesTConfig) -> None:
        super().__init__()
        self.config = config
        dim, classes = config.feature_dim, config.num_classes
        self.patch_embed = PATCH_EMBEDS[config.patch_embed](config)
        self.levels = nn.ModuleList(NesTLevel(config, level) for level in config.levels)
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps)
        self.head_dropout = nn.Dropout(config.head_dropout_rate)
        self.head = Linear(dim, classes, bias=True) if classes else nn.Identity()

    def forward(
        self, images: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch features"]:
        self.config.check_images(images.shape)
        x = self.patch_embed(images)  # (batch, rows, columns, dim)
        for level in self.levels:
            x = level(x)
        x = self.norm(x).mean(dim=(1, 2))
        return self.head(self.head_dropout(x))
