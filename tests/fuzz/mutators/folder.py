"""Folders of Hugging Face and of orbax: files beside the weights that lie or point elsewhere."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz.mutators import pth
from tests.fuzz.mutators import safetensors as tensors
from tests.fuzz.mutators.header import HUGE, ODD, edited
from tests.fuzz.sample import Mutator, Rng, Sample, copy

# Hugging Face


def index_of(sample: Sample) -> tuple[Path, dict[str, Any]]:
    """The index of the shards; of a folder that has one file alone, one is made."""
    found = list(sample.path.glob("*.index.json"))
    if found:
        return found[0], json.loads(found[0].read_text(encoding="utf-8"))
    whole = sample.path / "model.safetensors"
    header, _ = tensors.read(whole)
    shard = whole.rename(whole.with_name("model-00001-of-00001.safetensors"))
    path = sample.path / "model.safetensors.index.json"
    return path, {"weight_map": dict.fromkeys(tensors.tensors(header), shard.name)}


def write(path: Path, content: Any) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8", errors="surrogatepass")


def paths_in_the_index(sample: Sample, rng: Rng) -> None:
    """Names of shards that lead out of the folder, to a file that would fit."""
    path, index = index_of(sample)
    shard = next(iter(index["weight_map"].values()))
    outside = sample.work / "outside" / shard
    shutil.copyfile(sample.path / shard, outside)
    (sample.path / "sub").mkdir()
    shutil.copyfile(sample.path / shard, sample.path / "sub" / shard)
    tricks = [
        f"../../outside/{shard}",
        f"../outside/{shard}",
        str(outside),
        f"./{shard}",
        f"sub/{shard}",
        f"sub/../{shard}",
        f"..\\outside\\{shard}",
        "..",
        ".",
        "",
        "/",
        "/dev/zero",
        "/etc/passwd",
        "~/" + shard,
        "a\nb",
        "\x1b[2J",
        "\0",
        shard + "\0",
        "\ud800",
        "x" * 5000,
        "con",
        "sub",
        "config.json",
    ]
    trick = rng.choice(tricks)
    for name, file in index["weight_map"].items():
        if file == shard:
            index["weight_map"][name] = trick
    write(path, index)
    sample.must = "fail"


def the_index(sample: Sample, rng: Rng) -> None:
    path, index = index_of(sample)
    weight_map = index["weight_map"]
    name = rng.choice(list(weight_map))
    match rng.randrange(8):
        case 0:
            weight_map[name] = rng.choice([1, None, [], {}, ["a"]])
        case 1:
            del weight_map[name]
        case 2:
            weight_map["more"] = weight_map[name]
        case 3:
            index["weight_map"] = rng.choice([*ODD, [weight_map], 1])
        case 4:
            weight_map |= {f"x{i}": weight_map[name] for i in range(10**5)}
        case 5:
            weight_map |= {f"x{i}": f"shard{i}.safetensors" for i in range(10**4)}
        case 6:
            write(
                path, rng.choice(["[" * 10**6, '{"weight_map":' * 10**5, "{}", "null", "", "{" * 9])
            )
            return
        case _:
            text = json.dumps(index)
            write(path, text[:-2] + f', "{name}": "other.safetensors"' + text[-2:])
            return
    write(path, index)


def shards(sample: Sample, rng: Rng) -> None:
    """A shard that is missing, another's, a folder, or a link that leads nowhere or round."""
    path, index = index_of(sample)
    write(path, index)
    names = sorted(set(index["weight_map"].values()))
    shard = sample.path / rng.choice(names)
    match rng.randrange(6):
        case 0:
            shard.unlink()
        case 1:
            (sample.path / names[-1]).write_bytes((sample.path / names[0]).read_bytes()[:-9])
        case 2:
            shard.unlink()
            shard.mkdir()
        case 3:
            shard.unlink()
            shard.symlink_to(shard.name)
        case 4:
            shard.unlink()
            a, b = sample.path / "a", sample.path / "b"
            a.symlink_to(b)
            b.symlink_to(a)
            shard.symlink_to(a)
        case _:
            shard.unlink()
            os.mkfifo(shard)


FIELDS = (
    "image_size",
    "patch_size",
    "num_channels",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "qkv_bias",
    "hidden_act",
    "layer_norm_eps",
    "id2label",
    "architectures",
    "model_type",
    "architecture",
    "pretrained_cfg",
    "hidden_dropout_prob",
)


