"""The containers: safetensors, npz and pth; read without running code, written all or nothing."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import ml_dtypes
import numpy as np

from isovit.errors import InputError, reason

# Beside tensors and plain data, what real training files hold; none of it runs code.
HARMLESS: list[Any] = [
    argparse.Namespace,  # the options of the training run, in every timm checkpoint
    np.dtype,  # a metric kept as a NumPy scalar: the scalar and its type
    np.dtypes.Float64DType,
    np.dtypes.Float32DType,
    np.dtypes.Int64DType,
    getattr(np, "_core").multiarray.scalar,  # noqa: B009 -- a name that NumPy keeps to itself
]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)  # the import registers the name with NumPy
Arrays = dict[str, np.ndarray]


FOLDER_MARK = "isovit.json"
"""A file by which a folder is known as one that isovit wrote, and may replace."""


@contextmanager
def replacing(path: Path, folder: bool = False) -> Generator[Path]:
    """A temporary path beside ``path`` that takes its place at the end, or goes if anything fails.

    Args:
        path: the target.
        folder: whether a folder is to be written.

    Raises:
        InputError: if the target cannot be written.
    """
    check_target(path, folder)
    # A folder of its own lets a framework insist on a suffix, or write a folder instead of a file.
    try:
        beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None
    temporary, replaced = beside / path.name, beside / "replaced"
    try:
        yield temporary
        if temporary.is_file():
            temporary.chmod(0o666 & ~_umask())  # some writers make files that only we can read
        if folder and path.exists():
            path.rename(replaced)
        temporary.replace(path)
    except OSError as error:
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def check_target(path: Path, folder: bool = False) -> None:
    """Check, before any work is done, that a file or a folder can be put at ``path``.

    Raises:
        InputError: if there is no folder around it, or something in its place that must stay.
    """
    if path.name in ("", ".."):
        raise InputError(f"cannot write {path}: it names no file")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {path.parent}")
    if path.is_dir() and not folder:
        raise InputError(f"cannot write {path}: a folder is in its place")
    if folder and path.exists():
        if not path.is_dir():
            raise InputError(f"cannot write {path}: a file is in its place")
        if any(path.iterdir()) and not (path / FOLDER_MARK).is_file():
            raise InputError(f"cannot write {path}: a folder with other things is in its place")


def read_safetensors(path: Path) -> tuple[Arrays, dict[str, str]]:
    """Tensors and metadata.

    Raises:
        InputError: if it is no complete safetensors file.
    """
    import safetensors

    safe_open: Any = safetensors.safe_open  # the library has no types
    with reading(path, "a safetensors file"), safe_open(path, framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- no dict
        return arrays, dict(file.metadata() or {})


def write_safetensors(
    path: Path, arrays: Mapping[str, np.ndarray], metadata: dict[str, str]
) -> None:
    """Write tensors in their own dtypes with metadata."""
    from safetensors.numpy import save_file  # pyright: ignore[reportUnknownVariableType]

    with replacing(path) as temporary:
        save_file({n: np.ascontiguousarray(a) for n, a in arrays.items()}, temporary, metadata)


def read_npz(path: Path) -> tuple[Arrays, str]:
    """Arrays, and the comment of the archive, in which isovit keeps the config.

    Raises:
        InputError: if it is no complete npz file, or holds Python objects.
    """
    with reading(path, "an npz file"):
        with zipfile.ZipFile(path) as archive:
            comment = archive.comment.decode("utf-8", "replace")
        with np.load(path, allow_pickle=False) as file:
            return {name: restore_bfloat16(file[name]) for name in file.files}, comment


def restore_bfloat16(array: np.ndarray) -> np.ndarray:
    """NumPy writes bfloat16 as two bytes without a name; no other checkpoint dtype looks so."""
    return array.view(BFLOAT16) if array.dtype == np.dtype("V2") else array


def write_npz(path: Path, arrays: Mapping[str, np.ndarray], comment: str) -> None:
    """Write arrays; the config is the archive's comment, so that ``np.load`` sees arrays alone."""
    with replacing(path) as temporary:
        np.savez(temporary, allow_pickle=False, **arrays)
        with zipfile.ZipFile(temporary, "a") as archive:
            archive.comment = comment.encode()


def read_pth(path: Path) -> Any:
    """What ``torch.save`` wrote, through torch's weights-only loader, with arrays for tensors.

    Raises:
        InputError: if it is no complete file, or wants to run code.
    """
    torch = _torch(path)
    with reading(path, "a torch checkpoint"), torch.serialization.safe_globals(HARMLESS):
        try:
            return _to_arrays(torch.load(path, map_location="cpu", weights_only=True))
        except UnpicklingError as error:
            named = re.search(r"GLOBAL (\S+)", str(error))
            if named is None:
                raise
            raise InputError(f"it wants {named[1]}, which is no part of a checkpoint") from None


def write_pth(path: Path, arrays: Mapping[str, np.ndarray], entries: Mapping[str, str]) -> None:
    """Write ``{"state_dict": tensors, **entries}`` as ``torch.save`` does."""
    torch = _torch(path)
    state = {name: _to_tensor(torch, array) for name, array in arrays.items()}
    with replacing(path) as temporary:
        torch.save({"state_dict": state, **entries}, temporary)


def read_h5_attribute(path: Path, name: str) -> str | None:
    """An attribute at the root of an HDF5 file; None if there is none.

    Raises:
        InputError: if it is no HDF5 file.
    """
    import h5py  # comes with Keras  # pyright: ignore[reportMissingTypeStubs]

    with reading(path, "a Keras weights file"), h5py.File(path, "r") as file:
        return cast("Any", file.attrs).get(name)


def write_h5_attribute(path: Path, name: str, value: str) -> None:
    """Add an attribute to the root of an HDF5 file; Keras passes over it."""
    import h5py  # comes with Keras  # pyright: ignore[reportMissingTypeStubs]

    with h5py.File(path, "a") as file:
        cast("Any", file.attrs)[name] = value


@contextmanager
def reading(path: Path, wanted: str) -> Generator[None]:
    """Turn whatever a parser raises on the bytes of a file into one line.

    Raises:
        InputError: for an absent or unreadable file, and for every exception from inside.
    """
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    try:
        yield
    except Exception as error:  # a broken file makes a parser raise anything
        raise InputError(
            f"{path}: wanted {wanted}, but it cannot be read: {reason(error)}"
        ) from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _torch(path: Path) -> Any:
    from isovit.backends import require_installed

    try:
        require_installed("torch")
    except InputError as error:
        raise InputError(f"{path}: .pth is torch's own format; {error}") from None
    import torch

    return torch


def _to_arrays(value: Any) -> Any:
    """Tensors to arrays through dicts and lists; everything else as it is."""
    if isinstance(value, dict):
        items = cast("dict[Any, Any]", value).items()
        return {key: _to_arrays(item) for key, item in items}
    if isinstance(value, list | tuple):
        return [_to_arrays(item) for item in cast("list[Any]", value)]
    if hasattr(value, "detach"):
        return _to_array(value.detach())
    return value


def _to_array(tensor: Any) -> np.ndarray:
    """A tensor as an array; bfloat16, which torch does not hand to NumPy, by its bits."""
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy().view(BFLOAT16)
    return tensor.contiguous().numpy()


def _to_tensor(torch: Any, array: np.ndarray) -> Any:
    array = np.array(array, order="C")
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)
