"""LeViT in Flax.

Source: Graham et al. 2021, arXiv:2104.01136, section 4; the official code (Apache-2.0), and
vit-pytorch's ``levit.py`` (MIT) for the other form; see the spec for the differences.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from isovit.backends.flax.layers import (
    ACTIVATIONS,
    BatchNorm,
    Conv,
    DropPath,
    Kinds,
    Linear,
    identity,
)
from isovit.spec.config import require
from isovit.spec.families.levit import AttentionConfig, LeViTConfig, StageConfig

hardswish = ACTIVATIONS["hardswish"]
HALVING: dict[str, Any] = {"kernel_size": (3, 3), "stride": (2, 2), "padding": (1, 1)}


class ConvNorm(nnx.Module):
    """A convolution of kernel 3 and stride 2, then BatchNorm."""

    def __init__(
        self,
        config: LeViTConfig,
        dim: int,
        out_dim: int,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.conv = Conv(dim, out_dim, **HALVING, use_bias=False, **kinds)
        self.norm = batch_norm(config, out_dim, kinds)

    def __call__(
        self, x: Float[Array, "batch height width dim"]
    ) -> Float[Array, "batch rows columns dim_out"]:
        return self.norm(self.conv(x))


class LinearNorm(nnx.Module):
    """A product, then BatchNorm over all tokens of all images; section 4.2."""

    def __init__(
        self,
        config: LeViTConfig,
        dim: int,
        out_dim: int,
        *,
        bias: bool,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.linear = Linear(dim, out_dim, use_bias=bias, **kinds)
        self.norm = batch_norm(config, out_dim, kinds)

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens out"]:
        return self.norm(self.linear(x))


class NormLinear(nnx.Module):
    """BatchNorm over the images, then a product: a head."""

    def __init__(
        self,
        config: LeViTConfig,
        dim: int,
        out_dim: int,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.norm = batch_norm(config, dim, kinds)
        self.linear = Linear(dim, out_dim, use_bias=True, **kinds)

    def __call__(self, x: Float[Array, "batch dim"]) -> Float[Array, "batch classes"]:
        return self.linear(self.norm(x))


def batch_norm(config: LeViTConfig, dim: int, kinds: Kinds) -> BatchNorm:
    """BatchNorm with the numbers of a config."""
    eps, momentum = config.batch_norm_eps, config.batch_norm_momentum
    return BatchNorm(dim, epsilon=eps, momentum=momentum, **kinds)


def linear_norm(
    config: LeViTConfig, dim: int, out_dim: int, kinds: Kinds, *, bias: bool = False
) -> nnx.Module:
    """A product and its BatchNorm; one product where the norm is folded into it."""
    if config.fused:
        return Linear(dim, out_dim, use_bias=True, **kinds)
    return LinearNorm(config, dim, out_dim, bias=bias, **kinds)


def norm_linear(config: LeViTConfig, kinds: Kinds) -> nnx.Module:
    """A head; a product alone where it has no BatchNorm, or one that is folded into it."""
    dim, classes = config.feature_dim, config.num_classes
    if config.fused or not config.head_norm:
        return Linear(dim, classes, use_bias=True, **kinds)
    return NormLinear(config, dim, classes, **kinds)


def subsample(
    x: Float[Array, "batch tokens dim"], numbers: AttentionConfig
) -> Float[Array, "batch out_tokens dim"]:
    """The tokens of every second row and column."""
    batch, _, dim = x.shape
    x = x.reshape(batch, *numbers.grid, dim)  # (batch, rows, columns, dim)
    return x[:, :: numbers.stride, :: numbers.stride].reshape(batch, -1, dim)


def offset_biases(
    biases: Float[Array, "heads tokens"], numbers: AttentionConfig
) -> Float[Array, "heads out_tokens tokens"]:
    """The bias of each query and key: that of the offset (|rows|, |columns|) between the two."""
    rows, columns = (jnp.arange(size) for size in numbers.grid)
    apart = [jnp.abs(n[:: numbers.stride, None] - n) for n in (rows, columns)]
    table = biases.reshape(-1, *numbers.grid)  # (heads, |rows|, |columns|)
    table = table[:, apart[0]][..., apart[1]]  # (heads, out_rows, rows, out_columns, columns)
    return table.swapaxes(2, 3).reshape(-1, numbers.out_tokens, numbers.tokens)


class Stem(nnx.Module):
    """Convolutions that halve the image, with Hardswish between normed ones; section 4.1."""

    def __init__(
        self, config: LeViTConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.normed = config.stem == "conv_norm"
        dims = (config.in_channels, *config.stem_dims, config.embed_dims[0])
        self.convs = nnx.List(
            [
                ConvNorm(config, dim, out_dim, **kinds)
                if self.normed and not config.fused
                else Conv(dim, out_dim, **HALVING, use_bias=True, **kinds)
                for dim, out_dim in pairwise(dims)
            ]
        )

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch tokens dim"]:
        x = images
        for i, conv in enumerate(self.convs):
            x = hardswish(x) if self.normed and i > 0 else x
            x = conv(x)  # (batch, rows, columns, dim)
        return x.reshape(x.shape[0], -1, x.shape[-1])


class Attention(nnx.Module):
    """softmax(q·kᵀ · scale + bias)·v, activation, product; section 4.2.

    The bias belongs to the offset between query and key. With a stride of 2 the queries are every
    second token of every second row, and the grid shrinks.
    """

    def __init__(
        self,
        config: LeViTConfig,
        numbers: AttentionConfig,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.numbers, self.scale = numbers, numbers.key_dim**-0.5
        self.bias_factor = 1 / self.scale if config.attn_bias_over_scale else 1.0
        dim, heads, inner_dim = numbers.dim, numbers.num_heads, numbers.inner_dim
        q_dim, kv_dim = heads * numbers.key_dim, heads * numbers.key_dim + inner_dim
        whole = numbers.stride == 1
        self.qkv = linear_norm(config, dim, q_dim + kv_dim, kinds) if whole else identity
        self.kv = identity if whole else linear_norm(config, dim, kv_dim, kinds)
        self.q = identity if whole else linear_norm(config, dim, q_dim, kinds)
        self.attention_biases = nnx.Param(jnp.zeros((heads, numbers.tokens), param_dtype))
        self.attn_dropout = nnx.Dropout(numbers.attn_dropout_rate, rngs=rngs)
        self.activation = ACTIVATIONS[config.attn_activation]
        bias = config.attn_proj_bias
        self.proj = linear_norm(config, inner_dim, numbers.out_dim, kinds, bias=bias)
        self.proj_dropout = nnx.Dropout(numbers.dropout_rate, rngs=rngs)

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch out_tokens _"]:
        q, k, v = (y.swapaxes(1, 2) for y in self.split(x))  # (batch, heads, tokens, width)
        biases = self.attention_biases[...].astype(x.dtype)
        bias = offset_biases(biases, self.numbers) * self.bias_factor
        weights = jax.nn.softmax((q * self.scale) @ k.mT + bias, axis=-1)
        x = (self.attn_dropout(weights) @ v).swapaxes(1, 2)
        x = x.reshape(*x.shape[:2], -1)  # (batch, out_tokens, heads * value_dim)
        return self.proj_dropout(self.proj(self.activation(x)))

    def split(self, x: Float[Array, "batch tokens dim"]) -> tuple[Array, Array, Array]:
        """q, k and v, each (batch, tokens, heads, width); a head has its own side by side."""
        batch, heads, key_dim = x.shape[0], self.numbers.num_heads, self.numbers.key_dim
        if self.numbers.stride == 1:
            qkv = self.qkv(x).reshape(batch, self.numbers.tokens, heads, -1)
            q, k, v = jnp.split(qkv, [key_dim, 2 * key_dim], axis=-1)
            return q, k, v
        kv = self.kv(x).reshape(batch, self.numbers.tokens, heads, -1)
        k, v = jnp.split(kv, [key_dim], axis=-1)
        q = self.q(subsample(x, self.numbers))
        return q.reshape(batch, self.numbers.out_tokens, heads, -1), k, v


class Mlp(nnx.Module):
    """Product, Hardswish, product; section 4.2."""

    def __init__(
        self,
        config: LeViTConfig,
        attention: AttentionConfig,
        hidden_dim: int,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        dim, rate = attention.out_dim, attention.dropout_rate
        self.fc1, self.fc2 = (
            linear_norm(config, *dims, kinds)
            if config.mlp_norm
            else Linear(*dims, use_bias=True, **kinds)
            for dims in ((dim, hidden_dim), (hidden_dim, dim))
        )
        self.dropout1 = nnx.Dropout(rate, rngs=rngs)
        self.dropout2 = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        x = self.dropout1(hardswish(self.fc1(x)))
        return self.dropout2(self.fc2(x))


class Block(nnx.Module):
    """Attention and MLP, each beside a residual; an attention that shrinks the grid has none."""

    def __init__(
        self,
        config: LeViTConfig,
        attention: AttentionConfig,
        hidden_dim: int,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.shrinks = attention.stride > 1
        self.attn = Attention(config, attention, **kinds)
        self.drop_path1 = DropPath(0.0 if self.shrinks else config.drop_path_rate, rngs=rngs)
        self.mlp = Mlp(config, attention, hidden_dim, **kinds)
        self.drop_path2 = DropPath(config.drop_path_rate, rngs=rngs)

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch out_tokens _"]:
        x = self.attn(x) if self.shrinks else x + self.drop_path1(self.attn(x))
        return x + self.drop_path2(self.mlp(x))


class Stage(nnx.Module):
    """Blocks on one grid, behind the one that leads to it."""

    def __init__(
        self,
        config: LeViTConfig,
        stage: StageConfig,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.downsample = (
            identity
            if stage.downsample is None
            else Block(config, stage.downsample, stage.down_hidden, **kinds)
        )
        self.blocks = nnx.List(
            [Block(config, stage.attention, stage.hidden, **kinds) for _ in range(stage.depth)]
        )

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch out_tokens _"]:
        x = self.downsample(x)
        for block in self.blocks:
            x = block(x)
        return x


class LeViT(nnx.Module):
    """LeViT.

    Called with (batch, height, width, channels) images of ``config.image_size``; returns
    (batch, num_classes) logits, or the pooled features where the config has no head. The logits of
    two heads are averaged; ``forward_heads`` gives them apart.

    Args:
        config: see ``LeViTConfig``.
        dtype: of the computation.
        param_dtype: of the parameters.
        rngs: streams ``params`` and ``dropout``.
    """

    def __init__(
        self,
        config: LeViTConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.config, self.dtype = config, dtype
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.stem = Stem(config, **kinds)
        self.stages = nnx.List([Stage(config, stage, **kinds) for stage in config.stages])
        self.head = norm_linear(config, kinds) if config.num_classes else identity
        self.head_dist = norm_linear(config, kinds) if config.dist_head else identity

    def forward_features(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch dim"]:
        """The mean over the tokens of the last stage."""
        self.config.check_images(images.shape)
        x = self.stem(images)  # (batch, tokens, dim)
        for stage in self.stages:
            x = stage(x)
        return x.mean(axis=1)

    def forward_heads(
        self, images: Float[Array, "batch height width channels"]
    ) -> tuple[Float[Array, "batch classes"], Float[Array, "batch classes"]]:
        """Logits of the classifier and of the teacher's head, each for a loss of its own."""
        require(self.config.dist_head, "dist_head", False, "the model has one head")
        x = self.forward_features(images)
        return self.head(x), self.head_dist(x)

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch ..."]:
        if self.config.dist_head:
            logits, dist_logits = self.forward_heads(images)
            return (logits + dist_logits) / 2
        return self.head(self.forward_features(images))
