"""DeepViT in PyTorch.

Source: Zhou et al. 2021, arXiv:2103.11886, section 4.2; the official code (MIT) and, for LayerNorm
over the heads, vit-pytorch's ``deepvit.py`` (MIT); see the spec for the differences.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from isovit.backends.torch.families.vit import PATCH_EMBEDS
from isovit.backends.torch.layers import (
    BatchNorm,
    Conv,
    Linear,
    pool,
    split_heads,
)
from isovit.backends.torch.layers import Block as PreNormBlock
from isovit.spec.families.deepvit import DeepViTConfig


class ConvsPatchEmbed(nn.Module):
    """Three convolutions, with BatchNorm and ReLU behind the first two; the official S and L."""

    def __init__(self, config: DeepViTConfig) -> None:
        super().__init__()
        dim, (height, width) = config.stem_dim, config.patch_size
        eps, momentum = config.batch_norm_eps, config.batch_norm_momentum
        half = (height // 2, width // 2)  # the first convolution has halved the image
        self.conv1 = Conv(config.in_channels, dim, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = BatchNorm(dim, eps=eps, momentum=momentum)
        self.conv2 = Conv(dim, dim, kernel_size=3, stride=1, padding=1, bias=False)
        self.bn2 = BatchNorm(dim, eps=eps, momentum=momentum)
        self.proj = Conv(dim, config.embed_dim, kernel_size=half, stride=half, padding=0, bias=True)

    def forward(
        self, images: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch tokens dim"]:
        x = F.relu(self.bn1(self.conv1(images)))  # (batch, height / 2, width / 2, stem_dim)
        x = F.relu(self.bn2(self.conv2(x)))
        x = self.proj(x)  # (batch, rows, columns, dim)
        return x.flatten(1, 2)


class ReAttention(nn.Module):
    """norm(softmax(q·kᵀ · scale)·Θ)·v, where Θ mixes the heads; arXiv:2103.11886, eq. 3."""

    def __init__(self, config: DeepViTConfig) -> None:
        super().__init__()
        block, heads = config.block, config.num_heads
        self.num_heads, self.scale = heads, block.attn_scale
        self.mixed_scale = config.re_attention_scale
        self.qkv = Linear(block.dim, 3 * block.inner_dim, bias=block.qkv_bias)
        self.attn_dropout = nn.Dropout(block.attn_dropout_rate)
        self.mix = Linear(heads, heads, bias=config.re_attention_bias)
        self.mix_norm = (
            BatchNorm(heads, eps=config.batch_norm_eps, momentum=config.batch_norm_momentum)
            if config.re_attention_norm == "batch_norm"
            else nn.LayerNorm(heads, eps=config.norm_eps)
        )
        self.proj = Linear(block.inner_dim, block.dim, bias=True) if block.attn_proj else None
        self.proj_dropout = nn.Dropout(block.dropout_rate if block.attn_proj else 0.0)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        # each (batch, heads, tokens, head_dim)
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        weights = self.attn_dropout(torch.softmax((q * self.scale) @ k.mT, dim=-1))
        weights = weights.permute(0, 2, 3, 1)  # (batch, tokens, tokens, heads)
        weights = self.mix_norm(self.mix(weights)) * self.mixed_scale
        x = weights.permute(0, 3, 1, 2) @ v  # (batch, heads, tokens, head_dim)
        x = x.transpose(1, 2).flatten(2)  # (batch, tokens, heads * head_dim)
        if self.proj is not None:
            x = self.proj(x)
        return self.proj_dropout(x)


class Block(PreNormBlock):
    """Pre-norm block with re-attention, or attention, and a scale around each branch."""

    def __init__(self, config: DeepViTConfig, index: int) -> None:
        attn = ReAttention(config) if config.re_attends(index) else None
        super().__init__(config.blocks[index], attn)
        self.branch_scale = config.branch_scale

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        scale = self.branch_scale
        x = x + self.drop_path1(self.layer_scale1(self.attn(self.norm1(x * scale)))) / scale
        x = x + self.drop_path2(self.layer_scale2(self.mlp(self.norm2(x * scale)))) / scale
        return x


class DeepViT(nn.Module):
    """Deep Vision Transformer.

    Called with (batch, height, width, channels) images of ``config.image_size``; returns
    (batch, num_classes) logits, or the pooled features where the config has no head.
    """

    def __init__(self, config: DeepViTConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.embed_dim
        self.patch_embed = (
            ConvsPatchEmbed(config)
            if config.patch_embed == "convs"
            else PATCH_EMBEDS[config.patch_embed](config.stem)
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if config.class_token else None
        self.pos_embed = nn.Parameter(torch.zeros(1, config.tokens, dim))
        self.dropout = nn.Dropout(config.embed_dropout_rate)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.depth))
        has_norm, has_head = config.final_norm != "none", config.num_classes > 0
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps) if has_norm else nn.Identity()
        self.head = Linear(dim, config.num_classes, bias=True) if has_head else nn.Identity()

    def forward(
        self, images: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch ..."]:
        self.config.check_images(images.shape)
        x = self.patch_embed(images)  # (batch, patches, dim)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.dropout(x + self.pos_embed)
        for block in self.blocks:
            x = block(x)
        if self.config.final_norm == "pooled":
            x = self.norm(pool(x, self.config))
        else:
            x = pool(self.norm(x), self.config)
        return self.head(x)
