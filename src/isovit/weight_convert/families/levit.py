"""Rename tables of LeViT, and its configs read from names and shapes.

Sources: facebookresearch/LeViT ``levit.py`` (Apache-2.0); timm 1.0 ``levit.py`` (Apache-2.0);
transformers 5.23 ``modeling_levit.py`` (Apache-2.0); vit-pytorch 1.26.11 ``levit.py`` (MIT).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import msgspec
import numpy as np

from isovit.spec.config import Preprocess
from isovit.spec.families.levit import VIT_PYTORCH, AttentionConfig, LeViTConfig
from isovit.weight_convert.detect import Clues, Fields, Infer, Shapes, count, square_side
from isovit.weight_convert.families.vit import (
    hf_class,
    hf_preprocess,
    statistics,
    timm_preprocess,
)
from isovit.weight_convert.rename import (
    Drop,
    RenameTable,
    Row,
    drop,
    fuse,
    parameter,
    pixelwise,
    rename,
)


class Place(NamedTuple):
    """Where a block stands.

    Attributes:
        stage: its stage, from 0.
        block: its place in the stage; None for the one that shrinks the grid before.
        attention: the numbers of its attention.
    """

    stage: int
    block: int | None
    attention: AttentionConfig

    @property
    def path(self) -> str:
        """Canonical path."""
        inside = "downsample" if self.block is None else f"blocks.{self.block}"
        return f"stages.{self.stage}.{inside}"


def places(config: LeViTConfig) -> Iterator[Place]:
    """Every block in the order in which it runs."""
    for i, stage in enumerate(config.stages):
        if stage.downsample is not None:
            yield Place(i, None, stage.downsample)
        for j in range(stage.depth):
            yield Place(i, j, stage.attention)


class Names(NamedTuple):
    """What a library calls the products of a block, and the two parts of each."""

    qkv: str
    kv: str
    q: str
    proj: str
    fc1: str
    fc2: str
    product: str
    norm: str


OF_OFFICIAL = Names("qkv", "kv", "q.1", "proj.1", "0", "2", "c", "bn")
OF_TIMM = Names("qkv", "kv", "q.ln", "proj.ln", "ln1", "ln2", "linear", "bn")
OF_HF = Names(
    "queries_keys_values", "keys_values", "queries", "projection", "linear_up", "linear_down",
    "linear", "batch_norm",
)  # fmt: skip


def levit(config: LeViTConfig) -> RenameTable:
    """The official code, where every branch beside a residual is an entry of one list."""
    rows: list[Row | Drop] = []
    for n, place in enumerate(places(config)):
        attn = f"blocks.{2 * n}" if place.block is None else f"blocks.{2 * n}.m"
        rows += block_rows(attn, f"blocks.{2 * n + 1}.m", place.path, OF_OFFICIAL)
        rows.append(index_of_offsets(f"{attn}.attention_bias_idxs", place.attention))
    return RenameTable(
        *normed("patch_embed.{2i}", "stem.convs.{i}", "c", "bn", "conv"),
        *rows,
        *normed("head", "head", "l", "bn"),
        *normed("head_dist", "head_dist", "l", "bn"),
    )


def timm(config: LeViTConfig) -> RenameTable:
    """Timm's Levit and LevitDistilled."""
    block, downsample = "stages.{i}.blocks.{j}", "stages.{i}.downsample"
    return RenameTable(
        *normed("stem.conv{i+1}", "stem.convs.{i}", "linear", "bn", "conv"),
        *block_rows(f"{block}.attn", f"{block}.mlp", block, OF_TIMM),
        *block_rows(f"{downsample}.attn_downsample", f"{downsample}.mlp", downsample, OF_TIMM),
        *normed("head", "head", "linear", "bn"),
        *normed("head_dist", "head_dist", "linear", "bn"),
        drop(r".*\.attention_bias_idxs", "it follows from the grid"),
    )


def hf(config: LeViTConfig) -> RenameTable:
    """Hugging Face, without the prefix of the model: what leads to a stage ends the one before."""
    rows: list[Row | Drop] = []
    for place in places(config):
        if place.block is None:
            stage, n = place.stage - 1, 2 * config.depths[place.stage - 1]
        else:
            stage, n = place.stage, 2 * place.block
        layers = f"encoder.stages.{stage}.layers"
        attn = f"{layers}.{n}" if place.block is None else f"{layers}.{n}.module"
        rows += block_rows(attn, f"{layers}.{n + 1}.module", place.path, OF_HF)
    stem = "patch_embeddings.embedding_layer_{i+1}"
    return RenameTable(
        *normed(stem, "stem.convs.{i}", "convolution", "batch_norm", "conv"),
        *rows,
        *normed("classifier", "head", "linear", "batch_norm"),
        *normed("classifier_distill", "head_dist", "linear", "batch_norm"),
        drop(r".*\.attention_bias_idxs", "it follows from the grid"),
    )


