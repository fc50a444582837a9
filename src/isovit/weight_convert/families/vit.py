"""Rename tables of ViT, and its configs read from what is in a file.

Sources: timm 1.0 ``vision_transformer.py`` (Apache-2.0), whose names DeiT, MAE and DINO share;
transformers 5.23 ``modeling_vit.py``, ``modeling_deit.py`` (Apache-2.0); google-research
``vit_jax/models_vit.py``, big_vision ``models/vit.py`` (Apache-2.0); vit-pytorch 1.26.11 ``vit.py``
(MIT).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import msgspec
import numpy as np

from isovit.errors import InputError
from isovit.spec.blocks import TransformerConfig
from isovit.spec.config import Preprocess
from isovit.spec.families.vit import AUGREG, ViTConfig
from isovit.weight_convert.detect import (
    Ask,
    Clues,
    Fields,
    Infer,
    count,
    heads,
    square_side,
)
from isovit.weight_convert.huggingface import one_or_both
from isovit.weight_convert.rename import Drop, RenameTable, Row, drop, fuse, rename, squeeze


def timm(config: ViTConfig) -> RenameTable:
    """Timm's VisionTransformer and VisionTransformerDistilled; DeiT's and DINO's names as well."""
    return RenameTable(*timm_rows(config))


def mae(config: ViTConfig) -> RenameTable:
    """Timm's names, beside those of the decoder."""
    return RenameTable(
        *timm_rows(config), drop(r"decoder_.*|mask_token", "decoder of the pre-training")
    )


def timm_rows(config: ViTConfig) -> list[Row | Drop]:
    """The whole of timm's model."""
    return [
        rename("cls_token", "cls_token"),
        rename("dist_token", "dist_token"),
        rename("pos_embed", "pos_embed"),
        rename("patch_embed.proj", "patch_embed.proj"),
        *block_rows(),
        rename("fc_norm" if config.final_norm == "pooled" else "norm", "norm"),
        rename("pre_logits.fc", "pre_logits"),
        rename("head", "head"),
        rename("head_dist", "head_dist"),
    ]


def hf(config: ViTConfig) -> RenameTable:
    """Hugging Face's ViT, DeiT and encoder of ViTMAE, without the prefix of the model."""
    return RenameTable(
        *hf_rows(config),
        drop(r"embeddings\.mask_token", "of masked image modelling"),
        drop(r"decoder\..*", "decoder of the pre-training"),
    )


def hf_rows(config: ViTConfig) -> list[Row | Drop]:
    """The whole of Hugging Face's model."""
    return [
        rename("embeddings.cls_token", "cls_token"),
        rename("embeddings.distillation_token", "dist_token"),
        rename("embeddings.position_embeddings", "pos_embed"),
        rename("embeddings.patch_embeddings.projection", "patch_embed.proj"),
        *hf_layer_rows("encoder.layer.{i}", "blocks.{i}"),
        rename("layernorm", "norm"),
        rename("cls_classifier" if config.dist_head else "classifier", "head"),
        rename("distillation_classifier", "head_dist"),
        drop(r"pooler\.dense\..*", "no classifier uses the pooler"),
    ]


def hf_layer_rows(layer: str, block: str) -> list[Row]:
    """A block, under its path on either side."""
    return [
        rename(f"{layer}.layernorm_before", f"{block}.norm1"),
        fuse(f"{layer}.attention.attention.{{query|key|value}}", f"{block}.attn.qkv"),
        rename(f"{layer}.attention.output.dense", f"{block}.attn.proj"),
        rename(f"{layer}.layernorm_after", f"{block}.norm2"),
        rename(f"{layer}.intermediate.dense", f"{block}.mlp.fc1"),
        rename(f"{layer}.output.dense", f"{block}.mlp.fc2"),
    ]


def google(config: ViTConfig) -> RenameTable:
    """vit_jax: an npz of flax.linen's parameters."""
    return linen(
        config,
        positions="Transformer.posembed_input.pos_embedding",
        attention="MultiHeadDotProductAttention_1",
        norm2="LayerNorm_2",
        mlp="MlpBlock_3",
    )


