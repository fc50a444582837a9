"""LeViT in Keras.

Source: Graham et al. 2021, arXiv:2104.01136, section 4; the official code (Apache-2.0), and
vit-pytorch's ``levit.py`` (MIT) for the other form; see the spec for the differences.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from jaxtyping import Float
from keras import ops

from isovit.backends.keras.idle import Dropout, Identity
from isovit.backends.keras.layers import (
    ACTIVATIONS,
    BatchNorm,
    Conv,
    DropPath,
    DType,
    Linear,
    SpecModel,
    Tensor,
)
from isovit.spec.config import require
from isovit.spec.families.levit import AttentionConfig, LeViTConfig, StageConfig

hardswish = ACTIVATIONS["hardswish"]
HALVING: dict[str, Any] = {"kernel_size": (3, 3), "stride": (2, 2), "padding": (1, 1)}


class ConvNorm(keras.layers.Layer):
    """A convolution of kernel 3 and stride 2, then BatchNorm."""

    def __init__(
        self, config: LeViTConfig, out_dim: int, *, name: str, dtype: DType = None
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype = self.dtype_policy
        self.conv = Conv(out_dim, **HALVING, use_bias=False, name="conv", dtype=dtype)
        self.norm = batch_norm(config, dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.conv.build(input_shape)
        self.norm.build((*input_shape[:-1], self.conv.filters))

    def call(
        self, x: Float[Tensor, "batch height width dim"], training: bool | None = None
    ) -> Float[Tensor, "batch rows columns dim_out"]:
        return self.norm(self.conv(x), training=training)


class LinearNorm(keras.layers.Layer):
    """A product, then BatchNorm over all tokens of all images; section 4.2."""

    def __init__(
        self, config: LeViTConfig, out_dim: int, *, bias: bool, name: str, dtype: DType = None
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype = self.dtype_policy
        self.linear = Linear(out_dim, use_bias=bias, name="linear", dtype=dtype)
        self.norm = batch_norm(config, dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.linear.build(input_shape)
        self.norm.build((*input_shape[:-1], self.linear.units))

    def call(
        self, x: Float[Tensor, "batch tokens dim"], training: bool | None = None
    ) -> Float[Tensor, "batch tokens out"]:
        return self.norm(self.linear(x), training=training)


class NormLinear(keras.layers.Layer):
    """BatchNorm over the images, then a product: a head."""

    def __init__(
        self, config: LeViTConfig, out_dim: int, *, name: str, dtype: DType = None
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype = self.dtype_policy
        self.norm = batch_norm(config, dtype)
        self.linear = Linear(out_dim, use_bias=True, name="linear", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.norm.build(input_shape)
        self.linear.build(input_shape)

    def call(
        self, x: Float[Tensor, "batch dim"], training: bool | None = None
    ) -> Float[Tensor, "batch classes"]:
        return self.linear(self.norm(x, training=training))


def batch_norm(config: LeViTConfig, dtype: DType) -> BatchNorm:
    """BatchNorm with the numbers of a config."""
    eps, momentum = config.batch_norm_eps, config.batch_norm_momentum
    return BatchNorm(epsilon=eps, momentum=momentum, name="norm", dtype=dtype)


def linear_norm(
    config: LeViTConfig, out_dim: int, *, bias: bool = False, name: str, dtype: DType
) -> keras.layers.Layer:
    """A product and its BatchNorm; one product where the norm is folded into it."""
    if config.fused:
        return Linear(out_dim, use_bias=True, name=name, dtype=dtype)
    return LinearNorm(config, out_dim, bias=bias, name=name, dtype=dtype)


def norm_linear(config: LeViTConfig, *, name: str, dtype: DType) -> keras.layers.Layer:
    """A head; a product alone where it has no BatchNorm, or one that is folded into it."""
    if config.fused or not config.head_norm:
        return Linear(config.num_classes, use_bias=True, name=name, dtype=dtype)
    return NormLinear(config, config.num_classes, name=name, dtype=dtype)


def subsample(
    x: Float[Tensor, "batch tokens dim"], numbers: AttentionConfig
) -> Float[Tensor, "batch out_tokens dim"]:
    """The tokens of every second row and column."""
    x = ops.reshape(x, (-1, *numbers.grid, numbers.dim))  # (batch, rows, columns, dim)
    x = x[:, :: numbers.stride, :: numbers.stride]
    return ops.reshape(x, (-1, numbers.out_tokens, numbers.dim))


def offset_biases(
    biases: Float[Tensor, "heads tokens"], numbers: AttentionConfig
) -> Float[Tensor, "heads out_tokens tokens"]:
    """The bias of each query and key: that of the offset (|rows|, |columns|) between the two."""
    rows, columns = (np.arange(size) for size in numbers.grid)
    down, across = (np.abs(n[:: numbers.stride, None] - n) for n in (rows, columns))
    # (out_rows, out_columns, rows, columns), as places in the flat table
    places = down[:, None, :, None] * len(columns) + across[None, :, None, :]
    places = places.reshape(numbers.out_tokens, numbers.tokens)
    table = ops.take(ops.transpose(biases), places, axis=0)  # (out_tokens, tokens, heads)
    return ops.transpose(table, (2, 0, 1))


class Stem(keras.layers.Layer):
    """Convolutions that halve the image, with Hardswish between normed ones; section 4.1."""

    def __init__(self, config: LeViTConfig, *, name: str, dtype: DType = None) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype = self.dtype_policy
        self.normed = config.stem == "conv_norm"
        self.grids, self.dims = config.stem_grids, (*config.stem_dims, config.embed_dims[0])
        self.convs = [
            ConvNorm(config, dim, name=f"convs_{i}", dtype=dtype)
            if self.normed and not config.fused
            else Conv(dim, **HALVING, use_bias=True, name=f"convs_{i}", dtype=dtype)
            for i, dim in enumerate(self.dims)
        ]

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        shape = input_shape
        for conv, grid, dim in zip(self.convs, self.grids, self.dims, strict=True):
            conv.build(shape)
            shape = (None, *grid, dim)

    def call(
        self, images: Float[Tensor, "batch height width channels"], training: bool | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        x = images
        for i, conv in enumerate(self.convs):
            x = hardswish(x) if self.normed and i > 0 else x
            x = conv(x, training=training)  # (batch, rows, columns, dim)
        rows, columns = self.grids[-1]
        return ops.reshape(x, (-1, rows * columns, self.dims[-1]))


class Attention(keras.layers.Layer):
    """softmax(q·kᵀ · scale + bias)·v, activation, product; section 4.2.

    The bias belongs to the offset between query and key. With a stride of 2 the queries are every
    second token of every second row, and the grid shrinks.
    """

    def __init__(
        self, config: LeViTConfig, numbers: AttentionConfig, *, name: str, dtype: DType = None
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype = self.dtype_policy
        self.numbers, self.scale = numbers, numbers.key_dim**-0.5
        self.bias_factor = 1 / self.scale if config.attn_bias_over_scale else 1.0
        heads, inner_dim = numbers.num_heads, numbers.inner_dim
        q_dim, kv_dim = heads * numbers.key_dim, heads * numbers.key_dim + inner_dim
        whole = numbers.stride == 1
        self.qkv, self.kv, self.q = (
            linear_norm(config, width, name=name, dtype=dtype)
            if used
            else Identity(name=name, dtype=dtype)
            for name, width, used in (
                ("qkv", q_dim + kv_dim, whole),
                ("kv", kv_dim, not whole),
                ("q", q_dim, not whole),
            )
        )
        self.attn_dropout = Dropout(numbers.attn_dropout_rate, name="attn_dropout", dtype=dtype)
        self.activation = ACTIVATIONS[config.attn_activation]
        bias = config.attn_proj_bias
        self.proj = linear_norm(config, numbers.out_dim, bias=bias, name="proj", dtype=dtype)
        self.proj_dropout = Dropout(numbers.dropout_rate, name="proj_dropout", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        numbers = self.numbers
        self.attention_biases = self.add_weight(
            shape=(numbers.num_heads, numbers.tokens), initializer="zeros", name="attention_biases"
        )
        self.qkv.build(input_shape)
        self.kv.build(input_shape)
        self.q.build((None, numbers.out_tokens, numbers.dim))
        self.proj.build((None, numbers.out_tokens, numbers.inner_dim))

    def call(
        self, x: Float[Tensor, "batch tokens dim"], training: bool | None = None
    ) -> Float[Tensor, "batch out_tokens _"]:
        numbers = self.numbers
        q, k, v = (ops.swapaxes(y, 1, 2) for y in self.split(x, training))
        bias = offset_biases(self.attention_biases, numbers) * self.bias_factor
        scores = ops.matmul(q * self.scale, ops.swapaxes(k, -2, -1)) + bias
        weights = ops.softmax(scores, axis=-1)  # (batch, heads, out_tokens, tokens)
        x = ops.matmul(self.attn_dropout(weights, training=training), v)
        x = ops.swapaxes(x, 1, 2)  # (batch, out_tokens, heads, value_dim)
        x = ops.reshape(x, (-1, numbers.out_tokens, numbers.inner_dim))
        return self.proj_dropout(
            self.proj(self.activation(x), training=training), training=training
        )

    def split(
        self, x: Float[Tensor, "batch tokens dim"], training: bool | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, each (batch, tokens, heads, width); a head has its own side by side."""
        numbers, key_dim = self.numbers, self.numbers.key_dim
        if numbers.stride == 1:
            shape = (-1, numbers.tokens, numbers.num_heads, 2 * key_dim + numbers.value_dim)
            qkv = ops.reshape(self.qkv(x, training=training), shape)
            q, k, v = ops.split(qkv, [key_dim, 2 * key_dim], axis=-1)
            return q, k, v
        shape = (-1, numbers.tokens, numbers.num_heads, key_dim + numbers.value_dim)
        k, v = ops.split(ops.reshape(self.kv(x, training=training), shape), [key_dim], axis=-1)
        q = self.q(subsample(x, numbers), training=training)
        return ops.reshape(q, (-1, numbers.out_tokens, numbers.num_heads, key_dim)), k, v