def vit_pytorch(config: LeViTConfig) -> RenameTable:
    """vit-pytorch's LeViT, whose products are convolutions of one pixel, a BatchNorm after some."""
    rows: list[Row | Drop] = []
    for place in places(config):
        # Transformers of a stage's blocks, and between two of them one of a single block.
        transformer = 2 * place.stage - (place.block is None)
        foreign = f"backbone.{transformer}.layers.{place.block or 0}"
        attn, mlp, numbers = f"{place.path}.attn", f"{place.path}.mlp", place.attention
        if place.block is None:
            rows += side_by_side(f"{foreign}.0", attn, "kv", numbers)
            rows.append(pixelwise(rename(f"{foreign}.0.to_q.0", f"{attn}.q.linear")))
            rows.append(rename(f"{foreign}.0.to_q.1", f"{attn}.q.norm"))
        else:
            rows += side_by_side(f"{foreign}.0", attn, "qkv", numbers)
        rows += [
            pixelwise(rename(f"{foreign}.0.to_out.1", f"{attn}.proj.linear")),
            rename(f"{foreign}.0.to_out.2", f"{attn}.proj.norm"),
            parameter(f"{foreign}.0.pos_bias.weight", f"{attn}.attention_biases", "b a"),
            index_of_offsets(f"{foreign}.0.pos_indices", numbers),
            pixelwise(rename(f"{foreign}.1.net.0", f"{mlp}.fc1")),
            pixelwise(rename(f"{foreign}.1.net.3", f"{mlp}.fc2")),
        ]
    return RenameTable(
        rename("conv_embedding.{i}", "stem.convs.{i}"),
        *rows,
        rename("mlp_head", "head"),
        rename("distill_head", "head_dist"),
    )


def block_rows(attn: str, mlp: str, path: str, names: Names) -> list[Row]:
    """A block, by the foreign paths of its attention and its MLP."""
    products = {
        f"{attn}.{names.qkv}": f"{path}.attn.qkv",
        f"{attn}.{names.kv}": f"{path}.attn.kv",
        f"{attn}.{names.q}": f"{path}.attn.q",
        f"{attn}.{names.proj}": f"{path}.attn.proj",
        f"{mlp}.{names.fc1}": f"{path}.mlp.fc1",
        f"{mlp}.{names.fc2}": f"{path}.mlp.fc2",
    }
    rows = [normed(theirs, ours, names.product, names.norm) for theirs, ours in products.items()]
    biases = rename(f"{attn}.attention_biases", f"{path}.attn.attention_biases")
    return [biases, *(row for pair in rows for row in pair)]


def normed(
    foreign: str, canonical: str, product: str, norm: str, ours: str = "linear"
) -> list[Row]:
    """A product and its BatchNorm, by the foreign names of the two."""
    return [
        rename(f"{foreign}.{product}", f"{canonical}.{ours}"),
        rename(f"{foreign}.{norm}", f"{canonical}.norm"),
    ]


def side_by_side(foreign: str, attn: str, product: str, numbers: AttentionConfig) -> list[Row]:
    """A product that is a foreign one for each of its letters (qkv, kv), with a BatchNorm each.

    Here each head has its q, k and v side by side; there all heads of one letter are together.
    """
    widths = {"q": numbers.key_dim, "k": numbers.key_dim, "v": numbers.value_dim}
    parts = "{" + "|".join(f"to_{letter}" for letter in product) + "}"
    shares, heads = tuple(widths[letter] for letter in product), numbers.num_heads
    linear, norm = (
        fuse(f"{foreign}.{parts}.{n}", f"{attn}.{product}.{leaf}", shares=shares, by_head=heads)
        for n, leaf in enumerate(("linear", "norm"))
    )
    return [pixelwise(linear), norm]


def index_of_offsets(foreign: str, numbers: AttentionConfig) -> Drop:
    """The buffer in which the foreign model notes the bias of each query and key."""
    return drop(foreign, "it follows from the grid", write=offset_index(numbers))


