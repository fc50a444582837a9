"""NesT in NumPy loops, and the originals."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
from hypothesis import strategies as st

from isovit.spec.blocks import BlockConfig
from isovit.spec.families.nest import Level, NesTConfig
from parity_tests.oracles import arrays
from parity_tests.oracles.arrays import Array, attend
from parity_tests.oracles.fitting import Fields, Fit
from parity_tests.oracles.originals import Original
from parity_tests.oracles.pairs import (
    Pair,
    channel_counts,
    class_counts,
    classes,
    divisible,
    head_counts,
    statistics,
)


def blocks_of(image: Array, level: Level) -> list[Array]:
    """The blocks of (batch, rows, columns, dim), each (batch, tokens, dim)."""
    (down, across), (height, width) = level.block_grid, level.block_size
    return [
        np.stack(
            [image[:, i * height + di, j * width + dj] for di in range(height)
             for dj in range(width)],
            axis=1,
        )
        for i in range(down)
        for j in range(across)
    ]  # fmt: skip


def image_of(tokens: Array, level: Level) -> Array:
    """The image again, from (batch, tokens, dim), token after token."""
    (_, across), (height, width) = level.block_grid, level.block_size
    image = np.empty((len(tokens), *level.grid, tokens.shape[-1]), tokens.dtype)
    for token in range(tokens.shape[1]):
        block, inside = divmod(token, height * width)
        (i, j), (di, dj) = divmod(block, across), divmod(inside, width)
        image[:, i * height + di, j * width + dj] = tokens[:, token]
    return image


def max_pool(image: Array, before: int) -> Array:
    """The largest of 3 x 3 pixels, as far as they are there, from ``before`` above and left.

    A complex number counts by its real part: the imaginary one is a derivative.
    """
    _, rows, columns, _ = image.shape
    pooled = np.empty((len(image), rows // 2, columns // 2, image.shape[3]), image.dtype)
    for i, j in np.ndindex(*pooled.shape[1:3]):
        down = slice(max(2 * i - before, 0), 2 * i - before + 3)
        right = slice(max(2 * j - before, 0), 2 * j - before + 3)
        window = image[:, down, right].reshape(len(image), -1, image.shape[3])
        largest = np.real(window).argmax(axis=1)[:, None]
        pooled[:, i, j] = np.take_along_axis(window, largest, axis=1)[:, 0]
    return pooled


class Reference(arrays.Reference):
    """NesT; one block after another."""

    config: NesTConfig

    def output(self, images: Array) -> Array:
        """See ``Reference.output``."""
        x = self.patch_embed(images)
        for i, level in enumerate(self.config.levels):
            x = self.level(f"levels.{i}", level, x)
        x = self.norm("norm", x)
        _, rows, columns, _ = x.shape
        x = sum(x[:, i, j] for i, j in np.ndindex(rows, columns)) / (rows * columns)
        return self.dense("head", x) if self.config.num_classes else x

    def patch_embed(self, images: Array) -> Array:
        """Patches to an image of tokens."""
        config = self.config
        if config.patch_embed == "conv":
            x = self.conv("patch_embed.proj", images, config.patch_size, (0, 0))
        else:
            (height, width), (rows, columns) = config.patch_size, config.grid
            x = np.empty((len(images), rows, columns, config.patch_dim), images.dtype)
            for i, j in np.ndindex(rows, columns):
                patch = images[:, i * height : (i + 1) * height, j * width : (j + 1) * width]
                x[:, i, j] = patch.reshape(len(images), -1)
            x = self.dense("patch_embed.proj", self.norm("patch_embed.norm1", x))
            x = self.norm("patch_embed.norm2", x)
        return self.keep("patch_embed", x)

    def level(self, path: str, level: Level, x: Array) -> Array:
        """Aggregation, positions and layers."""
        if level.input_dim is not None:
            y = self.conv(f"{path}.pool.conv", x, (1, 1), (1, 1))
            y = self.norm(f"{path}.pool.norm", y)
            x = max_pool(y, before=0 if self.config.pool_padding == "end" else 1)
            self.keep(f"{path}.pool", x)
        table = self.weights[f"{path}.pos_embed"]
        blocks = blocks_of(x, level)
        if self.config.pos_embed == "image":
            blocks = [block + table[0, t] for t, block in enumerate(blocks)]
        else:
            blocks = [block + table[:, None] for block in blocks]
        x = np.concatenate(blocks, axis=1)
        for i, numbers in enumerate(level.layers):
            x = self.layer(f"{path}.blocks.{i}", numbers, level.blocks, x)
        return self.keep(path, image_of(x, level))

    def layer(self, path: str, config: BlockConfig, blocks: int, x: Array) -> Array:
        """A pre-norm layer."""
        qkv = self.dense(f"{path}.attn.qkv", self.norm(f"{path}.norm1", x))
        inside = np.split(qkv, blocks, axis=1)
        y = [attend(block, config.num_heads, config.attn_scale) for block in inside]
        y = self.dense(f"{path}.attn.proj", np.concatenate(y, axis=1))
        x = x + self.keep(f"{path}.attn", y)
        y = self.mlp(f"{path}.mlp", config.activation, self.norm(f"{path}.norm2", x))
        return self.keep(path, x + y)


# Originals


level_counts = st.integers(1, 3)
block_sides, patch_sides = st.integers(1, 2), st.integers(3, 4)


@st.composite
def timm_nests(draw: st.DrawFn) -> Pair:
    """timm's Nest: square images, each level of a width and heads of its own."""
    count, channels = draw(level_counts), draw(channel_counts)
    patch, block = draw(patch_sides), draw(block_sides)
    heads = tuple(draw(head_counts) for _ in range(count))
    dims, depths = tuple(draw(divisible(h)) for h in heads), draw(some_depths(count))
    ratio, num_classes = draw(st.integers(1, 3)), draw(class_counts)
    qkv_bias, pad_type = draw(st.booleans()), draw(st.sampled_from(["same", ""]))
    side = patch * block * 2 ** (count - 1)
    arguments = dict(
        img_size=side, in_chans=channels, patch_size=patch, num_levels=count, embed_dims=dims,
        num_heads=heads, depths=depths, num_classes=num_classes, mlp_ratio=ratio,
        qkv_bias=qkv_bias, pad_type=pad_type,
    )  # fmt: skip
    config = NesTConfig(
        image_size=(side, side), in_channels=channels, preprocess=statistics(channels),
        num_classes=num_classes, patch_size=(patch, patch), embed_dims=dims, depths=depths,
        num_heads=heads, mlp_ratio=ratio, qkv_bias=qkv_bias,
        pool_padding="end" if pad_type == "same" else "both", activation="gelu",
    )  # fmt: skip
    untold = ("num_heads", "pool_padding", *["mlp_ratio", "qkv_bias"] * (not any(depths)))
    return Pair(arguments, config, untold)


