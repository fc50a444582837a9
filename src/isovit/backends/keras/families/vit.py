"""ViT in Keras.

Source: Dosovitskiy et al. 2021, arXiv:2010.11929, section 3.1; both dialects, see the spec. The
distillation token: Touvron et al. 2021, arXiv:2012.12877, section 4.
"""

from __future__ import annotations

import keras
from jaxtyping import Float
from keras import ops

from isovit.backends.keras.idle import Dropout, Identity
from isovit.backends.keras.initializers import glorot
from isovit.backends.keras.layers import (
    Block,
    DType,
    Linear,
    SpecModel,
    Tensor,
    constant,
    layer_norm,
    pool,
)
from isovit.spec.config import require
from isovit.spec.families.vit import ViTConfig


def flatten_patches(
    images: Float[Tensor, "batch height width channels"], config: ViTConfig
) -> Float[Tensor, "batch patches patch"]:
    """Patches row by row, each flattened as (height, width, channel)."""
    height, width = config.patch_size
    rows, columns = images.shape[1] // height, images.shape[2] // width
    x = ops.reshape(images, (-1, rows, height, columns, width, config.in_channels))
    x = ops.swapaxes(x, 2, 3)  # (batch, rows, columns, height, width, channels)
    return ops.reshape(x, (-1, rows * columns, config.patch_dim))


