"""Pickles that want to run code, and tensors that torch can hold but no model has."""

from __future__ import annotations

import argparse
import collections
import io
import os
import pickle
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz.corpus import members
from tests.fuzz.mutators.header import edited
from tests.fuzz.mutators.npz import BOMB, add_zeros, append, rewrite
from tests.fuzz.sample import Mutator, Rng, Sample


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.content = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.content


class Storage:
    """Pickles as the persistent id of a storage."""

    def __init__(self, *identity: Any) -> None:
        self.identity = identity


class Pickler(pickle._Pickler):  # the one in Python does not stop where memory of C would
    def persistent_id(self, obj: Any) -> Any:
        return obj.identity if isinstance(obj, Storage) else None


def pickled(content: Any, protocol: int = 2) -> bytes:
    file = io.BytesIO()
    Pickler(file, protocol).dump(content)
    return file.getvalue()


def put(path: Path, data: bytes, storages: dict[str, bytes] | None = None) -> None:
    """An archive as torch writes it, with any pickle."""
    content = {"archive/data.pkl": data, "archive/byteorder": b"little"}
    content |= {
        f"archive/data/{key}": value for key, value in (storages or {"0": bytes(64)}).items()
    }
    rewrite(path, {**content, "archive/version": b"3\n"}, b"")


