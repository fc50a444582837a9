"""The formats that isovit reads and writes, and how it tells one from another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np

from isovit.backends import get_backend, require_installed
from isovit.backends.protocol import NativeFiles
from isovit.backends.torch.layout import LAYOUT as TORCH
from isovit.errors import FitError, InputError
from isovit.spec.config import Config, config_from_dict
from isovit.spec.families import param_tree, resolve_config, variant_name
from isovit.spec.layout import CANONICAL, from_native, to_native
from isovit.weight_convert import files
from isovit.weight_convert.checkpoint import Checkpoint, Source
from isovit.weight_convert.detect import detect
from isovit.weight_convert.rename import RenameTable

HEADER_KEY = "isovit"
"""Where a file has its header: metadata of safetensors, entry of .pth, attribute of HDF5.

The header is JSON: ``{"format": NAME, "config": {…}}``. An npz has it as the archive's comment, an
orbax folder as the file ``isovit.json``.
"""


@dataclass(frozen=True)
class Format:
    """A way to keep weights in files.

    Attributes:
        name: as ``--from`` and ``--to`` take it.
        suffixes: of its files, the default first; ``""`` for a folder.
        about: one line for people.
        foreign: whether it belongs to another library, so that a rename table is needed.
    """

    name: str
    suffixes: tuple[str, ...]
    about: str
    foreign: bool = False


FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format("isovit", (".safetensors",), "canonical weights, config in the metadata"),
        Format("torch", (".pth", ".pt", ".safetensors"), "state dict of the torch model"),
        Format("flax", (".npz", ""), "flat arrays, or an orbax folder, of the Flax model"),
        Format("keras", (".weights.h5",), "save_weights of the Keras model"),
        Format("timm", (".pth", ".safetensors"), "state dict of timm", foreign=True),
        Format("vit_pytorch", (".pth", ".safetensors"), "state dict of vit-pytorch", foreign=True),
        Format("yitu", (".pth", ".pth.tar", ".safetensors"), "official T2T-ViT", foreign=True),
    )
}

# The format that a target's name asks for when nobody says one.
DEFAULT_FORMATS = {
    ".safetensors": "isovit",
    ".pth": "torch",
    ".pt": "torch",
    ".npz": "flax",
    ".weights.h5": "keras",
    "": "flax",
}


def suffix_of(path: Path) -> str:
    """The suffix that decides the container; ``""`` for a folder.

    Raises:
        InputError: if no format has it.
    """
    for suffix in (".weights.h5", ".pth.tar", ".safetensors", ".pth", ".pt", ".npz"):
        if path.name.endswith(suffix):
            return suffix
    if path.is_dir() or not path.suffix or path.suffix == ".orbax":
        return ""
    raise InputError(
        f"{path}: no format has the suffix {path.suffix}; wanted .safetensors, .pth, .npz, "
        ".weights.h5, or a folder for orbax"
    )


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


def load(
    path: str | Path,
    *,
    config: Config | None = None,
    format: str | None = None,
    changes: Mapping[str, Any] | None = None,
    ema: bool = True,
) -> Checkpoint:
    """Read a checkpoint.

    Args:
        path: a file, or an orbax folder.
        config: of the model; None to take what the file says, or what its names and shapes show.
        format: a name in ``FORMATS``; None to find it out.
        changes: fields of the config that differ from that, nested ones by dotted name.
        ema: whether the averaged weights are taken where a training file has both.

    Returns:
        Canonical weights in the dtype of the file, with config and source.

    Raises:
        InputError: if the file cannot be read, is of no known format, or does not fit; or if its
            config has a field that neither the file nor the caller tells.
    """
    path = Path(path)
    found = _open(path, Wanted(config, format, changes or {}, ema))
    name = known(found.format or _guess(path, found)).name
    return Checkpoint(found.config, found.canonical(name), Source(str(path), name))


def save(checkpoint: Checkpoint, path: str | Path, format: str | None = None) -> None:
    """Write a checkpoint, all or nothing.

    Args:
        checkpoint: what to write.
        path: target; its suffix decides the container.
        format: a name in ``FORMATS``; None for the suffix's own.

    Raises:
        InputError: if the format has no such suffix or no place for the model, or if the target
            cannot be written.
    """
    path = Path(path)
    name, suffix = check_target(path, format), suffix_of(path)
    config, weights = checkpoint.config, checkpoint.weights
    header = msgspec.json.encode({"format": name, "config": config.to_dict()}).decode()
    if suffix == ".weights.h5":
        with files.replacing(path) as temporary:
            _runtime("keras").save_native(config, weights, temporary)
            files.write_h5_attribute(temporary, HEADER_KEY, header)
        return
    if suffix == "":
        with files.replacing(path, folder=True) as temporary:
            _runtime("flax").save_native(config, weights, temporary)
            (temporary / files.FOLDER_MARK).write_text(header, encoding="utf-8")
        return
    arrays = _from_canonical(name, config, weights)
    if suffix == ".safetensors":
        files.write_safetensors(path, arrays, {HEADER_KEY: header})
    elif suffix == ".npz":
        named = {key.replace(".", "/"): array for key, array in arrays.items()}
        files.write_npz(path, named, header)
    else:
        files.write_pth(path, arrays, {HEADER_KEY: header})


def check_target(path: Path, format: str | None = None) -> str:
    """The format to write, checked before any work is done.

    Raises:
        InputError: if the format has no such suffix, or there is no folder to write to.
    """
    suffix = suffix_of(path)
    name = known(format or DEFAULT_FORMATS.get(suffix, "torch")).name
    if suffix not in FORMATS[name].suffixes:
        wanted = " or ".join(s or "a folder" for s in FORMATS[name].suffixes)
        raise InputError(f"{path}: format {name} is written to {wanted}")
    files.check_target(path, folder=suffix == "")
    return name


def known(name: str) -> Format:
    """The format of a name.

    Raises:
        InputError: if there is none.
    """
    if name not in FORMATS:
        raise InputError(f"no format named {name!r}; wanted one of {', '.join(FORMATS)}")
    return FORMATS[name]


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
    """

    format: str
    config: Config
    variant: str | None
    tensors: int
    parameters: int
    dtypes: tuple[str, ...]
    problems: tuple[str, ...]


