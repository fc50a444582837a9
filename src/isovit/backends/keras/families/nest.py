"""NesT in Keras.

Source: Zhang et al. 2022, arXiv:2105.12723, section 3; the official code (Apache-2.0) and
vit-pytorch's ``nest.py`` (MIT); see the spec for the differences.
"""

from __future__ import annotations

import math
from functools import reduce

import keras
from jaxtyping import Float
from keras import ops

from isovit.backends import exporting
from isovit.backends.keras.idle import Dropout, Identity
from isovit.backends.keras.layers import (
    Block,
    Conv,
    DType,
    Linear,
    SpecModel,
    Tensor,
    attention,
    layer_norm,
)
from isovit.spec.blocks import BlockConfig
from isovit.spec.families.nest import POOL_KERNEL, POOL_STRIDE, Level, NesTConfig


def to_blocks(
    x: Float[Tensor, "batch rows columns dim"], level: Level
) -> Float[Tensor, "batch blocks tokens dim"]:
    """An image cut into blocks, row by row, and each block into tokens, row by row."""
    (down, across), (height, width) = level.block_grid, level.block_size
    x = ops.reshape(x, (-1, down, height, across, width, level.dim))
    x = ops.swapaxes(x, 2, 3)  # (batch, down, across, height, width, dim)
    return ops.reshape(x, (-1, level.blocks, level.block_tokens, level.dim))


def to_image(
    x: Float[Tensor, "batch tokens dim"], level: Level
) -> Float[Tensor, "batch rows columns dim"]:
    """The image again, from its tokens, block after block."""
    x = ops.reshape(x, (-1, *level.block_grid, *level.block_size, level.dim))
    x = ops.swapaxes(x, 2, 3)  # (batch, down, height, across, width, dim)
    return ops.reshape(x, (-1, *level.grid, level.dim))


def max_pool(
    x: Float[Tensor, "batch rows columns dim"], padding: tuple[int, int]
) -> Float[Tensor, "batch half_rows half_columns dim"]:
    """The largest of 3 x 3 numbers, at every second; ``padding`` before and after both axes."""
    x = ops.pad(x, ((0, 0), padding, padding, (0, 0)), constant_values=-math.inf)
    if exporting.get() and keras.backend.backend() == "jax":  # jax2onnx pools along other axes
        rows, columns = (side + 1 - POOL_KERNEL for side in x.shape[1:3])
        down = [slice(i, i + rows, POOL_STRIDE) for i in range(POOL_KERNEL)]
        right = [slice(j, j + columns, POOL_STRIDE) for j in range(POOL_KERNEL)]
        return reduce(ops.maximum, [x[:, i, j] for i in down for j in right])
    kernel, stride = (POOL_KERNEL, POOL_KERNEL), (POOL_STRIDE, POOL_STRIDE)
    return ops.max_pool(x, kernel, stride, padding="valid", data_format="channels_last")


