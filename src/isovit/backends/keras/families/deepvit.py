"""DeepViT in Keras.

Source: Zhou et al. 2021, arXiv:2103.11886, section 4.2; the official code (MIT) and, for LayerNorm
over the heads, vit-pytorch's ``deepvit.py`` (MIT); see the spec for the differences.
"""

from __future__ import annotations

from functools import partial

import keras
from jaxtyping import Float
from keras import ops

from isovit.backends.keras.families.vit import PATCH_EMBEDS
from isovit.backends.keras.idle import Dropout, Identity
from isovit.backends.keras.layers import (
    BatchNorm,
    Conv,
    DType,
    Linear,
    SpecModel,
    Tensor,
    layer_norm,
    pool,
    split_heads,
)
from isovit.backends.keras.layers import Block as PreNormBlock
from isovit.spec.families.deepvit import DeepViTConfig


class ConvsPatchEmbed(keras.layers.Layer):
    """Three convolutions, with BatchNorm and ReLU behind the first two; the official S and L."""

    def __init__(self, config: DeepViTConfig, *, name: str, dtype: DType = None) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype, self.stem_dim, self.dim = self.dtype_policy, config.stem_dim, config.embed_dim
        (height, width), self.patches = config.patch_size, config.patches
        half = (height // 2, width // 2)  # the first convolution has halved the image
        norm = partial(
            BatchNorm,
            epsilon=config.batch_norm_eps,
            momentum=config.batch_norm_momentum,
            dtype=dtype,
        )
        self.conv1 = Conv(
            self.stem_dim,
            kernel_size=(7, 7),
            stride=(2, 2),
            padding=(3, 3),
            use_bias=False,
            name="conv1",
            dtype=dtype,
        )
        self.bn1 = norm(name="bn1")
        self.conv2 = Conv(
            self.stem_dim,
            kernel_size=(3, 3),
            stride=(1, 1),
            padding=(1, 1),
            use_bias=False,
            name="conv2",
            dtype=dtype,
        )
        self.bn2 = norm(name="bn2")
        self.proj = Conv(
            self.dim,
            kernel_size=half,
            stride=half,
            padding=(0, 0),
            use_bias=True,
            name="proj",
            dtype=dtype,
        )

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        # Of any grid: Keras takes one smaller than the kernel for too small, zeros or not.
        self.conv1.build((None, None, None, input_shape[-1]))
        for layer in (self.bn1, self.conv2, self.bn2, self.proj):
            layer.build((None, None, None, self.stem_dim))

    def call(
        self, images: Float[Tensor, "batch height width channels"], training: bool | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        x = ops.relu(self.bn1(self.conv1(images), training=training))  # half as high and wide
        x = ops.relu(self.bn2(self.conv2(x), training=training))
        x = self.proj(x)  # (batch, rows, columns, dim)
        return ops.reshape(x, (-1, self.patches, self.dim))


class ReAttention(keras.layers.Layer):
    """norm(softmax(q·kᵀ · scale)·Θ)·v, where Θ mixes the heads; arXiv:2103.11886, eq. 3."""

    def __init__(self, config: DeepViTConfig, *, name: str, dtype: DType = None) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype, block = self.dtype_policy, config.block
        self.num_heads, self.head_dim = block.num_heads, block.head_dim
        self.scale, self.mixed_scale = block.attn_scale, config.re_attention_scale
        self.qkv = Linear(3 * block.inner_dim, use_bias=block.qkv_bias, name="qkv", dtype=dtype)
        self.attn_dropout = Dropout(block.attn_dropout_rate, name="attn_dropout", dtype=dtype)
        self.mix = Linear(
            self.num_heads, use_bias=config.re_attention_bias, name="mix", dtype=dtype
        )
        self.mix_norm = (
            BatchNorm(
                epsilon=config.batch_norm_eps,
                momentum=config.batch_norm_momentum,
                name="mix_norm",
                dtype=dtype,
            )
            if config.re_attention_norm == "batch_norm"
            else layer_norm(config.norm_eps, name="mix_norm", dtype=dtype)
        )
        self.proj = (
            Linear(block.dim, use_bias=True, name="proj", dtype=dtype) if block.attn_proj else None
        )
        self.proj_dropout = Dropout(
            block.dropout_rate if block.attn_proj else 0.0, name="proj_dropout", dtype=dtype
        )

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        tokens = input_shape[1]
        self.qkv.build(input_shape)
        self.mix.build((None, tokens, tokens, self.num_heads))
        self.mix_norm.build((None, tokens, tokens, self.num_heads))
        if self.proj is not None:
            self.proj.build((*input_shape[:-1], self.num_heads * self.head_dim))

    def call(
        self, x: Float[Tensor, "batch tokens dim"], training: bool | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        tokens = x.shape[1]
        # each (batch, heads, tokens, head_dim)
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        weights = ops.softmax(ops.matmul(q * self.scale, ops.swapaxes(k, -2, -1)), axis=-1)
        weights = self.attn_dropout(weights, training=training)
        weights = ops.transpose(weights, (0, 2, 3, 1))  # (batch, tokens, tokens, heads)
        weights = self.mix_norm(self.mix(weights), training=training) * self.mixed_scale
        weights = ops.transpose(weights, (0, 3, 1, 2))  # (batch, heads, tokens, tokens)
        x = ops.swapaxes(ops.matmul(weights, v), 1, 2)  # (batch, tokens, heads, head_dim)
        x = ops.reshape(x, (-1, tokens, self.num_heads * self.head_dim))
        if self.proj is not None:
            x = self.proj(x)
        return self.proj_dropout(x, training=training)


class Block(PreNormBlock):
    """Pre-norm block with re-attention, or attention, and a scale around each branch."""

    def __init__(
        self, config: DeepViTConfig, index: int, *, name: str, dtype: DType = None
    ) -> None:
        re_attends = config.re_attends(index)
        attn = ReAttention(config, name="attn", dtype=dtype) if re_attends else None
        super().__init__(config.blocks[index], attn, name=name, dtype=dtype)
        self.branch_scale = config.branch_scale

    def call(
        self, x: Float[Tensor, "batch tokens dim"], training: bool | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        scale = self.branch_scale
        y = self.layer_scale1(self.attn(self.norm1(x * scale), training=training))
        x = x + self.drop_path1(y, training=training) / scale
        y = self.layer_scale2(self.mlp(self.norm2(x * scale), training=training))
        x = x + self.drop_path2(y, training=training) / scale
        return x


@keras.saving.register_keras_serializable(package="isovit")
class DeepViT(SpecModel):
    """Deep Vision Transformer.

    Called with (batch, height, width, channels) images of ``config.image_size``; returns
    (batch, num_classes) logits, or the pooled features where the config has no head.

    Args:
        config: see ``DeepViTConfig``.
        name: of the model.
        dtype: policy, ``float32`` or ``mixed_bfloat16`` for example; None for the global one.
    """

    def __init__(
        self, config: DeepViTConfig, *, name: str = "deepvit", dtype: DType = None
    ) -> None:
        super().__init__(config, name=name, dtype=dtype)
        dtype = self.dtype_policy
        self.patch_embed = (
            ConvsPatchEmbed(config, name="patch_embed", dtype=dtype)
            if config.patch_embed == "convs"
            else PATCH_EMBEDS[config.patch_embed](config.stem, name="patch_embed", dtype=dtype)
        )
        self.dropout = Dropout(config.embed_dropout_rate, name="dropout", dtype=dtype)
        self.blocks = [
            Block(config, index, name=f"blocks_{index}", dtype=dtype)
            for index in range(config.depth)
        ]
        has_norm, has_head = config.final_norm != "none", config.num_classes > 0
        self.norm = (
            layer_norm(config.norm_eps, name="norm", dtype=dtype)
            if has_norm
            else Identity(name="norm", dtype=dtype)
        )
        self.head = (
            Linear(config.num_classes, use_bias=True, name="head", dtype=dtype)
            if has_head
            else Identity(name="head", dtype=dtype)
        )

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        dim, tokens = self.config.embed_dim, self.config.tokens
        self.cls_token = (
            self.add_weight(shape=(1, 1, dim), initializer="zeros", name="cls_token")
            if self.config.class_token
            else None
        )
        self.pos_embed = self.add_weight(
            shape=(1, tokens, dim), initializer="zeros", name="pos_embed"
        )
        self.patch_embed.build(input_shape)
        for block in self.blocks:
            block.build((None, tokens, dim))
        self.norm.build((None, dim) if self.config.final_norm == "pooled" else (None, tokens, dim))
        self.head.build((None, dim))

    def call(
        self, images: Float[Tensor, "batch height width channels"], training: bool | None = None
    ) -> Float[Tensor, "batch ..."]:
        x = self.patch_embed(self.checked(images), training=training)  # (batch, patches, dim)
        if self.cls_token is not None:
            cls_token = ops.broadcast_to(self.cls_token, (ops.shape(x)[0], 1, x.shape[-1]))
            x = ops.concatenate([cls_token, x], axis=1)
        x = self.dropout(x + self.pos_embed, training=training)
        for block in self.blocks:
            x = block(x, training=training)
        if self.config.final_norm == "pooled":
            x = self.norm(pool(x, self.config))
        else:
            x = pool(self.norm(x), self.config)
        return self.head(x)
