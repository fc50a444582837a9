"""Twins-SVT in PyTorch.

Source: Chu et al. 2021, arXiv:2104.13840, section 3.2; the official code as timm has it
(Apache-2.0) and, for the other form, vit-pytorch's ``twins_svt.py`` (MIT); see the spec.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from isovit.backends.torch.layers import (
    Block,
    Conv,
    DepthwiseConv,
    Linear,
    attention,
    split_heads,
)
from isovit.spec.blocks import BlockConfig
from isovit.spec.families.twins_svt import StageConfig, TwinsSVTConfig


def to_windows(
    x: Float[Tensor, "batch rows columns dim"], size: int
) -> Float[Tensor, "windows tokens dim"]:
    """Square windows that tile an image, row by row; they come to lie along the batch."""
    x = x.unflatten(2, (-1, size)).unflatten(1, (-1, size))
    x = x.transpose(2, 3)  # (batch, rows / size, columns / size, size, size, dim)
    return x.flatten(3, 4).flatten(0, 2)


def from_windows(
    x: Float[Tensor, "windows tokens dim"], size: int, grid: tuple[int, int]
) -> Float[Tensor, "batch rows columns dim"]:
    """The images of ``to_windows``, with so many rows and columns."""
    rows, columns = grid
    x = x.unflatten(1, (size, size)).unflatten(0, (-1, rows // size, columns // size))
    x = x.transpose(2, 3)  # (batch, rows / size, size, columns / size, size, dim)
    return x.flatten(3, 4).flatten(1, 2)


def fix(layer: Linear) -> None:
    """Leave a layer out of training."""
    layer.requires_grad_(False)


class ConvNormPatchEmbed(nn.Module):
    """A convolution whose stride is its kernel, then LayerNorm."""

    def __init__(self, config: TwinsSVTConfig, stage: StageConfig) -> None:
        super().__init__()
        side = stage.patch_size
        self.proj = Conv(
            stage.in_dim,
            stage.dim,
            kernel_size=(side, side),
            stride=(side, side),
            padding=(0, 0),
            bias=True,
        )
        self.norm = nn.LayerNorm(stage.dim, eps=config.embed_norm_eps)

    def forward(
        self, x: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch tokens dim"]:
        x = self.proj(x)  # (batch, rows, columns, dim)
        return self.norm(x.flatten(1, 2))


class NormLinearNormPatchEmbed(nn.Module):
    """LayerNorm, dense, LayerNorm over patches flattened as (channel, height, width)."""

    def __init__(self, config: TwinsSVTConfig, stage: StageConfig) -> None:
        super().__init__()
        self.side, eps = stage.patch_size, config.embed_norm_eps
        self.norm1 = nn.LayerNorm(stage.patch_dim, eps=eps)
        self.proj = Linear(stage.patch_dim, stage.dim, bias=True)
        self.norm2 = nn.LayerNorm(stage.dim, eps=eps)

    def forward(
        self, x: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch tokens dim"]:
        x = x.unflatten(2, (-1, self.side)).unflatten(1, (-1, self.side))
        x = x.permute(0, 1, 3, 5, 2, 4)  # (batch, rows, columns, channels, side, side)
        x = x.flatten(3).flatten(1, 2)  # (batch, tokens, channels * side * side)
        return self.norm2(self.proj(self.norm1(x)))


PATCH_EMBEDS = {"conv_norm": ConvNormPatchEmbed, "norm_linear_norm": NormLinearNormPatchEmbed}


class LocalAttention(nn.Module):
    """Self-attention within windows, LSA; section 3.2.

    Rows and columns of zeros fill the last windows; their keys and values are the biases.
    """

    def __init__(self, stage: StageConfig, block: BlockConfig) -> None:
        super().__init__()
        inner = block.inner_dim
        self.grid, self.padded_grid = stage.grid, stage.padded_grid
        self.window_size, self.num_heads = stage.window_size, block.num_heads
        self.scale = block.attn_scale
        self.qkv = Linear(stage.dim, 3 * inner, bias=block.qkv_bias)
        self.attn_dropout = nn.Dropout(block.attn_dropout_rate)
        self.proj = Linear(inner, stage.dim, bias=True)
        self.proj_dropout = nn.Dropout(block.dropout_rate)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        (rows, columns), (padded_rows, padded_columns) = self.grid, self.padded_grid
        x = x.unflatten(1, self.grid)  # (batch, rows, columns, dim)
        x = F.pad(x, (0, 0, 0, padded_columns - columns, 0, padded_rows - rows))
        qkv = to_windows(self.qkv(x), self.window_size)  # (windows, window tokens, 3 * inner)
        q, k, v = split_heads(qkv, 3, self.num_heads)  # each (windows, heads, ..., head_dim)
        x = attention(q, k, v, self.scale, self.attn_dropout)
        x = x.transpose(1, 2).flatten(2)  # (windows, window tokens, heads * head_dim)
        x = from_windows(x, self.window_size, self.padded_grid)
        x = x[:, :rows, :columns].flatten(1, 2)  # (batch, tokens, heads * head_dim)
        return self.proj_dropout(self.proj(x))


class GlobalAttention(nn.Module):
    """Attention of every token to a summary of each square of tokens, GSA; section 3.2, eq. 2."""

    def __init__(self, config: TwinsSVTConfig, stage: StageConfig, block: BlockConfig) -> None:
        super().__init__()
        dim, inner, side = stage.dim, block.inner_dim, (stage.reduction, stage.reduction)
        by_conv = config.reduce == "conv"
        reduces = not by_conv and stage.reduction > 1
        squares = partial(Conv, dim, kernel_size=side, stride=side, padding=(0, 0))
        self.grid, self.num_heads, self.scale = stage.grid, block.num_heads, block.attn_scale
        self.q = Linear(dim, inner, bias=block.qkv_bias)
        if stage.has_one_key:  # the weight of one key is 1, whatever q is
            fix(self.q)
        self.reduce = squares(dim, bias=True) if reduces else nn.Identity()
        self.norm = nn.LayerNorm(dim, eps=config.reduce_norm_eps) if reduces else nn.Identity()
        self.kv = (
            squares(2 * inner, bias=block.qkv_bias)
            if by_conv
            else Linear(dim, 2 * inner, bias=block.qkv_bias)
        )
        self.attn_dropout = nn.Dropout(block.attn_dropout_rate)
        self.proj = Linear(inner, dim, bias=True)
        self.proj_dropout = nn.Dropout(block.dropout_rate)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        (q,) = split_heads(self.q(x), 1, self.num_heads)  # (batch, heads, tokens, head_dim)
        x = self.norm(self.reduce(x.unflatten(1, self.grid)))
        kv = self.kv(x).flatten(1, 2)  # (batch, summaries, 2 * heads * head_dim)
        k, v = split_heads(kv, 2, self.num_heads)  # each (batch, heads, summaries, head_dim)
        x = attention(q, k, v, self.scale, self.attn_dropout)
        x = x.transpose(1, 2).flatten(2)  # (batch, tokens, heads * head_dim)
        return self.proj_dropout(self.proj(x))


class PEG(nn.Module):
    """Positional encoding generator: x + depthwise convolution of x; arXiv:2102.10882, section 4.

    The zeros around the image are what tells a token where it is.
    """

    def __init__(self, config: TwinsSVTConfig, stage: StageConfig) -> None:
        super().__init__()
        size = config.peg_kernel_size
        self.grid = stage.grid
        self.proj = DepthwiseConv(
            stage.dim,
            kernel_size=(size, size),
            stride=(1, 1),
            padding=(size // 2, size // 2),
            bias=True,
        )

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        return x + self.proj(x.unflatten(1, self.grid)).flatten(1, 2)


class Stage(nn.Module):
    """Patch embedding, blocks, eq. 1, and the positional encoding behind the first of them."""

    def __init__(self, config: TwinsSVTConfig, stage: StageConfig) -> None:
        super().__init__()
        self.grid, self.peg_after = stage.grid, stage.peg_after
        self.patch_embed = PATCH_EMBEDS[config.patch_embed](config, stage)
        self.dropout = nn.Dropout(config.embed_dropout_rate)
        self.blocks = nn.ModuleList()
        for i, block in enumerate(stage.blocks):
            local = stage.is_local(i)
            attn = LocalAttention(stage, block) if local else GlobalAttention(config, stage, block)
            self.blocks.append(Block(block, attn))
        self.peg = PEG(config, stage)

    def forward(
        self, x: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch rows columns dim"]:
        x = self.dropout(self.patch_embed(x))  # (batch, tokens, dim)
        for i, block in enumerate(self.blocks, start=1):
            x = block(x)
            if i == self.peg_after:
                x = self.peg(x)
        return x.unflatten(1, self.grid)


class TwinsSVT(nn.Module):
    """Twins-SVT.

    Called with (batch, height, width, channels) images of ``config.image_size``; returns
    (batch, num_classes) logits, or the pooled features where the config has no head.
    """

    def __init__(self, config: TwinsSVTConfig) -> None:
        super().__init__()
        self.config = config
        dim, classes = config.embed_dims[-1], config.num_classes
        has_norm = config.final_norm == "tokens"
        self.stages = nn.ModuleList(Stage(config, stage) for stage in config.stages)
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps) if has_norm else nn.Identity()
        self.dropout = nn.Dropout(config.head_dropout_rate)
        self.head = Linear(dim, classes, bias=True) if classes > 0 else nn.Identity()

    def forward(
        self, images: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch ..."]:
        self.config.check_images(images.shape)
        x = images
        for stage in self.stages:
            x = stage(x)  # (batch, rows, columns, dim)
        x = self.norm(x.flatten(1, 2))  # (batch, tokens, dim)
        if self.config.pool == "mean":
            x = x.mean(dim=1)
        return self.head(self.dropout(x))
