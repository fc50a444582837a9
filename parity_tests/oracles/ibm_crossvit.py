"""The official CrossViT as plain PyTorch, with the official state dict: an independent oracle.

The official code is on no package index. This is written from a description of what it computes
and of its keys (IBM/CrossViT, Apache-2.0), not from the models of isovit. timm has the same model
with tokens and positions under other names. Dropout is left out: evaluation mode is what is
compared.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6  # of every LayerNorm


def conv_stem(patch: int, in_chans: int, dim: int) -> nn.Sequential:
    """What the models marked † have for a convolution of one patch."""
    stride, padding = {12: ((3, 1), (0, 1)), 16: ((2, 2), (1, 1))}[patch]
    return nn.Sequential(
        nn.Conv2d(in_chans, dim // 4, 7, stride=4, padding=3),
        nn.ReLU(),
        nn.Conv2d(dim // 4, dim // 2, 3, stride=stride[0], padding=padding[0]),
        nn.ReLU(),
        nn.Conv2d(dim // 2, dim, 3, stride=stride[1], padding=padding[1]),
    )


class PatchEmbed(nn.Module):
    """Patches to tokens."""

    def __init__(self, patch: int, in_chans: int, dim: int, multi_conv: bool) -> None:
        super().__init__()
        plain = nn.Conv2d(in_chans, dim, patch, stride=patch)
        self.proj = conv_stem(patch, in_chans, dim) if multi_conv else plain

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bdhw->bhwd", self.proj(x)).flatten(1, 2)


class Attention(nn.Module):
    """Self-attention of all tokens of a branch."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attend(*self.qkv(x).chunk(3, dim=-1), self.heads))


class CrossAttention(nn.Module):
    """Attention of the first token over all."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.wq = nn.Linear(dim, dim, bias=qkv_bias)
        self.wk = nn.Linear(dim, dim, bias=qkv_bias)
        self.wv = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attend(self.wq(x[:, :1]), self.wk(x), self.wv(x), self.heads))


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Softmax attention, all (batch, tokens, dim)."""
    q, k, v = (x.reshape(*x.shape[:2], heads, -1) for x in (q, k, v))
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhqk,bkhd->bqhd", weights.softmax(dim=-1), v).flatten(2)


class Mlp(nn.Module):
    """Two products with GELU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm block of one branch."""

    def __init__(self, dim: int, heads: int, hidden: int, qkv_bias: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = Attention(dim, heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class CrossAttentionBlock(nn.Module):
    """Pre-norm, residual on the class token, no MLP."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = CrossAttention(dim, heads, qkv_bias)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1] + self.attn(self.norm1(x))


def projection(dim_in: int, dim_out: int) -> nn.Sequential:
    """Norm, GELU, product."""
    return nn.Sequential(nn.LayerNorm(dim_in, eps=EPS), nn.GELU(), nn.Linear(dim_in, dim_out))


class MultiScaleBlock(nn.Module):
    """A stage: blocks of both branches, then the exchange of class tokens."""

    def __init__(
        self, dims: list[int], depth: list[int], heads: list[int], hidden: list[int], bias: bool
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(*(Block(dims[b], heads[b], hidden[b], bias) for _ in range(depth[b])))
            for b in range(2)
        )
        self.projs = nn.ModuleList(projection(dims[b], dims[1 - b]) for b in range(2))
        self.fusion = nn.ModuleList(
            CrossAttentionBlock(dims[1 - b], heads[1 - b], bias) for b in range(2)
        )
        self.revert_projs = nn.ModuleList(projection(dims[1 - b], dims[b]) for b in range(2))

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        xs = [blocks(x) for blocks, x in zip(self.blocks, xs, strict=True)]
        tokens = [proj(x[:, :1]) for proj, x in zip(self.projs, xs, strict=True)]
        fused = [self.fusion[b](torch.cat((tokens[b], xs[1 - b][:, 1:]), dim=1)) for b in range(2)]
        return [torch.cat((self.revert_projs[b](fused[b]), xs[b][:, 1:]), dim=1) for b in range(2)]


class VisionTransformer(nn.Module):
    """The official constructor's arguments, as far as they have an effect in evaluation mode."""

    def __init__(
        self,
        *,
        img_size: list[int],
        patch_size: list[int],
        in_chans: int,
        num_classes: int,
        embed_dim: list[int],
        depth: list[list[int]],
        num_heads: list[int],
        mlp_ratio: list[float],
        qkv_bias: bool,
        multi_conv: bool = False,
    ) -> None:
        super().__init__()
        self.img_size = img_size
        tokens = [1 + (img_size[b] // patch_size[b]) ** 2 for b in range(2)]
        hidden = [int(embed_dim[b] * mlp_ratio[b]) for b in range(2)]
        self.patch_embed = nn.ModuleList(
            PatchEmbed(patch_size[b], in_chans, embed_dim[b], multi_conv) for b in range(2)
        )
        self.pos_embed = nn.ParameterList(
            nn.Parameter(torch.zeros(1, tokens[b], embed_dim[b])) for b in range(2)
        )
        self.cls_token = nn.ParameterList(
            nn.Parameter(torch.zeros(1, 1, embed_dim[b])) for b in range(2)
        )
        self.blocks = nn.ModuleList(
            MultiScaleBlock(embed_dim, of_stage, num_heads, hidden, qkv_bias) for of_stage in depth
        )
        self.norm = nn.ModuleList(nn.LayerNorm(dim, eps=EPS) for dim in embed_dim)
        self.head = nn.ModuleList(nn.Linear(dim, num_classes) for dim in embed_dim)

    def embed(self, x: Tensor, b: int) -> Tensor:
        """Tokens of one branch, from the image at its own size."""
        side = self.img_size[b]
        if x.shape[2] != side:
            x = F.interpolate(x, size=(side, side), mode="bicubic", align_corners=False)
        x = self.patch_embed[b](x)
        return torch.cat((self.cls_token[b].expand(len(x), -1, -1), x), dim=1) + self.pos_embed[b]

    def forward(self, x: Tensor) -> Tensor:
        xs = [self.embed(x, b) for b in range(2)]
        for block in self.blocks:
            xs = block(xs)
        logits = [self.head[b](self.norm[b](xs[b])[:, 0]) for b in range(2)]
        return torch.stack(logits).mean(dim=0)
