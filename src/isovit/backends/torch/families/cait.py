"""CaiT in PyTorch.

Source: Touvron et al. 2021, arXiv:2103.17239, sections 2 and 3; both dialects, see the spec. Heads
that talk: Shazeer et al. 2020, arXiv:2003.02436.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from isovit.backends.torch.families.vit import PATCH_EMBEDS
from isovit.backends.torch.layers import (
    Block,
    LayerScale,
    Linear,
    Mlp,
    attention,
    split_heads,
)
from isovit.spec.families.cait import CaiTConfig


class MixHeads(nn.Linear):
    """A product over the heads, for each query and key by itself.

    It is written as the convolution of one pixel, to which the heads are channels, so that no
    (queries, keys) array is transposed.
    """

    def __init__(self, config: CaiTConfig, *, bias_trains: bool) -> None:
        super().__init__(config.num_heads, config.num_heads, bias=config.talking_heads_bias)
        if config.talking_heads_bias:
            self.bias.requires_grad_(bias_trains)

    def forward(
        self, input: Float[Tensor, "batch heads queries keys"]
    ) -> Float[Tensor, "batch heads queries keys"]:
        return F.conv2d(input, self.weight[:, :, None, None], self.bias)


class TalkingHeads(nn.Module):
    """mix(softmax(mix(q·kᵀ · scale)))·v, each mix over the heads; arXiv:2003.02436.

    The softmax does not see the first mix's bias, which therefore does not train.
    """

    def __init__(self, config: CaiTConfig, dropout_rate: float) -> None:
        super().__init__()
        self.scale, self.mixed_dropout = config.attn_scale, config.mixed_dropout
        self.proj_l = MixHeads(config, bias_trains=False)
        self.proj_w = MixHeads(config, bias_trains=True)
        self.dropout = nn.Dropout(dropout_rate)

    def forward(
        self,
        q: Float[Tensor, "batch heads queries dim"],
        k: Float[Tensor, "batch heads keys dim"],
        v: Float[Tensor, "batch heads keys dim"],
    ) -> Float[Tensor, "batch heads queries dim"]:
        logits = self.proj_l((q * self.scale) @ k.mT)
        weights = torch.softmax(logits, dim=-1)
        if self.mixed_dropout:
            weights = self.dropout(self.proj_w(weights))
        else:
            weights = self.proj_w(self.dropout(weights))
        return weights @ v


class Attention(nn.Module):
    """Self-attention of the patches, whose heads talk; section 2."""

    def __init__(self, config: CaiTConfig) -> None:
        super().__init__()
        dim, inner = config.embed_dim, config.inner_dim
        self.num_heads = config.num_heads
        self.qkv = Linear(dim, 3 * inner, bias=config.qkv_bias)
        self.talking_heads = TalkingHeads(config, config.attn_dropout_rate)
        self.proj = Linear(inner, dim, bias=True)
        self.proj_dropout = nn.Dropout(config.dropout_rate)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        # each (batch, heads, tokens, head_dim)
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        x = self.talking_heads(q, k, v)
        x = x.transpose(1, 2).flatten(2)  # (batch, tokens, heads * head_dim)
        return self.proj_dropout(self.proj(x))


class ClassAttention(nn.Module):
    """Attention of the class token, the first, to all tokens; section 3."""

    def __init__(self, config: CaiTConfig) -> None:
        super().__init__()
        dim, inner, rate = config.embed_dim, config.inner_dim, config.cls_attn_dropout_rate
        self.num_heads, self.scale = config.num_heads, config.attn_scale
        self.q = Linear(dim, inner, bias=config.qkv_bias)
        self.kv = Linear(dim, 2 * inner, bias=config.qkv_bias)
        self.talking_heads = TalkingHeads(config, rate) if config.cls_talking_heads else None
        self.attn_dropout = nn.Dropout(rate)
        self.proj = Linear(inner, dim, bias=True)
        self.proj_dropout = nn.Dropout(config.cls_dropout_rate)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch 1 dim"]:
        (q,) = split_heads(self.q(x[:, :1]), 1, self.num_heads)  # (batch, heads, 1, head_dim)
        k, v = split_heads(self.kv(x), 2, self.num_heads)  # each (batch, heads, tokens, head_dim)
        if self.talking_heads is None:
            x = attention(q, k, v, self.scale, self.attn_dropout)
        else:
            x = self.talking_heads(q, k, v)
        x = x.transpose(1, 2).flatten(2)  # (batch, 1, heads * head_dim)
        return self.proj_dropout(self.proj(x))


class ClassBlock(nn.Module):
    """Block over the class token, which looks at patches that stay as they are; section 3."""

    def __init__(self, config: CaiTConfig, index: int) -> None:
        super().__init__()
        dim, eps, gamma = config.embed_dim, config.norm_eps, config.layer_scale_start(index)
        self.cls_norm = config.cls_norm
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = ClassAttention(config)
        self.layer_scale1 = LayerScale(dim, gamma)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, config.cls_mlp_width, config.activation, config.cls_dropout_rate)
        self.layer_scale2 = LayerScale(dim, gamma)

    def forward(
        self, cls: Float[Tensor, "batch 1 dim"], x: Float[Tensor, "batch patches dim"]
    ) -> Float[Tensor, "batch 1 dim"]:
        if self.cls_norm == "tokens":
            u = self.norm1(torch.cat([cls, x], dim=1))
        else:
            u = torch.cat([self.norm1(cls), x], dim=1)
        cls = cls + self.layer_scale1(self.attn(u))
        cls = cls + self.layer_scale2(self.mlp(self.norm2(cls)))
        return cls


class CaiT(nn.Module):
    """Class-Attention in Image Transformers.

    Called with (batch, height, width, channels) images of ``config.image_size``; returns
    (batch, num_classes) logits, or the pooled features where the config has no head.
    """

    def __init__(self, config: CaiTConfig) -> None:
        super().__init__()
        self.config = config
        dim, classes = config.embed_dim, config.num_classes
        self.patch_embed = PATCH_EMBEDS[config.patch_embed](config.stem)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.patches, dim))
        self.dropout = nn.Dropout(config.embed_dropout_rate)
        self.blocks = nn.ModuleList(Block(block, Attention(config)) for block in config.blocks)
        self.cls_blocks = nn.ModuleList(ClassBlock(config, i) for i in range(config.cls_depth))
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps)
        self.head = Linear(dim, classes, bias=True) if classes else nn.Identity()

    def forward(
        self, images: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch ..."]:
        self.config.check_images(images.shape)
        x = self.dropout(self.patch_embed(images) + self.pos_embed)  # (batch, patches, dim)
        for block in self.blocks:
            x = block(x)
        cls = self.cls_token.expand(x.shape[0], -1, -1)
        for block in self.cls_blocks:
            cls = block(cls, x)
        x = self.norm(torch.cat([cls, x], dim=1))
        match self.config.pool:
            case "cls":
                x = x[:, 0]
            case "mean":
                x = x.mean(dim=1)
            case "mean_patches":
                x = x[:, 1:].mean(dim=1)
            case "none":
                pass
        return self.head(x)
