"""Rename tables of CvT, and its configs read from names, shapes and what lies beside.

Sources: microsoft/CvT ``lib/models/cls_cvt.py`` at commit 56984ed (MIT); transformers 5.23
``modeling_cvt.py`` (Apache-2.0); vit-pytorch 1.26.11 ``cvt.py`` (MIT).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import msgspec

from isovit.errors import InputError
from isovit.spec.config import Preprocess
from isovit.spec.families.cvt import VARIANTS, VIT_PYTORCH, CvTConfig
from isovit.weight_convert.detect import Ask, Clues, Fields, Infer, count
from isovit.weight_convert.families.vit import HF_VIT, hf_preprocess, side_of, statistics
from isovit.weight_convert.huggingface import CONFIG, PROCESSOR
from isovit.weight_convert.rename import RenameTable, Row, pixelwise, rename

PROJECTIONS = {"q": "query", "k": "key", "v": "value"}


def microsoft(config: CvTConfig) -> RenameTable:
    """The official code, whose stages are attributes of their own: ``stage0`` and so on."""
    foreign, block = "stage{s}.blocks.{i}", "stages.{s}.blocks.{i}"
    rows: list[Row] = []
    for part in PROJECTIONS:
        rows += [
            rename(f"{foreign}.attn.conv_proj_{part}.conv", f"{block}.attn.{part}.conv"),
            rename(f"{foreign}.attn.conv_proj_{part}.bn", f"{block}.attn.{part}.norm"),
            rename(f"{foreign}.attn.proj_{part}", f"{block}.attn.{part}.proj"),
        ]
    return RenameTable(
        rename("stage{s}.patch_embed.proj", "stages.{s}.patch_embed.proj"),
        rename("stage{s}.patch_embed.norm", "stages.{s}.patch_embed.norm"),
        rename("stage{s}.cls_token", "stages.{s}.cls_token"),
        rename(f"{foreign}.norm1", f"{block}.norm1"),
        *rows,
        rename(f"{foreign}.attn.proj", f"{block}.attn.proj"),
        rename(f"{foreign}.norm2", f"{block}.norm2"),
        rename(f"{foreign}.mlp.fc1", f"{block}.mlp.fc1"),
        rename(f"{foreign}.mlp.fc2", f"{block}.mlp.fc2"),
        rename("norm", "norm"),
        rename("head", "head"),
    )


def hf(config: CvTConfig) -> RenameTable:
    """Hugging Face's CvtForImageClassification."""
    stage, block = "cvt.encoder.stages.{s}", "stages.{s}.blocks.{i}"
    embedding, layer = f"{stage}.embedding.convolution_embeddings", f"{stage}.layers.{{i}}"
    attention = f"{layer}.attention.attention"
    rows: list[Row] = []
    for part, name in PROJECTIONS.items():
        projection = f"{attention}.convolution_projection_{name}.convolution_projection"
        rows += [
            rename(f"{projection}.convolution", f"{block}.attn.{part}.conv"),
            rename(f"{projection}.normalization", f"{block}.attn.{part}.norm"),
            rename(f"{attention}.projection_{name}", f"{block}.attn.{part}.proj"),
        ]
    return RenameTable(
        rename(f"{embedding}.projection", "stages.{s}.patch_embed.proj"),
        rename(f"{embedding}.normalization", "stages.{s}.patch_embed.norm"),
        rename(f"{stage}.cls_token", "stages.{s}.cls_token"),
        rename(f"{layer}.layernorm_before", f"{block}.norm1"),
        *rows,
        rename(f"{layer}.attention.output.dense", f"{block}.attn.proj"),
        rename(f"{layer}.layernorm_after", f"{block}.norm2"),
        rename(f"{layer}.intermediate.dense", f"{block}.mlp.fc1"),
        rename(f"{layer}.output.dense", f"{block}.mlp.fc2"),
        rename("layernorm", "norm"),
        rename("classifier", "head"),
    )