def inspect(
    path: str | Path,
    *,
    config: Config | None = None,
    format: str | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Inspection:
    """Tell what a checkpoint is; see ``load`` for the arguments and errors."""
    path = Path(path)
    found = _open(path, Wanted(config, format, changes or {}))
    name = known(found.format or _guess(path, found)).name
    problems: tuple[str, ...] = ()
    try:
        found.canonical(name)
    except FitError as error:
        problems = error.problems
    arrays = found.arrays.values()
    return Inspection(
        format=name,
        config=found.config,
        variant=variant_name(found.config),
        tensors=len(arrays),
        parameters=sum(array.size for array in arrays),
        dtypes=tuple(sorted({array.dtype.name for array in arrays})),
        problems=problems,
    )


def rename_table(format: str, config: Config) -> RenameTable:
    """The rename table of a foreign format for a config.

    Raises:
        InputError: if the foreign library has no such family.
    """
    tables: Mapping[str, Callable[[Config], RenameTable]]
    tables = import_module(f"isovit.weight_convert.families.{config.family}").TABLES
    if format not in tables:
        raise InputError(
            f"format {format} has no family {config.family}; wanted {', '.join(tables)}"
        )
    return tables[format](config)


def _from_canonical(name: str, config: Config, weights: files.Arrays) -> files.Arrays:
    params = param_tree(config).parameters()
    if FORMATS[name].foreign:
        return rename_table(name, config).write(params, weights, TORCH)
    return to_native(params, weights, TORCH if name == "torch" else CANONICAL)


@dataclass(frozen=True)
class _Opened:
    """A file's arrays under its own names, its config, and its format as far as it says."""

    arrays: files.Arrays
    config: Config
    format: str | None

    def canonical(self, name: str) -> files.Arrays:
        """The arrays as canonical weights, read as the format ``name``."""
        params = param_tree(self.config).parameters()
        if FORMATS[name].foreign:
            return rename_table(name, self.config).read(params, self.arrays, TORCH)
        return from_native(params, self.arrays, TORCH if name == "torch" else CANONICAL)


def _open(path: Path, wanted: Wanted) -> _Opened:
    if not path.exists():
        raise InputError(f"cannot read {path}: no such file or folder")
    match suffix_of(path):
        case ".safetensors":
            arrays, metadata = files.read_safetensors(path)
            return _identify(path, arrays, metadata.get(HEADER_KEY), wanted)
        case ".npz":
            arrays, comment = files.read_npz(path)
            arrays = {name.replace("/", "."): array for name, array in arrays.items()}
            return _identify(path, arrays, comment, wanted)
        case ".weights.h5":
            require_installed("keras")
            config, _ = _config(path, files.read_h5_attribute(path, HEADER_KEY), wanted)
            # Keras numbers its variables, so only a model can say which is which: they come named.
            return _Opened(_runtime("keras").load_native(config, path), config, "keras")
        case "":
            config, _ = _config(path, _folder_header(path), wanted)
            return _Opened(_runtime("flax").load_native(config, path), config, "flax")
        case _:
            return _open_pth(path, wanted)


def _open_pth(path: Path, wanted: Wanted) -> _Opened:
    content = files.read_pth(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: wanted a dict of tensors, got {type(content).__name__}")
    content = cast("dict[str, Any]", content)
    arrays = _state_dict(content, wanted.ema)
    if not arrays:
        raise InputError(f"{path}: holds no tensors; wanted a state dict")
    return _identify(path, arrays, content.get(HEADER_KEY), wanted)


def _state_dict(content: dict[str, Any], ema: bool) -> files.Arrays:
    """The tensors of a .pth: bare, or under one of the usual keys, or behind DataParallel."""
    averages = ("state_dict_ema", "model_ema") if ema else ()
    for key in (*averages, "state_dict", "model", "net"):
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    arrays: files.Arrays = {n: a for n, a in content.items() if isinstance(a, np.ndarray)}
    for prefix in ("module.", "_orig_mod."):  # DataParallel, torch.compile
        if all(name.startswith(prefix) for name in arrays):
            arrays = {name.removeprefix(prefix): array for name, array in arrays.items()}
    return arrays


def _identify(path: Path, arrays: files.Arrays, header: object, wanted: Wanted) -> _Opened:
    """Put config and format to the arrays: as asked for, as the file says, or as it shows."""
    if wanted.config or header:
        config, format = _config(path, header, wanted)
        return _Opened(arrays, config, format)
    shapes = {name: array.shape for name, array in arrays.items()}
    try:
        found = detect(shapes, wanted.changes, wanted.format)
    except (InputError, KeyError, IndexError) as error:
        reason = error if isinstance(error, InputError) else f"names or shapes lack {error}"
        raise InputError(f"{path}: {reason}") from None
    if found is None:
        raise InputError(
            f"{path}: {', '.join(list(arrays)[:3])} … are names of no format that isovit knows; "
            "give --model, e.g. vit_s16, to see what differs"
        )
    return _Opened(arrays, found[1], found[0])


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
    if wanted.config:
        return wanted.config, format
    config = config_from_dict(said.config, str(path))
    return config.replace(**wanted.changes) if wanted.changes else config, format


class _Header(msgspec.Struct):
    format: str
    config: dict[str, Any]


def _guess(path: Path, found: _Opened) -> str:
    """The one format whose names are those of the file."""
    tables = import_module(f"isovit.weight_convert.families.{found.config.family}").TABLES
    for name in ("isovit", "torch", *tables):
        try:
            found.canonical(name)
        except InputError:
            continue
        return name
    raise InputError(
        f"{path}: fits the config in none of the formats isovit, torch, {', '.join(tables)}; "
        "--from FORMAT says what is missing or misshaped in that one"
    )


def _runtime(backend: str) -> NativeFiles:
    return get_backend(backend)  # type: ignore[return-value]


def _folder_header(path: Path) -> str | None:
    try:
        return (path / files.FOLDER_MARK).read_text(encoding="utf-8")
    except OSError:
        return None


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
