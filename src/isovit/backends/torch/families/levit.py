"""LeViT in PyTorch.

Source: Graham et al. 2021, arXiv:2104.01136, section 4; the official code (Apache-2.0), and
vit-pytorch's ``levit.py`` (MIT) for the other form; see the spec for the differences.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from isovit.backends.torch.layers import ACTIVATIONS, BatchNorm, Conv, DropPath, Linear
from isovit.spec.config import require
from isovit.spec.families.levit import AttentionConfig, LeViTConfig, StageConfig

hardswish = ACTIVATIONS["hardswish"]


class ConvNorm(nn.Module):
    """A convolution of kernel 3 and stride 2, then BatchNorm."""

    def __init__(self, config: LeViTConfig, dim: int, out_dim: int) -> None:
        super().__init__()
        self.conv = Conv(dim, out_dim, kernel_size=3, stride=2, padding=1, bias=False)
        self.norm = batch_norm(config, out_dim)

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch rows columns dim_out"]:
        return self.norm(self.conv(x))


class LinearNorm(nn.Module):
    """A product, then BatchNorm over all tokens of all images; section 4.2."""

    def __init__(self, config: LeViTConfig, dim: int, out_dim: int, *, bias: bool) -> None:
        super().__init__()
        self.linear = Linear(dim, out_dim, bias=bias)
        self.norm = batch_norm(config, out_dim)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens out"]:
        return self.norm(self.linear(x))


class NormLinear(nn.Module):
    """BatchNorm over the images, then a product: a head."""

    def __init__(self, config: LeViTConfig, dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm = batch_norm(config, dim)
        self.linear = Linear(dim, out_dim, bias=True)

    def forward(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch classes"]:
        return self.linear(self.norm(x))


def batch_norm(config: LeViTConfig, dim: int) -> BatchNorm:
    """BatchNorm with the numbers of a config."""
    return BatchNorm(dim, eps=config.batch_norm_eps, momentum=config.batch_norm_momentum)


def linear_norm(config: LeViTConfig, dim: int, out_dim: int, *, bias: bool = False) -> nn.Module:
    """A product and its BatchNorm; one product where the norm is folded into it."""
    if config.fused:
        return Linear(dim, out_dim, bias=True)
    return LinearNorm(config, dim, out_dim, bias=bias)


def norm_linear(config: LeViTConfig) -> nn.Module:
    """A head; a product alone where it has no BatchNorm, or one that is folded into it."""
    dim, classes = config.feature_dim, config.num_classes
    if config.fused or not config.head_norm:
        return Linear(dim, classes, bias=True)
    return NormLinear(config, dim, classes)


def subsample(
    x: Float[Tensor, "batch tokens dim"], numbers: AttentionConfig
) -> Float[Tensor, "batch out_tokens dim"]:
    """The tokens of every second row and column."""
    x = x.unflatten(1, numbers.grid)  # (batch, rows, columns, dim)
    return x[:, :: numbers.stride, :: numbers.stride].flatten(1, 2)


def offset_biases(
    biases: Float[Tensor, "heads tokens"], numbers: AttentionConfig
) -> Float[Tensor, "heads out_tokens tokens"]:
    """The bias of each query and key: that of the offset (|rows|, |columns|) between the two."""
    rows, columns = (torch.arange(size, device=biases.device) for size in numbers.grid)
    apart = [(n[:: numbers.stride, None] - n).abs() for n in (rows, columns)]
    table = biases.unflatten(1, numbers.grid)  # (heads, |rows|, |columns|)
    table = table[:, apart[0]][..., apart[1]]  # (heads, out_rows, rows, out_columns, columns)
    return table.transpose(2, 3).flatten(3).flatten(1, 2)


class Stem(nn.Module):
    """Convolutions that halve the image, with Hardswish between normed ones; section 4.1."""

    def __init__(self, config: LeViTConfig) -> None:
        super().__init__()
        self.normed = config.stem == "conv_norm"
        dims = (config.in_channels, *config.stem_dims, config.embed_dims[0])
        self.convs = nn.ModuleList(
            ConvNorm(config, dim, out_dim)
            if self.normed and not config.fused
            else Conv(dim, out_dim, kernel_size=3, stride=2, padding=1, bias=True)
            for dim, out_dim in pairwise(dims)
        )

    def forward(
        self, images: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch tokens dim"]:
        x = images
        for i, conv in enumerate(self.convs):
            x = hardswish(x) if self.normed and i > 0 else x
            x = conv(x)  # (batch, rows, columns, dim)
        return x.flatten(1, 2)


class Attention(nn.Module):
    """softmax(q·kᵀ · scale + bias)·v, activation, product; section 4.2.

    The bias belongs to the offset between query and key. With a stride of 2 the queries are every
    second token of every second row, and the grid shrinks.
    """

    def __init__(self, config: LeViTConfig, numbers: AttentionConfig) -> None:
        super().__init__()
        self.numbers, self.scale = numbers, numbers.key_dim**-0.5
        self.bias_factor = 1 / self.scale if config.attn_bias_over_scale else 1.0
        dim, heads, inner_dim = numbers.dim, numbers.num_heads, numbers.inner_dim
        q_dim, kv_dim = heads * numbers.key_dim, heads * numbers.key_dim + inner_dim
        whole = numbers.stride == 1
        self.qkv = linear_norm(config, dim, q_dim + kv_dim) if whole else nn.Identity()
        self.kv = nn.Identity() if whole else linear_norm(config, dim, kv_dim)
        self.q = nn.Identity() if whole else linear_norm(config, dim, q_dim)
        self.attention_biases = nn.Parameter(torch.zeros(heads, numbers.tokens))
        self.attn_dropout = nn.Dropout(numbers.attn_dropout_rate)
        self.activation = ACTIVATIONS[config.attn_activation]
        self.proj = linear_norm(config, inner_dim, numbers.out_dim, bias=config.attn_proj_bias)
        self.proj_dropout = nn.Dropout(numbers.dropout_rate)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch out_tokens _"]:
        q, k, v = (y.transpose(1, 2) for y in self.split(x))  # (batch, heads, tokens, width)
        bias = offset_biases(self.attention_biases, self.numbers) * self.bias_factor
        weights = torch.softmax((q * self.scale) @ k.mT + bias, dim=-1)
        x = self.attn_dropout(weights) @ v
        x = x.transpose(1, 2).flatten(2)  # (batch, out_tokens, heads * value_dim)
        return self.proj_dropout(self.proj(self.activation(x)))

    def split(self, x: Float[Tensor, "batch tokens dim"]) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, each (batch, tokens, heads, width); a head has its own side by side."""
        heads, key_dim, value_dim = (
            self.numbers.num_heads,
            self.numbers.key_dim,
            self.numbers.value_dim,
        )
        if self.numbers.stride == 1:
            qkv = self.qkv(x).unflatten(-1, (heads, -1))
            return qkv.split([key_dim, key_dim, value_dim], dim=-1)
        k, v = self.kv(x).unflatten(-1, (heads, -1)).split([key_dim, value_dim], dim=-1)
        return self.q(subsample(x, self.numbers)).unflatten(-1, (heads, -1)), k, v


