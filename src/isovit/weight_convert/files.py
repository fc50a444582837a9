"""The containers: safetensors, npz and pth; read without running code, written all or nothing."""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import re
import shutil
import stat
import sys
import tempfile
import zipfile
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import ml_dtypes
import msgspec
import numpy as np

from isovit.errors import InputError, reason
from isovit.weight_convert import pickles
from isovit.weight_convert.tensors import Spec, Tensors, check_number, chunks

# Beside tensors and plain data, what real training files hold; none of it runs code.
HARMLESS: list[Any] = [
    argparse.Namespace,  # the options of the training run, in every timm checkpoint
    np.dtype,  # a metric kept as a NumPy scalar: the scalar and its type
    np.dtypes.Float64DType,
    np.dtypes.Float32DType,
    np.dtypes.Int64DType,
    (pickles.scalar, "numpy._core.multiarray.scalar"),
    (pickles.scalar, "numpy.core.multiarray.scalar"),  # before NumPy 2
]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)  # the import registers the name with NumPy
TORCH_DTYPES = {"float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool"}
SAFETENSORS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""The format's names for the dtypes that checkpoints have."""

SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS.items()}

Track = Callable[[Iterable[str]], Iterable[str]]
"""Passes names through and shows on the way how far they have come."""


LARGEST_TEXT = 1 << 26
"""Bytes of a JSON file beside weights; that of a model with 21,000 classes has two million."""

LARGEST_HEADER = 1 << 24
"""Bytes of the header of a safetensors file; that of ViT-H/14 has a thousand times less."""

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


def read_safetensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Tensors and metadata.

    Raises:
        InputError: if it is no complete safetensors file.
    """
    starts: dict[str, int] = {}
    specs: dict[str, Spec] = {}
    with reading(path, "a safetensors file"), path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LARGEST_HEADER:
            raise InputError(f"its header would have {length:,} bytes")
        with _safe_open(path) as checked:  # that sizes and places of all tensors are right
            metadata = dict(checked.metadata() or {})
        header = msgspec.json.decode(file.read(length), type=dict[str, msgspec.Raw])
        header.pop("__metadata__", None)
        check_number(len(header))
        for name, text in header.items():
            entry = msgspec.json.decode(text, type=_Entry)
            if entry.dtype not in SAFETENSORS:
                raise InputError(f"{name} is of dtype {entry.dtype}, which no model here has")
            specs[name] = Spec(entry.shape, SAFETENSORS[entry.dtype])
            starts[name] = 8 + length + entry.data_offsets[0]

    def fetch(name: str) -> np.ndarray:
        # Not through the library, which parses the header again for each tensor unless the file
        # stays open, and then all that was read of it stays in memory.
        shape, dtype = spec = specs[name]
        with reading(path, "a safetensors file"):
            numbers = np.fromfile(path, np.uint8, spec.nbytes, offset=starts[name])
            return numbers.view(dtype).reshape(shape)

    return Tensors(specs, fetch), metadata


class _Entry(msgspec.Struct):
    """A tensor in the header of a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def write_safetensors(
    path: Path, tensors: Tensors, metadata: dict[str, str], track: Track = iter
) -> None:
    """Write tensors in their own dtypes with metadata, one by one.

    The library's own writer wants all of them in memory. Wide dtypes come first, so that every
    tensor is aligned to its dtype.
    """
    names, text = _safetensors_header(path, tensors, metadata)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in track(names):
            for chunk in chunks(tensors[name]):
                file.write(chunk.data)


def safetensors_bytes(tensors: Tensors, metadata: dict[str, str]) -> int:
    """Size of the file that ``write_safetensors`` would write."""
    _, text = _safetensors_header(Path(), tensors, metadata)
    return 8 + len(text) + sum(spec.nbytes for spec in tensors.specs.values())