class Mlp(keras.layers.Layer):
    """Product, Hardswish, product; section 4.2."""

    def __init__(
        self,
        config: LeViTConfig,
        attention: AttentionConfig,
        hidden_dim: int,
        *,
        name: str,
        dtype: DType = None,
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype, rate = self.dtype_policy, attention.dropout_rate
        self.hidden_dim = hidden_dim
        self.fc1, self.fc2 = (
            linear_norm(config, width, name=name, dtype=dtype)
            if config.mlp_norm
            else Linear(width, use_bias=True, name=name, dtype=dtype)
            for name, width in (("fc1", hidden_dim), ("fc2", attention.out_dim))
        )
        self.dropout1 = Dropout(rate, name="dropout1", dtype=dtype)
        self.dropout2 = Dropout(rate, name="dropout2", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.fc1.build(input_shape)
        self.fc2.build((*input_shape[:-1], self.hidden_dim))

    def call(
        self, x: Float[Tensor, "batch tokens dim"], training: bool | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        x = self.dropout1(hardswish(self.fc1(x, training=training)), training=training)
        return self.dropout2(self.fc2(x, training=training), training=training)


class Block(keras.layers.Layer):
    """Attention and MLP, each beside a residual; an attention that shrinks the grid has none."""

    def __init__(
        self,
        config: LeViTConfig,
        attention: AttentionConfig,
        hidden_dim: int,
        *,
        name: str,
        dtype: DType = None,
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype, rate = self.dtype_policy, config.drop_path_rate
        self.out_tokens, self.out_dim = attention.out_tokens, attention.out_dim
        self.shrinks = attention.stride > 1
        self.attn = Attention(config, attention, name="attn", dtype=dtype)
        self.drop_path1 = DropPath(0.0 if self.shrinks else rate, name="drop_path1", dtype=dtype)
        self.mlp = Mlp(config, attention, hidden_dim, name="mlp", dtype=dtype)
        self.drop_path2 = DropPath(rate, name="drop_path2", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.attn.build(input_shape)
        self.mlp.build((None, self.out_tokens, self.out_dim))

    def call(
        self, x: Float[Tensor, "batch tokens dim"], training: bool | None = None
    ) -> Float[Tensor, "batch out_tokens _"]:
        y = self.attn(x, training=training)
        x = y if self.shrinks else x + self.drop_path1(y, training=training)
        return x + self.drop_path2(self.mlp(x, training=training), training=training)


class Stage(keras.layers.Layer):
    """Blocks on one grid, behind the one that leads to it."""

    def __init__(
        self, config: LeViTConfig, stage: StageConfig, *, name: str, dtype: DType = None
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype, self.attention = self.dtype_policy, stage.attention
        self.downsample = (
            Identity(name="downsample", dtype=dtype)
            if stage.downsample is None
            else Block(config, stage.downsample, stage.down_hidden, name="downsample", dtype=dtype)
        )
        self.blocks = [
            Block(config, stage.attention, stage.hidden, name=f"blocks_{i}", dtype=dtype)
            for i in range(stage.depth)
        ]

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.downsample.build(input_shape)
        for block in self.blocks:
            block.build((None, self.attention.tokens, self.attention.dim))

    def call(
        self, x: Float[Tensor, "batch tokens dim"], training: bool | None = None
    ) -> Float[Tensor, "batch out_tokens _"]:
        x = self.downsample(x, training=training)
        for block in self.blocks:
            x = block(x, training=training)
        return x


@keras.saving.register_keras_serializable(package="isovit")
class LeViT(SpecModel):
    """LeViT.

    Called with (batch, height, width, channels) images of ``config.image_size``; returns
    (batch, num_classes) logits, or the pooled features where the config has no head. The logits of
    two heads are averaged; ``forward_heads`` gives them apart.

    Args:
        config: see ``LeViTConfig``.
        name: of the model.
        dtype: policy, ``float32`` or ``mixed_bfloat16`` for example; None for the global one.
    """

    def __init__(self, config: LeViTConfig, *, name: str = "levit", dtype: DType = None) -> None:
        super().__init__(config, name=name, dtype=dtype)
        dtype = self.dtype_policy
        self.stem = Stem(config, name="stem", dtype=dtype)
        self.stages = [
            Stage(config, stage, name=f"stages_{i}", dtype=dtype)
            for i, stage in enumerate(config.stages)
        ]
        self.head = (
            norm_linear(config, name="head", dtype=dtype)
            if config.num_classes
            else Identity(name="head", dtype=dtype)
        )
        self.head_dist = (
            norm_linear(config, name="head_dist", dtype=dtype)
            if config.dist_head
            else Identity(name="head_dist", dtype=dtype)
        )

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.stem.build(input_shape)
        for layer, stage in zip(self.stages, self.config.stages, strict=True):
            numbers = stage.downsample or stage.attention
            layer.build((None, numbers.tokens, numbers.dim))
        self.head.build((None, self.config.feature_dim))
        self.head_dist.build((None, self.config.feature_dim))

    def forward_features(
        self, images: Float[Tensor, "batch height width channels"], training: bool | None = None
    ) -> Float[Tensor, "batch dim"]:
        """The mean over the tokens of the last stage."""
        x = self.stem(self.checked(images), training=training)  # (batch, tokens, dim)
        for stage in self.stages:
            x = stage(x, training=training)
        return ops.mean(x, axis=1)

    def forward_heads(
        self, images: Float[Tensor, "batch height width channels"], training: bool | None = None
    ) -> tuple[Float[Tensor, "batch classes"], Float[Tensor, "batch classes"]]:
        """Logits of the classifier and of the teacher's head, each for a loss of its own."""
        require(self.config.dist_head, "dist_head", False, "the model has one head")
        x = self.forward_features(images, training=training)
        return self.head(x, training=training), self.head_dist(x, training=training)

    def call(
        self, images: Float[Tensor, "batch height width channels"], training: bool | None = None
    ) -> Float[Tensor, "batch ..."]:
        if self.config.dist_head:
            logits, dist_logits = self.forward_heads(images, training=training)
            return (logits + dist_logits) / 2
        return self.head(self.forward_features(images, training=training), training=training)
