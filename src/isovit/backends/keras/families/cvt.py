"""CvT in Keras.

Source: Wu et al. 2021, arXiv:2103.15808, section 3; the official code (MIT), transformers'
(Apache-2.0) and, for the other form, vit-pytorch's ``cvt.py`` (MIT); see the spec.
"""

from __future__ import annotations

from typing import Any

import keras
from jaxtyping import Float
from keras import ops

from isovit.backends.keras.idle import Dropout, Identity
from isovit.backends.keras.layers import (
    BatchNorm,
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
from isovit.spec.families.cvt import CvTConfig, StageConfig


def fix_bias(layer: Any) -> None:
    """Leave the bias of a layer out of training."""
    bias = layer.beta if isinstance(layer, BatchNorm) else layer.bias
    assert bias is not None
    bias.trainable = False


class ConvEmbed(keras.layers.Layer):
    """Overlapping patches to tokens: a convolution, then LayerNorm; section 3.1."""

    def __init__(
        self, config: CvTConfig, stage: StageConfig, *, name: str, dtype: DType = None
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype = self.dtype_policy
        side, stride, padding = stage.patch_size, stage.patch_stride, stage.patch_padding
        self.in_grid, self.grid, self.dim = stage.in_grid, stage.grid, stage.dim
        self.proj = Conv(
            stage.dim,
            kernel_size=(side, side),
            stride=(stride, stride),
            padding=(padding, padding),
            use_bias=True,
            name="proj",
            dtype=dtype,
        )
        self.norm = layer_norm(config.norm_eps, name="norm", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        rows, columns = self.grid
        self.proj.build((None, *self.in_grid, input_shape[-1]))
        self.norm.build((None, rows * columns, self.dim))

    def call(self, x: Float[Tensor, "batch tokens_in dim_in"]) -> Float[Tensor, "batch tokens dim"]:
        rows, columns = self.grid
        x = self.proj(ops.reshape(x, (-1, *self.in_grid, x.shape[-1])))
        return self.norm(ops.reshape(x, (-1, rows * columns, self.dim)))


class ConvProjection(keras.layers.Layer):
    """Convolution of each channel by itself, BatchNorm, then a product; section 3.2, eq. 2.

    With a stride it gives fewer tokens. A class token comes to the product as it is.
    """

    def __init__(
        self,
        config: CvTConfig,
        stage: StageConfig,
        width: int,
        stride: int,
        *,
        of_keys: bool,
        name: str,
        dtype: DType = None,
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype, side = self.dtype_policy, stage.kernel_size
        self.grid, self.class_token = stage.grid, stage.class_token
        self.of_keys, self.has_bias = of_keys, config.qkv_bias
        self.conv = DepthwiseConv(
            kernel_size=(side, side),
            stride=(stride, stride),
            padding=(side // 2, side // 2),
            use_bias=False,
            name="conv",
            dtype=dtype,
        )
        self.norm = BatchNorm(
            epsilon=config.batch_norm_eps,
            momentum=config.batch_norm_momentum,
            name="norm",
            dtype=dtype,
        )
        self.proj = Linear(width, use_bias=config.qkv_bias, name="proj", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        dim = input_shape[-1]
        self.conv.build((None, *self.grid, dim))
        self.norm.build((None, *self.grid, dim))
        self.proj.build((None, None, dim))
        if self.of_keys and self.has_bias:  # no softmax sees what all keys have in common
            fix_bias(self.proj)
        if self.of_keys and not self.class_token:
            fix_bias(self.norm)

    def call(
        self, x: Float[Tensor, "batch tokens dim"], training: bool | None = None
    ) -> Float[Tensor, "batch tokens_out width"]:
        dim = x.shape[-1]
        image = ops.reshape(x[:, int(self.class_token) :], (-1, *self.grid, dim))
        y = self.norm(self.conv(image), training=training)  # (batch, rows_out, columns_out, dim)
        y = ops.reshape(y, (-1, y.shape[1] * y.shape[2], dim))
        if self.class_token:
            y = ops.concatenate([x[:, :1], y], axis=1)
        return self.proj(y)


class Attention(keras.layers.Layer):
    """Attention whose q, k and v are projected by convolutions; section 3.2."""

    def __init__(
        self,
        config: CvTConfig,
        stage: StageConfig,
        block: BlockConfig,
        *,
        name: str,
        dtype: DType = None,
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype, self.inner = self.dtype_policy, block.inner_dim
        self.num_heads, self.scale, stride = block.num_heads, block.attn_scale, stage.kv_stride
        self.one_conv = config.kv_convs == "one"

        def project(name: str, width: int, stride: int, *, of_keys: bool) -> ConvProjection:
            return ConvProjection(
                config, stage, width, stride, of_keys=of_keys, name=name, dtype=dtype
            )

        self.q = project("q", self.inner, 1, of_keys=False)
        if self.one_conv:
            self.kv = project("kv", 2 * self.inner, stride, of_keys=False)
        else:
            self.k = project("k", self.inner, stride, of_keys=True)
            self.v = project("v", self.inner, stride, of_keys=False)
        self.attn_dropout = Dropout(block.attn_dropout_rate, name="attn_dropout", dtype=dtype)
        self.proj = Linear(stage.dim, use_bias=True, name="proj", dtype=dtype)
        self.proj_dropout = Dropout(block.dropout_rate, name="proj_dropout", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        for layer in (self.q, self.kv) if self.one_conv else (self.q, self.k, self.v):
            layer.build(input_shape)
        self.proj.build((*input_shape[:-1], self.inner))

    def call(
        self, x: Float[Tensor, "batch tokens dim"], training: bool | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        heads, tokens = self.num_heads, x.shape[1]
        (q,) = split_heads(self.q(x, training=training), 1, heads)  # (batch, heads, tokens, …)
        if self.one_conv:
            k, v = split_heads(
                self.kv(x, training=training), 2, heads
            )  # each (batch, heads, keys, …)
        else:
            (k,) = split_heads(self.k(x, training=training), 1, heads)
            (v,) = split_heads(self.v(x, training=training), 1, heads)
        x = attention(q, k, v, self.scale, self.attn_dropout, training)
        x = ops.swapaxes(x, 1, 2)  # (batch, tokens, heads, head_dim)
        x = ops.reshape(x, (-1, tokens, self.inner))
        return self.proj_dropout(self.proj(x), training=training)


class Stage(keras.layers.Layer):
    """Embedding, class token and blocks."""

    def __init__(
        self, config: CvTConfig, stage: StageConfig, *, name: str, dtype: DType = None
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype = self.dtype_policy
        self.tokens, self.dim, self.class_token = stage.tokens, stage.dim, stage.class_token
        self.patch_embed = ConvEmbed(config, stage, name="patch_embed", dtype=dtype)
        self.dropout = Dropout(config.embed_dropout_rate, name="dropout", dtype=dtype)
        self.blocks = [
            Block(
                block,
                Attention(config, stage, block, name="attn", dtype=dtype),
                name=f"blocks_{i}",
                dtype=dtype,
            )
            for i, block in enumerate(stage.blocks)
        ]

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.cls_token = (
            self.add_weight(shape=(1, 1, self.dim), initializer="zeros", name="cls_token")
            if self.class_token
            else None
        )
        self.patch_embed.build(input_shape)
        for block in self.blocks:
            block.build((None, self.tokens, self.dim))

    def call(
        self, x: Float[Tensor, "batch tokens_in dim_in"], training: bool | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        x = self.patch_embed(x)  # (batch, rows * columns, dim)
        if self.cls_token is not None:
            token = ops.broadcast_to(self.cls_token, (ops.shape(x)[0], 1, self.dim))
            x = ops.concatenate([token, x], axis=1)
        x = self.dropout(x, training=training)
        for block in self.blocks:
            x = block(x, training=training)
        return x


@keras.saving.register_keras_serializable(package="isovit")
class CvT(SpecModel):
    """Convolutional vision transformer.

    Called with (batch, height, width, channels) images of ``config.image_size``; returns
    (batch, num_classes) logits, or the pooled features where the config has no head.

    Args:
        config: see ``CvTConfig``.
        name: of the model.
        dtype: policy, ``float32`` or ``mixed_bfloat16`` for example; None for the global one.
    """

    def __init__(self, config: CvTConfig, *, name: str = "cvt", dtype: DType = None) -> None:
        super().__init__(config, name=name, dtype=dtype)
        dtype = self.dtype_policy
        self.stages = [
            Stage(config, stage, name=f"stages_{i}", dtype=dtype)
            for i, stage in enumerate(config.stages)
        ]
        self.norm = (
            layer_norm(config.norm_eps, name="norm", dtype=dtype)
            if config.final_norm != "none"
            else Identity(name="norm", dtype=dtype)
        )
        self.head = (
            Linear(config.num_classes, use_bias=True, name="head", dtype=dtype)
            if config.num_classes > 0
            else Identity(name="head", dtype=dtype)
        )

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        stages = self.config.stages
        for layer, stage in zip(self.stages, stages, strict=True):
            rows, columns = stage.in_grid
            layer.build((None, rows * columns, stage.in_dim))
        self.norm.build((None, stages[-1].tokens, self.config.feature_dim))
        self.head.build((None, self.config.feature_dim))

    def call(
        self, images: Float[Tensor, "batch height width channels"], training: bool | None = None
    ) -> Float[Tensor, "batch ..."]:
        images = self.checked(images)
        _, height, width, channels = images.shape
        x = ops.reshape(images, (-1, height * width, channels))  # (batch, pixels, channels)
        for stage in self.stages:
            x = stage(x, training=training)  # (batch, tokens, dim)
        x = self.norm(x)
        match self.config.pool:
            case "cls":
                x = x[:, 0]
            case "mean":
                x = ops.mean(x, axis=1)
        return self.head(x)
