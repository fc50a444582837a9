"""TokenLearner in Keras.

Source: Ryoo et al. 2021, arXiv:2106.11297; the official code and the example of keras.io (both
Apache-2.0); see the spec for the differences.
"""

from __future__ import annotations

from typing import Any

import keras
from jaxtyping import Float
from keras import ops

from isovit.backends.keras.families.vit import ConvPatchEmbed
from isovit.backends.keras.idle import Dropout, Identity
from isovit.backends.keras.layers import (
    ACTIVATIONS,
    Block,
    Conv,
    DType,
    Linear,
    Mlp,
    SpecModel,
    Tensor,
    layer_norm,
)
from isovit.spec.families.token_learner import CONV_KERNEL, CONVS, TokenLearnerConfig


def fix_bias(layer: Any) -> None:
    """Leave the bias of a product out of training."""
    layer.bias.trainable = False


class ActivatedMlp(Mlp):
    """Dense, activation, dense, activation: of the Keras example."""

    def call(
        self, x: Float[Tensor, "batch tokens dim"], training: bool | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        x = self.dropout1(self.activation(self.fc1(x)), training=training)
        return self.dropout2(self.activation(self.fc2(x)), training=training)


class TokenMask(keras.layers.Layer):
    """Dense, activation, dense: at each place a number for each learned token."""

    def __init__(
        self, config: TokenLearnerConfig, *, bias_trains: bool, name: str, dtype: DType = None
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype, rate = self.dtype_policy, config.dropout_rate
        self.hidden_dim, self.bias_trains = config.bottleneck_dim, bias_trains
        self.fc1 = Linear(config.bottleneck_dim, use_bias=True, name="fc1", dtype=dtype)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout1 = Dropout(rate, name="dropout1", dtype=dtype)
        self.fc2 = Linear(config.learned_tokens, use_bias=True, name="fc2", dtype=dtype)
        self.dropout2 = Dropout(rate, name="dropout2", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.fc1.build(input_shape)
        self.fc2.build((*input_shape[:-1], self.hidden_dim))
        if not self.bias_trains:  # a softmax behind takes it away again
            fix_bias(self.fc2)

    def call(
        self, x: Float[Tensor, "batch places dim"], training: bool | None = None
    ) -> Float[Tensor, "batch places tokens"]:
        x = self.dropout1(self.activation(self.fc1(x)), training=training)
        return self.dropout2(self.fc2(x), training=training)


class ConvLearner(keras.layers.Layer):
    """TokenLearner v1: maps by convolutions, each number between 0 and 1.

    The maps are made of normalised tokens and weigh the tokens themselves.
    """

    def __init__(self, config: TokenLearnerConfig, *, name: str, dtype: DType = None) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype, zeros = self.dtype_policy, CONV_KERNEL // 2
        self.grid, self.tokens, self.pool = config.grid, config.learned_tokens, config.learner_pool
        self.norm = layer_norm(config.norm_eps, name="norm", dtype=dtype)
        self.convs = [
            Conv(
                config.learned_tokens,
                kernel_size=(CONV_KERNEL, CONV_KERNEL),
                stride=(1, 1),
                padding=(zeros, zeros),
                use_bias=False,
                name=f"convs_{i}",
                dtype=dtype,
            )
            for i in range(CONVS)
        ]
        self.activation = ACTIVATIONS[config.activation]

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.norm.build(input_shape)
        first, *others = self.convs
        first.build((None, *self.grid, input_shape[-1]))
        for conv in others:
            conv.build((None, *self.grid, self.tokens))

    def call(
        self, x: Float[Tensor, "batch places dim"], training: bool | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        _, places, dim = x.shape
        maps = ops.reshape(self.norm(x), (-1, *self.grid, dim))  # (batch, rows, columns, dim)
        for i, conv in enumerate(self.convs):
            maps = conv(self.activation(maps) if i else maps)  # (batch, rows, columns, tokens)
        maps = ops.reshape(ops.sigmoid(maps), (-1, places, self.tokens))
        y = ops.matmul(ops.swapaxes(maps, 1, 2), x)  # (batch, tokens, places) times x
        return y if self.pool == "sum" else y / places


class MlpLearner(keras.layers.Layer):
    """TokenLearner v1.1: maps by an MLP, each a softmax over the grid.

    The maps are made of normalised tokens and weigh the tokens themselves.
    """

    def __init__(self, config: TokenLearnerConfig, *, name: str, dtype: DType = None) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype = self.dtype_policy
        self.norm = layer_norm(config.norm_eps, name="norm", dtype=dtype)
        self.mask = TokenMask(config, bias_trains=False, name="mask", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.norm.build(input_shape)
        self.mask.build(input_shape)

    def call(
        self, x: Float[Tensor, "batch places dim"], training: bool | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        maps = ops.swapaxes(self.mask(self.norm(x), training=training), 1, 2)
        return ops.matmul(ops.softmax(maps, axis=-1), x)  # (batch, tokens, places) times x


class TokenFuser(keras.layers.Layer):
    """Learned tokens back onto the grid: they mix, then each place takes of each."""

    def __init__(self, config: TokenLearnerConfig, *, name: str, dtype: DType = None) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype, eps = self.dtype_policy, config.norm_eps
        self.tokens = config.learned_tokens
        self.norm1 = layer_norm(eps, name="norm1", dtype=dtype)
        self.mix = Linear(config.learned_tokens, use_bias=True, name="mix", dtype=dtype)
        self.norm2 = layer_norm(eps, name="norm2", dtype=dtype)
        self.norm = layer_norm(eps, name="norm", dtype=dtype)
        self.mask = TokenMask(config, bias_trains=True, name="mask", dtype=dtype)
        self.dropout = Dropout(config.dropout_rate, name="dropout", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        batch, _, dim = input_shape  # of the learned tokens
        self.norm1.build(input_shape)
        self.mix.build((batch, dim, self.tokens))
        fix_bias(self.mix)  # norm2 takes it away again
        self.norm2.build(input_shape)
        self.norm.build((batch, None, dim))
        self.mask.build((batch, None, dim))

    def call(
        self,
        y: Float[Tensor, "batch tokens dim"],
        x: Float[Tensor, "batch places dim"],
        training: bool | None = None,
    ) -> Float[Tensor, "batch places dim"]:
        y = self.mix(ops.swapaxes(self.norm1(y), 1, 2))  # over the tokens, (batch, dim, tokens)
        y = self.norm2(ops.swapaxes(y, 1, 2))
        maps = ops.sigmoid(self.mask(self.norm(x), training=training))  # (batch, places, tokens)
        return self.dropout(ops.matmul(maps, y), training=training)


LEARNERS = {"conv": ConvLearner, "mlp": MlpLearner}


@keras.saving.register_keras_serializable(package="isovit")
class TokenLearner(SpecModel):
    """Vision Transformer that goes on with learned tokens.

    Called with (batch, height, width, channels) images of ``config.image_size``; returns
    (batch, num_classes) logits, or the pooled features where the config has no head.

    Args:
        config: see ``TokenLearnerConfig``.
        name: of the model.
        dtype: policy, ``float32`` or ``mixed_bfloat16`` for example; None for the global one.
    """

    def __init__(
        self, config: TokenLearnerConfig, *, name: str = "token_learner", dtype: DType = None
    ) -> None:
        super().__init__(config, name=name, dtype=dtype)
        dtype = self.dtype_policy
        dim, classes, rate = config.embed_dim, config.num_classes, config.dropout_rate
        self.patch_embed = ConvPatchEmbed(config.stem, name="patch_embed", dtype=dtype)
        self.dropout = Dropout(config.embed_dropout_rate, name="dropout", dtype=dtype)
        mlp = ActivatedMlp if config.mlp_output_activation else Mlp
        self.blocks = [
            Block(
                config.block,
                mlp=mlp(dim, config.mlp_dim, config.activation, rate, name="mlp", dtype=dtype),
                name=f"blocks_{i}",
                dtype=dtype,
            )
            for i in range(config.depth)
        ]
        self.learners = [
            LEARNERS[config.learner](config, name=f"learners_{i}", dtype=dtype)
            for i in range(config.num_learners)
        ]
        self.fusers = [
            TokenFuser(config, name=f"fusers_{i}", dtype=dtype) for i in range(config.num_fusers)
        ]
        self.norm = layer_norm(config.norm_eps, name="norm", dtype=dtype)
        self.head = (
            Linear(classes, use_bias=True, name="head", dtype=dtype)
            if classes
            else Identity(name="head", dtype=dtype)
        )

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        dim, patches = self.config.embed_dim, self.config.patches
        self.pos_embed = self.add_weight(
            shape=(1, patches, dim), initializer="zeros", name="pos_embed"
        )
        self.patch_embed.build(input_shape)
        for layer in (*self.blocks, *self.fusers):
            layer.build((None, None, dim))
        for learner in self.learners:
            learner.build((None, patches, dim))
        self.norm.build((None, self.config.tokens, dim))
        self.head.build((None, dim))

    def forward_tokens(
        self, images: Float[Tensor, "batch height width channels"], training: bool | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """Every token behind the blocks: learned ones, or with a fuser those of the grid."""
        x = self.patch_embed(self.checked(images))  # (batch, patches, dim)
        x = self.dropout(x + self.pos_embed, training=training)
        for block in self.blocks[: self.config.learner_loc]:
            x = block(x, training=training)
        last = self.blocks[self.config.learner_loc :]
        if self.config.fuser:
            for learner, block, fuser in zip(self.learners, last, self.fusers, strict=True):
                y = block(learner(x, training=training), training=training)
                x = x + fuser(y, x, training=training)
            return x
        for learner in self.learners:  # one, or none
            x = learner(x, training=training)  # (batch, learned tokens, dim)
        for block in last:
            x = block(x, training=training)
        return x

    def call(
        self, images: Float[Tensor, "batch height width channels"], training: bool | None = None
    ) -> Float[Tensor, "batch features"]:
        x = self.norm(self.forward_tokens(images, training=training))
        return self.head(ops.mean(x, axis=1))
