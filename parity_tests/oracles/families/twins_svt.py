"""Twins-SVT in NumPy loops."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
from hypothesis import strategies as st

from isovit.spec.blocks import BlockConfig
from isovit.spec.families.twins_svt import VIT_PYTORCH, StageConfig, TwinsSVTConfig
from parity_tests.oracles import arrays, pairs
from parity_tests.oracles.arrays import Array
from parity_tests.oracles.fitting import Fields, Fit
from parity_tests.oracles.originals import Original
from parity_tests.oracles.pairs import Pair


class Reference(arrays.Reference):
    """Twins-SVT; one window, one head and one token after another."""

    config: TwinsSVTConfig

    def output(self, images: Array) -> Array:
        """See ``Reference.output``."""
        x, config = images, self.config
        for i, stage in enumerate(config.stages):
            x = self.stage(f"stages.{i}", stage, x)
        x = x.reshape(len(x), -1, x.shape[-1])
        x = self.norm("norm", x) if config.final_norm == "tokens" else x
        if config.pool == "mean":
            x = sum(x[:, t] for t in range(x.shape[1])) / x.shape[1]
        return self.dense("head", x) if config.num_classes else x

    def stage(self, path: str, stage: StageConfig, x: Array) -> Array:
        """A grid to a smaller grid."""
        x = self.patch_embed(f"{path}.patch_embed", stage, x)
        for i, block in enumerate(stage.blocks):
            x = self.twins_block(f"{path}.blocks.{i}", stage, block, stage.is_local(i), x)
            if i == stage.peg_after - 1:
                x = x + self.positions(f"{path}.peg.proj", stage, x)
                self.keep(f"{path}.peg", x)
        return self.keep(path, x.reshape(len(x), *stage.grid, -1))

    def patch_embed(self, path: str, stage: StageConfig, x: Array) -> Array:
        """Patches to tokens."""
        side, eps = stage.patch_size, self.config.embed_norm_eps
        if self.config.patch_embed == "conv_norm":
            x = self.conv(f"{path}.proj", x, (side, side), (0, 0))
            return self.keep(path, self.norm(f"{path}.norm", flat(x), eps))
        patches = [
            [x[:, i * side + di, j * side + dj, c] for c in range(x.shape[-1])
             for di in range(side) for dj in range(side)]
            for i, j in np.ndindex(stage.grid)
        ]  # fmt: skip
        x = np.moveaxis(np.array(patches), -1, 0)  # (batch, tokens, channel and place in the patch)
        x = self.norm(f"{path}.norm1", x, eps)
        return self.keep(path, self.norm(f"{path}.norm2", self.dense(f"{path}.proj", x), eps))

    def twins_block(
        self, path: str, stage: StageConfig, block: BlockConfig, local: bool, x: Array
    ) -> Array:
        """The pre-norm block."""
        attend = self.local_attention if local else self.global_attention
        x = x + attend(f"{path}.attn", stage, block, self.norm(f"{path}.norm1", x))
        y = self.norm(f"{path}.norm2", x)
        return self.keep(path, x + self.mlp(f"{path}.mlp", self.config.activation, y))

    def local_attention(self, path: str, stage: StageConfig, block: BlockConfig, x: Array) -> Array:
        """Every token with those of its window, zeros beyond the edge of the grid among them."""
        (rows, columns), size = stage.grid, stage.window_size
        down, right = -(-rows // size) * size, -(-columns // size) * size
        padded = np.zeros((len(x), down, right, stage.dim), x.dtype)
        padded[:, :rows, :columns] = x.reshape(len(x), rows, columns, -1)
        q, k, v = np.split(self.dense(f"{path}.qkv", padded), 3, axis=-1)
        y = np.zeros((len(x), rows, columns, block.inner_dim), q.dtype)
        for b, i, j in np.ndindex(len(x), rows, columns):
            top, left = i // size * size, j // size * size
            window = (b, slice(top, top + size), slice(left, left + size))
            inside = (z[window].reshape(size * size, -1) for z in (k, v))
            y[b, i, j] = self.token(block, q[b, i, j], *inside)
        return self.keep(path, self.dense(f"{path}.proj", flat(y)))

    def global_attention(
        self, path: str, stage: StageConfig, block: BlockConfig, x: Array
    ) -> Array:
        """Every token with the summary of every square."""
        side, image = (stage.reduction, stage.reduction), x.reshape(len(x), *stage.grid, -1)
        q = self.dense(f"{path}.q", x)
        if self.config.reduce == "conv":
            kv = self.conv(f"{path}.kv", image, side, (0, 0))
        else:
            if stage.reduction > 1:
                image = self.conv(f"{path}.reduce", image, side, (0, 0))
                image = self.norm(f"{path}.norm", image, self.config.reduce_norm_eps)
            kv = self.dense(f"{path}.kv", image)
        k, v = np.split(flat(kv), 2, axis=-1)
        y = np.zeros_like(q)
        for b, t in np.ndindex(q.shape[:2]):
            y[b, t] = self.token(block, q[b, t], k[b], v[b])
        return self.keep(path, self.dense(f"{path}.proj", y))

    def token(self, block: BlockConfig, q: Array, k: Array, v: Array) -> Array:
        """What one token gets: q is (inner,), k and v are (keys, inner), heads side by side."""
        out: list[Array] = []
        for h in range(block.num_heads):
            head = slice(h * block.head_dim, (h + 1) * block.head_dim)
            scores = k[:, head] @ q[head] / np.sqrt(block.head_dim)
            powers = np.exp(scores - scores.real.max())
            out.append(powers / powers.sum() @ v[:, head])
        return np.concatenate(out)

    def positions(self, path: str, stage: StageConfig, x: Array) -> Array:
        """The depthwise convolution of the positional encoding."""
        pad = self.config.peg_kernel_size // 2
        image = x.reshape(len(x), *stage.grid, -1)
        return flat(self.conv(path, image, (1, 1), (pad, pad), groups=stage.dim))


def flat(x: Array) -> Array:
    """A grid of tokens as a row of tokens."""
    return x.reshape(len(x), -1, x.shape[-1])


# The originals


@st.composite
def timm_twins(draw: st.DrawFn) -> Pair:
    """timm's Twins: patches of two tokens behind the first stage, any windows or none at all."""
    stages = range(draw(st.integers(1, 2)))
    patch_size, channels = draw(st.integers(2, 3)), draw(pairs.channel_counts)
    grid = draw(st.integers(1, 3)), draw(st.integers(1, 4))  # of the last stage
    grids = [tuple(side * 2 ** (len(stages) - 1 - s) for side in grid) for s in stages]
    image_size = (grids[0][0] * patch_size, grids[0][1] * patch_size)
    heads = [draw(pairs.head_counts) for _ in stages]
    dims = [draw(pairs.divisible(number)) for number in heads]
    depths = [draw(st.integers(1, 3)) for _ in stages]
    ratios = [draw(st.integers(1, 3)) for _ in stages]
    reductions = [draw(st.integers(1, min(grid))) for grid in grids]
    windows = draw(st.none() | st.lists(st.integers(1, 4), min_size=2, max_size=2))
    num_classes = draw(pairs.class_counts)
    global_pool = draw(st.sampled_from(["avg", *[""] * (num_classes == 0)]))
    arguments = dict(
        img_size=image_size, patch_size=patch_size, in_chans=channels, num_classes=num_classes,
        global_pool=global_pool, embed_dims=dims, num_heads=heads, mlp_ratios=ratios, depths=depths,
        sr_ratios=reductions, wss=windows,
    )  # fmt: skip
    config = TwinsSVTConfig(
        image_size=image_size, in_channels=channels, preprocess=pairs.statistics(channels),
        num_classes=num_classes, embed_dims=tuple(dims), depths=tuple(depths),
        num_heads=tuple(heads), patch_sizes=(patch_size, 2)[: len(stages)],
        mlp_dims=tuple(dim * ratio for dim, ratio in zip(dims, ratios, strict=True)),
        window_sizes=tuple(size if size > 1 else 0 for size in (windows or [0, 0])[: len(stages)]),
        reductions=tuple(reductions), peg_after=(1,) * len(stages),
        pool="mean" if global_pool else "none",
    )  # fmt: skip
    # A stage whose one block is local has no squares to reduce, and nobody asks.
    untold = ("image_size", "num_heads", "window_sizes", "pool", "reductions")
    return Pair(arguments, config, untold)


