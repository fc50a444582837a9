"""From a path to arrays under the file's own names, with format and config: said, or found out."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import msgspec

from isovit.backends import get_backend, require_installed
from isovit.backends.protocol import NativeFiles
from isovit.errors import InputError
from isovit.spec.config import BaseConfig, config_from_dict
from isovit.spec.families import home, param_tree
from isovit.weight_convert import files, hdf5, huggingface
from isovit.weight_convert.detect import Clues, detect
from isovit.weight_convert.formats import FORMATS, HEADER_KEY, SUFFIXES, suffix_of, table
from isovit.weight_convert.rename import RenameTable
from isovit.weight_convert.tensors import Spec, Tensors, renaming
from isovit.weight_convert.unwrap import state_dict, together, unwrap


@dataclass(frozen=True)
class Wanted:
    """What the caller of ``load`` knows about a file.

    Attributes:
        config: of the model; None to take what the file says or shows.
        format: a name in ``FORMATS``; None to take what the file says or shows.
        changes: fields of the config that differ from what the file says or shows.
        ema: whether the averaged weights are taken where a training file has both.
    """

    config: BaseConfig | None = None
    format: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict[str, Any])
    ema: bool = True


@dataclass(frozen=True)
class Opened:
    """A file's arrays under its own names, its config, its format, and what was left out."""

    arrays: Tensors
    config: BaseConfig
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
        found: dict[str, list[str]] = {}
        for row in rows.drops:
            found.setdefault(row.reason, []).extend(n for n in self.arrays if row.matches(n))
        return [f"left out {_count(names)}: {why}" for why, names in found.items() if names]


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
    suffix = suffix_of(path)
    if not suffix and path.is_file():
        raise InputError(f"{path}: a file without a suffix; wanted {', '.join(SUFFIXES)}")
    match suffix:
        case ".safetensors":
            arrays, metadata = files.read_safetensors(path)
            return _identify(path, arrays, metadata.get(HEADER_KEY), wanted)
        case ".npz":
            arrays, comment = files.read_npz(path)
            with files.reading(path, "an npz file"):
                arrays = arrays.renamed(renaming(arrays, lambda name: name.replace("/", ".")))
            return _identify(path, arrays, comment, wanted)
        case ".weights.h5" | ".keras":
            require_installed("keras")
            config, _ = _config(path, files.read_keras_header(path, HEADER_KEY), wanted)
            # Keras numbers its variables, so only a model can say which is which: they come named.
            with files.keras_weights(path) as weights:
                specs = hdf5.specs(weights)
                _check_claims(path, config, len(specs), wanted)
                _check_count(path, config, specs)
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
        arch = _text(sidecars[huggingface.CONFIG].get("architecture"))  # timm's
        return _identify(path, arrays, header, wanted, sidecars=sidecars, arch=arch)
    config, _ = _config(path, header, wanted)
    files.check_folder(path)
    named = _runtime("flax").load_native(config, path)
    _check_claims(path, config, len(named), wanted)
    return Opened(Tensors.of(named), config, "flax")


def _open_pth(path: Path, suffix: str, wanted: Wanted) -> Opened:
    content = files.read_pth(path)
    try:
        whole = together(content, _together(wanted))
        wrapper, weights = ("", whole) if whole else state_dict(content, wanted.ema)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    arrays = files.torch_tensors(path, weights)
    if not arrays:
        raise InputError(f"{path}: holds no tensors; wanted a state dict")
    around = {"wrapper": wrapper, "container": suffix, "arch": _text(content.get("arch"))}
    return _identify(path, arrays, _text(content.get(HEADER_KEY)), wanted, **around)


def _together(wanted: Wanted) -> tuple[str, ...]:
    """The keys under which a training keeps what the wanted objective is made of, if it does."""
    if wanted.config is None:
        return ()
    tables = import_module(f"isovit.weight_convert.{home(wanted.config.family)}")
    return getattr(tables, "TOGETHER", ())


def _identify(
    path: Path,
    arrays: Tensors,
    header: str | None,
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
    with _understanding(path):
        arrays.check()
        content = unwrap(arrays, around.pop("wrapper", ""))
    if wanted.config or header:
        config, format = _config(path, header, wanted)
        _check_claims(path, config, len(content.tensors), wanted)
        with _understanding(path):
            format = format or _guess(content.tensors, config)
        return Opened(content.tensors, config, format, content.notes)
    with _understanding(path):
        shapes = content.tensors.shapes
        found = detect(Clues(shapes, wanted.changes, wanted.format, content.wrapper, **around))
    if found is None:
        raise InputError(
            f"{path}: {', '.join(list(arrays)[:3])} … are names of no format that isovit knows; "
            "give --model, e.g. vit_s16, to see what differs"
        )
    format, config = found
    return Opened(content.tensors, config, format, content.notes)


@contextmanager
def _understanding(path: Path) -> Generator[None]:
    """Turn what fails on names, shapes and numbers of a file into one line with its path.

    Raises:
        InputError: for every exception from inside.
    """
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:  # anything may stand in a file
        raise InputError(f"{path}: its names or shapes are no model's: {error!r}") from None


def _config(path: Path, header: object, wanted: Wanted) -> tuple[BaseConfig, str | None]:
    """Config and format: as asked for, or as the header says."""
    if not isinstance(header, str) or not header:
        if wanted.config is None:
            raise InputError(f"{path}: says no model; give --model, e.g. vit_s16")
        return wanted.config, wanted.format
    try:
        said = msgspec.json.decode(header, type=_Header)
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise InputError(f"{path}: its header is not isovit's: {error}") from None
    format = wanted.format or said.format
    if format not in FORMATS:
        raise InputError(f"{path}: its header names the format {format!r}, which isovit lacks")
    if wanted.config:
        return wanted.config, format
    try:
        config = config_from_dict(said.config, str(path))
    except ArithmeticError as error:
        raise InputError(f"{path}: its config has a number too large: {error}") from None
    return config.replace(**wanted.changes) if wanted.changes else config, format


def _check_claims(path: Path, config: BaseConfig, arrays: int, wanted: Wanted) -> None:
    """Check what a header says before anything counts along it: a few bytes may claim anything."""
    for name in () if wanted.config else COUNTED:
        claimed = getattr(config, name, 0)
        numbers = (claimed,) if isinstance(claimed, int) else claimed
        if sum(n if isinstance(n, int) else 1 for n in numbers) > arrays:
            raise InputError(f"{path}: its header says {name}={claimed}; it has {arrays} arrays")


COUNTED = ("depth", "depths", "branch_depth", "cross_depth", "cls_depth", "t2t_layers")


def _check_count(path: Path, config: BaseConfig, specs: Mapping[str, Spec]) -> None:
    """Check that a file has numbers enough for a model, before the model is built."""
    wanted, found = param_tree(config).size(), sum(spec.size for spec in specs.values())
    if wanted > found:
        raise InputError(f"{path}: holds {found:,} numbers; its model has {wanted:,} parameters")


def _text(content: object) -> str:
    """A text in a file, or none: anything may stand in its place."""
    return content if isinstance(content, str) else ""


class _Header(msgspec.Struct):
    format: str
    config: dict[str, Any]


def _guess(arrays: Tensors, config: BaseConfig) -> str:
    """The one format whose names are those of the file."""
    tables = import_module(f"isovit.weight_convert.{home(config.family)}").TABLES
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
    mark = path / files.FOLDER_MARK
    return files.read_text(mark).decode("utf-8", "replace") if mark.is_file() else None
