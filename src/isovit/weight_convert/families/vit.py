"""Rename tables of ViT, and its configs read from names and shapes.

Sources: timm 1.0 ``vision_transformer.py`` (Apache-2.0); vit-pytorch 1.26.11 ``vit.py`` (MIT).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from isovit.spec.config import Preprocess
from isovit.spec.families.vit import AUGREG, VARIANTS, ViTConfig
from isovit.weight_convert.detect import Ask, Fields, Infer, Shapes, count, heads, square_side
from isovit.weight_convert.rename import RenameTable, Row, drop, rename, squeeze


def timm(config: ViTConfig) -> RenameTable:
    """Timm's VisionTransformer, and DeiT's, whose names it follows."""
    return RenameTable(
        rename("cls_token", "cls_token"),
        rename("pos_embed", "pos_embed"),
        rename("patch_embed.proj", "patch_embed.proj"),
        *block_rows(),
        rename("fc_norm" if config.final_norm == "pooled" else "norm", "norm"),
        rename("head", "head"),
    )


def vit_pytorch(config: ViTConfig) -> RenameTable:
    """vit-pytorch's ViT; tokens and positions lost their leading axis in release 1.16.1."""
    pooled = config.final_norm == "pooled"  # releases before 1.7.0: LayerNorm as part of the head
    return RenameTable(
        squeeze("cls_token", "cls_token")
        if config.class_token
        else drop("cls_token", "empty: no class token", write=(0, config.embed_dim)),
        squeeze("pos_embedding", "pos_embed"),
        rename("to_patch_embedding.1", "patch_embed.norm1"),
        rename("to_patch_embedding.2", "patch_embed.proj"),
        rename("to_patch_embedding.3", "patch_embed.norm2"),
        *transformer_rows("transformer.layers.{i}", "blocks.{i}"),
        rename("mlp_head.0" if pooled else "transformer.norm", "norm"),
        rename("mlp_head.1" if pooled else "mlp_head", "head"),
    )


def block_rows() -> list[Row]:
    """Timm's blocks, whose names the official T2T-ViT shares."""
    return [
        rename("blocks.{i}.norm1", "blocks.{i}.norm1"),
        rename("blocks.{i}.attn.qkv", "blocks.{i}.attn.qkv"),
        rename("blocks.{i}.attn.proj", "blocks.{i}.attn.proj"),
        rename("blocks.{i}.ls1.gamma", "blocks.{i}.layer_scale1.gamma"),
        rename("blocks.{i}.norm2", "blocks.{i}.norm2"),
        rename("blocks.{i}.mlp.fc1", "blocks.{i}.mlp.fc1"),
        rename("blocks.{i}.mlp.fc2", "blocks.{i}.mlp.fc2"),
        rename("blocks.{i}.ls2.gamma", "blocks.{i}.layer_scale2.gamma"),
    ]


def transformer_rows(foreign: str, canonical: str) -> list[Row]:
    """One layer of vit-pytorch's Transformer."""
    return [
        rename(f"{foreign}.0.norm", f"{canonical}.norm1"),
        rename(f"{foreign}.0.to_qkv", f"{canonical}.attn.qkv"),
        rename(f"{foreign}.0.to_out.0", f"{canonical}.attn.proj"),
        rename(f"{foreign}.1.net.0", f"{canonical}.norm2"),
        rename(f"{foreign}.1.net.1", f"{canonical}.mlp.fc1"),
        rename(f"{foreign}.1.net.4", f"{canonical}.mlp.fc2"),
    ]


TABLES: dict[str, Callable[[ViTConfig], RenameTable]] = {"timm": timm, "vit_pytorch": vit_pytorch}


def infer_timm(shapes: Shapes, given: Mapping[str, Any]) -> Fields | None:
    """timm: a 4-D patch embedding beside fused qkv."""
    kernel = shapes.get("patch_embed.proj.weight", ())
    if len(kernel) != 4 or "pos_embed" not in shapes:
        return None
    dim, in_channels, *patch_size = kernel
    class_token, positions = "cls_token" in shapes, shapes["pos_embed"][1]
    # timm's no_embed_class has positions for the patches alone, whose number is a square.
    of_patches = class_token and math.isqrt(positions) ** 2 == positions
    depth = count(shapes, "blocks.{}.norm1.weight")
    pooled = "fc_norm.weight" in shapes
    fields: Fields = {
        "patch_size": tuple(patch_size),
        "in_channels": in_channels,
        "embed_dim": dim,
        "depth": depth,
        "num_heads": heads(dim, depth, PUBLISHED_HEADS, given),
        "mlp_dim": shapes.get("blocks.0.mlp.fc1.weight", (4 * dim,))[0],
        "qkv_bias": depth == 0 or "blocks.0.attn.qkv.bias" in shapes,
        "layer_scale_init": 1e-5 if "blocks.0.ls1.gamma" in shapes else None,
        "class_token": class_token,
        "pos_embed_tokens": "patches" if of_patches else "all",
        "final_norm": "pooled" if pooled else "tokens" if "norm.weight" in shapes else "none",
        "pool": "mean_patches" if pooled or not class_token else "cls",
        "num_classes": shapes.get("head.weight", (0,))[0],
    }
    side = square_side(positions - int(class_token and not of_patches), given, patch_size[0])
    if side is not None:
        fields["image_size"] = (side * patch_size[0], side * patch_size[1])
    return {**fields, **statistics(in_channels, AUGREG)}