def load(sample: Sample) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is in the file, and the state dict in it."""
    import torch

    with torch.serialization.safe_globals([argparse.Namespace, *scalars()]):
        content = torch.load(sample.path, weights_only=True)
    state = next((v for v in content.values() if isinstance(v, dict) and len(v) > 5), content)
    return content, state


def scalars() -> list[Any]:
    names = [np.dtype, np.dtypes.Float64DType]
    return [*names, getattr(np, "_core").multiarray.scalar]  # noqa: B009 -- NumPy's own


def save(sample: Sample, content: Any, rng: Rng) -> None:
    import torch

    torch.save(content, sample.path, _use_new_zipfile_serialization=rng.random() < 0.8)


def code(sample: Sample, rng: Rng) -> None:
    """Whatever the name of the function, it must not be called."""
    command = f"touch {sample.trap}"
    wanted = rng.choice(
        [
            Call(os.system, command),
            Call(os.mkdir, str(sample.trap)),
            Call(eval, f"__import__('os').mkdir({str(sample.trap)!r})"),
            Call(exec, f"import os; os.mkdir({str(sample.trap)!r})"),
            Call(os.open, str(sample.trap), os.O_CREAT),
            Call(subprocess.getoutput, command),
            Call(subprocess.Popen, ["touch", str(sample.trap)]),
            Call(getattr, os, "system"),
            Call(argparse.Namespace, state={"__class__": Call(os.system, command)}),
            Call(np.dtype, Call(os.mkdir, str(sample.trap))),
            Call(np.load, str(sample.trap)),
        ]
    )
    if isinstance(wanted.content[1], tuple) and wanted.content[1][:1] == (os,):
        data = b"\x80\x02cposix\nsystem\nU" + bytes([len(command)]) + command.encode() + b"\x85R."
        put(sample.path, data)
        return
    content, state = load(sample)
    where = rng.choice([content, state])
    where[rng.choice(["args", "x", next(iter(where))])] = wanted
    save(sample, content, rng)


def opcodes(sample: Sample, rng: Rng) -> None:
    """Pickles written by hand."""
    path = str(sample.trap).encode()
    programs = [
        b"(Vtouch " + path + b"\nios\nsystem\n.",
        b"cos\nsystem\n(Vtouch " + path + b"\ntR.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x01x\x85R.",
        b"c__builtin__\neval\n(V1\ntR.",
        b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
        b"cnumpy\ndtype\nU\x0bV2000000000\x85Rq\x00cnumpy._core.multiarray\nscalar\nh\x00\x85R.",
        b"}" + b"q\x00h\x00h\x00h\x00s" * 3 + b".",
        b"(" * 10**5 + b".",
        b"(" * 10**5 + b"d" * 10**5 + b".",
        b"]" * 10**5 + b"a" * 10**5 + b".",
        b"\x8a\xff" + b"\xff" * 255 + b".",
        b"\x8b\xff\xff\xff\x7f.",
        b"\x8e" + b"\xff" * 8 + b".",
        b"T\xff\xff\xff\x7f.",
        b"j\xff\xff\xff\x7f.",
        b"r\xff\xff\xff\x7f.",
        b"N0N0N00000.",
        b"Qx.",
        b"N.",
        b"",
        b"I" + b"9" * 10**6 + b"\n.",
        b"F1e999\n.",
    ]
    program = rng.choice(programs)
    prefix = b"" if program.startswith(b"\x80") else b"\x80\x02"
    put(sample.path, prefix + program)


def laughs(sample: Sample, rng: Rng) -> None:
    """Each tuple holds the last one twice: short to write, long to walk."""
    data, depth = b"\x80\x02)q\x00", rng.choice([20, 60, 200])
    for i in range(depth):
        data += b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1])
    top = b"h" + bytes([depth])
    data += rng.choice([b"}" + top + b"Ns.", top + b".", b"}X\1\0\0\0a" + top + b"s."])
    put(sample.path, data)


def deep(sample: Sample, rng: Rng) -> None:
    """Dicts in dicts."""
    depth = rng.choice([100, 10**4, 10**5])
    inner = rng.choice([b"}X\1\0\0\0a", b"(X\1\0\0\0a", b"]", b"("])
    close = {b"}": b"s", b"]": b"a", b"(": b"d" if len(inner) > 1 else b"t"}[inner[:1]]
    data = b"\x80\x02}X\5\0\0\0model" + inner * depth + b"N" + close * depth + b"s."
    put(sample.path, data)


def itself(sample: Sample, rng: Rng) -> None:
    """A dict that holds itself."""
    import torch

    _, state = load(sample)
    key = rng.choice(["model", "state_dict", "x", "teacher"])
    state[key] = state
    torch.save({key: state} if rng.random() < 0.5 else state, sample.path)


def keys(sample: Sample, rng: Rng) -> None:
    content, state = load(sample)
    odd: list[Any] = [1, None, (1, 2), b"a", float("nan"), "", "a\nb", "\x1b[2J", "x" * 10**5, "\0"]
    for key in rng.sample(odd, rng.randint(1, 3)):
        state[key] = state.pop(next(iter(state)))
    save(sample, content, rng)


def values(sample: Sample, rng: Rng) -> None:
    """What is no tensor, where one should be."""
    content, state = load(sample)
    odd = [None, 1, "x", [], {}, {"weight": 1}, np.float64(1), 1 + 2j, {1, 2}, b"x", 10**400]
    for name in rng.sample(list(state), rng.randint(1, 3)):
        state[name] = rng.choice(odd)
    save(sample, content, rng)


def wrappers(sample: Sample, rng: Rng) -> None:
    content, state = load(sample)
    names = ["model", "state_dict", "net", "teacher", "student", "model_ema", "state_dict_ema"]
    odd = [state, {}, [], None, {"module": state}, {"x": 1}, 5, {"weight": None}]
    wrapped = {name: rng.choice(odd) for name in rng.sample(names, rng.randint(1, 4))}
    save(sample, wrapped | ({"isovit": content["isovit"]} if "isovit" in content else {}), rng)


def top_level(sample: Sample, rng: Rng) -> None:
    import torch

    _, state = load(sample)
    ordered = collections.OrderedDict(state)
    counted = collections.Counter(a=10**9)
    first = next(iter(state.values()))
    whole = [[], [state], None, 1, "x", torch.zeros(2), ordered, counted, {1, 2}, (state,), first]
    save(sample, rng.choice(whole), rng)


def the_config(sample: Sample, rng: Rng) -> None:
    content, _ = load(sample)
    content = {"state_dict": content} if "isovit" not in content else content
    default = '{"format": "torch", "config": {"family": "vit"}}'
    content["isovit"] = edited(content.get("isovit", default), rng)
    save(sample, content, rng)


def an_odd_config(sample: Sample, rng: Rng) -> None:
    import torch

    content, state = load(sample)
    odd = [1, [], {}, {"format": "torch"}, torch.zeros(3), torch.zeros(()), b"{}", None, state, 1.5]
    content["isovit"] = rng.choice(odd)
    content["arch"] = rng.choice([1, None, "vit_base", torch.zeros(2), state, "x" * 10**6])
    save(sample, content, rng)


def odd_tensors(sample: Sample, rng: Rng) -> None:
    """Kinds of tensors that torch can hold."""
    import torch

    content, state = load(sample)
    name = rng.choice(list(state))
    old = state[name]
    shape = tuple(old.shape)
    make = [
        lambda: old.to(torch.complex64),
        lambda: old.to(torch.float8_e4m3fn),
        lambda: old.to(torch.float8_e5m2),
        lambda: old.to(torch.int8),
        lambda: old.to(torch.uint16),
        lambda: old.to(torch.int64),
        lambda: old.to(torch.float64),
        lambda: old.to(torch.bool),
        lambda: torch.quantize_per_tensor(old.float(), 0.1, 0, torch.qint8),
        lambda: old.float().to_sparse(),
        lambda: torch.zeros(4, 4).to_sparse_csr(),
        lambda: torch.empty(shape, device="meta"),
        lambda: torch.nn.Parameter(old.float()),
        lambda: torch.zeros(1).expand(shape or (1,)),
        lambda: torch.zeros(1).expand(10**6, 10**6),
        lambda: torch.zeros(1, 1).expand(10**12, 0),
        lambda: torch.zeros(0, 10**15),
        lambda: torch.zeros(1).as_strided((10**5, 10**5), (0, 0)),
        lambda: torch.zeros(10**6)[:5],
        lambda: torch.zeros(shape + shape),
        lambda: torch.zeros(()),
        lambda: torch._neg_view(old.float()),
        lambda: torch.view_as_complex(torch.zeros(4, 2)).conj(),
        lambda: old.flip(0) if old.ndim else old,
        lambda: old.t() if old.ndim == 2 else old,
        lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        lambda: torch.tensor([float("nan")]).expand(shape or (1,)),
    ]
    state[name] = rng.choice(make)()
    save(sample, content, rng)


def storages(sample: Sample, rng: Rng) -> None:
    """Tensors whose sizes, strides and offsets are not those of their storage."""
    import torch

    numel = rng.choice([16, 16, 0, 1, -1, 2**31, 10**12, 2**62, 2**63, 10**30, 1.5, None, "16"])
    key = rng.choice(["0", "0", "0", "1", "../0", "", "data.pkl", 0, None])
    kind = rng.choice(
        [torch.FloatStorage, torch.HalfStorage, torch.BFloat16Storage, torch.QInt8Storage]
    )
    device = rng.choice(["cpu", "cpu", "cuda:0", "meta", "xyz", "", None])
    storage = Storage(rng.choice(["storage"] * 8 + ["module", "x"]), kind, key, device, numel)
    size = rng.choice(
        [(16,), (4, 4), (10**6, 10**6), (2**62, 4), (-1,), (0, 10**15), (), (1,) * 70]
    )
    stride = rng.choice([None, (0,) * len(size), (-1,) * len(size), (10**12,) * len(size), ()])
    if stride is None:
        stride = tuple(int(np.prod(size[i + 1 :], dtype=object)) for i in range(len(size)))
    offset = rng.choice([0, 0, 0, 4, 16, -1, 2**40, 2**63, None])
    tensor = Call(
        torch._utils._rebuild_tensor_v2,
        storage,
        offset,
        size,
        stride,
        False,
        collections.OrderedDict(),
    )
    names = ["cls_token", "pos_embed", "patch_embed.proj.weight", "x"]
    state = dict.fromkeys(rng.sample(names, rng.randint(1, 4)), tensor)
    put(sample.path, pickled({"model": state} if rng.random() < 0.5 else state))


def many_views(sample: Sample, rng: Rng) -> None:
    """A thousand tensors over the same bytes."""
    import torch

    content, state = load(sample)
    base = torch.zeros(10**5)
    for i in range(rng.choice([10, 1000])):
        state[f"blocks.{i}.norm1.weight"] = base
    save(sample, content, rng)


def empty_but_huge(sample: Sample, rng: Rng) -> None:
    """No numbers, but axes that nobody should count along."""
    import torch

    content, state = load(sample)
    for name in list(state):
        if rng.random() < 0.3 and getattr(state[name], "ndim", 0) > 1:
            shape = [0] * state[name].ndim
            shape[rng.randrange(len(shape))] = rng.choice([10**9, 10**12])
            state[name] = torch.zeros(shape)
    save(sample, content, rng)


def compressed(sample: Sample, rng: Rng) -> None:
    if not zipfile.is_zipfile(sample.path):
        return
    content = members(sample.path)
    with zipfile.ZipFile(sample.path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def a_bomb(sample: Sample, rng: Rng) -> None:
    """A storage of deflated zeros."""
    import torch

    size = rng.choice([200 << 20, BOMB])
    storage = Storage("storage", torch.FloatStorage, "0", "cpu", size // 4)
    rows = size // 16
    arguments = (storage, 0, (rows, 4), (4, 1), False, collections.OrderedDict())
    put(sample.path, pickled({"x": Call(torch._utils._rebuild_tensor_v2, *arguments)}), {"1": b""})
    add_zeros(sample.path, "archive/data/0", size)


def records(sample: Sample, rng: Rng) -> None:
    """Files of the archive that are missing, twice, or of other sizes."""
    if not zipfile.is_zipfile(sample.path):
        return
    content = members(sample.path)
    name = rng.choice(list(content))
    match rng.randrange(5):
        case 0:
            del content[name]
        case 1:
            content[name] = content[name][: len(content[name]) // 2]
        case 2:
            content[name] += bytes(100)
        case 3:
            folder = next(iter(content)).partition("/")[0]
            content[f"{folder}/byteorder"] = rng.choice([b"big", b"", b"x"])
        case _:
            append(sample.path, name, rng.choice(list(content.values())))
            return
    rewrite(sample.path, content, b"")


def a_tar(sample: Sample, rng: Rng) -> None:
    """Torch's oldest container, which is unpacked to a folder: links in it, and names above it."""
    with tarfile.open(sample.path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            info = tarfile.TarInfo(
                rng.choice([name, name, f"../../outside/{name}", str(sample.trap)])
            )
            if rng.random() < 0.3:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
                archive.addfile(info)
                continue
            data = pickled(rng.choice([0, {}, Call(os.mkdir, str(sample.trap))]))
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def a_whole_model(sample: Sample, rng: Rng) -> None:
    """A pickled module, as people save by mistake."""
    import torch

    _, state = load(sample)
    model = rng.choice([torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.LayerNorm(2))])
    save(sample, rng.choice([model, {"model": model}, {"x": model, "state_dict": state}]), rng)


def a_plain_pickle(sample: Sample, rng: Rng) -> None:
    _, state = load(sample)
    arrays = {
        name: np.zeros(t.shape, np.float32) for name, t in state.items() if hasattr(t, "shape")
    }
    objects = [arrays, {"a": [1, 2]}, Call(os.mkdir, str(sample.trap))]
    sample.path.write_bytes(pickle.dumps(rng.choice(objects), rng.choice([0, 2, 4, 5])))


MUTATORS: dict[Mutator, int] = {
    code: 4,
    opcodes: 6,
    laughs: 1,
    deep: 2,
    itself: 1,
    keys: 3,
    values: 2,
    wrappers: 3,
    top_level: 2,
    the_config: 8,
    an_odd_config: 2,
    odd_tensors: 8,
    storages: 8,
    many_views: 1,
    empty_but_huge: 2,
    compressed: 1,
    a_bomb: 1,
    records: 4,
    a_tar: 1,
    a_whole_model: 1,
    a_plain_pickle: 1,
}