@st.composite
def vit_pytorch_nests(draw: st.DrawFn) -> Pair:
    """vit-pytorch's NesT: widths and heads double; heads need not divide the width."""
    count, channels = draw(level_counts), draw(channel_counts)
    patch, block = draw(patch_sides), draw(block_sides)
    heads, dim = draw(head_counts), draw(st.integers(6, 12))
    depths, mlp_mult, num_classes = draw(some_depths(count)), draw(st.integers(1, 3)), draw(classes)
    side = patch * block * 2 ** (count - 1)
    arguments = dict(
        image_size=side, patch_size=patch, num_classes=num_classes, dim=dim, heads=heads,
        num_hierarchies=count, block_repeats=depths, mlp_mult=mlp_mult, channels=channels,
    )  # fmt: skip
    config = NesTConfig(
        image_size=(side, side), in_channels=channels, preprocess=statistics(channels),
        num_classes=num_classes, patch_size=(patch, patch),
        embed_dims=tuple(dim * 2**i for i in range(count)), depths=depths,
        num_heads=tuple(heads * 2**i for i in range(count)),
        head_dim=dim // heads if dim % heads else None, mlp_ratio=mlp_mult, **THEIRS,
    )  # fmt: skip
    untold = ("patch_size", "num_heads", *["mlp_ratio"] * (not any(depths)))
    return Pair(arguments, config, untold)


