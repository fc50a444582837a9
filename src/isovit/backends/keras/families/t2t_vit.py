"""T2T-ViT in Keras.

Source: Yuan et al. 2021, arXiv:2101.11986, section 3; the official code (Clear BSD) and, for the
full-width mixer, vit-pytorch's ``t2t.py`` (MIT); see the spec for the differences.
"""

from __future__ import annotations

import math

import keras
from jaxtyping import Float
from keras import ops

from isovit.backends.keras.idle import Dropout, Identity
from isovit.backends.keras.layers import (
    Block,
    DType,
    Linear,
    Mlp,
    SpecModel,
    Tensor,
    attention,
    constant,
    layer_norm,
    pool,
)
from isovit.spec.families.t2t_vit import SoftSplit, Stage, T2TViTConfig
from isovit.spec.initialize import orthogonal_features
from isovit.spec.positions import sinusoidal_positions


def soft_split(
    x: Float[Tensor, "batch rows columns dim"], split: SoftSplit
) -> Float[Tensor, "batch tokens patch"]:
    """Overlapping patches, each flattened as (channel, height, width); section 3.1, eq. 3."""
    kernel, stride, padding = split
    rows, columns, dim = split.output(x.shape[1]), split.output(x.shape[2]), x.shape[3]
    x = ops.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    shifts = [x[:, i : i + stride * rows : stride] for i in range(kernel)]
    x = ops.stack(shifts, axis=-1)  # (batch, rows, width, dim, kernel)
    shifts = [x[:, :, j : j + stride * columns : stride] for j in range(kernel)]
    x = ops.stack(shifts, axis=-1)  # (batch, rows, columns, dim, kernel, kernel)
    return ops.reshape(x, (-1, rows * columns, dim * kernel * kernel))  # (batch, tokens, patch)


