"""T2T-ViT with designs of convolutional networks, in Flax.

Source: Yuan et al. 2021, arXiv:2101.11986, section 3.2; the official code (Clear BSD); see the spec
for the differences between the designs.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from isovit.backends.flax.families.t2t_vit import TokensToToken
from isovit.backends.flax.layers import (
    ACTIVATIONS,
    Block,
    Fixed,
    Kinds,
    LayerNorm,
    Linear,
    attention,
    identity,
    pool,
    split_heads,
)
from isovit.spec.blocks import BlockConfig
from isovit.spec.families.t2t_vit_designs import Halving, T2TViTDesignsConfig
from isovit.spec.positions import sinusoidal_positions


class SqueezeExcite(nnx.Module):
    """Each channel by a number from the mean over all tokens; arXiv:1709.01507, eq. 2 to 4."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        linear = partial(Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.fc1 = linear(dim, hidden_dim, use_bias=False)
        self.fc2 = linear(hidden_dim, dim, use_bias=False)

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        y = jax.nn.relu(self.fc1(x.mean(axis=1)))  # (batch, hidden)
        y = jax.nn.sigmoid(self.fc2(y))  # (batch, dim)
        return x * y[:, None]


class SEAttention(nnx.Module):
    """Multi-head self-attention whose channels are weighed behind the projection."""

    def __init__(
        self,
        config: BlockConfig,
        se_dim: int,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        dim, inner_dim = config.dim, config.inner_dim
        self.num_heads, self.scale = config.num_heads, config.attn_scale
        self.qkv = Linear(dim, 3 * inner_dim, use_bias=config.qkv_bias, **kinds)
        self.attn_dropout = nnx.Dropout(config.attn_dropout_rate, rngs=rngs)
        self.proj = Linear(inner_dim, dim, use_bias=True, **kinds) if config.attn_proj else None
        self.se_layer = SqueezeExcite(dim, se_dim, **kinds)
        self.proj_dropout = nnx.Dropout(config.dropout_rate if config.attn_proj else 0.0, rngs=rngs)

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        batch, tokens, _ = x.shape
        # each (batch, heads, tokens, head_dim)
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        x = attention(q, k, v, self.scale, self.attn_dropout)
        x = x.swapaxes(1, 2).reshape(batch, tokens, -1)  # (batch, tokens, heads * head_dim)
        if self.proj is not None:
            x = self.proj(x)
        return self.proj_dropout(self.se_layer(x))


class CheapOperation(nnx.Module):
    """A copy of each channel, by a factor: a depthwise convolution of one token, without bias.

    Han et al. 2020, arXiv:1911.11907, section 3.1.
    """

    def __init__(self, dim: int, *, param_dtype: DTypeLike) -> None:
        self.factor = nnx.Param(jnp.ones((dim,), param_dtype))

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        return x * self.factor[...].astype(x.dtype)


class GhostAttention(nnx.Module):
    """Multi-head self-attention of which half the channels of q, of k and of v are copies.

    The copies lie behind what they are of, so that they fill the second half of the heads.
    """

    def __init__(
        self, config: BlockConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        linear = partial(Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        made = 3 * (config.inner_dim // 2)
        self.num_heads, self.scale = config.num_heads, config.attn_scale
        self.qkv = linear(config.dim, made, use_bias=config.qkv_bias)
        self.cheap = CheapOperation(made, param_dtype=param_dtype)
        self.attn_dropout = nnx.Dropout(config.attn_dropout_rate, rngs=rngs)
        self.proj = (
            linear(config.inner_dim, config.dim, use_bias=True) if config.attn_proj else None
        )
        self.proj_dropout = nnx.Dropout(config.dropout_rate if config.attn_proj else 0.0, rngs=rngs)

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        batch, tokens, _ = x.shape
        x = self.qkv(x)
        halves = x, self.cheap(x)  # q, k and v side by side in each
        x = jnp.concat([half.reshape(batch, tokens, 3, -1) for half in halves], axis=-1)
        q, k, v = split_heads(x.reshape(batch, tokens, -1), 3, self.num_heads)
        x = attention(q, k, v, self.scale, self.attn_dropout)
        x = x.swapaxes(1, 2).reshape(batch, tokens, -1)  # (batch, tokens, heads * head_dim)
        if self.proj is not None:
            x = self.proj(x)
        return self.proj_dropout(x)


class GhostMlp(nnx.Module):
    """Dense, activation, dense, where copies widen what the first product gives."""

    def __init__(
        self, config: BlockConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        linear = partial(Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        dim, hidden_dim = config.dim, config.mlp_dim
        self.fc1 = linear(dim, dim, use_bias=True)
        self.activation = ACTIVATIONS[config.activation]
        self.cheap = nnx.List(
            [CheapOperation(dim, param_dtype=param_dtype) for _ in range(hidden_dim // dim - 1)]
        )
        self.dropout1 = nnx.Dropout(config.dropout_rate, rngs=rngs)
        self.fc2 = linear(hidden_dim, dim, use_bias=True)
        self.dropout2 = nnx.Dropout(config.dropout_rate, rngs=rngs)

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        x = self.activation(self.fc1(x))
        copies = [self.activation(cheap(x)) for cheap in self.cheap]  # activated once more
        x = jnp.concat([x, *copies], axis=-1)  # (batch, tokens, hidden)
        return self.dropout2(self.fc2(self.dropout1(x)))


class DenseBlock(Block):
    """A block whose output, by a product, is put behind its input; arXiv:1608.06993, eq. 2."""

    def __init__(
        self,
        config: BlockConfig,
        growth: int,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        super().__init__(config, **kinds)
        self.dense_linear = Linear(config.dim, growth, use_bias=True, **kinds)

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens wider"]:
        return jnp.concat([x, self.dense_linear(super().__call__(x))], axis=-1)


class Transition(nnx.Module):
    """Half of the width, between two stages of dense blocks."""

    def __init__(
        self,
        config: Halving,
        activation: str,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.linear = Linear(config.dim, config.out_dim, use_bias=True, **kinds)
        self.activation = ACTIVATIONS[activation]

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens half"]:
        return self.activation(self.linear(x))


def make_layer(
    config: T2TViTDesignsConfig,
    layer: BlockConfig | Halving,
    *,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """A block of the design, or a transition between its stages."""
    kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    if isinstance(layer, Halving):
        return Transition(layer, config.activation, **kinds)
    match config.design:
        case "se":
            return Block(layer, attn=SEAttention(layer, config.se_dim, **kinds), **kinds)
        case "ghost":
            attn, mlp = GhostAttention(layer, **kinds), GhostMlp(layer, **kinds)
            return Block(layer, attn=attn, mlp=mlp, **kinds)
        case "dense":
            return DenseBlock(layer, config.dense_growth, **kinds)


class T2TViTDesigns(nnx.Module):
    """Tokens-to-Token ViT with a design of convolutional networks.

    Called with (batch, height, width, channels) images of ``config.image_size``; returns
    (batch, num_classes) logits, or the pooled features where the config has no head.

    Args:
        config: see ``T2TViTDesignsConfig``.
        dtype: of the computation.
        param_dtype: of the parameters.
        rngs: streams ``params`` and ``dropout``.
    """

    def __init__(
        self,
        config: T2TViTDesignsConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.config, self.dtype = config, dtype
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        dim, features = config.embed_dim, config.feature_dim
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
        self.blocks = nnx.List([make_layer(config, layer, **kinds) for layer in config.layers])
        has_norm, has_head = config.final_norm != "none", config.num_classes > 0
        self.norm = LayerNorm(features, epsilon=config.norm_eps, **kinds) if has_norm else identity
        self.head = (
            Linear(features, config.num_classes, use_bias=True, **kinds) if has_head else identity
        )

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch ..."]:
        self.config.check_images(images.shape)
        x = self.tokens_to_token(images)  # (batch, patches, dim)
        if self.cls_token is not None:
            cls_token = self.cls_token[...].astype(self.dtype)
            x = jnp.concat([jnp.broadcast_to(cls_token, (x.shape[0], 1, x.shape[-1])), x], axis=1)
        x = self.dropout(x + self.pos_embed[...].astype(self.dtype))
        for block in self.blocks:
            x = block(x)  # in the dense design of another width each time
        if self.config.final_norm == "pooled":
            x = self.norm(pool(x, self.config))
        else:
            x = pool(self.norm(x), self.config)
        return self.head(x)
