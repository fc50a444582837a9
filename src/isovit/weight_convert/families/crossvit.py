"""Rename tables of CrossViT, and its configs read from names and shapes.

Sources: timm 1.0 ``crossvit.py`` (Apache-2.0); IBM/CrossViT ``models/crossvit.py`` (Apache-2.0),
whose names differ in tokens and positions alone; vit-pytorch 1.26.11 ``cross_vit.py`` (MIT).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from isovit.spec.config import Preprocess
from isovit.spec.families.crossvit import VARIANTS, CrossViTConfig
from isovit.weight_convert.detect import Ask, Clues, Fields, Infer, Shapes, count, square_side
from isovit.weight_convert.families.vit import (
    VIT_PYTORCH,
    square_patch,
    statistics,
    timm_preprocess,
)
from isovit.weight_convert.rename import RenameTable, Row, fuse, rename

Both = tuple[int, int]


def timm(config: CrossViTConfig) -> RenameTable:
    """Timm's CrossVit, which cannot have a dot in the name of a parameter."""
    return official(tokens="cls_token_{b}", positions="pos_embed_{b}")


def ibm(config: CrossViTConfig) -> RenameTable:
    """The official code."""
    return official(tokens="cls_token.{b}", positions="pos_embed.{b}")


def official(tokens: str, positions: str) -> RenameTable:
    """What both have in common: dense layers by their place in a sequence of norm, GELU, dense."""
    block, foreign_block = "stages.{s}.encoders.{b}.blocks.{i}", "blocks.{s}.blocks.{b}.{i}"
    fusion = "stages.{s}.fusions.{b}"
    return RenameTable(
        rename(tokens, "embeds.{b}.cls_token"),
        rename(positions, "embeds.{b}.pos_embed"),
        rename("patch_embed.{b}.proj", "embeds.{b}.patch_embed.proj"),
        rename("patch_embed.{b}.proj.0", "embeds.{b}.patch_embed.conv1"),
        rename("patch_embed.{b}.proj.2", "embeds.{b}.patch_embed.conv2"),
        rename("patch_embed.{b}.proj.4", "embeds.{b}.patch_embed.conv3"),
        *(rename(f"{foreign_block}.{part}", f"{block}.{part}") for part in BLOCK),
        rename("blocks.{s}.projs.{b}.0", f"{fusion}.norm_in"),
        rename("blocks.{s}.projs.{b}.2", f"{fusion}.proj_in"),
        rename("blocks.{s}.fusion.{b}.norm1", f"{fusion}.norm"),
        rename("blocks.{s}.fusion.{b}.attn.wq", f"{fusion}.attn.q"),
        fuse("blocks.{s}.fusion.{b}.attn.{wk|wv}", f"{fusion}.attn.kv"),
        rename("blocks.{s}.fusion.{b}.attn.proj", f"{fusion}.attn.proj"),
        rename("blocks.{s}.revert_projs.{b}.0", f"{fusion}.norm_out"),
        rename("blocks.{s}.revert_projs.{b}.2", f"{fusion}.proj_out"),
        rename("norm.{b}", "norm.{b}"),
        rename("head.{b}", "head.{b}"),
    )


BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
"""Modules of a block, whose names are timm's."""


def vit_pytorch(config: CrossViTConfig) -> RenameTable:
    """vit-pytorch's CrossViT: a stage is a list of two Transformers and their fusions."""
    return RenameTable(
        *(row for b in range(2) for row in branch_rows(b)),
        *(row for b in range(2) for row in cross_rows(b)),
    )


BRANCHES = ("sm", "lg")


def branch_rows(b: int) -> list[Row]:
    """Tokens, blocks and head of one branch of vit-pytorch's."""
    embedder, embed = f"{BRANCHES[b]}_image_embedder", f"embeds.{b}"
    encoder = f"stages.{{s}}.encoders.{b}"
    transformer = f"multi_scale_encoder.layers.{{s}}.{b}"
    layer, block = f"{transformer}.layers.{{i}}", f"{encoder}.blocks.{{i}}"
    return [
        rename(f"{embedder}.cls_token", f"{embed}.cls_token"),
        rename(f"{embedder}.pos_embedding", f"{embed}.pos_embed"),
        rename(f"{embedder}.to_patch_embedding.1", f"{embed}.patch_embed.norm1"),
        rename(f"{embedder}.to_patch_embedding.2", f"{embed}.patch_embed.proj"),
        rename(f"{embedder}.to_patch_embedding.3", f"{embed}.patch_embed.norm2"),
        rename(f"{layer}.0.norm", f"{block}.norm1"),
        fuse(f"{layer}.0.{{to_q|to_kv}}", f"{block}.attn.qkv", shares=(1, 2)),
        rename(f"{layer}.0.to_out.0", f"{block}.attn.proj"),
        rename(f"{layer}.1.net.0", f"{block}.norm2"),
        rename(f"{layer}.1.net.1", f"{block}.mlp.fc1"),
        rename(f"{layer}.1.net.4", f"{block}.mlp.fc2"),
        rename(f"{transformer}.norm", f"{encoder}.norm"),
        rename(f"{BRANCHES[b]}_mlp_head.0", f"norm.{b}"),
        rename(f"{BRANCHES[b]}_mlp_head.1", f"head.{b}"),
    ]


