"""Rename tables of T2T-ViT, and its configs read from names and shapes.

Sources: yitu-opensource/T2T-ViT (Clear BSD); vit-pytorch 1.26.11 ``t2t.py`` (MIT).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

from isovit.spec.config import Preprocess
from isovit.spec.families.t2t_vit import YITU, SoftSplit, T2TViTConfig
from isovit.weight_convert.detect import (
    Ask,
    Clues,
    Fields,
    Infer,
    Shapes,
    count,
    heads,
    square_side,
)
from isovit.weight_convert.families.vit import (
    VIT_PYTORCH,
    block_rows,
    statistics,
    transformer_misfits,
    transformer_rows,
    vit_pytorch_heads,
)
from isovit.weight_convert.rename import RenameTable, Row, rename


def yitu(config: T2TViTConfig) -> RenameTable:
    """The official code."""
    return RenameTable(
        *yitu_stem_rows(config), *block_rows(), rename("norm", "norm"), rename("head", "head")
    )


def yitu_stem_rows(config: T2TViTConfig) -> list[Row]:
    """All before the blocks: performers number the layers of their MLP, transformers name them."""
    performer = config.token_mixer == "performer"
    fc1, fc2 = ("0", "2") if performer else ("fc1", "fc2")
    foreign, mixer = "tokens_to_token.attention{j+1}", "tokens_to_token.mixers.{j}"
    return [
        rename("cls_token", "cls_token"),
        rename("pos_embed", "pos_embed"),
        rename(f"{foreign}.norm1", f"{mixer}.norm1"),
        rename(f"{foreign}.w", f"{mixer}.random_features"),
        rename(f"{foreign}.kqv", f"{mixer}.kqv"),
        rename(f"{foreign}.proj", f"{mixer}.proj"),
        rename(f"{foreign}.attn.qkv", f"{mixer}.attn.qkv"),
        rename(f"{foreign}.attn.proj", f"{mixer}.attn.proj"),
        rename(f"{foreign}.norm2", f"{mixer}.norm2"),
        rename(f"{foreign}.mlp.{fc1}", f"{mixer}.mlp.fc1"),
        rename(f"{foreign}.mlp.{fc2}", f"{mixer}.mlp.fc2"),
        rename("tokens_to_token.project", "tokens_to_token.project"),
    ]


def vit_pytorch(config: T2TViTConfig) -> RenameTable:
    """vit-pytorch's T2TViT, whose stem is a sequence of four entries per soft split."""
    mixer = "to_patch_embedding.{4j+3}"
    return RenameTable(
        rename("cls_token", "cls_token"),
        rename("pos_embedding", "pos_embed"),
        *transformer_rows(f"{mixer}.layers.0", "tokens_to_token.mixers.{j}.block"),
        rename(f"{mixer}.norm", "tokens_to_token.mixers.{j}.norm"),
        rename(f"to_patch_embedding.{4 * len(config.t2t_layers)}", "tokens_to_token.project"),
        *transformer_rows("transformer.layers.{i}", "blocks.{i}"),
        rename("transformer.norm", "norm"),
        rename("mlp_head", "head"),
    )


TABLES: dict[str, Callable[[T2TViTConfig], RenameTable]] = {
    "yitu": yitu,
    "vit_pytorch": vit_pytorch,
}


def yitu_misfits(config: T2TViTConfig) -> Iterator[str]:
    """What the official code cannot be told to be."""
    if config.t2t_layers != OFFICIAL_SPLITS:
        yield f"t2t_layers other than {[list(split) for split in OFFICIAL_SPLITS]}"
    if config.token_mixer == "full":
        yield "token_mixer=full"
    if config.image_size[0] != config.image_size[1] or config.image_size[0] % 16:
        yield "an image that is not square, or no multiple of 16"
    if config.token_mlp_dim != config.token_dim:
        yield "token_mlp_dim other than token_dim"
    if config.token_mixer == "performer":
        if config.performer_features != config.token_dim // 2:
            yield "performer_features other than half of token_dim"
        if config.performer_eps != PERFORMER_EPS:
            yield f"performer_eps other than {PERFORMER_EPS}"
    if config.token_mixer == "transformer" and config.token_scale != "input_dim":
        yield "token_scale other than input_dim"
    if config.block.inner_dim != config.embed_dim or not config.attn_proj:
        yield "heads that do not fill embed_dim, or no projection behind them"
    if config.layer_scale_init is not None:
        yield "layer_scale"
    if (config.pool, config.final_norm) != ("cls", "tokens"):
        yield "pool or final_norm other than cls and tokens"


