"""Headers of safetensors that lie."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz.mutators.header import edited
from tests.fuzz.sample import Mutator, Rng, Sample

NAMES = [
    "",
    "a\nb",
    "\x1b[2J",
    "../x",
    "/etc/passwd",
    "x" * 10**5,
    "ä",
    "a..b",
    ".",
    "\u202e",
    "\0",
]


def read(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write(path: Path, header: str | dict[str, Any], data: bytes, length: int | None = None) -> None:
    """A file with any header."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    size = len(text) if length is None else length
    path.write_bytes(struct.pack("<Q", size % 2**64) + text + data)


def tensors(header: dict[str, Any]) -> list[str]:
    return [name for name in header if name != "__metadata__"]


def the_length_of_the_header(sample: Sample, rng: Rng) -> None:
    header, data = read(sample.path)
    size = len(json.dumps(header))
    odd = [0, 1, 7, 8, 2**31, 2**32, 2**62, 2**63, 2**64 - 1, 100_000_001, size - 1, size + 1]
    write(sample.path, header, data, rng.choice(odd))


def no_json(sample: Sample, rng: Rng) -> None:
    _, data = read(sample.path)
    texts = [
        "",
        "{",
        "[]",
        "null",
        "1",
        '"a"',
        "{}}",
        "{'a': 1}",
        "\ufeff{}",
        " " * 10**6,
        "\0" * 8,
    ]
    write(sample.path, rng.choice(texts), data)


def a_deep_header(sample: Sample, rng: Rng) -> None:
    _, data = read(sample.path)
    depth = rng.choice([100, 10**4, 10**6])
    texts = ["[" * depth, '{"a":' * depth, '{"a":' + "[" * depth + "]" * depth + "}"]
    write(sample.path, rng.choice(texts), data)


def a_shape(sample: Sample, rng: Rng) -> None:
    header, data = read(sample.path)
    shapes: list[Any] = [
        [2**62, 4],
        [2**32, 2**32],
        [2**63],
        [2**64],
        [10**30],
        [-1],
        [-4, -3],
        [0],
        [0, 10**15],
        [],
        [1] * 70,
        [1.5],
        ["1"],
        None,
        "x",
        [True],
        {},
    ]
    entry = header[rng.choice(tensors(header))]
    entry["shape"] = rng.choice([*shapes, list(reversed(entry["shape"])), [1, *entry["shape"]]])
    write(sample.path, header, data)


def an_empty_tensor_of_huge_shape(sample: Sample, rng: Rng) -> None:
    """No bytes, but axes that nobody should count along."""
    header, data = read(sample.path)
    names = rng.sample(tensors(header), rng.randint(1, 3))
    if rng.random() < 0.5:
        names = [name for name in names if "pos" in name or "qkv" in name or "weight" in name]
    for name in names:
        shape = [rng.choice([10**9, 10**12, 2**40]) for _ in header[name]["shape"]]
        shape[rng.randrange(len(shape))] = 0
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    header, data = packed(header, data, set(names))
    write(sample.path, header, data)


def a_huge_tensor_in_a_hole(sample: Sample, rng: Rng) -> None:
    """Three gigabytes that take no room on the disk."""
    header, data = read(sample.path)
    names = tensors(header)
    last = max(names, key=lambda name: header[name]["data_offsets"][1])
    start = header[last]["data_offsets"][0]
    rows = (3 << 30) // 16
    header[last] = {
        "dtype": "F32",
        "shape": rng.choice([[rows, 4], [1, 4, rows], [4 * rows]]),
        "data_offsets": [start, start + 16 * rows],
    }
    write(sample.path, header, data[:start])
    with sample.path.open("r+b") as file:
        file.truncate(sample.path.stat().st_size + 16 * rows)


