"""Rename tables of CaiT, and its configs read from names and shapes.

Sources: facebookresearch/deit ``cait_models.py`` and timm 1.0 ``cait.py`` (Apache-2.0), which share
their names; vit-pytorch 1.26.11 ``cait.py`` (MIT).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from isovit.spec.config import Preprocess
from isovit.spec.families.cait import VARIANTS, WHOLE, CaiTConfig
from isovit.weight_convert.detect import Clues, Fields, Infer, Shapes, count, heads, square_side
from isovit.weight_convert.families.vit import (
    VIT_PYTORCH,
    square_patch,
    statistics,
    timm_preprocess,
)
from isovit.weight_convert.rename import RenameTable, Row, fuse, parameter, rename


def timm(config: CaiTConfig) -> RenameTable:
    """Timm's Cait, and the official code before it."""
    block, cls_block = "blocks.{i}", "blocks_token_only.{i}"
    return RenameTable(
        rename("cls_token", "cls_token"),
        rename("pos_embed", "pos_embed"),
        rename("patch_embed.proj", "patch_embed.proj"),
        rename(f"{block}.attn.qkv", "blocks.{i}.attn.qkv"),
        rename(f"{block}.attn.proj_l", "blocks.{i}.attn.talking_heads.proj_l"),
        rename(f"{block}.attn.proj_w", "blocks.{i}.attn.talking_heads.proj_w"),
        *_timm_block_rows(block, "blocks.{i}"),
        rename(f"{cls_block}.attn.q", "cls_blocks.{i}.attn.q"),
        fuse(f"{cls_block}.attn.{{k|v}}", "cls_blocks.{i}.attn.kv"),
        *_timm_block_rows(cls_block, "cls_blocks.{i}"),
        rename("norm", "norm"),
        rename("head", "head"),
    )


def _timm_block_rows(foreign: str, canonical: str) -> list[Row]:
    """What both kinds of blocks have."""
    return [
        rename(f"{foreign}.norm1", f"{canonical}.norm1"),
        rename(f"{foreign}.attn.proj", f"{canonical}.attn.proj"),
        rename(f"{foreign}.gamma_1", f"{canonical}.layer_scale1.gamma"),
        rename(f"{foreign}.norm2", f"{canonical}.norm2"),
        rename(f"{foreign}.mlp.fc1", f"{canonical}.mlp.fc1"),
        rename(f"{foreign}.mlp.fc2", f"{canonical}.mlp.fc2"),
        rename(f"{foreign}.gamma_2", f"{canonical}.layer_scale2.gamma"),
    ]


def vit_pytorch(config: CaiTConfig) -> RenameTable:
    """vit-pytorch's CaiT, which keeps q apart from k and v in both of its transformers."""
    layer, cls_layer = "patch_transformer.layers.{i}", "cls_transformer.layers.{i}"
    return RenameTable(
        rename("cls_token", "cls_token"),
        rename("pos_embedding", "pos_embed"),
        rename("to_patch_embedding.1", "patch_embed.norm1"),
        rename("to_patch_embedding.2", "patch_embed.proj"),
        rename("to_patch_embedding.3", "patch_embed.norm2"),
        fuse(f"{layer}.0.fn.{{to_q|to_kv}}", "blocks.{i}.attn.qkv", shares=(1, 2)),
        *_vit_pytorch_block_rows(layer, "blocks.{i}"),
        rename(f"{cls_layer}.0.fn.to_q", "cls_blocks.{i}.attn.q"),
        rename(f"{cls_layer}.0.fn.to_kv", "cls_blocks.{i}.attn.kv"),
        *_vit_pytorch_block_rows(cls_layer, "cls_blocks.{i}"),
        rename("mlp_head.0", "norm"),
        rename("mlp_head.1", "head"),
    )


