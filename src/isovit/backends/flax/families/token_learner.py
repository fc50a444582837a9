"""TokenLearner in Flax.

Source: Ryoo et al. 2021, arXiv:2106.11297; the official code and the example of keras.io (both
Apache-2.0); see the spec for the differences.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from isovit.backends.flax.families.vit import ConvPatchEmbed
from isovit.backends.flax.layers import (
    ACTIVATIONS,
    Block,
    Conv,
    Fixed,
    Kinds,
    LayerNorm,
    Linear,
    Mlp,
    identity,
)
from isovit.spec.families.token_learner import CONV_KERNEL, CONVS, TokenLearnerConfig


def fix_bias(layer: Any) -> None:
    """Leave the bias of a product out of training."""
    layer.bias = Fixed(layer.bias[...])


class ActivatedMlp(Mlp):
    """Dense, activation, dense, activation: of the Keras example."""

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        x = self.dropout1(self.activation(self.fc1(x)))
        return self.dropout2(self.activation(self.fc2(x)))


class TokenMask(nnx.Module):
    """Dense, activation, dense: at each place a number for each learned token."""

    def __init__(
        self,
        config: TokenLearnerConfig,
        *,
        bias_trains: bool,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.fc1 = Linear(config.embed_dim, config.bottleneck_dim, use_bias=True, **kinds)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout1 = nnx.Dropout(config.dropout_rate, rngs=rngs)
        self.fc2 = Linear(config.bottleneck_dim, config.learned_tokens, use_bias=True, **kinds)
        if not bias_trains:  # a softmax behind takes it away again
            fix_bias(self.fc2)
        self.dropout2 = nnx.Dropout(config.dropout_rate, rngs=rngs)

    def __call__(self, x: Float[Array, "batch places dim"]) -> Float[Array, "batch places tokens"]:
        x = self.dropout1(self.activation(self.fc1(x)))
        return self.dropout2(self.fc2(x))


class ConvLearner(nnx.Module):
    """TokenLearner v1: maps by convolutions, each number between 0 and 1.

    The maps are made of normalised tokens and weigh the tokens themselves.
    """

    def __init__(
        self,
        config: TokenLearnerConfig,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        dim, tokens, zeros = config.embed_dim, config.learned_tokens, CONV_KERNEL // 2
        self.grid, self.pool = config.grid, config.learner_pool
        self.norm = LayerNorm(dim, epsilon=config.norm_eps, **kinds)
        self.convs = nnx.List(
            [
                Conv(
                    tokens if i else dim,
                    tokens,
                    kernel_size=(CONV_KERNEL, CONV_KERNEL),
                    stride=(1, 1),
                    padding=(zeros, zeros),
                    use_bias=False,
                    **kinds,
                )
                for i in range(CONVS)
            ]
        )
        self.activation = ACTIVATIONS[config.activation]

    def __call__(self, x: Float[Array, "batch places dim"]) -> Float[Array, "batch tokens dim"]:
        batch, places, _ = x.shape
        maps = self.norm(x).reshape(batch, *self.grid, -1)  # (batch, rows, columns, dim)
        for i, conv in enumerate(self.convs):
            maps = conv(self.activation(maps) if i else maps)  # (batch, rows, columns, tokens)
        maps = jax.nn.sigmoid(maps).reshape(batch, places, -1).mT  # (batch, tokens, places)
        y = maps @ x
        return y if self.pool == "sum" else y / places


class MlpLearner(nnx.Module):
    """TokenLearner v1.1: maps by an MLP, each a softmax over the grid.

    The maps are made of normalised tokens and weigh the tokens themselves.
    """

    def __init__(
        self,
        config: TokenLearnerConfig,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.norm = LayerNorm(config.embed_dim, epsilon=config.norm_eps, **kinds)
        self.mask = TokenMask(config, bias_trains=False, **kinds)

    def __call__(self, x: Float[Array, "batch places dim"]) -> Float[Array, "batch tokens dim"]:
        maps = self.mask(self.norm(x)).mT  # (batch, tokens, places)
        return jax.nn.softmax(maps, axis=-1) @ x


class TokenFuser(nnx.Module):
    """Learned tokens back onto the grid: they mix, then each place takes of each."""

    def __init__(
        self,
        config: TokenLearnerConfig,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        dim, tokens, eps = config.embed_dim, config.learned_tokens, config.norm_eps
        self.norm1 = LayerNorm(dim, epsilon=eps, **kinds)
        self.mix = Linear(tokens, tokens, use_bias=True, **kinds)
        fix_bias(self.mix)  # norm2 takes it away again
        self.norm2 = LayerNorm(dim, epsilon=eps, **kinds)
        self.norm = LayerNorm(dim, epsilon=eps, **kinds)
        self.mask = TokenMask(config, bias_trains=True, **kinds)
        self.dropout = nnx.Dropout(config.dropout_rate, rngs=rngs)

    def __call__(
        self, y: Float[Array, "batch tokens dim"], x: Float[Array, "batch places dim"]
    ) -> Float[Array, "batch places dim"]:
        y = self.mix(self.norm1(y).mT).mT  # over the tokens, for each channel by itself
        maps = jax.nn.sigmoid(self.mask(self.norm(x)))  # (batch, places, tokens)
        return self.dropout(maps @ self.norm2(y))


LEARNERS = {"conv": ConvLearner, "mlp": MlpLearner}


class TokenLearner(nnx.Module):
    """Vision Transformer that goes on with learned tokens.

    Called with (batch, height, width, channels) images of ``config.image_size``; returns
    (batch, num_classes) logits, or the pooled features where the config has no head.

    Args:
        config: see ``TokenLearnerConfig``.
        dtype: of the computation.
        param_dtype: of the parameters.
        rngs: streams ``params`` and ``dropout``.
    """

    def __init__(
        self,
        config: TokenLearnerConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.config, self.dtype = config, dtype
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        dim, classes, rate = config.embed_dim, config.num_classes, config.dropout_rate
        self.patch_embed = ConvPatchEmbed(config.stem, **kinds)
        self.pos_embed = nnx.Param(jnp.zeros((1, config.patches, dim), param_dtype))
        self.dropout = nnx.Dropout(config.embed_dropout_rate, rngs=rngs)
        mlp = ActivatedMlp if config.mlp_output_activation else Mlp
        self.blocks = nnx.List(
            [
                Block(
                    config.block,
                    mlp=mlp(dim, config.mlp_dim, config.activation, rate, **kinds),
                    **kinds,
                )
                for _ in range(config.depth)
            ]
        )
        self.learners = nnx.List(
            [LEARNERS[config.learner](config, **kinds) for _ in range(config.num_learners)]
        )
        self.fusers = nnx.List([TokenFuser(config, **kinds) for _ in range(config.num_fusers)])
        self.norm = LayerNorm(dim, epsilon=config.norm_eps, **kinds)
        self.head = Linear(dim, classes, use_bias=True, **kinds) if classes else identity

    def forward_tokens(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch tokens dim"]:
        """Every token behind the blocks: learned ones, or with a fuser those of the grid."""
        self.config.check_images(images.shape)
        x = self.patch_embed(images)  # (batch, patches, dim)
        x = self.dropout(x + self.pos_embed[...].astype(self.dtype))
        blocks = list(self.blocks)
        for block in blocks[: self.config.learner_loc]:
            x = block(x)
        last = blocks[self.config.learner_loc :]
        if self.config.fuser:
            for learner, block, fuser in zip(self.learners, last, self.fusers, strict=True):
                x = x + fuser(block(learner(x)), x)
            return x
        for learner in self.learners:  # one, or none
            x = learner(x)  # (batch, learned tokens, dim)
        for block in last:
            x = block(x)
        return x

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch features"]:
        return self.head(self.norm(self.forward_tokens(images)).mean(axis=1))
