"""The official DeepViT as plain PyTorch, with the official state dict: an independent oracle.

The official code is on no package index. This is written from a description of what it computes
and of its keys (zhoudaquan/dvit_repo, MIT), not from the models of isovit, and keeps what is odd
about it: heads mixed by a convolution of one pixel, attention weights through a BatchNorm, a scale
before the norms that is taken back behind the branches. Dropout and stochastic depth are left out:
evaluation mode is what is compared.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6  # of every LayerNorm; BatchNorms have torch's default, 1e-5


class Attention(nn.Module):
    """Self-attention whose weights are mixed and normalised where ``mixes``."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool,
        qk_scale: float | None,
        mixes: bool,
        transform_scale: bool,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.mixes, self.reatten_scale = mixes, self.scale if transform_scale else 1.0
        if mixes:
            self.reatten_matrix = nn.Conv2d(num_heads, num_heads, kernel_size=1)
            self.var_norm = nn.BatchNorm2d(num_heads)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.unbind(dim=2)
        weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * self.scale).softmax(dim=-1)
        if self.mixes:
            weights = self.var_norm(self.reatten_matrix(weights)) * self.reatten_scale
        x = torch.einsum("bhqk,bkhd->bqhd", weights, v)
        return self.proj(x.reshape(batch, tokens, dim))


class Mlp(nn.Module):
    """Two products with GELU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm block; its norms see the tokens times ``adjust_ratio``."""

    def __init__(self, dim: int, hidden: int, adjust_ratio: float, attn: Attention) -> None:
        super().__init__()
        self.adjust_ratio = adjust_ratio
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x * self.adjust_ratio)) / self.adjust_ratio
        return x + self.mlp(self.norm2(x * self.adjust_ratio)) / self.adjust_ratio


class PatchEmbed(nn.Module):
    """A convolution of disjoint patches; behind two others of width 64 with ``convs``."""

    def __init__(
        self, patch_size: int | tuple[int, int], in_chans: int, embed_dim: int, convs: bool
    ) -> None:
        super().__init__()
        self.convs = convs
        if convs:
            assert isinstance(patch_size, int)
            patch_size //= 2
            self.conv1 = nn.Conv2d(in_chans, 64, 7, stride=2, padding=3, bias=False)
            self.bn1 = nn.BatchNorm2d(64)
            self.conv2 = nn.Conv2d(64, 64, 3, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(64)
            in_chans = 64
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        if self.convs:
            x = self.bn1(self.conv1(x)).relu()
            x = self.bn2(self.conv2(x)).relu()
        return self.proj(x).flatten(2).transpose(1, 2)


class DeepVisionTransformer(nn.Module):
    """The official constructor's arguments, as far as they have an effect in evaluation mode."""

    def __init__(
        self,
        *,
        img_size: tuple[int, int],
        patch_size: int | tuple[int, int],
        in_chans: int,
        num_classes: int,
        embed_dim: int,
        apply_transform: list[bool],
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        qk_scale: float | None = None,
        use_cnn_embed: bool = False,
        transform_scale: bool = False,
        scale_adjustment: float = 1.0,
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim, use_cnn_embed)
        sides = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
        num_patches = (img_size[0] // sides[0]) * (img_size[1] // sides[1])
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, num_patches + 1, embed_dim))
        hidden = int(embed_dim * mlp_ratio)
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                hidden,
                scale_adjustment,
                Attention(embed_dim, num_heads, qkv_bias, qk_scale, mixes, transform_scale),
            )
            for mixes in apply_transform
        )
        self.norm = nn.LayerNorm(embed_dim, eps=EPS)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])
