"""NesT in Flax.

Source: Zhang et al. 2022, arXiv:2105.12723, section 3; the official code (Apache-2.0) and
vit-pytorch's ``nest.py`` (MIT); see the spec for the differences.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from isovit.backends.flax.layers import (
    Block,
    Conv,
    Fixed,
    Kinds,
    LayerNorm,
    Linear,
    attention,
    identity,
)
from isovit.spec.blocks import BlockConfig
from isovit.spec.families.nest import POOL_KERNEL, POOL_STRIDE, Level, NesTConfig


def to_blocks(
    x: Float[Array, "batch rows columns dim"], level: Level
) -> Float[Array, "batch blocks tokens dim"]:
    """An image cut into blocks, row by row, and each block into tokens, row by row."""
    (down, across), (height, width) = level.block_grid, level.block_size
    x = x.reshape(x.shape[0], down, height, across, width, -1)
    x = x.swapaxes(2, 3)  # (batch, down, across, height, width, dim)
    return x.reshape(x.shape[0], level.blocks, level.block_tokens, -1)


def to_image(
    x: Float[Array, "batch tokens dim"], level: Level
) -> Float[Array, "batch rows columns dim"]:
    """The image again, from its tokens, block after block."""
    x = x.reshape(x.shape[0], *level.block_grid, *level.block_size, -1)
    x = x.swapaxes(2, 3)  # (batch, down, height, across, width, dim)
    return x.reshape(x.shape[0], *level.grid, -1)


def max_pool(
    x: Float[Array, "batch rows columns dim"], padding: tuple[int, int]
) -> Float[Array, "batch half_rows half_columns dim"]:
    """The largest of 3 x 3 numbers, at every second; ``padding`` before and after both axes."""
    x = jnp.pad(x, ((0, 0), padding, padding, (0, 0)), constant_values=-jnp.inf)
    kernel, stride = (POOL_KERNEL, POOL_KERNEL), (POOL_STRIDE, POOL_STRIDE)
    return nnx.max_pool(x, window_shape=kernel, strides=stride, padding="VALID")


class ConvPatchEmbed(nnx.Module):
    """A convolution whose stride is its kernel."""

    def __init__(
        self, config: NesTConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.proj = Conv(
            config.in_channels,
            config.embed_dims[0],
            kernel_size=config.patch_size,
            stride=config.patch_size,
            padding=(0, 0),
            use_bias=True,
            **kinds,
        )

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch rows columns dim"]:
        return self.proj(images)


class NormLinearNormPatchEmbed(nnx.Module):
    """LayerNorm, dense, LayerNorm over patches flattened as (height, width, channel)."""

    def __init__(
        self, config: NesTConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        dim, eps = config.embed_dims[0], config.norm_eps
        self.patch_size, self.grid = config.patch_size, config.grid
        self.norm1 = LayerNorm(config.patch_dim, epsilon=eps, **kinds)
        self.proj = Linear(config.patch_dim, dim, use_bias=True, **kinds)
        self.norm2 = LayerNorm(dim, epsilon=eps, **kinds)

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch rows columns dim"]:
        (height, width), (rows, columns) = self.patch_size, self.grid
        x = images.reshape(images.shape[0], rows, height, columns, width, -1)
        x = x.swapaxes(2, 3)  # (batch, rows, columns, height, width, channels)
        return self.norm2(self.proj(self.norm1(x.reshape(x.shape[0], rows, columns, -1))))


PATCH_EMBEDS = {"conv": ConvPatchEmbed, "norm_linear_norm": NormLinearNormPatchEmbed}


class BlockAttention(nnx.Module):
    """Multi-head self-attention within each block; section 3.1.

    It gets the tokens of all blocks, one after another: nothing else in a layer knows of blocks.
    """

    def __init__(
        self,
        config: BlockConfig,
        blocks: int,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.num_heads, self.blocks = config.num_heads, blocks
        self.scale = config.attn_scale
        self.qkv = Linear(config.dim, 3 * config.inner_dim, use_bias=config.qkv_bias, **kinds)
        self.attn_dropout = nnx.Dropout(config.attn_dropout_rate, rngs=rngs)
        self.proj = Linear(config.inner_dim, config.dim, use_bias=True, **kinds)
        self.proj_dropout = nnx.Dropout(config.dropout_rate, rngs=rngs)

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        batch, tokens, _ = x.shape
        inside = tokens // self.blocks
        qkv = self.qkv(x).reshape(batch, self.blocks, inside, 3, self.num_heads, -1)
        qkv = qkv.transpose(3, 0, 1, 4, 2, 5)  # (3, batch, blocks, heads, tokens, head_dim)
        q, k, v = qkv.reshape(3, batch, self.blocks * self.num_heads, inside, -1)
        x = attention(q, k, v, self.scale, self.attn_dropout)
        x = x.reshape(batch, self.blocks, self.num_heads, inside, -1)
        x = x.swapaxes(2, 3)  # (batch, blocks, tokens, heads, head_dim)
        x = x.reshape(batch, tokens, -1)  # (batch, blocks * tokens, heads * head_dim)
        return self.proj_dropout(self.proj(x))


class ConvPool(nnx.Module):
    """Block aggregation: convolution, LayerNorm, max pooling over the whole image; section 3.1."""

    def __init__(
        self,
        config: NesTConfig,
        input_dim: int,
        dim: int,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.padding = (0, 1) if config.pool_padding == "end" else (1, 1)
        self.conv = Conv(
            input_dim,
            dim,
            kernel_size=(POOL_KERNEL, POOL_KERNEL),
            stride=(1, 1),
            padding=(1, 1),
            use_bias=True,
            **kinds,
        )
        self.norm = LayerNorm(dim, epsilon=config.norm_eps, **kinds)

    def __call__(
        self, x: Float[Array, "batch rows columns dim"]
    ) -> Float[Array, "batch half_rows half_columns dim_out"]:
        return max_pool(self.norm(self.conv(x)), self.padding)


class NesTLevel(nnx.Module):
    """One level of the hierarchy: aggregation, but in the first, positions, layers."""

    def __init__(
        self,
        config: NesTConfig,
        level: Level,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.level, self.dtype = level, dtype
        positions = jnp.zeros(level.pos_embed_shape, param_dtype)
        self.pos_embed = nnx.Param(positions) if level.pos_embed_trains else Fixed(positions)
        self.pool = (
            identity
            if level.input_dim is None
            else ConvPool(config, level.input_dim, level.dim, **kinds)
        )
        self.blocks = nnx.List(
            [
                Block(layer, BlockAttention(layer, level.blocks, **kinds), **kinds)
                for layer in level.layers
            ]
        )

    def __call__(
        self, x: Float[Array, "batch rows columns dim"]
    ) -> Float[Array, "batch rows_out columns_out dim_out"]:
        x = to_blocks(self.pool(x), self.level)  # (batch, blocks, tokens, dim)
        positions = self.pos_embed[...].astype(self.dtype)
        x = x + (positions if self.level.per_channel else positions[:, None])
        x = x.reshape(x.shape[0], self.level.tokens, -1)  # (batch, blocks * tokens, dim)
        for block in self.blocks:
            x = block(x)
        return to_image(x, self.level)


class NesT(nnx.Module):
    """Nested Hierarchical Transformer.

    Called with (batch, height, width, channels) images of ``config.image_size``; returns
    (batch, num_classes) logits, or the pooled features where the config has no head.

    Args:
        config: see ``NesTConfig``.
        dtype: of the computation.
        param_dtype: of the parameters.
        rngs: streams ``params`` and ``dropout``.
    """

    def __init__(
        self,
        config: NesTConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.config = config
        dim, classes = config.feature_dim, config.num_classes
        self.patch_embed = PATCH_EMBEDS[config.patch_embed](config, **kinds)
        self.levels = nnx.List([NesTLevel(config, level, **kinds) for level in config.levels])
        self.norm = LayerNorm(dim, epsilon=config.norm_eps, **kinds)
        self.head_dropout = nnx.Dropout(config.head_dropout_rate, rngs=rngs)
        self.head = Linear(dim, classes, use_bias=True, **kinds) if classes else identity

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch features"]:
        self.config.check_images(images.shape)
        x = self.patch_embed(images)  # (batch, rows, columns, dim)
        for level in self.levels:
            x = level(x)
        x = self.norm(x).mean(axis=(1, 2))
        return self.head(self.head_dropout(x))
