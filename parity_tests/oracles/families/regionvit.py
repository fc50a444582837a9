"""RegionViT in NumPy loops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
from hypothesis import strategies as st

from isovit.spec.families.regionvit import VIT_PYTORCH, RegionViTConfig, StageConfig
from parity_tests.oracles import arrays, pairs
from parity_tests.oracles.arrays import ACTIVATIONS, Array
from parity_tests.oracles.fitting import Fields, Fit
from parity_tests.oracles.originals import Original
from parity_tests.oracles.pairs import Pair


class Reference(arrays.Reference):
    """RegionViT; one image, one window, one head and one query after another."""

    config: RegionViTConfig

    def output(self, images: Array) -> Array:
        """See ``Reference.output``."""
        config = self.config
        x, regions = self.local_embed(images), self.region_embed(images)
        for i, stage in enumerate(config.stages):
            regions, x = self.stage(f"stages.{i}", stage, regions, x)
        regions = flat(regions)
        if config.final_norm == "tokens":
            regions = self.norm("norm", regions)
        regions = sum(regions[:, t] for t in range(regions.shape[1])) / regions.shape[1]
        if config.final_norm == "pooled":
            regions = self.norm("norm", regions)
        return self.dense("head", regions) if config.num_classes else regions

    def local_embed(self, images: Array) -> Array:
        """Pixels to the grid of local tokens."""
        config, path, side = self.config, "local_embed", self.config.patch_size
        if not config.stem_dims:
            x = self.conv(f"{path}.proj", images, (side, side), (side - 1, side - 1))
            return self.keep(path, x)
        x = self.activate(f"{path}.norm1", self.conv(f"{path}.conv1", images, (2, 2), (1, 1)))
        x = self.activate(f"{path}.norm2", self.conv(f"{path}.conv2", x, (2, 2), (1, 1)))
        return self.keep(path, self.conv(f"{path}.conv3", x, (1, 1), (1, 1)))

    def activate(self, path: str, x: Array) -> Array:
        """The LayerNorm of stem and downsampling, and the activation behind it."""
        return ACTIVATIONS[self.config.activation](self.norm(path, x, self.config.embed_norm_eps))

    def region_embed(self, images: Array) -> Array:
        """Pixels to the grid of regional tokens."""
        side, (rows, columns) = self.config.region_size, self.config.stages[0].region_grid
        pixels = [
            [
                [images[:, i * side + di, j * side + dj, c] for c in range(images.shape[-1])
                 for di in range(side) for dj in range(side)]
                for j in range(columns)
            ]
            for i in range(rows)
        ]  # fmt: skip
        x = np.moveaxis(np.array(pixels), -1, 0)  # (batch, rows, columns, channel and place)
        return self.keep("region_embed", self.dense("region_embed.proj", x))

    def stage(self, path: str, stage: StageConfig, regions: Array, x: Array) -> tuple[Array, Array]:
        """Two grids to two smaller ones."""
        peg = self.config.peg
        if stage.in_dim is not None:  # the local tokens are the last to run
            regions, x = (self.halve(f"{path}.downsample", stage, grid) for grid in (regions, x))
        if peg == "local" and stage.has_peg:
            x = self.positions(f"{path}.peg", x)
        for i in range(len(stage.drop_path_rates)):
            table = self.weights.get(
                f"{path}.rel_pos", self.weights.get(f"{path}.blocks.{i}.rel_pos")
            )
            regions, x = self.both(f"{path}.blocks.{i}", stage, table, regions, x)
            if peg == "both" and i == 0:
                regions, x = (self.positions(f"{path}.peg", grid) for grid in (regions, x))
        return regions, x

    def halve(self, path: str, stage: StageConfig, x: Array) -> Array:
        """Half the rows and columns of a grid."""
        grouped = self.config.downsample == "norm_conv"
        x = self.activate(f"{path}.norm", x) if grouped else x
        groups = x.shape[-1] if grouped else 1
        return self.keep(path, self.conv(f"{path}.conv", x, (2, 2), (1, 1), groups))

    def positions(self, path: str, x: Array) -> Array:
        """A grid and what a depthwise convolution makes of it."""
        return self.keep(path, x + self.conv(f"{path}.proj", x, (1, 1), (1, 1), x.shape[-1]))

    def both(
        self, path: str, stage: StageConfig, table: Array, regions: Array, x: Array
    ) -> tuple[Array, Array]:
        """A block: the regional tokens among themselves, then every window."""
        name = "region_norm" if self.config.region_norm else "norm1"
        among = self.norm(f"{path}.{name}", flat(regions))[:, None]  # (batch, 1, regions, dim)
        self.keep(f"{path}.{name}", among)
        y = self.attention(f"{path}.attn", stage, among, None)[:, 0]
        windows = self.windows(stage, regions + y.reshape(regions.shape), x)
        y = self.norm(f"{path}.norm1", windows)
        windows = windows + self.attention(f"{path}.attn", stage, y, table)
        y = self.norm(f"{path}.norm2", windows)
        windows = windows + self.mlp(f"{path}.mlp", self.config.activation, y)
        return self.grids(stage, self.keep(path, windows))

    def windows(self, stage: StageConfig, regions: Array, x: Array) -> Array:
        """(batch, regions, tokens, dim): each regional token, then the local ones of its window."""
        (height, width), (_, columns) = stage.window, stage.region_grid
        out = np.zeros((len(x), stage.regions, stage.tokens, stage.dim), x.dtype)
        for i, j in np.ndindex(stage.region_grid):
            out[:, i * columns + j, 0] = regions[:, i, j]
            for di, dj in np.ndindex(stage.window):
                token = x[:, i * height + di, j * width + dj]
                out[:, i * columns + j, 1 + di * width + dj] = token
        return out

    def grids(self, stage: StageConfig, windows: Array) -> tuple[Array, Array]:
        """What ``windows`` put together."""
        (height, width), (_, columns) = stage.window, stage.region_grid
        regions = windows[:, :, 0].reshape(len(windows), *stage.region_grid, -1)
        x = np.zeros((len(windows), *stage.grid, stage.dim), windows.dtype)
        for i, j in np.ndindex(stage.grid):
            window = i // height * columns + j // width
            x[:, i, j] = windows[:, window, 1 + i % height * width + j % width]
        return regions, x

    def attention(self, path: str, stage: StageConfig, x: Array, table: Array | None) -> Array:
        """Within every group of (batch, groups, tokens, dim)."""
        scale = self.config.attn_scale or 1 / np.sqrt(stage.head_dim)
        q, k, v = np.split(self.dense(f"{path}.qkv", x), 3, axis=-1)
        y = np.zeros_like(q)
        for b, g, t in np.ndindex(q.shape[:3]):
            for h in range(stage.num_heads):
                head = slice(h * stage.head_dim, (h + 1) * stage.head_dim)
                scores = scale * (k[b, g, :, head] @ q[b, g, t, head])
                if table is not None and t > 0:
                    scores[1:] += self.biases(stage, table[h], t - 1)
                powers = np.exp(scores - scores.real.max())
                y[b, g, t, head] = powers / powers.sum() @ v[b, g, :, head]
        return self.keep(path, self.dense(f"{path}.proj", y))

    def biases(self, stage: StageConfig, table: Array, query: int) -> Array:
        """For one query, of every key: from the table over rows and columns between the two."""
        size, (height, width) = self.config.window_size, stage.window
        row, column = divmod(query, width)
        return np.array(
            [
                table[(i - row + size - 1) * (2 * size - 1) + j - column + size - 1]
                for i, j in np.ndindex(height, width)
            ]
        )


def flat(x: Array) -> Array:
    """A grid of tokens as a row of tokens."""
    return x.reshape(len(x), -1, x.shape[-1])


# The originals


@st.composite
def ibm_models(draw: st.DrawFn) -> Pair:
    """The official model, whose windows are whole in every stage."""
    stages = draw(st.integers(1, 2))
    kind = draw(st.sampled_from(["1conv", "3conv"]))
    patch_size = 4 if kind == "3conv" else draw(st.integers(2, 3))
    size, regions = draw(st.integers(1, 3)), draw(st.tuples(*2 * [st.integers(1, 2)]))
    unit = patch_size * size * 2 ** (stages - 1)
    heads = [draw(pairs.head_counts) for _ in range(stages)]
    dims = growing(heads, STEM_WIDTH if kind == "3conv" else draw(pairs.widths))
    ratios = [float(draw(st.integers(1, 3))) for _ in range(stages)]
    depths = [draw(st.integers(1, 2)) for _ in range(stages)]
    channels, num_classes = draw(pairs.channel_counts), draw(pairs.class_counts)
    qkv_bias, qk_scale = draw(st.booleans()), draw(st.sampled_from([None, 0.3]))
    peg = draw(st.booleans())
    arguments = dict(
        patch_size=patch_size, in_chans=channels, num_classes=num_classes,
        embed_dim=[dims[0], *dims], depth=depths, num_heads=heads, kernel_sizes=[size] * stages,
        downsampling=["c", "sc"][:stages], patch_conv_type=kind, mlp_ratio=ratios,
        qkv_bias=qkv_bias, qk_scale=qk_scale, peg=peg,
    )  # fmt: skip
    config = RegionViTConfig(
        image_size=tuple(n * unit for n in regions), in_channels=channels,
        preprocess=pairs.statistics(channels), num_classes=num_classes, patch_size=patch_size,
        window_size=size, stem_dims=(dims[0] // 4, dims[0] // 2) if kind == "3conv" else (),
        embed_dims=tuple(dims), depths=tuple(depths), num_heads=tuple(heads), qkv_bias=qkv_bias,
        attn_scale=qk_scale, mlp_dims=tuple(int(d * r) for d, r in zip(dims, ratios, strict=True)),
        peg="both" if peg else "none",
    )  # fmt: skip
    return Pair(arguments, config, ("image_size", "attn_scale"))


STEM_WIDTH = 24
"""Of the first stage at least, where the official stem begins with a quarter of it."""


def growing(heads: Sequence[int], least: int) -> list[int]:
    """Widths that the heads fill, each a multiple of the one before."""
    dims: list[int] = []
    for number in heads:
        unit = math.lcm(number, dims[-1]) if dims else number
        dims.append(-(-least // unit) * unit)
    return dims


@st.composite
def vit_pytorch_models(draw: st.DrawFn) -> Pair:
    """vit-pytorch's model: four stages, whose windows shrink where regions cannot any more."""
    size, regions = draw(st.integers(1, 3)), draw(st.tuples(*2 * [st.sampled_from([1, 2, 4])]))
    dims = tuple(draw(pairs.widths) for _ in range(4))
    depths = tuple(draw(st.integers(1, 2)) for _ in range(4))
    convs, peg, num_classes = draw(st.booleans()), draw(st.booleans()), draw(st.integers(1, 5))
    arguments = dict(
        dim=dims, depth=depths, window_size=size, num_classes=num_classes,
        tokenize_local_3_conv=convs, use_peg=peg,
    )  # fmt: skip
    config = RegionViTConfig(
        image_size=tuple(n * 4 * size for n in regions), num_classes=num_classes, window_size=size,
        stem_dims=dims[:1] * 2 if convs else (), embed_dims=dims, depths=depths,
        mlp_dims=tuple(4 * dim for dim in dims), peg="local" if peg else "none", **VIT_PYTORCH,
    )  # fmt: skip
    return Pair(arguments, config, ("image_size",))


