"""SimMIM in Flax.

Source: Xie et al. 2022, arXiv:2111.09886, section 3; see the spec for its forms.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from isovit.backends.flax.families.vit import ViT, flatten_patches
from isovit.backends.flax.layers import Kinds, Linear
from isovit.spec.objectives.simmim import SimMIMConfig


def hidden_patches(
    order: Int[Array, "batch units"], config: SimMIMConfig
) -> Bool[Array, "batch patches"]:
    """Whether a patch is hidden: those of the units that come first in the order are."""
    (rows, columns), (height, width) = config.units, config.mask_unit
    hidden = order.argsort(axis=1) < config.hidden_units  # (batch, units): by place in the order
    hidden = hidden.reshape(-1, rows, 1, columns, 1)
    hidden = jnp.tile(hidden, (1, 1, height, 1, width))
    return hidden.reshape(-1, config.encoder.patches)  # (batch, patches): row by row


class SimMIM(nnx.Module):
    """The loss of painting the patches that a mask token stands for.

    Called with (batch, height, width, channels) images and (batch, units) integers, an order of
    the units of each image, the first of which are hidden; returns (batch,) mean absolute errors.

    Args:
        config: see ``SimMIMConfig``.
        dtype: of the computation.
        param_dtype: of the parameters.
        rngs: streams ``params`` and ``dropout``.
    """

    def __init__(
        self,
        config: SimMIMConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.config, self.dtype, encoder = config, dtype, config.encoder
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.encoder = ViT(encoder, **kinds)
        self.mask_token = nnx.Param(jnp.zeros((1, 1, encoder.embed_dim), param_dtype))
        self.to_pixels = Linear(encoder.embed_dim, encoder.patch_dim, use_bias=True, **kinds)

    def encode(
        self,
        images: Float[Array, "batch height width channels"],
        hidden: Bool[Array, "batch patches"],
    ) -> Float[Array, "batch patches dim"]:
        """Every patch behind the blocks, with the mask token in the place of the hidden ones."""
        mask_token = self.mask_token[...].astype(self.dtype)
        x = jnp.where(hidden[..., None], mask_token, self.encoder.patch_embed(images))
        x = self.encoder.encode(self.encoder.positioned(x))
        return x[:, self.config.encoder.prefix_tokens :]

    def __call__(
        self,
        images: Float[Array, "batch height width channels"],
        order: Int[Array, "batch units"],
    ) -> Float[Array, " batch"]:
        self.config.check_images(images.shape)
        hidden = hidden_patches(order, self.config)
        painted = self.to_pixels(self.encode(images, hidden))  # (batch, patches, patch)
        pixels = flatten_patches(images, self.config.encoder)
        errors = jnp.abs(painted - pixels).mean(axis=-1)  # (batch, patches)
        loss = jnp.where(hidden, errors, 0.0).sum(axis=1) / self.config.hidden
        return loss / self.config.hidden if self.config.divided_by_hidden else loss
