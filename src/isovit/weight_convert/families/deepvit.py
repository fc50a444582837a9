"""Rename tables of DeepViT, and its configs read from names and shapes.

Sources: zhoudaquan/dvit_repo (MIT), whose names are timm's but for its own modules; vit-pytorch
1.26.11 ``deepvit.py`` (MIT).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from isovit.errors import InputError
from isovit.spec.config import Preprocess
from isovit.spec.families.deepvit import DVIT, VARIANTS, DeepViTConfig
from isovit.weight_convert.detect import Ask, Clues, Fields, Infer, count, heads, square_side
from isovit.weight_convert.families.vit import (
    VIT_PYTORCH,
    block_rows,
    square_patch,
    standard_misfits,
    statistics,
    transformer_rows,
)
from isovit.weight_convert.rename import RenameTable, parameter, pixelwise, rename


def dvit(_: DeepViTConfig) -> RenameTable:
    """The official code, which mixes the heads by a convolution of one pixel."""
    stem = ("conv1", "bn1", "conv2", "bn2", "proj")
    return RenameTable(
        rename("cls_token", "cls_token"),
        rename("pos_embed", "pos_embed"),
        *(rename(f"patch_embed.{name}", f"patch_embed.{name}") for name in stem),
        pixelwise(rename("blocks.{i}.attn.reatten_matrix", "blocks.{i}.attn.mix")),
        rename("blocks.{i}.attn.var_norm", "blocks.{i}.attn.mix_norm"),
        *block_rows(),
        rename("norm", "norm"),
        rename("head", "head"),
    )


def vit_pytorch(_: DeepViTConfig) -> RenameTable:
    """vit-pytorch's DeepViT, whose mixture is a bare parameter and whose head has the norm."""
    layer = "transformer.layers.{i}"
    return RenameTable(
        rename("cls_token", "cls_token"),
        rename("pos_embedding", "pos_embed"),
        rename("to_patch_embedding.1", "patch_embed.norm1"),
        rename("to_patch_embedding.2", "patch_embed.proj"),
        rename("to_patch_embedding.3", "patch_embed.norm2"),
        *transformer_rows(layer, "blocks.{i}"),
        parameter(f"{layer}.0.reattn_weights", "blocks.{i}.attn.mix.kernel", "i o"),
        rename(f"{layer}.0.reattn_norm.1", "blocks.{i}.attn.mix_norm"),
        rename("mlp_head.0", "norm"),
        rename("mlp_head.1", "head"),
    )


TABLES: dict[str, Callable[[DeepViTConfig], RenameTable]] = {
    "dvit": dvit,
    "vit_pytorch": vit_pytorch,
}


def common_misfits(config: DeepViTConfig) -> Iterator[str]:
    """What neither code can be told to be."""
    if not config.class_token:
        yield "class_token=false"
    if not config.attn_proj:
        yield "attn_proj=false"
    if config.layer_scale_init is not None:
        yield "layer_scale_init"


def dvit_misfits(config: DeepViTConfig) -> Iterator[str]:
    """What the official code cannot be told to be."""
    yield from common_misfits(config)
    if config.patch_embed == "norm_linear_norm":
        yield "patch_embed=norm_linear_norm"
    if config.patch_embed == "convs":
        if config.stem_dim != OFFICIAL_STEM:
            yield f"stem_dim other than {OFFICIAL_STEM}"
        if config.patch_size[0] != config.patch_size[1]:
            yield "patches of convolutions that are not square"
    if config.block.inner_dim != config.embed_dim:
        yield "heads that do not fill embed_dim"
    if config.re_attention_norm != "batch_norm":
        yield f"re_attention_norm={config.re_attention_norm}"
    if not config.re_attention_bias:
        yield "re_attention_bias=false"
    if config.re_attention_scale not in (1.0, config.block.attn_scale):
        yield "re_attention_scale other than 1 and the scale of q·k"
    if (config.pool, config.final_norm) != ("cls", "tokens"):
        yield "pool or final_norm other than cls and tokens"


def vit_pytorch_misfits(config: DeepViTConfig) -> Iterator[str]:
    """What vit-pytorch's DeepViT cannot be told to be."""
    yield from common_misfits(config)
    yield from standard_misfits(config)
    if config.patch_embed != "norm_linear_norm":
        yield f"patch_embed={config.patch_embed}"
    if config.patch_size[0] != config.patch_size[1]:
        yield "patches that are not square"
    if config.image_size[0] != config.image_size[1]:
        yield "an image that is not square"
    if config.qkv_bias:
        yield "qkv_bias=true"
    if not all(config.re_attends(index) for index in range(config.depth)):
        yield "blocks that do not re-attend"
    if config.re_attention_norm != "layer_norm":
        yield f"re_attention_norm={config.re_attention_norm}"
    if config.re_attention_bias:
        yield "re_attention_bias=true"
    if config.re_attention_scale != 1.0:
        yield "re_attention_scale other than 1"
    if config.branch_scale != 1.0:
        yield "branch_scale other than 1"
    if config.final_norm == "tokens":
        yield "final_norm=tokens"
    if config.pool not in ("cls", "mean"):
        yield f"pool={config.pool}"
    if not config.num_classes:
        yield "num_classes=0"


