"""RegionViT in Keras.

Source: Chen, Panda & Fan 2022, arXiv:2106.02689, section 3; the official code (Apache-2.0) and, for
the other form, vit-pytorch's ``regionvit.py`` (MIT); see the spec for the differences.
"""

from __future__ import annotations

from functools import partial

import keras
import numpy as np
from jaxtyping import Float
from keras import ops

from isovit.backends.keras.idle import Dropout, Identity
from isovit.backends.keras.layers import (
    ACTIVATIONS,
    Conv,
    DepthwiseConv,
    DropPath,
    DType,
    Linear,
    SpecModel,
    Tensor,
    layer_norm,
)
from isovit.spec.families.regionvit import RegionViTConfig, StageConfig


def to_windows(
    regions: Float[Tensor, "batch rows columns dim"], x: Float[Tensor, "batch height width dim"]
) -> Float[Tensor, "batch regions tokens dim"]:
    """Each regional token with the local ones of its window behind it; both row by row."""
    (_, rows, columns, dim), (_, height, width, _) = regions.shape, x.shape
    tokens = height * width // (rows * columns)
    x = ops.reshape(x, (-1, rows, height // rows, columns, width // columns, dim))
    x = ops.swapaxes(x, 2, 3)  # (batch, rows, columns, height / rows, width / columns, dim)
    x = ops.reshape(x, (-1, rows * columns, tokens, dim))
    regions = ops.reshape(regions, (-1, rows * columns, 1, dim))
    return ops.concatenate([regions, x], axis=2)


def from_windows(
    x: Float[Tensor, "batch regions tokens dim"], stage: StageConfig
) -> tuple[Float[Tensor, "batch rows columns dim"], Float[Tensor, "batch height width dim"]]:
    """The two grids of ``to_windows``."""
    dim = x.shape[-1]
    regions = ops.reshape(x[:, :, 0], (-1, *stage.region_grid, dim))
    x = ops.reshape(x[:, :, 1:], (-1, *stage.region_grid, *stage.window, dim))
    x = ops.swapaxes(x, 2, 3)  # (batch, rows, height / rows, columns, width / columns, dim)
    return regions, ops.reshape(x, (-1, *stage.grid, dim))


def window_bias(
    table: Float[Tensor, "heads offsets"], window: tuple[int, int], size: int
) -> Float[Tensor, "heads tokens tokens"]:
    """The bias of each query and key of a window: that of the offset from one to the other.

    Offsets of -size + 1 to size - 1 rows, and as many columns, lie in the table row by row. The
    regional token, the first, has none, as query or as key.
    """
    rows, columns = (np.arange(side) for side in window)
    down, across = (place - place[:, None] + size - 1 for place in (rows, columns))
    # (rows, columns, key rows, key columns), as places in the flat table
    places = down[:, None, :, None] * (2 * size - 1) + across[None, :, None, :]
    places = places.reshape(len(rows) * len(columns), -1)
    bias = ops.take(ops.transpose(table), places, axis=0)  # (tokens, tokens, heads)
    bias = ops.transpose(bias, (2, 0, 1))
    return ops.pad(bias, ((0, 0), (1, 0), (1, 0)))


class ConvEmbed(keras.layers.Layer):
    """The local tokens of a larger model: a convolution whose kernel is two strides wide."""

    def __init__(self, config: RegionViTConfig, *, name: str, dtype: DType = None) -> None:
        super().__init__(name=name, dtype=dtype)
        side = config.patch_size
        self.proj = Conv(
            config.embed_dims[0],
            kernel_size=(2 * side, 2 * side),
            stride=(side, side),
            padding=(side - 1, side - 1),
            use_bias=True,
            name="proj",
            dtype=self.dtype_policy,
        )

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.proj.build((None, None, None, input_shape[-1]))

    def call(
        self, images: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch rows columns dim"]:
        return self.proj(images)


class ConvStem(keras.layers.Layer):
    """The local tokens of a smaller model: three convolutions, of which two halve the image."""

    def __init__(self, config: RegionViTConfig, *, name: str, dtype: DType = None) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype, eps = self.dtype_policy, config.embed_norm_eps
        square = partial(Conv, kernel_size=(3, 3), padding=(1, 1), use_bias=True, dtype=dtype)
        self.dims = first, second = config.stem_dims
        self.activation = ACTIVATIONS[config.activation]
        self.conv1 = square(first, stride=(2, 2), name="conv1")
        self.norm1 = layer_norm(eps, name="norm1", dtype=dtype)
        self.conv2 = square(second, stride=(2, 2), name="conv2")
        self.norm2 = layer_norm(eps, name="norm2", dtype=dtype)
        self.conv3 = square(config.embed_dims[0], stride=(1, 1), name="conv3")

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        first, second = self.dims
        self.conv1.build((None, None, None, input_shape[-1]))
        self.norm1.build((None, None, None, first))
        self.conv2.build((None, None, None, first))
        self.norm2.build((None, None, None, second))
        self.conv3.build((None, None, None, second))

    def call(
        self, images: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch rows columns dim"]:
        x = self.activation(self.norm1(self.conv1(images)))
        x = self.activation(self.norm2(self.conv2(x)))
        return self.conv3(x)


class RegionEmbed(keras.layers.Layer):
    """The regional tokens: a product over all pixels of a region, (channel, height, width)."""

    def __init__(self, config: RegionViTConfig, *, name: str, dtype: DType = None) -> None:
        super().__init__(name=name, dtype=dtype)
        self.side, self.region_dim = config.region_size, config.region_dim
        self.proj = Linear(
            config.embed_dims[0], use_bias=True, name="proj", dtype=self.dtype_policy
        )

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        _, height, width, _ = input_shape
        self.proj.build((None, height // self.side, width // self.side, self.region_dim))

    def call(
        self, images: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch rows columns dim"]:
        (_, height, width, channels), side = images.shape, self.side
        rows, columns = height // side, width // side
        x = ops.reshape(images, (-1, rows, side, columns, side, channels))
        x = ops.transpose(x, (0, 1, 3, 5, 2, 4))  # (batch, rows, columns, channels, side, side)
        return self.proj(ops.reshape(x, (-1, rows, columns, self.region_dim)))


class Downsample(keras.layers.Layer):
    """A convolution that halves a grid of tokens, behind LayerNorm and activation or not."""

    def __init__(
        self, config: RegionViTConfig, in_dim: int, dim: int, *, name: str, dtype: DType = None
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype, normed = self.dtype_policy, config.downsample == "norm_conv"
        self.norm = (
            layer_norm(config.embed_norm_eps, name="norm", dtype=dtype)
            if normed
            else Identity(name="norm", dtype=dtype)
        )
        self.activation = ACTIVATIONS[config.activation] if normed else keras.activations.linear
        self.conv = Conv(
            dim,
            kernel_size=(3, 3),
            stride=(2, 2),
            padding=(1, 1),
            groups=in_dim if normed else 1,
            use_bias=True,
            name="conv",
            dtype=dtype,
        )

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.norm.build(input_shape)
        self.conv.build((None, None, None, input_shape[-1]))

    def call(
        self, x: Float[Tensor, "batch rows columns dim"]
    ) -> Float[Tensor, "batch half_rows half_columns dim_out"]:
        return self.conv(self.activation(self.norm(x)))


class PEG(keras.layers.Layer):
    """Positional encoding generator: x + depthwise convolution of x; arXiv:2102.10882, section 4.

    The zeros around the grid are what tells a token where it is.
    """

    def __init__(self, config: RegionViTConfig, *, name: str, dtype: DType = None) -> None:
        super().__init__(name=name, dtype=dtype)
        self.proj = DepthwiseConv(
            kernel_size=(3, 3),
            stride=(1, 1),
            padding=(1, 1),
            use_bias=config.peg == "local",
            name="proj",
            dtype=self.dtype_policy,
        )

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.proj.build((None, None, None, input_shape[-1]))

    def call(
        self, x: Float[Tensor, "batch rows columns dim"]
    ) -> Float[Tensor, "batch rows columns dim"]:
        return x + self.proj(x)


class Attention(keras.layers.Layer):
    """Multi-head self-attention within each group of tokens: softmax(q·kᵀ · scale + bias)·v."""

    def __init__(
        self, config: RegionViTConfig, stage: StageConfig, *, name: str, dtype: DType = None
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype, self.inner = self.dtype_policy, stage.inner_dim
        self.num_heads, self.head_dim = stage.num_heads, stage.head_dim
        self.scale = config.attn_scale or stage.head_dim**-0.5
        self.qkv = Linear(3 * self.inner, use_bias=config.qkv_bias, name="qkv", dtype=dtype)
        self.attn_dropout = Dropout(config.attn_dropout_rate, name="attn_dropout", dtype=dtype)
        self.proj = Linear(stage.dim, use_bias=True, name="proj", dtype=dtype)
        self.proj_dropout = Dropout(config.proj_dropout_rate, name="proj_dropout", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.qkv.build(input_shape)
        self.proj.build((*input_shape[:-1], self.inner))

    def call(
        self,
        x: Float[Tensor, "batch groups tokens dim"],
        bias: Float[Tensor, "heads tokens tokens"] | None = None,
        training: bool | None = None,
    ) -> Float[Tensor, "batch groups tokens dim"]:
        _, groups, tokens, _ = x.shape
        qkv = ops.reshape(self.qkv(x), (-1, groups, tokens, 3, self.num_heads, self.head_dim))
        qkv = ops.transpose(qkv, (3, 0, 1, 4, 2, 5))
        q, k, v = qkv[0], qkv[1], qkv[2]  # each (batch, groups, heads, tokens, head_dim)
        scores = ops.matmul(q * self.scale, ops.swapaxes(k, -2, -1))
        scores = scores if bias is None else scores + bias
        weights = self.attn_dropout(ops.softmax(scores, axis=-1), training=training)
        x = ops.swapaxes(ops.matmul(weights, v), 2, 3)  # (batch, groups, tokens, heads, head_dim)
        x = ops.reshape(x, (-1, groups, tokens, self.inner))
        return self.proj_dropout(self.proj(x), training=training)


class Mlp(keras.layers.Layer):
    """Dense, activation, dense, with a dropout rate for each product."""

    def __init__(
        self, config: RegionViTConfig, stage: StageConfig, *, name: str, dtype: DType = None
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype, self.hidden_dim = self.dtype_policy, stage.mlp_dim
        self.fc1 = Linear(stage.mlp_dim, use_bias=True, name="fc1", dtype=dtype)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout1 = Dropout(config.hidden_dropout_rate, name="dropout1", dtype=dtype)
        self.fc2 = Linear(stage.dim, use_bias=True, name="fc2", dtype=dtype)
        self.dropout2 = Dropout(config.mlp_dropout_rate, name="dropout2", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.fc1.build(input_shape)
        self.fc2.build((*input_shape[:-1], self.hidden_dim))

    def call(
        self, x: Float[Tensor, "batch groups tokens dim"], training: bool | None = None
    ) -> Float[Tensor, "batch groups tokens dim"]:
        x = self.dropout1(self.activation(self.fc1(x)), training=training)
        return self.dropout2(self.fc2(x), training=training)


class GroupDropPath(DropPath):
    """Stochastic depth of each group of tokens by itself."""

    def call(
        self, x: Float[Tensor, "batch groups tokens dim"], training: bool | None = None
    ) -> Float[Tensor, "batch groups tokens dim"]:
        _, *shape = x.shape
        y = super().call(ops.reshape(x, (-1, *shape[1:])), training=training)
        return ops.reshape(y, (-1, *shape))


class Block(keras.layers.Layer):
    """Attention among the regional tokens, then in each window with its own, then the MLP.

    The attention is one, called twice. Pre-norm, with stochastic depth; section 3.
    """

    def __init__(
        self,
        config: RegionViTConfig,
        stage: StageConfig,
        index: int,
        *,
        name: str,
        dtype: DType = None,
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype, eps, rate = self.dtype_policy, config.norm_eps, stage.drop_path_rates[index]
        self.config, self.stage, self.rel_pos = config, stage, None
        self.region_norm = (
            layer_norm(eps, name="region_norm", dtype=dtype) if config.region_norm else None
        )
        self.norm1 = layer_norm(eps, name="norm1", dtype=dtype)
        self.attn = Attention(config, stage, name="attn", dtype=dtype)
        self.drop_path1 = GroupDropPath(rate, name="drop_path1", dtype=dtype)
        self.drop_path2 = GroupDropPath(rate, name="drop_path2", dtype=dtype)
        self.norm2 = layer_norm(eps, name="norm2", dtype=dtype)
        self.mlp = Mlp(config, stage, name="mlp", dtype=dtype)
        self.drop_path3 = GroupDropPath(rate, name="drop_path3", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        if self.config.rel_pos == "block":
            shape = (self.stage.num_heads, self.config.offsets)
            self.rel_pos = self.add_weight(shape=shape, initializer="zeros", name="rel_pos")
        if self.region_norm is not None:
            self.region_norm.build((None, 1, self.stage.regions, self.stage.dim))
        for layer in (self.norm1, self.attn, self.norm2, self.mlp):
            layer.build(input_shape)

    def call(
        self,
        x: Float[Tensor, "batch regions tokens dim"],
        bias: Float[Tensor, "heads tokens tokens"] | None = None,
        training: bool | None = None,
    ) -> Float[Tensor, "batch regions tokens dim"]:
        if self.rel_pos is not None:
            bias = window_bias(self.rel_pos, self.stage.window, self.config.window_size)
        region_norm = self.norm1 if self.region_norm is None else self.region_norm
        regions = ops.expand_dims(x[:, :, 0], 1)  # (batch, 1, regions, dim): one group
        y = self.attn(region_norm(regions), training=training)
        regions = regions + self.drop_path1(y, training=training)
        x = ops.concatenate([ops.swapaxes(regions, 1, 2), x[:, :, 1:]], axis=2)
        y = self.attn(self.norm1(x), bias, training=training)
        x = x + self.drop_path2(y, training=training)
        x = x + self.drop_path3(self.mlp(self.norm2(x), training=training), training=training)
        return x


class Stage(keras.layers.Layer):
    """Downsampling, but in the first, and blocks over grids that stay as they are."""

    def __init__(
        self, config: RegionViTConfig, stage: StageConfig, *, name: str, dtype: DType = None
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype = self.dtype_policy
        self.config, self.stage, self.rel_pos = config, stage, None
        self.downsample = (
            Identity(name="downsample", dtype=dtype)
            if stage.in_dim is None
            else Downsample(config, stage.in_dim, stage.dim, name="downsample", dtype=dtype)
        )
        self.peg = PEG(config, name="peg", dtype=dtype) if stage.has_peg else None
        self.blocks = [
            Block(config, stage, i, name=f"blocks_{i}", dtype=dtype)
            for i in range(len(stage.drop_path_rates))
        ]

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        stage = self.stage
        if self.config.rel_pos == "stage":
            shape = (stage.num_heads, self.config.offsets)
            self.rel_pos = self.add_weight(shape=shape, initializer="zeros", name="rel_pos")
        self.downsample.build(input_shape)
        if self.peg is not None:
            self.peg.build((None, *stage.grid, stage.dim))
        for block in self.blocks:
            block.build((None, stage.regions, stage.tokens, stage.dim))

    def call(
        self,
        regions: Float[Tensor, "batch rows columns dim"],
        x: Float[Tensor, "batch height width dim"],
        training: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        regions, x = self.downsample(regions), self.downsample(x)
        if self.peg is not None and self.config.peg == "local":
            x = self.peg(x)
        bias = None
        if self.rel_pos is not None:
            bias = window_bias(self.rel_pos, self.stage.window, self.config.window_size)
        x = to_windows(regions, x)
        for i, block in enumerate(self.blocks):
            x = block(x, bias, training=training)
            if i == 0 and self.peg is not None and self.config.peg == "both":
                regions, x = from_windows(x, self.stage)
                x = to_windows(self.peg(regions), self.peg(x))
        return from_windows(x, self.stage)


@keras.saving.register_keras_serializable(package="isovit")
class RegionViT(SpecModel):
    """RegionViT.

    Called with (batch, height, width, channels) images of ``config.image_size``; returns
    (batch, num_classes) logits, or the pooled features where the config has no head.

    Args:
        config: see ``RegionViTConfig``.
        name: of the model.
        dtype: policy, ``float32`` or ``mixed_bfloat16`` for example; None for the global one.
    """

    def __init__(
        self, config: RegionViTConfig, *, name: str = "regionvit", dtype: DType = None
    ) -> None:
        super().__init__(config, name=name, dtype=dtype)
        dtype = self.dtype_policy
        local_embed = ConvStem if config.stem_dims else ConvEmbed
        self.local_embed = local_embed(config, name="local_embed", dtype=dtype)
        self.region_embed = RegionEmbed(config, name="region_embed", dtype=dtype)
        self.dropout = Dropout(config.embed_dropout_rate, name="dropout", dtype=dtype)
        self.stages = [
            Stage(config, stage, name=f"stages_{i}", dtype=dtype)
            for i, stage in enumerate(config.stages)
        ]
        self.norm = layer_norm(config.norm_eps, name="norm", dtype=dtype)
        self.head = (
            Linear(config.num_classes, use_bias=True, name="head", dtype=dtype)
            if config.num_classes > 0
            else Identity(name="head", dtype=dtype)
        )

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.local_embed.build(input_shape)
        self.region_embed.build(input_shape)
        first, last = self.config.stages[0], self.config.stages[-1]
        shape = (None, *first.grid, first.dim)
        for layer, stage in zip(self.stages, self.config.stages, strict=True):
            layer.build(shape)
            shape = (None, *stage.grid, stage.dim)
        lead = () if self.config.final_norm == "pooled" else (last.regions,)
        self.norm.build((None, *lead, last.dim))
        self.head.build((None, last.dim))

    def call(
        self, images: Float[Tensor, "batch height width channels"], training: bool | None = None
    ) -> Float[Tensor, "batch features"]:
        images = self.checked(images)
        x = self.dropout(self.local_embed(images), training=training)
        regions = self.region_embed(images)
        for stage in self.stages:
            regions, x = stage(regions, x, training=training)  # (batch, rows, columns, dim) both
        _, rows, columns, dim = regions.shape
        regions = ops.reshape(regions, (-1, rows * columns, dim))  # (batch, regions, dim)
        if self.config.final_norm == "pooled":
            regions = self.norm(ops.mean(regions, axis=1))
        else:
            regions = ops.mean(self.norm(regions), axis=1)
        return self.head(regions)
