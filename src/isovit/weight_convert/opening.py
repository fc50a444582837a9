"""From a path to arrays under the file's own names, with format and config: said, or found out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import msgspec

from isovit.backends import get_backend, require_installed
from isovit.backends.protocol import NativeFiles
from isovit.errors import InputError
from isovit.spec.config import Config, config_from_dict
from isovit.spec.families import param_tree
from isovit.weight_convert import files, huggingface
from isovit.weight_convert.detect import Clues, detect
from isovit.weight_convert.formats import FORMATS, HEADER_KEY, suffix_of, table
from isovit.weight_convert.rename import RenameTable
from isovit.weight_convert.tensors import Tensors
from isovit.weight_convert.unwrap import state_dict, unwrap


@dataclass(frozen=True)
class Wanted:
    """What the caller of ``load`` knows about a file.

    Attributes:
        config: of the model; None to take what the file says or shows.
        format: a name in ``FORMATS``; None to take what the file says or shows.
        changes: fields of the config that differ from what the file says or shows.
        ema: whether the averaged weights are taken where a training file has both.
    """

    config: Config | None = None
    format: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict[str, Any])
    ema: bool = True


@dataclass(frozen=True)
class Opened:
    """A file's arrays under its own names, its config, its format, and what was left out."""

    arrays: Tensors
    config: Config
    format: str
    notes: tuple[str, ...] = ()

    def canonical(self) -> Tensors:
        """The arrays as canonical weights.

        Raises:
            FitError: if they do not fit the config.
        """
        params = param_tree(self.config).parameters()
        return table(self.format, self.config).read(
            params, self.arrays, FORMATS[self.format].layout
        )

    def dropped(self) -> list[str]:
        """What the rename table leaves out, with its reason, a line each."""
        rows = table(self.format, self.config)
        if not isinstance(rows, RenameTable):
            return []
        found = [(row, [n for n in self.arrays if row.matches(n)]) for row in rows.drops]
        return [f"left out {_count(names)}: {row.reason}" for row, names in found if names]


def _count(names: list[str]) -> str:
    """Names, or the first of them and how many there are."""
    return ", ".join(names) if len(names) < 4 else f"{names[0]} and {len(names) - 1} more"


def open_file(path: Path, wanted: Wanted) -> Opened:
    """Open a file or a folder of any format.

    Raises:
        InputError: if it cannot be read, or is of no known format.
    """
    if wanted.format not in (None, *FORMATS):
        raise InputError(f"no format named {wanted.format!r}; wanted one of {', '.join(FORMATS)}")
    if not path.exists():
        raise InputError(f"cannot read {path}: no such file or folder")
    match suffix := suffix_of(path):
        case ".safetensors":
            arrays, metadata = files.read_safetensors(path)
            return _identify(path, arrays, metadata.get(HEADER_KEY), wanted)
        case ".npz":
            arrays, comment = files.read_npz(path)
            arrays = arrays.renamed({name.replace("/", "."): name for name in arrays})
            return _identify(path, arrays, comment, wanted)
        case ".weights.h5" | ".keras":
            require_installed("keras")
            config, _ = _config(path, files.read_keras_header(path, HEADER_KEY), wanted)
            # Keras numbers its variables, so only a model can say which is which: they come named.
            with files.keras_weights(path) as weights:
                named = _runtime("keras").load_native(config, weights)
            return Opened(Tensors.of(named), config, "keras")
        case "":
            return _open_folder(path, wanted)
        case _:
            return _open_pth(path, suffix, wanted)


def _open_folder(path: Path, wanted: Wanted) -> Opened:
    header = _folder_header(path)
    if huggingface.is_folder(path):
        arrays = huggingface.read_weights(path)
        names = (huggingface.CONFIG, huggingface.PROCESSOR)
        sidecars = {name: huggingface.read_json(path / name) for name in names}
        arch = str(sidecars[huggingface.CONFIG].get("architecture", ""))  # timm's
        return _identify(path, arrays, header, wanted, sidecars=sidecars, arch=arch)
    config, _ = _config(path, header, wanted)
    return Opened(Tensors.of(_runtime("flax").load_native(config, path)), config, "flax")


def _open_pth(path: Path, suffix: str, wanted: Wanted) -> Opened:
    content = files.read_pth(path)
    try:
        wrapper, weights = state_dict(content, wanted.ema)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    arrays = files.torch_tensors(path, weights)
    if not arrays:
        raise InputError(f"{path}: holds no tensors; wanted a state dict")
    around = {"wrapper": wrapper, "container": suffix, "arch": str(content.get("arch", ""))}
    return _identify(path, arrays, content.get(HEADER_KEY), wanted, **around)


def _identify(
    path: Path,
    arrays: Tensors,
    header: object,
    wanted: Wanted,
    **around: Any,
) -> Opened:
    """Put config and format to the arrays: as asked for, as the file says, or as it shows.

    Args:
        path: of the file, for messages.
        arrays: under the file's own names.
        header: isovit's own, if the file has one.
        wanted: by the caller.
        around: what else is a clue, as in ``Clues``.
    """
    try:
        content = unwrap(arrays, around.pop("wrapper", ""))
        if wanted.config or header:
            config, format = _config(path, header, wanted)
            return Opened(
                content.tensors, config, format or _guess(content.tensors, config), content.notes
            )
        shapes = content.tensors.shapes
        found = detect(Clues(shapes, wanted.changes, wanted.format, content.wrapper, **around))
    except (InputError, KeyError, IndexError, ValueError, TypeError, ZeroDivisionError) as error:
        reason = error if isinstance(error, InputError) else f"names or shapes lack {error}"
        raise InputError(f"{path}: {reason}") from None
    if found is None:
        raise InputError(
            f"{path}: {', '.join(list(arrays)[:3])} … are names of no format that isovit knows; "
            "give --model, e.g. vit_s16, to see what differs"
        )
    format, config = found
    return Opened(content.tensors, config, format, content.notes)


def _config(path: Path, header: object, wanted: Wanted) -> tuple[Config, str | None]:
    """Config and format: as asked for, or as the header says."""
    if not header:
        if wanted.config is None:
            raise InputError(f"{path}: says no model; give --model, e.g. vit_s16")
        return wanted.config, wanted.format
    try:
        said = msgspec.json.decode(str(header), type=_Header)
    except msgspec.DecodeError as error:
        raise InputError(f"{path}: its header is not isovit's: {error}") from None
    format = wanted.format or said.format
    if format not in FORMATS:
        raise InputError(f"{path}: its header names the format {format!r}, which isovit lacks")
    if wanted.config:
        return wanted.config, format
    config = config_from_dict(said.config, str(path))
    return config.replace(**wanted.changes) if wanted.changes else config, format


class _Header(msgspec.Struct):
    format: str
    config: dict[str, Any]


def _guess(arrays: Tensors, config: Config) -> str:
    """The one format whose names are those of the file."""
    tables = import_module(f"isovit.weight_convert.families.{config.family}").TABLES
    for name in ("isovit", "torch", *tables):
        try:
            Opened(arrays, config, name).canonical()
        except InputError:
            continue
        return name
    raise InputError(
        f"fits the config in none of the formats isovit, torch, {', '.join(tables)}; "
        "--from FORMAT says what is missing or misshaped in that one"
    )


def _runtime(backend: str) -> NativeFiles:
    return cast("NativeFiles", get_backend(backend))


def _folder_header(path: Path) -> str | None:
    try:
        return (path / files.FOLDER_MARK).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
