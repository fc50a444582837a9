"""Rename tables of Twins-SVT, and its configs read from names and shapes.

Sources: timm 1.0.31 ``twins.py`` (Apache-2.0), whose names are those of the official code; vit-
pytorch 1.26.11 ``twins_svt.py`` (MIT).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from isovit.spec.config import Preprocess
from isovit.spec.families.twins_svt import VARIANTS, VIT_PYTORCH, TwinsSVTConfig
from isovit.weight_convert.detect import Ask, Clues, Fields, Infer, count
from isovit.weight_convert.families.vit import statistics, timm_preprocess
from isovit.weight_convert.rename import RenameTable, Row, fuse, pixelwise, rename


def timm(config: TwinsSVTConfig) -> RenameTable:
    """Timm's Twins: a list of each kind of part, in which stages are counted."""
    foreign, block = "blocks.{s}.{i}", "stages.{s}.blocks.{i}"
    return RenameTable(
        rename("patch_embeds.{s}.proj", "stages.{s}.patch_embed.proj"),
        rename("patch_embeds.{s}.norm", "stages.{s}.patch_embed.norm"),
        rename(f"{foreign}.norm1", f"{block}.norm1"),
        rename(f"{foreign}.attn.qkv", f"{block}.attn.qkv"),
        rename(f"{foreign}.attn.q", f"{block}.attn.q"),
        rename(f"{foreign}.attn.sr", f"{block}.attn.reduce"),
        rename(f"{foreign}.attn.norm", f"{block}.attn.norm"),
        rename(f"{foreign}.attn.kv", f"{block}.attn.kv"),
        rename(f"{foreign}.attn.proj", f"{block}.attn.proj"),
        rename(f"{foreign}.norm2", f"{block}.norm2"),
        rename(f"{foreign}.mlp.fc1", f"{block}.mlp.fc1"),
        rename(f"{foreign}.mlp.fc2", f"{block}.mlp.fc2"),
        rename("pos_block.{s}.proj.0", "stages.{s}.peg.proj"),
        rename("norm", "norm"),
        rename("head", "head"),
    )


def vit_pytorch(config: TwinsSVTConfig) -> RenameTable:
    """vit-pytorch's TwinsSVT: a stage is a sequence of four, then pooling and the head follow."""
    stages = range(len(config.stages))
    return RenameTable(
        pixelwise(rename("layers.{s}.0.proj.0", "stages.{s}.patch_embed.norm1")),
        pixelwise(rename("layers.{s}.0.proj.1", "stages.{s}.patch_embed.proj")),
        pixelwise(rename("layers.{s}.0.proj.2", "stages.{s}.patch_embed.norm2")),
        *(row for s in stages for row in vit_pytorch_blocks(config, s)),
        rename("layers.{s}.2.proj.fn", "stages.{s}.peg.proj"),
        rename(f"layers.{len(stages) + 2}", "head"),
    )


def vit_pytorch_blocks(config: TwinsSVTConfig, s: int) -> Iterator[Row]:
    """The blocks of a stage: a layer holds two, or in a stage without windows the second alone."""
    stage = config.stages[s]
    for i in range(config.depths[s]):
        behind = i >= stage.peg_after
        place = i - stage.peg_after if behind else i
        layer, part = divmod(place, 2) if stage.window_size else (place, 1)
        foreign = f"layers.{s}.{3 if behind else 1}.layers.{layer}"
        attn, mlp = f"{foreign}.{2 * part}.fn", f"{foreign}.{2 * part + 1}.fn.net"
        block = f"stages.{s}.blocks.{i}"
        yield pixelwise(rename(f"{attn}.norm", f"{block}.norm1"))
        yield pixelwise(fuse(f"{attn}.to_{{q|kv}}", f"{block}.attn.qkv", shares=(1, 2)))
        yield pixelwise(rename(f"{attn}.to_q", f"{block}.attn.q"))
        yield rename(f"{attn}.to_kv", f"{block}.attn.kv")
        yield pixelwise(rename(f"{attn}.to_out.0", f"{block}.attn.proj"))
        yield pixelwise(rename(f"{mlp}.0", f"{block}.norm2"))
        yield pixelwise(rename(f"{mlp}.1", f"{block}.mlp.fc1"))
        yield pixelwise(rename(f"{mlp}.4", f"{block}.mlp.fc2"))