def a_dtype(sample: Sample, rng: Rng) -> None:
    header, data = read(sample.path)
    names = tensors(header)
    dtypes = ["F8_E4M3", "F8_E5M2", "I8", "U16", "C64", "F4", "I64", "F64", "BOOL", "X", "", "f32"]
    for name in rng.sample(names, rng.choice([1, 1, len(names)])):
        header[name]["dtype"] = rng.choice([*dtypes, 32, None, ["F32"]])
    write(sample.path, header, data)


def a_dtype_of_the_same_width(sample: Sample, rng: Rng) -> None:
    """Whole numbers where fractions are: odd, but to be kept bit for bit, or refused."""
    header, data = read(sample.path)
    names = tensors(header)
    same = {"F32": ["I32"], "F64": ["I64"], "BF16": ["F16", "I16", "U16"], "F16": ["BF16"]}
    for name in rng.sample(names, rng.choice([1, 3, len(names)])):
        header[name]["dtype"] = rng.choice(same.get(header[name]["dtype"], ["U8"]))
    write(sample.path, header, data)


def mixed_dtypes(sample: Sample, rng: Rng) -> None:
    """Every tensor in a dtype of its own, with data to fit."""
    header, _ = read(sample.path)
    sizes = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}
    end = 0
    for name in tensors(header):
        dtype = rng.choice(list(sizes))
        size = sizes[dtype] * int(np.prod(header[name]["shape"]))
        header[name] |= {"dtype": dtype, "data_offsets": [end, end + size]}
        end += size
    write(sample.path, header, rng.randbytes(end))


def offsets(sample: Sample, rng: Rng) -> None:
    header, data = read(sample.path)
    entry, other = (header[name] for name in rng.sample(tensors(header), 2))
    start, end = entry["data_offsets"]
    entry["data_offsets"] = rng.choice(
        [
            other["data_offsets"],
            [end, start],
            [start + 1, end + 1],
            [start, end + 4],
            [start - 4, end],
            [-8, -4],
            [len(data), len(data) + end - start],
            [2**63, 2**63 + end - start],
            [2**64 - 4, 2**64],
            [10**30, 10**30 + 4],
            [start],
            [],
            None,
            ["0", "4"],
            [0.0, 4.0],
        ]
    )
    write(sample.path, header, data)


def overlapping_tensors(sample: Sample, rng: Rng) -> None:
    """Many tensors in the same bytes."""
    header, data = read(sample.path)
    first = tensors(header)[0]
    for name in tensors(header)[1:]:
        size = int(np.prod(header[name]["shape"])) * 4
        header[name]["data_offsets"] = [0, size]
    del first
    write(sample.path, header, data)


def a_duplicate_key(sample: Sample, rng: Rng) -> None:
    header, data = read(sample.path)
    name = rng.choice([*tensors(header), "__metadata__"])
    again = json.dumps({name: rng.choice([header.get(name), header[tensors(header)[0]], 1, {}])})
    write(sample.path, json.dumps(header)[:-1] + "," + again[1:], data)


def a_name(sample: Sample, rng: Rng) -> None:
    header, data = read(sample.path)
    header[rng.choice(NAMES)] = header.pop(rng.choice(tensors(header)))
    write(sample.path, header, data)


def another_name_for_each(sample: Sample, rng: Rng) -> None:
    header, data = read(sample.path)
    prefix = rng.choice(["module.", "_orig_mod.", "params.", "opt.target.", "img.", "backbone."])
    more = rng.choice(["", prefix])
    write(
        sample.path,
        {more + prefix + name if name != "__metadata__" else name: v for name, v in header.items()},
        data,
    )


def a_missing_tensor(sample: Sample, rng: Rng) -> None:
    header, data = read(sample.path)
    for name in rng.sample(tensors(header), rng.choice([1, 2, 5])):
        del header[name]
    write(sample.path, *packed(header, data))


