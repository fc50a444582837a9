"""The official CvT as plain PyTorch, with the official state dict: an independent oracle.

The official code is on no package index. This is written from a description of what it computes
and of its keys (microsoft/CvT, MIT), not from the models of isovit, and keeps what is odd about it:
stages that are attributes and not a list, a scale from the width of all heads, a class token that
goes round the convolutions. Dropout is left out: evaluation mode is what is compared.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

EPS = 1e-5  # of every LayerNorm; BatchNorm has torch's default, the same


class QuickGELU(nn.Module):
    """The approximation of GELU by the logistic function."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-1.702 * x))


class Mlp(nn.Module):
    """Two products with QuickGELU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = QuickGELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def conv_projection(dim: int, kernel: int, padding: int, stride: int) -> nn.Sequential:
    """``conv`` and ``bn``."""
    conv = nn.Conv2d(dim, dim, kernel, stride, padding, groups=dim, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(dim)))


class Attention(nn.Module):
    """q, k and v from convolutions; the class token is put before what they give."""

    def __init__(
        self, dim: int, num_heads: int, qkv_bias: bool, kernel: int, stride_kv: int, has_cls: bool
    ) -> None:
        super().__init__()
        self.num_heads, self.has_cls, self.scale = num_heads, has_cls, dim**-0.5
        padding = (kernel - 1) // 2
        self.conv_proj_q = conv_projection(dim, kernel, padding, stride=1)
        self.conv_proj_k = conv_projection(dim, kernel, padding, stride_kv)
        self.conv_proj_v = conv_projection(dim, kernel, padding, stride_kv)
        self.proj_q = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj_k = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj_v = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        cls, image = torch.tensor_split(x, [int(self.has_cls)], dim=1)
        image = image.mT.reshape(x.shape[0], x.shape[2], h, w)

        def heads(conv: nn.Module, proj: nn.Module) -> Tensor:
            tokens = torch.cat((cls, conv(image).flatten(2).mT), dim=1)
            return proj(tokens).reshape(*tokens.shape[:2], self.num_heads, -1)

        q = heads(self.conv_proj_q, self.proj_q)
        k = heads(self.conv_proj_k, self.proj_k)
        v = heads(self.conv_proj_v, self.proj_v)
        weights = (torch.einsum("blhk,bthk->bhlt", q, k) * self.scale).softmax(dim=-1)
        return self.proj(torch.einsum("bhlt,bthv->blhv", weights, v).flatten(2))


class Block(nn.Module):
    """Pre-norm block."""

    def __init__(self, dim: int, hidden: int, *attention: Any) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = Attention(dim, *attention)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim, hidden)

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        x = x + self.attn(self.norm1(x), h, w)
        return x + self.mlp(self.norm2(x))


class ConvEmbed(nn.Module):
    """A convolution, then LayerNorm over the channels."""

    def __init__(self, in_chans: int, dim: int, size: int, stride: int, padding: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, size, stride, padding)
        self.norm = nn.LayerNorm(dim, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).movedim(1, 3)).movedim(3, 1)


class VisionTransformer(nn.Module):
    """One stage; gives the image of tokens and the class token."""

    def __init__(self, in_chans: int, spec: dict[str, Any]) -> None:
        super().__init__()
        dim, has_cls = spec["DIM_EMBED"], spec["CLS_TOKEN"]
        size, stride, padding = (spec[f"PATCH_{n}"] for n in ("SIZE", "STRIDE", "PADDING"))
        self.patch_embed = ConvEmbed(in_chans, dim, size, stride, padding)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if has_cls else None
        names = ("NUM_HEADS", "QKV_BIAS", "KERNEL_QKV", "STRIDE_KV")
        attention = [spec[name] for name in names]
        self.blocks = nn.ModuleList(
            Block(dim, int(dim * spec["MLP_RATIO"]), *attention, has_cls)
            for _ in range(spec["DEPTH"])
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.patch_embed(x)
        batch, dim, h, w = x.shape
        has_cls = self.cls_token is not None
        tokens = x.flatten(2).mT
        if has_cls:
            tokens = torch.cat((self.cls_token.repeat(batch, 1, 1), tokens), dim=1)
        for block in self.blocks:
            tokens = block(tokens, h, w)
        cls, tokens = torch.tensor_split(tokens, [int(has_cls)], dim=1)
        return tokens.mT.reshape(batch, dim, h, w), cls


class CvT(nn.Module):
    """The official constructor's arguments; ``spec`` has a list with an item for each stage."""

    def __init__(self, *, in_chans: int, num_classes: int, spec: dict[str, list]) -> None:
        super().__init__()
        self.num_stages = len(spec["DIM_EMBED"])
        for i in range(self.num_stages):
            stage = VisionTransformer(in_chans, {name: items[i] for name, items in spec.items()})
            self.add_module(f"stage{i}", stage)
            in_chans = spec["DIM_EMBED"][i]
        self.has_cls = spec["CLS_TOKEN"][-1]
        self.norm = nn.LayerNorm(in_chans, eps=EPS)
        self.head = nn.Linear(in_chans, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.num_stages):
            x, cls = self.get_submodule(f"stage{i}")(x)
        if self.has_cls:
            return self.head(self.norm(cls).squeeze(1))
        return self.head(self.norm(x.flatten(2).mT).mean(dim=1))