@st.composite
def vit_pytorch_twins(draw: st.DrawFn) -> Pair:
    """vit-pytorch's TwinsSVT: four stages, of which windows tile the first three."""
    grid = draw(st.integers(1, 2)), draw(st.integers(1, 3))  # of the last stage
    peg_kernel_size, num_classes = draw(st.sampled_from([3, 1, 5])), draw(st.integers(1, 5))
    arguments: dict[str, Any] = dict(peg_kernel_size=peg_kernel_size, num_classes=num_classes)
    stages: list[dict[str, int]] = []
    for s in (4, 3, 2, 1):
        side = math.gcd(*grid)
        window = draw(st.sampled_from([n for n in range(1, 5) if side % n == 0]))
        reduction, patch = draw(st.integers(1, min(grid))), draw(st.integers(1, 2))
        patch, depth, dim = patch + (s == 1), draw(st.integers(0, 1)), draw(pairs.widths)
        arguments |= {
            f"s{s}_emb_dim": dim, f"s{s}_patch_size": patch, f"s{s}_local_patch_size": window,
            f"s{s}_global_k": reduction, f"s{s}_depth": depth,
        }  # fmt: skip
        pair = 1 if s == 4 else 2
        stages.insert(0, dict(
            embed_dims=dim, depths=pair * (1 + depth), num_heads=8, mlp_dims=4 * dim,
            patch_sizes=patch, window_sizes=0 if s == 4 else window, reductions=reduction,
            peg_after=pair,
        ))  # fmt: skip
        grid = (grid[0] * patch, grid[1] * patch)
    config = TwinsSVTConfig(
        image_size=grid, num_classes=num_classes, peg_kernel_size=peg_kernel_size,
        **{name: tuple(stage[name] for stage in stages) for name in stages[0]}, **VIT_PYTORCH,
    )  # fmt: skip
    return Pair(arguments, config, ("image_size", "window_sizes"))