TABLES: dict[str, Callable[[TwinsSVTConfig], RenameTable]] = {
    "timm": timm,
    "vit_pytorch": vit_pytorch,
}

NORM_EPS = 1e-5
"""Of the LayerNorms that neither library lets anyone choose."""


def timm_misfits(config: TwinsSVTConfig) -> Iterator[str]:
    """What timm's model cannot be told to be."""
    if any(block.inner_dim != block.dim for stage in config.stages for block in stage.blocks):
        yield "heads that do not fill embed_dims"
    if config.patch_embed != "conv_norm":
        yield f"patch_embed={config.patch_embed}"
    if any(size != 2 for size in config.patch_sizes[1:]):
        yield "patch_sizes other than 2 behind the first"
    if 1 in config.window_sizes:
        yield "windows of one token, which to timm means none"
    if config.reduce != "conv_norm_linear":
        yield f"reduce={config.reduce}"
    if not config.qkv_bias:
        yield "qkv_bias=false"
    if any(number != 1 for number in config.peg_after):
        yield "peg_after other than 1"
    if config.peg_kernel_size != 3:
        yield "peg_kernel_size other than 3"
    if (config.embed_norm_eps, config.reduce_norm_eps) != (NORM_EPS, NORM_EPS):
        yield f"embed_norm_eps or reduce_norm_eps other than {NORM_EPS}"
    if config.final_norm != "tokens":
        yield f"final_norm={config.final_norm}"


def vit_pytorch_misfits(config: TwinsSVTConfig) -> Iterator[str]:
    """What vit-pytorch's model cannot be told to be."""
    if len(config.stages) != 4:
        yield "another number of stages than 4"
    if config.in_channels != 3:
        yield f"in_channels={config.in_channels}"
    blocks = [block for stage in config.stages for block in stage.blocks]
    if any((block.num_heads, block.head_dim) != (8, 64) for block in blocks):
        yield "other heads than 8 of width 64"
    if any(block.mlp_dim != 4 * block.dim for block in blocks):
        yield "mlp_dims other than 4 * embed_dims"
    if config.patch_embed != "norm_linear_norm":
        yield f"patch_embed={config.patch_embed}"
    *windowed, last = config.stages
    if last.window_size or not all(stage.window_size for stage in windowed):
        yield "window_sizes of 0 elsewhere than in the last stage, or not there"
    elif any(stage.padded_grid != stage.grid for stage in windowed):
        yield "windows that do not tile the grid"
    depths = config.depths[:-1]
    if config.peg_after != (*(2 for _ in windowed), 1) or any(depth % 2 for depth in depths):
        yield "peg_after other than the first pair of blocks, or a block without its pair"
    if config.reduce != "conv":
        yield f"reduce={config.reduce}"
    if config.qkv_bias:
        yield "qkv_bias=true"
    if config.embed_norm_eps != NORM_EPS:
        yield f"embed_norm_eps other than {NORM_EPS}"
    if config.final_norm != "none":
        yield f"final_norm={config.final_norm}"
    if not config.num_classes:
        yield "num_classes=0"


MISFITS: dict[str, Callable[[TwinsSVTConfig], Iterator[str]]] = {
    "timm": timm_misfits,
    "vit_pytorch": vit_pytorch_misfits,
}