def big_vision(config: ViTConfig) -> RenameTable:
    """big_vision: the same model with its submodules numbered otherwise."""
    return linen(
        config,
        positions="pos_embedding",
        attention="MultiHeadDotProductAttention_0",
        norm2="LayerNorm_1",
        mlp="MlpBlock_0",
    )


def linen(config: ViTConfig, positions: str, attention: str, norm2: str, mlp: str) -> RenameTable:
    """Google's ViT: kernels of the attention have an axis of their own for the heads."""
    block, h = "Transformer.encoderblock_{i}", config.num_heads
    return RenameTable(
        rename("cls", "cls_token"),
        rename(positions, "pos_embed"),
        rename("embedding", "patch_embed.proj"),
        rename(f"{block}.LayerNorm_0", "blocks.{i}.norm1"),
        fuse(f"{block}.{attention}.{{query|key|value}}", "blocks.{i}.attn.qkv", heads=h, axis="o"),
        rename(f"{block}.{attention}.out", "blocks.{i}.attn.proj", heads=h, axis="i"),
        rename(f"{block}.{norm2}", "blocks.{i}.norm2"),
        rename(f"{block}.{mlp}.Dense_0", "blocks.{i}.mlp.fc1"),
        rename(f"{block}.{mlp}.Dense_1", "blocks.{i}.mlp.fc2"),
        rename("Transformer.encoder_norm", "norm"),
        rename("pre_logits", "pre_logits"),
        rename("head", "head"),
    )