ORIGINALS = {
    "timm": Original("timm", "timm.models.twins", lambda m: m.Twins, timm_twins),
    "vit_pytorch": Original(
        "vit_pytorch", "vit_pytorch.twins_svt", lambda m: m.TwinsSVT, vit_pytorch_twins
    ),
}


# What each format can hold


def timm(_: st.DrawFn, config: TwinsSVTConfig) -> Fields:
    """Heads that fill the width, patches of two tokens, the positions behind the first block."""
    stages, first = len(config.stages), config.patch_sizes[0]
    (rows, columns), unit = config.stages[-1].grid, first * 2 ** (stages - 1)
    return dict(
        image_size=(rows * unit, columns * unit), head_dim=None, patch_embed="conv_norm",
        patch_sizes=(first, *[2] * (stages - 1)), reductions=(1,) * stages,
        reduce="conv_norm_linear", qkv_bias=True, peg_after=(1,) * stages, peg_kernel_size=3,
        embed_norm_eps=1e-5, reduce_norm_eps=1e-5, final_norm="tokens",
    )  # fmt: skip


def timm_model(twins: ModuleType, config: TwinsSVTConfig) -> Any:
    """Its sizes are the config's; a window of 1 is none."""
    widths = zip(config.mlp_dims, config.embed_dims, strict=True)
    return twins.Twins(
        img_size=config.image_size, patch_size=config.patch_sizes[0], in_chans=config.in_channels,
        num_classes=config.num_classes, global_pool="avg" if config.pool == "mean" else "",
        embed_dims=config.embed_dims, num_heads=config.num_heads, depths=config.depths,
        mlp_ratios=[(hidden + 0.5) / dim for hidden, dim in widths],  # it cuts to an integer
        sr_ratios=config.reductions, wss=[size or 1 for size in config.window_sizes],
    )  # fmt: skip


def vit_pytorch(draw: st.DrawFn, config: TwinsSVTConfig) -> Fields:
    """Four stages, of widths as drawn; windows tile the first three."""
    dims = (config.embed_dims * 4)[:4]
    (rows, columns), window = config.stages[-1].grid, draw(st.integers(1, 3))
    return dict(
        image_size=(2 * window * rows, 2 * window * columns), in_channels=3,
        preprocess=pairs.statistics(3), embed_dims=dims, depths=(4, 2, 2, 3), num_heads=(8,) * 4,
        head_dim=64, mlp_dims=[4 * dim for dim in dims], patch_sizes=(2, 1, 1, 1),
        patch_embed="norm_linear_norm", window_sizes=(*[window] * 3, 0), reductions=(2, 1, 2, 1),
        reduce="conv", qkv_bias=False, peg_after=(2, 2, 2, 1), embed_norm_eps=1e-5,
        final_norm="none", pool="mean", num_classes=config.num_classes or 1,
    )  # fmt: skip


def vit_pytorch_model(library: ModuleType, config: TwinsSVTConfig) -> Any:
    """Its sizes are the config's; the blocks before the positions are none of its depth."""
    arguments: Fields = {}
    for s, stage in enumerate(config.stages, start=1):
        blocks = len(stage.blocks) - stage.peg_after
        arguments |= {
            f"s{s}_emb_dim": stage.dim, f"s{s}_patch_size": stage.patch_size,
            f"s{s}_local_patch_size": stage.window_size, f"s{s}_global_k": stage.reduction,
            f"s{s}_depth": blocks // stage.peg_after,
        }  # fmt: skip
    return library.TwinsSVT(
        num_classes=config.num_classes, peg_kernel_size=config.peg_kernel_size, **arguments
    )


FITS = {
    "timm": Fit(timm, "timm.models.twins", timm_model),
    "vit_pytorch": Fit(vit_pytorch, "vit_pytorch.twins_svt", vit_pytorch_model),
}

PARAMETERS = {
    "twins_svt_s": (24_060_776, 24_060_776),
    "twins_svt_b": (56_070_952, 56_070_952),
    "twins_svt_l": (99_271_400, 99_271_400),
    "twins_svt_pytorch": (252_025_096, 250_714_376),
}
"""Total and trainable, counted in timm 1.0.31 and in vit-pytorch 1.26.11; each model instantiated.

vit-pytorch lets q train where there is one key: 5 · 512 · 512 numbers of the last stage.
"""