class Mlp(nn.Module):
    """Product, Hardswish, product; section 4.2."""

    def __init__(self, config: LeViTConfig, attention: AttentionConfig, hidden_dim: int) -> None:
        super().__init__()
        dim, rate = attention.out_dim, attention.dropout_rate
        self.fc1, self.fc2 = (
            linear_norm(config, *dims) if config.mlp_norm else Linear(*dims, bias=True)
            for dims in ((dim, hidden_dim), (hidden_dim, dim))
        )
        self.dropout1 = nn.Dropout(rate)
        self.dropout2 = nn.Dropout(rate)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        x = self.dropout1(hardswish(self.fc1(x)))
        return self.dropout2(self.fc2(x))


class Block(nn.Module):
    """Attention and MLP, each beside a residual; an attention that shrinks the grid has none."""

    def __init__(self, config: LeViTConfig, attention: AttentionConfig, hidden_dim: int) -> None:
        super().__init__()
        self.shrinks = attention.stride > 1
        self.attn = Attention(config, attention)
        self.drop_path1 = DropPath(0.0 if self.shrinks else config.drop_path_rate)
        self.mlp = Mlp(config, attention, hidden_dim)
        self.drop_path2 = DropPath(config.drop_path_rate)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch out_tokens _"]:
        x = self.attn(x) if self.shrinks else x + self.drop_path1(self.attn(x))
        return x + self.drop_path2(self.mlp(x))


class Stage(nn.Module):
    """Blocks on one grid, behind the one that leads to it."""

    def __init__(self, config: LeViTConfig, stage: StageConfig) -> None:
        super().__init__()
        self.downsample = (
            nn.Identity()
            if stage.downsample is None
            else Block(config, stage.downsample, stage.down_hidden)
        )
        self.blocks = nn.ModuleList(
            Block(config, stage.attention, stage.hidden) for _ in range(stage.depth)
        )

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch out_tokens _"]:
        x = self.downsample(x)
        for block in self.blocks:
            x = block(x)
        return x


class LeViT(nn.Module):
    """LeViT.

    Called with (batch, height, width, channels) images of ``config.image_size``; returns
    (batch, num_classes) logits, or the pooled features where the config has no head. The logits of
    two heads are averaged; ``forward_heads`` gives them apart.
    """

    def __init__(self, config: LeViTConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = Stem(config)
        self.stages = nn.ModuleList(Stage(config, stage) for stage in config.stages)
        self.head = norm_linear(config) if config.num_classes else nn.Identity()
        self.head_dist = norm_linear(config) if config.dist_head else nn.Identity()

    def forward_features(
        self, images: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch dim"]:
        """The mean over the tokens of the last stage."""
        self.config.check_images(images.shape)
        x = self.stem(images)  # (batch, tokens, dim)
        for stage in self.stages:
            x = stage(x)
        return x.mean(dim=1)

    def forward_heads(
        self, images: Float[Tensor, "batch height width channels"]
    ) -> tuple[Float[Tensor, "batch classes"], Float[Tensor, "batch classes"]]:
        """Logits of the classifier and of the teacher's head, each for a loss of its own."""
        require(self.config.dist_head, "dist_head", False, "the model has one head")
        x = self.forward_features(images)
        return self.head(x), self.head_dist(x)

    def forward(
        self, images: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch ..."]:
        if self.config.dist_head:
            logits, dist_logits = self.forward_heads(images)
            return (logits + dist_logits) / 2
        return self.head(self.forward_features(images))
