"""Efficient ViT in Keras.

Source: vit-pytorch's ``efficient.py`` (MIT); of the mixers Xiong et al. 2021, arXiv:2102.03902,
Choromanski et al. 2021, arXiv:2009.14794, and Shen et al. 2021, arXiv:1812.01243; see the spec.
"""

from __future__ import annotations

import math
from typing import Any, Self, cast

import keras
from jaxtyping import Float
from keras import ops

from isovit.backends.keras.families.vit import NormLinearNormPatchEmbed
from isovit.backends.keras.idle import Dropout, Identity
from isovit.backends.keras.layers import (
    Block,
    DepthwiseConv,
    DType,
    Linear,
    SpecModel,
    Tensor,
    constant,
    layer_norm,
    pool,
    split_heads,
)
from isovit.spec.config import config_from_dict
from isovit.spec.families.efficient_vit import EfficientViTConfig
from isovit.spec.initialize import normal_features


def pseudo_inverse(
    a: Float[Tensor, "batch heads rows rows"], iterations: int, norm: str
) -> Float[Tensor, "batch heads rows rows"]:
    """Z ← ¼ Z(13I − AZ(15I − AZ(7I − AZ))) from Aᵀ / (‖A‖₁ ‖A‖∞); arXiv:2102.03902, section 3.2.

    The rows of a softmax sum to 1, and so ‖A‖∞ is 1; ‖A‖₁ is the largest sum of a column, of each
    ``matrix`` or of the whole ``batch``.
    """
    columns = ops.sum(a, axis=-2, keepdims=True)  # (batch, heads, 1, rows)
    largest = ops.max(columns) if norm == "batch" else ops.max(columns, axis=-1, keepdims=True)
    z = ops.swapaxes(a, -2, -1) / largest
    eye = ops.eye(a.shape[-1], dtype=a.dtype)
    for _ in range(iterations):
        az = ops.matmul(a, z)
        y = 15 * eye - ops.matmul(az, 7 * eye - az)
        z = ops.matmul(z, 13 * eye - ops.matmul(az, y)) / 4
    return z