class ConvPatchEmbed(keras.layers.Layer):
    """A convolution whose stride is its kernel."""

    def __init__(self, config: NesTConfig, *, name: str, dtype: DType = None) -> None:
        super().__init__(name=name, dtype=dtype)
        self.proj = Conv(
            config.embed_dims[0],
            kernel_size=config.patch_size,
            stride=config.patch_size,
            padding=(0, 0),
            use_bias=True,
            name="proj",
            dtype=self.dtype_policy,
        )

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.proj.build(input_shape)

    def call(
        self, images: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch rows columns dim"]:
        return self.proj(images)


class NormLinearNormPatchEmbed(keras.layers.Layer):
    """LayerNorm, dense, LayerNorm over patches flattened as (height, width, channel)."""

    def __init__(self, config: NesTConfig, *, name: str, dtype: DType = None) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype = self.dtype_policy
        self.dim, eps = config.embed_dims[0], config.norm_eps
        self.patch_size, self.grid = config.patch_size, config.grid
        self.patch_dim = config.patch_dim
        self.norm1 = layer_norm(eps, name="norm1", dtype=dtype)
        self.proj = Linear(self.dim, use_bias=True, name="proj", dtype=dtype)
        self.norm2 = layer_norm(eps, name="norm2", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.norm1.build((None, *self.grid, self.patch_dim))
        self.proj.build((None, *self.grid, self.patch_dim))
        self.norm2.build((None, *self.grid, self.dim))

    def call(
        self, images: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch rows columns dim"]:
        (height, width), (rows, columns) = self.patch_size, self.grid
        x = ops.reshape(images, (-1, rows, height, columns, width, images.shape[-1]))
        x = ops.swapaxes(x, 2, 3)  # (batch, rows, columns, height, width, channels)
        x = ops.reshape(x, (-1, rows, columns, self.patch_dim))
        return self.norm2(self.proj(self.norm1(x)))


PATCH_EMBEDS = {"conv": ConvPatchEmbed, "norm_linear_norm": NormLinearNormPatchEmbed}


class BlockAttention(keras.layers.Layer):
    """Multi-head self-attention within each block; section 3.1.

    It gets the tokens of all blocks, one after another: nothing else in a layer knows of blocks.
    """

    def __init__(self, config: BlockConfig, blocks: int, *, name: str, dtype: DType = None) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype = self.dtype_policy
        self.num_heads, self.blocks = config.num_heads, blocks
        self.head_dim, self.inner_dim = config.head_dim, config.inner_dim
        self.scale = config.attn_scale
        self.qkv = Linear(3 * config.inner_dim, use_bias=config.qkv_bias, name="qkv", dtype=dtype)
        self.attn_dropout = Dropout(config.attn_dropout_rate, name="attn_dropout", dtype=dtype)
        self.proj = Linear(config.dim, use_bias=True, name="proj", dtype=dtype)
        self.proj_dropout = Dropout(config.dropout_rate, name="proj_dropout", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.qkv.build(input_shape)
        self.proj.build((*input_shape[:-1], self.inner_dim))

    def call(
        self, x: Float[Tensor, "batch tokens dim"], training: bool | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        tokens, heads, head_dim = x.shape[1], self.num_heads, self.head_dim
        inside = tokens // self.blocks
        qkv = ops.reshape(self.qkv(x), (-1, self.blocks, inside, 3, heads, head_dim))
        qkv = ops.transpose(qkv, (3, 0, 1, 4, 2, 5))  # (3, batch, blocks, heads, tokens, head_dim)
        qkv = ops.reshape(qkv, (3, -1, self.blocks * heads, inside, head_dim))
        q, k, v = qkv[0], qkv[1], qkv[2]  # each (batch, blocks * heads, tokens, head_dim)
        x = attention(q, k, v, self.scale, self.attn_dropout, training)
        x = ops.reshape(x, (-1, self.blocks, heads, inside, head_dim))
        x = ops.swapaxes(x, 2, 3)  # (batch, blocks, tokens, heads, head_dim)
        x = ops.reshape(x, (-1, tokens, self.inner_dim))
        return self.proj_dropout(self.proj(x), training=training)


class ConvPool(keras.layers.Layer):
    """Block aggregation: convolution, LayerNorm, max pooling over the whole image; section 3.1."""

    def __init__(self, config: NesTConfig, dim: int, *, name: str, dtype: DType = None) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype = self.dtype_policy
        self.dim = dim
        self.padding = (0, 1) if config.pool_padding == "end" else (1, 1)
        self.conv = Conv(
            dim,
            kernel_size=(POOL_KERNEL, POOL_KERNEL),
            stride=(1, 1),
            padding=(1, 1),
            use_bias=True,
            name="conv",
            dtype=dtype,
        )
        self.norm = layer_norm(config.norm_eps, name="norm", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.conv.build(input_shape)
        self.norm.build((*input_shape[:-1], self.dim))

    def call(
        self, x: Float[Tensor, "batch rows columns dim"]
    ) -> Float[Tensor, "batch half_rows half_columns dim_out"]:
        return max_pool(self.norm(self.conv(x)), self.padding)


class NesTLevel(keras.layers.Layer):
    """One level of the hierarchy: aggregation, but in the first, positions, layers."""

    def __init__(self, config: NesTConfig, level: Level, *, name: str, dtype: DType = None) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype = self.dtype_policy
        self.level = level
        self.pool = (
            Identity(name="pool", dtype=dtype)
            if level.input_dim is None
            else ConvPool(config, level.dim, name="pool", dtype=dtype)
        )
        self.blocks = [
            Block(
                layer,
                BlockAttention(layer, level.blocks, name="attn", dtype=dtype),
                name=f"blocks_{i}",
                dtype=dtype,
            )
            for i, layer in enumerate(level.layers)
        ]

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        level = self.level
        self.pos_embed = self.add_weight(
            shape=level.pos_embed_shape,
            initializer="zeros",
            trainable=level.pos_embed_trains,
            name="pos_embed",
        )
        self.pool.build(input_shape)
        for block in self.blocks:
            block.build((None, level.tokens, level.dim))

    def call(
        self, x: Float[Tensor, "batch rows columns dim"], training: bool | None = None
    ) -> Float[Tensor, "batch rows_out columns_out dim_out"]:
        x = to_blocks(self.pool(x), self.level)  # (batch, blocks, tokens, dim)
        x = x + (self.pos_embed if self.level.per_channel else self.pos_embed[:, None])
        x = ops.reshape(x, (-1, self.level.tokens, self.level.dim))  # (batch, blocks * tokens, dim)
        for block in self.blocks:
            x = block(x, training=training)
        return to_image(x, self.level)


@keras.saving.register_keras_serializable(package="isovit")
class NesT(SpecModel):
    """Nested Hierarchical Transformer.

    Called with (batch, height, width, channels) images of ``config.image_size``; returns
    (batch, num_classes) logits, or the pooled features where the config has no head.

    Args:
        config: see ``NesTConfig``.
        name: of the model.
        dtype: policy, ``float32`` or ``mixed_bfloat16`` for example; None for the global one.
    """

    def __init__(self, config: NesTConfig, *, name: str = "nest", dtype: DType = None) -> None:
        super().__init__(config, name=name, dtype=dtype)
        dtype, classes = self.dtype_policy, config.num_classes
        self.patch_embed = PATCH_EMBEDS[config.patch_embed](config, name="patch_embed", dtype=dtype)
        self.levels = [
            NesTLevel(config, level, name=f"levels_{i}", dtype=dtype)
            for i, level in enumerate(config.levels)
        ]
        self.norm = layer_norm(config.norm_eps, name="norm", dtype=dtype)
        self.head_dropout = Dropout(config.head_dropout_rate, name="head_dropout", dtype=dtype)
        self.head = (
            Linear(classes, use_bias=True, name="head", dtype=dtype)
            if classes
            else Identity(name="head", dtype=dtype)
        )

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        numbers, dim = self.config.levels, self.config.feature_dim
        self.patch_embed.build(input_shape)
        x = (None, *self.config.grid, numbers[0].dim)
        for level, layer in zip(numbers, self.levels, strict=True):
            layer.build(x)
            x = (None, *level.grid, level.dim)
        self.norm.build(x)
        self.head.build((None, dim))

    def call(
        self, images: Float[Tensor, "batch height width channels"], training: bool | None = None
    ) -> Float[Tensor, "batch features"]:
        x = self.patch_embed(self.checked(images))  # (batch, rows, columns, dim)
        for level in self.levels:
            x = level(x, training=training)
        x = ops.mean(self.norm(x), axis=(1, 2))
        return self.head(self.head_dropout(x, training=training))
