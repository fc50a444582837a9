"""ViT in Flax.

Source: Dosovitskiy et al. 2021, arXiv:2010.11929, section 3.1; both dialects, see the spec. The
distillation token: Touvron et al. 2021, arXiv:2012.12877, section 4.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from isovit.backends.flax.layers import Block, Fixed, Kinds, LayerNorm, Linear, identity, pool
from isovit.spec.config import require
from isovit.spec.families.vit import ViTConfig


def flatten_patches(
    images: Float[Array, "batch height width channels"], config: ViTConfig
) -> Float[Array, "batch patches patch"]:
    """Patches row by row, each flattened as (height, width, channel)."""
    height, width = config.patch_size
    rows, columns = images.shape[1] // height, images.shape[2] // width
    x = images.reshape(-1, rows, height, columns, width, config.in_channels)
    x = x.swapaxes(2, 3)  # (batch, rows, columns, height, width, channels)
    return x.reshape(-1, rows * columns, config.patch_dim)


class ConvPatchEmbed(nnx.Module):
    """A convolution whose stride is its kernel."""

    def __init__(
        self, config: ViTConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.proj = nnx.Conv(
            config.in_channels,
            config.embed_dim,
            kernel_size=config.patch_size,
            strides=config.patch_size,
            padding="VALID",
            use_bias=True,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch tokens dim"]:
        x = self.proj(images)  # (batch, rows, columns, dim)
        return x.reshape(x.shape[0], -1, x.shape[-1])


class NormLinearNormPatchEmbed(nnx.Module):
    """LayerNorm, dense, LayerNorm over patches flattened as (height, width, channel)."""

    def __init__(
        self, config: ViTConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.config = config
        self.norm1 = LayerNorm(config.patch_dim, epsilon=config.norm_eps, **kinds)
        self.proj = Linear(config.patch_dim, config.embed_dim, use_bias=True, **kinds)
        self.norm2 = LayerNorm(config.embed_dim, epsilon=config.norm_eps, **kinds)

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch tokens dim"]:
        x = flatten_patches(images, self.config)  # (batch, patches, height * width * channels)
        return self.norm2(self.proj(self.norm1(x)))


PATCH_EMBEDS = {"conv": ConvPatchEmbed, "norm_linear_norm": NormLinearNormPatchEmbed}


class ViT(nnx.Module):
    """Vision Transformer.

    Called with (batch, height, width, channels) images of ``config.image_size``; returns
    (batch, num_classes) logits, or the pooled features where the config has no head. The logits of
    two heads are averaged; ``forward_heads`` gives them apart.

    Args:
        config: see ``ViTConfig``.
        dtype: of the computation.
        param_dtype: of the parameters.
        rngs: streams ``params`` and ``dropout``.
    """

    def __init__(
        self,
        config: ViTConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.config, self.dtype = config, dtype
        dim, kinds = config.embed_dim, Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.patch_embed = PATCH_EMBEDS[config.patch_embed](config, **kinds)
        self.cls_token = (
            nnx.Param(jnp.zeros((1, 1, dim), param_dtype)) if config.class_token else None
        )
        self.dist_token = (
            nnx.Param(jnp.zeros((1, 1, dim), param_dtype)) if config.dist_token else None
        )
        if config.pos_embed == "learned":
            self.pos_embed = nnx.Param(jnp.zeros((1, config.positions, dim), param_dtype))
        else:
            self.pos_embed = Fixed(jnp.asarray(config.sincos_table, param_dtype))
        self.dropout = nnx.Dropout(config.embed_dropout_rate, rngs=rngs)
        self.blocks = nnx.List([Block(block, **kinds) for block in config.blocks])
        has_norm, has_head = config.final_norm != "none", config.num_classes > 0
        self.norm = LayerNorm(dim, epsilon=config.norm_eps, **kinds) if has_norm else identity
        self.pre_logits = (
            Linear(dim, config.pre_logits_dim, use_bias=True, **kinds)
            if config.pre_logits_dim
            else None
        )
        dim, classes = config.feature_dim, config.num_classes
        self.head = Linear(dim, classes, use_bias=True, **kinds) if has_head else identity
        self.head_dist = (
            Linear(dim, classes, use_bias=True, **kinds) if config.dist_head else identity
        )

    def embed(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch tokens dim"]:
        """Every token, with its position: class token, distillation token, patches."""
        self.config.check_images(images.shape)
        return self.positioned(self.patch_embed(images))

    def positioned(
        self,
        x: Float[Array, "batch patches dim"],
        pos_embed: Float[Array, "1 positions dim"] | None = None,
    ) -> Float[Array, "batch tokens dim"]:
        """Patches with positions, behind the other tokens: class token, distillation token.

        Positions are the model's own, or those of patches on another grid.
        """
        pos_embed = self.pos_embed[...] if pos_embed is None else pos_embed
        if self.config.pos_embed_tokens == "patches":
            x = x + pos_embed.astype(self.dtype)
        prefix = [token for token in (self.cls_token, self.dist_token) if token is not None]
        shape = (x.shape[0], 1, x.shape[-1])
        prefix = [jnp.broadcast_to(token[...].astype(self.dtype), shape) for token in prefix]
        x = jnp.concat([*prefix, x], axis=1)
        if self.config.pos_embed_tokens == "all":
            x = x + pos_embed.astype(self.dtype)
        return x

    def encode(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        """Every token behind the blocks, and behind the norm if that is over tokens."""
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        return x if self.config.final_norm == "pooled" else self.norm(x)

    def classify(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch ..."]:
        """Logits of such tokens; features where there is no head."""
        if self.config.dist_head:
            return (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2
        x = pool(x, self.config)
        if self.config.final_norm == "pooled":
            x = self.norm(x)
        if self.pre_logits is not None:
            x = jnp.tanh(self.pre_logits(x))
        return self.head(x)

    def forward_heads(
        self, images: Float[Array, "batch height width channels"]
    ) -> tuple[Float[Array, "batch classes"], Float[Array, "batch classes"]]:
        """Logits of the class token and of the distillation token, each for a loss of its own."""
        require(self.config.dist_head, "dist_head", False, "the model has one head")
        x = self.encode(self.embed(images))
        return self.head(x[:, 0]), self.head_dist(x[:, 1])

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch ..."]:
        return self.classify(self.encode(self.embed(images)))
