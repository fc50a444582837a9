"""Rename tables of NesT, and its configs read from names and shapes.

Sources: timm 1.0 ``nest.py`` (Apache-2.0); vit-pytorch 1.26.11 ``nest.py`` (MIT).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import cast

from isovit.spec.config import Preprocess, require
from isovit.spec.families.nest import VARIANTS, VIT_PYTORCH, NesTConfig
from isovit.weight_convert.detect import Ask, Clues, Fields, Infer, Shapes, count, square_side
from isovit.weight_convert.families.vit import square_patch, statistics, timm_preprocess
from isovit.weight_convert.rename import RenameTable, Row, interleave, pixelwise, rename


def timm(config: NesTConfig) -> RenameTable:
    """Timm's Nest, which puts the heads of a token together number by number."""
    rows: list[Row] = []
    for i, heads in enumerate(config.num_heads):
        theirs, ours = f"levels.{i}.transformer_encoder.{{j}}", f"levels.{i}.blocks.{{j}}"
        rows += [
            rename(f"{theirs}.norm1", f"{ours}.norm1"),
            rename(f"{theirs}.attn.qkv", f"{ours}.attn.qkv"),
            interleave(f"{theirs}.attn.proj", f"{ours}.attn.proj", heads=heads),
            rename(f"{theirs}.norm2", f"{ours}.norm2"),
            rename(f"{theirs}.mlp.fc1", f"{ours}.mlp.fc1"),
            rename(f"{theirs}.mlp.fc2", f"{ours}.mlp.fc2"),
        ]
    return RenameTable(
        rename("patch_embed.proj", "patch_embed.proj"),
        rename("levels.{i}.pos_embed", "levels.{i}.pos_embed"),
        rename("levels.{i}.pool.conv", "levels.{i}.pool.conv"),
        rename("levels.{i}.pool.norm", "levels.{i}.pool.norm"),
        *rows,
        rename("norm", "norm"),
        rename("head", "head"),
    )


def vit_pytorch(config: NesTConfig) -> RenameTable:
    """vit-pytorch's NesT, but for the head all of convolutions; its levels end with the pooling."""
    theirs, ours = "layers.{i}.0.layers.{j}", "levels.{i}.blocks.{j}"
    rows = [
        rename("to_patch_embedding.1", "patch_embed.norm1"),
        rename("to_patch_embedding.2", "patch_embed.proj"),
        rename("to_patch_embedding.3", "patch_embed.norm2"),
        rename("layers.{i}.0.pos_emb", "levels.{i}.pos_embed"),
        rename(f"{theirs}.0.norm", f"{ours}.norm1"),
        rename(f"{theirs}.0.to_qkv", f"{ours}.attn.qkv"),
        rename(f"{theirs}.0.to_out.0", f"{ours}.attn.proj"),
        rename(f"{theirs}.1.net.0", f"{ours}.norm2"),
        rename(f"{theirs}.1.net.1", f"{ours}.mlp.fc1"),
        rename(f"{theirs}.1.net.4", f"{ours}.mlp.fc2"),
        rename("mlp_head.0", "norm"),
    ]
    for i in range(1, len(config.embed_dims)):
        rows += [
            rename(f"layers.{i - 1}.1.0", f"levels.{i}.pool.conv"),
            rename(f"layers.{i - 1}.1.1", f"levels.{i}.pool.norm"),
        ]
    return RenameTable(*map(pixelwise, rows), rename("mlp_head.2", "head"))


TABLES: dict[str, Callable[[NesTConfig], RenameTable]] = {
    "timm": timm,
    "vit_pytorch": vit_pytorch,
}


def common_misfits(config: NesTConfig) -> Iterator[str]:
    """What neither library's model can be told to be."""
    if config.image_size[0] != config.image_size[1]:
        yield "an image that is not square"
    if config.patch_size[0] != config.patch_size[1]:
        yield "a patch that is not square"


def timm_misfits(config: NesTConfig) -> Iterator[str]:
    """What timm's model cannot be told to be."""
    yield from common_misfits(config)
    if config.patch_embed != "conv":
        yield f"patch_embed={config.patch_embed}"
    if config.pos_embed != "image":
        yield f"pos_embed={config.pos_embed}"
    levels = zip(config.embed_dims, config.num_heads, strict=True)
    if config.head_dim is not None and any(config.head_dim * h != dim for dim, h in levels):
        yield "heads that do not fill embed_dims"


def vit_pytorch_misfits(config: NesTConfig) -> Iterator[str]:
    """What vit-pytorch's model cannot be told to be."""
    yield from common_misfits(config)
    for name in ("patch_embed", "qkv_bias", "pos_embed", "pool_padding"):
        if getattr(config, name) != VIT_PYTORCH[name]:
            yield f"{name}={getattr(config, name)}"
    for name in ("embed_dims", "num_heads"):
        values = getattr(config, name)
        if values != doubled(values[0], len(values)):
            yield f"{name} that do not double from level to level"
    usual = config.embed_dims[0] // config.num_heads[0]
    if (config.head_dim or usual) != usual:
        yield f"head_dim other than {usual}, what embed_dims gives to a head"
    if not config.num_classes:
        yield "num_classes=0"


