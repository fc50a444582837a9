"""Small real files of every format: those that isovit writes, and those that others write."""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
from safetensors.numpy import load_file, save_file

from isovit.spec.config import Config
from isovit.spec.families import config as published
from isovit.spec.families.vit import ViTConfig
from isovit.spec.initialize import probe
from isovit.weight_convert import huggingface
from isovit.weight_convert.checkpoint import Checkpoint
from isovit.weight_convert.store import save
from tests.small import T2T, VIT

CONTAINERS = ("safetensors", "npz", "pth", "h5", "keras", "orbax", "hf")

# What names and shapes do not tell of the small models.
HEADS = ("num_heads=3",)
SIZES = ("image_size=[16,24]",)
SQUARE = VIT.replace(image_size=24, patch_size=8)
SIMPLE = VIT.replace(pos_embed_tokens="patches")
DISTILLED = VIT.replace(dist_token=True, dist_head=True)
YITU = published(
    "t2t_vit_7", image_size=16, embed_dim=12, depth=1, num_heads=3, mlp_dim=20, num_classes=5
)
PYTORCH = ViTConfig(
    image_size=(16, 16),
    patch_size=(8, 8),
    embed_dim=12,
    depth=1,
    num_heads=2,
    head_dim=64,
    mlp_dim=20,
    num_classes=5,
    patch_embed="norm_linear_norm",
    qkv_bias=False,
    norm_eps=1e-5,
)


class Seed(msgspec.Struct, frozen=True):
    """A file or a folder that every command reads.

    Attributes:
        name: of the file or folder.
        container: one of ``CONTAINERS``.
        changes: what it takes beside the file, as ``--set`` has it.
    """

    name: str
    container: str
    changes: tuple[str, ...] = ()


def checkpoint(config: Config, dtype: Any = np.float32) -> Checkpoint:
    """A checkpoint of probe weights."""
    return Checkpoint(config, {name: a.astype(dtype) for name, a in probe(config).items()})


def build(folder: Path) -> list[Seed]:
    """Write all seeds into a folder, unless it has them already."""
    listing = folder / "seeds.json"
    if not listing.exists():
        seeds: list[Seed] = []
        for write in (safetensors, npz, pth, keras, folders):
            seeds += [Seed(*row) for row in write(folder)]
        listing.write_bytes(msgspec.json.encode(seeds))
    return msgspec.json.decode(listing.read_bytes(), type=list[Seed])


Rows = list[tuple[Any, ...]]


def safetensors(folder: Path) -> Rows:
    """Canonical, of the torch model, and bare as timm and Hugging Face write them."""
    save(checkpoint(VIT), folder / "vit.safetensors")
    save(checkpoint(T2T), folder / "t2t.safetensors")
    save(checkpoint(VIT, ml_dtypes.bfloat16), folder / "half.safetensors")
    save(checkpoint(T2T, np.float64), folder / "torch.safetensors", "torch")
    for format in ("timm", "hf"):
        save(checkpoint(SQUARE), folder / "with_header.safetensors", format)
        arrays = load_file(folder / "with_header.safetensors")
        save_file(arrays, folder / f"{format}.safetensors", {"format": "pt"})
    (folder / "with_header.safetensors").unlink()
    names = ("vit", "t2t", "half", "torch")
    told = [(f"{name}.safetensors", "safetensors") for name in names]
    return told + [(f"{name}.safetensors", "safetensors", HEADS) for name in ("timm", "hf")]


def npz(folder: Path) -> Rows:
    """Of the Flax model, plain and deflated, and bare as google writes them."""
    save(checkpoint(VIT), folder / "vit.npz")
    save(checkpoint(T2T), folder / "t2t.npz")
    save(checkpoint(VIT), folder / "with_header.npz", "google")
    with np.load(folder / "with_header.npz") as file:
        arrays = {name: file[name] for name in file.files}
    np.savez(folder / "google.npz", **arrays)
    np.savez_compressed(folder / "deflated.npz", **arrays)
    save(checkpoint(SIMPLE), folder / "with_header.npz", "big_vision")
    with np.load(folder / "with_header.npz") as file:
        arrays = {f"params/{name}": file[name] for name in file.files}
    np.savez(folder / "big_vision.npz", **stacked(arrays))
    (folder / "with_header.npz").unlink()
    bare = ("google", "deflated", "big_vision")
    return [("vit.npz", "npz"), ("t2t.npz", "npz"), *((f"{n}.npz", "npz", SIZES) for n in bare)]


