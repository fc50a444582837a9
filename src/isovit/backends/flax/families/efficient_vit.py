"""Efficient ViT in Flax.

Source: vit-pytorch's ``efficient.py`` (MIT); of the mixers Xiong et al. 2021, arXiv:2102.03902,
Choromanski et al. 2021, arXiv:2009.14794, and Shen et al. 2021, arXiv:1812.01243; see the spec.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from isovit.backends.flax.families.vit import NormLinearNormPatchEmbed
from isovit.backends.flax.layers import (
    Block,
    DepthwiseConv,
    Fixed,
    Kinds,
    LayerNorm,
    Linear,
    identity,
    pool,
    split_heads,
)
from isovit.spec.families.efficient_vit import EfficientViTConfig
from isovit.spec.initialize import normal_features


def pseudo_inverse(
    a: Float[Array, "batch heads rows rows"], iterations: int, norm: str
) -> Float[Array, "batch heads rows rows"]:
    """Z ← ¼ Z(13I − AZ(15I − AZ(7I − AZ))) from Aᵀ / (‖A‖₁ ‖A‖∞); arXiv:2102.03902, section 3.2.

    The rows of a softmax sum to 1, and so ‖A‖∞ is 1; ‖A‖₁ is the largest sum of a column, of each
    ``matrix`` or of the whole ``batch``.
    """
    columns = a.sum(axis=-2, keepdims=True)  # (batch, heads, 1, rows)
    z = a.mT / (columns.max() if norm == "batch" else columns.max(axis=-1, keepdims=True))
    eye = jnp.eye(a.shape[-1], dtype=a.dtype)
    for _ in range(iterations):
        az = a @ z
        z = z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))) / 4
    return z


class Mixer(nnx.Module):
    """Multi-head attention whose heads mix their tokens by a rule of its own, ``mix``."""

    def __init__(
        self,
        config: EfficientViTConfig,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        block, kinds = config.block, Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.num_heads, self.scale = block.num_heads, block.attn_scale
        self.qkv = Linear(block.dim, 3 * block.inner_dim, use_bias=block.qkv_bias, **kinds)
        self.proj = (
            Linear(block.inner_dim, block.dim, use_bias=True, **kinds) if block.attn_proj else None
        )
        self.proj_dropout = nnx.Dropout(block.dropout_rate if block.attn_proj else 0.0, rngs=rngs)

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        batch, tokens, _ = x.shape
        # each (batch, heads, tokens, head_dim)
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        x = self.mix(q, k, v).swapaxes(1, 2)  # (batch, tokens, heads, head_dim)
        x = x.reshape(batch, tokens, -1)  # (batch, tokens, heads * head_dim)
        if self.proj is not None:
            x = self.proj(x)
        return self.proj_dropout(x)

    def mix(self, q: Array, k: Array, v: Array) -> Array:
        """All (batch, heads, tokens, head_dim)."""
        raise NotImplementedError


class NystromAttention(Mixer):
    """softmax(q·k̃ᵀ) softmax(q̃·k̃ᵀ)⁺ softmax(q̃·kᵀ) v, q̃ and k̃ landmarks; arXiv:2102.03902, eq. 15.

    ``residual_conv`` adds v of the neighbours.
    """

    def __init__(
        self,
        config: EfficientViTConfig,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        super().__init__(config, **kinds)
        self.num_landmarks = config.num_landmarks
        self.pinv_iterations, self.pinv_norm = config.pinv_iterations, config.pinv_norm
        self.residual_conv = (
            DepthwiseConv(
                self.num_heads,
                kernel_size=(kernel, 1),
                stride=(1, 1),
                padding=(kernel // 2, 0),
                use_bias=False,
                **kinds,
            )
            if (kernel := config.residual_kernel) is not None
            else None
        )

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        return super().__call__(x)  # ``nnx.capture`` sees the calls that a class has itself

    def mix(self, q: Array, k: Array, v: Array) -> Array:
        q = q * self.scale
        keys = self.pad(k)  # (batch, heads, padded, head_dim)
        q_landmarks, k_landmarks = self.landmarks(self.pad(q)), self.landmarks(keys)
        to_landmarks = jax.nn.softmax(q @ k_landmarks.mT, axis=-1)
        among_landmarks = jax.nn.softmax(q_landmarks @ k_landmarks.mT, axis=-1)
        from_landmarks = jax.nn.softmax(q_landmarks @ keys.mT, axis=-1)
        inverse = pseudo_inverse(among_landmarks, self.pinv_iterations, self.pinv_norm)
        y = to_landmarks @ (inverse @ (from_landmarks @ self.pad(v)))
        if self.residual_conv is not None:  # over the tokens, one kernel for all numbers of a head
            v = v.transpose(0, 2, 3, 1)  # (batch, tokens, head_dim, heads)
            y = y + self.residual_conv(v).transpose(0, 3, 1, 2)
        return y

    def pad(self, x: Array) -> Array:
        """Zeros before the tokens, so that each landmark is the mean of as many."""
        zeros = -x.shape[2] % self.num_landmarks
        return jnp.pad(x, ((0, 0), (0, 0), (zeros, 0), (0, 0))) if zeros else x

    def landmarks(self, x: Array) -> Array:
        """Means of neighbouring tokens, (batch, heads, landmarks, head_dim)."""
        return x.reshape(*x.shape[:2], self.num_landmarks, -1, x.shape[-1]).mean(axis=3)


class PerformerAttention(Mixer):
    """φ(q)(φ(k)ᵀ v) / (φ(q)·Σ φ(k) + ε); Choromanski et al. 2021, arXiv:2009.14794, eq. 4, 5, 7."""

    def __init__(
        self,
        config: EfficientViTConfig,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.eps, self.stabilized = config.performer_eps, config.performer_stabilized
        features = normal_features(config.performer_features, config.block.head_dim)
        self.random_features = Fixed(jnp.asarray(features, param_dtype))

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        return super().__call__(x)

    def mix(self, q: Array, k: Array, v: Array) -> Array:
        root = math.sqrt(self.scale)  # of the factor on q·k: half of it is q's, half is k's
        q = self.feature_map(q * root, together=(-1,))  # (batch, heads, tokens, features)
        k = self.feature_map(k * root, together=(-2, -1))
        denominator = q @ k.sum(axis=-2, keepdims=True).mT  # (batch, heads, tokens, 1)
        numerator = q @ (k.mT @ v)  # (batch, heads, tokens, head_dim)
        return numerator / (denominator + self.eps)

    def feature_map(self, x: Array, together: tuple[int, ...]) -> Array:
        """φ(x) = exp(W x − ‖x‖² / 2 − c) / √m; c, a constant, is the largest of those together."""
        w = self.random_features[...].astype(x.dtype)
        exponent = x @ w.mT - jnp.square(x).sum(-1, keepdims=True) / 2
        if self.stabilized:
            exponent = exponent - jax.lax.stop_gradient(exponent).max(together, keepdims=True)
        return jnp.exp(exponent) / math.sqrt(w.shape[0])


class LinearAttention(Mixer):
    """softmax(q) (softmax(k)ᵀ v), q over its width and k over the tokens; arXiv:1812.01243, 3.2."""

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        return super().__call__(x)

    def mix(self, q: Array, k: Array, v: Array) -> Array:
        q, k = jax.nn.softmax(q, axis=-1), jax.nn.softmax(k, axis=-2)
        return q @ (k.mT @ v)


MIXERS = {"nystrom": NystromAttention, "performer": PerformerAttention, "linear": LinearAttention}


class Transformer(nnx.Module):
    """Pre-norm blocks with one of the mixers, and a LayerNorm where the config wants one."""

    def __init__(
        self,
        config: EfficientViTConfig,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kinds, mixer = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs), config.mixer
        self.blocks = nnx.List(
            [
                Block(
                    block, attn=None if mixer == "full" else MIXERS[mixer](config, **kinds), **kinds
                )
                for block in config.blocks
            ]
        )
        self.norm = (
            LayerNorm(config.embed_dim, epsilon=config.norm_eps, **kinds)
            if config.transformer_norm
            else identity
        )

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class EfficientViT(nnx.Module):
    """Vision Transformer with any transformer.

    Called with (batch, height, width, channels) images of ``config.image_size``; returns
    (batch, num_classes) logits, or the pooled features where the config has no head.

    Args:
        config: see ``EfficientViTConfig``.
        transformer: maps (batch, tokens, embed_dim) to the same; None for the one that the config
            describes.
        dtype: of the computation.
        param_dtype: of the parameters.
        rngs: streams ``params`` and ``dropout``.
    """

    def __init__(
        self,
        config: EfficientViTConfig,
        transformer: nnx.Module | None = None,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.config, self.dtype = config, dtype
        dim, kinds = config.embed_dim, Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.patch_embed = NormLinearNormPatchEmbed(config.stem, **kinds)
        self.cls_token = (
            nnx.Param(jnp.zeros((1, 1, dim), param_dtype)) if config.class_token else None
        )
        self.pos_embed = nnx.Param(jnp.zeros((1, config.tokens, dim), param_dtype))
        self.dropout = nnx.Dropout(config.embed_dropout_rate, rngs=rngs)
        self.transformer = Transformer(config, **kinds) if transformer is None else transformer
        has_norm, has_head = config.final_norm != "none", config.num_classes > 0
        self.norm = LayerNorm(dim, epsilon=config.norm_eps, **kinds) if has_norm else identity
        self.head = (
            Linear(dim, config.num_classes, use_bias=True, **kinds) if has_head else identity
        )

    def embed(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch tokens dim"]:
        """Every token, with its position: class token, patches."""
        self.config.check_images(images.shape)
        x = self.patch_embed(images)  # (batch, patches, dim)
        if self.cls_token is not None:
            shape = (x.shape[0], 1, x.shape[-1])
            cls_token = jnp.broadcast_to(self.cls_token[...].astype(self.dtype), shape)
            x = jnp.concat([cls_token, x], axis=1)
        return x + self.pos_embed[...].astype(self.dtype)

    def encode(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        """Every token behind the transformer, and behind the norm if that is over tokens."""
        x = self.transformer(self.dropout(x))
        return x if self.config.final_norm == "pooled" else self.norm(x)

    def classify(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch ..."]:
        """Logits of such tokens; features where there is no head."""
        x = pool(x, self.config)
        if self.config.final_norm == "pooled":
            x = self.norm(x)
        return self.head(x)

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch ..."]:
        return self.classify(self.encode(self.embed(images)))