def _vit_pytorch_block_rows(foreign: str, canonical: str) -> list[Row]:
    """What both kinds of blocks have; heads are mixed by bare matrices of axes (in, out)."""
    attn, talking = f"{foreign}.0.fn", f"{canonical}.attn.talking_heads"
    return [
        rename(f"{attn}.norm", f"{canonical}.norm1"),
        parameter(f"{attn}.mix_heads_pre_attn", f"{talking}.proj_l.kernel", axes="i o"),
        parameter(f"{attn}.mix_heads_post_attn", f"{talking}.proj_w.kernel", axes="i o"),
        rename(f"{attn}.to_out.0", f"{canonical}.attn.proj"),
        parameter(f"{foreign}.0.scale", f"{canonical}.layer_scale1.gamma", axes="1 1 c"),
        rename(f"{foreign}.1.fn.net.0", f"{canonical}.norm2"),
        rename(f"{foreign}.1.fn.net.1", f"{canonical}.mlp.fc1"),
        rename(f"{foreign}.1.fn.net.4", f"{canonical}.mlp.fc2"),
        parameter(f"{foreign}.1.scale", f"{canonical}.layer_scale2.gamma", axes="1 1 c"),
    ]


TABLES: dict[str, Callable[[CaiTConfig], RenameTable]] = {
    "timm": timm,
    "deit": timm,
    "vit_pytorch": vit_pytorch,
}


def timm_misfits(config: CaiTConfig) -> Iterator[str]:
    """What timm's model cannot be told to be."""
    if config.inner_dim != config.embed_dim:
        yield "heads that do not fill embed_dim"
    if not config.talking_heads_bias:
        yield "talking_heads_bias=false"
    if config.cls_talking_heads:
        yield "cls_talking_heads=true"
    if config.cls_norm != "tokens":
        yield f"cls_norm={config.cls_norm}"
    if config.pool == "mean":
        yield "pool=mean over class token and patches"


def deit_misfits(config: CaiTConfig) -> Iterator[str]:
    """What the official model cannot be told to be."""
    yield from timm_misfits(config)
    if config.pool not in ("cls", "mean"):
        yield f"pool={config.pool}"


def vit_pytorch_misfits(config: CaiTConfig) -> Iterator[str]:
    """What vit-pytorch's CaiT cannot be told to be."""
    if config.patch_embed != "norm_linear_norm":
        yield f"patch_embed={config.patch_embed}"
    for name in ("image_size", "patch_size"):
        height, width = getattr(config, name)
        if height != width:
            yield f"{name}={height, width}, which is not square"
    if config.in_channels != 3:
        yield f"in_channels={config.in_channels}"
    if config.qkv_bias:
        yield "qkv_bias=true"
    if config.talking_heads_bias:
        yield "talking_heads_bias=true"
    if not config.cls_talking_heads:
        yield "cls_talking_heads=false"
    if config.cls_norm != "cls":
        yield f"cls_norm={config.cls_norm}"
    if config.cls_mlp_width != config.mlp_dim:
        yield "cls_mlp_dim other than mlp_dim"
    if config.pool != "cls":
        yield f"pool={config.pool}"
    if not config.num_classes:
        yield "num_classes=0"


MISFITS: dict[str, Callable[[CaiTConfig], Iterator[str]]] = {
    "timm": timm_misfits,
    "deit": deit_misfits,
    "vit_pytorch": vit_pytorch_misfits,
}


