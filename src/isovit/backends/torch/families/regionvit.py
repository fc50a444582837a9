"""RegionViT in PyTorch.

Source: Chen, Panda & Fan 2022, arXiv:2106.02689, section 3; the official code (Apache-2.0) and, for
the other form, vit-pytorch's ``regionvit.py`` (MIT); see the spec for the differences.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from isovit.backends.torch.layers import ACTIVATIONS, Conv, DepthwiseConv, DropPath, Linear
from isovit.spec.families.regionvit import RegionViTConfig, StageConfig


def to_windows(
    regions: Float[Tensor, "batch rows columns dim"], x: Float[Tensor, "batch height width dim"]
) -> Float[Tensor, "batch regions tokens dim"]:
    """Each regional token with the local ones of its window behind it; both row by row."""
    rows, columns = regions.shape[1:3]
    x = x.unflatten(2, (columns, -1)).unflatten(1, (rows, -1))
    x = x.transpose(2, 3)  # (batch, rows, columns, height / rows, width / columns, dim)
    x = x.flatten(3, 4).flatten(1, 2)
    return torch.cat([regions.flatten(1, 2)[:, :, None], x], dim=2)


def from_windows(
    x: Float[Tensor, "batch regions tokens dim"], stage: StageConfig
) -> tuple[Float[Tensor, "batch rows columns dim"], Float[Tensor, "batch height width dim"]]:
    """The two grids of ``to_windows``."""
    regions = x[:, :, 0].unflatten(1, stage.region_grid)
    x = x[:, :, 1:].unflatten(2, stage.window).unflatten(1, stage.region_grid)
    x = x.transpose(2, 3)  # (batch, rows, height / rows, columns, width / columns, dim)
    return regions, x.flatten(3, 4).flatten(1, 2)


def window_bias(
    table: Float[Tensor, "heads offsets"], window: tuple[int, int], size: int
) -> Float[Tensor, "heads tokens tokens"]:
    """The bias of each query and key of a window: that of the offset from one to the other.

    Offsets of -size + 1 to size - 1 rows, and as many columns, lie in the table row by row. The
    regional token, the first, has none, as query or as key.
    """
    places = [torch.arange(side, device=table.device) for side in window]
    offsets = [place - place[:, None] + size - 1 for place in places]  # (queries, keys)
    bias = table.unflatten(1, (2 * size - 1, 2 * size - 1))
    bias = bias[:, offsets[0]][..., offsets[1]]  # (heads, rows, key rows, columns, key columns)
    bias = bias.transpose(2, 3).flatten(3).flatten(1, 2)
    return F.pad(bias, (1, 0, 1, 0))


class ConvEmbed(nn.Module):
    """The local tokens of a larger model: a convolution whose kernel is two strides wide."""

    def __init__(self, config: RegionViTConfig) -> None:
        super().__init__()
        side = config.patch_size
        self.proj = Conv(
            config.in_channels,
            config.embed_dims[0],
            kernel_size=(2 * side, 2 * side),
            stride=(side, side),
            padding=(side - 1, side - 1),
            bias=True,
        )

    def forward(
        self, images: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch rows columns dim"]:
        return self.proj(images)


class ConvStem(nn.Module):
    """The local tokens of a smaller model: three convolutions, of which two halve the image."""

    def __init__(self, config: RegionViTConfig) -> None:
        super().__init__()
        (first, second), eps = config.stem_dims, config.embed_norm_eps
        self.activation = ACTIVATIONS[config.activation]
        self.conv1 = Conv(config.in_channels, first, 3, stride=2, padding=1, bias=True)
        self.norm1 = nn.LayerNorm(first, eps=eps)
        self.conv2 = Conv(first, second, 3, stride=2, padding=1, bias=True)
        self.norm2 = nn.LayerNorm(second, eps=eps)
        self.conv3 = Conv(second, config.embed_dims[0], 3, stride=1, padding=1, bias=True)

    def forward(
        self, images: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch rows columns dim"]:
        x = self.activation(self.norm1(self.conv1(images)))
        x = self.activation(self.norm2(self.conv2(x)))
        return self.conv3(x)


class RegionEmbed(nn.Module):
    """The regional tokens: a product over all pixels of a region, (channel, height, width)."""

    def __init__(self, config: RegionViTConfig) -> None:
        super().__init__()
        self.side = config.region_size
        self.proj = Linear(config.region_dim, config.embed_dims[0], bias=True)

    def forward(
        self, images: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch rows columns dim"]:
        x = images.unflatten(2, (-1, self.side)).unflatten(1, (-1, self.side))
        x = x.permute(0, 1, 3, 5, 2, 4)  # (batch, rows, columns, channels, side, side)
        return self.proj(x.flatten(3))


class Downsample(nn.Module):
    """A convolution that halves a grid of tokens, behind LayerNorm and activation or not."""

    def __init__(self, config: RegionViTConfig, in_dim: int, dim: int) -> None:
        super().__init__()
        normed = config.downsample == "norm_conv"
        self.norm = nn.LayerNorm(in_dim, eps=config.embed_norm_eps) if normed else nn.Identity()
        self.activation = ACTIVATIONS[config.activation] if normed else nn.Identity()
        groups = in_dim if normed else 1
        self.conv = Conv(in_dim, dim, 3, stride=2, padding=1, groups=groups, bias=True)

    def forward(
        self, x: Float[Tensor, "batch rows columns dim"]
    ) -> Float[Tensor, "batch half_rows half_columns dim_out"]:
        return self.conv(self.activation(self.norm(x)))


class PEG(nn.Module):
    """Positional encoding generator: x + depthwise convolution of x; arXiv:2102.10882, section 4.

    The zeros around the grid are what tells a token where it is.
    """

    def __init__(self, config: RegionViTConfig, stage: StageConfig) -> None:
        super().__init__()
        self.proj = DepthwiseConv(
            stage.dim,
            kernel_size=(3, 3),
            stride=(1, 1),
            padding=(1, 1),
            bias=config.peg == "local",
        )

    def forward(
        self, x: Float[Tensor, "batch rows columns dim"]
    ) -> Float[Tensor, "batch rows columns dim"]:
        return x + self.proj(x)


class Attention(nn.Module):
    """Multi-head self-attention within each group of tokens: softmax(q·kᵀ · scale + bias)·v."""

    def __init__(self, config: RegionViTConfig, stage: StageConfig) -> None:
        super().__init__()
        self.num_heads = stage.num_heads
        self.scale = config.attn_scale or stage.head_dim**-0.5
        self.qkv = Linear(stage.dim, 3 * stage.inner_dim, bias=config.qkv_bias)
        self.attn_dropout = nn.Dropout(config.attn_dropout_rate)
        self.proj = Linear(stage.inner_dim, stage.dim, bias=True)
        self.proj_dropout = nn.Dropout(config.proj_dropout_rate)

    def forward(
        self,
        x: Float[Tensor, "batch groups tokens dim"],
        bias: Float[Tensor, "heads tokens tokens"] | None = None,
    ) -> Float[Tensor, "batch groups tokens dim"]:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)  # each (batch, groups, heads, tokens, head_dim)
        scores = (q * self.scale) @ k.mT
        scores = scores if bias is None else scores + bias
        x = self.attn_dropout(torch.softmax(scores, dim=-1)) @ v
        x = x.transpose(2, 3).flatten(3)  # (batch, groups, tokens, heads * head_dim)
        return self.proj_dropout(self.proj(x))


class Mlp(nn.Module):
    """Dense, activation, dense, with a dropout rate for each product."""

    def __init__(self, config: RegionViTConfig, stage: StageConfig) -> None:
        super().__init__()
        self.fc1 = Linear(stage.dim, stage.mlp_dim, bias=True)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout1 = nn.Dropout(config.hidden_dropout_rate)
        self.fc2 = Linear(stage.mlp_dim, stage.dim, bias=True)
        self.dropout2 = nn.Dropout(config.mlp_dropout_rate)

    def forward(
        self, x: Float[Tensor, "batch groups tokens dim"]
    ) -> Float[Tensor, "batch groups tokens dim"]:
        x = self.dropout1(self.activation(self.fc1(x)))
        return self.dropout2(self.fc2(x))


class GroupDropPath(DropPath):
    """Stochastic depth of each group of tokens by itself."""

    def forward(
        self, x: Float[Tensor, "batch groups tokens dim"]
    ) -> Float[Tensor, "batch groups tokens dim"]:
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class Block(nn.Module):
    """Attention among the regional tokens, then in each window with its own, then the MLP.

    The attention is one, called twice. Pre-norm, with stochastic depth; section 3.
    """

    def __init__(self, config: RegionViTConfig, stage: StageConfig, index: int) -> None:
        super().__init__()
        dim, eps, rate = stage.dim, config.norm_eps, stage.drop_path_rates[index]
        self.window, self.window_size = stage.window, config.window_size
        table = torch.zeros(stage.num_heads, config.offsets)
        self.rel_pos = nn.Parameter(table) if config.rel_pos == "block" else None
        self.region_norm = nn.LayerNorm(dim, eps=eps) if config.region_norm else None
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(config, stage)
        self.drop_path1 = GroupDropPath(rate)
        self.drop_path2 = GroupDropPath(rate)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(config, stage)
        self.drop_path3 = GroupDropPath(rate)

    def forward(
        self,
        x: Float[Tensor, "batch regions tokens dim"],
        bias: Float[Tensor, "heads tokens tokens"] | None = None,
    ) -> Float[Tensor, "batch regions tokens dim"]:
        if self.rel_pos is not None:
            bias = window_bias(self.rel_pos, self.window, self.window_size)
        region_norm = self.norm1 if self.region_norm is None else self.region_norm
        regions = x[:, None, :, 0]  # (batch, 1, regions, dim): one group
        regions = regions + self.drop_path1(self.attn(region_norm(regions)))
        x = torch.cat([regions.transpose(1, 2), x[:, :, 1:]], dim=2)
        x = x + self.drop_path2(self.attn(self.norm1(x), bias))
        x = x + self.drop_path3(self.mlp(self.norm2(x)))
        return x


class Stage(nn.Module):
    """Downsampling, but in the first, and blocks over grids that stay as they are."""

    def __init__(self, config: RegionViTConfig, stage: StageConfig) -> None:
        super().__init__()
        self.config, self.stage = config, stage
        table = torch.zeros(stage.num_heads, config.offsets)
        self.rel_pos = nn.Parameter(table) if config.rel_pos == "stage" else None
        self.downsample = (
            nn.Identity() if stage.in_dim is None else Downsample(config, stage.in_dim, stage.dim)
        )
        self.peg = PEG(config, stage) if stage.has_peg else None
        self.blocks = nn.ModuleList(
            Block(config, stage, i) for i in range(len(stage.drop_path_rates))
        )

    def forward(
        self,
        regions: Float[Tensor, "batch rows columns dim"],
        x: Float[Tensor, "batch height width dim"],
    ) -> tuple[Tensor, Tensor]:
        regions, x = self.downsample(regions), self.downsample(x)
        if self.peg is not None and self.config.peg == "local":
            x = self.peg(x)
        bias = None
        if self.rel_pos is not None:
            bias = window_bias(self.rel_pos, self.stage.window, self.config.window_size)
        x = to_windows(regions, x)
        for i, block in enumerate(self.blocks):
            x = block(x, bias)
            if i == 0 and self.peg is not None and self.config.peg == "both":
                regions, x = from_windows(x, self.stage)
                x = to_windows(self.peg(regions), self.peg(x))
        return from_windows(x, self.stage)


class RegionViT(nn.Module):
    """RegionViT.

    Called with (batch, height, width, channels) images of ``config.image_size``; returns
    (batch, num_classes) logits, or the pooled features where the config has no head.
    """

    def __init__(self, config: RegionViTConfig) -> None:
        super().__init__()
        self.config = config
        dim, classes = config.feature_dim, config.num_classes
        local_embed = ConvStem if config.stem_dims else ConvEmbed
        self.local_embed = local_embed(config)
        self.region_embed = RegionEmbed(config)
        self.dropout = nn.Dropout(config.embed_dropout_rate)
        self.stages = nn.ModuleList(Stage(config, stage) for stage in config.stages)
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps)
        self.head = Linear(dim, classes, bias=True) if classes else nn.Identity()

    def forward(
        self, images: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch features"]:
        self.config.check_images(images.shape)
        x = self.dropout(self.local_embed(images))
        regions = self.region_embed(images)
        for stage in self.stages:
            regions, x = stage(regions, x)  # (batch, rows, columns, dim) both
        regions = regions.flatten(1, 2)  # (batch, regions, dim)
        if self.config.final_norm == "pooled":
            regions = self.norm(regions.mean(dim=1))
        else:
            regions = self.norm(regions).mean(dim=1)
        return self.head(regions)
