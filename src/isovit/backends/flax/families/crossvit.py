"""CrossViT in Flax.

Source: Chen et al. 2021, arXiv:2103.14899, section 3; the official code and timm (Apache-2.0) and
vit-pytorch's ``cross_vit.py`` (MIT); see the spec for the differences.
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
    ACTIVATIONS,
    Block,
    Conv,
    DropPath,
    Kinds,
    LayerNorm,
    Linear,
    attention,
    identity,
    resample,
    split_heads,
)
from isovit.spec.blocks import BlockConfig
from isovit.spec.families.crossvit import STEMS, Branch, CrossViTConfig, Fusion, Stage
from isovit.spec.resample import torch_bicubic


class BicubicResize(nnx.Module):
    """The image at the size of a branch, R X Cᵀ: the same on every framework."""

    def __init__(self, branch: Branch) -> None:
        self.source_size, self.size = branch.source_size, branch.image_size

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch rows columns channels"]:
        rows, columns = map(torch_bicubic, self.source_size, self.size)
        return resample(images, rows, columns)


class CentreCrop(nnx.Module):
    """The centre of the image, of the size of a branch."""

    def __init__(self, branch: Branch) -> None:
        self.corner, self.size = branch.corner, branch.image_size

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch rows columns channels"]:
        (top, left), (rows, columns) = self.corner, self.size
        return images[:, top : top + rows, left : left + columns]


class ConvStem(nnx.Module):
    """Three convolutions that together have the stride of a patch; the models marked †."""

    def __init__(
        self, branch: Branch, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        dim1, dim2, dim3 = branch.stem_dims
        first, second, third = (shape._asdict() for shape in STEMS[branch.patch_size])
        self.conv1 = Conv(branch.in_channels, dim1, **first, use_bias=True, **kinds)
        self.conv2 = Conv(dim1, dim2, **second, use_bias=True, **kinds)
        self.conv3 = Conv(dim2, dim3, **third, use_bias=True, **kinds)

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch tokens dim"]:
        x = jax.nn.relu(self.conv1(images))
        x = jax.nn.relu(self.conv2(x))
        x = self.conv3(x)  # (batch, rows, columns, dim)
        return x.reshape(x.shape[0], -1, x.shape[-1])


RESIZES = {"bicubic": BicubicResize, "crop": CentreCrop}


class BranchEmbed(nnx.Module):
    """From the model's image to the tokens of one branch, class token first."""

    def __init__(
        self,
        config: CrossViTConfig,
        branch: Branch,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.dtype = dtype
        resized = branch.scaling != "none"
        self.resize = RESIZES[branch.scaling](branch) if resized else identity
        self.patch_embed = (
            ConvStem(branch, **kinds)
            if config.patch_embed == "conv_stem"
            else PATCH_EMBEDS[config.patch_embed](config.stem(branch), **kinds)
        )
        self.cls_token = nnx.Param(jnp.zeros((1, 1, branch.dim), param_dtype))
        self.pos_embed = nnx.Param(jnp.zeros((1, branch.tokens, branch.dim), param_dtype))
        self.dropout = nnx.Dropout(config.embed_dropout_rate, rngs=rngs)

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch tokens dim"]:
        x = self.patch_embed(self.resize(images))  # (batch, patches, dim)
        cls_token = self.cls_token[...].astype(self.dtype)
        x = jnp.concat([jnp.broadcast_to(cls_token, (x.shape[0], 1, x.shape[-1])), x], axis=1)
        return self.dropout(x + self.pos_embed[...].astype(self.dtype))


class CrossAttention(nnx.Module):
    """Attention of one token over others; section 3.3, eq. 6."""

    def __init__(
        self,
        config: CrossViTConfig,
        fusion: Fusion,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        linear = partial(Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        dim, inner_dim = fusion.other_dim, fusion.inner_dim
        self.num_heads = fusion.num_heads
        self.scale = fusion.head_dim**-0.5
        self.q = linear(dim, inner_dim, use_bias=config.qkv_bias)
        self.kv = linear(dim, 2 * inner_dim, use_bias=config.qkv_bias)
        self.attn_dropout = nnx.Dropout(config.attn_dropout_rate, rngs=rngs)
        self.proj = linear(inner_dim, dim, use_bias=True)
        self.proj_dropout = nnx.Dropout(config.dropout_rate, rngs=rngs)

    def __call__(
        self, token: Float[Array, "batch 1 dim"], context: Float[Array, "batch tokens dim"]
    ) -> Float[Array, "batch 1 dim"]:
        batch = context.shape[0]
        (q,) = split_heads(self.q(token), 1, self.num_heads)  # (batch, heads, 1, head_dim)
        # each (batch, heads, tokens, head_dim)
        k, v = split_heads(self.kv(context), 2, self.num_heads)
        x = attention(q, k, v, self.scale, self.attn_dropout)
        x = x.swapaxes(1, 2).reshape(batch, 1, -1)  # (batch, 1, heads * head_dim)
        return self.proj_dropout(self.proj(x))


class ProjectedFusion(nnx.Module):
    """The class token goes to the other branch's width and back; section 3.3, eq. 5 and 7."""

    def __init__(
        self,
        config: CrossViTConfig,
        fusion: Fusion,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        dim, other_dim, eps = fusion.dim, fusion.other_dim, config.norm_eps
        self.activation = ACTIVATIONS[config.activation]
        self.norm_in = LayerNorm(dim, epsilon=eps, **kinds)
        self.proj_in = Linear(dim, other_dim, use_bias=True, **kinds)
        self.norm = LayerNorm(other_dim, epsilon=eps, **kinds)
        self.attn = CrossAttention(config, fusion, **kinds)
        self.drop_path = DropPath(fusion.drop_path_rate, rngs=rngs)
        self.norm_out = LayerNorm(other_dim, epsilon=eps, **kinds)
        self.proj_out = Linear(other_dim, dim, use_bias=True, **kinds)

    def __call__(
        self, token: Float[Array, "batch 1 dim"], patches: Float[Array, "batch tokens other_dim"]
    ) -> Float[Array, "batch 1 dim"]:
        x = self.proj_in(self.activation(self.norm_in(token)))  # (batch, 1, other_dim)
        context = self.norm(jnp.concat([x, patches], axis=1))
        x = x + self.drop_path(self.attn(context[:, :1], context))
        return self.proj_out(self.activation(self.norm_out(x)))


class CrossLayer(nnx.Module):
    """What the class token reads from the other branch's patches, at its own width."""

    def __init__(
        self,
        config: CrossViTConfig,
        fusion: Fusion,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        dim, other_dim = fusion.dim, fusion.other_dim
        same = dim == other_dim
        self.proj_in = identity if same else Linear(dim, other_dim, use_bias=True, **kinds)
        self.norm = LayerNorm(other_dim, epsilon=config.norm_eps, **kinds)
        self.attn = CrossAttention(config, fusion, **kinds)
        self.proj_out = identity if same else Linear(other_dim, dim, use_bias=True, **kinds)
        self.drop_path = DropPath(fusion.drop_path_rate, rngs=rngs)

    def __call__(
        self, token: Float[Array, "batch 1 dim"], patches: Float[Array, "batch tokens other_dim"]
    ) -> Float[Array, "batch 1 dim"]:
        x = self.norm(self.proj_in(token))  # (batch, 1, other_dim)
        x = self.attn(x, jnp.concat([x, patches], axis=1))
        return self.drop_path(self.proj_out(x))


class ResidualFusion(nnx.Module):
    """The class token adds up what it reads in several layers, of vit-pytorch."""

    def __init__(
        self,
        config: CrossViTConfig,
        fusion: Fusion,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        layers = range(config.cross_depth)
        self.layers = nnx.List([CrossLayer(config, fusion, **kinds) for _ in layers])

    def __call__(
        self, token: Float[Array, "batch 1 dim"], patches: Float[Array, "batch tokens other_dim"]
    ) -> Float[Array, "batch 1 dim"]:
        for layer in self.layers:
            token = token + layer(token, patches)
        return token


FUSIONS = {"projected": ProjectedFusion, "residual": ResidualFusion}


class Encoder(nnx.Module):
    """The blocks of one branch in one stage."""

    def __init__(
        self,
        config: CrossViTConfig,
        dim: int,
        blocks: tuple[BlockConfig, ...],
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.blocks = nnx.List([Block(block, **kinds) for block in blocks])
        norm = config.stage_norm
        self.norm = LayerNorm(dim, epsilon=config.norm_eps, **kinds) if norm else identity

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class MultiScaleStage(nnx.Module):
    """Blocks in both branches, then each class token reads the other's patches; figure 2."""

    def __init__(
        self,
        config: CrossViTConfig,
        stage: Stage,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        encoders = zip(config.embed_dim, stage.blocks, strict=True)
        self.encoders = nnx.List(
            [Encoder(config, dim, blocks, **kinds) for dim, blocks in encoders]
        )
        fusion = FUSIONS[config.fusion]
        self.fusions = nnx.List([fusion(config, numbers, **kinds) for numbers in stage.fusions])

    def __call__(
        self,
        small: Float[Array, "batch small_tokens small_dim"],
        large: Float[Array, "batch large_tokens large_dim"],
    ) -> tuple[
        Float[Array, "batch small_tokens small_dim"], Float[Array, "batch large_tokens large_dim"]
    ]:
        small, large = self.encoders[0](small), self.encoders[1](large)
        small_patches, large_patches = small[:, 1:], large[:, 1:]
        small_token = self.fusions[0](small[:, :1], large_patches)
        large_token = self.fusions[1](large[:, :1], small_patches)
        return (
            jnp.concat([small_token, small_patches], axis=1),
            jnp.concat([large_token, large_patches], axis=1),
        )


class CrossViT(nnx.Module):
    """Cross-attention multi-scale Vision Transformer.

    Called with (batch, height, width, channels) images of ``config.image_size``; returns
    (batch, num_classes) logits, or both branches' features side by side where the config has no
    heads.

    Args:
        config: see ``CrossViTConfig``.
        dtype: of the computation.
        param_dtype: of the parameters.
        rngs: streams ``params`` and ``dropout``.
    """

    def __init__(
        self,
        config: CrossViTConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.config, self.dtype = config, dtype
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        dims, classes = config.embed_dim, config.num_classes
        self.embeds = nnx.List([BranchEmbed(config, branch, **kinds) for branch in config.branches])
        self.stages = nnx.List([MultiScaleStage(config, stage, **kinds) for stage in config.stages])
        self.norm = nnx.List([LayerNorm(dim, epsilon=config.norm_eps, **kinds) for dim in dims])
        self.dropout = nnx.Dropout(config.head_dropout_rate, rngs=rngs)
        heads = [Linear(dim, classes, use_bias=True, **kinds) for dim in dims] if classes else []
        self.head = nnx.List(heads)

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch ..."]:
        self.config.check_images(images.shape)
        images = images.astype(self.dtype)
        small, large = self.embeds[0](images), self.embeds[1](images)
        for stage in self.stages:
            small, large = stage(small, large)
        small, large = self.norm[0](small), self.norm[1](large)
        if self.config.pool == "mean_patches":
            small, large = small[:, 1:].mean(axis=1), large[:, 1:].mean(axis=1)
        else:
            small, large = small[:, 0], large[:, 0]
        small, large = self.dropout(small), self.dropout(large)
        if not self.config.num_classes:
            return jnp.concat([small, large], axis=-1)
        logits = self.head[0](small) + self.head[1](large)
        return logits / 2 if self.config.logits == "mean" else logits