MISFITS: dict[str, Callable[[NesTConfig], Iterator[str]]] = {
    "timm": timm_misfits,
    "vit_pytorch": vit_pytorch_misfits,
}


def doubled(first: int, levels: int) -> tuple[int, ...]:
    """A number for each level, each twice the one before."""
    return tuple(first * 2**i for i in range(levels))


def infer_timm(clues: Clues) -> Fields | None:
    """timm: positions by level, (1, blocks, tokens of a block, dim).

    No weight tells the padding of the pooling or the kind of GELU: the padding is that under which
    the published weights were trained, the GELU is what timm computes.
    """
    shapes = clues.shapes
    kernel = shapes.get("patch_embed.proj.weight", ())
    if len(kernel) != 4 or len(shapes.get("levels.0.pos_embed", ())) != 4:
        return None
    _, in_channels, *patch_size = kernel
    levels = count(shapes, "levels.{}.pos_embed")
    dims = tuple(shapes[f"levels.{i}.pos_embed"][-1] for i in range(levels))
    encoders = [f"levels.{i}.transformer_encoder" for i in range(levels)]
    depths = tuple(count(shapes, f"{encoder}.{{}}.norm1.weight") for encoder in encoders)
    biased = [f"{encoder}.0.attn.qkv.bias" in shapes for encoder in encoders]
    return {
        **sizes(clues, dims, depths, shapes["levels.0.pos_embed"][2], tuple(patch_size)),
        "in_channels": in_channels,
        "mlp_ratio": mlp_ratio(shapes, dims, [f"{encoder}.0.mlp.fc1" for encoder in encoders]),
        "qkv_bias": any(biased) or not any(depths),
        "activation": "gelu",
        "num_classes": shapes.get("head.weight", (0,))[0],
        **statistics(in_channels, timm_preprocess(clues, Preprocess())),
    }


def infer_vit_pytorch(clues: Clues) -> Fields | None:
    """vit-pytorch: positions by level, one number for each token of a block."""
    shapes = clues.shapes
    proj = shapes.get("to_patch_embedding.2.weight", ())
    if len(proj) != 4 or len(shapes.get("layers.0.0.pos_emb", ())) != 1:
        return None
    levels = count(shapes, "layers.{}.0.pos_emb")
    dims = doubled(proj[0], levels)
    layers = [f"layers.{i}.0.layers" for i in range(levels)]
    depths = tuple(count(shapes, f"{layer}.{{}}.0.norm.g") for layer in layers)
    in_channels, patch_size = square_patch(proj[1], clues.given)
    fields: Fields = {
        **VIT_PYTORCH,
        **sizes(clues, dims, depths, shapes["layers.0.0.pos_emb"][0], patch_size),
        "in_channels": in_channels,
        "mlp_ratio": mlp_ratio(shapes, dims, [f"{layer}.0.1.net.1" for layer in layers]),
        "num_classes": shapes.get("mlp_head.2.weight", (0,))[0],
        **statistics(in_channels, Preprocess()),
    }
    dim, heads = dims[0], fields["num_heads"][0]
    return fields if dim % heads == 0 else {**fields, "head_dim": dim // heads}


def sizes(
    clues: Clues,
    dims: tuple[int, ...],
    depths: tuple[int, ...],
    block_tokens: int,
    patch_size: tuple[int, ...],
) -> Fields:
    """What both libraries' weights tell of the hierarchy, and its heads.

    Raises:
        Ask: if the heads are of no published model, or no image is square.
    """
    fields: Fields = {
        "patch_size": patch_size,
        "embed_dims": dims,
        "depths": depths,
        "num_heads": level_heads(clues, dims, depths),
    }
    unit = patch_size[0] * 2 ** (len(dims) - 1)
    side = square_side(block_tokens, clues.given, unit)
    return fields if side is None else {**fields, "image_size": (side * unit, side * unit)}


def level_heads(clues: Clues, dims: tuple[int, ...], depths: tuple[int, ...]) -> tuple[int, ...]:
    """Heads of each level, which no shape tells, of the published model of these sizes.

    Raises:
        Ask: if no published model has these widths and depths.
    """
    if "num_heads" in clues.given:
        given = clues.given["num_heads"]
        heads = tuple(cast("Sequence[int]", given)) if type(given) in (list, tuple) else ()
        rule = f"needs one for each of {len(dims)} levels"
        require(len(heads) == len(dims), "num_heads", given, rule)
        return heads
    for config in VARIANTS.values():
        if (config.embed_dims, config.depths) == (dims, depths):
            return config.num_heads
    why = f"no published model has embed_dims={list(dims)} and depths={list(depths)}"
    raise Ask("num_heads", why, "[HEADS,…]")


def mlp_ratio(shapes: Shapes, dims: tuple[int, ...], first: list[str]) -> int:
    """Hidden width over width, of the first level that has a layer; 4 where none has.

    Args:
        shapes: of the file.
        dims: width of each level.
        first: path of the first product of its first MLP.
    """
    for dim, path in zip(dims, first, strict=True):
        if hidden := shapes.get(f"{path}.weight"):
            return hidden[0] // dim
    return 4


INFER: dict[str, Infer] = {"timm": infer_timm, "vit_pytorch": infer_vit_pytorch}