def stacked(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All blocks in one array each, along a leading axis."""
    first = "params/Transformer/encoderblock_0/"
    depth = len({name.split("/")[2] for name in arrays if "encoderblock_" in name})
    rest = {name: array for name, array in arrays.items() if "encoderblock_" not in name}
    for name in [name for name in arrays if name.startswith(first)]:
        blocks = [arrays[name.replace("block_0", f"block_{i}")] for i in range(depth)]
        rest[name.replace("block_0", "block")] = np.stack(blocks)
    return rest


def pth(folder: Path) -> Rows:
    """Of the torch model, and what training code writes, in both containers of torch."""
    import torch

    def state(config: Config, format: str) -> dict[str, torch.Tensor]:
        save(checkpoint(config), folder / "with_header.pth", format)
        content = torch.load(folder / "with_header.pth", weights_only=True)
        (folder / "with_header.pth").unlink()
        return next(value for value in content.values() if isinstance(value, dict))

    save(checkpoint(VIT), folder / "vit.pth")
    save(checkpoint(T2T), folder / "t2t.pt")
    timm = state(SQUARE, "timm")
    training = {
        "epoch": 3,
        "arch": "vit_tiny",
        "state_dict": timm,
        "state_dict_ema": timm,
        "args": argparse.Namespace(lr=1e-3, model="vit", mean=(0.5, 0.5)),
        "metric": np.float64(81.5),
        "optimizer": {"state": {0: {"step": 5, "exp_avg": torch.zeros(3)}}, "param_groups": []},
    }
    torch.save(training, folder / "training.pth.tar")
    torch.save(timm, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    torch.save({"model": state(DISTILLED, "deit")}, folder / "deit.pth")
    torch.save({"module." + k: v for k, v in state(YITU, "yitu").items()}, folder / "yitu.pth")
    half = {k: v.to(torch.bfloat16) for k, v in state(PYTORCH, "vit_pytorch").items()}
    torch.save(half, folder / "vit_pytorch.pth")
    return [
        ("vit.pth", "pth"),
        ("t2t.pt", "pth"),
        *((name, "pth", HEADS) for name in ("training.pth.tar", "legacy.pth", "yitu.pth")),
        ("deit.pth", "pth", HEADS + SIZES),
        ("vit_pytorch.pth", "pth"),
    ]


def keras(folder: Path) -> Rows:
    """Weights alone, and the whole model."""
    names = [("vit", VIT), ("t2t", T2T)]
    for name, config in names:
        save(checkpoint(config), folder / f"{name}.weights.h5")
        save(checkpoint(config), folder / f"{name}.keras")
    return [
        *((f"{name}.weights.h5", "h5") for name, _ in names),
        *((f"{name}.keras", "keras") for name, _ in names),
    ]


def folders(folder: Path) -> Rows:
    """Of orbax, and of Hugging Face: one file, shards, and shards of torch."""
    import torch

    save(checkpoint(VIT), folder / "vit_orbax")
    save(checkpoint(T2T), folder / "t2t_orbax")
    save(checkpoint(SQUARE), folder / "hf", "hf")
    save(checkpoint(SQUARE), folder / "whole", "hf")
    arrays = load_file(folder / "whole" / "model.safetensors")
    sidecars = {n: (folder / "whole" / n).read_bytes() for n in huggingface.sidecars(SQUARE)}
    for path in (folder / "whole").iterdir():
        path.unlink()
    (folder / "whole").rmdir()

    def shards(name: str, index: str, write: Callable[[dict[str, np.ndarray], Path], Any]) -> None:
        (folder / name).mkdir()
        stem, suffix = index.split(".")[:2]
        weight_map: dict[str, str] = {}
        for i in (0, 1):
            part = {key: arrays[key] for key in list(arrays)[i::2]}
            shard = f"{stem}-{i + 1:05d}-of-00002.{suffix}"
            write(part, folder / name / shard)
            weight_map |= dict.fromkeys(part, shard)
        told = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / name / index).write_bytes(msgspec.json.encode(told))
        for sidecar, content in sidecars.items():
            (folder / name / sidecar).write_bytes(content)

    shards("shards", "model.safetensors.index.json", save_file)
    shards(
        "shards_bin",
        "pytorch_model.bin.index.json",
        lambda part, path: torch.save({k: torch.from_numpy(a) for k, a in part.items()}, path),
    )
    orbax = [("vit_orbax", "orbax"), ("t2t_orbax", "orbax")]
    return orbax + [(name, "hf") for name in ("hf", "shards", "shards_bin")]


def members(path: Path) -> dict[str, bytes]:
    """The content of a zip archive."""
    with zipfile.ZipFile(path) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}
