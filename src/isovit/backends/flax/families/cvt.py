"""CvT in Flax.

Source: Wu et al. 2021, arXiv:2103.15808, section 3; the official code (MIT), transformers'
(Apache-2.0) and, for the other form, vit-pytorch's ``cvt.py`` (MIT); see the spec.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from isovit.backends.flax.layers import (
    BatchNorm,
    Block,
    Conv,
    DepthwiseConv,
    Fixed,
    Kinds,
    LayerNorm,
    Linear,
    attention,
    identity,
    split_heads,
)
from isovit.spec.blocks import BlockConfig
from isovit.spec.families.cvt import CvTConfig, StageConfig


def fix_bias(layer: Any) -> None:
    """Leave the bias of a layer out of training."""
    layer.bias = Fixed(layer.bias[...])


class ConvEmbed(nnx.Module):
    """Overlapping patches to tokens: a convolution, then LayerNorm; section 3.1."""

    def __init__(
        self,
        config: CvTConfig,
        stage: StageConfig,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        side, stride, padding = stage.patch_size, stage.patch_stride, stage.patch_padding
        self.in_grid = stage.in_grid
        self.proj = Conv(
            stage.in_dim,
            stage.dim,
            kernel_size=(side, side),
            stride=(stride, stride),
            padding=(padding, padding),
            use_bias=True,
            **kinds,
        )
        self.norm = LayerNorm(stage.dim, epsilon=config.norm_eps, **kinds)

    def __call__(
        self, x: Float[Array, "batch tokens_in dim_in"]
    ) -> Float[Array, "batch tokens dim"]:
        x = self.proj(x.reshape(x.shape[0], *self.in_grid, -1))  # (batch, rows, columns, dim)
        return self.norm(x.reshape(x.shape[0], -1, x.shape[-1]))


class ConvProjection(nnx.Module):
    """Convolution of each channel by itself, BatchNorm, then a product; section 3.2, eq. 2.

    With a stride it gives fewer tokens. A class token comes to the product as it is.
    """

    def __init__(
        self,
        config: CvTConfig,
        stage: StageConfig,
        width: int,
        stride: int,
        *,
        of_keys: bool,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        dim, side = stage.dim, stage.kernel_size
        self.grid, self.class_token = stage.grid, stage.class_token
        self.conv = DepthwiseConv(
            dim,
            kernel_size=(side, side),
            stride=(stride, stride),
            padding=(side // 2, side // 2),
            use_bias=False,
            **kinds,
        )
        self.norm = BatchNorm(
            dim, epsilon=config.batch_norm_eps, momentum=config.batch_norm_momentum, **kinds
        )
        self.proj = Linear(dim, width, use_bias=config.qkv_bias, **kinds)
        if of_keys and config.qkv_bias:  # no softmax sees what all keys have in common
            fix_bias(self.proj)
        if of_keys and not stage.class_token:
            fix_bias(self.norm)

    def __call__(
        self, x: Float[Array, "batch tokens dim"]
    ) -> Float[Array, "batch tokens_out width"]:
        batch, _, dim = x.shape
        image = x[:, int(self.class_token) :].reshape(batch, *self.grid, dim)
        y = self.norm(self.conv(image)).reshape(batch, -1, dim)  # (batch, tokens_out, dim)
        if self.class_token:
            y = jnp.concatenate([x[:, :1], y], axis=1)
        return self.proj(y)


class Attention(nnx.Module):
    """Attention whose q, k and v are projected by convolutions; section 3.2."""

    def __init__(
        self,
        config: CvTConfig,
        stage: StageConfig,
        block: BlockConfig,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        project, inner = partial(ConvProjection, config, stage, **kinds), block.inner_dim
        self.num_heads, self.scale, stride = block.num_heads, block.attn_scale, stage.kv_stride
        self.one_conv = config.kv_convs == "one"
        self.q = project(inner, 1, of_keys=False)
        if self.one_conv:
            self.kv = project(2 * inner, stride, of_keys=False)
        else:
            self.k = project(inner, stride, of_keys=True)
            self.v = project(inner, stride, of_keys=False)
        self.attn_dropout = nnx.Dropout(block.attn_dropout_rate, rngs=rngs)
        self.proj = Linear(inner, stage.dim, use_bias=True, **kinds)
        self.proj_dropout = nnx.Dropout(block.dropout_rate, rngs=rngs)

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        (q,) = split_heads(self.q(x), 1, self.num_heads)  # (batch, heads, tokens, head_dim)
        if self.one_conv:
            k, v = split_heads(self.kv(x), 2, self.num_heads)  # each (batch, heads, keys, head_dim)
        else:
            (k,) = split_heads(self.k(x), 1, self.num_heads)
            (v,) = split_heads(self.v(x), 1, self.num_heads)
        y = attention(q, k, v, self.scale, self.attn_dropout)
        y = y.swapaxes(1, 2).reshape(*x.shape[:2], -1)  # (batch, tokens, heads * head_dim)
        return self.proj_dropout(self.proj(y))


class Stage(nnx.Module):
    """Embedding, class token and blocks."""

    def __init__(
        self,
        config: CvTConfig,
        stage: StageConfig,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.patch_embed = ConvEmbed(config, stage, **kinds)
        self.cls_token = (
            nnx.Param(jnp.zeros((1, 1, stage.dim), param_dtype)) if stage.class_token else None
        )
        self.dropout = nnx.Dropout(config.embed_dropout_rate, rngs=rngs)
        self.blocks = nnx.List(
            [
                Block(block, Attention(config, stage, block, **kinds), **kinds)
                for block in stage.blocks
            ]
        )

    def __call__(
        self, x: Float[Array, "batch tokens_in dim_in"]
    ) -> Float[Array, "batch tokens dim"]:
        x = self.patch_embed(x)  # (batch, rows * columns, dim)
        if self.cls_token is not None:
            token = jnp.broadcast_to(self.cls_token[...], (x.shape[0], 1, x.shape[-1]))
            x = jnp.concatenate([token.astype(x.dtype), x], axis=1)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        return x


class CvT(nnx.Module):
    """Convolutional vision transformer.

    Called with (batch, height, width, channels) images of ``config.image_size``; returns
    (batch, num_classes) logits, or the pooled features where the config has no head.

    Args:
        config: see ``CvTConfig``.
        dtype: of the computation.
        param_dtype: of the parameters.
        rngs: streams ``params`` and ``dropout``.
    """

    def __init__(
        self,
        config: CvTConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.config, self.dtype = config, dtype
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        dim, classes, has_norm = config.feature_dim, config.num_classes, config.final_norm != "none"
        self.stages = nnx.List([Stage(config, stage, **kinds) for stage in config.stages])
        self.norm = LayerNorm(dim, epsilon=config.norm_eps, **kinds) if has_norm else identity
        self.head = Linear(dim, classes, use_bias=True, **kinds) if classes > 0 else identity

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch ..."]:
        self.config.check_images(images.shape)
        x = images.reshape(images.shape[0], -1, images.shape[-1])  # (batch, pixels, channels)
        for stage in self.stages:
            x = stage(x)  # (batch, tokens, dim)
        x = self.norm(x)
        match self.config.pool:
            case "cls":
                x = x[:, 0]
            case "mean":
                x = x.mean(axis=1)
        return self.head(x)
