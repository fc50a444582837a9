"""HDF5 files that lie or point elsewhere, alone and inside a .keras."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz.corpus import members
from tests.fuzz.mutators import npz, raw
from tests.fuzz.mutators.header import edited
from tests.fuzz.sample import Mutator, Rng, Sample

Edit = Callable[[Any, Sample, Rng], None]


def datasets(file: Any) -> list[str]:
    """Names of all datasets."""
    found: list[str] = []
    file.visititems(lambda name, item: found.append(name) if hasattr(item, "shape") else None)
    return found


def replace_one(file: Any, rng: Rng, **settings: Any) -> str:
    """Put another dataset in the place of one."""
    name = rng.choice(datasets(file))
    del file[name]
    file.create_dataset(name, **settings)
    return name


def a_shape(file: Any, sample: Sample, rng: Rng) -> None:
    """A dataset of any size takes a few bytes as long as nothing is written to it."""
    shapes = [(10**6, 10**6), (2**40,), (0, 10**12), (), (1,) * 32, (3, 10**9), (10**5, 5 * 10**3)]
    chunks = rng.choice([None, True])
    shape = rng.choice(shapes)
    replace_one(
        file, rng, shape=shape, dtype="f4", chunks=chunks if 0 not in shape and shape else None
    )


def all_shapes(file: Any, sample: Sample, rng: Rng) -> None:
    """Every dataset wide, and the config with it."""
    said = json.loads(file.attrs["isovit"])
    factor = rng.choice([10**3, 10**5])
    for field in ("embed_dim", "mlp_dim", "num_heads"):
        said["config"][field] *= factor
    file.attrs["isovit"] = json.dumps(said)
    for name in datasets(file):
        shape = tuple(n * factor if n in (12, 20, 36) else n for n in file[name].shape)
        del file[name]
        file.create_dataset(name, shape, "f4", chunks=True)


def a_deflated_bomb(file: Any, sample: Sample, rng: Rng) -> None:
    rows = rng.choice([10**6, 10**8])
    chunks = (min(rows, 10**6), 8)
    name = replace_one(file, rng, shape=(rows, 8), dtype="f4", chunks=chunks, compression="gzip")
    file[name][: chunks[0]] = np.zeros(chunks, np.float32)


def a_dtype(file: Any, sample: Sample, rng: Rng) -> None:
    import h5py

    dtypes = ["f2", "f8", ">f4", "i8", "u1", "?", "c8", "S5", h5py.string_dtype(), "V4"]
    dtypes += [np.dtype([("a", "f4"), ("b", "i4")]), h5py.ref_dtype, h5py.vlen_dtype("f4")]
    dtypes += [np.dtype(("f4", (2,)))]
    for name in rng.sample(datasets(file), rng.choice([1, 1, 3])):
        shape = file[name].shape
        del file[name]
        file.create_dataset(name, shape, rng.choice(dtypes))


def a_link(file: Any, sample: Sample, rng: Rng) -> None:
    """To another place, another file, nowhere, or the whole."""
    import h5py

    name = rng.choice(datasets(file))
    parent = name.rpartition("/")[0]
    outside = sample.work / "outside" / "other.h5"
    if not outside.exists():
        seed = next(s for s in sample.seeds if s.container == "h5")
        shutil.copyfile(sample.corpus / seed.name, outside)
    place = rng.choice([name, parent])
    kind = rng.randrange(5)
    there = next(n for n in datasets(file) if n != name)
    del file[place]
    if kind == 0:
        file[place] = h5py.SoftLink(rng.choice([f"/{place}", "/nothing", f"/{there}", "/"]))
    elif kind == 1:
        file[place] = h5py.ExternalLink(str(outside), f"/{place}")
        sample.must = "fail"
    elif kind == 2:
        file[place] = h5py.ExternalLink(
            rng.choice(["/etc/passwd", "../outside/other.h5", "nothing.h5"]), "/"
        )
        sample.must = "fail"
    elif kind == 3:
        file[place] = file["/"]
    else:
        group = place.rpartition("/")[0] or "/"
        file[place] = file[group]


def external_storage(file: Any, sample: Sample, rng: Rng) -> None:
    """The numbers are in another file."""
    secret = sample.work / "outside" / "secret"
    secret.write_bytes(bytes(range(256)) * 100)
    name = rng.choice(datasets(file))
    shape = file[name].shape
    del file[name]
    size = 4 * int(np.prod(shape))
    place = rng.choice([str(secret), "../outside/secret", "/etc/passwd"])
    file.create_dataset(name, shape, "f4", external=[(place, 0, size)])
    sample.must = "fail"


def a_virtual_dataset(file: Any, sample: Sample, rng: Rng) -> None:
    """The numbers are in a dataset of another file."""
    import h5py

    other = sample.work / "outside" / "other.h5"
    name = rng.choice(datasets(file))
    shape = file[name].shape
    with h5py.File(other, "w") as there:
        there.create_dataset("x", data=np.ones(shape, np.float32))
    del file[name]
    layout = h5py.VirtualLayout(shape, np.float32)
    if shape:
        layout[...] = h5py.VirtualSource(str(other), "x", shape)
    file.create_virtual_dataset(name, layout)
    sample.must = "fail"


def structure(file: Any, sample: Sample, rng: Rng) -> None:
    """Groups and datasets missing, in each other's place, or more of them."""
    name = rng.choice(datasets(file))
    parent = name.rpartition("/")[0]
    match rng.randrange(6):
        case 0:
            del file[rng.choice([name, parent])]
        case 1:
            del file[name]
            file.create_group(name)
        case 2:
            del file[parent]
            file[parent] = np.zeros(3, np.float32)
        case 3:
            file[f"{parent}/more"] = np.zeros(3, np.float32)
        case 4:
            file["/".join(["a"] * rng.choice([50, 3000]))] = 1
        case _:
            for i in range(rng.choice([100, 3000])):
                file[f"more/{i}"] = np.zeros(1, np.float32)