def vit_pytorch(config: CvTConfig) -> RenameTable:
    """vit-pytorch's CvT, all of convolutions: a stage is a sequence of three."""
    layer, block = "layers.{s}.2.layers.{i}", "stages.{s}.blocks.{i}"
    rows: list[Row] = []
    for part in ("q", "kv"):
        rows += [
            rename(f"{layer}.0.to_{part}.net.0", f"{block}.attn.{part}.conv"),
            rename(f"{layer}.0.to_{part}.net.1", f"{block}.attn.{part}.norm"),
            pixelwise(rename(f"{layer}.0.to_{part}.net.2", f"{block}.attn.{part}.proj")),
        ]
    return RenameTable(
        rename("layers.{s}.0", "stages.{s}.patch_embed.proj"),
        pixelwise(rename("layers.{s}.1", "stages.{s}.patch_embed.norm")),
        pixelwise(rename(f"{layer}.0.norm", f"{block}.norm1")),
        *rows,
        pixelwise(rename(f"{layer}.0.to_out.0", f"{block}.attn.proj")),
        pixelwise(rename(f"{layer}.1.net.0", f"{block}.norm2")),
        pixelwise(rename(f"{layer}.1.net.1", f"{block}.mlp.fc1")),
        pixelwise(rename(f"{layer}.1.net.4", f"{block}.mlp.fc2")),
        rename("to_logits.2", "head"),
    )


