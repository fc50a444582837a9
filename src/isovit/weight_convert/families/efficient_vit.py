"""Rename tables of efficient ViT, and its configs read from names and shapes.

Source: vit-pytorch 1.26.11 ``efficient.py`` (MIT) with a transformer plugged in: vit-pytorch's own,
or the Nystromformer of nystrom-attention 0.0.14 (MIT).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from isovit.spec.config import Preprocess
from isovit.spec.families.efficient_vit import VARIANTS, EfficientViTConfig
from isovit.weight_convert.detect import Ask, Clues, Fields, Infer, count, square_side
from isovit.weight_convert.families.vit import (
    VIT_PYTORCH,
    square_patch,
    standard_misfits,
    statistics,
    transformer_rows,
    vit_pytorch_heads,
)
from isovit.weight_convert.rename import RenameTable, Row, rename


def vit_pytorch(config: EfficientViTConfig) -> RenameTable:
    """vit-pytorch's efficient ViT, whose head has the last norm."""
    layer, block = "transformer.layers.{i}", "transformer.blocks.{i}"
    rows = nystromformer_rows if config.mixer == "nystrom" else transformer_rows
    return RenameTable(
        rename("cls_token", "cls_token"),
        rename("pos_embedding", "pos_embed"),
        rename("to_patch_embedding.1", "patch_embed.norm1"),
        rename("to_patch_embedding.2", "patch_embed.proj"),
        rename("to_patch_embedding.3", "patch_embed.norm2"),
        *rows(layer, block),
        rename("transformer.norm", "transformer.norm"),
        rename("mlp_head.0", "norm"),
        rename("mlp_head.1", "head"),
    )


def nystromformer_rows(foreign: str, canonical: str) -> list[Row]:
    """One layer of a Nystromformer."""
    return [
        rename(f"{foreign}.0.norm", f"{canonical}.norm1"),
        rename(f"{foreign}.0.fn.to_qkv", f"{canonical}.attn.qkv"),
        rename(f"{foreign}.0.fn.res_conv", f"{canonical}.attn.residual_conv"),
        rename(f"{foreign}.0.fn.to_out.0", f"{canonical}.attn.proj"),
        rename(f"{foreign}.1.norm", f"{canonical}.norm2"),
        rename(f"{foreign}.1.fn.net.0", f"{canonical}.mlp.fc1"),
        rename(f"{foreign}.1.fn.net.3", f"{canonical}.mlp.fc2"),
    ]


TABLES: dict[str, Callable[[EfficientViTConfig], RenameTable]] = {"vit_pytorch": vit_pytorch}


def vit_pytorch_misfits(config: EfficientViTConfig) -> Iterator[str]:
    """What vit-pytorch's efficient ViT, with either transformer, cannot be told to be."""
    yield from standard_misfits(config)
    if config.patch_size[0] != config.patch_size[1]:
        yield "patches that are not square"
    if config.qkv_bias:
        yield "qkv_bias=true"
    if config.layer_scale_init is not None:
        yield "layer_scale_init"
    if not config.class_token:
        yield "class_token=false"
    if config.final_norm == "tokens":
        yield "final_norm=tokens"
    if config.pool not in ("cls", "mean"):
        yield f"pool={config.pool}"
    if not config.num_classes:
        yield "num_classes=0"
    if config.mixer == "full":
        yield from transformer_misfits(config)
    elif config.mixer == "nystrom":
        yield from nystromformer_misfits(config)
    else:
        yield f"mixer={config.mixer}"


def transformer_misfits(config: EfficientViTConfig) -> Iterator[str]:
    """What vit-pytorch's Transformer cannot be told to be."""
    if not config.transformer_norm:
        yield "transformer_norm=false"
    projects = not (config.num_heads == 1 and config.block.head_dim == config.embed_dim)
    if config.attn_proj != projects:
        yield f"attn_proj={str(config.attn_proj).lower()}"


