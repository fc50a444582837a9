"""What training code puts around the weights, taken off: wrappers, prefixes, older names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

from isovit.errors import InputError
from isovit.weight_convert.tensors import Spec, Tensors, check_number, renaming

AVERAGED = ("state_dict_ema", "model_ema", "teacher")
PLAIN = ("state_dict", "model", "net", "student")
"""Keys under which training code keeps weights: moving averages of them, and the last ones."""

HF_STEMS = (
    "embeddings.patch_embeddings.projection.weight",
    "patch_embeddings.embedding_layer_1.convolution.weight",
)
"""By which the models of Hugging Face are known: ViT, DeiT, ViTMAE; LeViT."""

# Names of Hugging Face's ViT in memory since release 5, and the names that all releases write.
HF_RENAMED = [
    (r"^layers\.(\d+)\.attention\.q_proj\.", r"encoder.layer.\1.attention.attention.query."),
    (r"^layers\.(\d+)\.attention\.k_proj\.", r"encoder.layer.\1.attention.attention.key."),
    (r"^layers\.(\d+)\.attention\.v_proj\.", r"encoder.layer.\1.attention.attention.value."),
    (r"^layers\.(\d+)\.attention\.o_proj\.", r"encoder.layer.\1.attention.output.dense."),
    (r"^layers\.(\d+)\.mlp\.fc1\.", r"encoder.layer.\1.intermediate.dense."),
    (r"^layers\.(\d+)\.mlp\.fc2\.", r"encoder.layer.\1.output.dense."),
    (r"^layers\.(\d+)\.", r"encoder.layer.\1."),
]
# The same of the decoder of ViTMAE, which release 5 writes as ``decoder_encoder.layer``.
HF_DECODER_RENAMED = [
    (old.replace("^layers", "^decoder_layers"), new.replace("encoder.layer", "decoder_layers"))
    for old, new in HF_RENAMED
]


OWN_BACKBONE = "conv_embedding.0.weight"
"""Beside it, in vit-pytorch's LeViT, ``backbone.`` is a part of the model itself."""


class Content(NamedTuple):
    """The weights of a file, and what was around them.

    Attributes:
        tensors: under the names that the rename tables know.
        wrapper: the key under which they lay; ``""`` if there was none.
        notes: what was left out, a line each.
    """

    tensors: Tensors
    wrapper: str = ""
    notes: tuple[str, ...] = ()


def state_dict(content: Mapping[str, Any], ema: bool) -> tuple[str, Mapping[str, Any]]:
    """The state dict in what ``torch.save`` wrote, and its key.

    Args:
        content: a state dict, or a dict that holds one or several.
        ema: whether an averaged one goes before the last one.

    Raises:
        InputError: if averages are not wanted, but all there is.
    """
    found = [key for key in (*AVERAGED, *PLAIN) if isinstance(content.get(key), Mapping)]
    if not found:
        return "", content
    wanted = [key for key in found if (key in AVERAGED) == ema] or found
    if not ema and wanted[0] in AVERAGED:
        raise InputError(f"holds averaged weights alone, under {wanted[0]!r}; leave out --no-ema")
    return wanted[0], content[wanted[0]]


def together(content: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any] | None:
    """State dicts under several keys as one, each name behind its key; None unless all are there.

    Args:
        content: what ``torch.save`` wrote.
        keys: of the state dicts; none where a model is kept in one.
    """
    parts = {key: content.get(key) for key in keys}
    if not parts or not all(isinstance(part, Mapping) for part in parts.values()):
        return None
    found: dict[str, Any] = {}
    for key, part in parts.items():
        named = {str(name): value for name, value in cast("Mapping[Any, Any]", part).items()}
        prefix = "module." if all(name.startswith("module.") for name in named) else ""
        found |= {f"{key}.{name.removeprefix(prefix)}": value for name, value in named.items()}
    return found


def unwrap(tensors: Tensors, wrapper: str = "") -> Content:
    """Take off prefixes, and bring names that changed between releases to one form."""
    names = {name: name for name in tensors}
    for prefix in ("module.", "_orig_mod."):  # DataParallel, torch.compile
        if all(name.startswith(prefix) for name in names):
            names = {name.removeprefix(prefix): old for name, old in names.items()}
    notes: list[str] = []
    for prefix, rest in [
        ("opt.target.", "state of the optimizer"),
        ("params.", "state of the training"),
        ("img.", "parts of the model beside the image tower"),
        ("backbone.", "projection head of the training"),
    ]:
        if prefix == "backbone." and OWN_BACKBONE in names:
            continue
        inside = {n.removeprefix(prefix): old for n, old in names.items() if n.startswith(prefix)}
        if inside:
            wrapper = wrapper or prefix.rstrip(".")
            if left := len(names) - len(inside):
                notes.append(f"left out: {left} tensors outside {prefix}*, {rest}")
            names = inside
    if any(name.endswith(HF_STEMS) for name in names):
        names = {new: names[name] for new, name in renaming(names, _hf_name).items()}
    return Content(_unstacked(tensors.renamed(names)), wrapper, tuple(notes))


def _hf_name(name: str) -> str:
    """Without the model's prefix, and as all releases write it."""
    name = re.sub(r"^(vit|deit|levit)\.", "", name)
    decoder = "decoder." if name.startswith("decoder.") else ""
    name = name.removeprefix(decoder)
    name = re.sub(r"^decoder_encoder\.layer\.", "decoder_layers.", name)
    for pattern, replacement in HF_DECODER_RENAMED if decoder else HF_RENAMED:
        name, count = re.subn(pattern, replacement, name)
        if count:
            break
    return decoder + name


def _unstacked(tensors: Tensors) -> Tensors:
    """Big_vision may keep all blocks in one, along a leading axis: each by its own name."""
    stack = "Transformer.encoderblock."
    inside = [name for name in tensors if name.startswith(stack)]
    if not inside:
        return tensors
    specs = {name: spec for name, spec in tensors.specs.items() if name not in inside}
    places: dict[str, tuple[str, int]] = {}
    for name in inside:
        (depth, *shape), dtype = tensors.specs[name]
        check_number(depth)
        for i in range(depth):
            block = f"Transformer.encoderblock_{i}.{name.removeprefix(stack)}"
            specs[block], places[block] = Spec(tuple(shape), dtype), (name, i)

    def fetch(name: str) -> Any:
        if name not in places:
            return tensors[name]
        stacked, i = places[name]
        return tensors[stacked][i]

    return Tensors(specs, fetch)
