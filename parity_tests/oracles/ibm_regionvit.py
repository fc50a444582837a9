"""The official RegionViT as plain PyTorch, with the official state dict: an independent oracle.

The official code is on no package index. This follows what it computes and its keys
(IBM/RegionViT, Apache-2.0), not the models of isovit, and keeps what is odd about it: a convolution
under two names, a table of biases that is read with a wrap-around, windows that lie along the
batch. Dropout, masks for windows that lack tokens, and what detection adds are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6  # of the LayerNorms over tokens
EPS_2D = 1e-5  # of those over the channels of an image


class LayerNorm2d(nn.Module):
    """LayerNorm over the channels of (batch, channels, height, width)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, dim=1, correction=0, keepdim=True)
        return (x - mean) / torch.sqrt(variance + EPS_2D) * self.weight + self.bias


class PatchEmbed(nn.Module):
    """Pixels to a grid of tokens, by one of three kinds of convolution."""

    def __init__(self, patch_size: int, in_chans: int, dim: int, kind: str) -> None:
        super().__init__()
        if kind == "3conv":
            self.proj: nn.Module = nn.Sequential(
                nn.Conv2d(in_chans, dim // 4, 3, 2, 1), LayerNorm2d(dim // 4), nn.GELU(),
                nn.Conv2d(dim // 4, dim // 2, 3, 2, 1), LayerNorm2d(dim // 2), nn.GELU(),
                nn.Conv2d(dim // 2, dim, 3, 1, 1),
            )  # fmt: skip
        elif kind == "1conv":
            self.proj = nn.Conv2d(in_chans, dim, 2 * patch_size, patch_size, patch_size - 1)
        else:
            self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class AttentionWithRelPos(nn.Module):
    """Multi-head attention; with ``patch_attn``, biases for all tokens but the first."""

    def __init__(
        self, dim: int, num_heads: int, size: int, qkv_bias: bool, qk_scale: float | None
    ) -> None:
        super().__init__()
        self.num_heads, self.size = num_heads, size
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.rel_pos = nn.Parameter(torch.zeros(num_heads, (2 * size - 1) ** 2))

    def biases(self) -> Tensor:
        """(heads, tokens, tokens), read with indices below zero where the key comes before."""
        n, half = 2 * self.size - 1, self.size // 2
        table = self.rel_pos.reshape(self.num_heads, n, n)
        places = [(y, x) for y in range(self.size) for x in range(self.size)]
        rows = [
            torch.stack([table[:, v - y + half, u - x + half] for v, u in places], dim=1)
            for y, x in places
        ]
        return torch.stack(rows, dim=1)

    def forward(self, x: Tensor, patch_attn: bool = False) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.unbind(dim=2)
        logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * self.scale
        if patch_attn:
            inside = logits[:, :, 1:, 1:] + self.biases()
            below = torch.cat([logits[:, :, 1:, :1], inside], dim=3)
            logits = torch.cat([logits[:, :, :1], below], dim=2)
        x = torch.einsum("bhqk,bkhd->bqhd", logits.softmax(dim=-1), v)
        return self.proj(x.reshape(batch, tokens, dim))


class Mlp(nn.Module):
    """Two products with GELU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class R2LAttentionPlusFFN(nn.Module):
    """A block over (batch * regions, 1 + window, dim), the regional token first."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        size: int,
        mlp_ratio: float,
        qkv_bias: bool,
        qk_scale: float | None,
    ) -> None:
        super().__init__()
        self.norm0 = nn.LayerNorm(dim, eps=EPS)
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = AttentionWithRelPos(dim, num_heads, size, qkv_bias, qk_scale)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, batch: int) -> Tensor:
        cls = x[:, 0].reshape(batch, -1, x.shape[-1])
        cls = cls + self.attn(self.norm0(cls))
        x = torch.cat([cls.flatten(0, 1)[:, None], x[:, 1:]], dim=1)
        x = x + self.attn(self.norm1(x), patch_attn=True)
        return x + self.mlp(self.norm2(x))


class Projection(nn.Module):
    """What both grids go through before the blocks: ``c`` changes channels, ``s`` halves sides."""

    def __init__(self, dim_in: int, dim: int, mode: str) -> None:
        super().__init__()
        kernel, stride, padding = (3, 2, 1) if "s" in mode else (1, 1, 0)
        if dim_in == dim and kernel == 1:
            self.proj = nn.Sequential(nn.Identity())
        else:
            self.proj = nn.Sequential(
                LayerNorm2d(dim_in),
                nn.GELU(),
                nn.Conv2d(dim_in, dim, kernel, stride, padding, groups=dim_in),
            )
        self.proj_cls = self.proj
        self.register_state_dict_post_hook(unshared)

    def forward(self, cls: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.proj_cls(cls), self.proj(x)


def unshared(_: nn.Module, state: dict[str, Tensor], prefix: str, __: Any) -> None:
    """Copies in place of what the second name shares: safetensors keeps no tensor twice."""
    for name in list(state):
        if name.startswith(f"{prefix}proj_cls."):
            state[name] = state[name].clone()


class ConvAttBlock(nn.Module):
    """A stage: the projection is the first entry of ``block``."""

    def __init__(self, dim_in: int, dim: int, depth: int, mode: str, peg: bool, **sizes: Any):
        super().__init__()
        self.block = nn.ModuleList([Projection(dim_in, dim, mode)])
        self.block.extend(R2LAttentionPlusFFN(dim, **sizes) for _ in range(depth))
        self.peg = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False) if peg else None

    def forward(self, cls: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        projection, *blocks = self.block
        cls, x = projection(cls, x)
        grids, tokens = (cls.shape, x.shape), flattened(cls, x)
        for i, block in enumerate(blocks):
            tokens = block(tokens, len(cls))
            if i == 0 and self.peg is not None:
                cls, x = spatial(tokens, *grids)
                tokens = flattened(cls + self.peg(cls), x + self.peg(x))
        return spatial(tokens, *grids)


def flattened(cls: Tensor, x: Tensor) -> Tensor:
    """Two images as (batch * regions, 1 + window, dim)."""
    height, width = x.shape[2] // cls.shape[2], x.shape[3] // cls.shape[3]
    windows = F.unfold(x, (height, width), stride=(height, width))
    windows = windows.unflatten(1, (x.shape[1], height * width)).permute(0, 3, 2, 1)
    return torch.cat([cls.flatten(2).mT.flatten(0, 1)[:, None], windows.flatten(0, 1)], dim=1)


def spatial(tokens: Tensor, cls: Sequence[int], x: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The two images of ``flattened``, by their shapes."""
    batch, dim, height, width = x
    window = (height // cls[2], width // cls[3])
    tokens = tokens.unflatten(0, (batch, -1))
    columns = tokens[:, :, 1:].permute(0, 3, 2, 1).flatten(1, 2)
    regions = tokens[:, :, 0].mT.reshape(batch, dim, cls[2], cls[3])
    return regions, F.fold(columns, (height, width), window, stride=window)


class RegionViT(nn.Module):
    """The official constructor's arguments, as far as they have an effect in evaluation mode."""

    def __init__(
        self,
        *,
        patch_size: int,
        in_chans: int,
        num_classes: int,
        embed_dim: Sequence[int],
        depth: Sequence[int],
        num_heads: Sequence[int],
        kernel_sizes: Sequence[int],
        downsampling: Sequence[str],
        patch_conv_type: str,
        mlp_ratio: float | Sequence[float] = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        peg: bool = False,
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim[0], patch_conv_type)
        self.cls_token = PatchEmbed(patch_size * kernel_sizes[0], in_chans, embed_dim[0], "linear")
        ratios = [mlp_ratio] * len(depth) if isinstance(mlp_ratio, float) else mlp_ratio
        self.layers = nn.ModuleList(
            ConvAttBlock(
                embed_dim[i], embed_dim[i + 1], depth[i], downsampling[i], peg,
                num_heads=num_heads[i], size=kernel_sizes[i], mlp_ratio=ratios[i],
                qkv_bias=qkv_bias, qk_scale=qk_scale,
            )
            for i in range(len(depth))
        )  # fmt: skip
        self.norm = nn.LayerNorm(embed_dim[-1], eps=EPS)
        self.head = nn.Linear(embed_dim[-1], num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        cls, x = self.cls_token(x), self.patch_embed(x)
        for layer in self.layers:
            cls, x = layer(cls, x)
        return self.head(self.norm(cls.flatten(2).mT).mean(dim=1))