def cross_rows(b: int) -> list[Row]:
    """The fusions into one branch of vit-pytorch's."""
    foreign = f"multi_scale_encoder.layers.{{s}}.2.layers.{{i}}.{b}"
    canonical = f"stages.{{s}}.fusions.{b}.layers.{{i}}"
    return [
        rename(f"{foreign}.project_in", f"{canonical}.proj_in"),
        rename(f"{foreign}.fn.norm", f"{canonical}.norm"),
        rename(f"{foreign}.fn.to_q", f"{canonical}.attn.q"),
        rename(f"{foreign}.fn.to_kv", f"{canonical}.attn.kv"),
        rename(f"{foreign}.fn.to_out.0", f"{canonical}.attn.proj"),
        rename(f"{foreign}.project_out", f"{canonical}.proj_out"),
    ]


TABLES: dict[str, Callable[[CrossViTConfig], RenameTable]] = {
    "timm": timm,
    "ibm": ibm,
    "vit_pytorch": vit_pytorch,
}


def timm_misfits(config: CrossViTConfig) -> Iterator[str]:
    """What timm's model cannot be told to be."""
    if config.patch_embed == "norm_linear_norm":
        yield f"patch_embed={config.patch_embed}"
    if config.fusion != "projected":
        yield f"fusion={config.fusion}"
    if config.stage_norm:
        yield "stage_norm=true"
    if config.logits != "mean":
        yield f"logits={config.logits}"
    if config.cross_num_heads and config.num_heads != 2 * (config.cross_num_heads,):
        yield "cross_num_heads other than those of the branch attended to"
    blocks = [numbers[0] for stage in config.stages for numbers in stage.blocks if numbers]
    if any(numbers.inner_dim != numbers.dim for numbers in blocks) or any(
        fusion.inner_dim != fusion.other_dim for stage in config.stages for fusion in stage.fusions
    ):
        yield "heads that do not fill embed_dim"
    small, large = config.branch_depth
    if config.depth and not 0 < small <= large:
        yield "branch_depth of 0, or that is larger for the small patches"


def ibm_misfits(config: CrossViTConfig) -> Iterator[str]:
    """What the official code, timm's model without its later options, cannot be told to be."""
    yield from timm_misfits(config)
    if config.image_size[0] != config.image_size[1]:
        yield "an image that is not square"
    if any(branch.scaling == "crop" for branch in config.branches):
        yield "scaling=crop"
    if config.pool != "cls":
        yield f"pool={config.pool}"
    if not config.num_classes:
        yield "num_classes=0"


def vit_pytorch_misfits(config: CrossViTConfig) -> Iterator[str]:
    """What vit-pytorch's CrossViT cannot be told to be."""
    if config.image_size[0] != config.image_size[1]:
        yield "an image that is not square"
    if any(branch.scaling != "none" for branch in config.branches):
        yield "image_scale other than 1"
    if config.patch_embed != "norm_linear_norm":
        yield f"patch_embed={config.patch_embed}"
    if config.fusion != "residual":
        yield f"fusion={config.fusion}"
    if not config.stage_norm:
        yield "stage_norm=false"
    if config.qkv_bias:
        yield "qkv_bias=true"
    for stage in config.stages[:1]:
        if len({(fusion.num_heads, fusion.head_dim) for fusion in stage.fusions}) > 1:
            yield "fusions with other heads for each branch"
    if config.pool != "cls":
        yield f"pool={config.pool}"
    if config.logits != "sum":
        yield f"logits={config.logits}"
    if not config.num_classes:
        yield "num_classes=0"


MISFITS: dict[str, Callable[[CrossViTConfig], Iterator[str]]] = {
    "timm": timm_misfits,
    "ibm": ibm_misfits,
    "vit_pytorch": vit_pytorch_misfits,
}