def the_config(sample: Sample, rng: Rng) -> None:
    if rng.random() < 0.5:
        (sample.path / "isovit.json").unlink(missing_ok=True)
    path = sample.path / "config.json"
    said = json.loads(path.read_text(encoding="utf-8"))
    for name in rng.sample(FIELDS, rng.choice([1, 1, 1, 4])):
        said[name] = rng.choice([*ODD, *HUGE, 10**400, [10**9] * 2, "x" * 10**5])
    if rng.random() < 0.2:
        said["pretrained_cfg"] = {
            rng.choice(["crop_pct", "interpolation", "mean", "std"]): rng.choice([*ODD, *HUGE])
        }
    write(path, said)


def the_processor(sample: Sample, rng: Rng) -> None:
    (sample.path / "isovit.json").unlink(missing_ok=True)
    path = sample.path / "preprocessor_config.json"
    said = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    names = ["size", "crop_size", "image_mean", "image_std", "resample", "do_center_crop"]
    for name in rng.sample(names, rng.choice([1, 2, 4])):
        odd = [*ODD, *HUGE, 10**400, {"height": 10**400}, {"height": []}, {"shortest_edge": "x"}]
        said[name] = rng.choice([*odd, [float("nan")] * 3, [1e400] * 3, [[1]] * 3])
    write(path, said)


def files_beside(sample: Sample, rng: Rng) -> None:
    """A JSON file that is none, or too large, or several sets of weights."""
    names = ["config.json", "preprocessor_config.json", "isovit.json"]
    path = sample.path / rng.choice(names)
    path.unlink(missing_ok=True)
    match rng.randrange(7):
        case 0:
            write(path, rng.choice(["", "[]", "1", "null", "[" * 10**6, '{"a":' * 10**5, "\ud800"]))
        case 1:
            path.touch()
            os.truncate(path, 3 << 30)
        case 2:
            path.mkdir()
        case 3:
            os.mkfifo(path)
        case 4:
            path.symlink_to("/dev/zero")
        case 5:
            write(path, json.dumps({"x" * 10: "y" * 10**7}))
        case _:
            name = rng.choice(["pytorch_model.bin", "model.pth", "model.safetensors.index.json"])
            (sample.path / name).write_bytes(sample.other(rng))


def the_header(sample: Sample, rng: Rng) -> None:
    path = sample.path / "isovit.json"
    default = '{"format": "hf", "config": {"family": "vit"}}'
    text = path.read_text(encoding="utf-8") if path.exists() else default
    write(path, edited(text, rng))


def the_weights(sample: Sample, rng: Rng) -> None:
    """What can be wrong with a file of weights, inside a folder."""
    found = sorted(sample.path.glob("*.safetensors")) or sorted(sample.path.glob("*.bin"))
    path = rng.choice(found)
    part = Sample.__new__(Sample)
    part.__dict__.update(sample.__dict__, path=path)
    kind = tensors if path.suffix == ".safetensors" else pth
    mutators = [m for m in kind.MUTATORS if m.__name__ not in ("more_blocks", "a_bomb")]
    rng.choice(mutators)(part, rng)


def code_in_torch_weights(sample: Sample, rng: Rng) -> None:
    for path in sample.path.glob("*.safetensors"):
        path.unlink()
    call = pth.Call(os.mkdir, str(sample.trap))
    pth.put(sample.path / rng.choice(["pytorch_model.bin", "model.pth"]), pth.pickled({"x": call}))


OF_HF: dict[Mutator, int] = {
    paths_in_the_index: 8,
    the_index: 4,
    shards: 3,
    the_config: 6,
    the_processor: 4,
    files_beside: 3,
    the_header: 3,
    the_weights: 3,
    code_in_torch_weights: 1,
}


# orbax


def listing(sample: Sample) -> tuple[Path, dict[str, Any]]:
    path = sample.path / "_METADATA"
    return path, json.loads(path.read_text(encoding="utf-8"))


