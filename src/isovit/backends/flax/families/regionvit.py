"""RegionViT in Flax.

Source: Chen, Panda & Fan 2022, arXiv:2106.02689, section 3; the official code (Apache-2.0) and, for
the other form, vit-pytorch's ``regionvit.py`` (MIT); see the spec for the differences.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from isovit.backends.flax.layers import (
    ACTIVATIONS,
    Conv,
    DepthwiseConv,
    DropPath,
    Kinds,
    LayerNorm,
    Linear,
    identity,
)
from isovit.spec.families.regionvit import RegionViTConfig, StageConfig


def to_windows(
    regions: Float[Array, "batch rows columns dim"], x: Float[Array, "batch height width dim"]
) -> Float[Array, "batch regions tokens dim"]:
    """Each regional token with the local ones of its window behind it; both row by row."""
    (batch, rows, columns, dim), (_, height, width, _) = regions.shape, x.shape
    x = x.reshape(batch, rows, height // rows, columns, width // columns, dim)
    x = x.swapaxes(2, 3)  # (batch, rows, columns, height / rows, width / columns, dim)
    x = x.reshape(batch, rows * columns, -1, dim)
    return jnp.concat([regions.reshape(batch, -1, 1, dim), x], axis=2)


def from_windows(
    x: Float[Array, "batch regions tokens dim"], stage: StageConfig
) -> tuple[Float[Array, "batch rows columns dim"], Float[Array, "batch height width dim"]]:
    """The two grids of ``to_windows``."""
    batch, dim = x.shape[0], x.shape[-1]
    regions = x[:, :, 0].reshape(batch, *stage.region_grid, dim)
    x = x[:, :, 1:].reshape(batch, *stage.region_grid, *stage.window, dim)
    x = x.swapaxes(2, 3)  # (batch, rows, height / rows, columns, width / columns, dim)
    return regions, x.reshape(batch, *stage.grid, dim)


def window_bias(
    table: Float[Array, "heads offsets"], window: tuple[int, int], size: int
) -> Float[Array, "heads tokens tokens"]:
    """The bias of each query and key of a window: that of the offset from one to the other.

    Offsets of -size + 1 to size - 1 rows, and as many columns, lie in the table row by row. The
    regional token, the first, has none, as query or as key.
    """
    places, tokens = [jnp.arange(side) for side in window], window[0] * window[1]
    offsets = [place - place[:, None] + size - 1 for place in places]  # (queries, keys)
    bias = table.reshape(-1, 2 * size - 1, 2 * size - 1)
    bias = bias[:, offsets[0]][..., offsets[1]]  # (heads, rows, key rows, columns, key columns)
    bias = bias.swapaxes(2, 3).reshape(-1, tokens, tokens)
    return jnp.pad(bias, ((0, 0), (1, 0), (1, 0)))


class ConvEmbed(nnx.Module):
    """The local tokens of a larger model: a convolution whose kernel is two strides wide."""

    def __init__(
        self, config: RegionViTConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        side = config.patch_size
        self.proj = Conv(
            config.in_channels,
            config.embed_dims[0],
            kernel_size=(2 * side, 2 * side),
            stride=(side, side),
            padding=(side - 1, side - 1),
            use_bias=True,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch rows columns dim"]:
        return self.proj(images)


class ConvStem(nnx.Module):
    """The local tokens of a smaller model: three convolutions, of which two halve the image."""

    def __init__(
        self, config: RegionViTConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        square = partial(Conv, kernel_size=(3, 3), padding=(1, 1), use_bias=True, **kinds)
        (first, second), eps = config.stem_dims, config.embed_norm_eps
        self.activation = ACTIVATIONS[config.activation]
        self.conv1 = square(config.in_channels, first, stride=(2, 2))
        self.norm1 = LayerNorm(first, epsilon=eps, **kinds)
        self.conv2 = square(first, second, stride=(2, 2))
        self.norm2 = LayerNorm(second, epsilon=eps, **kinds)
        self.conv3 = square(second, config.embed_dims[0], stride=(1, 1))

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch rows columns dim"]:
        x = self.activation(self.norm1(self.conv1(images)))
        x = self.activation(self.norm2(self.conv2(x)))
        return self.conv3(x)


class RegionEmbed(nnx.Module):
    """The regional tokens: a product over all pixels of a region, (channel, height, width)."""

    def __init__(
        self, config: RegionViTConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.side = config.region_size
        self.proj = Linear(config.region_dim, config.embed_dims[0], use_bias=True, **kinds)

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch rows columns dim"]:
        (batch, height, width, channels), side = images.shape, self.side
        rows, columns = height // side, width // side
        x = images.reshape(batch, rows, side, columns, side, channels)
        x = x.transpose(0, 1, 3, 5, 2, 4)  # (batch, rows, columns, channels, side, side)
        return self.proj(x.reshape(batch, rows, columns, -1))


class Downsample(nnx.Module):
    """A convolution that halves a grid of tokens, behind LayerNorm and activation or not."""

    def __init__(
        self,
        config: RegionViTConfig,
        in_dim: int,
        dim: int,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        normed = config.downsample == "norm_conv"
        self.norm = (
            LayerNorm(in_dim, epsilon=config.embed_norm_eps, **kinds) if normed else identity
        )
        self.activation = ACTIVATIONS[config.activation] if normed else identity
        self.conv = Conv(
            in_dim,
            dim,
            kernel_size=(3, 3),
            stride=(2, 2),
            padding=(1, 1),
            groups=in_dim if normed else 1,
            use_bias=True,
            **kinds,
        )

    def __call__(
        self, x: Float[Array, "batch rows columns dim"]
    ) -> Float[Array, "batch half_rows half_columns dim_out"]:
        return self.conv(self.activation(self.norm(x)))


class PEG(nnx.Module):
    """Positional encoding generator: x + depthwise convolution of x; arXiv:2102.10882, section 4.

    The zeros around the grid are what tells a token where it is.
    """

    def __init__(
        self,
        config: RegionViTConfig,
        stage: StageConfig,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.proj = DepthwiseConv(
            stage.dim,
            kernel_size=(3, 3),
            stride=(1, 1),
            padding=(1, 1),
            use_bias=config.peg == "local",
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(
        self, x: Float[Array, "batch rows columns dim"]
    ) -> Float[Array, "batch rows columns dim"]:
        return x + self.proj(x)


class Attention(nnx.Module):
    """Multi-head self-attention within each group of tokens: softmax(q·kᵀ · scale + bias)·v."""

    def __init__(
        self,
        config: RegionViTConfig,
        stage: StageConfig,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        linear = partial(Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.num_heads = stage.num_heads
        self.scale = config.attn_scale or stage.head_dim**-0.5
        self.qkv = linear(stage.dim, 3 * stage.inner_dim, use_bias=config.qkv_bias)
        self.attn_dropout = nnx.Dropout(config.attn_dropout_rate, rngs=rngs)
        self.proj = linear(stage.inner_dim, stage.dim, use_bias=True)
        self.proj_dropout = nnx.Dropout(config.proj_dropout_rate, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch groups tokens dim"],
        bias: Float[Array, "heads tokens tokens"] | None = None,
    ) -> Float[Array, "batch groups tokens dim"]:
        qkv = self.qkv(x).reshape(*x.shape[:3], 3, self.num_heads, -1)
        q, k, v = qkv.transpose(3, 0, 1, 4, 2, 5)  # each (batch, groups, heads, tokens, head_dim)
        scores = (q * self.scale) @ k.mT
        scores = scores if bias is None else scores + bias
        y = self.attn_dropout(jax.nn.softmax(scores, axis=-1)) @ v
        y = y.swapaxes(2, 3).reshape(*x.shape[:3], -1)  # (batch, groups, tokens, heads * head_dim)
        return self.proj_dropout(self.proj(y))


class Mlp(nnx.Module):
    """Dense, activation, dense, with a dropout rate for each product."""

    def __init__(
        self,
        config: RegionViTConfig,
        stage: StageConfig,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        linear = partial(Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.fc1 = linear(stage.dim, stage.mlp_dim, use_bias=True)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout1 = nnx.Dropout(config.hidden_dropout_rate, rngs=rngs)
        self.fc2 = linear(stage.mlp_dim, stage.dim, use_bias=True)
        self.dropout2 = nnx.Dropout(config.mlp_dropout_rate, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch groups tokens dim"]
    ) -> Float[Array, "batch groups tokens dim"]:
        x = self.dropout1(self.activation(self.fc1(x)))
        return self.dropout2(self.fc2(x))


class GroupDropPath(DropPath):
    """Stochastic depth of each group of tokens by itself."""

    def __call__(
        self, x: Float[Array, "batch groups tokens dim"]
    ) -> Float[Array, "batch groups tokens dim"]:
        return super().__call__(x.reshape(-1, *x.shape[2:])).reshape(x.shape)


class Block(nnx.Module):
    """Attention among the regional tokens, then in each window with its own, then the MLP.

    The attention is one, called twice. Pre-norm, with stochastic depth; section 3.
    """

    def __init__(
        self,
        config: RegionViTConfig,
        stage: StageConfig,
        index: int,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        dim, eps, rate = stage.dim, config.norm_eps, stage.drop_path_rates[index]
        self.window, self.window_size = stage.window, config.window_size
        table = jnp.zeros((stage.num_heads, config.offsets), param_dtype)
        self.rel_pos = nnx.Param(table) if config.rel_pos == "block" else None
        self.region_norm = LayerNorm(dim, epsilon=eps, **kinds) if config.region_norm else None
        self.norm1 = LayerNorm(dim, epsilon=eps, **kinds)
        self.attn = Attention(config, stage, **kinds)
        self.drop_path1 = GroupDropPath(rate, rngs=rngs)
        self.drop_path2 = GroupDropPath(rate, rngs=rngs)
        self.norm2 = LayerNorm(dim, epsilon=eps, **kinds)
        self.mlp = Mlp(config, stage, **kinds)
        self.drop_path3 = GroupDropPath(rate, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch regions tokens dim"],
        bias: Float[Array, "heads tokens tokens"] | None = None,
    ) -> Float[Array, "batch regions tokens dim"]:
        if self.rel_pos is not None:
            table = self.rel_pos[...].astype(x.dtype)
            bias = window_bias(table, self.window, self.window_size)
        region_norm = self.norm1 if self.region_norm is None else self.region_norm
        regions = x[:, None, :, 0]  # (batch, 1, regions, dim): one group
        regions = regions + self.drop_path1(self.attn(region_norm(regions)))
        x = jnp.concat([regions.swapaxes(1, 2), x[:, :, 1:]], axis=2)
        x = x + self.drop_path2(self.attn(self.norm1(x), bias))
        x = x + self.drop_path3(self.mlp(self.norm2(x)))
        return x


class Stage(nnx.Module):
    """Downsampling, but in the first, and blocks over grids that stay as they are."""

    def __init__(
        self,
        config: RegionViTConfig,
        stage: StageConfig,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.config, self.stage = config, stage
        table = jnp.zeros((stage.num_heads, config.offsets), param_dtype)
        self.rel_pos = nnx.Param(table) if config.rel_pos == "stage" else None
        self.downsample = (
            identity
            if stage.in_dim is None
            else Downsample(config, stage.in_dim, stage.dim, **kinds)
        )
        self.peg = PEG(config, stage, **kinds) if stage.has_peg else None
        self.blocks = nnx.List(
            [Block(config, stage, i, **kinds) for i in range(len(stage.drop_path_rates))]
        )

    def __call__(
        self,
        regions: Float[Array, "batch rows columns dim"],
        x: Float[Array, "batch height width dim"],
    ) -> tuple[Array, Array]:
        regions, x = self.downsample(regions), self.downsample(x)
        if self.peg is not None and self.config.peg == "local":
            x = self.peg(x)
        bias = None
        if self.rel_pos is not None:
            table = self.rel_pos[...].astype(x.dtype)
            bias = window_bias(table, self.stage.window, self.config.window_size)
        x = to_windows(regions, x)
        for i, block in enumerate(self.blocks):
            x = block(x, bias)
            if i == 0 and self.peg is not None and self.config.peg == "both":
                regions, x = from_windows(x, self.stage)
                x = to_windows(self.peg(regions), self.peg(x))
        return from_windows(x, self.stage)


class RegionViT(nnx.Module):
    """RegionViT.

    Called with (batch, height, width, channels) images of ``config.image_size``; returns
    (batch, num_classes) logits, or the pooled features where the config has no head.

    Args:
        config: see ``RegionViTConfig``.
        dtype: of the computation.
        param_dtype: of the parameters.
        rngs: streams ``params`` and ``dropout``.
    """

    def __init__(
        self,
        config: RegionViTConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.config, self.dtype = config, dtype
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        dim, classes = config.feature_dim, config.num_classes
        local_embed = ConvStem if config.stem_dims else ConvEmbed
        self.local_embed = local_embed(config, **kinds)
        self.region_embed = RegionEmbed(config, **kinds)
        self.dropout = nnx.Dropout(config.embed_dropout_rate, rngs=rngs)
        self.stages = nnx.List([Stage(config, stage, **kinds) for stage in config.stages])
        self.norm = LayerNorm(dim, epsilon=config.norm_eps, **kinds)
        self.head = Linear(dim, classes, use_bias=True, **kinds) if classes else identity

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch features"]:
        self.config.check_images(images.shape)
        x = self.dropout(self.local_embed(images))
        regions = self.region_embed(images)
        for stage in self.stages:
            regions, x = stage(regions, x)  # (batch, rows, columns, dim) both
        regions = regions.reshape(regions.shape[0], -1, regions.shape[-1])  # (batch, regions, dim)
        if self.config.final_norm == "pooled":
            regions = self.norm(regions.mean(axis=1))
        else:
            regions = self.norm(regions).mean(axis=1)
        return self.head(regions)
