"""CrossViT in Keras.

Source: Chen et al. 2021, arXiv:2103.14899, section 3; the official code and timm (Apache-2.0) and
vit-pytorch's ``cross_vit.py`` (MIT); see the spec for the differences.
"""

from __future__ import annotations

import keras
from jaxtyping import Float
from keras import ops

from isovit.backends.keras.families.vit import PATCH_EMBEDS
from isovit.backends.keras.idle import Dropout, Identity
from isovit.backends.keras.layers import (
    ACTIVATIONS,
    Block,
    Conv,
    DropPath,
    DType,
    Linear,
    SpecModel,
    Tensor,
    attention,
    layer_norm,
    resample,
    split_heads,
)
from isovit.spec.blocks import BlockConfig
from isovit.spec.families.crossvit import STEMS, Branch, CrossViTConfig, Fusion, Stage
from isovit.spec.resample import torch_bicubic


class BicubicResize(keras.layers.Layer):
    """The image at the size of a branch, R X Cᵀ: the same on every framework."""

    def __init__(self, branch: Branch, *, name: str, dtype: DType = None) -> None:
        super().__init__(name=name, dtype=dtype)
        self.rows, self.columns = map(torch_bicubic, branch.source_size, branch.image_size)

    def call(
        self, images: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch rows columns channels"]:
        return resample(images, self.rows, self.columns)


class CentreCrop(keras.layers.Layer):
    """The centre of the image, of the size of a branch."""

    def __init__(self, branch: Branch, *, name: str, dtype: DType = None) -> None:
        super().__init__(name=name, dtype=dtype)
        self.corner, self.size = branch.corner, branch.image_size

    def call(
        self, images: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch rows columns channels"]:
        (top, left), (rows, columns) = self.corner, self.size
        return images[:, top : top + rows, left : left + columns]


class ConvStem(keras.layers.Layer):
    """Three convolutions that together have the stride of a patch; the models marked †."""

    def __init__(self, branch: Branch, *, name: str, dtype: DType = None) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype, self.patches, self.dims = self.dtype_policy, branch.tokens - 1, branch.stem_dims
        dim1, dim2, dim3 = self.dims
        first, second, third = (shape._asdict() for shape in STEMS[branch.patch_size])
        self.conv1 = Conv(dim1, **first, use_bias=True, name="conv1", dtype=dtype)
        self.conv2 = Conv(dim2, **second, use_bias=True, name="conv2", dtype=dtype)
        self.conv3 = Conv(dim3, **third, use_bias=True, name="conv3", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        dim1, dim2, _ = self.dims
        self.conv1.build(input_shape)
        self.conv2.build((None, None, None, dim1))
        self.conv3.build((None, None, None, dim2))

    def call(
        self, images: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch tokens dim"]:
        x = ops.relu(self.conv1(images))
        x = ops.relu(self.conv2(x))
        x = self.conv3(x)  # (batch, rows, columns, dim)
        return ops.reshape(x, (-1, self.patches, self.dims[-1]))


RESIZES = {"bicubic": BicubicResize, "crop": CentreCrop}


class BranchEmbed(keras.layers.Layer):
    """From the model's image to the tokens of one branch, class token first."""

    def __init__(
        self, config: CrossViTConfig, branch: Branch, *, name: str, dtype: DType = None
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype, self.branch = self.dtype_policy, branch
        self.resize = (
            Identity(name="resize", dtype=dtype)
            if branch.scaling == "none"
            else RESIZES[branch.scaling](branch, name="resize", dtype=dtype)
        )
        self.patch_embed = (
            ConvStem(branch, name="patch_embed", dtype=dtype)
            if config.patch_embed == "conv_stem"
            else PATCH_EMBEDS[config.patch_embed](
                config.stem(branch), name="patch_embed", dtype=dtype
            )
        )
        self.dropout = Dropout(config.embed_dropout_rate, name="dropout", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        dim, tokens = self.branch.dim, self.branch.tokens
        self.cls_token = self.add_weight(shape=(1, 1, dim), initializer="zeros", name="cls_token")
        self.pos_embed = self.add_weight(
            shape=(1, tokens, dim), initializer="zeros", name="pos_embed"
        )
        self.resize.build(input_shape)
        self.patch_embed.build((None, *self.branch.image_size, self.branch.in_channels))

    def call(
        self, images: Float[Tensor, "batch height width channels"], training: bool | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        x = self.patch_embed(self.resize(images))  # (batch, patches, dim)
        cls_token = ops.broadcast_to(self.cls_token, (ops.shape(x)[0], 1, x.shape[-1]))
        x = ops.concatenate([cls_token, x], axis=1)
        return self.dropout(x + self.pos_embed, training=training)


class CrossAttention(keras.layers.Layer):
    """Attention of one token over others; section 3.3, eq. 6."""

    def __init__(
        self, config: CrossViTConfig, fusion: Fusion, *, name: str, dtype: DType = None
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype, bias = self.dtype_policy, config.qkv_bias
        self.dim, self.inner_dim = fusion.other_dim, fusion.inner_dim
        self.num_heads, self.head_dim = fusion.num_heads, fusion.head_dim
        self.scale = fusion.head_dim**-0.5
        self.q = Linear(self.inner_dim, use_bias=bias, name="q", dtype=dtype)
        self.kv = Linear(2 * self.inner_dim, use_bias=bias, name="kv", dtype=dtype)
        self.attn_dropout = Dropout(config.attn_dropout_rate, name="attn_dropout", dtype=dtype)
        self.proj = Linear(self.dim, use_bias=True, name="proj", dtype=dtype)
        self.proj_dropout = Dropout(config.dropout_rate, name="proj_dropout", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.q.build((None, 1, self.dim))
        self.kv.build((None, None, self.dim))
        self.proj.build((None, 1, self.inner_dim))

    def call(
        self,
        token: Float[Tensor, "batch 1 dim"],
        context: Float[Tensor, "batch tokens dim"],
        training: bool | None = None,
    ) -> Float[Tensor, "batch 1 dim"]:
        (q,) = split_heads(self.q(token), 1, self.num_heads)  # (batch, heads, 1, head_dim)
        # each (batch, heads, tokens, head_dim)
        k, v = split_heads(self.kv(context), 2, self.num_heads)
        x = attention(q, k, v, self.scale, self.attn_dropout, training)
        x = ops.reshape(ops.swapaxes(x, 1, 2), (-1, 1, self.inner_dim))
        return self.proj_dropout(self.proj(x), training=training)


class ProjectedFusion(keras.layers.Layer):
    """The class token goes to the other branch's width and back; section 3.3, eq. 5 and 7."""

    def __init__(
        self, config: CrossViTConfig, fusion: Fusion, *, name: str, dtype: DType = None
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype, eps = self.dtype_policy, config.norm_eps
        self.dim, self.other_dim = fusion.dim, fusion.other_dim
        self.activation = ACTIVATIONS[config.activation]
        self.norm_in = layer_norm(eps, name="norm_in", dtype=dtype)
        self.proj_in = Linear(self.other_dim, use_bias=True, name="proj_in", dtype=dtype)
        self.norm = layer_norm(eps, name="norm", dtype=dtype)
        self.attn = CrossAttention(config, fusion, name="attn", dtype=dtype)
        self.drop_path = DropPath(fusion.drop_path_rate, name="drop_path", dtype=dtype)
        self.norm_out = layer_norm(eps, name="norm_out", dtype=dtype)
        self.proj_out = Linear(self.dim, use_bias=True, name="proj_out", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        token, other_token = (None, 1, self.dim), (None, 1, self.other_dim)
        self.norm_in.build(token)
        self.proj_in.build(token)
        self.norm.build((None, None, self.other_dim))
        self.attn.build(other_token)
        self.norm_out.build(other_token)
        self.proj_out.build(other_token)

    def call(
        self,
        token: Float[Tensor, "batch 1 dim"],
        patches: Float[Tensor, "batch tokens other_dim"],
        training: bool | None = None,
    ) -> Float[Tensor, "batch 1 dim"]:
        x = self.proj_in(self.activation(self.norm_in(token)))  # (batch, 1, other_dim)
        context = self.norm(ops.concatenate([x, patches], axis=1))
        y = self.attn(context[:, :1], context, training=training)
        x = x + self.drop_path(y, training=training)
        return self.proj_out(self.activation(self.norm_out(x)))


class CrossLayer(keras.layers.Layer):
    """What the class token reads from the other branch's patches, at its own width."""

    def __init__(
        self, config: CrossViTConfig, fusion: Fusion, *, name: str, dtype: DType = None
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype, self.dim, self.other_dim = self.dtype_policy, fusion.dim, fusion.other_dim
        same = self.dim == self.other_dim
        self.proj_in = (
            Identity(name="proj_in", dtype=dtype)
            if same
            else Linear(self.other_dim, use_bias=True, name="proj_in", dtype=dtype)
        )
        self.norm = layer_norm(config.norm_eps, name="norm", dtype=dtype)
        self.attn = CrossAttention(config, fusion, name="attn", dtype=dtype)
        self.proj_out = (
            Identity(name="proj_out", dtype=dtype)
            if same
            else Linear(self.dim, use_bias=True, name="proj_out", dtype=dtype)
        )
        self.drop_path = DropPath(fusion.drop_path_rate, name="drop_path", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        other_token = (None, 1, self.other_dim)
        self.proj_in.build((None, 1, self.dim))
        self.norm.build(other_token)
        self.attn.build(other_token)
        self.proj_out.build(other_token)

    def call(
        self,
        token: Float[Tensor, "batch 1 dim"],
        patches: Float[Tensor, "batch tokens other_dim"],
        training: bool | None = None,
    ) -> Float[Tensor, "batch 1 dim"]:
        x = self.norm(self.proj_in(token))  # (batch, 1, other_dim)
        x = self.attn(x, ops.concatenate([x, patches], axis=1), training=training)
        return self.drop_path(self.proj_out(x), training=training)


class ResidualFusion(keras.layers.Layer):
    """The class token adds up what it reads in several layers, of vit-pytorch."""

    def __init__(
        self, config: CrossViTConfig, fusion: Fusion, *, name: str, dtype: DType = None
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        self.layers = [
            CrossLayer(config, fusion, name=f"layers_{i}", dtype=self.dtype_policy)
            for i in range(config.cross_depth)
        ]

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        for layer in self.layers:
            layer.build(input_shape)

    def call(
        self,
        token: Float[Tensor, "batch 1 dim"],
        patches: Float[Tensor, "batch tokens other_dim"],
        training: bool | None = None,
    ) -> Float[Tensor, "batch 1 dim"]:
        for layer in self.layers:
            token = token + layer(token, patches, training=training)
        return token


FUSIONS = {"projected": ProjectedFusion, "residual": ResidualFusion}


class Encoder(keras.layers.Layer):
    """The blocks of one branch in one stage."""

    def __init__(
        self,
        config: CrossViTConfig,
        dim: int,
        blocks: tuple[BlockConfig, ...],
        *,
        name: str,
        dtype: DType = None,
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype, self.dim = self.dtype_policy, dim
        self.blocks = [
            Block(block, name=f"blocks_{i}", dtype=dtype) for i, block in enumerate(blocks)
        ]
        self.norm = (
            layer_norm(config.norm_eps, name="norm", dtype=dtype)
            if config.stage_norm
            else Identity(name="norm", dtype=dtype)
        )

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        for layer in (*self.blocks, self.norm):
            layer.build(input_shape)

    def call(
        self, x: Float[Tensor, "batch tokens dim"], training: bool | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        for block in self.blocks:
            x = block(x, training=training)
        return self.norm(x)


class MultiScaleStage(keras.layers.Layer):
    """Blocks in both branches, then each class token reads the other's patches; figure 2."""

    def __init__(
        self, config: CrossViTConfig, stage: Stage, *, name: str, dtype: DType = None
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype = self.dtype_policy
        encoders = zip(config.embed_dim, stage.blocks, strict=True)
        self.encoders = [
            Encoder(config, dim, blocks, name=f"encoders_{b}", dtype=dtype)
            for b, (dim, blocks) in enumerate(encoders)
        ]
        fusion = FUSIONS[config.fusion]
        self.fusions = [
            fusion(config, numbers, name=f"fusions_{b}", dtype=dtype)
            for b, numbers in enumerate(stage.fusions)
        ]

    def build(self, input_shape: tuple[tuple[int | None, ...], ...]) -> None:
        """Of the tokens of both branches."""
        for encoder, fusion, shape in zip(self.encoders, self.fusions, input_shape, strict=True):
            encoder.build(shape)
            fusion.build((None, 1, shape[-1]))

    def call(
        self,
        small: Float[Tensor, "batch small_tokens small_dim"],
        large: Float[Tensor, "batch large_tokens large_dim"],
        training: bool | None = None,
    ) -> tuple[
        Float[Tensor, "batch small_tokens small_dim"], Float[Tensor, "batch large_tokens large_dim"]
    ]:
        small = self.encoders[0](small, training=training)
        large = self.encoders[1](large, training=training)
        small_patches, large_patches = small[:, 1:], large[:, 1:]
        small_token = self.fusions[0](small[:, :1], large_patches, training=training)
        large_token = self.fusions[1](large[:, :1], small_patches, training=training)
        return (
            ops.concatenate([small_token, small_patches], axis=1),
            ops.concatenate([large_token, large_patches], axis=1),
        )


@keras.saving.register_keras_serializable(package="isovit")
class CrossViT(SpecModel):
    """Cross-attention multi-scale Vision Transformer.

    Called with (batch, height, width, channels) images of ``config.image_size``; returns
    (batch, num_classes) logits, or both branches' features side by side where the config has no
    heads.

    Args:
        config: see ``CrossViTConfig``.
        name: of the model.
        dtype: policy, ``float32`` or ``mixed_bfloat16`` for example; None for the global one.
    """

    def __init__(
        self, config: CrossViTConfig, *, name: str = "crossvit", dtype: DType = None
    ) -> None:
        super().__init__(config, name=name, dtype=dtype)
        dtype, classes = self.dtype_policy, config.num_classes
        self.embeds = [
            BranchEmbed(config, branch, name=f"embeds_{b}", dtype=dtype)
            for b, branch in enumerate(config.branches)
        ]
        self.stages = [
            MultiScaleStage(config, stage, name=f"stages_{s}", dtype=dtype)
            for s, stage in enumerate(config.stages)
        ]
        self.norm = [layer_norm(config.norm_eps, name=f"norm_{b}", dtype=dtype) for b in range(2)]
        self.dropout = Dropout(config.head_dropout_rate, name="dropout", dtype=dtype)
        self.head = [
            Linear(classes, use_bias=True, name=f"head_{b}", dtype=dtype)
            for b in range(2 if classes else 0)
        ]

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        for embed in self.embeds:
            embed.build(input_shape)
        shapes = tuple((None, branch.tokens, branch.dim) for branch in self.config.branches)
        for stage in self.stages:
            stage.build(shapes)
        for norm, shape in zip(self.norm, shapes, strict=True):
            norm.build(shape)
        for head, dim in zip(self.head, self.config.embed_dim, strict=False):
            head.build((None, dim))

    def call(
        self, images: Float[Tensor, "batch height width channels"], training: bool | None = None
    ) -> Float[Tensor, "batch ..."]:
        images = self.checked(images)
        small = self.embeds[0](images, training=training)
        large = self.embeds[1](images, training=training)
        for stage in self.stages:
            small, large = stage(small, large, training=training)
        small, large = self.norm[0](small), self.norm[1](large)
        if self.config.pool == "mean_patches":
            small, large = ops.mean(small[:, 1:], axis=1), ops.mean(large[:, 1:], axis=1)
        else:
            small, large = small[:, 0], large[:, 0]
        small = self.dropout(small, training=training)
        large = self.dropout(large, training=training)
        if not self.config.num_classes:
            return ops.concatenate([small, large], axis=-1)
        logits = self.head[0](small) + self.head[1](large)
        return logits / 2 if self.config.logits == "mean" else logits
