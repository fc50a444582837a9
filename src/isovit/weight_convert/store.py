"""Loading, saving and inspecting checkpoints of any format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np

from isovit.backends import get_backend
from isovit.backends.protocol import NativeFiles
from isovit.errors import FitError
from isovit.spec.config import BaseConfig
from isovit.spec.families import param_tree, resolve_config, variant_name
from isovit.weight_convert import files, huggingface
from isovit.weight_convert.adapt import adapt
from isovit.weight_convert.checkpoint import Checkpoint, Source
from isovit.weight_convert.checkpoint import part as take_part
from isovit.weight_convert.formats import (
    FORMATS,
    HEADER_KEY,
    check_fit,
    check_target,
    suffix_of,
    table,
)
from isovit.weight_convert.opening import Wanted, open_file
from isovit.weight_convert.tensors import Tensors


def load(
    path: str | Path,
    *,
    config: BaseConfig | None = None,
    format: str | None = None,
    changes: Mapping[str, Any] | None = None,
    ema: bool = True,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    resize: str | None = None,
    part: str | None = None,
) -> Checkpoint:
    """Read a checkpoint.

    Args:
        path: a file, or a folder of orbax or Hugging Face.
        config: of the model; None to take what the file says, or what its names and shapes show.
        format: a name in ``FORMATS``; None to find it out.
        changes: fields of the config that differ from that, nested ones by dotted name.
        ema: whether the averaged weights are taken where a training file has both.
        num_classes: width of the head wanted; if the file's differs, a new head is drawn.
        image_size: height and width wanted, in pixels; positions are resized to its grid.
        resize: how, a name in ``weight_convert.resize.METHODS``, or ``recompute`` for the fixed
            table of T2T-ViT; None for what the format's own library does.
        part: name of the model within it to take alone, as ``checkpoint.part`` does; classes, size
            and the config returned are its own.

    Returns:
        Canonical weights in the dtype of the file, with config and source.

    Raises:
        InputError: if the file cannot be read, is of no known format, or does not fit; or if its
            config has a field that neither the file nor the caller tells.
    """
    checkpoint = opened(
        path,
        config=config,
        format=format,
        changes=changes,
        ema=ema,
        num_classes=num_classes,
        image_size=image_size,
        resize=resize,
        part=part,
    )
    weights = {name: np.array(array) for name, array in checkpoint.weights.items()}
    return replace(checkpoint, weights=weights)


def opened(
    path: str | Path,
    *,
    config: BaseConfig | None = None,
    format: str | None = None,
    changes: Mapping[str, Any] | None = None,
    ema: bool = True,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    resize: str | None = None,
    part: str | None = None,
) -> Checkpoint:
    """As ``load``, but the weights are read from the file one by one, when asked for."""
    path = Path(path)
    found = open_file(path, Wanted(config, format, changes or {}, ema))
    weights, notes = found.canonical(), (*found.notes, *found.dropped())
    checkpoint = Checkpoint(found.config, weights, Source(str(path), found.format, notes))
    checkpoint = take_part(checkpoint, part) if part else checkpoint
    method = resize or FORMATS[found.format].resize
    return adapt(checkpoint, num_classes=num_classes, image_size=image_size, resize=method)


def save(
    checkpoint: Checkpoint,
    path: str | Path,
    format: str | None = None,
    track: files.Track = iter,
) -> tuple[str, ...]:
    """Write a checkpoint, all or nothing.

    Args:
        checkpoint: what to write.
        path: target; its suffix decides the container.
        format: a name in ``FORMATS``; None for the suffix's own.
        track: passes the names of the tensors through as they are written; a progress bar, say.

    Returns:
        What a user of the file should know, a line each.

    Raises:
        InputError: if the format has no such suffix or no place for the model, or if the target
            cannot be written.
    """
    path = Path(path)
    name, suffix = check_target(path, format), suffix_of(path)
    config, weights = checkpoint.config, Tensors.of(checkpoint.weights)
    check_fit(name, config)
    header = _header(name, config)
    if name == "keras":
        with files.replacing(path) as temporary:
            _runtime("keras").save_native(config, weights, temporary)
            files.write_keras_header(temporary, HEADER_KEY, header)
        return ()
    if name == "flax" and suffix == "":
        with files.replacing(path, folder=True) as temporary:
            _runtime("flax").save_native(config, weights, temporary)
            (temporary / files.FOLDER_MARK).write_text(header, encoding="utf-8")
        return ()
    arrays = table(name, config).write(
        param_tree(config).parameters(), weights, FORMATS[name].layout
    )
    if name == "hf":
        arrays = huggingface.counted(huggingface.prefixed(config, arrays))
    if suffix == "":
        sidecars = huggingface.sidecars(config)
        huggingface.write_folder(path, arrays, sidecars, header, track)
    elif suffix == ".safetensors":
        metadata = {HEADER_KEY: header}
        files.write_safetensors(path, arrays, metadata, track)
    elif suffix == ".npz":
        named = arrays.renamed({key.replace(".", "/"): key for key in arrays})
        files.write_npz(path, named, header, track)
    else:
        wrapper = FORMATS[name].wrapper
        files.write_pth(path, arrays, wrapper, {HEADER_KEY: header}, track)
    return tuple(_differences(name, config))


def file_bytes(checkpoint: Checkpoint) -> int:
    """Size of a checkpoint's canonical file, which is not written for that."""
    config, weights = checkpoint.config, Tensors.of(checkpoint.weights)
    metadata = {HEADER_KEY: _header("isovit", config)}
    return files.safetensors_bytes(weights, metadata)


