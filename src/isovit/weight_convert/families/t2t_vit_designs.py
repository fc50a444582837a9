"""Rename tables of T2T-ViT with designs of convolutional networks, and configs from their files.

Source: yitu-opensource/T2T-ViT ``models/t2t_vit_se.py``, ``t2t_vit_ghost.py``, ``t2t_vit_dense.py``
(Clear BSD), whose stem and whose names are T2T-ViT's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from isovit.spec.families.t2t_vit_designs import T2TViTDesignsConfig
from isovit.weight_convert.detect import Clues, Fields, Infer, Shapes, count, heads
from isovit.weight_convert.families import t2t_vit
from isovit.weight_convert.families.vit import block_rows
from isovit.weight_convert.rename import RenameTable, Row, fuse, parameter, rename


def yitu(config: T2TViTDesignsConfig) -> RenameTable:
    """The official code; its list of dense blocks holds the transitions, too."""
    rows = ghost_rows() if config.design == "ghost" else block_rows()
    return RenameTable(
        *t2t_vit.yitu_stem_rows(config),
        *rows,
        rename("blocks.{i}.attn.se_layer.fc.0", "blocks.{i}.attn.se_layer.fc1"),
        rename("blocks.{i}.attn.se_layer.fc.2", "blocks.{i}.attn.se_layer.fc2"),
        rename("blocks.{i}.dense_linear", "blocks.{i}.dense_linear"),
        rename("blocks.{i}.linear", "blocks.{i}.linear"),
        rename("norm", "norm"),
        rename("head", "head"),
    )


def ghost_rows() -> list[Row]:
    """The official ghost block: q, k and v apart; factors are kernels of a Conv1d of one token.

    Those of the MLP are counted from 2, after the part of the hidden layer that each makes.
    """
    foreign = "blocks.{i}.attn.cheap_operation_{q|k|v}.weight"
    return [
        fuse("blocks.{i}.attn.{q|k|v}", "blocks.{i}.attn.qkv"),
        replace(fuse(foreign, "blocks.{i}.attn.cheap.factor"), axes="c 1 1"),
        parameter(
            "blocks.{i}.mlp.cheap_operation{j+2}.weight",
            "blocks.{i}.mlp.cheap.{j}.factor",
            axes="c 1 1",
        ),
        *block_rows(),
    ]


TABLES: dict[str, Callable[[T2TViTDesignsConfig], RenameTable]] = {"yitu": yitu}

TOKEN_DIM = 64
SE_REDUCTION = 16
GHOST_PARTS = 3


def yitu_misfits(config: T2TViTDesignsConfig) -> Iterator[str]:
    """What the official code cannot be told to be."""
    yield from t2t_vit.yitu_misfits(config)
    if not config.depth:
        yield "depth=0, which is no design"
    if config.token_dim != TOKEN_DIM:
        yield f"token_dim other than {TOKEN_DIM}"
    if config.design == "se" and config.se_dim != config.embed_dim // SE_REDUCTION:
        yield f"se_dim other than 1/{SE_REDUCTION} of embed_dim"
    if config.design == "ghost" and config.mlp_dim != GHOST_PARTS * config.embed_dim:
        yield f"mlp_dim other than {GHOST_PARTS} times embed_dim"
    if config.design == "dense" and config.head_dim is not None:
        yield "head_dim, which follows from the width of each block"


MISFITS: dict[str, Callable[[T2TViTDesignsConfig], Iterator[str]]] = {"yitu": yitu_misfits}


def infer_yitu(clues: Clues) -> Fields | None:
    """The official code: T2T-ViT's stem, and in the first block what only one design has."""
    shapes = clues.shapes
    if "tokens_to_token.project.weight" not in shapes or "pos_embed" not in shapes:
        return None
    for infer in (infer_se, infer_ghost, infer_dense):
        found = infer(shapes)
        if found is not None:
            stem = t2t_vit.infer_yitu_stem(clues)
            num_heads = heads(clues, stem["embed_dim"], found["depth"], "t2t_vit_designs")
            return {**stem, **found, "num_heads": num_heads}
    return None


def infer_se(shapes: Shapes) -> Fields | None:
    """Blocks with squeeze-and-excitation."""
    squeeze = shapes.get("blocks.0.attn.se_layer.fc.0.weight")
    if squeeze is None:
        return None
    return {
        "design": "se",
        "se_dim": squeeze[0],
        "depth": count(shapes, "blocks.{}.norm1.weight"),
        "mlp_dim": shapes["blocks.0.mlp.fc1.weight"][0],
        "qkv_bias": "blocks.0.attn.qkv.bias" in shapes,
    }


def infer_ghost(shapes: Shapes) -> Fields | None:
    """Blocks with cheap operations."""
    if "blocks.0.attn.cheap_operation_q.weight" not in shapes:
        return None
    return {
        "design": "ghost",
        "depth": count(shapes, "blocks.{}.norm1.weight"),
        "mlp_dim": shapes["blocks.0.mlp.fc2.weight"][1],
        "qkv_bias": "blocks.0.attn.q.bias" in shapes,
    }


def infer_dense(shapes: Shapes) -> Fields | None:
    """Blocks with a product more, and transitions among them."""
    growth = shapes.get("blocks.0.dense_linear.weight")
    if growth is None:
        return None
    depths = dense_depths(shapes)
    return {
        "design": "dense",
        "dense_depths": depths,
        "dense_growth": growth[0],
        "depth": sum(depths),
        "mlp_dim": shapes["blocks.0.mlp.fc1.weight"][0],
        "qkv_bias": "blocks.0.attn.qkv.bias" in shapes,
    }


def dense_depths(shapes: Shapes) -> tuple[int, ...]:
    """Blocks of each stage: in one list, with a transition after all of a stage but the last."""
    depths, i = [0], 0
    while f"blocks.{i}.norm1.weight" in shapes or f"blocks.{i}.linear.weight" in shapes:
        if f"blocks.{i}.linear.weight" in shapes:
            depths.append(0)
        else:
            depths[-1] += 1
        i += 1
    return tuple(depths)


INFER: dict[str, Infer] = {"yitu": infer_yitu}
