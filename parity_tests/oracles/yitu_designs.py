"""The official T2T-ViT's designs of convolutional networks as plain PyTorch: a second oracle.

As with ``yitu``, no package has the official code (``models/t2t_vit_se.py``, ``t2t_vit_ghost.py``,
``t2t_vit_dense.py`` of yitu-opensource/T2T-ViT, Clear BSD). This is written from a description of
what it computes and of its keys, not from the models of isovit: the squeeze is a pooling of the
transposed tokens, cheap operations are grouped convolutions, and the list of dense blocks holds
their transitions. Dropout is left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parity_tests.oracles.yitu import EPS, Mlp, TokensToToken, sinusoid

TOKEN_DIM = 64
"""Width inside the stem, which these models are not told."""


def attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Tensor:
    """Multi-head attention of (batch, tokens, dim) each."""
    q, k, v = (x.unflatten(2, (num_heads, -1)) for x in (q, k, v))
    weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * scale).softmax(dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool, qk_scale: float | None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).tensor_split(3, dim=2)
        return self.proj(attend(q, k, v, self.num_heads, self.scale))


class SELayer(nn.Module):
    """Squeeze-and-excitation of the channels of tokens, the first token among them."""

    def __init__(self, channel: int, reduction: int = 16) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(channel, channel // reduction, bias=False),
            nn.ReLU(),
            nn.Linear(channel // reduction, channel, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        channels = x.transpose(1, 2)  # (batch, dim, tokens)
        weights = self.fc(F.adaptive_avg_pool1d(channels, 1).squeeze(2))
        return (channels * weights.unsqueeze(2)).transpose(1, 2)


class SEAttention(Attention):
    """The same with its channels weighed behind the projection."""

    def __init__(self, dim: int, num_heads: int, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        self.se_layer = SELayer(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.se_layer(super().forward(x))


def cheap_operation(dim: int) -> nn.Conv1d:
    """A convolution of each channel by itself, one token wide."""
    return nn.Conv1d(dim, dim, kernel_size=1, groups=dim, bias=False)


def over_tokens(operation: nn.Conv1d, x: Tensor) -> Tensor:
    """A convolution along the tokens of (batch, tokens, dim)."""
    return operation(x.transpose(1, 2)).transpose(1, 2)


class GhostAttention(nn.Module):
    """Attention whose q, k and v are half made, half copied."""

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool, qk_scale: float | None) -> None:
        super().__init__()
        half = dim // 2
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.q = nn.Linear(dim, half, bias=qkv_bias)
        self.k = nn.Linear(dim, half, bias=qkv_bias)
        self.v = nn.Linear(dim, half, bias=qkv_bias)
        self.cheap_operation_q = cheap_operation(half)
        self.cheap_operation_k = cheap_operation(half)
        self.cheap_operation_v = cheap_operation(half)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        q = torch.cat((q, over_tokens(self.cheap_operation_q, q)), dim=2)
        k = torch.cat((k, over_tokens(self.cheap_operation_k, k)), dim=2)
        v = torch.cat((v, over_tokens(self.cheap_operation_v, v)), dim=2)
        return self.proj(attend(q, k, v, self.num_heads, self.scale))


class GhostMlp(nn.Module):
    """Hidden layer of three parts: made, and twice copied and activated again."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, dim)
        self.fc2 = nn.Linear(hidden, dim)
        self.cheap_operation2 = cheap_operation(dim)
        self.cheap_operation3 = cheap_operation(dim)

    def forward(self, x: Tensor) -> Tensor:
        first = F.gelu(self.fc1(x))
        second = F.gelu(over_tokens(self.cheap_operation2, first))
        third = F.gelu(over_tokens(self.cheap_operation3, first))
        return self.fc2(torch.cat((first, second, third), dim=2))


class Block(nn.Module):
    """Pre-norm block of given parts."""

    def __init__(self, dim: int, attn: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class DenseBlock(Block):
    """The same, of whose output ``growth_rate`` channels are put behind what came in."""

    def __init__(self, dim: int, attn: nn.Module, mlp: nn.Module, growth_rate: int) -> None:
        super().__init__(dim, attn, mlp)
        self.dense_linear = nn.Linear(dim, growth_rate)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.dense_linear(super().forward(x))), dim=2)


class Transition(nn.Module):
    """A product and GELU."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.linear(x))


class Backbone(nn.Module):
    """What the three official models have in common around their blocks."""

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        out_dim: int,
        *,
        img_size: int,
        tokens_type: str,
        in_chans: int,
        num_classes: int,
        embed_dim: int,
    ) -> None:
        super().__init__()
        self.tokens_to_token = TokensToToken(tokens_type, in_chans, embed_dim, TOKEN_DIM)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        table = sinusoid((img_size // 16) ** 2 + 1, embed_dim)
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(out_dim, eps=EPS)
        self.head = nn.Linear(out_dim, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens_to_token(x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class T2TViTSE(Backbone):
    """The official constructor's arguments, as far as they have an effect in evaluation mode."""

    def __init__(
        self,
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        **around: Any,
    ) -> None:
        options = dict(qkv_bias=qkv_bias, qk_scale=qk_scale)
        blocks = (
            Block(
                embed_dim,
                SEAttention(embed_dim, num_heads, **options),
                Mlp(embed_dim, int(embed_dim * mlp_ratio)),
            )
            for _ in range(depth)
        )
        super().__init__(blocks, embed_dim, embed_dim=embed_dim, **around)


class T2TViTGhost(Backbone):
    """Likewise; it runs with a ``mlp_ratio`` of 3 alone."""

    def __init__(
        self,
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        **around: Any,
    ) -> None:
        options = dict(qkv_bias=qkv_bias, qk_scale=qk_scale)
        blocks = (
            Block(
                embed_dim,
                GhostAttention(embed_dim, num_heads, **options),
                GhostMlp(embed_dim, int(embed_dim * mlp_ratio)),
            )
            for _ in range(depth)
        )
        super().__init__(blocks, embed_dim, embed_dim=embed_dim, **around)


class T2TViTDense(Backbone):
    """Likewise; ``block_config`` has the number of blocks of each stage."""

    def __init__(
        self,
        *,
        growth_rate: int,
        block_config: tuple[int, ...],
        embed_dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        **around: Any,
    ) -> None:
        options = dict(qkv_bias=qkv_bias, qk_scale=qk_scale)
        blocks: list[nn.Module] = []
        width = embed_dim
        for stage, num_layers in enumerate(block_config):
            if stage > 0:
                blocks.append(Transition(width, width // 2))
                width = width // 2
            for _ in range(num_layers):
                attn = Attention(width, num_heads, **options)
                mlp = Mlp(width, int(width * mlp_ratio))
                blocks.append(DenseBlock(width, attn, mlp, growth_rate))
                width = width + growth_rate
        super().__init__(blocks, width, embed_dim=embed_dim, **around)