def infer_timm(clues: Clues) -> Fields | None:
    """Timm: heads that talk in the blocks, or blocks for the class token alone."""
    shapes = clues.shapes
    kernel = shapes.get("patch_embed.proj.weight", ())
    mix, first = shapes.get("blocks.0.attn.proj_l.weight"), "blocks_token_only.0"
    has_blocks = mix is not None or f"{first}.norm1.weight" in shapes
    if len(kernel) != 4 or "pos_embed" not in shapes or not has_blocks:
        return None
    dim, in_channels, *patch_size = kernel
    depth = count(shapes, "blocks.{}.norm1.weight")
    cls_depth = count(shapes, "blocks_token_only.{}.norm1.weight")
    cls_mlp_dim = shapes.get(f"{first}.mlp.fc1.weight", (None,))[0]
    mlp_dim = shapes.get("blocks.0.mlp.fc1.weight", (cls_mlp_dim,))[0]
    fields: Fields = {
        "patch_size": tuple(patch_size),
        "in_channels": in_channels,
        "embed_dim": dim,
        "depth": depth,
        "cls_depth": cls_depth,
        "num_heads": mix[0] if mix else heads(clues, dim, depth),
        "qkv_bias": "blocks.0.attn.qkv.bias" in shapes or f"{first}.attn.q.bias" in shapes,
        "mlp_dim": mlp_dim,
        "cls_mlp_dim": None if cls_mlp_dim == mlp_dim else cls_mlp_dim,
        "layer_scale_init": layer_scale_init(dim, depth),
        "pool": "cls" if cls_depth else "mean_patches",
        "num_classes": shapes.get("head.weight", (0,))[0],
        **statistics(in_channels, timm_preprocess(clues, WHOLE)),
        **square_image(clues, shapes["pos_embed"][1], patch_size[0], patch_size[1]),
    }
    return fields


def infer_deit(clues: Clues) -> Fields | None:
    """The official code: timm's names under ``model``, released with ``module.`` before each."""
    looks_so = clues.wrapper in ("model", "model_ema") or clues.format == "deit"
    return infer_timm(clues) if looks_so else None


def infer_vit_pytorch(clues: Clues) -> Fields | None:
    """vit-pytorch: a transformer for the patches, and one for the class token."""
    shapes = clues.shapes
    layers = ("patch_transformer.layers.0", "cls_transformer.layers.0")
    first = next((layer for layer in layers if f"{layer}.0.scale" in shapes), None)
    if first is None or len(shapes.get("to_patch_embedding.2.weight", ())) != 2:
        return None
    dim, patch_dim = shapes["to_patch_embedding.2.weight"]
    in_channels, patch_size = square_patch(patch_dim, clues.given)
    num_heads = shapes[f"{first}.0.fn.mix_heads_pre_attn"][0]
    return {
        **VIT_PYTORCH,
        "patch_embed": "norm_linear_norm",
        "patch_size": patch_size,
        "in_channels": in_channels,
        "embed_dim": dim,
        "depth": _layers(shapes, "patch"),
        "cls_depth": _layers(shapes, "cls"),
        "num_heads": num_heads,
        "head_dim": shapes[f"{first}.0.fn.to_q.weight"][0] // num_heads,
        "talking_heads_bias": False,
        "cls_talking_heads": True,
        "cls_norm": "cls",
        "mlp_dim": shapes[f"{first}.1.fn.net.1.weight"][0],
        "layer_scale_init": None,
        "mixed_dropout": False,
        "num_classes": shapes["mlp_head.1.weight"][0],
        **statistics(in_channels, Preprocess()),
        **square_image(clues, shapes["pos_embedding"][1], *patch_size),
    }


def _layers(shapes: Shapes, kind: str) -> int:
    return count(shapes, f"{kind}_transformer.layers.{{}}.0.scale")


def square_image(clues: Clues, patches: int, height: int, width: int) -> Fields:
    """The size of an image with so many patches of this height and width, as many down as across.

    Raises:
        Ask: if that number is no square.
    """
    side = square_side(patches, clues.given, height)
    return {} if side is None else {"image_size": (side * height, side * width)}


def layer_scale_init(dim: int, depth: int) -> float | None:
    """Where LayerScale started in the published model of this width and depth; None if none."""
    for config in VARIANTS.values():
        if (config.embed_dim, config.depth) == (dim, depth):
            return config.layer_scale_init
    return None


INFER: dict[str, Infer] = {
    "vit_pytorch": infer_vit_pytorch,
    "deit": infer_deit,
    "timm": infer_timm,
}