def some_depths(count: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Depths of so many levels."""
    return st.tuples(*[st.integers(0, 2)] * count)


THEIRS: dict[str, Any] = dict(
    patch_embed="norm_linear_norm", qkv_bias=False, pos_embed="block", pool_padding="both",
    activation="gelu", norm_eps=1e-5,
)  # fmt: skip
"""What vit-pytorch's NesT is not told."""

ORIGINALS = {
    "timm": Original("timm", "timm.models.nest", lambda m: m.Nest, timm_nests),
    "vit_pytorch": Original("vit_pytorch", "vit_pytorch.nest", lambda m: m.NesT, vit_pytorch_nests),
}


# What each format can hold


def timm(_: st.DrawFn, config: NesTConfig) -> Fields:
    """Square patches and blocks, as large as the drawn ones are high; heads that fill the width."""
    levels = zip(config.embed_dims, config.num_heads, strict=True)
    return dict(
        image_size=config.image_size[0], patch_size=config.patch_size[0], patch_embed="conv",
        pos_embed="image", head_dim=None,
        embed_dims=tuple(-(-dim // heads) * heads for dim, heads in levels),
    )  # fmt: skip


def vit_pytorch(_: st.DrawFn, config: NesTConfig) -> Fields:
    """Squares too; widths and heads that double, and always a head."""
    dim, heads, count = config.embed_dims[0], config.num_heads[0], len(config.depths)
    return dict(
        **THEIRS, image_size=config.image_size[0], patch_size=config.patch_size[0],
        embed_dims=tuple(dim * 2**i for i in range(count)),
        num_heads=tuple(heads * 2**i for i in range(count)), head_dim=dim // heads,
        num_classes=config.num_classes or 1,
    )  # fmt: skip


def timm_model(library: ModuleType, config: NesTConfig) -> Any:
    """Its sizes are the config's."""
    return library.Nest(
        img_size=config.image_size[0], in_chans=config.in_channels,
        patch_size=config.patch_size[0], num_levels=len(config.depths),
        embed_dims=config.embed_dims, num_heads=config.num_heads, depths=config.depths,
        num_classes=config.num_classes, mlp_ratio=config.mlp_ratio, qkv_bias=config.qkv_bias,
        pad_type="same" if config.pool_padding == "end" else "",
    )  # fmt: skip


def vit_pytorch_model(library: ModuleType, config: NesTConfig) -> Any:
    """Its sizes are the config's."""
    return library.NesT(
        image_size=config.image_size[0], patch_size=config.patch_size[0],
        num_classes=config.num_classes, dim=config.embed_dims[0], heads=config.num_heads[0],
        num_hierarchies=len(config.depths), block_repeats=config.depths,
        mlp_mult=config.mlp_ratio, channels=config.in_channels,
    )  # fmt: skip


FITS = {
    "timm": Fit(timm, "timm.models.nest", timm_model),
    "vit_pytorch": Fit(vit_pytorch, "vit_pytorch.nest", vit_pytorch_model),
}

PARAMETERS = {
    "nest_t": (17_057_608, 17_057_608),
    "nest_s": (38_351_176, 38_351_176),
    "nest_b": (67_723_368, 67_723_368),
    "nest_pytorch": (16_520_692, 16_520_496),
}
"""Total and trainable, counted in timm 1.0.31 and in vit-pytorch 1.26.11, each model instantiated;
but the 196 positions of vit-pytorch's last level, on which nothing depends, do not train here."""