def the_list(sample: Sample, rng: Rng) -> None:
    """``_METADATA``: the arrays of the folder."""
    path, said = listing(sample)
    entries = said["tree_metadata"]
    name = rng.choice(list(entries))
    steps = entries[name]["key_metadata"]
    match rng.randrange(9):
        case 0:
            del entries[name]
        case 1:
            steps[rng.randrange(len(steps))]["key"] = rng.choice(
                ["..", "/", "", "a\nb", "\x1b[2J", "x" * 10**4, 0, None, "../../outside"]
            )
        case 2:
            steps.clear()
        case 3:
            entries[name]["key_metadata"] = rng.choice([*ODD, steps * 1000])
        case 4:
            entries |= {f"{name}{i}": entries[name] for i in range(10**4)}
        case 5:
            entries |= {str(i): {"key_metadata": [{"key": i}]} for i in range(10**5)}
        case 6:
            said = rng.choice([*ODD, {"tree_metadata": rng.choice(ODD)}])
        case 7:
            entries[name]["value_metadata"] = rng.choice([*ODD, {"value_type": "scalar"}])
            said["use_zarr3"] = rng.choice([True, False, None, "x"])
            said["use_ocdbt"] = rng.choice([True, False, None])
        case _:
            steps.pop()
    write(path, said)


def the_arrays(sample: Sample, rng: Rng) -> None:
    """What zarr says of an array."""
    import tensorstore

    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{sample.path}/"}).result()
    keys = [key for key in store.list().result() if key.endswith(b"/.zarray")]
    for key in rng.sample(keys, rng.choice([1, 1, 5])):
        said = json.loads(store.read(key).result().value)
        size = rng.choice([10**6, 10**9, 2**40, -1, 0, 2**63])
        match rng.randrange(7):
            case 0 | 1:
                said["shape"] = [size] * len(said["shape"])
            case 2:
                said["shape"] = [rng.choice([4 * 10**8, 10**10])]
                said["chunks"] = [rng.choice([10**3, 10**8, said["shape"][0]])]
                said["fill_value"] = 0.0
            case 3:
                said["chunks"] = [size] * len(said["shape"])
            case 4:
                said["dtype"] = rng.choice(
                    ["<f8", ">f4", "<i8", "|b1", "<c8", "bfloat16", "<U3", "x"]
                )
            case 5:
                said["compressor"] = rng.choice([None, {"id": "gzip"}, {"id": "x"}, 5])
            case _:
                store.write(key, rng.choice([b"", b"{}", b"[" * 10**5, b"\xff"])).result()
                continue
        store.write(key, json.dumps(said).encode()).result()


def the_chunks(sample: Sample, rng: Rng) -> None:
    """The numbers of an array: gone, cut, or a bomb."""
    import tensorstore

    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{sample.path}/"}).result()
    keys = [key for key in store.list().result() if not key.endswith(b"/.zarray")]
    for key in rng.sample(keys, rng.choice([1, 3])):
        data = store.read(key).result().value
        match rng.randrange(4):
            case 0:
                store.delete_range(tensorstore.KvStore.KeyRange(key, key + b"\0")).result()
            case 1:
                store.write(key, data[: len(data) // 2]).result()
            case 2:
                store.write(key, rng.randbytes(100)).result()
            case _:
                zeros = np.zeros(1 << 26, np.uint8)
                bomb = {"driver": "zarr", "kvstore": {"driver": "memory"}, "path": "x/"}
                spec = {"chunks": [1 << 26], "shape": [1 << 26], "dtype": "|u1"}
                spec["compressor"] = {"id": "zstd", "level": 1}
                array = tensorstore.open({**bomb, "metadata": spec}, create=True).result()
                array[...] = zeros
                found = array.kvstore.list().result()
                chunk = next(k for k in found if not k.endswith(b".zarray"))
                store.write(key, array.kvstore.read(chunk).result().value).result()


def a_file_of_it(sample: Sample, rng: Rng) -> None:
    """A file or a folder inside that is missing, empty, a loop, a pipe, or another's."""
    inside = sorted(sample.path.rglob("*"), key=lambda p: (p.is_dir(), p.stat().st_size, p.name))
    path = rng.choice(inside)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    match rng.randrange(6):
        case 0:
            pass
        case 1:
            path.touch()
        case 2:
            path.mkdir()
        case 3:
            path.symlink_to(path.name)
        case 4:
            other = rng.choice([s for s in sample.seeds if s.container == "orbax"])
            source = sample.corpus / other.name / path.relative_to(sample.path).parts[0]
            if source.exists():
                copy(source, path)
        case _:
            path.write_bytes(rng.randbytes(200))


OF_ORBAX: dict[Mutator, int] = {
    the_list: 6,
    the_arrays: 5,
    the_chunks: 3,
    a_file_of_it: 4,
    the_header: 3,
}