class Mixer(keras.layers.Layer):
    """Multi-head attention whose heads mix their tokens by a rule of its own, ``mix``."""

    def __init__(self, config: EfficientViTConfig, *, name: str, dtype: DType = None) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype, block = self.dtype_policy, config.block
        self.num_heads, self.scale = block.num_heads, block.attn_scale
        self.inner_dim = block.inner_dim
        self.qkv = Linear(3 * self.inner_dim, use_bias=block.qkv_bias, name="qkv", dtype=dtype)
        self.proj = (
            Linear(block.dim, use_bias=True, name="proj", dtype=dtype) if block.attn_proj else None
        )
        self.proj_dropout = Dropout(
            block.dropout_rate if block.attn_proj else 0.0, name="proj_dropout", dtype=dtype
        )

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.qkv.build(input_shape)
        if self.proj is not None:
            self.proj.build((*input_shape[:-1], self.inner_dim))

    def call(
        self, x: Float[Tensor, "batch tokens dim"], training: bool | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        tokens = x.shape[1]
        # each (batch, heads, tokens, head_dim)
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        x = ops.swapaxes(self.mix(q, k, v), 1, 2)  # (batch, tokens, heads, head_dim)
        x = ops.reshape(x, (-1, tokens, self.inner_dim))  # (batch, tokens, heads * head_dim)
        if self.proj is not None:
            x = self.proj(x)
        return self.proj_dropout(x, training=training)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """All (batch, heads, tokens, head_dim)."""
        raise NotImplementedError


class NystromAttention(Mixer):
    """softmax(q·k̃ᵀ) softmax(q̃·k̃ᵀ)⁺ softmax(q̃·kᵀ) v, q̃ and k̃ landmarks; arXiv:2102.03902, eq. 15.

    ``residual_conv`` adds v of the neighbours.
    """

    def __init__(self, config: EfficientViTConfig, *, name: str, dtype: DType = None) -> None:
        super().__init__(config, name=name, dtype=dtype)
        self.num_landmarks = config.num_landmarks
        self.pinv_iterations, self.pinv_norm = config.pinv_iterations, config.pinv_norm
        self.residual_conv = (
            DepthwiseConv(
                kernel_size=(kernel, 1),
                stride=(1, 1),
                padding=(kernel // 2, 0),
                use_bias=False,
                name="residual_conv",
                dtype=self.dtype_policy,
            )
            if (kernel := config.residual_kernel) is not None
            else None
        )

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        super().build(input_shape)
        if self.residual_conv is not None:
            batch, tokens, _ = input_shape
            head_dim = self.inner_dim // self.num_heads
            self.residual_conv.build((batch, tokens, head_dim, self.num_heads))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q * self.scale
        keys = self.pad(k)  # (batch, heads, padded, head_dim)
        q_landmarks, k_landmarks = self.landmarks(self.pad(q)), self.landmarks(keys)
        k_landmarks = ops.swapaxes(k_landmarks, -2, -1)  # (batch, heads, head_dim, landmarks)
        to_landmarks = ops.softmax(ops.matmul(q, k_landmarks), axis=-1)
        among_landmarks = ops.softmax(ops.matmul(q_landmarks, k_landmarks), axis=-1)
        from_landmarks = ops.matmul(q_landmarks, ops.swapaxes(keys, -2, -1))
        from_landmarks = ops.softmax(from_landmarks, axis=-1)
        inverse = pseudo_inverse(among_landmarks, self.pinv_iterations, self.pinv_norm)
        y = ops.matmul(inverse, ops.matmul(from_landmarks, self.pad(v)))
        y = ops.matmul(to_landmarks, y)
        if self.residual_conv is not None:  # over the tokens, one kernel for all numbers of a head
            v = ops.transpose(v, (0, 2, 3, 1))  # (batch, tokens, head_dim, heads)
            y = y + ops.transpose(self.residual_conv(v), (0, 3, 1, 2))
        return y

    def pad(self, x: Tensor) -> Tensor:
        """Zeros before the tokens, so that each landmark is the mean of as many."""
        zeros = -x.shape[2] % self.num_landmarks
        return ops.pad(x, ((0, 0), (0, 0), (zeros, 0), (0, 0))) if zeros else x

    def landmarks(self, x: Tensor) -> Tensor:
        """Means of neighbouring tokens, (batch, heads, landmarks, head_dim)."""
        _, heads, tokens, head_dim = x.shape
        length = tokens // self.num_landmarks
        x = ops.reshape(x, (-1, heads, self.num_landmarks, length, head_dim))
        return ops.mean(x, axis=3)


class PerformerAttention(Mixer):
    """φ(q)(φ(k)ᵀ v) / (φ(q)·Σ φ(k) + ε); Choromanski et al. 2021, arXiv:2009.14794, eq. 4, 5, 7."""

    def __init__(self, config: EfficientViTConfig, *, name: str, dtype: DType = None) -> None:
        super().__init__(config, name=name, dtype=dtype)
        self.eps, self.stabilized = config.performer_eps, config.performer_stabilized
        self.features, self.head_dim = config.performer_features, config.block.head_dim

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        features = normal_features(self.features, self.head_dim)
        self.random_features = self.add_weight(
            shape=features.shape,
            initializer=constant(features),
            trainable=False,
            name="random_features",
        )
        super().build(input_shape)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        root = math.sqrt(self.scale)  # of the factor on q·k: half of it is q's, half is k's
        q = self.feature_map(q * root, together=(-1,))  # (batch, heads, tokens, features)
        k = self.feature_map(k * root, together=(-2, -1))
        k_sum = ops.sum(k, axis=-2, keepdims=True)
        denominator = ops.matmul(q, ops.swapaxes(k_sum, -2, -1))  # (batch, heads, tokens, 1)
        numerator = ops.matmul(q, ops.matmul(ops.swapaxes(k, -2, -1), v))
        return numerator / (denominator + self.eps)  # (batch, heads, tokens, head_dim)

    def feature_map(self, x: Tensor, together: tuple[int, ...]) -> Tensor:
        """φ(x) = exp(W x − ‖x‖² / 2 − c) / √m; c, a constant, is the largest of those together."""
        w = ops.cast(self.random_features, x.dtype)
        square = ops.sum(ops.square(x), axis=-1, keepdims=True)
        exponent = ops.matmul(x, ops.transpose(w)) - square / 2
        if self.stabilized:
            largest = ops.max(exponent, axis=together, keepdims=True)
            exponent = exponent - ops.stop_gradient(largest)
        return ops.exp(exponent) / math.sqrt(self.features)


class LinearAttention(Mixer):
    """softmax(q) (softmax(k)ᵀ v), q over its width and k over the tokens; arXiv:1812.01243, 3.2."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = ops.softmax(q, axis=-1), ops.softmax(k, axis=-2)
        return ops.matmul(q, ops.matmul(ops.swapaxes(k, -2, -1), v))


MIXERS = {"nystrom": NystromAttention, "performer": PerformerAttention, "linear": LinearAttention}


class Transformer(keras.layers.Layer):
    """Pre-norm blocks with one of the mixers, and a LayerNorm where the config wants one."""

    def __init__(self, config: EfficientViTConfig, *, name: str, dtype: DType = None) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype, mixer = self.dtype_policy, config.mixer
        self.blocks = [
            Block(
                block,
                attn=None if mixer == "full" else MIXERS[mixer](config, name="attn", dtype=dtype),
                name=f"blocks_{i}",
                dtype=dtype,
            )
            for i, block in enumerate(config.blocks)
        ]
        self.norm = (
            layer_norm(config.norm_eps, name="norm", dtype=dtype)
            if config.transformer_norm
            else Identity(name="norm", dtype=dtype)
        )

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        for layer in (*self.blocks, self.norm):
            layer.build(input_shape)

    def call(
        self, x: Float[Tensor, "batch tokens dim"], training: bool | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        for block in self.blocks:
            x = block(x, training=training)
        return self.norm(x)


@keras.saving.register_keras_serializable(package="isovit")
class EfficientViT(SpecModel):
    """Vision Transformer with any transformer.

    Called with (batch, height, width, channels) images of ``config.image_size``; returns
    (batch, num_classes) logits, or the pooled features where the config has no head.

    Args:
        config: see ``EfficientViTConfig``.
        transformer: maps (batch, tokens, embed_dim) to the same; None for the one that the config
            describes.
        name: of the model.
        dtype: policy, ``float32`` or ``mixed_bfloat16`` for example; None for the global one.
    """

    def __init__(
        self,
        config: EfficientViTConfig,
        transformer: keras.layers.Layer | None = None,
        *,
        name: str = "efficient_vit",
        dtype: DType = None,
    ) -> None:
        super().__init__(config, name=name, dtype=dtype)
        dtype = self.dtype_policy
        self.patch_embed = NormLinearNormPatchEmbed(config.stem, name="patch_embed", dtype=dtype)
        self.dropout = Dropout(config.embed_dropout_rate, name="dropout", dtype=dtype)
        self.handed_in = transformer is not None
        self.transformer = (
            Transformer(config, name="transformer", dtype=dtype)
            if transformer is None
            else transformer
        )
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
        if self.handed_in:  # it need not have a ``build`` of its own, but can be called
            self.transformer(keras.Input((tokens, dim), dtype=self.compute_dtype))
        else:
            self.transformer.build((None, tokens, dim))
        self.norm.build((None, dim) if self.config.final_norm == "pooled" else (None, tokens, dim))
        self.head.build((None, dim))

    def embed(
        self, images: Float[Tensor, "batch height width channels"], training: bool | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """Every token, with its position: class token, patches."""
        x = self.patch_embed(self.checked(images))  # (batch, patches, dim)
        if self.cls_token is not None:
            cls_token = ops.broadcast_to(self.cls_token, (ops.shape(x)[0], 1, x.shape[-1]))
            x = ops.concatenate([cls_token, x], axis=1)
        return x + self.pos_embed

    def encode(
        self, x: Float[Tensor, "batch tokens dim"], training: bool | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """Every token behind the transformer, and behind the norm if that is over tokens."""
        x = self.transformer(self.dropout(x, training=training), training=training)
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

    def get_config(self) -> dict[str, Any]:
        """What ``from_config`` needs; a transformer that was handed in goes with it."""
        config = super().get_config()
        if self.handed_in:
            config["transformer"] = keras.saving.serialize_keras_object(self.transformer)
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Self:
        """The model of ``get_config``."""
        spec, transformer = cast("EfficientViTConfig", config_from_dict(config["config"])), None
        if "transformer" in config:
            transformer = keras.saving.deserialize_keras_object(
                config["transformer"], custom_objects=custom_objects
            )
        model = cls(spec, transformer, name=config["name"], dtype=config["dtype"])
        model.trainable = config["trainable"]
        return model
