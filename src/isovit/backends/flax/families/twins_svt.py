"""Twins-SVT in Flax.

Source: Chu et al. 2021, arXiv:2104.13840, section 3.2; the official code as timm has it
(Apache-2.0) and, for the other form, vit-pytorch's ``twins_svt.py`` (MIT); see the spec.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from isovit.backends.flax.layers import (
    Block,
    Conv,
    DepthwiseConv,
    Fixed,
    Kinds,
    LayerNorm,
    Linear,
    attention,
    identity,
    split_heads,
)
from isovit.spec.blocks import BlockConfig
from isovit.spec.families.twins_svt import StageConfig, TwinsSVTConfig


def to_windows(
    x: Float[Array, "batch rows columns dim"], size: int
) -> Float[Array, "windows tokens dim"]:
    """Square windows that tile an image, row by row; they come to lie along the batch."""
    batch, rows, columns, dim = x.shape
    x = x.reshape(batch, rows // size, size, columns // size, size, dim)
    x = x.swapaxes(2, 3)  # (batch, rows / size, columns / size, size, size, dim)
    return x.reshape(-1, size * size, dim)


def from_windows(
    x: Float[Array, "windows tokens dim"], size: int, grid: tuple[int, int]
) -> Float[Array, "batch rows columns dim"]:
    """The images of ``to_windows``, with so many rows and columns."""
    (rows, columns), dim = grid, x.shape[-1]
    x = x.reshape(-1, rows // size, columns // size, size, size, dim)
    x = x.swapaxes(2, 3)  # (batch, rows / size, size, columns / size, size, dim)
    return x.reshape(-1, rows, columns, dim)


def fix(layer: Any) -> None:
    """Leave a layer out of training."""
    layer.kernel = Fixed(layer.kernel[...])
    layer.bias = None if layer.bias is None else Fixed(layer.bias[...])


class ConvNormPatchEmbed(nnx.Module):
    """A convolution whose stride is its kernel, then LayerNorm."""

    def __init__(
        self,
        config: TwinsSVTConfig,
        stage: StageConfig,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        side = stage.patch_size
        self.proj = Conv(
            stage.in_dim,
            stage.dim,
            kernel_size=(side, side),
            stride=(side, side),
            padding=(0, 0),
            use_bias=True,
            **kinds,
        )
        self.norm = LayerNorm(stage.dim, epsilon=config.embed_norm_eps, **kinds)

    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch tokens dim"]:
        x = self.proj(x)  # (batch, rows, columns, dim)
        return self.norm(x.reshape(x.shape[0], -1, x.shape[-1]))


class NormLinearNormPatchEmbed(nnx.Module):
    """LayerNorm, dense, LayerNorm over patches flattened as (channel, height, width)."""

    def __init__(
        self,
        config: TwinsSVTConfig,
        stage: StageConfig,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.side, eps = stage.patch_size, config.embed_norm_eps
        self.norm1 = LayerNorm(stage.patch_dim, epsilon=eps, **kinds)
        self.proj = Linear(stage.patch_dim, stage.dim, use_bias=True, **kinds)
        self.norm2 = LayerNorm(stage.dim, epsilon=eps, **kinds)

    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch tokens dim"]:
        (batch, height, width, channels), side = x.shape, self.side
        x = x.reshape(batch, height // side, side, width // side, side, channels)
        x = x.transpose(0, 1, 3, 5, 2, 4)  # (batch, rows, columns, channels, side, side)
        x = x.reshape(batch, -1, channels * side * side)  # (batch, tokens, channels * side * side)
        return self.norm2(self.proj(self.norm1(x)))


PATCH_EMBEDS = {"conv_norm": ConvNormPatchEmbed, "norm_linear_norm": NormLinearNormPatchEmbed}


class LocalAttention(nnx.Module):
    """Self-attention within windows, LSA; section 3.2.

    Rows and columns of zeros fill the last windows; their keys and values are the biases.
    """

    def __init__(
        self,
        stage: StageConfig,
        block: BlockConfig,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        linear = partial(Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        inner = block.inner_dim
        self.grid, self.padded_grid = stage.grid, stage.padded_grid
        self.window_size, self.num_heads = stage.window_size, block.num_heads
        self.scale = block.attn_scale
        self.qkv = linear(stage.dim, 3 * inner, use_bias=block.qkv_bias)
        self.attn_dropout = nnx.Dropout(block.attn_dropout_rate, rngs=rngs)
        self.proj = linear(inner, stage.dim, use_bias=True)
        self.proj_dropout = nnx.Dropout(block.dropout_rate, rngs=rngs)

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        (batch, tokens, dim), (rows, columns) = x.shape, self.grid
        down, right = self.padded_grid[0] - rows, self.padded_grid[1] - columns
        x = x.reshape(batch, rows, columns, dim)
        x = jnp.pad(x, ((0, 0), (0, down), (0, right), (0, 0)))
        qkv = to_windows(self.qkv(x), self.window_size)  # (windows, window tokens, 3 * inner)
        q, k, v = split_heads(qkv, 3, self.num_heads)  # each (windows, heads, ..., head_dim)
        x = attention(q, k, v, self.scale, self.attn_dropout)
        x = x.swapaxes(1, 2).reshape(*qkv.shape[:2], -1)  # (windows, ..., heads * head_dim)
        x = from_windows(x, self.window_size, self.padded_grid)
        x = x[:, :rows, :columns].reshape(batch, tokens, -1)  # (batch, tokens, heads * head_dim)
        return self.proj_dropout(self.proj(x))


class GlobalAttention(nnx.Module):
    """Attention of every token to a summary of each square of tokens, GSA; section 3.2, eq. 2."""

    def __init__(
        self,
        config: TwinsSVTConfig,
        stage: StageConfig,
        block: BlockConfig,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        dim, inner, side = stage.dim, block.inner_dim, (stage.reduction, stage.reduction)
        by_conv = config.reduce == "conv"
        reduces = not by_conv and stage.reduction > 1
        squares = partial(Conv, dim, kernel_size=side, stride=side, padding=(0, 0), **kinds)
        self.grid, self.num_heads, self.scale = stage.grid, block.num_heads, block.attn_scale
        self.q = Linear(dim, inner, use_bias=block.qkv_bias, **kinds)
        if stage.has_one_key:  # the weight of one key is 1, whatever q is
            fix(self.q)
        self.reduce = squares(dim, use_bias=True) if reduces else identity
        self.norm = LayerNorm(dim, epsilon=config.reduce_norm_eps, **kinds) if reduces else identity
        self.kv = (
            squares(2 * inner, use_bias=block.qkv_bias)
            if by_conv
            else Linear(dim, 2 * inner, use_bias=block.qkv_bias, **kinds)
        )
        self.attn_dropout = nnx.Dropout(block.attn_dropout_rate, rngs=rngs)
        self.proj = Linear(inner, dim, use_bias=True, **kinds)
        self.proj_dropout = nnx.Dropout(block.dropout_rate, rngs=rngs)

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        batch, tokens, dim = x.shape
        (q,) = split_heads(self.q(x), 1, self.num_heads)  # (batch, heads, tokens, head_dim)
        x = self.norm(self.reduce(x.reshape(batch, *self.grid, dim)))
        kv = self.kv(x)  # (batch, rows, columns, 2 * heads * head_dim)
        kv = kv.reshape(batch, -1, kv.shape[-1])  # (batch, summaries, 2 * heads * head_dim)
        k, v = split_heads(kv, 2, self.num_heads)  # each (batch, heads, summaries, head_dim)
        x = attention(q, k, v, self.scale, self.attn_dropout)
        x = x.swapaxes(1, 2).reshape(batch, tokens, -1)  # (batch, tokens, heads * head_dim)
        return self.proj_dropout(self.proj(x))


class PEG(nnx.Module):
    """Positional encoding generator: x + depthwise convolution of x; arXiv:2102.10882, section 4.

    The zeros around the image are what tells a token where it is.
    """

    def __init__(
        self,
        config: TwinsSVTConfig,
        stage: StageConfig,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        size = config.peg_kernel_size
        self.grid = stage.grid
        self.proj = DepthwiseConv(
            stage.dim,
            kernel_size=(size, size),
            stride=(1, 1),
            padding=(size // 2, size // 2),
            use_bias=True,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        image = x.reshape(x.shape[0], *self.grid, -1)  # (batch, rows, columns, dim)
        return x + self.proj(image).reshape(x.shape)


class Stage(nnx.Module):
    """Patch embedding, blocks, eq. 1, and the positional encoding behind the first of them."""

    def __init__(
        self,
        config: TwinsSVTConfig,
        stage: StageConfig,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.grid, self.peg_after = stage.grid, stage.peg_after
        self.patch_embed = PATCH_EMBEDS[config.patch_embed](config, stage, **kinds)
        self.dropout = nnx.Dropout(config.embed_dropout_rate, rngs=rngs)
        self.blocks = nnx.List([])
        for i, block in enumerate(stage.blocks):
            attn = (
                LocalAttention(stage, block, **kinds)
                if stage.is_local(i)
                else GlobalAttention(config, stage, block, **kinds)
            )
            self.blocks.append(Block(block, attn, **kinds))
        self.peg = PEG(config, stage, **kinds)

    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch rows columns dim"]:
        x = self.dropout(self.patch_embed(x))  # (batch, tokens, dim)
        for i, block in enumerate(self.blocks, start=1):
            x = block(x)
            if i == self.peg_after:
                x = self.peg(x)
        return x.reshape(x.shape[0], *self.grid, -1)


class TwinsSVT(nnx.Module):
    """Twins-SVT.

    Called with (batch, height, width, channels) images of ``config.image_size``; returns
    (batch, num_classes) logits, or the pooled features where the config has no head.

    Args:
        config: see ``TwinsSVTConfig``.
        dtype: of the computation.
        param_dtype: of the parameters.
        rngs: streams ``params`` and ``dropout``.
    """

    def __init__(
        self,
        config: TwinsSVTConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.config, self.dtype = config, dtype
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        dim, classes = config.embed_dims[-1], config.num_classes
        has_norm = config.final_norm == "tokens"
        self.stages = nnx.List([Stage(config, stage, **kinds) for stage in config.stages])
        self.norm = LayerNorm(dim, epsilon=config.norm_eps, **kinds) if has_norm else identity
        self.dropout = nnx.Dropout(config.head_dropout_rate, rngs=rngs)
        self.head = Linear(dim, classes, use_bias=True, **kinds) if classes > 0 else identity

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch ..."]:
        self.config.check_images(images.shape)
        x = images
        for stage in self.stages:
            x = stage(x)  # (batch, rows, columns, dim)
        x = self.norm(x.reshape(x.shape[0], -1, x.shape[-1]))  # (batch, tokens, dim)
        if self.config.pool == "mean":
            x = x.mean(axis=1)
        return self.head(self.dropout(x))
