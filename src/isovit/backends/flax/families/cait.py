"""CaiT in Flax.

Source: Touvron et al. 2021, arXiv:2103.17239, sections 2 and 3; both dialects, see the spec. Heads
that talk: Shazeer et al. 2020, arXiv:2003.02436.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from isovit.backends.flax.families.vit import PATCH_EMBEDS
from isovit.backends.flax.layers import (
    Block,
    Fixed,
    Kinds,
    LayerNorm,
    LayerScale,
    Linear,
    Mlp,
    attention,
    identity,
    split_heads,
)
from isovit.spec.families.cait import CaiTConfig


class MixHeads(nnx.Module):
    """A product over the heads, for each query and key by itself.

    It is written with the heads first, so that no (queries, keys) array is transposed.
    """

    def __init__(
        self, config: CaiTConfig, *, bias_trains: bool, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        heads, kind = config.num_heads, nnx.Param if bias_trains else Fixed
        draw = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(draw(rngs.params(), (heads, heads), param_dtype))
        self.bias = kind(jnp.zeros(heads, param_dtype)) if config.talking_heads_bias else None

    def __call__(
        self, x: Float[Array, "batch heads queries keys"]
    ) -> Float[Array, "batch heads queries keys"]:
        y = self.kernel[...].astype(x.dtype).mT @ x.reshape(*x.shape[:2], -1)
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)[:, None]
        return y.reshape(x.shape)


class TalkingHeads(nnx.Module):
    """mix(softmax(mix(q·kᵀ · scale)))·v, each mix over the heads; arXiv:2003.02436.

    The softmax does not see the first mix's bias, which therefore does not train.
    """

    def __init__(
        self,
        config: CaiTConfig,
        dropout_rate: float,
        *,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.scale, self.mixed_dropout = config.attn_scale, config.mixed_dropout
        self.proj_l = MixHeads(config, bias_trains=False, param_dtype=param_dtype, rngs=rngs)
        self.proj_w = MixHeads(config, bias_trains=True, param_dtype=param_dtype, rngs=rngs)
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)

    def __call__(
        self,
        q: Float[Array, "batch heads queries dim"],
        k: Float[Array, "batch heads keys dim"],
        v: Float[Array, "batch heads keys dim"],
    ) -> Float[Array, "batch heads queries dim"]:
        logits = self.proj_l((q * self.scale) @ k.mT)
        weights = jax.nn.softmax(logits, axis=-1)
        if self.mixed_dropout:
            weights = self.dropout(self.proj_w(weights))
        else:
            weights = self.proj_w(self.dropout(weights))
        return weights @ v


class Attention(nnx.Module):
    """Self-attention of the patches, whose heads talk; section 2."""

    def __init__(
        self, config: CaiTConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        dim, inner = config.embed_dim, config.inner_dim
        self.num_heads = config.num_heads
        self.qkv = Linear(dim, 3 * inner, use_bias=config.qkv_bias, **kinds)
        self.talking_heads = TalkingHeads(
            config, config.attn_dropout_rate, param_dtype=param_dtype, rngs=rngs
        )
        self.proj = Linear(inner, dim, use_bias=True, **kinds)
        self.proj_dropout = nnx.Dropout(config.dropout_rate, rngs=rngs)

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        batch, tokens, _ = x.shape
        # each (batch, heads, tokens, head_dim)
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        x = self.talking_heads(q, k, v)
        x = x.swapaxes(1, 2).reshape(batch, tokens, -1)  # (batch, tokens, heads * head_dim)
        return self.proj_dropout(self.proj(x))


class ClassAttention(nnx.Module):
    """Attention of the class token, the first, to all tokens; section 3."""

    def __init__(
        self, config: CaiTConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        dim, inner, rate = config.embed_dim, config.inner_dim, config.cls_attn_dropout_rate
        self.num_heads, self.scale = config.num_heads, config.attn_scale
        self.q = Linear(dim, inner, use_bias=config.qkv_bias, **kinds)
        self.kv = Linear(dim, 2 * inner, use_bias=config.qkv_bias, **kinds)
        self.talking_heads = (
            TalkingHeads(config, rate, param_dtype=param_dtype, rngs=rngs)
            if config.cls_talking_heads
            else None
        )
        self.attn_dropout = nnx.Dropout(rate, rngs=rngs)
        self.proj = Linear(inner, dim, use_bias=True, **kinds)
        self.proj_dropout = nnx.Dropout(config.cls_dropout_rate, rngs=rngs)

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch 1 dim"]:
        batch = x.shape[0]
        (q,) = split_heads(self.q(x[:, :1]), 1, self.num_heads)  # (batch, heads, 1, head_dim)
        k, v = split_heads(self.kv(x), 2, self.num_heads)  # each (batch, heads, tokens, head_dim)
        if self.talking_heads is None:
            x = attention(q, k, v, self.scale, self.attn_dropout)
        else:
            x = self.talking_heads(q, k, v)
        x = x.swapaxes(1, 2).reshape(batch, 1, -1)  # (batch, 1, heads * head_dim)
        return self.proj_dropout(self.proj(x))


class ClassBlock(nnx.Module):
    """Block over the class token, which looks at patches that stay as they are; section 3."""

    def __init__(
        self,
        config: CaiTConfig,
        index: int,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        dim, eps, gamma = config.embed_dim, config.norm_eps, config.layer_scale_start(index)
        hidden, rate = config.cls_mlp_width, config.cls_dropout_rate
        self.cls_norm = config.cls_norm
        self.norm1 = LayerNorm(dim, epsilon=eps, **kinds)
        self.attn = ClassAttention(config, **kinds)
        self.layer_scale1 = LayerScale(dim, gamma, param_dtype=param_dtype)
        self.norm2 = LayerNorm(dim, epsilon=eps, **kinds)
        self.mlp = Mlp(dim, hidden, config.activation, rate, **kinds)
        self.layer_scale2 = LayerScale(dim, gamma, param_dtype=param_dtype)

    def __call__(
        self, cls: Float[Array, "batch 1 dim"], x: Float[Array, "batch patches dim"]
    ) -> Float[Array, "batch 1 dim"]:
        if self.cls_norm == "tokens":
            u = self.norm1(jnp.concat([cls, x], axis=1))
        else:
            u = jnp.concat([self.norm1(cls), x], axis=1)
        cls = cls + self.layer_scale1(self.attn(u))
        cls = cls + self.layer_scale2(self.mlp(self.norm2(cls)))
        return cls


class CaiT(nnx.Module):
    """Class-Attention in Image Transformers.

    Called with (batch, height, width, channels) images of ``config.image_size``; returns
    (batch, num_classes) logits, or the pooled features where the config has no head.

    Args:
        config: see ``CaiTConfig``.
        dtype: of the computation.
        param_dtype: of the parameters.
        rngs: streams ``params`` and ``dropout``.
    """

    def __init__(
        self,
        config: CaiTConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.config, self.dtype = config, dtype
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        dim, classes = config.embed_dim, config.num_classes
        self.patch_embed = PATCH_EMBEDS[config.patch_embed](config.stem, **kinds)
        self.cls_token = nnx.Param(jnp.zeros((1, 1, dim), param_dtype))
        self.pos_embed = nnx.Param(jnp.zeros((1, config.patches, dim), param_dtype))
        self.dropout = nnx.Dropout(config.embed_dropout_rate, rngs=rngs)
        self.blocks = nnx.List(
            [Block(block, Attention(config, **kinds), **kinds) for block in config.blocks]
        )
        self.cls_blocks = nnx.List(
            [ClassBlock(config, i, **kinds) for i in range(config.cls_depth)]
        )
        self.norm = LayerNorm(dim, epsilon=config.norm_eps, **kinds)
        self.head = Linear(dim, classes, use_bias=True, **kinds) if classes else identity

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch ..."]:
        self.config.check_images(images.shape)
        x = self.patch_embed(images) + self.pos_embed[...].astype(self.dtype)
        x = self.dropout(x)  # (batch, patches, dim)
        for block in self.blocks:
            x = block(x)
        cls = self.cls_token[...].astype(self.dtype)
        cls = jnp.broadcast_to(cls, (x.shape[0], 1, x.shape[-1]))
        for block in self.cls_blocks:
            cls = block(cls, x)
        x = self.norm(jnp.concat([cls, x], axis=1))
        match self.config.pool:
            case "cls":
                x = x[:, 0]
            case "mean":
                x = x.mean(axis=1)
            case "mean_patches":
                x = x[:, 1:].mean(axis=1)
            case "none":
                pass
        return self.head(x)
