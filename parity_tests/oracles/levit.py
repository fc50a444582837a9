"""The official LeViT as plain PyTorch, with the official state dict: an independent oracle.

The official code is on no package index. This is written from a description of what it computes
and of its keys (facebookresearch/LeViT, Apache-2.0), not from the models of isovit, and keeps what
is odd about it: one list of branches in which blocks and what shrinks the grid follow each other,
offsets numbered as they are first met, their index kept as a buffer, square images of three
channels only. Stochastic depth is left out: evaluation mode is what is compared.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn


class ConvBN(nn.Sequential):
    """``c`` and ``bn``: a convolution that halves the image."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.add_module("c", nn.Conv2d(dim_in, dim_out, 3, 2, 1, bias=False))
        self.add_module("bn", nn.BatchNorm2d(dim_out))


class LinearBN(nn.Module):
    """``c`` and ``bn``: a product over tokens, normed over all tokens of all images."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.c = nn.Linear(dim_in, dim_out, bias=False)
        self.bn = nn.BatchNorm1d(dim_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.c(x).transpose(1, 2)).transpose(1, 2)


class BNLinear(nn.Module):
    """``bn`` and ``l``: a head."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(dim_in)
        self.l = nn.Linear(dim_in, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.l(self.bn(x))


class Residual(nn.Module):
    """``m``: a branch beside a residual."""

    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, x: Tensor) -> Tensor:
        return x + self.m(x)


def numbered_offsets(resolution: int, stride: int) -> tuple[int, Tensor]:
    """How many offsets there are, and which belongs to each query and key."""
    points = list(itertools.product(range(resolution), repeat=2))
    queries = list(itertools.product(range(math.ceil(resolution / stride)), repeat=2))
    numbers: dict[tuple[int, int], int] = {}
    index = []
    for row, column in queries:
        for other in points:
            offset = (abs(row * stride - other[0]), abs(column * stride - other[1]))
            index.append(numbers.setdefault(offset, len(numbers)))
    return len(numbers), torch.tensor(index).view(len(queries), len(points))


class Attention(nn.Module):
    """Self-attention, or with a stride that of every second token in both directions."""

    def __init__(
        self, dim: int, out_dim: int, key_dim: int, heads: int, ratio: int, resolution: int,
        stride: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.key_dim, self.heads, self.d = key_dim, heads, ratio * key_dim
        self.resolution, self.stride = resolution, stride
        if stride == 1:
            self.qkv = LinearBN(dim, heads * (2 * key_dim + self.d))
        else:
            self.kv = LinearBN(dim, heads * (key_dim + self.d))
            self.q = nn.Sequential(nn.Identity(), LinearBN(dim, heads * key_dim))
        self.proj = nn.Sequential(nn.Hardswish(), LinearBN(heads * self.d, out_dim))
        offsets, index = numbered_offsets(resolution, stride)
        self.attention_biases = nn.Parameter(torch.zeros(heads, offsets))
        self.register_buffer("attention_bias_idxs", index)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        if self.stride == 1:
            qkv = self.qkv(x).view(batch, tokens, self.heads, 2 * self.key_dim + self.d)
            q, k, v = qkv.tensor_split([self.key_dim, 2 * self.key_dim], dim=3)
        else:
            kv = self.kv(x).view(batch, tokens, self.heads, self.key_dim + self.d)
            k, v = kv.tensor_split([self.key_dim], dim=3)
            square = x.view(batch, self.resolution, self.resolution, dim)
            asking = square[:, :: self.stride, :: self.stride].reshape(batch, -1, dim)
            q = self.q(asking).view(batch, -1, self.heads, self.key_dim)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(self.key_dim)
        weights = (scores + self.attention_biases[:, self.attention_bias_idxs]).softmax(dim=3)
        return self.proj(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))


def mlp(dim: int, ratio: int) -> Residual:
    """Two products with Hardswish between."""
    hidden = dim * ratio
    return Residual(nn.Sequential(LinearBN(dim, hidden), nn.Hardswish(), LinearBN(hidden, dim)))


class LeViT(nn.Module):
    """The official constructor's arguments, as far as they have an effect in evaluation mode."""

    def __init__(
        self,
        *,
        img_size: int,
        num_classes: int,
        embed_dim: tuple[int, ...],
        key_dim: int,
        depth: tuple[int, ...],
        num_heads: tuple[int, ...],
        attn_ratio: int,
        mlp_ratio: int,
        distillation: bool,
    ) -> None:
        super().__init__()
        self.num_classes, self.distillation = num_classes, distillation
        first, resolution = embed_dim[0], img_size // 16
        dims = (3, first // 8, first // 4, first // 2, first)
        convs = [ConvBN(before, after) for before, after in itertools.pairwise(dims)]
        between = [[conv, nn.Hardswish()] for conv in convs[:-1]]
        self.patch_embed = nn.Sequential(*itertools.chain(*between), convs[-1])
        entries: list[nn.Module] = []
        for stage, (dim, heads) in enumerate(zip(embed_dim, num_heads, strict=True)):
            if stage:
                before = embed_dim[stage - 1]
                asking = before // key_dim
                entries.append(Attention(before, dim, key_dim, asking, 4, resolution, stride=2))
                entries.append(mlp(dim, 2))
                resolution = (resolution - 1) // 2 + 1
            for _ in range(depth[stage]):
                attention = Attention(dim, dim, key_dim, heads, attn_ratio, resolution)
                entries += [Residual(attention), mlp(dim, mlp_ratio)]
        self.blocks = nn.Sequential(*entries)
        self.head = BNLinear(embed_dim[-1], num_classes) if num_classes else nn.Identity()
        if distillation:
            self.head_dist = BNLinear(embed_dim[-1], num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.patch_embed(x).flatten(2).transpose(1, 2)).mean(1)
        if self.distillation:
            return (self.head(x) + self.head_dist(x)) / 2
        return self.head(x)
