"""Rename tables of RegionViT, and its configs read from names and shapes.

Sources: IBM/RegionViT (Apache-2.0); vit-pytorch 1.26.11 ``regionvit.py`` (MIT).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

from isovit.spec.config import Preprocess
from isovit.spec.families.regionvit import VIT_PYTORCH, RegionViTConfig
from isovit.weight_convert.detect import Clues, Fields, Infer, Shapes, count
from isovit.weight_convert.families.vit import statistics
from isovit.weight_convert.rename import (
    RenameTable,
    Row,
    convolve,
    parameter,
    pixelwise,
    rename,
    reorder,
    repeated,
)


def ibm(config: RegionViTConfig) -> RenameTable:
    """The official code: the first entry of a stage's list of blocks halves its grids."""
    side = config.region_size
    foreign, block = "layers.{s}.block.{i+1}", "stages.{s}.blocks.{i}"
    halving = "layers.{s}.block.0"
    table = rename(f"{foreign}.attn.rel_pos", f"{block}.rel_pos")
    return RenameTable(
        *stem_rows("patch_embed.proj", image_norm),
        convolve("cls_token.proj", "region_embed.proj", (config.in_channels, side, side)),
        *image_norm(f"{halving}.proj.0", "stages.{s}.downsample.norm"),
        rename(f"{halving}.proj.2", "stages.{s}.downsample.conv"),
        repeated(
            r"layers\.\d+\.block\.0\.proj_cls\..*",
            "the convolution over regional tokens, which is that over local ones",
            ibm_copies(config),
        ),
        rename("layers.{s}.peg", "stages.{s}.peg.proj"),
        rename(f"{foreign}.norm0", f"{block}.region_norm"),
        rename(f"{foreign}.norm1", f"{block}.norm1"),
        rename(f"{foreign}.attn.qkv", f"{block}.attn.qkv"),
        rename(f"{foreign}.attn.proj", f"{block}.attn.proj"),
        reorder(table, partial(ibm_order, config.window_size)),
        rename(f"{foreign}.norm2", f"{block}.norm2"),
        rename(f"{foreign}.mlp.fc1", f"{block}.mlp.fc1"),
        rename(f"{foreign}.mlp.fc2", f"{block}.mlp.fc2"),
        rename("norm", "norm"),
        rename("head", "head"),
    )


def ibm_copies(config: RegionViTConfig) -> dict[str, str]:
    """The state dict has what halves the grids under two names: each key of one, and its twin."""
    stages, leaves = range(1, len(config.embed_dims)), ("weight", "bias")
    ends = [
        (f"layers.{s}.block.0", f"{n}.{leaf}") for s in stages for n in (0, 2) for leaf in leaves
    ]
    return {f"{start}.proj_cls.{end}": f"{start}.proj.{end}" for start, end in ends}