def infer_timm(clues: Clues) -> Fields | None:
    """timm: positions of two branches, by an underscore."""
    usual = timm_preprocess(clues, Preprocess())
    return infer_official(clues, "pos_embed_", usual)


def infer_ibm(clues: Clues) -> Fields | None:
    """The official code: positions in a list."""
    return infer_official(clues, "pos_embed.", Preprocess())


def infer_official(clues: Clues, positions: str, preprocess: Preprocess) -> Fields | None:
    """The config of both official forms, from the name of their positions."""
    shapes = clues.shapes
    stem = "patch_embed.0.proj.0.weight" in shapes
    kernels = [shapes.get(f"patch_embed.{b}.proj{'.0' * stem}.weight", ()) for b in range(2)]
    tables = [shapes.get(f"{positions}{b}", ()) for b in range(2)]
    if any(len(kernel) != 4 for kernel in kernels) or any(len(table) != 3 for table in tables):
        return None
    embed_dim = (tables[0][2], tables[1][2])
    told = both(clues.given.get("patch_size", (12, 16))) if stem else None
    patch_size = told or (kernels[0][2], kernels[1][2])
    depth = count(shapes, "blocks.{}.projs.0.0.weight")
    blocks = "blocks.0.blocks.{}.{{}}.norm1.weight"
    branch_depth = count(shapes, blocks.format(0)), count(shapes, blocks.format(1))
    hidden = "blocks.0.blocks.{}.0.mlp.fc1.weight"
    in_channels = kernels[0][1]
    return {
        "patch_embed": "conv_stem" if stem else "conv",
        "patch_size": patch_size,
        "in_channels": in_channels,
        "embed_dim": embed_dim,
        "depth": depth,
        "branch_depth": branch_depth,
        "num_heads": official_heads(clues, embed_dim, depth, branch_depth),
        "mlp_dim": widths(shapes, hidden, (4 * embed_dim[0], 4 * embed_dim[1])),
        "qkv_bias": depth == 0 or "blocks.0.fusion.0.attn.wq.bias" in shapes,
        "num_classes": shapes.get("head.0.weight", (0,))[0],
        **geometry(clues, patch_size, (tables[0][1] - 1, tables[1][1] - 1)),
        **statistics(in_channels, preprocess),
    }


def official_heads(clues: Clues, embed_dim: Both, depth: int, branch_depth: Both) -> Both:
    """Heads, which no shape tells, of the published model of these widths and depths.

    Raises:
        Ask: if there is none.
    """
    if "num_heads" in clues.given:
        return both(clues.given["num_heads"])
    for config in VARIANTS.values():
        if (config.embed_dim, config.depth, config.branch_depth) == (
            embed_dim,
            depth,
            branch_depth,
        ):
            return config.num_heads
    why = f"no published model has embed_dim={embed_dim} and branch_depth={branch_depth}"
    raise Ask("num_heads", why, "[SMALL,LARGE]")


def geometry(clues: Clues, patch_size: Both, patches: Both) -> Fields:
    """Size and scales of the image; if the caller does not say, it is what small patches tile.

    Raises:
        Ask: if the patches fit neither a square nor the image that is given.
    """
    given = clues.given
    if "image_size" not in given:
        small, large = (
            (square_side(n, given, side) or 0) * side
            for n, side in zip(patches, patch_size, strict=True)
        )
        scales = tuple(given.get("image_scale", (1.0, large / small)))
        small = round(small / scales[0])
        return {"image_size": (small, small), "image_scale": scales}
    if "image_scale" in given:
        return {"image_scale": tuple(given["image_scale"])}
    size = both(given["image_size"])
    scales = [image_scale(size, *pair) for pair in zip(patch_size, patches, strict=True)]
    return {"image_scale": tuple(scales)}


