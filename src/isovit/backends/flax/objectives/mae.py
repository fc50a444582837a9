"""MAE in Flax.

Source: He et al. 2022, arXiv:2111.06377, section 3; see the spec for its forms.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from isovit.backends.flax.families.vit import ViT, flatten_patches
from isovit.backends.flax.layers import Block, Fixed, Kinds, LayerNorm, Linear, identity
from isovit.spec.objectives.mae import PIXEL_EPS, MAEConfig


def take(
    x: Float[Array, "batch patches dim"], index: Int[Array, "batch some"]
) -> Float[Array, "batch some dim"]:
    """Of each image its own choice of patches."""
    return jnp.take_along_axis(x, index[..., None], axis=1)


def normalize_pixels(x: Float[Array, "batch patches patch"]) -> Float[Array, "batch patches patch"]:
    """The pixels of each patch with mean 0 and the variance of a sample 1."""
    mean, variance = x.mean(axis=-1, keepdims=True), x.var(axis=-1, ddof=1, keepdims=True)
    return (x - mean) / jnp.sqrt(variance + PIXEL_EPS)


class MAE(nnx.Module):
    """Masked autoencoder: the loss of painting hidden patches.

    Called with (batch, height, width, channels) images and (batch, patches) integers, an order of
    the patches of each image, the first of which are shown; returns (batch,) mean squared errors.

    Args:
        config: see ``MAEConfig``.
        dtype: of the computation.
        param_dtype: of the parameters.
        rngs: streams ``params`` and ``dropout``.
    """

    def __init__(
        self,
        config: MAEConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.config, self.dtype = config, dtype
        encoder, dim = config.encoder, config.decoder_dim
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.encoder = ViT(encoder, **kinds)
        self.decoder_embed = (
            Linear(encoder.embed_dim, dim, use_bias=True, **kinds)
            if config.decoder_embed
            else identity
        )
        self.mask_token = nnx.Param(jnp.zeros((1, 1, dim), param_dtype))
        if encoder.pos_embed == "learned":
            self.decoder_pos_embed = nnx.Param(jnp.zeros((1, encoder.tokens, dim), param_dtype))
        else:
            self.decoder_pos_embed = Fixed(jnp.asarray(config.sincos_table, param_dtype))
        self.decoder_blocks = nnx.List([Block(block, **kinds) for block in config.decoder_blocks])
        self.decoder_norm = LayerNorm(dim, epsilon=encoder.norm_eps, **kinds)
        self.decoder_pred = Linear(dim, encoder.patch_dim, use_bias=True, **kinds)

    def encode(
        self,
        images: Float[Array, "batch height width channels"],
        shown: Int[Array, "batch kept"],
    ) -> Float[Array, "batch tokens dim"]:
        """The patches that are shown, behind the class token if there is one."""
        prefix = self.config.encoder.prefix_tokens
        x = self.encoder.embed(images)
        x = jnp.concat([x[:, :prefix], take(x[:, prefix:], shown)], axis=1)
        return self.encoder.encode(x)

    def decode(
        self, x: Float[Array, "batch tokens dim"], order: Int[Array, "batch patches"]
    ) -> Float[Array, "batch patches dim"]:
        """Every patch, from those that were shown and a token in the place of each other."""
        x = self.decoder_embed(x)
        prefix = self.config.encoder.prefix_tokens
        shape = (x.shape[0], self.config.hidden, x.shape[-1])
        hidden = jnp.broadcast_to(self.mask_token[...].astype(self.dtype), shape)
        patches = jnp.concat([x[:, prefix:], hidden], axis=1)  # in the given order
        patches = take(patches, order.argsort(axis=1))  # row by row
        x = jnp.concat([x[:, :prefix], patches], axis=1)
        x = x + self.decoder_pos_embed[...].astype(self.dtype)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, prefix:]

    def __call__(
        self,
        images: Float[Array, "batch height width channels"],
        order: Int[Array, "batch patches"],
    ) -> Float[Array, " batch"]:
        self.config.check_images(images.shape)
        shown, hidden = order[:, : self.config.kept], order[:, self.config.kept :]
        painted = self.decoder_pred(take(self.decode(self.encode(images, shown), order), hidden))
        pixels = take(flatten_patches(images, self.config.encoder), hidden)
        if self.config.normalized_pixels:
            pixels = normalize_pixels(pixels)
        return jnp.square(painted - pixels).mean(axis=(1, 2))