def vit_pytorch(config: ViTConfig) -> RenameTable:
    """vit-pytorch's ViT; tokens and positions lost their leading axis in release 1.16.1."""
    pooled = config.final_norm == "pooled"  # releases before 1.7.0: LayerNorm as part of the head
    return RenameTable(
        squeeze("cls_token", "cls_token")
        if config.class_token
        else drop(
            "cls_token", "empty: no class token", write=np.zeros((0, config.embed_dim), np.float32)
        ),
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


def hf_config(config: ViTConfig) -> dict[str, Any]:
    """``config.json``, as ViTConfig and DeiTConfig of transformers want it."""
    return {
        **hf_class("DeiT" if config.dist_token else "ViT", config),
        "patch_size": one_or_both(config.patch_size),
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_dim,
        "qkv_bias": config.qkv_bias,
        "hidden_act": {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}[config.activation],
        "layer_norm_eps": config.norm_eps,
        "hidden_dropout_prob": config.dropout_rate,
        "attention_probs_dropout_prob": config.attn_dropout_rate,
    }


def hf_class(kind: str, config: Any) -> dict[str, Any]:
    """The class of a model that may have a second head, and the type of its config."""
    task = "ForImageClassification" if config.num_classes else "Model"
    teacher = "WithTeacher" if config.dist_head else ""
    return {"architectures": [kind + task + teacher], "model_type": kind.lower()}


TABLES: dict[str, Callable[[ViTConfig], RenameTable]] = {
    "timm": timm,
    "deit": timm,
    "mae": mae,
    "dino": timm,
    "hf": hf,
    "google": google,
    "big_vision": big_vision,
    "vit_pytorch": vit_pytorch,
}


def standard_misfits(config: TransformerConfig) -> Iterator[str]:
    """What no library's Transformer has, and what only some configs here do."""
    block = config.block
    if block.attn_scale != block.head_dim**-0.5:
        yield "attn_scale other than 1/√head_dim"
    if config.final_norm == "none":
        yield "final_norm=none"


def common_misfits(config: ViTConfig) -> Iterator[str]:
    """What neither timm's model nor Hugging Face's nor google's can be told to be."""
    yield from standard_misfits(config)
    if config.block.inner_dim != config.embed_dim:
        yield "heads that do not fill embed_dim"
    if not config.attn_proj:
        yield "attn_proj=false"
    if config.pool == "mean" and config.class_token:
        yield "pool=mean over class token and patches"


def timm_misfits(config: ViTConfig) -> Iterator[str]:
    """What timm's model cannot be told to be."""
    yield from common_misfits(config)
    if config.pre_logits_dim is not None:
        yield "pre_logits_dim, which timm had in early releases alone"
    if config.dist_token and not config.dist_head:
        yield "dist_token=true without dist_head=true"
    if config.dist_token and config.pos_embed_tokens != "all":
        yield "pos_embed_tokens=patches beside a distillation token"


def deit_misfits(config: ViTConfig) -> Iterator[str]:
    """What DeiT's model, an early timm's, cannot be told to be."""
    yield from timm_misfits(config)
    if not config.class_token:
        yield "class_token=false"
    if config.pos_embed_tokens != "all" and not config.dist_token:
        yield "pos_embed_tokens=patches"
    if config.layer_scale_init is not None:
        yield "layer_scale_init"


def mae_misfits(config: ViTConfig) -> Iterator[str]:
    """What MAE's and DINO's models cannot be told to be."""
    yield from deit_misfits(config)
    if config.dist_token:
        yield "dist_token=true"


def hf_misfits(config: ViTConfig) -> Iterator[str]:
    """What Hugging Face's model cannot be told to be; its config.json holds the rest."""
    yield from common_misfits(config)
    if not config.class_token:
        yield "class_token=false"
    if config.pos_embed_tokens != "all":
        yield "pos_embed_tokens=patches"
    if config.final_norm != "tokens":
        yield f"final_norm={config.final_norm}"
    if config.pool not in ("cls", "none"):
        yield f"pool={config.pool}"


def google_misfits(config: ViTConfig) -> Iterator[str]:
    """What vit_jax cannot be told to be."""
    yield from common_misfits(config)
    if not config.qkv_bias:
        yield "qkv_bias=false"
    if config.final_norm != "tokens":
        yield f"final_norm={config.final_norm}"
    if config.class_token and config.pool != "cls":
        yield f"pool={config.pool} beside a class token"
    if config.pos_embed_tokens != "all":
        yield "pos_embed_tokens=patches (format big_vision has it)"


def big_vision_misfits(config: ViTConfig) -> Iterator[str]:
    """What big_vision cannot be told to be."""
    yield from common_misfits(config)
    if not config.qkv_bias:
        yield "qkv_bias=false"
    if config.final_norm != "tokens":
        yield f"final_norm={config.final_norm}"
    if config.class_token and config.pool != "cls":
        yield f"pool={config.pool} beside a class token"
    if config.class_token and config.pos_embed_tokens != "patches":
        yield "a position for the class token (format google has it)"


def transformer_misfits(config: TransformerConfig) -> Iterator[str]:
    """What vit-pytorch's Transformer cannot be told to be."""
    yield from standard_misfits(config)
    if config.qkv_bias:
        yield "qkv_bias=true"
    as_wide = config.num_heads == 1 and config.block.head_dim == config.embed_dim
    if config.attn_proj == as_wide:
        yield "attn_proj=true for one head as wide as the tokens" if as_wide else "attn_proj=false"


def vit_pytorch_misfits(config: ViTConfig) -> Iterator[str]:
    """What vit-pytorch's ViT cannot be told to be."""
    yield from transformer_misfits(config)
    if config.patch_embed != "norm_linear_norm":
        yield f"patch_embed={config.patch_embed}"
    if config.final_norm == "pooled":
        yield "final_norm=pooled, which it had before release 1.7.0"
    if config.class_token and config.pos_embed_tokens != "all":
        yield "pos_embed_tokens=patches"
    if config.class_token and config.pool.startswith("mean"):
        yield f"pool={config.pool} beside a class token"


MISFITS: dict[str, Callable[[ViTConfig], Iterator[str]]] = {
    "hf": hf_misfits,
    "google": google_misfits,
    "big_vision": big_vision_misfits,
    "vit_pytorch": vit_pytorch_misfits,
    "dino": mae_misfits,
    "mae": mae_misfits,
    "deit": deit_misfits,
    "timm": timm_misfits,
}


def infer_timm(clues: Clues) -> Fields | None:
    """timm: a 4-D patch embedding beside fused qkv."""
    shapes = clues.shapes
    kernel = shapes.get("patch_embed.proj.weight", ())
    if len(kernel) != 4 or "pos_embed" not in shapes:
        return None
    dim, in_channels, *patch_size = kernel
    class_token, dist_token = "cls_token" in shapes, "dist_token" in shapes
    prefix, positions = class_token + dist_token, shapes["pos_embed"][1]
    of_patches = class_token and patches_alone(positions, prefix, patch_size, clues.given)
    depth = count(shapes, "blocks.{}.norm1.weight")
    pooled = "fc_norm.weight" in shapes
    fields: Fields = {
        "patch_size": tuple(patch_size),
        "in_channels": in_channels,
        "embed_dim": dim,
        "depth": depth,
        "num_heads": heads(clues, dim, depth),
        "mlp_dim": shapes.get("blocks.0.mlp.fc1.weight", (4 * dim,))[0],
        "qkv_bias": depth == 0 or "blocks.0.attn.qkv.bias" in shapes,
        "layer_scale_init": 1e-5 if "blocks.0.ls1.gamma" in shapes else None,
        "class_token": class_token,
        "dist_token": dist_token,
        "dist_head": "head_dist.weight" in shapes,
        "pos_embed_tokens": "patches" if of_patches else "all",
        "final_norm": "pooled" if pooled else "tokens" if "norm.weight" in shapes else "none",
        "pool": "mean_patches" if pooled or not class_token else "cls",
        "pre_logits_dim": shapes.get("pre_logits.fc.weight", (None,))[0],
        "num_classes": shapes.get("head.weight", (0,))[0],
    }
    side = square_side(positions - (0 if of_patches else prefix), clues.given, patch_size[0])
    if side is not None:
        fields["image_size"] = (side * patch_size[0], side * patch_size[1])
    usual = Preprocess(crop_fraction=0.9) if dist_token else AUGREG
    return {**fields, **statistics(in_channels, timm_preprocess(clues, usual))}


def patches_alone(
    positions: int, prefix: int, patch_size: Sequence[int], given: Mapping[str, Any]
) -> bool:
    """Whether the tokens before the patches have no positions (timm's ``no_embed_class``).

    If the caller does not say, nor how large the image is, the number of patches is a square.
    """
    if "pos_embed_tokens" in given:
        return given["pos_embed_tokens"] == "patches"
    if "image_size" in given:
        size = given["image_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return positions == (height // patch_size[0]) * (width // patch_size[1])
    return is_square(positions) and not is_square(positions - prefix)


def timm_preprocess(clues: Clues, usual: Preprocess) -> Preprocess:
    """The preprocessing that timm's ``config.json`` tells, or the usual one."""
    told = clues.sidecars.get("config.json", {}).get("pretrained_cfg")
    if not isinstance(told, dict):
        return usual
    told = cast("dict[str, Any]", told)
    names = {"crop_fraction": "crop_pct", "interpolation": "interpolation"}
    names |= {"mean": "mean", "std": "std"}
    said = {field: told[name] for field, name in names.items() if name in told}
    return preprocess_from({**msgspec.structs.asdict(usual), **said})


def preprocess_from(fields: Mapping[str, Any]) -> Preprocess:
    """Preprocessing from what a file says.

    Raises:
        InputError: if it is none.
    """
    try:
        return msgspec.convert(fields, Preprocess)
    except msgspec.ValidationError as error:
        raise InputError(f"the preprocessing that the file tells is none: {error}") from None


def infer_dino(clues: Clues) -> Fields | None:
    """DINO: a teacher or a student behind ``backbone.``; or, as released, bare and headless."""
    training = clues.wrapper in ("teacher", "student", "backbone")
    released = clues.container in (".pth", ".pt") and not clues.wrapper and headless(clues)
    return usual_statistics(clues, "dino", training or released)


def infer_mae(clues: Clues) -> Fields | None:
    """MAE: encoder without a head, maybe its decoder; or fine-tuned, with the mean normalised."""
    under_model = clues.wrapper == "model" and (headless(clues) or "fc_norm.weight" in clues.shapes)
    return usual_statistics(clues, "mae", under_model or "mask_token" in clues.shapes)


def infer_deit(clues: Clues) -> Fields | None:
    """DeiT: under ``model``, and while it trains their averages under ``model_ema``."""
    return usual_statistics(clues, "deit", clues.wrapper in ("model", "model_ema"))


def headless(clues: Clues) -> bool:
    """Whether there is no head."""
    return "head.weight" not in clues.shapes


def usual_statistics(clues: Clues, format: str, looks_so: bool) -> Fields | None:
    """The config of timm's names with the preprocessing of the ImageNet evaluations."""
    if not (looks_so or clues.format == format) or (fields := infer_timm(clues)) is None:
        return None
    return {**fields, **statistics(fields["in_channels"], Preprocess())}


def infer_hf(clues: Clues) -> Fields | None:
    """Hugging Face: sizes from the shapes, the rest from ``config.json`` where there is one."""
    shapes, about = clues.shapes, clues.sidecars.get("config.json", {})
    kernel = shapes.get("embeddings.patch_embeddings.projection.weight", ())
    if len(kernel) != 4 or "embeddings.position_embeddings" not in shapes:
        return None
    dim, in_channels, *patch_size = kernel
    depth = count(shapes, "encoder.layer.{}.layernorm_before.weight")
    dist_token = "embeddings.distillation_token" in shapes
    head = next((n for n in ("classifier.weight", "cls_classifier.weight") if n in shapes), "")
    activation = about.get("hidden_act", "gelu")
    if activation not in HF_ACTIVATIONS:
        raise InputError(f"hidden_act {activation!r} is none of {', '.join(HF_ACTIVATIONS)}")
    fields: Fields = {
        "patch_size": tuple(patch_size),
        "in_channels": in_channels,
        "embed_dim": dim,
        "depth": depth,
        "num_heads": about.get("num_attention_heads") or heads(clues, dim, depth),
        "mlp_dim": shapes.get("encoder.layer.0.intermediate.dense.weight", (4 * dim,))[0],
        "qkv_bias": depth == 0 or "encoder.layer.0.attention.attention.query.bias" in shapes,
        "activation": HF_ACTIVATIONS[activation],
        "norm_eps": about.get("layer_norm_eps", 1e-12),
        "dist_token": dist_token,
        "dist_head": "distillation_classifier.weight" in shapes,
        "num_classes": shapes.get(head, (0,))[0],
    }
    side = square_side(
        shapes["embeddings.position_embeddings"][1] - 1 - dist_token,
        {**about, **clues.given},
        patch_size[0],
    )
    if side is not None:
        fields["image_size"] = (side * patch_size[0], side * patch_size[1])
    elif "image_size" in about:
        fields["image_size"] = about["image_size"]
    usual = hf_usual(clues, dist_token)
    return {**fields, **statistics(in_channels, hf_preprocess(clues, usual, HF_VIT))}


HF_ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
"""Their names of activations, and the fields here."""

PILLOW_FILTERS = {2: "bilinear", 3: "bicubic"}
"""Numbers of Pillow's resampling filters."""


def hf_usual(clues: Clues, dist_token: bool) -> Preprocess:
    """The preprocessing of the library's default."""
    if dist_token:  # DeiTImageProcessor
        return Preprocess(aspect="squash")
    if clues.sidecars.get("config.json", {}).get("model_type") == "vit_mae":
        return Preprocess(aspect="squash", crop_fraction=1.0, interpolation="bilinear")
    return HF_VIT


def hf_preprocess(clues: Clues, usual: Preprocess, unsaid: Preprocess) -> Preprocess:
    """The preprocessing that ``preprocessor_config.json`` tells.

    Args:
        clues: with the file, or without.
        usual: where there is none.
        unsaid: what it does not tell of a field.
    """
    told = clues.sidecars.get("preprocessor_config.json", {})
    if not told:
        return usual
    fields: Fields = {}
    for theirs, field in (("image_mean", "mean"), ("image_std", "std")):
        if theirs in told:
            fields[field] = told[theirs]
    if (number := told.get("resample")) is not None:
        if number not in PILLOW_FILTERS:
            raise InputError(f"resample {number} of the preprocessing is none of 2 and 3")
        fields["interpolation"] = PILLOW_FILTERS[number]
    resized, cropped = side_of(told.get("size")), side_of(told.get("crop_size"))
    if told.get("do_center_crop") and resized and cropped:
        fields["crop_fraction"] = cropped / resized
    size = told.get("size")
    if isinstance(size, dict) and "shortest_edge" in size:
        fields["aspect"] = "keep"
    return preprocess_from({**msgspec.structs.asdict(unsaid), **fields})


def side_of(size: Any) -> float | None:
    """The height that ``size`` or ``crop_size`` tells, in one of the forms it has had."""
    if isinstance(size, dict):
        sides = cast("dict[str, Any]", size)
        size = sides.get("height", sides.get("shortest_edge"))
    return size if isinstance(size, int | float) and size > 0 else None


HALF = (0.5, 0.5, 0.5)
HF_VIT = Preprocess(
    crop_fraction=1.0, interpolation="bilinear", aspect="squash", mean=HALF, std=HALF
)
"""The default of Hugging Face's ViTImageProcessor, and how vit_jax evaluates."""


def infer_google(clues: Clues) -> Fields | None:
    """vit_jax: kernels whose shapes tell the heads."""
    positions = "Transformer.posembed_input.pos_embedding"
    return infer_linen(clues, positions, "MultiHeadDotProductAttention_1", "MlpBlock_3")


def infer_big_vision(clues: Clues) -> Fields | None:
    """big_vision: positions at the root, for the patches alone."""
    if any(name.startswith("MAPHead_0.") for name in clues.shapes):
        raise InputError("it pools by attention (MAPHead_0), which isovit's ViT does not have")
    return infer_linen(clues, "pos_embedding", "MultiHeadDotProductAttention_0", "MlpBlock_0")


def infer_linen(clues: Clues, positions: str, attention: str, mlp: str) -> Fields | None:
    """A ViT of google's from the names of its parts."""
    shapes = clues.shapes
    kernel = shapes.get("embedding.kernel", ())
    if len(kernel) != 4 or positions not in shapes:
        return None
    *patch_size, in_channels, dim = kernel
    class_token, of_patches = "cls" in shapes, positions == "pos_embedding"
    depth = count(shapes, "Transformer.encoderblock_{}.LayerNorm_0.scale")
    block = "Transformer.encoderblock_0"
    query = shapes.get(f"{block}.{attention}.query.kernel")
    fields: Fields = {
        "patch_size": tuple(patch_size),
        "in_channels": in_channels,
        "embed_dim": dim,
        "depth": depth,
        "num_heads": query[1] if query else 1,
        "mlp_dim": shapes.get(f"{block}.{mlp}.Dense_0.kernel", (dim, 4 * dim))[1],
        "activation": "gelu_tanh",
        "class_token": class_token,
        "pos_embed_tokens": "patches" if class_token and of_patches else "all",
        "pool": "cls" if class_token else "mean_patches",
        "pre_logits_dim": shapes.get("pre_logits.kernel", (dim, None))[1],
        "num_classes": shapes.get("head.kernel", (dim, 0))[1],
        "init_scheme": "vit_jax",
    }
    side = square_side(
        shapes[positions][1] - int(class_token and not of_patches), clues.given, patch_size[0]
    )
    if side is not None:
        fields["image_size"] = (side * patch_size[0], side * patch_size[1])
    return {**fields, **statistics(in_channels, HF_VIT)}


def is_square(number: int) -> bool:
    """Whether a number of patches makes a square grid."""
    return number > 0 and math.isqrt(number) ** 2 == number


def infer_vit_pytorch(clues: Clues) -> Fields | None:
    """vit-pytorch: a dense patch embedding between two LayerNorms."""
    shapes, given = clues.shapes, clues.given
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


def vit_pytorch_heads(
    shapes: Mapping[str, tuple[int, ...]], dim: int, given: Mapping[str, Any]
) -> Fields:
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


# What vit-pytorch's Transformer has of its own.
VIT_PYTORCH: Fields = {
    "qkv_bias": False,
    "norm_eps": 1e-5,
    "init_scheme": "vit_pytorch",
}

# The particular before the general: DINO, MAE and DeiT have timm's names.
INFER: dict[str, Infer] = {
    "hf": infer_hf,
    "google": infer_google,
    "big_vision": infer_big_vision,
    "vit_pytorch": infer_vit_pytorch,
    "dino": infer_dino,
    "mae": infer_mae,
    "deit": infer_deit,
    "timm": infer_timm,
}
