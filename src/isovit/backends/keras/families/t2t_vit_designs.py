"""T2T-ViT with designs of convolutional networks, in Keras.

Source: Yuan et al. 2021, arXiv:2101.11986, section 3.2; the official code (Clear BSD); see the spec
for the differences between the designs.
"""

from __future__ import annotations

import keras
from jaxtyping import Float
from keras import ops

from isovit.backends.keras.families.t2t_vit import TokensToToken
from isovit.backends.keras.idle import Dropout, Identity
from isovit.backends.keras.layers import (
    ACTIVATIONS,
    Block,
    DType,
    Linear,
    SpecModel,
    Tensor,
    attention,
    constant,
    layer_norm,
    pool,
    split_heads,
)
from isovit.spec.blocks import BlockConfig
from isovit.spec.families.t2t_vit_designs import Halving, T2TViTDesignsConfig
from isovit.spec.positions import sinusoidal_positions


class SqueezeExcite(keras.layers.Layer):
    """Each channel by a number from the mean over all tokens; arXiv:1709.01507, eq. 2 to 4."""

    def __init__(self, dim: int, hidden_dim: int, *, name: str, dtype: DType = None) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype = self.dtype_policy
        self.dim, self.hidden_dim = dim, hidden_dim
        self.fc1 = Linear(hidden_dim, use_bias=False, name="fc1", dtype=dtype)
        self.fc2 = Linear(dim, use_bias=False, name="fc2", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.fc1.build((None, self.dim))
        self.fc2.build((None, self.hidden_dim))

    def call(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        y = ops.relu(self.fc1(ops.mean(x, axis=1)))  # (batch, hidden)
        y = ops.sigmoid(self.fc2(y))  # (batch, dim)
        return x * y[:, None]


class SEAttention(keras.layers.Layer):
    """Multi-head self-attention whose channels are weighed behind the projection."""

    def __init__(self, config: BlockConfig, se_dim: int, *, name: str, dtype: DType = None) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype, rate = self.dtype_policy, config.dropout_rate if config.attn_proj else 0.0
        self.num_heads, self.scale = config.num_heads, config.attn_scale
        self.inner_dim = config.inner_dim
        self.qkv = Linear(3 * config.inner_dim, use_bias=config.qkv_bias, name="qkv", dtype=dtype)
        self.attn_dropout = Dropout(config.attn_dropout_rate, name="attn_dropout", dtype=dtype)
        self.proj = (
            Linear(config.dim, use_bias=True, name="proj", dtype=dtype)
            if config.attn_proj
            else None
        )
        self.se_layer = SqueezeExcite(config.dim, se_dim, name="se_layer", dtype=dtype)
        self.proj_dropout = Dropout(rate, name="proj_dropout", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.qkv.build(input_shape)
        if self.proj is not None:
            self.proj.build((*input_shape[:-1], self.inner_dim))
        self.se_layer.build(input_shape)

    def call(
        self, x: Float[Tensor, "batch tokens dim"], training: bool | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        tokens = x.shape[1]
        # each (batch, heads, tokens, head_dim)
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        x = attention(q, k, v, self.scale, self.attn_dropout, training)
        x = ops.swapaxes(x, 1, 2)  # (batch, tokens, heads, head_dim)
        x = ops.reshape(x, (-1, tokens, self.inner_dim))
        if self.proj is not None:
            x = self.proj(x)
        return self.proj_dropout(self.se_layer(x), training=training)


class CheapOperation(keras.layers.Layer):
    """A copy of each channel, by a factor: a depthwise convolution of one token, without bias.

    Han et al. 2020, arXiv:1911.11907, section 3.1.
    """

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.factor = self.add_weight(shape=(input_shape[-1],), initializer="ones", name="factor")

    def call(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        return x * self.factor


class GhostAttention(keras.layers.Layer):
    """Multi-head self-attention of which half the channels of q, of k and of v are copies.

    The copies lie behind what they are of, so that they fill the second half of the heads.
    """

    def __init__(self, config: BlockConfig, *, name: str, dtype: DType = None) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype, rate = self.dtype_policy, config.dropout_rate if config.attn_proj else 0.0
        self.num_heads, self.scale = config.num_heads, config.attn_scale
        self.half = config.inner_dim // 2
        self.qkv = Linear(3 * self.half, use_bias=config.qkv_bias, name="qkv", dtype=dtype)
        self.cheap = CheapOperation(name="cheap", dtype=dtype)
        self.attn_dropout = Dropout(config.attn_dropout_rate, name="attn_dropout", dtype=dtype)
        self.proj = (
            Linear(config.dim, use_bias=True, name="proj", dtype=dtype)
            if config.attn_proj
            else None
        )
        self.proj_dropout = Dropout(rate, name="proj_dropout", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        lead = input_shape[:-1]
        self.qkv.build(input_shape)
        self.cheap.build((*lead, 3 * self.half))
        if self.proj is not None:
            self.proj.build((*lead, 2 * self.half))

    def call(
        self, x: Float[Tensor, "batch tokens dim"], training: bool | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        tokens = x.shape[1]
        x = self.qkv(x)
        halves = x, self.cheap(x)  # q, k and v side by side in each
        halves = [ops.reshape(half, (-1, tokens, 3, self.half)) for half in halves]
        x = ops.reshape(ops.concatenate(halves, axis=-1), (-1, tokens, 6 * self.half))
        q, k, v = split_heads(x, 3, self.num_heads)
        x = attention(q, k, v, self.scale, self.attn_dropout, training)
        x = ops.swapaxes(x, 1, 2)  # (batch, tokens, heads, head_dim)
        x = ops.reshape(x, (-1, tokens, 2 * self.half))
        if self.proj is not None:
            x = self.proj(x)
        return self.proj_dropout(x, training=training)


class GhostMlp(keras.layers.Layer):
    """Dense, activation, dense, where copies widen what the first product gives."""

    def __init__(self, config: BlockConfig, *, name: str, dtype: DType = None) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype, rate = self.dtype_policy, config.dropout_rate
        dim, self.hidden_dim = config.dim, config.mlp_dim
        self.fc1 = Linear(dim, use_bias=True, name="fc1", dtype=dtype)
        self.activation = ACTIVATIONS[config.activation]
        self.cheap = [
            CheapOperation(name=f"cheap_{i}", dtype=dtype)
            for i in range(self.hidden_dim // dim - 1)
        ]
        self.dropout1 = Dropout(rate, name="dropout1", dtype=dtype)
        self.fc2 = Linear(dim, use_bias=True, name="fc2", dtype=dtype)
        self.dropout2 = Dropout(rate, name="dropout2", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        for layer in (self.fc1, *self.cheap):
            layer.build(input_shape)
        self.fc2.build((*input_shape[:-1], self.hidden_dim))

    def call(
        self, x: Float[Tensor, "batch tokens dim"], training: bool | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        x = self.activation(self.fc1(x))
        copies = [self.activation(cheap(x)) for cheap in self.cheap]  # activated once more
        x = ops.concatenate([x, *copies], axis=-1)  # (batch, tokens, hidden)
        return self.dropout2(self.fc2(self.dropout1(x, training=training)), training=training)


class DenseBlock(Block):
    """A block whose output, by a product, is put behind its input; arXiv:1608.06993, eq. 2."""

    def __init__(self, config: BlockConfig, growth: int, *, name: str, dtype: DType = None) -> None:
        super().__init__(config, name=name, dtype=dtype)
        self.dense_linear = Linear(
            growth, use_bias=True, name="dense_linear", dtype=self.dtype_policy
        )

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        super().build(input_shape)
        self.dense_linear.build(input_shape)

    def call(
        self, x: Float[Tensor, "batch tokens dim"], training: bool | None = None
    ) -> Float[Tensor, "batch tokens wider"]:
        y = self.dense_linear(super().call(x, training=training))
        return ops.concatenate([x, y], axis=-1)


class Transition(keras.layers.Layer):
    """Half of the width, between two stages of dense blocks."""

    def __init__(self, config: Halving, activation: str, *, name: str, dtype: DType = None) -> None:
        super().__init__(name=name, dtype=dtype)
        self.linear = Linear(config.out_dim, use_bias=True, name="linear", dtype=self.dtype_policy)
        self.activation = ACTIVATIONS[activation]

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.linear.build(input_shape)

    def call(
        self, x: Float[Tensor, "batch tokens dim"], training: bool | None = None
    ) -> Float[Tensor, "batch tokens half"]:
        return self.activation(self.linear(x, training=training))


def make_layer(
    config: T2TViTDesignsConfig, layer: BlockConfig | Halving, *, name: str, dtype: DType
) -> keras.layers.Layer:
    """A block of the design, or a transition between its stages."""
    if isinstance(layer, Halving):
        return Transition(layer, config.activation, name=name, dtype=dtype)
    match config.design:
        case "se":
            attn = SEAttention(layer, config.se_dim, name="attn", dtype=dtype)
            return Block(layer, attn=attn, name=name, dtype=dtype)
        case "ghost":
            attn = GhostAttention(layer, name="attn", dtype=dtype)
            mlp = GhostMlp(layer, name="mlp", dtype=dtype)
            return Block(layer, attn=attn, mlp=mlp, name=name, dtype=dtype)
        case "dense":
            return DenseBlock(layer, config.dense_growth, name=name, dtype=dtype)


@keras.saving.register_keras_serializable(package="isovit")
class T2TViTDesigns(SpecModel):
    """Tokens-to-Token ViT with a design of convolutional networks.

    Called with (batch, height, width, channels) images of ``config.image_size``; returns
    (batch, num_classes) logits, or the pooled features where the config has no head.

    Args:
        config: see ``T2TViTDesignsConfig``.
        name: of the model.
        dtype: policy, ``float32`` or ``mixed_bfloat16`` for example; None for the global one.
    """

    def __init__(
        self, config: T2TViTDesignsConfig, *, name: str = "t2t_vit_designs", dtype: DType = None
    ) -> None:
        super().__init__(config, name=name, dtype=dtype)
        dtype = self.dtype_policy
        self.tokens_to_token = TokensToToken(config, name="tokens_to_token", dtype=dtype)
        self.dropout = Dropout(config.embed_dropout_rate, name="dropout", dtype=dtype)
        self.blocks = [
            make_layer(config, layer, name=f"blocks_{i}", dtype=dtype)
            for i, layer in enumerate(config.layers)
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
        config, dim, tokens = self.config, self.config.embed_dim, self.config.tokens
        self.cls_token = (
            self.add_weight(shape=(1, 1, dim), initializer="zeros", name="cls_token")
            if config.class_token
            else None
        )
        learned = config.pos_embed == "learned"
        self.pos_embed = self.add_weight(
            shape=(1, tokens, dim),
            initializer="zeros" if learned else constant(sinusoidal_positions(tokens, dim)[None]),
            trainable=learned,
            name="pos_embed",
        )
        self.tokens_to_token.build(input_shape)
        for block, layer in zip(self.blocks, config.layers, strict=True):
            block.build((None, tokens, layer.dim))
        features = config.feature_dim
        self.norm.build(
            (None, features) if config.final_norm == "pooled" else (None, tokens, features)
        )
        self.head.build((None, features))

    def call(
        self, images: Float[Tensor, "batch height width channels"], training: bool | None = None
    ) -> Float[Tensor, "batch ..."]:
        x = self.tokens_to_token(self.checked(images), training=training)  # (batch, patches, dim)
        if self.cls_token is not None:
            cls_token = ops.broadcast_to(self.cls_token, (ops.shape(x)[0], 1, x.shape[-1]))
            x = ops.concatenate([cls_token, x], axis=1)
        x = self.dropout(x + self.pos_embed, training=training)
        for block in self.blocks:
            x = block(x, training=training)  # in the dense design of another width each time
        if self.config.final_norm == "pooled":
            x = self.norm(pool(x, self.config))
        else:
            x = pool(self.norm(x), self.config)
        return self.head(x)
