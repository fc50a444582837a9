"""Rename tables of TokenLearner, and its configs read from names and shapes.

Source: google-research/scenic ``projects/token_learner/model.py`` (Apache-2.0), whose blocks are
named as big_vision's. Of the Keras example no weights have names that could be told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from isovit.spec.config import Preprocess
from isovit.spec.families.token_learner import VARIANTS, TokenLearnerConfig
from isovit.weight_convert.detect import Ask, Clues, Fields, Infer, count, square_side
from isovit.weight_convert.families.vit import statistics
from isovit.weight_convert.rename import RenameTable, Row, fuse, rename

MODULES = {"mlp": "TokenLearnerModuleV11", "conv": "TokenLearnerModule"}
"""What scenic calls a TokenLearner, by how it makes maps."""

BOTTLENECK_DIM = 64
"""The hidden width of its maps, which scenic's model is not told."""


def scenic(config: TokenLearnerConfig) -> RenameTable:
    """Scenic: an npz of flax.linen's parameters; modules of a kind are numbered from 0."""
    block, h = "Transformer.encoderblock_{i}", config.num_heads
    attention = f"{block}.MultiHeadDotProductAttention_0"
    learner = f"Transformer.{MODULES.get(config.learner, '')}_{{i}}"
    fuser = "Transformer.TokenFuser_{i}"
    return RenameTable(
        rename("embedding", "patch_embed.proj"),
        rename("Transformer.posembed_input.pos_embedding", "pos_embed"),
        rename(f"{block}.LayerNorm_0", "blocks.{i}.norm1"),
        fuse(f"{attention}.{{query|key|value}}", "blocks.{i}.attn.qkv", heads=h, axis="o"),
        rename(f"{attention}.out", "blocks.{i}.attn.proj", heads=h, axis="i"),
        rename(f"{block}.LayerNorm_1", "blocks.{i}.norm2"),
        *products(f"{block}.MlpBlock_0", "blocks.{i}.mlp"),
        rename(f"{learner}.LayerNorm_0", "learners.{i}.norm"),
        rename(f"{learner}.Conv_{{j}}", "learners.{i}.convs.{j}"),
        *products(f"{learner}.token_masking", "learners.{i}.mask"),
        rename(f"{fuser}.fuser_mix_norm1", "fusers.{i}.norm1"),
        rename(f"{fuser}.Dense_0", "fusers.{i}.mix"),
        rename(f"{fuser}.fuser_mix_norm2", "fusers.{i}.norm2"),
        rename(f"{fuser}.LayerNorm_0", "fusers.{i}.norm"),
        *products(f"{fuser}.token_masking", "fusers.{i}.mask"),
        rename("Transformer.encoder_norm", "norm"),
        rename("output_projection", "head"),
    )


def products(foreign: str, canonical: str) -> list[Row]:
    """Two products with an activation between."""
    return [
        rename(f"{foreign}.Dense_0", f"{canonical}.fc1"),
        rename(f"{foreign}.Dense_1", f"{canonical}.fc2"),
    ]


TABLES: dict[str, Callable[[TokenLearnerConfig], RenameTable]] = {"scenic": scenic}


def scenic_misfits(config: TokenLearnerConfig) -> Iterator[str]:
    """What scenic's model cannot be told to be."""
    if config.block.inner_dim != config.embed_dim:
        yield "heads that do not fill embed_dim"
    if config.mlp_output_activation:
        yield "mlp_output_activation=true"
    if config.learner == "none":
        yield "learner=none"
    elif config.learner_loc == config.depth:
        yield "learner_loc behind the last block"
    if config.learner_pool != "sum":
        yield f"learner_pool={config.learner_pool}"
    if config.learner == "conv" and config.grid[0] != config.grid[1]:
        yield "learner=conv over a grid that is not square"
    masks = config.learner == "mlp" or config.fuser
    if masks and config.bottleneck_dim != BOTTLENECK_DIM:
        yield f"bottleneck_dim other than {BOTTLENECK_DIM}"
    if not config.num_classes:
        yield "num_classes=0"


MISFITS: dict[str, Callable[[TokenLearnerConfig], Iterator[str]]] = {"scenic": scenic_misfits}


def infer_scenic(clues: Clues) -> Fields | None:
    """Scenic: a TokenLearner of either kind among the blocks of a ViT."""
    shapes = clues.shapes
    kernel = shapes.get("embedding.kernel", ())
    positions = "Transformer.posembed_input.pos_embedding"
    found = {
        learner: count(shapes, f"Transformer.{module}_{{}}.LayerNorm_0.scale")
        for learner, module in MODULES.items()
    }
    if len(kernel) != 4 or positions not in shapes or not any(found.values()):
        return None
    *patch_size, in_channels, dim = kernel
    learner = "mlp" if found["mlp"] else "conv"
    depth = count(shapes, "Transformer.encoderblock_{}.LayerNorm_0.scale")
    block, first = "Transformer.encoderblock_0", f"Transformer.{MODULES[learner]}_0"
    fuser = "Transformer.TokenFuser_0.Dense_0.kernel" in shapes
    last = "token_masking.Dense_1" if learner == "mlp" else "Conv_0"
    mask = "Transformer.TokenFuser_0" if fuser else first
    query = shapes.get(f"{block}.MultiHeadDotProductAttention_0.query.kernel", (dim, 1))
    hidden = shapes.get(f"{mask}.token_masking.Dense_0.kernel", (dim, BOTTLENECK_DIM))
    fields: Fields = {
        "patch_size": tuple(patch_size),
        "in_channels": in_channels,
        "embed_dim": dim,
        "depth": depth,
        "num_heads": query[1],
        "mlp_dim": shapes.get(f"{block}.MlpBlock_0.Dense_0.kernel", (dim, 4 * dim))[1],
        "learner": learner,
        "learner_loc": depth - found[learner] if fuser else learner_loc(clues, dim, depth),
        "learned_tokens": shapes.get(f"{first}.{last}.kernel", (1,))[-1],
        "bottleneck_dim": hidden[1],
        "fuser": fuser,
        "num_classes": shapes.get("output_projection.kernel", (dim, 0))[1],
    }
    side = square_side(shapes[positions][1], clues.given, patch_size[0])
    if side is not None:
        fields["image_size"] = (side * patch_size[0], side * patch_size[1])
    return {**fields, **statistics(in_channels, Preprocess())}


def learner_loc(clues: Clues, dim: int, depth: int) -> int:
    """How many blocks come before the only TokenLearner, which no name tells.

    Raises:
        Ask: if no published model has this width and depth.
    """
    if "learner_loc" in clues.given:
        return int(clues.given["learner_loc"])
    for config in VARIANTS.values():
        if config.init_scheme == "vit_jax" and (config.embed_dim, config.depth) == (dim, depth):
            return config.learner_loc
    why = f"no published model has embed_dim={dim} and depth={depth}"
    raise Ask("learner_loc", why, "|".join(map(str, range(depth))))


INFER: dict[str, Infer] = {"scenic": infer_scenic}
