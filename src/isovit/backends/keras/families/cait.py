"""CaiT in Keras.

Source: Touvron et al. 2021, arXiv:2103.17239, sections 2 and 3; both dialects, see the spec. Heads
that talk: Shazeer et al. 2020, arXiv:2003.02436.
"""

from __future__ import annotations

import keras
from jaxtyping import Float
from keras import ops

from isovit.backends.keras.families.vit import PATCH_EMBEDS
from isovit.backends.keras.idle import Dropout, Identity
from isovit.backends.keras.initializers import glorot
from isovit.backends.keras.layers import (
    Block,
    DType,
    LayerScale,
    Linear,
    Mlp,
    SpecModel,
    Tensor,
    attention,
    layer_norm,
    split_heads,
)
from isovit.spec.families.cait import CaiTConfig


class MixHeads(keras.layers.Layer):
    """A product over the heads, for each query and key by itself.

    It is written with the heads first, so that no (queries, keys) array is transposed.
    """

    def __init__(
        self, config: CaiTConfig, *, bias_trains: bool, name: str, dtype: DType = None
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        self.use_bias, self.bias_trains = config.talking_heads_bias, bias_trains

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        heads = input_shape[1]
        self.kernel = self.add_weight(shape=(heads, heads), initializer=glorot(), name="kernel")
        self.bias = (
            self.add_weight(
                shape=(heads,), initializer="zeros", trainable=self.bias_trains, name="bias"
            )
            if self.use_bias
            else None
        )

    def call(
        self, x: Float[Tensor, "batch heads queries keys"]
    ) -> Float[Tensor, "batch heads queries keys"]:
        _, heads, queries, keys = x.shape
        pairs = ops.reshape(x, (-1, heads, queries * keys))
        y = ops.matmul(ops.transpose(self.kernel), pairs)
        if self.bias is not None:
            y = y + ops.expand_dims(self.bias, -1)
        return ops.reshape(y, (-1, heads, queries, keys))


class TalkingHeads(keras.layers.Layer):
    """mix(softmax(mix(q·kᵀ · scale)))·v, each mix over the heads; arXiv:2003.02436.

    The softmax does not see the first mix's bias, which therefore does not train.
    """

    def __init__(
        self, config: CaiTConfig, dropout_rate: float, *, name: str, dtype: DType = None
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype = self.dtype_policy
        self.scale, self.mixed_dropout = config.attn_scale, config.mixed_dropout
        self.proj_l = MixHeads(config, bias_trains=False, name="proj_l", dtype=dtype)
        self.proj_w = MixHeads(config, bias_trains=True, name="proj_w", dtype=dtype)
        self.dropout = Dropout(dropout_rate, name="dropout", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.proj_l.build(input_shape)
        self.proj_w.build(input_shape)

    def call(
        self,
        q: Float[Tensor, "batch heads queries dim"],
        k: Float[Tensor, "batch heads keys dim"],
        v: Float[Tensor, "batch heads keys dim"],
        training: bool | None = None,
    ) -> Float[Tensor, "batch heads queries dim"]:
        logits = self.proj_l(ops.matmul(q * self.scale, ops.swapaxes(k, -2, -1)))
        weights = ops.softmax(logits, axis=-1)
        if self.mixed_dropout:
            weights = self.dropout(self.proj_w(weights), training=training)
        else:
            weights = self.proj_w(self.dropout(weights, training=training))
        return ops.matmul(weights, v)


class Attention(keras.layers.Layer):
    """Self-attention of the patches, whose heads talk; section 2."""

    def __init__(self, config: CaiTConfig, *, name: str, dtype: DType = None) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype = self.dtype_policy
        dim, self.inner = config.embed_dim, config.inner_dim
        self.num_heads = config.num_heads
        self.qkv = Linear(3 * self.inner, use_bias=config.qkv_bias, name="qkv", dtype=dtype)
        self.talking_heads = TalkingHeads(
            config, config.attn_dropout_rate, name="talking_heads", dtype=dtype
        )
        self.proj = Linear(dim, use_bias=True, name="proj", dtype=dtype)
        self.proj_dropout = Dropout(config.dropout_rate, name="proj_dropout", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        tokens = input_shape[1]
        self.qkv.build(input_shape)
        self.talking_heads.build((None, self.num_heads, tokens, tokens))
        self.proj.build((None, tokens, self.inner))

    def call(
        self, x: Float[Tensor, "batch tokens dim"], training: bool | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        tokens = x.shape[1]
        # each (batch, heads, tokens, head_dim)
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        x = self.talking_heads(q, k, v, training=training)
        x = ops.swapaxes(x, 1, 2)  # (batch, tokens, heads, head_dim)
        x = ops.reshape(x, (-1, tokens, self.inner))
        return self.proj_dropout(self.proj(x), training=training)


class ClassAttention(keras.layers.Layer):
    """Attention of the class token, the first, to all tokens; section 3."""

    def __init__(self, config: CaiTConfig, *, name: str, dtype: DType = None) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype, rate, bias = self.dtype_policy, config.cls_attn_dropout_rate, config.qkv_bias
        dim, self.inner = config.embed_dim, config.inner_dim
        self.num_heads, self.scale = config.num_heads, config.attn_scale
        self.q = Linear(self.inner, use_bias=bias, name="q", dtype=dtype)
        self.kv = Linear(2 * self.inner, use_bias=bias, name="kv", dtype=dtype)
        self.talking_heads = (
            TalkingHeads(config, rate, name="talking_heads", dtype=dtype)
            if config.cls_talking_heads
            else None
        )
        self.attn_dropout = Dropout(rate, name="attn_dropout", dtype=dtype)
        self.proj = Linear(dim, use_bias=True, name="proj", dtype=dtype)
        self.proj_dropout = Dropout(config.cls_dropout_rate, name="proj_dropout", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        _, tokens, dim = input_shape
        self.q.build((None, 1, dim))
        self.kv.build(input_shape)
        if self.talking_heads is not None:
            self.talking_heads.build((None, self.num_heads, 1, tokens))
        self.proj.build((None, 1, self.inner))

    def call(
        self, x: Float[Tensor, "batch tokens dim"], training: bool | None = None
    ) -> Float[Tensor, "batch 1 dim"]:
        (q,) = split_heads(self.q(x[:, :1]), 1, self.num_heads)  # (batch, heads, 1, head_dim)
        k, v = split_heads(self.kv(x), 2, self.num_heads)  # each (batch, heads, tokens, head_dim)
        if self.talking_heads is None:
            x = attention(q, k, v, self.scale, self.attn_dropout, training)
        else:
            x = self.talking_heads(q, k, v, training=training)
        x = ops.reshape(ops.swapaxes(x, 1, 2), (-1, 1, self.inner))
        return self.proj_dropout(self.proj(x), training=training)


class ClassBlock(keras.layers.Layer):
    """Block over the class token, which looks at patches that stay as they are; section 3."""

    def __init__(self, config: CaiTConfig, index: int, *, name: str, dtype: DType = None) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype = self.dtype_policy
        eps, gamma = config.norm_eps, config.layer_scale_start(index)
        self.cls_norm, self.tokens = config.cls_norm, config.tokens
        self.norm1 = layer_norm(eps, name="norm1", dtype=dtype)
        self.attn = ClassAttention(config, name="attn", dtype=dtype)
        self.layer_scale1 = LayerScale(gamma, name="layer_scale1", dtype=dtype)
        self.norm2 = layer_norm(eps, name="norm2", dtype=dtype)
        self.mlp = Mlp(
            config.embed_dim,
            config.cls_mlp_width,
            config.activation,
            config.cls_dropout_rate,
            name="mlp",
            dtype=dtype,
        )
        self.layer_scale2 = LayerScale(gamma, name="layer_scale2", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        tokens = (None, self.tokens, input_shape[-1])
        self.norm1.build(tokens if self.cls_norm == "tokens" else input_shape)
        self.attn.build(tokens)
        for layer in (self.layer_scale1, self.norm2, self.mlp, self.layer_scale2):
            layer.build(input_shape)

    def call(
        self,
        cls: Float[Tensor, "batch 1 dim"],
        x: Float[Tensor, "batch patches dim"],
        training: bool | None = None,
    ) -> Float[Tensor, "batch 1 dim"]:
        if self.cls_norm == "tokens":
            u = self.norm1(ops.concatenate([cls, x], axis=1))
        else:
            u = ops.concatenate([self.norm1(cls), x], axis=1)
        cls = cls + self.layer_scale1(self.attn(u, training=training))
        cls = cls + self.layer_scale2(self.mlp(self.norm2(cls), training=training))
        return cls


@keras.saving.register_keras_serializable(package="isovit")
class CaiT(SpecModel):
    """Class-Attention in Image Transformers.

    Called with (batch, height, width, channels) images of ``config.image_size``; returns
    (batch, num_classes) logits, or the pooled features where the config has no head.

    Args:
        config: see ``CaiTConfig``.
        name: of the model.
        dtype: policy, ``float32`` or ``mixed_bfloat16`` for example; None for the global one.
    """

    def __init__(self, config: CaiTConfig, *, name: str = "cait", dtype: DType = None) -> None:
        super().__init__(config, name=name, dtype=dtype)
        dtype = self.dtype_policy
        self.patch_embed = PATCH_EMBEDS[config.patch_embed](
            config.stem, name="patch_embed", dtype=dtype
        )
        self.dropout = Dropout(config.embed_dropout_rate, name="dropout", dtype=dtype)
        self.blocks = [
            Block(
                block, Attention(config, name="attn", dtype=dtype), name=f"blocks_{i}", dtype=dtype
            )
            for i, block in enumerate(config.blocks)
        ]
        self.cls_blocks = [
            ClassBlock(config, i, name=f"cls_blocks_{i}", dtype=dtype)
            for i in range(config.cls_depth)
        ]
        self.norm = layer_norm(config.norm_eps, name="norm", dtype=dtype)
        self.head = (
            Linear(config.num_classes, use_bias=True, name="head", dtype=dtype)
            if config.num_classes
            else Identity(name="head", dtype=dtype)
        )

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        dim, patches, tokens = self.config.embed_dim, self.config.patches, self.config.tokens
        self.cls_token = self.add_weight(shape=(1, 1, dim), initializer="zeros", name="cls_token")
        self.pos_embed = self.add_weight(
            shape=(1, patches, dim), initializer="zeros", name="pos_embed"
        )
        self.patch_embed.build(input_shape)
        for block in self.blocks:
            block.build((None, patches, dim))
        for block in self.cls_blocks:
            block.build((None, 1, dim))
        self.norm.build((None, tokens, dim))
        self.head.build((None, dim))

    def call(
        self, images: Float[Tensor, "batch height width channels"], training: bool | None = None
    ) -> Float[Tensor, "batch ..."]:
        x = self.patch_embed(self.checked(images)) + self.pos_embed
        x = self.dropout(x, training=training)  # (batch, patches, dim)
        for block in self.blocks:
            x = block(x, training=training)
        cls = ops.broadcast_to(self.cls_token, (ops.shape(x)[0], 1, x.shape[-1]))
        for block in self.cls_blocks:
            cls = block(cls, x, training=training)
        x = self.norm(ops.concatenate([cls, x], axis=1))
        match self.config.pool:
            case "cls":
                x = x[:, 0]
            case "mean":
                x = ops.mean(x, axis=1)
            case "mean_patches":
                x = ops.mean(x[:, 1:], axis=1)
            case "none":
                pass
        return self.head(x)