def infer_vit_pytorch(shapes: Shapes, given: Mapping[str, Any]) -> Fields | None:
    """vit-pytorch: a dense patch embedding between two LayerNorms."""
    if len(shapes.get("to_patch_embedding.2.weight", ())) != 2 or "pos_embedding" not in shapes:
        return None
    dim, patch_dim = shapes["to_patch_embedding.2.weight"]
    depth = count(shapes, "transformer.layers.{}.0.norm.weight")
    class_token = shapes.get("cls_token", (0, dim))[-2] > 0
    pooled = "mlp_head.1.weight" in shapes
    head = shapes.get("mlp_head.1.weight" if pooled else "mlp_head.weight", (0,))
    in_channels, patch_size = square_patch(patch_dim, given)
    fields: Fields = {
        **VIT_PYTORCH,
        **vit_pytorch_heads(shapes, dim, given),
        "patch_embed": "norm_linear_norm",
        "patch_size": patch_size,
        "in_channels": in_channels,
        "embed_dim": dim,
        "depth": depth,
        "mlp_dim": shapes.get("transformer.layers.0.1.net.1.weight", (4 * dim,))[0],
        "class_token": class_token,
        "final_norm": "pooled" if pooled else "tokens",
        "pool": "none" if head[0] == 0 else "cls" if class_token else "mean",
        "num_classes": head[0],
    }
    side = square_side(shapes["pos_embedding"][-2] - int(class_token), given, patch_size[0])
    if side is not None:
        fields["image_size"] = (side * patch_size[0], side * patch_size[1])
    return {**fields, **statistics(in_channels, Preprocess())}


def square_patch(patch_dim: int, given: Mapping[str, Any]) -> tuple[int, tuple[int, int]]:
    """Channels and size of a square patch of ``patch_dim`` numbers; colour before other counts.

    Raises:
        Ask: if no square patch of 3, 1, 4 or 2 channels has so many numbers.
    """
    if "patch_size" in given:
        size = given["patch_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return patch_dim // (height * width), (height, width)
    for channels in [given["in_channels"]] if "in_channels" in given else (3, 1, 4, 2):
        side = math.isqrt(patch_dim // channels)
        if side * side * channels == patch_dim:
            return channels, (side, side)
    raise Ask("patch_size", f"a patch has {patch_dim} numbers", "[HEIGHT,WIDTH]")


def vit_pytorch_heads(shapes: Shapes, dim: int, given: Mapping[str, Any]) -> Fields:
    """Heads of a vit-pytorch Transformer, whose head_dim is 64 unless the caller knows better.

    Raises:
        Ask: if the width of q is no multiple of 64.
    """
    qkv = shapes.get("transformer.layers.0.0.to_qkv.weight")
    if qkv is None:
        return {"num_heads": 1, "head_dim": dim}
    inner, attn_proj = qkv[0] // 3, "transformer.layers.0.0.to_out.0.weight" in shapes
    if not attn_proj:
        return {"num_heads": 1, "head_dim": inner, "attn_proj": False}
    if "num_heads" in given:
        return {"num_heads": given["num_heads"], "head_dim": inner // given["num_heads"]}
    head_dim = given.get("head_dim", 64)
    if inner % head_dim:
        candidates = [n for n in range(1, inner + 1) if inner % n == 0]
        why = f"the heads together are {inner} wide, no multiple of vit-pytorch's usual {head_dim}"
        raise Ask("num_heads", why, "|".join(map(str, candidates)))
    return {"num_heads": inner // head_dim, "head_dim": head_dim}


def statistics(in_channels: int, preprocess: Preprocess) -> Fields:
    """Preprocessing of a format; inputs that are not colour get the plain 0.5."""
    if in_channels != 3:
        half = (0.5,) * in_channels
        preprocess = msgspec.structs.replace(preprocess, mean=half, std=half)
    return {"preprocess": preprocess}


PUBLISHED_HEADS = {
    (config.embed_dim, config.depth): config.num_heads for config in VARIANTS.values()
}

# What vit-pytorch's Transformer has of its own.
VIT_PYTORCH: Fields = {
    "qkv_bias": False,
    "norm_eps": 1e-5,
    "init_scheme": "vit_pytorch",
}

INFER: dict[str, Infer] = {"timm": infer_timm, "vit_pytorch": infer_vit_pytorch}
