"""T2T-ViT with designs of convolutional networks in NumPy loops, and what its format can hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
from hypothesis import strategies as st

from isovit.spec.blocks import BlockConfig
from isovit.spec.families.t2t_vit_designs import T2TViTDesignsConfig
from parity_tests.oracles import yitu_designs
from parity_tests.oracles.arrays import ACTIVATIONS, Array, attend
from parity_tests.oracles.families import t2t_vit
from parity_tests.oracles.fitting import Fields, Fit
from parity_tests.oracles.originals import Original
from parity_tests.oracles.pairs import (
    Pair,
    channel_counts,
    class_counts,
    divisible,
    head_counts,
    statistics,
)


class Reference(t2t_vit.Reference):
    """T2T-ViT's stem before blocks of three designs."""

    config: T2TViTDesignsConfig

    def output(self, images: Array) -> Array:
        """See ``Reference.output``."""
        config = self.config
        x = self.tokens_to_token(config, images)
        if config.class_token:
            x = np.concatenate([np.repeat(self.weights["cls_token"], len(x), axis=0), x], axis=1)
        x = x + self.weights["pos_embed"]
        if config.design == "dense":
            return self.head(self.dense_stages(x))
        for i in range(config.depth):
            x = self.designed_block(f"blocks.{i}", x)
        return self.head(x)

    def designed_block(self, path: str, x: Array) -> Array:
        """A pre-norm block with the parts of its design."""
        numbers, normed = self.config.block, self.norm(f"{path}.norm1", x)
        ghost = self.config.design == "ghost"
        y = (self.ghost_qkv if ghost else self.dense)(f"{path}.attn.qkv", normed)
        y = attend(y, numbers.num_heads, numbers.attn_scale)
        y = self.dense(f"{path}.attn.proj", y) if numbers.attn_proj else y
        y = y if ghost else self.excite(f"{path}.attn.se_layer", y)
        x = x + self.scale(f"{path}.layer_scale1", self.keep(f"{path}.attn", y))
        normed = self.norm(f"{path}.norm2", x)
        if ghost:
            y = self.ghost_mlp(f"{path}.mlp", normed)
        else:
            y = self.mlp(f"{path}.mlp", numbers.activation, normed)
        return self.keep(path, x + self.scale(f"{path}.layer_scale2", y))

    def excite(self, path: str, x: Array) -> Array:
        """A number for each image and channel, from the mean over the tokens."""
        mean = sum(x[:, t] for t in range(x.shape[1])) / x.shape[1]
        hidden = self.dense(f"{path}.fc1", mean)
        hidden = np.where(hidden.real > 0, hidden, 0)
        shares = 1 / (1 + np.exp(-self.dense(f"{path}.fc2", hidden)))
        y = np.zeros(x.shape, np.result_type(x, shares))
        for image, channel in np.ndindex(shares.shape):
            y[image, :, channel] = x[image, :, channel] * shares[image, channel]
        return self.keep(path, y)

    def ghost_qkv(self, path: str, x: Array) -> Array:
        """All of q, then of k, then of v: channels that are made, then their copies."""
        made = self.dense(path, x)
        copied = self.copy(path.replace("qkv", "cheap"), made)
        half = made.shape[-1] // 3
        parts = [
            array[..., i * half : (i + 1) * half] for i in range(3) for array in (made, copied)
        ]
        return np.concatenate(parts, axis=-1)

    def ghost_mlp(self, path: str, x: Array) -> Array:
        """A hidden layer of which a part is made and the others are copies of it."""
        activate = ACTIVATIONS[self.config.activation]
        parts = [activate(self.dense(f"{path}.fc1", x))]
        for i in range(self.config.mlp_dim // self.config.embed_dim - 1):
            parts.append(activate(self.copy(f"{path}.cheap.{i}", parts[0])))
        return self.keep(path, self.dense(f"{path}.fc2", np.concatenate(parts, axis=-1)))

    def copy(self, path: str, x: Array) -> Array:
        """One channel after another by its factor."""
        factor = self.weights[f"{path}.factor"]
        channels = [x[..., c] * factor[c] for c in range(len(factor))]
        return self.keep(path, np.stack(channels, axis=-1))

    def dense_stages(self, x: Array) -> Array:
        """Blocks and transitions, counted together."""
        index = 0
        for stage, depth in enumerate(self.config.dense_depths):
            if stage > 0:
                x = self.dense(f"blocks.{index}.linear", x)
                x = self.keep(f"blocks.{index}", ACTIVATIONS[self.config.activation](x))
                index += 1
            for _ in range(depth):
                path = f"blocks.{index}"
                y = self.block(path, self.numbers(x.shape[-1]), x)
                new = self.dense(f"{path}.dense_linear", y)
                x = self.keep(path, np.concatenate([x, new], axis=-1))
                index += 1
        return x

    def numbers(self, dim: int) -> BlockConfig:
        """What a block's attention needs to know beside its weights, at a width."""
        config = self.config
        head_dim = config.head_dim or dim // config.num_heads
        return replace(config.block, attn_scale=config.attn_scale or 1 / head_dim**0.5)


# Models of the official code, and the configs that they are


@st.composite
def models(draw: st.DrawFn, design: str, sizes: Callable[[int], Any]) -> Pair:
    """A model of a design, with the arguments and the fields that ``sizes`` gives of its heads."""
    img_size, channels = draw(st.sampled_from([16, 32])), draw(channel_counts)
    tokens_type = draw(st.sampled_from(["performer", "transformer"]))
    heads, num_classes = draw(head_counts), draw(class_counts)
    qkv_bias, qk_scale = draw(st.booleans()), draw(st.sampled_from([None, 0.3]))
    own, fields = draw(sizes(heads))
    arguments = dict(
        img_size=img_size, tokens_type=tokens_type, in_chans=channels, num_classes=num_classes,
        num_heads=heads, qkv_bias=qkv_bias, qk_scale=qk_scale, **own,
    )  # fmt: skip
    config = T2TViTDesignsConfig(
        image_size=(img_size, img_size), in_channels=channels, preprocess=statistics(channels),
        num_classes=num_classes, token_mixer=tokens_type, performer_upcast=True,
        token_dropout_rate=0.1 if tokens_type == "performer" else 0.0, num_heads=heads,
        qkv_bias=qkv_bias, attn_scale=qk_scale, norm_eps=1e-5, design=design, **fields,
    )  # fmt: skip
    return Pair(arguments, config, ("num_heads", "attn_scale"))


depths = st.integers(1, 2)


@st.composite
def se_sizes(draw: st.DrawFn, heads: int) -> tuple[Fields, Fields]:
    """A width of 16 at least, of which the squeezed one is a sixteenth."""
    depth, dim, ratio = draw(depths), heads * draw(st.integers(16, 20)), draw(st.integers(1, 3))
    own = dict(embed_dim=dim, depth=depth, mlp_ratio=ratio)
    return own, dict(embed_dim=dim, depth=depth, mlp_dim=ratio * dim, se_dim=dim // 16)


@st.composite
def ghost_sizes(draw: st.DrawFn, heads: int) -> tuple[Fields, Fields]:
    """An even width, and the one ratio that there is."""
    depth, dim = draw(depths), draw(divisible(heads, 2))
    own = dict(embed_dim=dim, depth=depth, mlp_ratio=3)
    return own, dict(embed_dim=dim, depth=depth, mlp_dim=3 * dim)


@st.composite
def dense_sizes(draw: st.DrawFn, heads: int) -> tuple[Fields, Fields]:
    """Widths that the heads fill after every halving."""
    block_config = draw(st.sampled_from([(1,), (1, 2), (2, 1, 1)]))
    unit = heads * 2 ** (len(block_config) - 1)
    dim, growth, ratio = (
        draw(divisible(unit)),
        draw(divisible(unit)),
        draw(st.integers(1, 3)),
    )
    own = dict(embed_dim=dim, growth_rate=growth, block_config=block_config, mlp_ratio=ratio)
    fields = dict(
        embed_dim=dim, depth=sum(block_config), mlp_dim=ratio * dim, dense_depths=block_config,
        dense_growth=growth,
    )  # fmt: skip
    return own, fields


MODULE = "parity_tests.oracles.yitu_designs"

ORIGINALS = {
    "se": Original("yitu", MODULE, lambda m: m.T2TViTSE, lambda: models("se", se_sizes)),
    "ghost": Original(
        "yitu", MODULE, lambda m: m.T2TViTGhost, lambda: models("ghost", ghost_sizes)
    ),
    "dense": Original(
        "yitu", MODULE, lambda m: m.T2TViTDense, lambda: models("dense", dense_sizes)
    ),
}


# What each format can hold


def yitu(draw: st.DrawFn, config: T2TViTDesignsConfig) -> Fields:
    """What T2T-ViT's can, with the one width of its stem; and what each design is not told."""
    heads, dim = config.num_heads, config.embed_dim
    token_dim = yitu_designs.TOKEN_DIM
    fields = t2t_vit.yitu(draw, config.replace(token_dim=token_dim))
    fields |= dict(token_dim=token_dim, qkv_bias=config.qkv_bias)
    match config.design:
        case "se":
            dim = heads * -(-max(dim, 16) // heads)
            fields |= dict(embed_dim=dim, depth=max(config.depth, 1), se_dim=dim // 16)
        case "ghost":
            dim = 2 * heads * -(-dim // (2 * heads))
            fields |= dict(embed_dim=dim, depth=max(config.depth, 1), mlp_dim=3 * dim)
        case "dense":
            depths = config.dense_depths or (1,)
            unit = heads * 2 ** (len(depths) - 1)
            fields |= dict(
                embed_dim=unit * -(-dim // unit), depth=sum(depths), dense_depths=depths,
                dense_growth=unit * -(-config.dense_growth // unit),
            )  # fmt: skip
    return fields


def yitu_model(official: ModuleType, config: T2TViTDesignsConfig) -> Any:
    """Its sizes are the config's."""
    around = dict(
        img_size=config.image_size[0], tokens_type=config.token_mixer,
        in_chans=config.in_channels, num_classes=config.num_classes, embed_dim=config.embed_dim,
        num_heads=config.num_heads, qkv_bias=config.qkv_bias, qk_scale=config.attn_scale,
        # The official code cuts a hidden width to an integer: a little more than the fraction.
        mlp_ratio=(config.mlp_dim + 1e-6) / config.embed_dim,
    )  # fmt: skip
    match config.design:
        case "se":
            return official.T2TViTSE(depth=config.depth, **around)
        case "ghost":
            return official.T2TViTGhost(depth=config.depth, **around)
        case "dense":
            return official.T2TViTDense(
                growth_rate=config.dense_growth, block_config=config.dense_depths, **around
            )


FITS = {"yitu": Fit(yitu, MODULE, yitu_model)}

PARAMETERS = {
    "t2t_vit_14_se": (21_803_598, 21_723_854),
    "t2t_vit_16_ghost": (16_253_262, 16_173_518),
    "t2t_vit_dense": (23_647_062, 23_617_750),
}
"""Total and trainable, counted in the official code."""