def vit_pytorch_misfits(config: T2TViTConfig) -> Iterator[str]:
    """What vit-pytorch's T2TViT cannot be told to be."""
    yield from transformer_misfits(config)
    if not config.class_token:
        yield "class_token=false"
    if config.pool not in ("cls", "mean"):
        yield f"pool={config.pool}"
    if config.final_norm != "tokens":
        yield f"final_norm={config.final_norm}"
    if not config.num_classes:
        yield "num_classes=0"
    if config.token_mixer != "full":
        yield f"token_mixer={config.token_mixer}"
    if config.image_size[0] != config.image_size[1]:
        yield "an image that is not square"
    if any(split.padding != split.stride // 2 for split in config.t2t_layers):
        yield "a padding other than half of the stride"


MISFITS: dict[str, Callable[[T2TViTConfig], Iterator[str]]] = {
    "yitu": yitu_misfits,
    "vit_pytorch": vit_pytorch_misfits,
}

OFFICIAL_SPLITS = (SoftSplit(7, 4, 2), SoftSplit(3, 2, 1), SoftSplit(3, 2, 1))
PERFORMER_EPS = 1e-8


def infer_yitu(clues: Clues) -> Fields | None:
    """The official code: its tokens_to_token has attentions counted from 1."""
    shapes = clues.shapes
    if "tokens_to_token.project.weight" not in shapes or "pos_embed" not in shapes:
        return None
    stem = infer_yitu_stem(clues)
    dim, depth = stem["embed_dim"], count(shapes, "blocks.{}.norm1.weight")
    return {
        **stem,
        "depth": depth,
        "num_heads": heads(clues, dim, depth),
        "mlp_dim": shapes.get("blocks.0.mlp.fc1.weight", (4 * dim,))[0],
        "qkv_bias": "blocks.0.attn.qkv.bias" in shapes,
    }


def infer_yitu_stem(clues: Clues) -> Fields:
    """All but the blocks of a file that has the official stem."""
    shapes, given, first = clues.shapes, clues.given, "tokens_to_token.attention1"
    performer = f"{first}.w" in shapes
    in_channels = shapes[f"{first}.norm1.weight"][0] // 49
    fields: Fields = {
        **YITU,
        "token_mixer": "performer" if performer else "transformer",
        "token_dim": shapes[f"{first}.norm2.weight"][0],
        "token_mlp_dim": shapes[f"{first}.mlp.{'0' if performer else 'fc1'}.weight"][0],
        "token_dropout_rate": 0.1 if performer else 0.0,
        "in_channels": in_channels,
        "embed_dim": shapes["tokens_to_token.project.weight"][0],
        "num_classes": shapes.get("head.weight", (0,))[0],
        **statistics(in_channels, YITU["preprocess"]),
    }
    if performer:
        fields["performer_features"] = shapes[f"{first}.w"][0]
    side = square_side(shapes["pos_embed"][1] - 1, given, 16)
    if side is not None:
        fields["image_size"] = (side * 16, side * 16)
    return fields


def infer_vit_pytorch(clues: Clues) -> Fields | None:
    """vit-pytorch: token transformers at entries 3, 7 … of the patch embedding."""
    shapes, given = clues.shapes, clues.given
    mixers = count_mixers(shapes)
    project = shapes.get(f"to_patch_embedding.{4 * (mixers + 1)}.weight", ())
    if len(project) != 2 or not mixers or "pos_embedding" not in shapes:
        return None
    dim, depth = project[0], count(shapes, "transformer.layers.{}.0.norm.weight")
    dims = [shapes[f"to_patch_embedding.{4 * j + 3}.norm.weight"][0] for j in range(mixers)]
    in_channels = given.get("in_channels", 3)
    layers = given.get("t2t_layers") or _soft_splits([in_channels, *dims, project[1]])
    fields: Fields = {
        **VIT_PYTORCH,
        **vit_pytorch_heads(shapes, dim, given),
        "token_mixer": "full",
        "pos_embed": "learned",
        "t2t_layers": layers,
        "in_channels": in_channels,
        "embed_dim": dim,
        "depth": depth,
        "mlp_dim": shapes.get("transformer.layers.0.1.net.1.weight", (4 * dim,))[0],
        "num_classes": shapes["mlp_head.weight"][0],
        **statistics(in_channels, Preprocess()),
    }
    unit = math.prod(stride for _, stride, _ in layers)
    side = square_side(shapes["pos_embedding"][1] - 1, given, unit)
    if side is not None:
        fields["image_size"] = (side * unit, side * unit)
    return fields


def count_mixers(shapes: Shapes) -> int:
    """Token transformers of a vit-pytorch stem."""
    mixers = 0
    while f"to_patch_embedding.{4 * mixers + 3}.norm.weight" in shapes:
        mixers += 1
    return mixers


def _soft_splits(dims: list[int]) -> list[tuple[int, int, int]]:
    """Soft splits from the widths before and after each: the kernels follow, the strides are usual.

    Raises:
        Ask: if a kernel is none of which the usual stride is known.
    """
    layers: list[tuple[int, int, int]] = []
    for before, after in pairwise(dims):
        kernel = math.isqrt(after // before)
        stride = {7: 4, 3: 2}.get(kernel)
        if stride is None or kernel * kernel * before != after:
            why = f"the widths {dims} do not tell the strides"
            raise Ask("t2t_layers", why, "[[KERNEL,STRIDE,PADDING],…]")
        layers.append((kernel, stride, stride // 2))
    return layers


INFER: dict[str, Infer] = {"yitu": infer_yitu, "vit_pytorch": infer_vit_pytorch}