def attributes(file: Any, sample: Sample, rng: Rng) -> None:
    import h5py

    odd = [
        1,
        1.5,
        np.zeros(3),
        "",
        "x" * 60000,
        np.bytes_(b"{}"),
        h5py.Empty("f4"),
        [1, 2],
        b"\xff",
    ]
    name = rng.choice(datasets(file))
    where = rng.choice([file, file, file[name], file[name.rpartition("/")[0]]])
    key = rng.choice(["isovit", "isovit", "name", "dtype"])
    if key in where.attrs:
        del where.attrs[key]
    where.attrs[key] = rng.choice(["bfloat16", *odd]) if key == "dtype" else rng.choice(odd)


def the_config(file: Any, sample: Sample, rng: Rng) -> None:
    file.attrs["isovit"] = edited(file.attrs["isovit"], rng).replace("\0", "")[:60000]


def numbers(file: Any, sample: Sample, rng: Rng) -> None:
    name = rng.choice(datasets(file))
    if file[name].dtype == np.float32:
        file[name][...] = rng.choice([np.nan, np.inf, -np.inf, 1e-45])
    sample.must = "succeed"


EDITS: dict[Edit, int] = {
    a_shape: 2,
    all_shapes: 1,
    a_deflated_bomb: 1,
    a_dtype: 2,
    a_link: 3,
    external_storage: 1,
    a_virtual_dataset: 1,
    structure: 3,
    attributes: 2,
    the_config: 4,
    numbers: 1,
}


def of_file(edit: Edit) -> Mutator:
    """The edit of a .weights.h5."""

    def mutate(sample: Sample, rng: Rng) -> None:
        import h5py

        with h5py.File(sample.path, "a") as file:
            edit(file, sample, rng)

    mutate.__name__ = edit.__name__
    return mutate