MISFITS: dict[str, Callable[[DeepViTConfig], Iterator[str]]] = {
    "dvit": dvit_misfits,
    "vit_pytorch": vit_pytorch_misfits,
}

OFFICIAL_STEM = 64


def infer_dvit(clues: Clues) -> Fields | None:
    """The official code: mixtures of heads, or a stem of three convolutions."""
    shapes = clues.shapes
    depth = count(shapes, "blocks.{}.norm1.weight")
    mixed = [i for i in range(depth) if f"blocks.{i}.attn.reatten_matrix.weight" in shapes]
    convs = {"patch_embed.conv1.weight", "patch_embed.bn1.weight"} <= shapes.keys()
    kernel = shapes.get("patch_embed.proj.weight", ())
    if len(kernel) != 4 or "pos_embed" not in shapes or not (mixed or convs):
        return None
    if mixed != list(range(depth - len(mixed), depth)):
        raise InputError(f"of {depth} blocks these re-attend: {mixed}; wanted the last ones")
    dim, width, *half = kernel
    patch_size = (2 * half[0], 2 * half[1]) if convs else (half[0], half[1])
    in_channels = shapes["patch_embed.conv1.weight"][1] if convs else width
    if mixed:
        num_heads = shapes[f"blocks.{mixed[0]}.attn.reatten_matrix.weight"][0]
    else:
        num_heads = heads(clues, dim, depth)
    fields: Fields = {
        **DVIT,
        "patch_embed": "convs" if convs else "conv",
        "patch_size": patch_size,
        "in_channels": in_channels,
        "embed_dim": dim,
        "depth": depth,
        "num_heads": num_heads,
        "mlp_dim": shapes.get("blocks.0.mlp.fc1.weight", (3 * dim,))[0],
        "qkv_bias": depth == 0 or "blocks.0.attn.qkv.bias" in shapes,
        "re_attention_depth": None if len(mixed) == depth else len(mixed),
        "num_classes": shapes.get("head.weight", (0,))[0],
    }
    if convs:
        fields["stem_dim"] = width
    side = square_side(shapes["pos_embed"][1] - 1, clues.given, patch_size[0])
    if side is not None:
        fields["image_size"] = (side * patch_size[0], side * patch_size[1])
    return fields | _untold(clues, fields)


def _untold(clues: Clues, fields: Fields) -> Fields:
    """What no shape tells, of the published model of these sizes.

    Raises:
        Ask: if no published model has them, for a factor that the caller does not give.
    """
    sizes = ("embed_dim", "depth", "patch_embed")
    published = [
        config
        for config in VARIANTS.values()
        if all(getattr(config, name) == fields[name] for name in sizes)
    ]
    preprocess = DVIT["preprocess"]
    for config in published:
        if config.image_size == fields.get("image_size"):
            preprocess = config.preprocess
    told = statistics(fields["in_channels"], preprocess)
    scale = (fields["embed_dim"] // fields["num_heads"]) ** -0.5
    candidates = {"re_attention_scale": f"1.0|{scale}", "branch_scale": "1.0|0.5"}
    for name, values in candidates.items():
        if published:
            told[name] = getattr(published[0], name)
        elif name not in clues.given:
            shown = ", ".join(f"{size}={fields[size]}" for size in sizes)
            raise Ask(name, f"no published model has {shown}", values)
    return told


def infer_vit_pytorch(clues: Clues) -> Fields | None:
    """vit-pytorch: its ViT with a matrix over the heads in each layer."""
    shapes, given = clues.shapes, clues.given
    mixture = shapes.get("transformer.layers.0.0.reattn_weights", ())
    if len(mixture) != 2 or "to_patch_embedding.2.weight" not in shapes:
        return None
    dim, patch_dim = shapes["to_patch_embedding.2.weight"]
    in_channels, patch_size = square_patch(patch_dim, given)
    num_heads = mixture[0]
    fields: Fields = {
        **VIT_PYTORCH,
        "patch_embed": "norm_linear_norm",
        "patch_size": patch_size,
        "in_channels": in_channels,
        "embed_dim": dim,
        "depth": count(shapes, "transformer.layers.{}.0.norm.weight"),
        "num_heads": num_heads,
        "head_dim": shapes["transformer.layers.0.0.to_qkv.weight"][0] // (3 * num_heads),
        "mlp_dim": shapes["transformer.layers.0.1.net.1.weight"][0],
        "re_attention_bias": False,
        "re_attention_norm": "layer_norm",
        "final_norm": "pooled",
        "num_classes": shapes["mlp_head.1.weight"][0],
        **statistics(in_channels, Preprocess()),
    }
    side = square_side(shapes["pos_embedding"][1] - 1, given, patch_size[0])
    if side is not None:
        fields["image_size"] = (side * patch_size[0], side * patch_size[1])
    return fields


INFER: dict[str, Infer] = {"dvit": infer_dvit, "vit_pytorch": infer_vit_pytorch}