def many_tensors(sample: Sample, rng: Rng) -> None:
    """Each of no bytes."""
    header, data = read(sample.path)
    pattern = rng.choice(["{}", "blocks.{}.norm1.weight", "blocks.{}.norm1.scale", "module.x{}"])
    nothing = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    for i in range(rng.choice([10**3, 10**5, 5 * 10**5])):
        header[pattern.format(i)] = nothing
    write(sample.path, header, data)


def more_blocks(sample: Sample, rng: Rng) -> None:
    """A deep model of small blocks that is all there: no fault, but long to read."""
    header, data = read(sample.path)
    said = json.loads(header.get("__metadata__", {}).get("isovit", "{}"))
    blocks = [name for name in tensors(header) if name.startswith("blocks.0.")]
    if not said or not blocks:
        return
    depth = rng.choice([20, 300])
    said["config"]["depth"] = depth
    header["__metadata__"]["isovit"] = json.dumps(said)
    for name in [n for n in tensors(header) if n.startswith("blocks.")]:
        if name not in blocks:
            del header[name]
    header, data = packed(header, data)
    for i in range(1, depth):
        for name in blocks:
            start, end = header[name]["data_offsets"]
            again = {**header[name], "data_offsets": [len(data), len(data) + end - start]}
            header[name.replace("blocks.0.", f"blocks.{i}.")] = again
            data += data[start:end]
    write(sample.path, header, data)
    sample.must = "succeed"


def odd_metadata(sample: Sample, rng: Rng) -> None:
    header, data = read(sample.path)
    odd: list[Any] = [1, [], "x", {"isovit": 1}, {"isovit": None}, {"a": {}}, {"": ""}, None]
    header["__metadata__"] = rng.choice([*odd, {"x": "y" * 10**6}])
    write(sample.path, header, data)


def the_config(sample: Sample, rng: Rng) -> None:
    header, data = read(sample.path)
    metadata = header.setdefault("__metadata__", {})
    default = '{"format": "isovit", "config": {"family": "vit"}}'
    metadata["isovit"] = edited(metadata.get("isovit", default), rng)
    write(sample.path, header, data)


def odd_numbers(sample: Sample, rng: Rng) -> None:
    """NaN, infinities and denormals are kept as they are."""
    header, data = read(sample.path)
    numbers = np.frombuffer(data, np.uint8).copy()
    patterns = [b"\xff", b"\0\0\x80\x7f", b"\0\0\xc0\xff", b"\1\0\0\0", b"\x01\x00\x80\x7f"]
    pattern = np.frombuffer(rng.choice(patterns), np.uint8)
    start = rng.randrange(len(numbers)) // 8 * 8
    numbers[start:] = np.resize(pattern, len(numbers) - start)
    write(sample.path, header, numbers.tobytes())
    sample.must = "succeed"


MUTATORS: dict[Mutator, int] = {
    the_length_of_the_header: 2,
    no_json: 2,
    a_deep_header: 2,
    a_shape: 4,
    an_empty_tensor_of_huge_shape: 3,
    a_huge_tensor_in_a_hole: 2,
    a_dtype: 3,
    a_dtype_of_the_same_width: 2,
    mixed_dtypes: 2,
    offsets: 4,
    overlapping_tensors: 1,
    a_duplicate_key: 2,
    a_name: 3,
    another_name_for_each: 2,
    a_missing_tensor: 2,
    many_tensors: 1,
    more_blocks: 1,
    odd_metadata: 2,
    the_config: 14,
    odd_numbers: 1,
}


def packed(
    header: dict[str, Any], data: bytes, empty: set[str] | None = None
) -> tuple[dict[str, Any], bytes]:
    """The tensors that are left, one after another; those of no bytes in between."""
    kept = b""
    moved: dict[str, Any] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            moved[name] = entry
            continue
        start, end = (0, 0) if name in (empty or ()) else entry["data_offsets"]
        moved[name] = {**entry, "data_offsets": [len(kept), len(kept) + end - start]}
        kept += data[start:end]
    return moved, kept