def image_scale(size: Both, side: int, patches: int) -> float:
    """The factor that makes an image one of so many patches.

    Raises:
        Ask: if there is none.
    """
    height, width = size
    for rows in (n for n in range(1, patches + 1) if patches % n == 0):
        scale = rows * side / height
        if (int(height * scale), int(width * scale)) == (rows * side, patches // rows * side):
            return scale
    why = f"{patches} patches of {side} pixels tile no image of the shape {height} x {width}"
    raise Ask("image_scale", why, "[SMALL,LARGE]")


def infer_vit_pytorch(clues: Clues) -> Fields | None:
    """vit-pytorch: two image embedders."""
    shapes, given = clues.shapes, clues.given
    embed = "{}_image_embedder.to_patch_embedding.2.weight"
    kernels = [shapes.get(embed.format(name), ()) for name in BRANCHES]
    tables = [shapes.get(f"{name}_image_embedder.pos_embedding", ()) for name in BRANCHES]
    if any(len(kernel) != 2 for kernel in kernels) or any(len(table) != 3 for table in tables):
        return None
    embed_dim, patch_dims = (kernels[0][0], kernels[1][0]), (kernels[0][1], kernels[1][1])
    in_channels, patch_size = square_patches(clues, patch_dims)
    stage = "multi_scale_encoder.layers.0"
    depth = count(shapes, "multi_scale_encoder.layers.{}.0.norm.weight")
    block, cross = f"{stage}.{{}}.layers.{{{{}}}}.0.norm.weight", f"{stage}.2.layers.{{}}.0"
    heads = [attention_heads(clues, f"{stage}.{b}.layers.0.0", "", b) for b in range(2)]
    cross_heads = attention_heads(clues, f"{stage}.2.layers.0.0.fn", "cross_", None)
    side = (square_side(tables[0][1] - 1, given, patch_size[0]) or 0) * patch_size[0]
    return {
        **VIT_PYTORCH,
        "image_scale": (1.0, 1.0),
        "patch_embed": "norm_linear_norm",
        "patch_size": patch_size,
        "in_channels": in_channels,
        "embed_dim": embed_dim,
        "depth": depth,
        "branch_depth": (count(shapes, block.format(0)), count(shapes, block.format(1))),
        "num_heads": tuple(heads[b][0] for b in range(2)),
        "head_dim": tuple(heads[b][1] for b in range(2)),
        "mlp_dim": widths(shapes, f"{stage}.{{}}.layers.0.1.net.1.weight", embed_dim),
        "stage_norm": True,
        "fusion": "residual",
        "cross_depth": count(shapes, f"{cross}.fn.norm.weight") or 1,
        "cross_num_heads": cross_heads[0],
        "cross_head_dim": cross_heads[1],
        "logits": "sum",
        "embed_dropout_rate": 0.1,
        "dropout_rate": 0.1,
        "attn_dropout_rate": 0.1,
        "num_classes": shapes.get("sm_mlp_head.1.weight", (0,))[0],
        **({} if "image_size" in given else {"image_size": (side, side)}),
        **statistics(in_channels, Preprocess()),
    }


def square_patches(clues: Clues, patch_dims: Both) -> tuple[int, Both]:
    """Channels and sides of patches of so many numbers; see ``square_patch``."""
    given = {key: value for key, value in clues.given.items() if key == "in_channels"}
    if "patch_size" in clues.given:
        small, large = both(clues.given["patch_size"])
        return patch_dims[0] // small**2, (small, large)
    in_channels, (small, _) = square_patch(patch_dims[0], given)
    _, (large, _) = square_patch(patch_dims[1], {"in_channels": in_channels})
    return in_channels, (small, large)


def attention_heads(clues: Clues, path: str, prefix: str, b: int | None) -> Both:
    """Heads and their width of an attention of vit-pytorch's, 64 unless the caller knows better.

    Args:
        clues: of the file.
        path: of the attention.
        prefix: of the fields, ``cross_`` for a fusion.
        b: the branch, where the fields have a number for each.

    Raises:
        Ask: if the width of q is no multiple of that of a head.
    """

    def told(field: str) -> int | None:
        value = clues.given.get(prefix + field)
        return value if value is None or b is None else both(value)[b]

    inner = clues.shapes.get(f"{path}.to_q.weight", (64,))[0]
    if (num_heads := told("num_heads")) is not None:
        return num_heads, told("head_dim") or max(inner // num_heads, 1)
    head_dim = told("head_dim") or 64
    if inner % head_dim:
        why = f"the heads together are {inner} wide, no multiple of vit-pytorch's usual {head_dim}"
        raise Ask(f"{prefix}num_heads", why, "NUMBER" if b is None else "[SMALL,LARGE]")
    return inner // head_dim, head_dim


def widths(shapes: Shapes, pattern: str, default: Both) -> Both:
    """The outputs of a dense layer in both branches; the default where a branch has no blocks."""
    small, large = (shapes.get(pattern.format(b), (default[b],))[0] for b in range(2))
    return small, large


def both(value: Any) -> Both:
    """What the caller gives for both branches, maybe as one number."""
    small, large = (value, value) if isinstance(value, int) else value
    return small, large


INFER: dict[str, Infer] = {
    "timm": infer_timm,
    "ibm": infer_ibm,
    "vit_pytorch": infer_vit_pytorch,
}
