"""DeepViT in Flax.

Source: Zhou et al. 2021, arXiv:2103.11886, section 4.2; the official code (MIT) and, for LayerNorm
over the heads, vit-pytorch's ``deepvit.py`` (MIT); see the spec for the differences.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from isovit.backends.flax.families.vit import PATCH_EMBEDS
from isovit.backends.flax.layers import (
    BatchNorm,
    Conv,
    Kinds,
    LayerNorm,
    Linear,
    identity,
    pool,
    split_heads,
)
from isovit.backends.flax.layers import Block as PreNormBlock
from isovit.spec.families.deepvit import DeepViTConfig


class ConvsPatchEmbed(nnx.Module):
    """Three convolutions, with BatchNorm and ReLU behind the first two; the official S and L."""

    def __init__(
        self, config: DeepViTConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        in_dim, dim, (height, width) = config.in_channels, config.stem_dim, config.patch_size
        half = (height // 2, width // 2)  # the first convolution has halved the image
        conv = partial(Conv, **kinds)
        norm = partial(
            BatchNorm, epsilon=config.batch_norm_eps, momentum=config.batch_norm_momentum, **kinds
        )
        self.conv1 = conv(
            in_dim, dim, kernel_size=(7, 7), stride=(2, 2), padding=(3, 3), use_bias=False
        )
        self.bn1 = norm(dim)
        self.conv2 = conv(
            dim, dim, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), use_bias=False
        )
        self.bn2 = norm(dim)
        self.proj = conv(
            dim, config.embed_dim, kernel_size=half, stride=half, padding=(0, 0), use_bias=True
        )

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch tokens dim"]:
        x = jax.nn.relu(self.bn1(self.conv1(images)))  # (batch, height / 2, width / 2, stem_dim)
        x = jax.nn.relu(self.bn2(self.conv2(x)))
        x = self.proj(x)  # (batch, rows, columns, dim)
        return x.reshape(x.shape[0], -1, x.shape[-1])


class ReAttention(nnx.Module):
    """norm(softmax(q·kᵀ · scale)·Θ)·v, where Θ mixes the heads; arXiv:2103.11886, eq. 3."""

    def __init__(
        self, config: DeepViTConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        block, heads, momentum = config.block, config.num_heads, config.batch_norm_momentum
        self.num_heads, self.scale = heads, block.attn_scale
        self.mixed_scale = config.re_attention_scale
        self.qkv = Linear(block.dim, 3 * block.inner_dim, use_bias=block.qkv_bias, **kinds)
        self.attn_dropout = nnx.Dropout(block.attn_dropout_rate, rngs=rngs)
        self.mix = Linear(heads, heads, use_bias=config.re_attention_bias, **kinds)
        self.mix_norm = (
            BatchNorm(heads, epsilon=config.batch_norm_eps, momentum=momentum, **kinds)
            if config.re_attention_norm == "batch_norm"
            else LayerNorm(heads, epsilon=config.norm_eps, **kinds)
        )
        self.proj = (
            Linear(block.inner_dim, block.dim, use_bias=True, **kinds) if block.attn_proj else None
        )
        self.proj_dropout = nnx.Dropout(block.dropout_rate if block.attn_proj else 0.0, rngs=rngs)

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        batch, tokens, _ = x.shape
        # each (batch, heads, tokens, head_dim)
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        weights = self.attn_dropout(jax.nn.softmax((q * self.scale) @ k.mT, axis=-1))
        weights = weights.transpose(0, 2, 3, 1)  # (batch, tokens, tokens, heads)
        weights = self.mix_norm(self.mix(weights)) * self.mixed_scale
        x = weights.transpose(0, 3, 1, 2) @ v  # (batch, heads, tokens, head_dim)
        x = x.swapaxes(1, 2).reshape(batch, tokens, -1)  # (batch, tokens, heads * head_dim)
        if self.proj is not None:
            x = self.proj(x)
        return self.proj_dropout(x)


class Block(PreNormBlock):
    """Pre-norm block with re-attention, or attention, and a scale around each branch."""

    def __init__(
        self,
        config: DeepViTConfig,
        index: int,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        attn = ReAttention(config, **kinds) if config.re_attends(index) else None
        super().__init__(config.blocks[index], attn, **kinds)
        self.branch_scale = config.branch_scale

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        scale = self.branch_scale
        x = x + self.drop_path1(self.layer_scale1(self.attn(self.norm1(x * scale)))) / scale
        x = x + self.drop_path2(self.layer_scale2(self.mlp(self.norm2(x * scale)))) / scale
        return x


class DeepViT(nnx.Module):
    """Deep Vision Transformer.

    Called with (batch, height, width, channels) images of ``config.image_size``; returns
    (batch, num_classes) logits, or the pooled features where the config has no head.

    Args:
        config: see ``DeepViTConfig``.
        dtype: of the computation.
        param_dtype: of the parameters.
        rngs: streams ``params`` and ``dropout``.
    """

    def __init__(
        self,
        config: DeepViTConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.config, self.dtype = config, dtype
        dim, kinds = config.embed_dim, Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.patch_embed = (
            ConvsPatchEmbed(config, **kinds)
            if config.patch_embed == "convs"
            else PATCH_EMBEDS[config.patch_embed](config.stem, **kinds)
        )
        self.cls_token = (
            nnx.Param(jnp.zeros((1, 1, dim), param_dtype)) if config.class_token else None
        )
        self.pos_embed = nnx.Param(jnp.zeros((1, config.tokens, dim), param_dtype))
        self.dropout = nnx.Dropout(config.embed_dropout_rate, rngs=rngs)
        self.blocks = nnx.List([Block(config, index, **kinds) for index in range(config.depth)])
        has_norm, has_head = config.final_norm != "none", config.num_classes > 0
        self.norm = LayerNorm(dim, epsilon=config.norm_eps, **kinds) if has_norm else identity
        self.head = (
            Linear(dim, config.num_classes, use_bias=True, **kinds) if has_head else identity
        )

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch ..."]:
        self.config.check_images(images.shape)
        x = self.patch_embed(images)  # (batch, patches, dim)
        if self.cls_token is not None:
            shape = (x.shape[0], 1, x.shape[-1])
            cls_token = jnp.broadcast_to(self.cls_token[...].astype(self.dtype), shape)
            x = jnp.concat([cls_token, x], axis=1)
        x = self.dropout(x + self.pos_embed[...].astype(self.dtype))
        for block in self.blocks:
            x = block(x)
        if self.config.final_norm == "pooled":
            x = self.norm(pool(x, self.config))
        else:
            x = pool(self.norm(x), self.config)
        return self.head(x)