def offset_index(numbers: AttentionConfig) -> np.ndarray:
    """Which bias belongs to each query and key: |rows| · columns of the grid + |columns| between.

    The official code numbers the offsets as it first meets them, query after query and for each
    key after key. The first query, in the corner, meets all of them in this very order.

    Returns:
        (queries, keys) integers.
    """
    keys = np.indices(numbers.grid)  # (2, rows, columns)
    queries = keys[:, :: numbers.stride, :: numbers.stride].reshape(2, -1)
    rows, columns = np.abs(queries[:, :, None] - keys.reshape(2, 1, -1))
    return rows * numbers.grid[1] + columns


def hf_config(config: LeViTConfig) -> dict[str, Any]:
    """``config.json``, as LevitConfig wants it; it takes no drop_path_rate between 0 and 1."""
    stages = len(config.embed_dims)
    return {
        **hf_class("Levit", config),
        "hidden_sizes": config.embed_dims,
        "depths": config.depths,
        "num_attention_heads": config.num_heads,
        "key_dim": [config.key_dim] * stages,
        "attention_ratio": [config.value_dim // config.key_dim] * stages,
        "mlp_ratio": [config.mlp_ratio] * stages,
    }


TABLES: dict[str, Callable[[LeViTConfig], RenameTable]] = {
    "levit": levit,
    "timm": timm,
    "hf": hf,
    "vit_pytorch": vit_pytorch,
}


# What the official code has and nobody can change, and what vit-pytorch's has.
OFFICIAL: Fields = {
    "stem": "conv_norm",
    "attn_activation": "hardswish",
    "attn_bias_over_scale": False,
    "attn_proj_bias": False,
    "mlp_norm": True,
    "fused": False,
    "batch_norm_eps": 1e-5,
}
OTHER_FORM: Fields = {
    **{name: value for name, value in VIT_PYTORCH.items() if name != "init_scheme"},
    "fused": False,
    "batch_norm_eps": 1e-5,
}


def others(config: LeViTConfig, wanted: Fields) -> Iterator[str]:
    """Fields that are not as a library has them."""
    for name, value in wanted.items():
        if getattr(config, name) != value:
            yield f"{name} other than {value}"


def timm_misfits(config: LeViTConfig) -> Iterator[str]:
    """What neither the official code nor timm's can be told to be."""
    before, (first, *_) = config.embed_dims[:-1], config.embed_dims
    yield from others(config, OFFICIAL)
    yield from others(config, {"stem_dims": (first // 8, first // 4, first // 2)})
    if config.num_classes:
        yield from others(config, {"head_norm": True})
    if config.value_dim % config.key_dim:
        yield "value_dim that is no multiple of key_dim"
    yield from others(config, {"down_heads": tuple(dim // config.key_dim for dim in before)})
    if before:
        yield from others(config, {"down_value_dim": 4 * config.key_dim, "down_mlp_ratio": 2})
    yield from uneven(config)


def uneven(config: LeViTConfig) -> Iterator[str]:
    """A size of the image that leaves pixels over, whose grid the libraries round down."""
    if any(size % 16 for size in config.image_size):
        yield "an image of which 16 divides not both sides"


def levit_misfits(config: LeViTConfig) -> Iterator[str]:
    """What the official code cannot be told to be."""
    yield from timm_misfits(config)
    yield from others(config, {"in_channels": 3})
    if config.image_size[0] != config.image_size[1]:
        yield "an image that is not square"


def hf_misfits(config: LeViTConfig) -> Iterator[str]:
    """What Hugging Face's LeViT cannot be told to be."""
    yield from timm_misfits(config)
    if len(config.embed_dims) != HF_STAGES:
        yield f"other than {HF_STAGES} stages"
    if config.image_size[0] != config.image_size[1]:
        yield "an image that is not square"


def vit_pytorch_misfits(config: LeViTConfig) -> Iterator[str]:
    """What vit-pytorch's LeViT cannot be told to be."""
    yield from others(config, {**OTHER_FORM, "in_channels": 3})
    yield from others(config, {"down_heads": tuple(2 * n for n in config.num_heads[:-1])})
    if config.down_heads:
        yield from others(config, {"down_value_dim": config.value_dim, "down_mlp_ratio": 2})
    if not config.num_classes:
        yield "num_classes=0"
    if config.image_size[0] != config.image_size[1]:
        yield "an image that is not square"
    yield from uneven(config)


MISFITS: dict[str, Callable[[LeViTConfig], Iterator[str]]] = {
    "levit": levit_misfits,
    "timm": timm_misfits,
    "hf": hf_misfits,
    "vit_pytorch": vit_pytorch_misfits,
}

HF_STAGES = 3


class Found(NamedTuple):
    """Sizes of an attention and the MLP behind it, as its arrays tell them.

    Attributes:
        heads: of the attention.
        tokens: that come in.
        key_dim: width of a head's q and k.
        value_dim: width of a head's v.
        dim: of the tokens that go out.
        hidden: width of the MLP.
    """

    heads: int
    tokens: int
    key_dim: int
    value_dim: int
    dim: int
    hidden: int


Stages = list[list[Found]]
"""By stage; each but the first begins with the attention that leads into it."""


def infer_levit(clues: Clues) -> Fields | None:
    """The official code: one list of entries, an attention and an MLP in turn."""
    shapes = clues.shapes
    if "patch_embed.0.c.weight" not in shapes:
        return None
    stem = stem_of(shapes, "patch_embed.{}.c.weight", step=2)
    stages = stages_of(shapes, ["blocks"], "m", OF_OFFICIAL)
    return official_fields(clues, stem, stages, "head.l.weight", "head_dist.l.weight")


def infer_timm(clues: Clues) -> Fields | None:
    """timm: stages of blocks."""
    shapes = clues.shapes
    if "stem.conv1.linear.weight" not in shapes:
        return None
    stem = stem_of(shapes, "stem.conv{}.linear.weight", first=1)
    stages: Stages = []
    while not stages or f"stages.{len(stages)}.downsample.mlp.ln1.linear.weight" in shapes:
        stage = f"stages.{len(stages)}"
        downsample, block = f"{stage}.downsample", f"{stage}.blocks.{{}}"
        paths = [(f"{downsample}.attn_downsample", f"{downsample}.mlp")] if stages else []
        for j in range(count(shapes, f"{block}.attn.attention_biases")):
            paths.append((f"{block.format(j)}.attn", f"{block.format(j)}.mlp"))
        stages.append([found_in_block(shapes, attn, mlp, OF_TIMM) for attn, mlp in paths])
    fields = official_fields(clues, stem, stages, "head.linear.weight", "head_dist.linear.weight")
    preprocess = timm_preprocess(clues, Preprocess(crop_fraction=0.9))
    return {**fields, **statistics(fields["in_channels"], preprocess)}


def infer_hf(clues: Clues) -> Fields | None:
    """Hugging Face: a list of entries for each stage; ``config.json`` tells no more than shapes do.

    Only the heads of a stage without blocks are in it alone.
    """
    shapes, about = clues.shapes, clues.sidecars.get("config.json", {})
    if "patch_embeddings.embedding_layer_1.convolution.weight" not in shapes:
        return None
    stem = stem_of(shapes, "patch_embeddings.embedding_layer_{}.convolution.weight", first=1)
    lists = [f"encoder.stages.{i}.layers" for i in range(HF_STAGES)]
    stages = stages_of(shapes, lists, "module", OF_HF)
    head, head_dist = "classifier.linear.weight", "classifier_distill.linear.weight"
    fields = official_fields(clues, stem, stages, head, head_dist)
    if "num_attention_heads" in about:
        fields["num_heads"] = about["num_attention_heads"]
    preprocess = hf_preprocess(clues, Preprocess(), Preprocess())
    told = clues.sidecars.get("preprocessor_config.json", {})
    kind = str(told.get("image_processor_type") or told.get("feature_extractor_type"))
    if kind.startswith("Levit"):  # it resizes to more than its ``size`` says
        preprocess = msgspec.structs.replace(preprocess, crop_fraction=224 / 256)
    return {**fields, **statistics(fields["in_channels"], preprocess)}


def stages_of(shapes: Shapes, lists: list[str], residual: str, names: Names) -> Stages:
    """Sizes by stage from lists of entries, an attention and an MLP in turn.

    Args:
        shapes: of the file.
        lists: their paths, in the order in which they run.
        residual: name of what is beside a residual: all but an attention that leads to a stage.
        names: of the products.
    """
    stages: Stages = [[]]
    for entries in lists:
        n = 0
        while (attn := attention_at(shapes, f"{entries}.{n}", residual)) is not None:
            if not attn.endswith(residual):
                stages.append([])
            mlp = f"{entries}.{n + 1}.{residual}"
            stages[-1].append(found_in_block(shapes, attn, mlp, names))
            n += 2
    return stages


def attention_at(shapes: Shapes, entry: str, residual: str) -> str | None:
    """Path of the attention of an entry; None where the list ends."""
    paths = (f"{entry}.{residual}", entry)
    return next((path for path in paths if f"{path}.attention_biases" in shapes), None)


def found_in_block(shapes: Shapes, attn: str, mlp: str, names: Names) -> Found:
    """Sizes of a block by the paths of its attention and its MLP."""
    heads, tokens = shapes[f"{attn}.attention_biases"]
    dim, inner_dim = shapes[f"{attn}.{names.proj}.{names.product}.weight"]
    value_dim = inner_dim // heads
    if (qkv := f"{attn}.{names.qkv}.{names.product}.weight") in shapes:
        key_dim = (shapes[qkv][0] // heads - value_dim) // 2
    else:
        key_dim = shapes[f"{attn}.{names.q}.{names.product}.weight"][0] // heads
    hidden, _ = shapes[f"{mlp}.{names.fc1}.{names.product}.weight"]
    return Found(heads, tokens, key_dim, value_dim, dim, hidden)


def official_fields(
    clues: Clues, stem: list[int], stages: Stages, head: str, head_dist: str
) -> Fields:
    """The fields of the official model from its sizes."""
    shapes = clues.shapes
    return {
        **fields_of(clues, stem, stages),
        "num_classes": shapes.get(head, (0,))[0],
        "dist_head": head_dist in shapes,
    }


def infer_vit_pytorch(clues: Clues) -> Fields | None:
    """vit-pytorch: transformers of many layers and, between two of them, one of one layer."""
    shapes = clues.shapes
    if "conv_embedding.0.weight" not in shapes or "mlp_head.weight" not in shapes:
        return None
    stages: Stages = []
    while not stages or f"backbone.{2 * len(stages) - 1}.layers.0.0.pos_bias.weight" in shapes:
        n = len(stages)  # blocks at 2n, what leads to them at 2n - 1
        blocks = f"backbone.{2 * n}.layers.{{}}"
        paths = [blocks.format(j) for j in range(count(shapes, f"{blocks}.0.pos_bias.weight"))]
        paths = [f"backbone.{2 * n - 1}.layers.0", *paths] if n else paths
        stages.append([found_in_layer(shapes, path) for path in paths])
    return {
        **VIT_PYTORCH,
        **fields_of(clues, stem_of(shapes, "conv_embedding.{}.weight"), stages),
        "num_classes": shapes["mlp_head.weight"][0],
        "dist_head": "distill_head.weight" in shapes,
    }


def found_in_layer(shapes: Shapes, path: str) -> Found:
    """Sizes of a layer of vit-pytorch's."""
    tokens, heads = shapes[f"{path}.0.pos_bias.weight"]
    q, v = (shapes[f"{path}.0.to_{letter}.0.weight"][0] // heads for letter in "qv")
    hidden, dim, *_ = shapes[f"{path}.1.net.0.weight"]
    return Found(heads, tokens, q, v, dim, hidden)


def stem_of(shapes: Shapes, pattern: str, first: int = 0, step: int = 1) -> list[int]:
    """Widths in the stem, the channels of the image first."""
    dims: list[int] = []
    number = first
    while (kernel := shapes.get(pattern.format(number))) is not None:
        dims = [*(dims or [kernel[1]]), kernel[0]]
        number += step
    return dims


def fields_of(clues: Clues, stem: list[int], stages: Stages) -> Fields:
    """What the sizes of all attentions tell; of a stage without blocks they tell no heads."""
    in_channels, *stem_dims, dim = stem
    blocks = [found if i == 0 else found[1:] for i, found in enumerate(stages)]
    downs = [found[0] for found in stages[1:]]
    dims = [dim, *(down.dim for down in downs)]
    every = [found for stage in stages for found in stage]
    in_blocks = [found for stage in blocks for found in stage]
    fields: Fields = {
        "in_channels": in_channels,
        "stem_dims": stem_dims,
        "embed_dims": dims,
        "depths": [len(stage) for stage in blocks],
        "num_heads": [stage[0].heads if stage else 1 for stage in blocks],
        "down_heads": [down.heads for down in downs],
        **statistics(in_channels, Preprocess()),
    }
    if every:
        fields["key_dim"] = every[0].key_dim
        unit = 2 ** (len(stem_dims) + 1)
        side = square_side(every[0].tokens, clues.given, unit)
        if side is not None:
            fields["image_size"] = (side * unit, side * unit)
    if in_blocks:
        fields["value_dim"] = in_blocks[0].value_dim
        fields["mlp_ratio"] = in_blocks[0].hidden // in_blocks[0].dim
    if downs:
        fields["down_value_dim"] = downs[0].value_dim
        fields["down_mlp_ratio"] = downs[0].hidden // downs[0].dim
    return fields


INFER: dict[str, Infer] = {
    "levit": infer_levit,
    "timm": infer_timm,
    "hf": infer_hf,
    "vit_pytorch": infer_vit_pytorch,
}
