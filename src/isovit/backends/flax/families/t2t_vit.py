"""T2T-ViT in Flax.

Source: Yuan et al. 2021, arXiv:2101.11986, section 3; the official code (Clear BSD) and, for the
full-width mixer, vit-pytorch's ``t2t.py`` (MIT); see the spec for the differences.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from isovit.backends.flax.layers import (
    Block,
    Fixed,
    Kinds,
    LayerNorm,
    Linear,
    Mlp,
    attention,
    identity,
    pool,
)
from isovit.spec.families.t2t_vit import SoftSplit, Stage, T2TViTConfig
from isovit.spec.initialize import orthogonal_features
from isovit.spec.positions import sinusoidal_positions


def soft_split(
    x: Float[Array, "batch rows columns dim"], split: SoftSplit
) -> Float[Array, "batch tokens patch"]:
    """Overlapping patches, each flattened as (channel, height, width); section 3.1, eq. 3."""
    kernel, stride, padding = split
    rows, columns = split.output(x.shape[1]), split.output(x.shape[2])
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    shifts = [x[:, i : i + stride * rows : stride] for i in range(kernel)]
    x = jnp.stack(shifts, axis=-1)  # (batch, rows, width, dim, kernel)
    shifts = [x[:, :, j : j + stride * columns : stride] for j in range(kernel)]
    x = jnp.stack(shifts, axis=-1)  # (batch, rows, columns, dim, kernel, kernel)
    return x.reshape(x.shape[0], rows * columns, -1)  # (batch, tokens, dim * kernel * kernel)


class TokenPerformer(nnx.Module):
    """Token mixer with linear attention; Choromanski et al. 2021, arXiv:2009.14794, eq. 5 and 7.

    One head, width falls to ``token_dim``; q and k are not scaled, and the residual is v.
    """

    def __init__(
        self,
        config: T2TViTConfig,
        stage: Stage,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        dim, eps, rate = config.token_dim, config.norm_eps, config.token_dropout_rate
        self.eps, self.upcast = config.performer_eps, config.performer_upcast
        self.norm1 = LayerNorm(stage.dim, epsilon=eps, **kinds)
        self.kqv = Linear(stage.dim, 3 * dim, use_bias=True, **kinds)
        features = orthogonal_features(config.performer_features, dim)
        self.random_features = Fixed(jnp.asarray(features, param_dtype))
        self.proj = Linear(dim, dim, use_bias=True, **kinds)
        self.dropout1 = nnx.Dropout(rate, rngs=rngs)
        self.norm2 = LayerNorm(dim, epsilon=eps, **kinds)
        self.mlp = Mlp(dim, config.token_mlp_dim, config.activation, dropout_rate=0.0, **kinds)
        self.dropout2 = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x: Float[Array, "batch tokens patch"]) -> Float[Array, "batch tokens dim"]:
        k, q, v = jnp.split(self.kqv(self.norm1(x)), 3, axis=-1)  # in this order
        y = v + self.dropout1(self.proj(self.attention(q, k, v)))
        return y + self.dropout2(self.mlp(self.norm2(y)))

    def attention(self, q: Array, k: Array, v: Array) -> Array:
        """Σ_s φ(q)·φ(k_s) v_s / (φ(q)·Σ_s φ(k_s) + ε), all (batch, tokens, dim)."""
        dtype = v.dtype
        if self.upcast:
            q, k, v = (z.astype(jnp.promote_types(dtype, jnp.float32)) for z in (q, k, v))
        q, k = self.feature_map(q), self.feature_map(k)  # (batch, tokens, features)
        denominator = q @ k.sum(axis=1, keepdims=True).mT  # (batch, tokens, 1)
        numerator = q @ (k.mT @ v)  # (batch, tokens, dim)
        return (numerator / (denominator + self.eps)).astype(dtype)

    def feature_map(self, x: Array) -> Array:
        """φ(x) = exp(W x − ‖x‖² / 2) / √m."""
        w = self.random_features[...].astype(x.dtype)
        square = jnp.square(x).sum(-1, keepdims=True)
        return jnp.exp(x @ w.mT - square / 2) / math.sqrt(w.shape[0])


class TokenAttention(nnx.Module):
    """One head of self-attention whose width falls to ``token_dim`` and whose residual is v."""

    def __init__(
        self,
        config: T2TViTConfig,
        stage: Stage,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        linear = partial(Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        dim = config.token_dim
        self.scale = (stage.dim if config.token_scale == "input_dim" else dim) ** -0.5
        self.qkv = linear(stage.dim, 3 * dim, use_bias=False)
        self.attn_dropout = nnx.Dropout(config.token_dropout_rate, rngs=rngs)
        self.proj = linear(dim, dim, use_bias=True)
        self.proj_dropout = nnx.Dropout(config.token_dropout_rate, rngs=rngs)

    def __call__(self, x: Float[Array, "batch tokens patch"]) -> Float[Array, "batch tokens dim"]:
        q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
        x = attention(q, k, v, self.scale, self.attn_dropout)
        return v + self.proj_dropout(self.proj(x))


class TokenTransformer(nnx.Module):
    """Token mixer with softmax attention, of the official code."""

    def __init__(
        self,
        config: T2TViTConfig,
        stage: Stage,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        dim, eps, rate = config.token_dim, config.norm_eps, config.token_dropout_rate
        self.norm1 = LayerNorm(stage.dim, epsilon=eps, **kinds)
        self.attn = TokenAttention(config, stage, **kinds)
        self.norm2 = LayerNorm(dim, epsilon=eps, **kinds)
        self.mlp = Mlp(dim, config.token_mlp_dim, config.activation, rate, **kinds)

    def __call__(self, x: Float[Array, "batch tokens patch"]) -> Float[Array, "batch tokens dim"]:
        x = self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class FullMixer(nnx.Module):
    """Token mixer at full width, of vit-pytorch: a block of one head, then a LayerNorm."""

    def __init__(
        self,
        config: T2TViTConfig,
        stage: Stage,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.block = Block(config.full_mixer(stage.dim), **kinds)
        self.norm = LayerNorm(stage.dim, epsilon=config.norm_eps, **kinds)

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        return self.norm(self.block(x))


MIXERS = {"performer": TokenPerformer, "transformer": TokenTransformer, "full": FullMixer}


class SplitProjection(Linear):
    """The last soft split and the product behind it: x·W + b of every patch x; section 3.1."""

    def __init__(
        self,
        stage: Stage,
        dim_out: int,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        super().__init__(stage.dim, dim_out, use_bias=True, **kinds)
        self.split = stage.split

    def __call__(
        self, inputs: Float[Array, "batch rows columns dim"], out_sharding: Any = None
    ) -> Float[Array, "batch tokens dim_out"]:
        return super().__call__(soft_split(inputs, self.split), out_sharding)


class TokensToToken(nnx.Module):
    """The stem: soft splits with a token mixer between each and the next; section 3.1."""

    def __init__(
        self, config: T2TViTConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.stages = config.stages
        mixer, last = MIXERS[config.token_mixer], self.stages[-1]
        self.mixers = nnx.List([mixer(config, stage, **kinds) for stage in self.stages[:-1]])
        self.project = SplitProjection(last, config.embed_dim, **kinds)

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch tokens dim"]:
        x = images
        for stage, mixer in zip(self.stages, self.mixers, strict=False):
            x = mixer(soft_split(x, stage.split))  # (batch, tokens, dim)
            x = x.reshape(x.shape[0], *stage.grid, -1)  # (batch, rows, columns, dim)
        return self.project(x)


class T2TViT(nnx.Module):
    """Tokens-to-Token ViT.

    Called with (batch, height, width, channels) images of ``config.image_size``; returns
    (batch, num_classes) logits, or the pooled features where the config has no head.

    Args:
        config: see ``T2TViTConfig``.
        dtype: of the computation.
        param_dtype: of the parameters.
        rngs: streams ``params`` and ``dropout``.
    """

    def __init__(
        self,
        config: T2TViTConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.config, self.dtype = config, dtype
        dim, kinds = config.embed_dim, Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.tokens_to_token = TokensToToken(config, **kinds)
        self.cls_token = (
            nnx.Param(jnp.zeros((1, 1, dim), param_dtype)) if config.class_token else None
        )
        if config.pos_embed == "learned":
            self.pos_embed = nnx.Param(jnp.zeros((1, config.tokens, dim), param_dtype))
        else:
            positions = sinusoidal_positions(config.tokens, dim)[None]
            self.pos_embed = Fixed(jnp.asarray(positions, param_dtype))
        self.dropout = nnx.Dropout(config.embed_dropout_rate, rngs=rngs)
        self.blocks = nnx.List([Block(block, **kinds) for block in config.blocks])
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
        x = self.tokens_to_token(images)  # (batch, patches, dim)
        if self.cls_token is not None:
            cls_token = self.cls_token[...].astype(self.dtype)
            x = jnp.concat([jnp.broadcast_to(cls_token, (x.shape[0], 1, x.shape[-1])), x], axis=1)
        return x + self.pos_embed[...].astype(self.dtype)

    def encode(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        """Every token behind the blocks, and behind the norm if that is over tokens."""
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
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
