"""Archives that lie: zip bombs, members twice, arrays whose header says another size."""

from __future__ import annotations

import io
import struct
import warnings
import zipfile
from pathlib import Path

import numpy as np

from tests.fuzz.corpus import members
from tests.fuzz.mutators.header import edited
from tests.fuzz.sample import Mutator, Rng, Sample

BOMB = 5 << 28
"""Bytes that a bomb unpacks to."""

SUSPECT_NAMES = [
    "../../outside/ran",
    "a/../../x.npy",
    "C:\\x.npy",
    "",
    ".",
    "x.npy/",
    "a\nb.npy",
    "\x1b[2J.npy",
    "ä.npy",
    "x" * 60000,
    "readme.txt",
    "blocks",
]


def rewrite(path: Path, content: dict[str, bytes], comment: bytes | None = None) -> None:
    """Write an archive anew, stored."""
    if comment is None:
        with zipfile.ZipFile(path) as archive:
            comment = archive.comment
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(zipfile.ZipInfo(name), data)
        archive.comment = comment


def append(path: Path, name: str, data: bytes) -> None:
    """Add a member, whether there is one of the name or not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(zipfile.ZipInfo(name), data)


def npy(array: np.ndarray, allow_pickle: bool = True) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=allow_pickle)
    return file.getvalue()


def with_header(text: str, data: bytes, version: tuple[int, int] = (1, 0)) -> bytes:
    """An array with any header."""
    size = struct.pack("<H" if version == (1, 0) else "<I", len(text.encode()))
    return b"\x93NUMPY" + bytes(version) + size + text.encode() + data


def change_one(sample: Sample, rng: Rng, data: bytes) -> None:
    content = members(sample.path)
    content[rng.choice(list(content))] = data
    rewrite(sample.path, content)


def a_header_of_an_array(sample: Sample, rng: Rng) -> None:
    shapes = ["(1000000, 1000000)", "(-1,)", "(0, 1000000000000)", "(2.0,)", "'x'", "None", "()"]
    shapes += ["(1,) * 10", f"({'1,' * 70})", f"({10**30},)", "(4611686018427387904, 4)", "(True,)"]
    shape = rng.choice(shapes)
    descr = rng.choice(["'<f4'"] * 6 + ["'|O'", "[('a', '<f4')]", "'V2'", "None", "1", "'x'"])
    order = rng.choice(["False", "True", "1", "None"])
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n"
    change_one(sample, rng, with_header(text, bytes(rng.choice([0, 8, 64]))))


def no_header_of_an_array(sample: Sample, rng: Rng) -> None:
    texts = [
        "",
        "{",
        "(" * 9000,
        "[" * 9000,
        "-" * 9000 + "1",
        "1" * 9000,
        "{}",
        "__import__('os')",
    ]
    version = rng.choice([(1, 0), (2, 0), (3, 0), (9, 9)])
    change_one(sample, rng, with_header(rng.choice([*texts, "'" + "x" * 60000]), bytes(8), version))


def an_array_of_another_dtype(sample: Sample, rng: Rng) -> None:
    content = members(sample.path)
    dtypes = [">f4", "<c8", "<f2", "<f8", "<i8", "|i1", "<u2", "<u4", "?", "<M8[s]", "<U3", "S3"]
    dtypes += ["V4", "V2", "f4,f4", "(2,)f4", "g", "<u8"]
    for name in rng.sample(list(content), rng.choice([1, len(content)])):
        array = np.load(io.BytesIO(content[name]))
        dtype = np.dtype(rng.choice(dtypes))
        content[name] = npy(np.zeros(array.shape, dtype))
    rewrite(sample.path, content)


def python_objects(sample: Sample, rng: Rng) -> None:
    class Trap:
        def __reduce__(self):
            return open, (str(sample.trap), "w")

    change_one(sample, rng, npy(np.array([Trap()])))


def in_fortran_order(sample: Sample, rng: Rng) -> None:
    content = members(sample.path)
    arrays = {name: np.load(io.BytesIO(data)) for name, data in content.items()}
    rewrite(sample.path, {name: npy(np.asfortranarray(a)) for name, a in arrays.items()})
    sample.must = "succeed"


def a_bomb(sample: Sample, rng: Rng) -> None:
    """Zeros that deflate to a thousandth, under the name of an array or another."""
    size = rng.choice([200 << 20, BOMB])
    name = rng.choice([*members(sample.path), "bomb.npy"])
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({size // 4},), }}\n"
    content = members(sample.path)
    content.pop(name, None)
    rewrite(sample.path, content)
    add_zeros(sample.path, name, size, with_header(text, b""))


def add_zeros(path: Path, name: str, size: int, start: bytes = b"") -> None:
    """Add a member that is small in the archive and large outside."""
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open(name, "w", force_zip64=True) as member,
    ):
        member.write(start)
        for _ in range(size >> 24):
            member.write(bytes(1 << 24))


def many_members(sample: Sample, rng: Rng) -> None:
    data = npy(np.zeros(0, np.float32))
    with zipfile.ZipFile(sample.path, "a") as archive:
        for i in range(rng.choice([10**3, 5 * 10**4])):
            archive.writestr(zipfile.ZipInfo(f"{i}.npy"), data)


def a_member_twice(sample: Sample, rng: Rng) -> None:
    name, data = rng.choice(list(members(sample.path).items()))
    append(sample.path, rng.choice([name, name.replace("/", ".")]), data)


def a_name(sample: Sample, rng: Rng) -> None:
    content = members(sample.path)
    name = rng.choice(list(content))
    content[rng.choice([*SUSPECT_NAMES, str(sample.trap)])] = content.pop(name)
    rewrite(sample.path, content)


def a_missing_member(sample: Sample, rng: Rng) -> None:
    content = members(sample.path)
    for name in rng.sample(list(content), rng.choice([1, 1, len(content)])):
        del content[name]
    rewrite(sample.path, content)


def an_encrypted_member(sample: Sample, rng: Rng) -> None:
    set_in_directory(sample, rng, 8, struct.pack("<H", 1))


def a_method_of_compression(sample: Sample, rng: Rng) -> None:
    set_in_directory(sample, rng, 10, struct.pack("<H", rng.choice([8, 9, 12, 14, 93, 99])))


def a_size_in_the_directory(sample: Sample, rng: Rng) -> None:
    number = rng.choice([0, 1, 2**31, 2**32 - 2, 2**32 - 1])
    set_in_directory(sample, rng, rng.choice([16, 20, 24, 42]), struct.pack("<I", number))


def other_compression(sample: Sample, rng: Rng) -> None:
    content = members(sample.path)
    with zipfile.ZipFile(sample.path) as archive:
        comment = archive.comment
    method = rng.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    with zipfile.ZipFile(sample.path, "w", method) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
        archive.comment = comment


def a_prefix(sample: Sample, rng: Rng) -> None:
    """An archive may stand behind other bytes."""
    sample.path.write_bytes(rng.randbytes(rng.randint(1, 5000)) + sample.path.read_bytes())


def the_comment(sample: Sample, rng: Rng) -> None:
    with zipfile.ZipFile(sample.path, "a") as archive:
        archive.comment = rng.choice([b"", b"\xff\xfe", b"{", b"x" * 65535, b"\0"])


def the_config(sample: Sample, rng: Rng) -> None:
    with zipfile.ZipFile(sample.path, "a") as archive:
        default = b'{"format": "flax", "config": {"family": "vit"}}'
        comment = edited((archive.comment or default).decode(), rng).encode()
        archive.comment = comment[:65535]


def odd_numbers(sample: Sample, rng: Rng) -> None:
    content = members(sample.path)
    name = rng.choice(list(content))
    array = np.load(io.BytesIO(content[name]))
    array[...] = rng.choice([np.nan, -np.nan, np.inf, -np.inf, 1e-45])
    content[name] = npy(array)
    rewrite(sample.path, content)
    sample.must = "succeed"


MUTATORS: dict[Mutator, int] = {
    a_header_of_an_array: 6,
    no_header_of_an_array: 3,
    an_array_of_another_dtype: 4,
    python_objects: 1,
    in_fortran_order: 1,
    a_bomb: 1,
    many_members: 1,
    a_member_twice: 1,
    a_name: 3,
    a_missing_member: 1,
    an_encrypted_member: 1,
    a_method_of_compression: 2,
    a_size_in_the_directory: 4,
    other_compression: 1,
    a_prefix: 1,
    the_comment: 1,
    the_config: 8,
    odd_numbers: 1,
}


def set_in_directory(sample: Sample, rng: Rng, offset: int, value: bytes) -> None:
    """Overwrite a field of a member in the central directory."""
    data = bytearray(sample.path.read_bytes())
    starts = [i for i in range(len(data)) if data[i : i + 4] == b"PK\x01\x02"]
    at = rng.choice(starts) + offset
    data[at : at + len(value)] = value
    sample.path.write_bytes(data)
