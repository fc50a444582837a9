"""SimMIM in Keras.

Source: Xie et al. 2022, arXiv:2111.09886, section 3; see the spec for its forms.
"""

from __future__ import annotations

import keras
from jaxtyping import Bool, Float, Int
from keras import ops

from isovit.backends.keras.families.vit import ViT, flatten_patches
from isovit.backends.keras.layers import DType, Linear, SpecModel, Tensor
from isovit.spec.objectives.simmim import SimMIMConfig


def hidden_patches(
    order: Int[Tensor, "batch units"], config: SimMIMConfig
) -> Bool[Tensor, "batch patches"]:
    """Whether a patch is hidden: those of the units that come first in the order are."""
    (rows, columns), (height, width) = config.units, config.mask_unit
    hidden = ops.argsort(order, axis=1) < config.hidden_units  # (batch, units): by place in it
    hidden = ops.reshape(hidden, (-1, rows, 1, columns, 1))
    hidden = ops.tile(hidden, (1, 1, height, 1, width))
    return ops.reshape(hidden, (-1, config.encoder.patches))  # (batch, patches): row by row


@keras.saving.register_keras_serializable(package="isovit")
class SimMIM(SpecModel):
    """The loss of painting the patches that a mask token stands for.

    Called with (batch, height, width, channels) images and (batch, units) integers, an order of
    the units of each image, the first of which are hidden; returns (batch,) mean absolute errors.

    Args:
        config: see ``SimMIMConfig``.
        name: of the model.
        dtype: policy, ``float32`` or ``mixed_bfloat16`` for example; None for the global one.
    """

    def __init__(self, config: SimMIMConfig, *, name: str = "simmim", dtype: DType = None) -> None:
        super().__init__(config, name=name, dtype=dtype)
        dtype, encoder = self.dtype_policy, config.encoder
        self.encoder = ViT(encoder, name="encoder", dtype=dtype)
        self.to_pixels = Linear(encoder.patch_dim, use_bias=True, name="to_pixels", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        encoder = self.config.encoder
        self.mask_token = self.add_weight(
            shape=(1, 1, encoder.embed_dim), initializer="zeros", name="mask_token"
        )
        self.encoder.build(input_shape)
        self.to_pixels.build((None, encoder.patches, encoder.embed_dim))

    def encode(
        self,
        images: Float[Tensor, "batch height width channels"],
        hidden: Bool[Tensor, "batch patches"],
        training: bool | None = None,
    ) -> Float[Tensor, "batch patches dim"]:
        """Every patch behind the blocks, with the mask token in the place of the hidden ones."""
        mask_token = ops.convert_to_tensor(self.mask_token)  # JAX chooses between no variables
        x = ops.where(hidden[..., None], mask_token, self.encoder.patch_embed(images))
        x = self.encoder.encode(self.encoder.positioned(x), training=training)
        return x[:, self.config.encoder.prefix_tokens :]

    def call(
        self,
        images: Float[Tensor, "batch height width channels"],
        order: Int[Tensor, "batch units"],
        training: bool | None = None,
    ) -> Float[Tensor, " batch"]:
        images = self.checked(images)
        hidden = hidden_patches(order, self.config)
        painted = self.to_pixels(self.encode(images, hidden, training=training))
        pixels = flatten_patches(images, self.config.encoder)
        errors = ops.mean(ops.abs(painted - pixels), axis=-1)  # (batch, patches)
        loss = ops.sum(ops.where(hidden, errors, 0.0), axis=1) / self.config.hidden
        return loss / self.config.hidden if self.config.divided_by_hidden else loss
