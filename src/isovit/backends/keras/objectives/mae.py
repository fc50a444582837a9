"""MAE in Keras.

Source: He et al. 2022, arXiv:2111.06377, section 3; see the spec for its forms.
"""

from __future__ import annotations

import keras
from jaxtyping import Float, Int
from keras import ops

from isovit.backends.keras.families.vit import ViT, flatten_patches
from isovit.backends.keras.idle import Identity
from isovit.backends.keras.layers import (
    Block,
    DType,
    Linear,
    SpecModel,
    Tensor,
    constant,
    layer_norm,
)
from isovit.spec.objectives.mae import PIXEL_EPS, MAEConfig


def take(
    x: Float[Tensor, "batch patches dim"], index: Int[Tensor, "batch some"]
) -> Float[Tensor, "batch some dim"]:
    """Of each image its own choice of patches."""
    return ops.take_along_axis(x, index[..., None], axis=1)


def normalize_pixels(
    x: Float[Tensor, "batch patches patch"],
) -> Float[Tensor, "batch patches patch"]:
    """The pixels of each patch with mean 0 and the variance of a sample 1."""
    centred = x - ops.mean(x, axis=-1, keepdims=True)
    variance = ops.sum(ops.square(centred), axis=-1, keepdims=True) / (x.shape[-1] - 1)
    return centred / ops.sqrt(variance + PIXEL_EPS)


@keras.saving.register_keras_serializable(package="isovit")
class MAE(SpecModel):
    """Masked autoencoder: the loss of painting hidden patches.

    Called with (batch, height, width, channels) images and (batch, patches) integers, an order of
    the patches of each image, the first of which are shown; returns (batch,) mean squared errors.

    Args:
        config: see ``MAEConfig``.
        name: of the model.
        dtype: policy, ``float32`` or ``mixed_bfloat16`` for example; None for the global one.
    """

    def __init__(self, config: MAEConfig, *, name: str = "mae", dtype: DType = None) -> None:
        super().__init__(config, name=name, dtype=dtype)
        dtype, encoder, dim = self.dtype_policy, config.encoder, config.decoder_dim
        self.encoder = ViT(encoder, name="encoder", dtype=dtype)
        self.decoder_embed = (
            Linear(dim, use_bias=True, name="decoder_embed", dtype=dtype)
            if config.decoder_embed
            else Identity(name="decoder_embed", dtype=dtype)
        )
        self.decoder_blocks = [
            Block(block, name=f"decoder_blocks_{i}", dtype=dtype)
            for i, block in enumerate(config.decoder_blocks)
        ]
        self.decoder_norm = layer_norm(encoder.norm_eps, name="decoder_norm", dtype=dtype)
        self.decoder_pred = Linear(
            encoder.patch_dim, use_bias=True, name="decoder_pred", dtype=dtype
        )

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        encoder, dim = self.config.encoder, self.config.decoder_dim
        learned = encoder.pos_embed == "learned"
        self.mask_token = self.add_weight(shape=(1, 1, dim), initializer="zeros", name="mask_token")
        self.decoder_pos_embed = self.add_weight(
            shape=(1, encoder.tokens, dim),
            initializer="zeros" if learned else constant(self.config.sincos_table),
            trainable=learned,
            name="decoder_pos_embed",
        )
        self.encoder.build(input_shape)
        self.decoder_embed.build((None, None, encoder.embed_dim))
        for block in self.decoder_blocks:
            block.build((None, encoder.tokens, dim))
        self.decoder_norm.build((None, encoder.tokens, dim))
        self.decoder_pred.build((None, self.config.hidden, dim))

    def encode(
        self,
        images: Float[Tensor, "batch height width channels"],
        shown: Int[Tensor, "batch kept"],
        training: bool | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """The patches that are shown, behind the class token if there is one."""
        prefix = self.config.encoder.prefix_tokens
        x = self.encoder.embed(images, training=training)
        x = ops.concatenate([x[:, :prefix], take(x[:, prefix:], shown)], axis=1)
        return self.encoder.encode(x, training=training)

    def decode(
        self,
        x: Float[Tensor, "batch tokens dim"],
        order: Int[Tensor, "batch patches"],
        training: bool | None = None,
    ) -> Float[Tensor, "batch patches dim"]:
        """Every patch, from those that were shown and a token in the place of each other."""
        x = self.decoder_embed(x)
        prefix = self.config.encoder.prefix_tokens
        shape = (ops.shape(x)[0], self.config.hidden, x.shape[-1])
        hidden = ops.broadcast_to(self.mask_token, shape)
        patches = ops.concatenate([x[:, prefix:], hidden], axis=1)  # in the given order
        patches = take(patches, ops.argsort(order, axis=1))  # row by row
        x = ops.concatenate([x[:, :prefix], patches], axis=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x, training=training)
        return self.decoder_norm(x)[:, prefix:]

    def call(
        self,
        images: Float[Tensor, "batch height width channels"],
        order: Int[Tensor, "batch patches"],
        training: bool | None = None,
    ) -> Float[Tensor, " batch"]:
        images = self.checked(images)
        shown, hidden = order[:, : self.config.kept], order[:, self.config.kept :]
        x = self.encode(images, shown, training=training)
        painted = self.decoder_pred(take(self.decode(x, order, training=training), hidden))
        pixels = take(flatten_patches(images, self.config.encoder), hidden)
        if self.config.normalized_pixels:
            pixels = normalize_pixels(pixels)
        return ops.mean(ops.square(painted - pixels), axis=(1, 2))