def ibm_order(size: int) -> Iterator[int]:
    """Where the official table has the bias of each offset: it begins at ⌊size / 2⌋ before zero.

    What comes before that is read from the end, by indices below zero.
    """
    n = 2 * size - 1
    for rows, columns in product(range(-size + 1, size), repeat=2):
        yield (rows + size // 2) % n * n + (columns + size // 2) % n


def vit_pytorch(config: RegionViTConfig) -> RenameTable:
    """vit-pytorch's RegionViT: a stage is a sequence of convolution, positions and blocks."""
    layer, block = "layers.{s}.2.layers.{i}", "stages.{s}.blocks.{i}"
    table = parameter("layers.{s}.2.local_rel_pos_bias.weight", "stages.{s}.rel_pos", "b a")
    return RenameTable(
        *stem_rows("local_encoder", pixelwise_norm),
        pixelwise(rename("region_encoder.1", "region_embed.proj")),
        rename("layers.{s}.0.conv", "stages.{s}.downsample.conv"),
        rename("layers.{s}.1.proj", "stages.{s}.peg.proj"),
        reorder(table, partial(vit_pytorch_order, config.window_size)),
        rename(f"{layer}.0.norm", f"{block}.norm1"),
        rename(f"{layer}.0.to_qkv", f"{block}.attn.qkv"),
        rename(f"{layer}.0.to_out.0", f"{block}.attn.proj"),
        rename(f"{layer}.1.0", f"{block}.norm2"),
        rename(f"{layer}.1.1", f"{block}.mlp.fc1"),
        rename(f"{layer}.1.4", f"{block}.mlp.fc2"),
        rename("to_logits.1", "norm"),
        rename("to_logits.2", "head"),
    )


def vit_pytorch_order(size: int) -> Iterator[int]:
    """Where vit-pytorch's table has the bias of each offset: from key to query, rows fastest."""
    for rows, columns in product(range(-size + 1, size), repeat=2):
        yield size - 1 - rows + (2 * size - 1) * (size - 1 - columns)


def stem_rows(foreign: str, norm: Callable[[str, str], tuple[Row, ...]]) -> Iterator[Row]:
    """The local tokens' convolution, or the entries of a sequence with three."""
    yield rename(foreign, "local_embed.proj")
    yield rename(f"{foreign}.0", "local_embed.conv1")
    yield from norm(f"{foreign}.1", "local_embed.norm1")
    yield rename(f"{foreign}.3", "local_embed.conv2")
    yield from norm(f"{foreign}.4", "local_embed.norm2")
    yield rename(f"{foreign}.6", "local_embed.conv3")


def image_norm(foreign: str, canonical: str) -> tuple[Row, ...]:
    """A LayerNorm over the channels of an image, whose leaves have the axes of one."""
    return (
        parameter(f"{foreign}.weight", f"{canonical}.scale", "1 c 1 1"),
        parameter(f"{foreign}.bias", f"{canonical}.bias", "1 c 1 1"),
    )


def pixelwise_norm(foreign: str, canonical: str) -> tuple[Row, ...]:
    """The same in vit-pytorch, whose leaves have other names too."""
    return (pixelwise(rename(foreign, canonical)),)


TABLES: dict[str, Callable[[RegionViTConfig], RenameTable]] = {
    "ibm": ibm,
    "vit_pytorch": vit_pytorch,
}

EMBED_NORM_EPS = 1e-5
"""Of the LayerNorms over images, in both."""
HEADS, HEAD_DIM = 4, 32
"""Of vit-pytorch, in every stage."""


def ibm_misfits(config: RegionViTConfig) -> Iterator[str]:
    """What the official code cannot be told to be."""
    whole = (config.window_size, config.window_size)
    if any(stage.window != whole for stage in config.stages):
        yield "an image_size that leaves windows smaller than window_size, which it would mask"
    if any(stage.inner_dim != stage.dim for stage in config.stages):
        yield "heads that do not fill embed_dims"
    dim = config.embed_dims[0]
    if config.stem_dims not in ((), (dim // 4, dim // 2)):
        yield "stem_dims other than a quarter and a half of embed_dims[0]"
    if not config.region_norm:
        yield "region_norm=false"
    if config.rel_pos != "block":
        yield f"rel_pos={config.rel_pos}"
    if config.downsample != "norm_conv":
        yield f"downsample={config.downsample}"
    if config.peg == "local":
        yield "peg=local"
    if config.embed_norm_eps != EMBED_NORM_EPS:
        yield f"embed_norm_eps other than {EMBED_NORM_EPS}"
    if config.final_norm != "tokens":
        yield f"final_norm={config.final_norm}"


def vit_pytorch_misfits(config: RegionViTConfig) -> Iterator[str]:
    """What vit-pytorch's model cannot be told to be."""
    if len(config.stages) != 4:
        yield "another number of stages than 4"
    if config.in_channels != 3:
        yield f"in_channels={config.in_channels}"
    if config.patch_size != 4:
        yield "patch_size other than 4"
    if config.stem_dims not in ((), (config.embed_dims[0],) * 2):
        yield "stem_dims other than embed_dims[0] twice"
    if any((stage.num_heads, stage.head_dim) != (HEADS, HEAD_DIM) for stage in config.stages):
        yield f"other heads than {HEADS} of width {HEAD_DIM}"
    if any(stage.mlp_dim != 4 * stage.dim for stage in config.stages):
        yield "mlp_dims other than 4 * embed_dims"
    if config.qkv_bias:
        yield "qkv_bias=true"
    if config.attn_scale not in (None, HEAD_DIM**-0.5):
        yield "attn_scale"
    if config.region_norm:
        yield "region_norm=true"
    if config.rel_pos != "stage":
        yield f"rel_pos={config.rel_pos}"
    if config.downsample != "conv":
        yield f"downsample={config.downsample}"
    if config.peg == "both":
        yield "peg=both"
    if config.embed_norm_eps != EMBED_NORM_EPS:
        yield f"embed_norm_eps other than {EMBED_NORM_EPS}"
    if config.final_norm != "pooled":
        yield f"final_norm={config.final_norm}"
    if not config.num_classes:
        yield "num_classes=0"


MISFITS: dict[str, Callable[[RegionViTConfig], Iterator[str]]] = {
    "ibm": ibm_misfits,
    "vit_pytorch": vit_pytorch_misfits,
}


def infer_ibm(clues: Clues) -> Fields | None:
    """The official code: its class token is a convolution."""
    shapes = clues.shapes
    tables = [
        shapes[f"layers.{s}.block.1.attn.rel_pos"]
        for s in range(count(shapes, "layers.{}.block.1.attn.rel_pos"))
    ]
    if not tables or "cls_token.proj.weight" not in shapes:
        return None
    stages, size = range(len(tables)), window_size(tables[0][1])
    _, in_channels, side, _ = shapes["cls_token.proj.weight"]
    return {
        "patch_size": side // size,
        "window_size": size,
        "stem_dims": stem_dims(shapes, "patch_embed.proj"),
        "embed_dims": [shapes[f"layers.{s}.block.1.norm1.weight"][0] for s in stages],
        "depths": [ibm_depth(shapes, s) for s in stages],
        "num_heads": [heads for heads, _ in tables],
        "qkv_bias": "layers.0.block.1.attn.qkv.bias" in shapes,
        "mlp_dims": [shapes[f"layers.{s}.block.1.mlp.fc1.weight"][0] for s in stages],
        "peg": "both" if "layers.0.peg.weight" in shapes else "none",
        "in_channels": in_channels,
        "num_classes": shapes.get("head.weight", (0,))[0],
        **statistics(in_channels, Preprocess()),
    }


def ibm_depth(shapes: Shapes, s: int) -> int:
    """Blocks of a stage, which are counted from 1."""
    depth = 0
    while f"layers.{s}.block.{depth + 1}.norm1.weight" in shapes:
        depth += 1
    return depth


def infer_vit_pytorch(clues: Clues) -> Fields | None:
    """vit-pytorch: an encoder for regions, and a table of biases in every stage."""
    shapes = clues.shapes
    tables = [
        shapes[f"layers.{s}.2.local_rel_pos_bias.weight"]
        for s in range(count(shapes, "layers.{}.2.local_rel_pos_bias.weight"))
    ]
    if not tables or "region_encoder.1.weight" not in shapes:
        return None
    stages, size, in_channels = range(len(tables)), window_size(tables[0][0]), 3
    side = math.isqrt(shapes["region_encoder.1.weight"][1] // in_channels)
    return {
        **VIT_PYTORCH,
        "patch_size": side // size,
        "window_size": size,
        "stem_dims": stem_dims(shapes, "local_encoder"),
        "embed_dims": [shapes[f"layers.{s}.2.layers.0.0.norm.weight"][0] for s in stages],
        "depths": [count(shapes, f"layers.{s}.2.layers.{{}}.0.norm.weight") for s in stages],
        "num_heads": [heads for _, heads in tables],
        "mlp_dims": [shapes[f"layers.{s}.2.layers.0.1.1.weight"][0] for s in stages],
        "peg": "local" if "layers.1.1.proj.weight" in shapes else "none",
        "num_classes": shapes["to_logits.2.weight"][0],
        "preprocess": Preprocess(),
    }


def window_size(offsets: int) -> int:
    """Side of the window in which so many offsets occur."""
    return (math.isqrt(offsets) + 1) // 2


def stem_dims(shapes: Shapes, foreign: str) -> tuple[int, ...]:
    """Widths of the first two of three convolutions; none where there is but one."""
    return tuple(shapes[name][0] for n in (0, 3) if (name := f"{foreign}.{n}.weight") in shapes)


INFER: dict[str, Infer] = {"ibm": infer_ibm, "vit_pytorch": infer_vit_pytorch}