def inside(sample: Sample, rng: Rng, mutate: Callable[[Path], None]) -> None:
    """Change the .weights.h5 in a .keras."""
    content = members(sample.path)
    weights = sample.work / "weights.h5"
    weights.write_bytes(content["model.weights.h5"])
    mutate(weights)
    content["model.weights.h5"] = weights.read_bytes()
    weights.unlink()
    npz.rewrite(sample.path, content)


def the_weights(sample: Sample, rng: Rng) -> None:
    """What can be wrong with a .weights.h5, inside a .keras."""
    import h5py

    edit = rng.choices([e for e in EDITS if e not in (the_config, all_shapes)])[0]

    def mutate(path: Path) -> None:
        with h5py.File(path, "a") as file:
            edit(file, sample, rng)

    inside(sample, rng, mutate)


def the_bytes_of_the_weights(sample: Sample, rng: Rng) -> None:
    def flip(path: Path) -> None:
        count = rng.choice([1, 10, 100])
        raw.change(path, lambda data: raw.flip(data, rng, count, 0, rng.choice([2000, None])))

    inside(sample, rng, flip)


def the_config_of_the_model(sample: Sample, rng: Rng) -> None:
    """The config.json of a .keras: the config that isovit made of itself, or another model's."""
    content = members(sample.path)
    said = json.loads(content["config.json"])
    match rng.randrange(6):
        case 0 | 1 | 2:
            ours = {"format": "keras", "config": said["config"]["config"]}
            text = edited(json.dumps(ours), rng)
            try:
                said["config"]["config"] = json.loads(text)["config"]
            except (ValueError, KeyError, TypeError, RecursionError):
                said["config"]["config"] = text[:100]
        case 3:
            code = {"class_name": "Lambda", "config": {"function": "__import__('os').system('x')"}}
            said = {"class_name": "Functional", "config": {"layers": [code]}}
        case 4:
            tuple_ = {"class_name": "__tuple__"}
            odd = [tuple_, {**tuple_, "items": 5}, {**tuple_, "items": tuple_}, 5, None, [], "x"]
            said["config"]["config"] = rng.choice([*odd, {"family": tuple_}])
        case _:
            text = rng.choice(['{"a":' * 10**5, "[" * 10**6, "{}", "[]", "null", "", "\xff"])
            content["config.json"] = text.encode("latin-1")
    if content["config.json"][:10] == members(sample.path)["config.json"][:10]:
        content["config.json"] = json.dumps(said).encode()
    npz.rewrite(sample.path, content)


def deep_config_of_the_model(sample: Sample, rng: Rng) -> None:
    content = members(sample.path)
    said = json.loads(content["config.json"])
    depth = rng.choice([300, 900])
    key = rng.choice(["config", "family", "x"])
    deep = rng.choice(["[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth])
    said["config"]["config"] = "HERE" if key == "config" else {"family": "vit", key: "HERE"}
    content["config.json"] = json.dumps(said).replace('"HERE"', deep).encode()
    npz.rewrite(sample.path, content)


def parts(sample: Sample, rng: Rng) -> None:
    """Files of the archive that are missing, twice, or named otherwise."""
    content = members(sample.path)
    name = rng.choice(list(content))
    match rng.randrange(4):
        case 0:
            del content[name]
        case 1:
            npz.append(sample.path, name, rng.choice(list(content.values())))
            return
        case 2:
            content[rng.choice(["../../outside/ran", f"/{name}", "x/../" + name])] = content.pop(
                name
            )
        case _:
            npz.add_zeros(sample.path, "assets/bomb", npz.BOMB)
            return
    npz.rewrite(sample.path, content)


OF_H5: dict[Mutator, int] = {of_file(edit): weight for edit, weight in EDITS.items()}
OF_KERAS: dict[Mutator, int] = {
    the_weights: 4,
    the_bytes_of_the_weights: 3,
    the_config_of_the_model: 4,
    deep_config_of_the_model: 1,
    parts: 2,
    npz.an_encrypted_member: 1,
    npz.a_method_of_compression: 1,
    npz.a_size_in_the_directory: 2,
}