def infer_timm(clues: Clues) -> Fields | None:
    """timm: patch embeddings and positional convolutions in lists."""
    shapes, given = clues.shapes, clues.given
    stages = range(count(shapes, "patch_embeds.{}.proj.weight"))
    kernels = [shapes[f"patch_embeds.{s}.proj.weight"] for s in stages]
    peg = shapes.get("pos_block.0.proj.0.weight", ())
    if not kernels or not all(len(kernel) == 4 for kernel in (*kernels, peg)):
        return None
    dims = tuple(kernel[0] for kernel in kernels)
    depths = tuple(count(shapes, f"blocks.{s}.{{}}.norm1.weight") for s in stages)
    windowed = [f"blocks.{s}.0.attn.qkv.weight" in shapes for s in stages]
    global_blocks = [f"blocks.{s}.{int(windowed[s])}" for s in stages]  # the first of each stage
    reductions = [shapes.get(f"{block}.attn.sr.weight", (1,))[-1] for block in global_blocks]
    in_channels = kernels[0][1]
    return {
        "in_channels": in_channels,
        "embed_dims": dims,
        "depths": depths,
        "num_heads": untold("num_heads", given, dims, depths),
        "mlp_dims": tuple(
            shapes.get(f"blocks.{s}.0.mlp.fc1.weight", (4 * dim,))[0] for s, dim in enumerate(dims)
        ),
        "patch_sizes": tuple(kernel[-1] for kernel in kernels),
        "window_sizes": windows(windowed, given, dims, depths),
        "reductions": tuple(reductions),
        "peg_after": (1,) * len(stages),
        "peg_kernel_size": peg[-1],
        "num_classes": shapes.get("head.weight", (0,))[0],
        **statistics(in_channels, timm_preprocess(clues, Preprocess())),
    }


def infer_vit_pytorch(clues: Clues) -> Fields | None:
    """vit-pytorch: a sequence of stages, each with a positional convolution as its third part."""
    shapes, given = clues.shapes, clues.given
    stages = range(count(shapes, "layers.{}.2.proj.fn.weight"))
    products = [shapes.get(f"layers.{s}.0.proj.1.weight", ()) for s in stages]
    peg = shapes.get("layers.0.2.proj.fn.weight", ())
    keys = [shapes.get(f"layers.{s}.1.layers.0.2.fn.to_kv.weight", ()) for s in stages]
    if not products or not all(len(kernel) == 4 for kernel in (*products, *keys, peg)):
        return None
    dims = tuple(kernel[0] for kernel in products)
    windowed = [f"layers.{s}.1.layers.0.0.fn.norm.g" in shapes for s in stages]
    pairs = [1 + is_local for is_local in windowed]  # blocks in a layer
    behind = [count(shapes, f"layers.{s}.3.layers.{{}}.2.fn.norm.g") for s in stages]
    depths = tuple(pair * (1 + layers) for pair, layers in zip(pairs, behind, strict=True))
    channels = (3, *dims)
    heads = tuple(given.get("num_heads", (8,) * len(stages)))
    return {
        **VIT_PYTORCH,
        "embed_dims": dims,
        "depths": depths,
        "num_heads": heads,
        "head_dim": keys[0][0] // 2 // heads[0],
        "mlp_dims": tuple(
            shapes.get(f"layers.{s}.1.layers.0.3.fn.net.1.weight", (4 * dim,))[0]
            for s, dim in enumerate(dims)
        ),
        "patch_sizes": tuple(
            math.isqrt(kernel[1] // channels[s]) for s, kernel in enumerate(products)
        ),
        "window_sizes": windows(windowed, given, dims, depths),
        "reductions": tuple(kernel[-1] for kernel in keys),
        "peg_after": tuple(pairs),
        "peg_kernel_size": peg[-1],
        "num_classes": shapes.get(f"layers.{len(stages) + 2}.weight", (0,))[0],
        "preprocess": Preprocess(),
    }


Numbers = tuple[int, ...]


def untold(field: str, given: Mapping[str, Any], dims: Numbers, depths: Numbers) -> Numbers:
    """A field that no shape tells, of the published model of these widths and depths.

    Raises:
        Ask: if there is none.
    """
    if field in given:
        return tuple(given[field])
    for variant in VARIANTS.values():
        if (variant.embed_dims, variant.depths) == (dims, depths):
            return getattr(variant, field)
    why = f"no published model has embed_dims={list(dims)} and depths={list(depths)}"
    raise Ask(field, why, f"[{','.join('N' for _ in dims)}]")


def windows(
    windowed: list[bool], given: Mapping[str, Any], dims: Numbers, depths: Numbers
) -> Numbers:
    """Sides of the windows, which no shape tells, where there are any."""
    if not any(windowed):
        return (0,) * len(windowed)
    sizes = untold("window_sizes", given, dims, depths)
    return tuple(size * has for size, has in zip(sizes, windowed, strict=False))


INFER: dict[str, Infer] = {"vit_pytorch": infer_vit_pytorch, "timm": infer_timm}
