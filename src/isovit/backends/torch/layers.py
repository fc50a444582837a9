"""The pre-norm transformer block and what families share around it, in PyTorch.

Source: Vaswani et al. 2017, arXiv:1706.03762; Dosovitskiy et al. 2021, arXiv:2010.11929, eq. 1-4.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from isovit.backends import products
from isovit.spec.blocks import BlockConfig, TransformerConfig


def quick_gelu(x: Tensor) -> Tensor:
    """x·σ(1.702 x); Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": partial(F.gelu, approximate="none"),
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "hardswish": F.hardswish,
}


class Linear(nn.Linear):
    """x·Wᵀ + b, by the library that is fast on this processor; see ``products``."""

    def forward(self, input: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim_out"]:
        return products.linear(input, self.weight, self.bias)


class Conv(nn.Conv2d):
    """A convolution of (batch, height, width, dim): as all modules here, with channels last."""

    def forward(
        self, input: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch rows columns dim_out"]:
        return super().forward(input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class DepthwiseConv(Conv):
    """A convolution of each channel by itself."""

    def __init__(
        self,
        dim: int,
        *,
        kernel_size: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        bias: bool,
    ) -> None:
        super().__init__(dim, dim, kernel_size, stride, padding, groups=dim, bias=bias)


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm over the last axis; Ioffe & Szegedy 2015, arXiv:1502.03167, algorithm 1.

    ``momentum`` is the weight of a new batch in the running statistics, and the running variance is
    that of a sample, n / (n − 1) times the one that normalises the batch.
    """

    def forward(self, input: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
        return super().forward(input.reshape(-1, input.shape[-1])).reshape(input.shape)


def resample(
    x: Float[Tensor, "batch height width dim"], rows: Tensor, columns: Tensor
) -> Float[Tensor, "batch rows columns dim"]:
    """R X Cᵀ: along each axis of a map a matrix; see ``isovit.spec.resample``."""
    x = torch.einsum("rh,bhwd->brwd", rows.to(x), x)
    return torch.einsum("sw,brwd->brsd", columns.to(x), x)


def split_heads(
    x: Float[Tensor, "batch tokens width"], parts: int, num_heads: int
) -> tuple[Float[Tensor, "batch heads tokens head_dim"], ...]:
    """Products side by side, each with its heads side by side, as one array each."""
    return x.unflatten(-1, (parts, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def attention(
    q: Float[Tensor, "batch heads queries dim"],
    k: Float[Tensor, "batch heads tokens dim"],
    v: Float[Tensor, "batch heads tokens dim"],
    scale: float,
    dropout: nn.Dropout,
) -> Float[Tensor, "batch heads queries dim"]:
    """softmax(q·kᵀ · scale)·v, with dropout of the weights; arXiv:1706.03762, eq. 1."""
    if torch.compiler.is_exporting():  # into operators that every runtime has
        return dropout(torch.softmax((q * scale) @ k.mT, dim=-1)) @ v
    # A few rows of weights at a time: they are never whole in memory.
    rate = dropout.p if dropout.training else 0.0
    return products.attention(q, k, v, scale, rate)


class DropPath(nn.Module):
    """Stochastic depth: a sample skips the branch with probability ``rate``; arXiv:1603.09382."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        if not self.training or self.rate == 0.0:
            return x
        keep = x.new_empty(x.shape[0], 1, 1).bernoulli_(1.0 - self.rate)
        return x * keep / (1.0 - self.rate)


class LayerScale(nn.Module):
    """A learned factor per channel; Touvron et al. 2021, arXiv:2103.17239, section 2."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        return x * self.gamma


class Attention(nn.Module):
    """Multi-head self-attention, softmax(q·kᵀ · scale)·v; arXiv:1706.03762, eq. 1."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.scale = config.attn_scale
        self.qkv = Linear(config.dim, 3 * config.inner_dim, bias=config.qkv_bias)
        self.attn_dropout = nn.Dropout(config.attn_dropout_rate)
        self.proj = Linear(config.inner_dim, config.dim, bias=True) if config.attn_proj else None
        self.proj_dropout = nn.Dropout(config.dropout_rate if config.attn_proj else 0.0)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        # each (batch, heads, tokens, head_dim)
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        x = attention(q, k, v, self.scale, self.attn_dropout)
        x = x.transpose(1, 2).flatten(2)  # (batch, tokens, heads * head_dim)
        if self.proj is not None:
            x = self.proj(x)
        return self.proj_dropout(x)


class Mlp(nn.Module):
    """Dense, activation, dense; arXiv:1706.03762, eq. 2."""

    def __init__(self, dim: int, hidden_dim: int, activation: str, dropout_rate: float) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim, bias=True)
        self.activation = ACTIVATIONS[activation]
        self.dropout1 = nn.Dropout(dropout_rate)
        self.fc2 = Linear(hidden_dim, dim, bias=True)
        self.dropout2 = nn.Dropout(dropout_rate)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        x = self.dropout1(self.activation(self.fc1(x)))
        return self.dropout2(self.fc2(x))


class Block(nn.Module):
    """Pre-norm block; arXiv:2010.11929, eq. 2 and 3, with stochastic depth and LayerScale.

    ``attn`` maps (batch, tokens, dim) to the same; None for attention over all tokens. So does
    ``mlp``; None for one product, the activation, another product.
    """

    def __init__(
        self, config: BlockConfig, attn: nn.Module | None = None, mlp: nn.Module | None = None
    ) -> None:
        super().__init__()
        dim, scale = config.dim, config.layer_scale_init
        self.norm1 = nn.LayerNorm(dim, eps=config.norm_eps)
        self.attn = Attention(config) if attn is None else attn
        self.layer_scale1 = nn.Identity() if scale is None else LayerScale(dim, scale)
        self.drop_path1 = DropPath(config.drop_path_rate)
        self.norm2 = nn.LayerNorm(dim, eps=config.norm_eps)
        self.mlp = (
            Mlp(dim, config.mlp_dim, config.activation, config.dropout_rate) if mlp is None else mlp
        )
        self.layer_scale2 = nn.Identity() if scale is None else LayerScale(dim, scale)
        self.drop_path2 = DropPath(config.drop_path_rate)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        x = x + self.drop_path1(self.layer_scale1(self.attn(self.norm1(x))))
        x = x + self.drop_path2(self.layer_scale2(self.mlp(self.norm2(x))))
        return x


def pool(x: Float[Tensor, "batch tokens dim"], config: TransformerConfig) -> Tensor:
    """Tokens to features: (batch, dim), or every token where ``config.pool`` is ``none``."""
    match config.pool:
        case "cls":
            return x[:, 0]
        case "mean":
            return x.mean(dim=1)
        case "mean_patches":
            return x[:, config.prefix_tokens :].mean(dim=1)
        case "none":
            return x