def nystromformer_misfits(config: EfficientViTConfig) -> Iterator[str]:
    """What a Nystromformer cannot be told to be."""
    if config.transformer_norm:
        yield "transformer_norm=true"
    if not config.attn_proj:
        yield "attn_proj=false"
    if config.mlp_dim != 4 * config.embed_dim:
        yield "mlp_dim other than 4 · embed_dim"
    if config.pinv_norm != "batch":
        yield f"pinv_norm={config.pinv_norm}"


MISFITS: dict[str, Callable[[EfficientViTConfig], Iterator[str]]] = {
    "vit_pytorch": vit_pytorch_misfits
}


def infer_vit_pytorch(clues: Clues) -> Fields | None:
    """vit-pytorch: its stem, a head with a norm, and a transformer that is told by its names.

    A Nystromformer without its convolution has the names of an early ViT's transformer.
    """
    shapes, given = clues.shapes, clues.given
    stem = [len(shapes.get(f"to_patch_embedding.{i}.weight", ())) for i in (1, 2, 3)]
    if stem != [1, 2, 1] or not {"mlp_head.0.weight", "mlp_head.1.weight"} <= shapes.keys():
        return None
    dim, patch_dim = shapes["to_patch_embedding.2.weight"]
    if "transformer.layers.0.0.fn.res_conv.weight" in shapes:
        own = nystromformer(clues, dim)
    elif "transformer.norm.weight" in shapes:
        own = transformer(clues, dim)
    else:
        return None
    in_channels, patch_size = square_patch(patch_dim, given)
    fields: Fields = {
        **VIT_PYTORCH,
        **own,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "embed_dim": dim,
        "final_norm": "pooled",
        "num_classes": shapes["mlp_head.1.weight"][0],
        **statistics(in_channels, Preprocess()),
    }
    side = square_side(shapes["pos_embedding"][1] - 1, given, patch_size[0])
    if side is not None:
        fields["image_size"] = (side * patch_size[0], side * patch_size[1])
    return fields


def transformer(clues: Clues, dim: int) -> Fields:
    """Fields of vit-pytorch's Transformer."""
    hidden = clues.shapes.get("transformer.layers.0.1.net.1.weight", (4 * dim,))
    return {
        **vit_pytorch_heads(clues.shapes, dim, clues.given),
        "mixer": "full",
        "transformer_norm": True,
        "depth": count(clues.shapes, "transformer.layers.{}.0.norm.weight"),
        "mlp_dim": hidden[0],
    }


def nystromformer(clues: Clues, dim: int) -> Fields:
    """Fields of a Nystromformer; its convolution has a kernel for each head."""
    shapes, attn = clues.shapes, "transformer.layers.0.0.fn"
    depth = count(shapes, "transformer.layers.{}.0.norm.weight")
    num_heads, _, kernel, _ = shapes[f"{attn}.res_conv.weight"]
    return {
        "mixer": "nystrom",
        "depth": depth,
        "num_heads": num_heads,
        "head_dim": shapes[f"{attn}.to_qkv.weight"][0] // (3 * num_heads),
        "mlp_dim": shapes["transformer.layers.0.1.fn.net.0.weight"][0],
        "num_landmarks": num_landmarks(clues, dim, depth),
        "pinv_norm": "batch",
        "residual_kernel": kernel,
    }


def num_landmarks(clues: Clues, dim: int, depth: int) -> int:
    """How many landmarks there are, which no shape tells, of the known model of these sizes.

    Raises:
        Ask: if none has this width and depth.
    """
    if "num_landmarks" in clues.given:
        return int(clues.given["num_landmarks"])
    for config in VARIANTS.values():
        if config.pinv_norm == "batch" and (config.embed_dim, config.depth) == (dim, depth):
            return config.num_landmarks
    why = f"no known model has embed_dim={dim} and depth={depth}"
    raise Ask("num_landmarks", why, "64|128|256")


INFER: dict[str, Infer] = {"vit_pytorch": infer_vit_pytorch}
