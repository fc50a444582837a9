"""CvT in PyTorch.

Source: Wu et al. 2021, arXiv:2103.15808, section 3; the official code (MIT), transformers'
(Apache-2.0) and, for the other form, vit-pytorch's ``cvt.py`` (MIT); see the spec.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from isovit.backends.torch.layers import (
    BatchNorm,
    Block,
    Conv,
    DepthwiseConv,
    Linear,
    attention,
    split_heads,
)
from isovit.spec.blocks import BlockConfig
from isovit.spec.families.cvt import CvTConfig, StageConfig


def fix_bias(layer: Linear | BatchNorm) -> None:
    """Leave the bias of a layer out of training."""
    layer.bias.requires_grad_(False)


class ConvEmbed(nn.Module):
    """Overlapping patches to tokens: a convolution, then LayerNorm; section 3.1."""

    def __init__(self, config: CvTConfig, stage: StageConfig) -> None:
        super().__init__()
        self.in_grid = stage.in_grid
        self.proj = Conv(
            stage.in_dim,
            stage.dim,
            kernel_size=stage.patch_size,
            stride=stage.patch_stride,
            padding=stage.patch_padding,
            bias=True,
        )
        self.norm = nn.LayerNorm(stage.dim, eps=config.norm_eps)

    def forward(
        self, x: Float[Tensor, "batch tokens_in dim_in"]
    ) -> Float[Tensor, "batch tokens dim"]:
        x = self.proj(x.unflatten(1, self.in_grid))  # (batch, rows, columns, dim)
        return self.norm(x.flatten(1, 2))


class ConvProjection(nn.Module):
    """Convolution of each channel by itself, BatchNorm, then a product; section 3.2, eq. 2.

    With a stride it gives fewer tokens. A class token comes to the product as it is.
    """

    def __init__(
        self, config: CvTConfig, stage: StageConfig, width: int, stride: int, *, of_keys: bool
    ) -> None:
        super().__init__()
        dim, side = stage.dim, stage.kernel_size
        self.grid, self.class_token = stage.grid, stage.class_token
        self.conv = DepthwiseConv(
            dim,
            kernel_size=(side, side),
            stride=(stride, stride),
            padding=(side // 2, side // 2),
            bias=False,
        )
        self.norm = BatchNorm(dim, eps=config.batch_norm_eps, momentum=config.batch_norm_momentum)
        self.proj = Linear(dim, width, bias=config.qkv_bias)
        if of_keys and config.qkv_bias:  # no softmax sees what all keys have in common
            fix_bias(self.proj)
        if of_keys and not stage.class_token:
            fix_bias(self.norm)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "batch tokens_out width"]:
        image = x[:, self.class_token :].unflatten(1, self.grid)  # (batch, rows, columns, dim)
        y = self.norm(self.conv(image)).flatten(1, 2)  # (batch, tokens_out, dim)
        if self.class_token:
            y = torch.cat([x[:, :1], y], dim=1)
        return self.proj(y)


class Attention(nn.Module):
    """Attention whose q, k and v are projected by convolutions; section 3.2."""

    def __init__(self, config: CvTConfig, stage: StageConfig, block: BlockConfig) -> None:
        super().__init__()
        inner = block.inner_dim
        self.num_heads, self.scale, stride = block.num_heads, block.attn_scale, stage.kv_stride
        self.one_conv = config.kv_convs == "one"
        self.q = ConvProjection(config, stage, inner, 1, of_keys=False)
        if self.one_conv:
            self.kv = ConvProjection(config, stage, 2 * inner, stride, of_keys=False)
        else:
            self.k = ConvProjection(config, stage, inner, stride, of_keys=True)
            self.v = ConvProjection(config, stage, inner, stride, of_keys=False)
        self.attn_dropout = nn.Dropout(block.attn_dropout_rate)
        self.proj = Linear(inner, stage.dim, bias=True)
        self.proj_dropout = nn.Dropout(block.dropout_rate)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        (q,) = split_heads(self.q(x), 1, self.num_heads)  # (batch, heads, tokens, head_dim)
        if self.one_conv:
            k, v = split_heads(self.kv(x), 2, self.num_heads)  # each (batch, heads, keys, head_dim)
        else:
            (k,) = split_heads(self.k(x), 1, self.num_heads)
            (v,) = split_heads(self.v(x), 1, self.num_heads)
        x = attention(q, k, v, self.scale, self.attn_dropout)
        x = x.transpose(1, 2).flatten(2)  # (batch, tokens, heads * head_dim)
        return self.proj_dropout(self.proj(x))


class Stage(nn.Module):
    """Embedding, class token and blocks."""

    def __init__(self, config: CvTConfig, stage: StageConfig) -> None:
        super().__init__()
        self.patch_embed = ConvEmbed(config, stage)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, stage.dim)) if stage.class_token else None
        self.dropout = nn.Dropout(config.embed_dropout_rate)
        self.blocks = nn.ModuleList(
            Block(block, Attention(config, stage, block)) for block in stage.blocks
        )

    def forward(
        self, x: Float[Tensor, "batch tokens_in dim_in"]
    ) -> Float[Tensor, "batch tokens dim"]:
        x = self.patch_embed(x)  # (batch, rows * columns, dim)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        return x


class CvT(nn.Module):
    """Convolutional vision transformer.

    Called with (batch, height, width, channels) images of ``config.image_size``; returns
    (batch, num_classes) logits, or the pooled features where the config has no head.
    """

    def __init__(self, config: CvTConfig) -> None:
        super().__init__()
        self.config = config
        dim, classes, has_norm = config.feature_dim, config.num_classes, config.final_norm != "none"
        self.stages = nn.ModuleList(Stage(config, stage) for stage in config.stages)
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps) if has_norm else nn.Identity()
        self.head = Linear(dim, classes, bias=True) if classes > 0 else nn.Identity()

    def forward(
        self, images: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch ..."]:
        self.config.check_images(images.shape)
        x = images.flatten(1, 2)  # (batch, pixels, channels)
        for stage in self.stages:
            x = stage(x)  # (batch, tokens, dim)
        x = self.norm(x)
        match self.config.pool:
            case "cls":
                x = x[:, 0]
            case "mean":
                x = x.mean(dim=1)
        return self.head(x)