def _safetensors_header(
    path: Path, tensors: Tensors, metadata: dict[str, str]
) -> tuple[list[str], bytes]:
    """Names in the order of the file, and the JSON in front of them."""
    names = sorted(tensors, key=lambda name: -tensors.specs[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in names:
        shape, dtype = spec = tensors.specs[name]
        if dtype not in SAFETENSORS_NAMES:
            raise InputError(f"cannot write {path}: {name} is of dtype {dtype}")
        start, end = end, end + spec.nbytes
        header[name] = {
            "dtype": SAFETENSORS_NAMES[dtype],
            "shape": shape,
            "data_offsets": (start, end),
        }
    text = msgspec.json.encode(header)
    return names, text + b" " * (-len(text) % 8)


def read_npz(path: Path) -> tuple[Tensors, str]:
    """Arrays, and the comment of the archive, in which isovit keeps the config.

    Raises:
        InputError: if it is no complete npz file, or holds Python objects.
    """
    with reading(path, "an npz file"):
        archive = zipfile.ZipFile(path)
        infos = archive.infolist()
        check_number(len(infos))
        check_inflated(path, sum(info.file_size for info in infos))
        specs: dict[str, Spec] = {}
        for info in infos:
            name = info.filename.removesuffix(".npy")
            if name in specs:
                raise InputError(f"it holds {name} twice")
            specs[name] = _npy_spec(archive, info)
        comment = archive.comment.decode("utf-8", "replace")

    def fetch(name: str) -> np.ndarray:
        with reading(path, "an npz file"), archive.open(f"{name}.npy") as member:
            return np.lib.format.read_array(member, allow_pickle=False).view(specs[name].dtype)

    return Tensors(specs, fetch), comment


def _npy_spec(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Spec:
    """What the header of an array in an archive says, if the array is as long as it should be."""
    if not info.filename.endswith(".npy"):
        raise InputError(f"it holds {info.filename}, which is no array")
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        read = {(1, 0): "read_array_header_1_0", (2, 0): "read_array_header_2_0"}.get(version)
        if read is None:
            raise InputError(f"{info.filename} is in version {version} of the npy format")
        shape, _, dtype = getattr(np.lib.format, read)(member)
        start = member.tell()
    if dtype.hasobject:
        raise InputError(f"{info.filename} holds Python objects, which could run code")
    # NumPy writes bfloat16 as two bytes without a name; no other checkpoint dtype looks so.
    spec = Spec(shape, BFLOAT16 if dtype == np.dtype("V2") else dtype)
    if spec.dtype not in SAFETENSORS_NAMES:
        raise InputError(f"{info.filename} is of dtype {dtype}, which no model here has")
    if start + spec.nbytes != info.file_size:
        raise InputError(f"{info.filename} has {info.file_size - start} bytes, not {spec.nbytes}")
    return spec


def check_inflated(path: Path, size: int) -> None:
    """Refuse a file that is far larger unpacked than weights can be.

    Raises:
        InputError: telling both sizes.
    """
    packed = path.stat().st_size
    if size > 1 << 28 and size > 20 * packed:
        raise InputError(f"its {packed:,} bytes would unpack to {size:,}; weights never shrink so")


def write_npz(path: Path, tensors: Tensors, comment: str, track: Track = iter) -> None:
    """Write arrays; the config is the archive's comment, so that ``np.load`` sees arrays alone."""
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name in track(tensors):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, tensors[name], allow_pickle=False)
        archive.comment = comment.encode()


def read_pth(path: Path) -> dict[str, Any]:
    """What ``torch.save`` wrote, through torch's weights-only loader; tensors stay on the disk.

    Raises:
        InputError: if it is no complete file, wants to run code, or holds no dict.
    """
    torch = _torch(path)
    with reading(path, "a torch checkpoint"), torch.serialization.safe_globals(HARMLESS):
        is_archive = zipfile.is_zipfile(path)
        _check_pickles(path, is_archive)
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
        except UnpicklingError as error:
            named = re.search(r"GLOBAL (\S+)", str(error))
            if named is None:
                raise
            raise InputError(f"it wants {named[1]}, which is no part of a checkpoint") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: wanted a dict of tensors, got {type(content).__name__}")
    return cast("dict[str, Any]", content)


def _check_pickles(path: Path, is_archive: bool) -> None:
    """Check the pickles that torch is going to read: one of an archive, five at the start else."""
    if not is_archive:
        with path.open("rb") as file:
            for _ in range(5):
                pickles.check_pickle(file)
        return
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
            raise InputError("it is compressed, which torch.save never does")
        if len({info.filename.lower() for info in infos}) < len(infos):
            raise InputError("it holds a file twice")
        for info in infos:
            if info.filename.lower().endswith(".pkl"):
                with archive.open(info) as file:
                    pickles.check_pickle(file)


def torch_tensors(path: Path, content: Mapping[str, Any]) -> Tensors:
    """The tensors among the values of a dict that ``read_pth`` gave.

    Raises:
        InputError: if one is of a dtype that NumPy has not, or larger than the file.
    """
    found: dict[str, Any] = {}
    specs: dict[str, Spec] = {}
    with reading(path, "a torch checkpoint"):
        for key, tensor in content.items():
            if not hasattr(tensor, "detach"):
                continue
            if (name := str(key)) in found:
                raise InputError(f"it holds {name} twice")
            kind = str(tensor.dtype).removeprefix("torch.")
            plain = str(tensor.layout) == "torch.strided" and str(tensor.device) == "cpu"
            if kind not in TORCH_DTYPES or not plain:
                raise InputError(
                    f"{name} is a {kind} tensor, {tensor.layout} on {tensor.device}, which no "
                    "model here has"
                )
            found[name], specs[name] = tensor, Spec(tuple(tensor.shape), np.dtype(kind))
    # Tied weights may count twice; an expanded tensor would fill the memory from a few bytes.
    if sum(spec.nbytes for spec in specs.values()) > 4 * path.stat().st_size:
        raise InputError(f"{path}: its tensors would take far more memory than the file has bytes")
    mapped = zipfile.is_zipfile(path)

    def fetch(name: str) -> np.ndarray:
        with reading(path, "a torch checkpoint"):
            return _to_array(found[name].detach(), mapped)

    return Tensors(specs, fetch)


def write_pth(
    path: Path,
    tensors: Tensors,
    wrapper: str,
    entries: Mapping[str, str],
    track: Track = iter,
) -> None:
    """Write ``{wrapper: tensors, **entries}`` as ``torch.save`` does, which wants all at once."""
    torch = _torch(path)
    state = {name: _to_tensor(torch, tensors[name]) for name in track(tensors)}
    with replacing(path) as temporary:
        torch.save({wrapper: state, **entries}, temporary)


def _safe_open(path: Path) -> Any:
    import safetensors

    open_: Any = safetensors.safe_open  # the library has no types
    return open_(path, framework="numpy")


def read_keras_header(path: Path, name: str) -> str | None:
    """Isovit's header of a Keras file; None if there is none.

    It is an attribute at the root of a .weights.h5; of a .keras, whose config.json holds the
    config of the model, it is made from that.

    Raises:
        InputError: if it is no such file.
    """
    import h5py  # comes with Keras  # pyright: ignore[reportMissingTypeStubs]

    if path.suffix != ".keras":
        with reading(path, "a Keras weights file"), h5py.File(path, "r") as file:
            return cast("Any", file.attrs).get(name)
    with reading(path, "a .keras file"):
        with zipfile.ZipFile(path) as archive:
            check_inflated(path, sum(info.file_size for info in archive.infolist()))
            model = msgspec.json.decode(archive.read("config.json"), type=_KerasModel)
        config = _without_tuples(model.config.get("config"))
        if not isinstance(config, dict) or "family" not in config:
            raise InputError(f"it holds {model.class_name}, which is no model of isovit's")
        return msgspec.json.encode({"format": "keras", "config": config}).decode()


class _KerasModel(msgspec.Struct):
    """The config.json of a .keras file."""

    class_name: str
    config: dict[str, Any]


def _without_tuples(value: Any) -> Any:
    """Keras marks tuples in its JSON; a config takes lists as well."""
    if isinstance(value, dict):
        items = cast("dict[str, Any]", value)
        if items.get("class_name") == "__tuple__":
            return _without_tuples(items["items"])
        return {key: _without_tuples(item) for key, item in items.items()}
    if isinstance(value, list):
        return [_without_tuples(item) for item in cast("list[Any]", value)]
    return value


def write_keras_header(path: Path, name: str, value: str) -> None:
    """Add isovit's header to a Keras file; Keras passes over it, and a .keras needs none."""
    import h5py  # comes with Keras  # pyright: ignore[reportMissingTypeStubs]

    if path.suffix != ".keras":
        with h5py.File(path, "a") as file:
            cast("Any", file.attrs)[name] = value


@contextmanager
def keras_weights(path: Path) -> Generator[Path]:
    """The .weights.h5 in a .keras file, taken out for as long as it is read; or the file itself."""
    if path.suffix != ".keras":
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        with reading(path, "a .keras file"), zipfile.ZipFile(path) as archive:
            weights = Path(archive.extract("model.weights.h5", folder))
        try:
            yield weights
        except InputError as error:
            raise InputError(str(error).replace(str(weights), str(path))) from None


def read_text(path: Path) -> bytes:
    """A small file that stands beside weights.

    Raises:
        InputError: if it cannot be read, or is not small.
    """
    with reading(path, "a text"):
        if path.stat().st_size > LARGEST_TEXT:
            raise InputError(f"it has {path.stat().st_size:,} bytes")
        return path.read_bytes()


def check_folder(path: Path) -> None:
    """Check that a folder holds nothing on which a reader would wait, or drown.

    Raises:
        InputError: for a pipe, a device, or a huge file where a list of arrays should be.
    """
    for file in path.rglob("*"):
        try:
            about = file.stat()
        except OSError:  # a link to nowhere; a reader that needs it will say so
            continue
        if not (stat.S_ISREG(about.st_mode) or stat.S_ISDIR(about.st_mode)):
            raise InputError(f"cannot read {path}: {file.name} in it is no file")
        lists = file.parent == path or file.name == "manifest.ocdbt"
        if lists and about.st_size > LARGEST_TEXT:
            raise InputError(f"cannot read {path}: {file.name} has {about.st_size:,} bytes")


@contextmanager
def reading(path: Path, wanted: str) -> Generator[None]:
    """Turn whatever a parser raises on the bytes of a file into one line.

    Raises:
        InputError: for an absent or unreadable file, and for every exception from inside.
    """
    try:
        is_file = stat.S_ISREG(path.stat().st_mode)
        if is_file:  # to open a pipe is to wait for its other end
            path.open("rb").close()
    except (OSError, ValueError) as error:  # ValueError: a name that no system has
        said = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {path}: {said}") from None
    if not is_file:
        raise InputError(f"cannot read {path}: it is no file")
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


def _to_array(tensor: Any, mapped: bool = False) -> np.ndarray:
    """A copy of a tensor as an array; bfloat16, which torch does not hand to NumPy, by its bits."""
    import torch

    plain = tensor.contiguous()
    if tensor.dtype == torch.bfloat16:
        array = plain.view(torch.uint16).numpy().view(BFLOAT16).copy()
    else:
        array = plain.numpy().copy()
    if mapped and plain is tensor:
        _release(tensor.data_ptr(), array.nbytes)
    return array


def _release(address: int, nbytes: int) -> None:
    """Let the system take back the pages of a mapped file; they can be read again from it.

    Without it, all that was read of the file stays in memory as long as there is room. Only for
    memory that is a file's: any other would be wiped.
    """
    page = mmap.PAGESIZE
    start = -(-address // page) * page
    length = (address + nbytes) // page * page - start
    if sys.platform == "linux" and length > 0:
        madvise = ctypes.CDLL(None).madvise
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def _to_tensor(torch: Any, array: np.ndarray) -> Any:
    array = np.array(array, order="C")
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)