def hf_config(config: CvTConfig) -> dict[str, Any]:
    """``config.json``, as CvtConfig wants it: lists, with an item for each stage."""
    stages = config.stages
    each, padding = len(stages), [stage.kernel_size // 2 for stage in stages]
    return {
        "architectures": ["CvtForImageClassification"],
        "model_type": "cvt",
        "patch_sizes": config.patch_sizes,
        "patch_stride": config.patch_strides,
        "patch_padding": config.patch_paddings,
        "embed_dim": config.embed_dims,
        "num_heads": config.num_heads,
        "depth": config.depths,
        "mlp_ratio": list(map(mlp_ratio, config.mlp_dims, config.embed_dims)),
        "attention_drop_rate": [config.attn_dropout_rate] * each,
        "drop_rate": [config.dropout_rate] * each,
        "drop_path_rate": [0.0] * (each - 1) + [config.drop_path_rate],
        "qkv_bias": [config.qkv_bias] * each,
        "cls_token": [stage.class_token for stage in stages],
        "qkv_projection_method": ["dw_bn"] * each,
        "kernel_qkv": config.qkv_kernel_sizes,
        "padding_kv": padding,
        "stride_kv": config.kv_strides,
        "padding_q": padding,
        "stride_q": [1] * each,
    }


def mlp_ratio(hidden: int, dim: int) -> float:
    """A factor of which transformers makes the hidden width again: it cuts the product."""
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else (hidden + 0.5) / dim


TABLES: dict[str, Callable[[CvTConfig], RenameTable]] = {
    "microsoft": microsoft,
    "hf": hf,
    "vit_pytorch": vit_pytorch,
}

NORM_EPS = 1e-5
"""Of the norms, which no library lets anyone choose; transformers has a number for it, unread."""


def common_misfits(config: CvTConfig) -> Iterator[str]:
    """What neither the official model nor transformers' can be told to be."""
    if any(block.inner_dim != block.dim for stage in config.stages for block in stage.blocks):
        yield "heads that do not fill embed_dims"
    if config.attn_scale != "embed_dims":
        yield f"attn_scale={config.attn_scale}"
    if config.kv_convs != "two":
        yield f"kv_convs={config.kv_convs}"
    if config.batch_norm_eps != NORM_EPS:
        yield f"batch_norm_eps other than {NORM_EPS}"
    if config.final_norm != "tokens":
        yield f"final_norm={config.final_norm}"
    if config.pool == "none":
        yield "pool=none"


def microsoft_misfits(config: CvTConfig) -> Iterator[str]:
    """What the official model cannot be told to be."""
    yield from common_misfits(config)
    if not config.num_classes:
        yield "num_classes=0"


def hf_misfits(config: CvTConfig) -> Iterator[str]:
    """What transformers' model cannot be told to be."""
    yield from common_misfits(config)
    if config.activation != "gelu":
        yield f"activation={config.activation}, where transformers has gelu for the same weights"
    if config.norm_eps != NORM_EPS:
        yield f"norm_eps other than {NORM_EPS}"
    if not config.class_token:  # it builds such a model, but cannot run it
        yield "class_token=false"
    # It reads the rate of stochastic depth of every block at the number of its stage.
    if any(depth <= s for s, depth in enumerate(config.depths)):
        yield "fewer blocks in a stage than stages up to it"


def vit_pytorch_misfits(config: CvTConfig) -> Iterator[str]:
    """What vit-pytorch's model cannot be told to be."""
    if len(config.stages) != 3:
        yield "another number of stages than 3"
    blocks = [block for stage in config.stages for block in stage.blocks]
    if any(block.head_dim != HEAD_DIM for block in blocks):
        yield f"heads of another width than {HEAD_DIM}"
    if any(block.mlp_dim % block.dim for block in blocks):
        yield "mlp_dims that are no multiples of embed_dims"
    if any(stage.patch_padding != stage.patch_size // 2 for stage in config.stages):
        yield "patch_paddings other than half of patch_sizes"
    for name in ("attn_scale", "kv_convs", "qkv_bias", "class_token", "final_norm", "pool"):
        if getattr(config, name) != VIT_PYTORCH[name]:
            yield f"{name}={getattr(config, name)}"
    if config.batch_norm_eps != NORM_EPS:
        yield f"batch_norm_eps other than {NORM_EPS}"
    if not config.num_classes:
        yield "num_classes=0"


MISFITS: dict[str, Callable[[CvTConfig], Iterator[str]]] = {
    "microsoft": microsoft_misfits,
    "hf": hf_misfits,
    "vit_pytorch": vit_pytorch_misfits,
}

HEAD_DIM = VIT_PYTORCH["head_dim"]

Numbers = tuple[int, ...]


def infer_microsoft(clues: Clues) -> Fields | None:
    """The official code: stages with a name of their own, and in them convolutions before q."""
    stages = range(count(clues.shapes, "stage{}.patch_embed.proj.weight"))
    embeds = [f"stage{s}.patch_embed.proj" for s in stages]
    blocks = [f"stage{s}.blocks" for s in stages]
    convs = [f"{block}.0.attn.conv_proj_q.conv" for block in blocks]
    fields = sizes(clues, embeds, convs, [f"{block}.{{}}.norm1" for block in blocks])
    if fields is None:
        return None
    class_token = f"stage{len(stages) - 1}.cls_token" in clues.shapes
    return {
        **fields,
        **untold(clues, fields),
        "mlp_dims": outputs(clues, [f"{block}.0.mlp.fc1" for block in blocks]),
        "qkv_bias": f"{blocks[0]}.0.attn.proj_q.bias" in clues.shapes,
        "activation": "quick_gelu",
        "class_token": class_token,
        "pool": "cls" if class_token else "mean",
        "num_classes": clues.shapes.get("head.weight", (0,))[0],
        **statistics(fields["in_channels"], Preprocess()),
    }


def infer_hf(clues: Clues) -> Fields | None:
    """Hugging Face: sizes from the shapes, the rest from ``config.json`` where there is one."""
    encoder, about = "cvt.encoder.stages", clues.sidecars.get(CONFIG, {})
    embedding = "embedding.convolution_embeddings.projection"
    stages = range(count(clues.shapes, f"{encoder}.{{}}.{embedding}.weight"))
    attention = [f"{encoder}.{s}.layers.0.attention.attention" for s in stages]
    q = "convolution_projection_query.convolution_projection.convolution"
    fields = sizes(
        clues,
        [f"{encoder}.{s}.{embedding}" for s in stages],
        [f"{path}.{q}" for path in attention],
        [f"{encoder}.{s}.layers.{{}}.layernorm_before" for s in stages],
    )
    if fields is None:
        return None
    hidden = [f"{encoder}.{s}.layers.0.intermediate.dense" for s in stages]
    processor = clues.sidecars.get(PROCESSOR, {})
    return {
        **fields,
        **(hf_untold(about, fields) if about else untold(clues, fields)),
        "mlp_dims": outputs(clues, hidden),
        "qkv_bias": f"{attention[0]}.projection_query.bias" in clues.shapes,
        "activation": "gelu",
        "num_classes": clues.shapes.get("classifier.weight", (0,))[0],
        **image_size(processor),
        **statistics(fields["in_channels"], cvt_preprocess(clues)),
    }


def infer_vit_pytorch(clues: Clues) -> Fields | None:
    """vit-pytorch: a sequence of stages, whose attention has sequences for q and for k and v."""
    stages = range(count(clues.shapes, "layers.{}.2.layers.0.0.to_q.net.0.weight"))
    layers = [f"layers.{s}.2.layers" for s in stages]
    fields = sizes(
        clues,
        [f"layers.{s}.0" for s in stages],
        [f"{layer}.0.0.to_q.net.0" for layer in layers],
        [f"{layer}.{{}}.0.to_out.0" for layer in layers],
    )
    if fields is None:
        return None
    inner = outputs(clues, [f"{layer}.0.0.to_q.net.2" for layer in layers])
    return {
        **VIT_PYTORCH,
        **fields,
        "num_heads": tuple(width // HEAD_DIM for width in inner),
        "patch_strides": by_size("patch_strides", clues, fields["patch_sizes"]),
        "patch_paddings": tuple(size // 2 for size in fields["patch_sizes"]),
        "kv_strides": kv_strides(clues, len(stages)),
        "mlp_dims": outputs(clues, [f"{layer}.0.1.net.1" for layer in layers]),
        "num_classes": clues.shapes.get("to_logits.2.weight", (0,))[0],
        **statistics(fields["in_channels"], Preprocess()),
    }


def sizes(clues: Clues, embeds: list[str], convs: list[str], norms: list[str]) -> Fields | None:
    """What the shapes tell in every format; None if there are none of these.

    Args:
        clues: with the shapes.
        embeds: path of the convolution that embeds the patches, of each stage.
        convs: path of that before q, of its first block.
        norms: path of a part of a block, as a pattern over its number, of each stage.
    """
    kernels = [clues.shapes.get(f"{path}.weight", ()) for path in (*embeds, *convs)]
    if not kernels or not all(len(kernel) == 4 for kernel in kernels):
        return None
    embedding, before_q = kernels[: len(embeds)], kernels[len(embeds) :]
    return {
        "in_channels": embedding[0][1],
        "embed_dims": tuple(kernel[0] for kernel in embedding),
        "depths": tuple(count(clues.shapes, f"{norm}.weight") for norm in norms),
        "patch_sizes": tuple(kernel[-1] for kernel in embedding),
        "qkv_kernel_sizes": tuple(kernel[-1] for kernel in before_q),
    }


def outputs(clues: Clues, paths: list[str]) -> Numbers:
    """How wide the output of each module is."""
    return tuple(clues.shapes[f"{path}.weight"][0] for path in paths)


# Of the published models, by the size of a patch; and one stride for k and v.
USUAL = {"patch_strides": {7: 4, 3: 2}, "patch_paddings": {7: 2, 3: 1}}
USUAL_KV_STRIDE = 2


def untold(clues: Clues, fields: Mapping[str, Any]) -> Fields:
    """What no shape of the official weights tells: as given, or as in the published models.

    Raises:
        Ask: for a field in which no published model is to be seen.
    """
    patch_sizes: Numbers = fields["patch_sizes"]
    return {
        "num_heads": heads(clues, fields["embed_dims"], fields["depths"]),
        **{field: by_size(field, clues, patch_sizes) for field in USUAL},
        "kv_strides": kv_strides(clues, len(patch_sizes)),
    }


def heads(clues: Clues, dims: Numbers, depths: Numbers) -> Numbers:
    """Heads of each stage of the published model of these widths and depths.

    Raises:
        Ask: if there is none.
    """
    if "num_heads" in clues.given:
        return tuple(clues.given["num_heads"])
    for variant in VARIANTS.values():
        if (variant.embed_dims, variant.depths) == (dims, depths):
            return variant.num_heads
    why = f"no published model has embed_dims={list(dims)} and depths={list(depths)}"
    raise Ask("num_heads", why, f"[{','.join('N' for _ in dims)}]")


def by_size(field: str, clues: Clues, patch_sizes: Numbers) -> Numbers:
    """Strides or paddings of the convolutions that embed patches of these sizes.

    Raises:
        Ask: if no published model has patches of a size.
    """
    if field in clues.given:
        return tuple(clues.given[field])
    usual = USUAL[field]
    if any(size not in usual for size in patch_sizes):
        why = f"no published model has patch_sizes={list(patch_sizes)}"
        raise Ask(field, why, f"[{','.join('N' for _ in patch_sizes)}]")
    return tuple(usual[size] for size in patch_sizes)


def kv_strides(clues: Clues, stages: int) -> Numbers:
    """Strides of the convolutions before k and v."""
    return clues.given.get("kv_strides", (USUAL_KV_STRIDE,) * stages)


def hf_untold(about: Mapping[str, Any], fields: Mapping[str, Any]) -> Fields:
    """What no shape tells, from ``config.json``; what it leaves out is transformers' default.

    Raises:
        InputError: if q has a stride, or the convolutions other zeros around than isovit's.
    """
    number = len(fields["embed_dims"])
    padding = [kernel // 2 for kernel in fields["qkv_kernel_sizes"]]
    told = {key: list(about.get(key, default)) for key, default in HF_DEFAULTS.items()}
    wanted = {"stride_q": [1] * number, "padding_q": padding, "padding_kv": padding}
    for key, value in wanted.items():
        if told[key] != value:
            raise InputError(f"{CONFIG}: {key}={told[key]}; isovit's CvT has {value}")
    return {field: tuple(told[key]) for key, field in HF_FIELDS.items()}


HF_DEFAULTS = {
    "num_heads": (1, 3, 6),
    "patch_stride": (4, 2, 2),
    "patch_padding": (2, 1, 1),
    "stride_kv": (2, 2, 2),
    "stride_q": (1, 1, 1),
    "padding_q": (1, 1, 1),
    "padding_kv": (1, 1, 1),
}
"""Of transformers' CvtConfig, which leaves out of ``config.json`` what is so."""

HF_FIELDS = {
    "num_heads": "num_heads",
    "patch_stride": "patch_strides",
    "patch_padding": "patch_paddings",
    "stride_kv": "kv_strides",
}
"""Their names, and the fields here."""


def cvt_preprocess(clues: Clues) -> Preprocess:
    """The preprocessing that ``preprocessor_config.json`` tells, or the official one.

    The published files name ConvNextImageProcessor, which crops small images and squashes others.
    """
    told = clues.sidecars.get(PROCESSOR, {})
    found, side = hf_preprocess(clues, Preprocess(), HF_VIT), side_of(told.get("size"))
    if told.get("crop_pct") is None or side is None:
        return found
    crops = side < CONVNEXT_SQUASHES
    return msgspec.structs.replace(
        found,
        aspect="keep" if crops else "squash",
        crop_fraction=told["crop_pct"] if crops else 1.0,
    )


CONVNEXT_SQUASHES = 384
"""Side of an image from which on ConvNextImageProcessor does not crop."""


def image_size(processor: Mapping[str, Any]) -> Fields:
    """The image that a processor makes, as a field, if it says so."""
    size = processor.get("crop_size" if processor.get("do_center_crop") else "size")
    if isinstance(size, dict):
        sides = cast("dict[str, Any]", size)
        side = sides.get("shortest_edge")
        size = (sides.get("height", side), sides.get("width", side))
    return {} if size is None else {"image_size": size}


INFER: dict[str, Infer] = {
    "microsoft": infer_microsoft,
    "hf": infer_hf,
    "vit_pytorch": infer_vit_pytorch,
}
