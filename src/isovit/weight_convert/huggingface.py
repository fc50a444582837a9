"""Folders as Hugging Face keeps them: ``config.json``, and weights in one file or in shards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from isovit.backends.torch.layout import COUNTER
from isovit.backends.torch.layout import LAYOUT as TORCH
from isovit.errors import InputError
from isovit.spec.config import BaseConfig, Config
from isovit.spec.families import home
from isovit.spec.param import Role
from isovit.weight_convert import files
from isovit.weight_convert.tensors import Spec, Tensors, check_number
from isovit.weight_convert.unwrap import state_dict

CONFIG = "config.json"
PROCESSOR = "preprocessor_config.json"
WEIGHTS = "model.safetensors"
VAR = TORCH[Role.NORM_VAR].name
CANDIDATES = (WEIGHTS, "pytorch_model.bin", "model.pth", "pytorch_model.pth")


class _Index(msgspec.Struct):
    """``model.safetensors.index.json``: the file of every tensor."""

    weight_map: dict[str, str]


def is_folder(path: Path) -> bool:
    """Whether a folder holds weights as Hugging Face keeps them."""
    return find_weights(path) is not None


def find_weights(path: Path) -> Path | None:
    """The weights of a folder, or the index of their shards."""
    names = (*CANDIDATES, *(f"{name}.index.json" for name in CANDIDATES))
    return next((path / name for name in names if (path / name).is_file()), None)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file; empty if there is none.

    Raises:
        InputError: if it is no JSON object.
    """
    if not path.exists():
        return {}
    text = files.read_text(path)
    with files.reading(path, "a JSON file"):
        return msgspec.json.decode(text, type=dict[str, Any])


def read_weights(path: Path) -> Tensors:
    """The tensors of a folder, whatever they are kept in.

    Raises:
        InputError: if there are none, a shard is missing, or does not hold what the index says.
    """
    found = find_weights(path)
    if found is None:
        raise InputError(f"{path}: holds none of {', '.join(CANDIDATES)}")
    if not found.name.endswith(".index.json"):
        return _read_file(found)
    text = files.read_text(found)
    with files.reading(found, "an index of shards"):
        index = msgspec.json.decode(text, type=_Index).weight_map
        check_number(len(index))
    shards: dict[str, Tensors] = {}
    for name in sorted(set(index.values())):
        if Path(name).name != name:  # the index may come from anybody
            raise InputError(f"{found}: wanted the name of a shard beside it, got {name!r}")
        shards[name] = _read_file(path / name)
    for tensor, name in index.items():
        if tensor not in shards[name]:
            raise InputError(f"{found}: says that {tensor} is in {name}, where it is not")
    specs = {tensor: shards[name].specs[tensor] for tensor, name in index.items()}
    return Tensors(specs, lambda tensor: shards[index[tensor]][tensor])


def _read_file(path: Path) -> Tensors:
    if path.suffix == ".safetensors":
        return files.read_safetensors(path)[0]
    return files.torch_tensors(path, state_dict(files.read_pth(path), ema=True)[1])


def prefixed(config: BaseConfig, tensors: Tensors) -> Tensors:
    """The names of the rename table as the models with a head write them: behind the backbone's.

    A table that has them so keeps them.
    """
    if not isinstance(config, Config):  # ViTMAE as it is trained
        return tensors.renamed({n if "decoder." in n else f"vit.{n}": n for n in tensors})
    prefix = model_config(config)["model_type"]
    if not config.num_classes or any(name.startswith(f"{prefix}.") for name in tensors):
        return tensors
    return tensors.renamed({n if "classifier" in n else f"{prefix}.{n}": n for n in tensors})


def counted(tensors: Tensors) -> Tensors:
    """With the number of batches that each BatchNorm has seen, which transformers misses else."""
    norms = [name.removesuffix(VAR) for name in tensors if name.endswith(VAR)]
    counters = {f"{norm}{COUNTER}": np.zeros((), np.int64) for norm in norms}
    specs = {name: Spec(array.shape, array.dtype) for name, array in counters.items()}
    return Tensors(
        {**tensors.specs, **specs},
        lambda name: counters[name] if name in counters else tensors[name],
    )


def sidecars(config: BaseConfig) -> dict[str, dict[str, Any]]:
    """``config.json`` of a model, and ``preprocessor_config.json`` where a processor does it."""
    told = {CONFIG: model_config(config)}
    if processor := image_processor(config):
        told[PROCESSOR] = processor
    return told


def model_config(config: BaseConfig) -> dict[str, Any]:
    """``config.json``: what any config of transformers wants, and what the family's own does."""
    family, model = import_module(f"isovit.weight_convert.{home(config.family)}"), within(config)
    labels = {str(i): f"LABEL_{i}" for i in range(model.num_classes)}
    return {
        **family.hf_config(config),
        "image_size": one_or_both(model.image_size),
        "num_channels": model.in_channels,
        "id2label": labels,
        "label2id": {label: int(i) for i, label in labels.items()},
    }


def image_processor(config: BaseConfig) -> dict[str, Any] | None:
    """What an image processor of transformers wants; None where none does the same.

    ViTImageProcessor squashes and crops nothing, DeiTImageProcessor squashes and crops, and
    CLIPImageProcessor keeps the aspect of the image and crops, to a square.
    """
    preprocess, (height, width) = within(config).preprocess, within(config).image_size
    resized = [math.floor(side / preprocess.crop_fraction) for side in (height, width)]
    told: dict[str, Any] = {
        "do_resize": True,
        "resample": {"bilinear": 2, "bicubic": 3}[preprocess.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": preprocess.mean,
        "image_std": preprocess.std,
        "size": {"height": resized[0], "width": resized[1]},
    }
    crop = {"do_center_crop": True, "crop_size": {"height": height, "width": width}}
    if preprocess.aspect == "squash":
        if preprocess.crop_fraction == 1:
            return {"image_processor_type": "ViTImageProcessor", **told}
        return {"image_processor_type": "DeiTImageProcessor", **told, **crop}
    if height != width:
        return None
    told["size"] = {"shortest_edge": resized[0]}
    return {"image_processor_type": "CLIPImageProcessor", **told, **crop}


def within(config: BaseConfig) -> Config:
    """The model itself, or of an objective the first that it trains."""
    return config if isinstance(config, Config) else next(iter(config.parts.values()))


def one_or_both(pair: tuple[int, int]) -> int | tuple[int, int]:
    """One number for a square."""
    return pair[0] if pair[0] == pair[1] else pair


def write_folder(
    path: Path, tensors: Tensors, sidecars: Mapping[str, Any], header: str, track: files.Track
) -> None:
    """Write a folder that ``from_pretrained`` reads, all or nothing.

    Args:
        path: of the folder.
        tensors: under Hugging Face's names.
        sidecars: JSON files by name, ``config.json`` for one.
        header: isovit's own, by which it knows the folder again.
        track: shows the progress.
    """
    with files.replacing(path, folder=True) as temporary:
        temporary.mkdir()
        for name, content in sidecars.items():
            text = msgspec.json.format(msgspec.json.encode(content), indent=2)
            (temporary / name).write_bytes(text)
        metadata = {"format": "pt"}  # without it from_pretrained refuses the file
        files.write_safetensors(temporary / WEIGHTS, tensors, metadata, track)
        (temporary / files.FOLDER_MARK).write_text(header, encoding="utf-8")
