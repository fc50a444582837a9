"""Masked patch prediction in Keras.

Source: Dosovitskiy et al. 2021, arXiv:2010.11929, appendix B.1.2; vit-pytorch's form, see the spec.
"""

from __future__ import annotations

import math

import keras
from jaxtyping import Float, Int
from keras import ops

from isovit.backends.keras.families.vit import ViT, flatten_patches
from isovit.backends.keras.layers import DType, Linear, SpecModel, Tensor
from isovit.backends.keras.objectives.mae import take
from isovit.spec.families.vit import ViTConfig
from isovit.spec.objectives.mpp import MPPConfig


def unflatten_patches(
    x: Float[Tensor, "batch patches patch"], config: ViTConfig
) -> Float[Tensor, "batch height width channels"]:
    """Images of patches: the inverse of ``flatten_patches``."""
    x = ops.reshape(x, (-1, *config.grid, *config.patch_size, config.in_channels))
    x = ops.swapaxes(x, 2, 3)  # (batch, rows, height, columns, width, channels)
    return ops.reshape(x, (-1, *config.input_shape))


def colour_labels(
    images: Float[Tensor, "batch height width channels"], config: MPPConfig
) -> Int[Tensor, "batch patches"]:
    """The mean colour of each patch as a class; a mean on an edge is in the bin beneath."""
    brightest = ops.convert_to_tensor(config.brightest, dtype=images.dtype)  # (channels,)
    x = flatten_patches(ops.minimum(images, brightest), config.encoder)
    pixels, channels = math.prod(config.encoder.patch_size), config.encoder.in_channels
    x = ops.reshape(x, (-1, config.encoder.patches, pixels, channels))
    sums = ops.sum(x, axis=2)  # (batch, patches, channels)
    edges = ops.convert_to_tensor(config.edges, dtype=images.dtype)  # (channels, levels - 1)
    bins = ops.sum(ops.cast(sums[..., None] > edges, "int32"), axis=-1)  # one for each channel
    return ops.sum(bins * ops.convert_to_tensor(config.places, dtype="int32"), axis=-1)


def cross_entropy(
    logits: Float[Tensor, "batch patches colours"], labels: Int[Tensor, "batch patches"]
) -> Float[Tensor, "batch patches"]:
    """Minus the logarithm of the probability of each label."""
    chosen = ops.take_along_axis(logits, labels[..., None], axis=-1)
    return ops.logsumexp(logits, axis=-1) - chosen[..., 0]


@keras.saving.register_keras_serializable(package="isovit")
class MPP(SpecModel):
    """The loss of telling the colours of patches that were tampered with.

    Called with (batch, height, width, channels) images and three arrays of (batch, patches)
    integers: where a colour is asked for, whose pixels stand in the place of a patch, and where the
    mask token does; returns (batch,) mean cross-entropies.

    Args:
        config: see ``MPPConfig``.
        name: of the model.
        dtype: policy, ``float32`` or ``mixed_bfloat16`` for example; None for the global one.
    """

    def __init__(self, config: MPPConfig, *, name: str = "mpp", dtype: DType = None) -> None:
        super().__init__(config, name=name, dtype=dtype)
        dtype, encoder = self.dtype_policy, config.encoder
        self.encoder = ViT(encoder, name="encoder", dtype=dtype)
        self.to_bits = Linear(config.colours, use_bias=True, name="to_bits", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        encoder = self.config.encoder
        self.mask_token = self.add_weight(
            shape=(1, 1, encoder.patch_dim), initializer="zeros", name="mask_token"
        )
        self.encoder.build(input_shape)
        self.to_bits.build((None, encoder.patches, encoder.embed_dim))

    def encode(
        self,
        images: Float[Tensor, "batch height width channels"],
        source: Int[Tensor, "batch patches"],
        replaced: Int[Tensor, "batch patches"],
        training: bool | None = None,
    ) -> Float[Tensor, "batch patches dim"]:
        """Every patch behind the blocks, of images with patches exchanged and replaced."""
        encoder, config = self.encoder, self.config.encoder
        x = take(flatten_patches(images, config), source)
        mask_token = ops.convert_to_tensor(self.mask_token)  # JAX chooses between no variables
        x = ops.where(ops.cast(replaced, "bool")[..., None], mask_token, x)
        x = encoder.embed(unflatten_patches(x, config), training=training)
        x = encoder.encode(x, training=training)
        return x[:, config.prefix_tokens :]

    def call(
        self,
        images: Float[Tensor, "batch height width channels"],
        masked: Int[Tensor, "batch patches"],
        source: Int[Tensor, "batch patches"],
        replaced: Int[Tensor, "batch patches"],
        training: bool | None = None,
    ) -> Float[Tensor, " batch"]:
        images = self.checked(images)
        logits = self.to_bits(self.encode(images, source, replaced, training=training))
        errors = cross_entropy(logits, colour_labels(images, self.config))  # (batch, patches)
        asked = ops.cast(masked, errors.dtype)
        return ops.sum(errors * asked, axis=1) / ops.sum(asked, axis=1)