class ConvPatchEmbed(keras.layers.Layer):
    """A convolution whose stride is its kernel."""

    def __init__(self, config: ViTConfig, *, name: str, dtype: DType = None) -> None:
        super().__init__(name=name, dtype=dtype)
        self.proj = keras.layers.Conv2D(
            config.embed_dim,
            kernel_size=config.patch_size,
            strides=config.patch_size,
            padding="valid",
            data_format="channels_last",
            use_bias=True,
            kernel_initializer=glorot(),
            name="proj",
            dtype=self.dtype_policy,
        )

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.proj.build(input_shape)

    def call(
        self, images: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch tokens dim"]:
        x = self.proj(images)  # (batch, rows, columns, dim)
        return ops.reshape(x, (-1, x.shape[1] * x.shape[2], x.shape[3]))


class NormLinearNormPatchEmbed(keras.layers.Layer):
    """LayerNorm, dense, LayerNorm over patches flattened as (height, width, channel)."""

    def __init__(self, config: ViTConfig, *, name: str, dtype: DType = None) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype, eps = self.dtype_policy, config.norm_eps
        self.config = config
        self.norm1 = layer_norm(eps, name="norm1", dtype=dtype)
        self.proj = Linear(config.embed_dim, use_bias=True, name="proj", dtype=dtype)
        self.norm2 = layer_norm(eps, name="norm2", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        patches = (None, self.config.patches, self.config.patch_dim)
        self.norm1.build(patches)
        self.proj.build(patches)
        self.norm2.build((*patches[:-1], self.config.embed_dim))

    def call(
        self, images: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch tokens dim"]:
        x = flatten_patches(images, self.config)  # (batch, patches, height * width * channels)
        return self.norm2(self.proj(self.norm1(x)))


PATCH_EMBEDS = {"conv": ConvPatchEmbed, "norm_linear_norm": NormLinearNormPatchEmbed}


@keras.saving.register_keras_serializable(package="isovit")
class ViT(SpecModel):
    """Vision Transformer.

    Called with (batch, height, width, channels) images of ``config.image_size``; returns
    (batch, num_classes) logits, or the pooled features where the config has no head. The logits of
    two heads are averaged; ``forward_heads`` gives them apart.

    Args:
        config: see ``ViTConfig``.
        name: of the model.
        dtype: policy, ``float32`` or ``mixed_bfloat16`` for example; None for the global one.
    """

    def __init__(self, config: ViTConfig, *, name: str = "vit", dtype: DType = None) -> None:
        super().__init__(config, name=name, dtype=dtype)
        dtype = self.dtype_policy
        self.patch_embed = PATCH_EMBEDS[config.patch_embed](config, name="patch_embed", dtype=dtype)
        self.dropout = Dropout(config.embed_dropout_rate, name="dropout", dtype=dtype)
        self.blocks = [
            Block(block, name=f"blocks_{i}", dtype=dtype) for i, block in enumerate(config.blocks)
        ]
        has_norm, has_head = config.final_norm != "none", config.num_classes > 0
        self.norm = (
            layer_norm(config.norm_eps, name="norm", dtype=dtype)
            if has_norm
            else Identity(name="norm", dtype=dtype)
        )
        self.pre_logits = (
            Linear(config.pre_logits_dim, use_bias=True, name="pre_logits", dtype=dtype)
            if config.pre_logits_dim
            else None
        )
        self.head = (
            Linear(config.num_classes, use_bias=True, name="head", dtype=dtype)
            if has_head
            else Identity(name="head", dtype=dtype)
        )
        self.head_dist = (
            Linear(config.num_classes, use_bias=True, name="head_dist", dtype=dtype)
            if config.dist_head
            else Identity(name="head_dist", dtype=dtype)
        )

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        dim, tokens = self.config.embed_dim, self.config.tokens
        self.cls_token = (
            self.add_weight(shape=(1, 1, dim), initializer="zeros", name="cls_token")
            if self.config.class_token
            else None
        )
        self.dist_token = (
            self.add_weight(shape=(1, 1, dim), initializer="zeros", name="dist_token")
            if self.config.dist_token
            else None
        )
        learned = self.config.pos_embed == "learned"
        self.pos_embed = self.add_weight(
            shape=(1, self.config.positions, dim),
            initializer="zeros" if learned else constant(self.config.sincos_table),
            trainable=learned,
            name="pos_embed",
        )
        self.patch_embed.build(input_shape)
        for block in self.blocks:
            block.build((None, tokens, dim))
        self.norm.build((None, dim) if self.config.final_norm == "pooled" else (None, tokens, dim))
        if self.pre_logits is not None:
            self.pre_logits.build((None, dim))
        self.head.build((None, self.config.feature_dim))
        self.head_dist.build((None, self.config.feature_dim))

    def embed(
        self, images: Float[Tensor, "batch height width channels"], training: bool | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """Every token, with its position: class token, distillation token, patches."""
        return self.positioned(self.patch_embed(self.checked(images)))

    def positioned(
        self,
        x: Float[Tensor, "batch patches dim"],
        pos_embed: Float[Tensor, "1 positions dim"] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Patches with positions, behind the other tokens: class token, distillation token.

        Positions are the model's own, or those of patches on another grid.
        """
        pos_embed = self.pos_embed if pos_embed is None else pos_embed
        if self.config.pos_embed_tokens == "patches":
            x = x + pos_embed
        prefix = [token for token in (self.cls_token, self.dist_token) if token is not None]
        shape = (ops.shape(x)[0], 1, x.shape[-1])
        x = ops.concatenate([*(ops.broadcast_to(token, shape) for token in prefix), x], axis=1)
        if self.config.pos_embed_tokens == "all":
            x = x + pos_embed
        return x

    def encode(
        self, x: Float[Tensor, "batch tokens dim"], training: bool | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """Every token behind the blocks, and behind the norm if that is over tokens."""
        x = self.dropout(x, training=training)
        for block in self.blocks:
            x = block(x, training=training)
        return x if self.config.final_norm == "pooled" else self.norm(x)

    def classify(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch ..."]:
        """Logits of such tokens; features where there is no head."""
        if self.config.dist_head:
            return (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2
        x = pool(x, self.config)
        if self.config.final_norm == "pooled":
            x = self.norm(x)
        if self.pre_logits is not None:
            x = ops.tanh(self.pre_logits(x))
        return self.head(x)

    def forward_heads(
        self, images: Float[Tensor, "batch height width channels"], training: bool | None = None
    ) -> tuple[Float[Tensor, "batch classes"], Float[Tensor, "batch classes"]]:
        """Logits of the class token and of the distillation token, each for a loss of its own."""
        require(self.config.dist_head, "dist_head", False, "the model has one head")
        x = self.encode(self.embed(images, training=training), training=training)
        return self.head(x[:, 0]), self.head_dist(x[:, 1])

    def call(
        self, images: Float[Tensor, "batch height width channels"], training: bool | None = None
    ) -> Float[Tensor, "batch ..."]:
        x = self.encode(self.embed(images, training=training), training=training)
        return self.classify(x)