ORIGINALS = {
    "ibm": Original("ibm", "parity_tests.oracles.ibm_regionvit", lambda m: m.RegionViT, ibm_models),
    "vit_pytorch": Original(
        "vit_pytorch", "vit_pytorch.regionvit", lambda m: m.RegionViT, vit_pytorch_models
    ),
}


# What each format can hold


def ibm(draw: st.DrawFn, config: RegionViTConfig) -> Fields:
    """Whole windows in every stage, heads that fill the width, and a norm before each halving."""
    unit = config.region_size * 2 ** (len(config.stages) - 1)
    dims = growing(config.num_heads, max(config.embed_dims[0], STEM_WIDTH))
    return dict(
        image_size=(unit, draw(st.integers(1, 2)) * unit), embed_dims=dims, head_dim=None,
        stem_dims=(dims[0] // 4, dims[0] // 2) if config.stem_dims else (), region_norm=True,
        rel_pos="block", downsample="norm_conv", peg=draw(st.sampled_from(["none", "both"])),
        embed_norm_eps=1e-5, final_norm="tokens",
    )  # fmt: skip


def ibm_model(official: ModuleType, config: RegionViTConfig) -> Any:
    """Its sizes are the config's; it cuts the hidden width of an MLP to an integer."""
    widths = zip(config.mlp_dims, config.embed_dims, strict=True)
    stages = len(config.stages)
    return official.RegionViT(
        patch_size=config.patch_size, in_chans=config.in_channels, num_classes=config.num_classes,
        embed_dim=[config.embed_dims[0], *config.embed_dims], depth=config.depths,
        num_heads=config.num_heads, kernel_sizes=[config.window_size] * stages,
        downsampling=["c", *["sc"] * (stages - 1)],
        patch_conv_type="3conv" if config.stem_dims else "1conv",
        mlp_ratio=[(hidden + 0.5) / dim for hidden, dim in widths], qkv_bias=config.qkv_bias,
        qk_scale=config.attn_scale, peg=config.peg == "both",
    )  # fmt: skip


def vit_pytorch(draw: st.DrawFn, config: RegionViTConfig) -> Fields:
    """Four stages, of widths and depths as drawn."""
    dims = (config.embed_dims * 4)[:4]
    return VIT_PYTORCH | dict(
        image_size=(4 * config.window_size, draw(st.sampled_from([1, 2])) * 4 * config.window_size),
        in_channels=3, preprocess=pairs.statistics(3), embed_dims=dims,
        depths=(config.depths * 4)[:4], mlp_dims=[4 * dim for dim in dims], attn_scale=None,
        stem_dims=dims[:1] * 2 if config.stem_dims else (),
        peg=draw(st.sampled_from(["none", "local"])), embed_norm_eps=1e-5,
        num_classes=config.num_classes or 1,
    )  # fmt: skip


def vit_pytorch_model(library: ModuleType, config: RegionViTConfig) -> Any:
    """Its sizes are the config's."""
    return library.RegionViT(
        dim=config.embed_dims, depth=config.depths, window_size=config.window_size,
        num_classes=config.num_classes, tokenize_local_3_conv=bool(config.stem_dims),
        use_peg=config.peg == "local",
    )  # fmt: skip


FITS = {
    "ibm": Fit(ibm, "parity_tests.oracles.ibm_regionvit", ibm_model),
    "vit_pytorch": Fit(vit_pytorch, "vit_pytorch.regionvit", vit_pytorch_model),
}

PARAMETERS = {
    "regionvit_ti": (13_842_676, 13_842_676),
    "regionvit_s": (30_586_618, 30_586_618),
    "regionvit_m": (41_215_906, 41_215_906),
    "regionvit_b": (72_747_232, 72_747_232),
    "regionvit_pytorch": (12_749_176, 12_749_176),
}
"""Total and trainable, counted in ``parity_tests.oracles.ibm_regionvit``, whose counts the README
of the official code rounds, and in vit-pytorch 1.26.11; each model instantiated."""
