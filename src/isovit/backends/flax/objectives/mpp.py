"""Masked patch prediction in Flax.

Source: Dosovitskiy et al. 2021, arXiv:2010.11929, appendix B.1.2; vit-pytorch's form, see the spec.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from isovit.backends.flax.families.vit import ViT, flatten_patches
from isovit.backends.flax.layers import Kinds, Linear
from isovit.backends.flax.objectives.mae import take
from isovit.spec.families.vit import ViTConfig
from isovit.spec.objectives.mpp import MPPConfig


def unflatten_patches(
    x: Float[Array, "batch patches patch"], config: ViTConfig
) -> Float[Array, "batch height width channels"]:
    """Images of patches: the inverse of ``flatten_patches``."""
    x = x.reshape(-1, *config.grid, *config.patch_size, config.in_channels)
    x = x.swapaxes(2, 3)  # (batch, rows, height, columns, width, channels)
    return x.reshape(-1, *config.input_shape)


def colour_labels(
    images: Float[Array, "batch height width channels"], config: MPPConfig
) -> Int[Array, "batch patches"]:
    """The mean colour of each patch as a class; a mean on an edge is in the bin beneath."""
    brightest = jnp.asarray(config.brightest, images.dtype)  # (channels,)
    x = flatten_patches(jnp.minimum(images, brightest), config.encoder)
    x = x.reshape(*x.shape[:-1], -1, config.encoder.in_channels)
    sums = x.sum(axis=2)  # (batch, patches, channels)
    edges = jnp.asarray(config.edges, images.dtype)  # (channels, levels - 1)
    bins = (sums[..., None] > edges).sum(axis=-1)  # one for each channel
    return (bins * jnp.asarray(config.places, bins.dtype)).sum(axis=-1)


def cross_entropy(
    logits: Float[Array, "batch patches colours"], labels: Int[Array, "batch patches"]
) -> Float[Array, "batch patches"]:
    """Minus the logarithm of the probability of each label."""
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - chosen[..., 0]


class MPP(nnx.Module):
    """The loss of telling the colours of patches that were tampered with.

    Called with (batch, height, width, channels) images and three arrays of (batch, patches)
    integers: where a colour is asked for, whose pixels stand in the place of a patch, and where the
    mask token does; returns (batch,) mean cross-entropies.

    Args:
        config: see ``MPPConfig``.
        dtype: of the computation.
        param_dtype: of the parameters.
        rngs: streams ``params`` and ``dropout``.
    """

    def __init__(
        self,
        config: MPPConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.config, self.dtype, encoder = config, dtype, config.encoder
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.encoder = ViT(encoder, **kinds)
        self.mask_token = nnx.Param(jnp.zeros((1, 1, encoder.patch_dim), param_dtype))
        self.to_bits = Linear(encoder.embed_dim, config.colours, use_bias=True, **kinds)

    def encode(
        self,
        images: Float[Array, "batch height width channels"],
        source: Int[Array, "batch patches"],
        replaced: Int[Array, "batch patches"],
    ) -> Float[Array, "batch patches dim"]:
        """Every patch behind the blocks, of images with patches exchanged and replaced."""
        encoder, config = self.encoder, self.config.encoder
        x = take(flatten_patches(images, config), source)
        mask_token = self.mask_token[...].astype(self.dtype)
        x = jnp.where(replaced.astype(bool)[..., None], mask_token, x)
        x = encoder.encode(encoder.embed(unflatten_patches(x, config)))
        return x[:, config.prefix_tokens :]

    def __call__(
        self,
        images: Float[Array, "batch height width channels"],
        masked: Int[Array, "batch patches"],
        source: Int[Array, "batch patches"],
        replaced: Int[Array, "batch patches"],
    ) -> Float[Array, " batch"]:
        self.config.check_images(images.shape)
        logits = self.to_bits(self.encode(images, source, replaced))
        errors = cross_entropy(logits, colour_labels(images, self.config))  # (batch, patches)
        asked = masked.astype(errors.dtype)
        return (errors * asked).sum(axis=1) / asked.sum(axis=1)
