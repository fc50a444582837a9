"""The official T2T-ViT as plain PyTorch, with the official state dict: an independent oracle.

The official code is on no package index. This is written from a description of what it computes
and of its keys (yitu-opensource/T2T-ViT, Clear BSD), not from the models of isovit, and keeps what
is odd about it: k before q in the performer, a residual that is v, a scale from the width of the
input, square images only. Dropout is left out: evaluation mode is what is compared.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-5  # of every LayerNorm: torch's default, not timm's 1e-6


class TokenPerformer(nn.Module):
    """Linear attention of one head; from ``dim_in`` to ``dim``."""

    def __init__(self, dim_in: int, dim: int) -> None:
        super().__init__()
        features = int(dim * 0.5)
        self.kqv = nn.Linear(dim_in, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm1 = nn.LayerNorm(dim_in, eps=EPS)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
        rows = nn.init.orthogonal_(torch.empty(features, dim)) * math.sqrt(features)
        self.w = nn.Parameter(rows, requires_grad=False)

    def prm_exp(self, x: Tensor) -> Tensor:
        wtx = torch.einsum("bti,mi->btm", x, self.w)
        return torch.exp(wtx - (x * x).sum(dim=-1, keepdim=True) / 2) / math.sqrt(len(self.w))

    def forward(self, x: Tensor) -> Tensor:
        k, q, v = torch.split(self.kqv(self.norm1(x)), self.proj.in_features, dim=-1)
        kp, qp = self.prm_exp(k), self.prm_exp(q)
        d = torch.einsum("bti,bi->bt", qp, kp.sum(dim=1)).unsqueeze(dim=2)
        kptv = torch.einsum("bin,bim->bnm", v, kp)
        y = torch.einsum("bti,bni->btn", qp, kptv) / (d + 1e-8)
        y = v + self.proj(y)
        return y + self.mlp(self.norm2(y))


class TokenAttention(nn.Module):
    """Softmax attention of one head; its scale is that of the width that comes in."""

    def __init__(self, dim_in: int, dim: int) -> None:
        super().__init__()
        self.scale = dim_in**-0.5
        self.qkv = nn.Linear(dim_in, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = torch.tensor_split(self.qkv(x), 3, dim=2)
        weights = torch.einsum("bqd,bkd->bqk", q * self.scale, k).softmax(dim=-1)
        return v + self.proj(torch.einsum("bqk,bkd->bqd", weights, v))


class Mlp(nn.Module):
    """Two products with GELU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class TokenTransformer(nn.Module):
    """Attention from ``dim_in`` to ``dim``, then an MLP of ratio 1."""

    def __init__(self, dim_in: int, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim_in, eps=EPS)
        self.attn = TokenAttention(dim_in, dim)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TokensToToken(nn.Module):
    """Three unfoldings, a token module after each of the first two."""

    def __init__(self, tokens_type: str, in_chans: int, embed_dim: int, token_dim: int) -> None:
        super().__init__()
        module = {"performer": TokenPerformer, "transformer": TokenTransformer}[tokens_type]
        self.soft_split0 = nn.Unfold(kernel_size=7, stride=4, padding=2)
        self.soft_split1 = nn.Unfold(kernel_size=3, stride=2, padding=1)
        self.soft_split2 = nn.Unfold(kernel_size=3, stride=2, padding=1)
        self.attention1 = module(in_chans * 49, token_dim)
        self.attention2 = module(token_dim * 9, token_dim)
        self.project = nn.Linear(token_dim * 9, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention1(self.soft_split0(x).transpose(1, 2))
        x = self.attention2(self.soft_split1(as_square(x)).transpose(1, 2))
        return self.project(self.soft_split2(as_square(x)).transpose(1, 2))


def as_square(x: Tensor) -> Tensor:
    """(batch, tokens, dim) as (batch, dim, √tokens, √tokens)."""
    batch, tokens, dim = x.shape
    side = math.isqrt(tokens)
    return x.transpose(1, 2).reshape(batch, dim, side, side)


class Attention(nn.Module):
    """Multi-head self-attention of the backbone."""

    def __init__(self, dim: int, num_heads: int, qk_scale: float | None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.unbind(dim=2)
        weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * self.scale).softmax(dim=-1)
        x = torch.einsum("bhqk,bkhd->bqhd", weights, v)
        return self.proj(x.reshape(batch, tokens, dim))


class Block(nn.Module):
    """Pre-norm block of the backbone."""

    def __init__(self, dim: int, num_heads: int, hidden: int, qk_scale: float | None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = Attention(dim, num_heads, qk_scale)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class T2TViT(nn.Module):
    """The official constructor's arguments, as far as they have an effect in evaluation mode."""

    def __init__(
        self,
        *,
        img_size: int,
        tokens_type: str,
        in_chans: int,
        num_classes: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        token_dim: int,
        qk_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.tokens_to_token = TokensToToken(tokens_type, in_chans, embed_dim, token_dim)
        num_patches = (img_size // 16) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        table = sinusoid(num_patches + 1, embed_dim)
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        hidden = int(embed_dim * mlp_ratio)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, hidden, qk_scale) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=EPS)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens_to_token(x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def sinusoid(positions: int, dim: int) -> Tensor:
    """The fixed table (1, positions, dim): even columns sine, odd ones cosine; float64 inside."""
    table = torch.empty(1, positions, dim)
    for position in range(positions):
        for column in range(dim):
            angle = position / 10000 ** (2 * (column // 2) / dim)
            table[0, position, column] = math.cos(angle) if column % 2 else math.sin(angle)
    return table
