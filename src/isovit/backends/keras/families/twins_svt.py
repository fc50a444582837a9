"""Twins-SVT in Keras.

Source: Chu et al. 2021, arXiv:2104.13840, section 3.2; the official code as timm has it
(Apache-2.0) and, for the other form, vit-pytorch's ``twins_svt.py`` (MIT); see the spec.
"""

from __future__ import annotations

from functools import partial

import keras
from jaxtyping import Float
from keras import ops

from isovit.backends.keras.idle import Dropout, Identity
from isovit.backends.keras.layers import (
    Block,
    Conv,
    DepthwiseConv,
    DType,
    Linear,
    SpecModel,
    Tensor,
    attention,
    layer_norm,
    split_heads,
)
from isovit.spec.blocks import BlockConfig
from isovit.spec.families.twins_svt import StageConfig, TwinsSVTConfig


def to_windows(
    x: Float[Tensor, "batch rows columns dim"], size: int
) -> Float[Tensor, "windows tokens dim"]:
    """Square windows that tile an image, row by row; they come to lie along the batch."""
    _, rows, columns, dim = x.shape
    x = ops.reshape(x, (-1, rows // size, size, columns // size, size, dim))
    x = ops.swapaxes(x, 2, 3)  # (batch, rows / size, columns / size, size, size, dim)
    return ops.reshape(x, (-1, size * size, dim))


def from_windows(
    x: Float[Tensor, "windows tokens dim"], size: int, grid: tuple[int, int]
) -> Float[Tensor, "batch rows columns dim"]:
    """The images of ``to_windows``, with so many rows and columns."""
    (rows, columns), dim = grid, x.shape[-1]
    x = ops.reshape(x, (-1, rows // size, columns // size, size, size, dim))
    x = ops.swapaxes(x, 2, 3)  # (batch, rows / size, size, columns / size, size, dim)
    return ops.reshape(x, (-1, rows, columns, dim))


def fix(layer: Linear) -> None:
    """Leave a layer out of training."""
    for variable in layer.weights:
        variable.trainable = False


class ConvNormPatchEmbed(keras.layers.Layer):
    """A convolution whose stride is its kernel, then LayerNorm."""

    def __init__(
        self, config: TwinsSVTConfig, stage: StageConfig, *, name: str, dtype: DType = None
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype, side = self.dtype_policy, stage.patch_size
        self.tokens, self.dim = stage.tokens, stage.dim
        self.proj = Conv(
            stage.dim,
            kernel_size=(side, side),
            stride=(side, side),
            padding=(0, 0),
            use_bias=True,
            name="proj",
            dtype=dtype,
        )
        self.norm = layer_norm(config.embed_norm_eps, name="norm", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.proj.build(input_shape)
        self.norm.build((None, self.tokens, self.dim))

    def call(
        self, x: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch tokens dim"]:
        x = self.proj(x)  # (batch, rows, columns, dim)
        return self.norm(ops.reshape(x, (-1, self.tokens, self.dim)))


class NormLinearNormPatchEmbed(keras.layers.Layer):
    """LayerNorm, dense, LayerNorm over patches flattened as (channel, height, width)."""

    def __init__(
        self, config: TwinsSVTConfig, stage: StageConfig, *, name: str, dtype: DType = None
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype, eps = self.dtype_policy, config.embed_norm_eps
        self.side, self.tokens = stage.patch_size, stage.tokens
        self.patch_dim, self.dim = stage.patch_dim, stage.dim
        self.norm1 = layer_norm(eps, name="norm1", dtype=dtype)
        self.proj = Linear(stage.dim, use_bias=True, name="proj", dtype=dtype)
        self.norm2 = layer_norm(eps, name="norm2", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        patches = (None, self.tokens, self.patch_dim)
        self.norm1.build(patches)
        self.proj.build(patches)
        self.norm2.build((None, self.tokens, self.dim))

    def call(
        self, x: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch tokens dim"]:
        (_, height, width, channels), side = x.shape, self.side
        x = ops.reshape(x, (-1, height // side, side, width // side, side, channels))
        x = ops.transpose(x, (0, 1, 3, 5, 2, 4))  # (batch, rows, columns, channels, side, side)
        x = ops.reshape(x, (-1, self.tokens, self.patch_dim))
        return self.norm2(self.proj(self.norm1(x)))


PATCH_EMBEDS = {"conv_norm": ConvNormPatchEmbed, "norm_linear_norm": NormLinearNormPatchEmbed}


class LocalAttention(keras.layers.Layer):
    """Self-attention within windows, LSA; section 3.2.

    Rows and columns of zeros fill the last windows; their keys and values are the biases.
    """

    def __init__(
        self, stage: StageConfig, block: BlockConfig, *, name: str, dtype: DType = None
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype, self.inner = self.dtype_policy, block.inner_dim
        self.grid, self.padded_grid = stage.grid, stage.padded_grid
        self.window_size, self.num_heads = stage.window_size, block.num_heads
        self.scale = block.attn_scale
        self.qkv = Linear(3 * self.inner, use_bias=block.qkv_bias, name="qkv", dtype=dtype)
        self.attn_dropout = Dropout(block.attn_dropout_rate, name="attn_dropout", dtype=dtype)
        self.proj = Linear(stage.dim, use_bias=True, name="proj", dtype=dtype)
        self.proj_dropout = Dropout(block.dropout_rate, name="proj_dropout", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.qkv.build((None, *self.padded_grid, input_shape[-1]))
        self.proj.build((*input_shape[:-1], self.inner))

    def call(
        self, x: Float[Tensor, "batch tokens dim"], training: bool | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        (_, tokens, dim), (rows, columns) = x.shape, self.grid
        down, right = self.padded_grid[0] - rows, self.padded_grid[1] - columns
        x = ops.reshape(x, (-1, rows, columns, dim))
        x = ops.pad(x, ((0, 0), (0, down), (0, right), (0, 0)))
        qkv = to_windows(self.qkv(x), self.window_size)  # (windows, window tokens, 3 * inner)
        q, k, v = split_heads(qkv, 3, self.num_heads)  # each (windows, heads, ..., head_dim)
        x = attention(q, k, v, self.scale, self.attn_dropout, training)
        x = ops.swapaxes(x, 1, 2)  # (windows, window tokens, heads, head_dim)
        x = ops.reshape(x, (-1, qkv.shape[1], self.inner))
        x = from_windows(x, self.window_size, self.padded_grid)
        x = ops.reshape(x[:, :rows, :columns], (-1, tokens, self.inner))
        return self.proj_dropout(self.proj(x), training=training)


class GlobalAttention(keras.layers.Layer):
    """Attention of every token to a summary of each square of tokens, GSA; section 3.2, eq. 2."""

    def __init__(
        self,
        config: TwinsSVTConfig,
        stage: StageConfig,
        block: BlockConfig,
        *,
        name: str,
        dtype: DType = None,
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype, bias = self.dtype_policy, block.qkv_bias
        dim, self.inner, side = stage.dim, block.inner_dim, (stage.reduction, stage.reduction)
        by_conv = config.reduce == "conv"
        reduces = not by_conv and stage.reduction > 1
        squares = partial(Conv, kernel_size=side, stride=side, padding=(0, 0), dtype=dtype)
        self.grid, self.reduced_grid = stage.grid, stage.reduced_grid
        self.has_one_key = stage.has_one_key
        self.num_heads, self.scale = block.num_heads, block.attn_scale
        self.q = Linear(self.inner, use_bias=bias, name="q", dtype=dtype)
        self.reduce = (
            squares(dim, use_bias=True, name="reduce")
            if reduces
            else Identity(name="reduce", dtype=dtype)
        )
        self.norm = (
            layer_norm(config.reduce_norm_eps, name="norm", dtype=dtype)
            if reduces
            else Identity(name="norm", dtype=dtype)
        )
        self.kv = (
            squares(2 * self.inner, use_bias=bias, name="kv")
            if by_conv
            else Linear(2 * self.inner, use_bias=bias, name="kv", dtype=dtype)
        )
        self.attn_dropout = Dropout(block.attn_dropout_rate, name="attn_dropout", dtype=dtype)
        self.proj = Linear(dim, use_bias=True, name="proj", dtype=dtype)
        self.proj_dropout = Dropout(block.dropout_rate, name="proj_dropout", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.q.build(input_shape)
        if self.has_one_key:  # the weight of one key is 1, whatever q is
            fix(self.q)
        for layer in (self.reduce, self.norm, self.kv):
            layer.build((None, *self.grid, input_shape[-1]))
        self.proj.build((*input_shape[:-1], self.inner))

    def call(
        self, x: Float[Tensor, "batch tokens dim"], training: bool | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        _, tokens, dim = x.shape
        rows, columns = self.reduced_grid
        (q,) = split_heads(self.q(x), 1, self.num_heads)  # (batch, heads, tokens, head_dim)
        x = self.norm(self.reduce(ops.reshape(x, (-1, *self.grid, dim))))
        kv = self.kv(x)  # (batch, rows, columns, 2 * heads * head_dim)
        kv = ops.reshape(kv, (-1, rows * columns, 2 * self.inner))
        k, v = split_heads(kv, 2, self.num_heads)  # each (batch, heads, summaries, head_dim)
        x = attention(q, k, v, self.scale, self.attn_dropout, training)
        x = ops.swapaxes(x, 1, 2)  # (batch, tokens, heads, head_dim)
        x = ops.reshape(x, (-1, tokens, self.inner))
        return self.proj_dropout(self.proj(x), training=training)


class PEG(keras.layers.Layer):
    """Positional encoding generator: x + depthwise convolution of x; arXiv:2102.10882, section 4.

    The zeros around the image are what tells a token where it is.
    """

    def __init__(
        self, config: TwinsSVTConfig, stage: StageConfig, *, name: str, dtype: DType = None
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        size = config.peg_kernel_size
        self.grid = stage.grid
        self.proj = DepthwiseConv(
            kernel_size=(size, size),
            stride=(1, 1),
            padding=(size // 2, size // 2),
            use_bias=True,
            name="proj",
            dtype=self.dtype_policy,
        )

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.proj.build((None, *self.grid, input_shape[-1]))

    def call(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        _, tokens, dim = x.shape
        image = ops.reshape(x, (-1, *self.grid, dim))  # (batch, rows, columns, dim)
        return x + ops.reshape(self.proj(image), (-1, tokens, dim))


class Stage(keras.layers.Layer):
    """Patch embedding, blocks, eq. 1, and the positional encoding behind the first of them."""

    def __init__(
        self, config: TwinsSVTConfig, stage: StageConfig, *, name: str, dtype: DType = None
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype = self.dtype_policy
        self.grid, self.peg_after = stage.grid, stage.peg_after
        self.tokens, self.dim = stage.tokens, stage.dim
        self.patch_embed = PATCH_EMBEDS[config.patch_embed](
            config, stage, name="patch_embed", dtype=dtype
        )
        self.dropout = Dropout(config.embed_dropout_rate, name="dropout", dtype=dtype)
        self.blocks = []
        for i, block in enumerate(stage.blocks):
            attn = (
                LocalAttention(stage, block, name="attn", dtype=dtype)
                if stage.is_local(i)
                else GlobalAttention(config, stage, block, name="attn", dtype=dtype)
            )
            self.blocks.append(Block(block, attn, name=f"blocks_{i}", dtype=dtype))
        self.peg = PEG(config, stage, name="peg", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.patch_embed.build(input_shape)
        for layer in (*self.blocks, self.peg):
            layer.build((None, self.tokens, self.dim))

    def call(
        self, x: Float[Tensor, "batch height width channels"], training: bool | None = None
    ) -> Float[Tensor, "batch rows columns dim"]:
        x = self.dropout(self.patch_embed(x), training=training)  # (batch, tokens, dim)
        for i, block in enumerate(self.blocks, start=1):
            x = block(x, training=training)
            if i == self.peg_after:
                x = self.peg(x)
        return ops.reshape(x, (-1, *self.grid, self.dim))


@keras.saving.register_keras_serializable(package="isovit")
class TwinsSVT(SpecModel):
    """Twins-SVT.

    Called with (batch, height, width, channels) images of ``config.image_size``; returns
    (batch, num_classes) logits, or the pooled features where the config has no head.

    Args:
        config: see ``TwinsSVTConfig``.
        name: of the model.
        dtype: policy, ``float32`` or ``mixed_bfloat16`` for example; None for the global one.
    """

    def __init__(
        self, config: TwinsSVTConfig, *, name: str = "twins_svt", dtype: DType = None
    ) -> None:
        super().__init__(config, name=name, dtype=dtype)
        dtype = self.dtype_policy
        self.stages = [
            Stage(config, stage, name=f"stages_{i}", dtype=dtype)
            for i, stage in enumerate(config.stages)
        ]
        self.norm = (
            layer_norm(config.norm_eps, name="norm", dtype=dtype)
            if config.final_norm == "tokens"
            else Identity(name="norm", dtype=dtype)
        )
        self.dropout = Dropout(config.head_dropout_rate, name="dropout", dtype=dtype)
        self.head = (
            Linear(config.num_classes, use_bias=True, name="head", dtype=dtype)
            if config.num_classes > 0
            else Identity(name="head", dtype=dtype)
        )

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        for layer, stage in zip(self.stages, self.config.stages, strict=True):
            layer.build(input_shape)
            input_shape = (None, *stage.grid, stage.dim)
        last = self.config.stages[-1]
        self.norm.build((None, last.tokens, last.dim))
        self.head.build((None, last.dim))

    def call(
        self, images: Float[Tensor, "batch height width channels"], training: bool | None = None
    ) -> Float[Tensor, "batch ..."]:
        x = self.checked(images)
        for stage in self.stages:
            x = stage(x, training=training)  # (batch, rows, columns, dim)
        _, rows, columns, dim = x.shape
        x = self.norm(ops.reshape(x, (-1, rows * columns, dim)))  # (batch, tokens, dim)
        if self.config.pool == "mean":
            x = ops.mean(x, axis=1)
        return self.head(self.dropout(x, training=training))