class TokenPerformer(keras.layers.Layer):
    """Token mixer with linear attention; Choromanski et al. 2021, arXiv:2009.14794, eq. 5 and 7.

    One head, width falls to ``token_dim``; q and k are not scaled, and the residual is v.
    """

    def __init__(
        self, config: T2TViTConfig, stage: Stage, *, name: str, dtype: DType = None
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype, eps, rate = self.dtype_policy, config.norm_eps, config.token_dropout_rate
        self.dim, self.features = config.token_dim, config.performer_features
        self.eps, self.upcast = config.performer_eps, config.performer_upcast
        self.norm1 = layer_norm(eps, name="norm1", dtype=dtype)
        self.kqv = Linear(3 * self.dim, use_bias=True, name="kqv", dtype=dtype)
        self.proj = Linear(self.dim, use_bias=True, name="proj", dtype=dtype)
        self.dropout1 = Dropout(rate, name="dropout1", dtype=dtype)
        self.norm2 = layer_norm(eps, name="norm2", dtype=dtype)
        self.mlp = Mlp(
            self.dim,
            config.token_mlp_dim,
            config.activation,
            dropout_rate=0.0,
            name="mlp",
            dtype=dtype,
        )
        self.dropout2 = Dropout(rate, name="dropout2", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        tokens = (*input_shape[:-1], self.dim)
        self.random_features = self.add_weight(
            shape=(self.features, self.dim),
            initializer=constant(orthogonal_features(self.features, self.dim)),
            trainable=False,
            name="random_features",
        )
        self.norm1.build(input_shape)
        self.kqv.build(input_shape)
        self.proj.build(tokens)
        self.norm2.build(tokens)
        self.mlp.build(tokens)

    def call(
        self, x: Float[Tensor, "batch tokens patch"], training: bool | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        k, q, v = ops.split(self.kqv(self.norm1(x)), 3, axis=-1)  # in this order
        y = v + self.dropout1(self.proj(self.attention(q, k, v)), training=training)
        return y + self.dropout2(self.mlp(self.norm2(y), training=training), training=training)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Σ_s φ(q)·φ(k_s) v_s / (φ(q)·Σ_s φ(k_s) + ε), all (batch, tokens, dim)."""
        dtype = keras.backend.standardize_dtype(v.dtype)
        if self.upcast:
            q, k, v = (ops.cast(z, keras.backend.result_type(dtype, "float32")) for z in (q, k, v))
        q, k = self.feature_map(q), self.feature_map(k)  # (batch, tokens, features)
        k_sum = ops.sum(k, axis=1, keepdims=True)
        denominator = ops.matmul(q, ops.swapaxes(k_sum, 1, 2))  # (batch, tokens, 1)
        numerator = ops.matmul(q, ops.matmul(ops.swapaxes(k, 1, 2), v))  # (batch, tokens, dim)
        return ops.cast(numerator / (denominator + self.eps), dtype)

    def feature_map(self, x: Tensor) -> Tensor:
        """φ(x) = exp(W x − ‖x‖² / 2) / √m."""
        w = ops.cast(self.random_features, x.dtype)
        square = ops.sum(ops.square(x), axis=-1, keepdims=True)
        exponent = ops.matmul(x, ops.transpose(w)) - square / 2
        return ops.exp(exponent) / math.sqrt(self.features)


class TokenAttention(keras.layers.Layer):
    """One head of self-attention whose width falls to ``token_dim`` and whose residual is v."""

    def __init__(
        self, config: T2TViTConfig, stage: Stage, *, name: str, dtype: DType = None
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype, rate = self.dtype_policy, config.token_dropout_rate
        self.dim = config.token_dim
        self.scale = (stage.dim if config.token_scale == "input_dim" else self.dim) ** -0.5
        self.qkv = Linear(3 * self.dim, use_bias=False, name="qkv", dtype=dtype)
        self.attn_dropout = Dropout(rate, name="attn_dropout", dtype=dtype)
        self.proj = Linear(self.dim, use_bias=True, name="proj", dtype=dtype)
        self.proj_dropout = Dropout(rate, name="proj_dropout", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.qkv.build(input_shape)
        self.proj.build((*input_shape[:-1], self.dim))

    def call(
        self, x: Float[Tensor, "batch tokens patch"], training: bool | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        q, k, v = ops.split(self.qkv(x)[:, None], 3, axis=-1)  # each (batch, 1, tokens, dim)
        x = attention(q, k, v, self.scale, self.attn_dropout, training)[:, 0]
        return v[:, 0] + self.proj_dropout(self.proj(x), training=training)


class TokenTransformer(keras.layers.Layer):
    """Token mixer with softmax attention, of the official code."""

    def __init__(
        self, config: T2TViTConfig, stage: Stage, *, name: str, dtype: DType = None
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype, eps, rate = self.dtype_policy, config.norm_eps, config.token_dropout_rate
        self.dim = config.token_dim
        self.norm1 = layer_norm(eps, name="norm1", dtype=dtype)
        self.attn = TokenAttention(config, stage, name="attn", dtype=dtype)
        self.norm2 = layer_norm(eps, name="norm2", dtype=dtype)
        self.mlp = Mlp(
            self.dim, config.token_mlp_dim, config.activation, rate, name="mlp", dtype=dtype
        )

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        tokens = (*input_shape[:-1], self.dim)
        self.norm1.build(input_shape)
        self.attn.build(input_shape)
        self.norm2.build(tokens)
        self.mlp.build(tokens)

    def call(
        self, x: Float[Tensor, "batch tokens patch"], training: bool | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        x = self.attn(self.norm1(x), training=training)
        return x + self.mlp(self.norm2(x), training=training)


class FullMixer(keras.layers.Layer):
    """Token mixer at full width, of vit-pytorch: a block of one head, then a LayerNorm."""

    def __init__(
        self, config: T2TViTConfig, stage: Stage, *, name: str, dtype: DType = None
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype = self.dtype_policy
        self.block = Block(config.full_mixer(stage.dim), name="block", dtype=dtype)
        self.norm = layer_norm(config.norm_eps, name="norm", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.block.build(input_shape)
        self.norm.build(input_shape)

    def call(
        self, x: Float[Tensor, "batch tokens dim"], training: bool | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        return self.norm(self.block(x, training=training))


MIXERS = {"performer": TokenPerformer, "transformer": TokenTransformer, "full": FullMixer}


class SplitProjection(Linear):
    """The last soft split and the product behind it: x·W + b of every patch x; section 3.1."""

    def __init__(self, stage: Stage, units: int, *, name: str, dtype: DType = None) -> None:
        super().__init__(units, use_bias=True, name=name, dtype=dtype)
        self.stage = stage

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        patch = input_shape[-1] * self.stage.split.kernel**2
        super().build((None, self.stage.tokens, patch))
        self.input_spec = None  # that of the patches

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return (input_shape[0], self.stage.tokens, self.units)

    def call(
        self, inputs: Float[Tensor, "batch rows columns dim"], training: bool | None = None
    ) -> Float[Tensor, "batch tokens dim_out"]:
        if keras.backend.backend() == "torch":
            from isovit.backends import products

            if products.convolves(inputs):
                weight: Tensor = ops.transpose(self.kernel)
                bias: Tensor = ops.convert_to_tensor(self.bias)
                return products.patch_linear(inputs, weight, bias, self.stage.split)
        return super().call(soft_split(inputs, self.stage.split), training=training)


class TokensToToken(keras.layers.Layer):
    """The stem: soft splits with a token mixer between each and the next; section 3.1."""

    def __init__(self, config: T2TViTConfig, *, name: str, dtype: DType = None) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype, mixer = self.dtype_policy, MIXERS[config.token_mixer]
        self.stages = config.stages
        self.mixers = [
            mixer(config, stage, name=f"mixers_{i}", dtype=dtype)
            for i, stage in enumerate(self.stages[:-1])
        ]
        last = self.stages[-1]
        self.project = SplitProjection(last, config.embed_dim, name="project", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        for stage, mixer in zip(self.stages, self.mixers, strict=False):
            mixer.build((None, stage.tokens, stage.dim))
        last = self.stages[-1]
        self.project.build((None, None, None, last.dim // last.split.kernel**2))

    def call(
        self, images: Float[Tensor, "batch height width channels"], training: bool | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        x = images
        for stage, mixer in zip(self.stages, self.mixers, strict=False):
            x = mixer(soft_split(x, stage.split), training=training)  # (batch, tokens, dim)
            x = ops.reshape(x, (-1, *stage.grid, x.shape[-1]))  # (batch, rows, columns, dim)
        return self.project(x)


@keras.saving.register_keras_serializable(package="isovit")
class T2TViT(SpecModel):
    """Tokens-to-Token ViT.

    Called with (batch, height, width, channels) images of ``config.image_size``; returns
    (batch, num_classes) logits, or the pooled features where the config has no head.

    Args:
        config: see ``T2TViTConfig``.
        name: of the model.
        dtype: policy, ``float32`` or ``mixed_bfloat16`` for example; None for the global one.
    """

    def __init__(self, config: T2TViTConfig, *, name: str = "t2t_vit", dtype: DType = None) -> None:
        super().__init__(config, name=name, dtype=dtype)
        dtype = self.dtype_policy
        self.tokens_to_token = TokensToToken(config, name="tokens_to_token", dtype=dtype)
        self.dropout = Dropout(config.embed_dropout_rate, name="dropout", dtype=dtype)
        self.blocks = [
            Block(block, name=f"blocks_{i}", dtype=dtype) for i, block in enumerate(config.blocks)
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
        learned = self.config.pos_embed == "learned"
        self.pos_embed = self.add_weight(
            shape=(1, tokens, dim),
            initializer="zeros" if learned else constant(sinusoidal_positions(tokens, dim)[None]),
            trainable=learned,
            name="pos_embed",
        )
        self.tokens_to_token.build(input_shape)
        for block in self.blocks:
            block.build((None, tokens, dim))
        self.norm.build((None, dim) if self.config.final_norm == "pooled" else (None, tokens, dim))
        self.head.build((None, dim))

    def embed(
        self, images: Float[Tensor, "batch height width channels"], training: bool | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """Every token, with its position: class token, patches."""
        x = self.tokens_to_token(self.checked(images), training=training)  # (batch, patches, dim)
        if self.cls_token is not None:
            cls_token = ops.broadcast_to(self.cls_token, (ops.shape(x)[0], 1, x.shape[-1]))
            x = ops.concatenate([cls_token, x], axis=1)
        return x + self.pos_embed

    def encode(
        self, x: Float[Tensor, "batch tokens dim"], training: bool | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """Every token behind the blocks, and behind the norm if that is over tokens."""
        x = self.dropout(x, training=training)
        for block in self.blocks:
            x = block(x, training=training)
        return x if self.config.final_norm == "pooled" else self.norm(x)

    def classify(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch ..."]:
        """Logits of such tokens; features where there is no head."""
        x = pool(x, self.config)
        if self.config.final_norm == "pooled":
            x = self.norm(x)
        return self.head(x)

    def call(
        self, images: Float[Tensor, "batch height width channels"], training: bool | None = None
    ) -> Float[Tensor, "batch ..."]:
        x = self.encode(self.embed(images, training=training), training=training)
        return self.classify(x)