def _header(format: str, config: BaseConfig) -> str:
    return msgspec.json.encode({"format": format, "config": config.to_dict()}).decode()


def _differences(name: str, config: BaseConfig) -> Iterator[str]:
    """Where the function of the config is not what the format's library makes of the weights."""
    for field, fixed in FORMATS[name].fixed:
        if (said := getattr(config, field, fixed)) != fixed:
            yield f"{name} computes with {field}={fixed} of its own; these weights want {said}"


@dataclass(frozen=True)
class Inspection:
    """What a file holds.

    Attributes:
        format: as in ``FORMATS``.
        config: of its model.
        variant: the published variant with that config, but for classes and preprocessing.
        tensors: number of arrays.
        parameters: number of numbers in them.
        dtypes: of the arrays.
        problems: what is missing, unexpected or misshaped, a line each.
        notes: what was left out, a line each.
    """

    format: str
    config: BaseConfig
    variant: str | None
    tensors: int
    parameters: int
    dtypes: tuple[str, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]


def inspect(
    path: str | Path,
    *,
    config: BaseConfig | None = None,
    format: str | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Inspection:
    """Tell what a checkpoint is, from names and shapes; see ``load`` for arguments and errors."""
    found = open_file(Path(path), Wanted(config, format, changes or {}))
    problems: tuple[str, ...] = ()
    try:
        found.canonical()
    except FitError as error:
        problems = error.problems
    specs = found.arrays.specs.values()
    return Inspection(
        format=found.format,
        config=found.config,
        variant=variant_name(found.config),
        tensors=len(specs),
        parameters=sum(spec.size for spec in specs),
        dtypes=tuple(sorted({spec.dtype.name for spec in specs})),
        problems=problems,
        notes=(*found.notes, *found.dropped()),
    )


def checkpoint_of(name: str, changes: dict[str, Any], seed: int = 0) -> Checkpoint:
    """A checkpoint from a file, or a model by name with the weights of a seed.

    Args:
        name: a variant, a config file, or a checkpoint.
        changes: fields to change; for a checkpoint, in its config.
        seed: of the weights of a model by name.
    """
    from isovit.spec.initialize import init

    if names_file(name):
        return load(name, changes=changes)
    config = resolve_config(name, changes)
    return Checkpoint(config, init(config, seed))


def names_file(name: str) -> bool:
    """Whether MODEL_OR_FILE names a checkpoint rather than a variant or a config file."""
    path = Path(name)
    if path.suffix in (".json", ".toml"):
        return False
    return path.exists() or bool(path.suffix) or "/" in name


def _runtime(backend: str) -> NativeFiles:
    return cast("NativeFiles", get_backend(backend))
