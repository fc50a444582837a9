"""The formats that isovit reads and writes, and which models each can hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from isovit.backends.torch.layout import LAYOUT as TORCH
from isovit.errors import InputError
from isovit.spec.config import BaseConfig
from isovit.spec.families import home
from isovit.spec.layout import CANONICAL, Layout
from isovit.weight_convert import files
from isovit.weight_convert.rename import NativeTable, RenameTable

HEADER_KEY = "isovit"
"""Where a file has its header: metadata of safetensors, entry of .pth, attribute of HDF5.

The header is JSON: ``{"format": NAME, "config": {…}}``. An npz has it as the archive's comment, a
folder as the file ``isovit.json``.
"""


@dataclass(frozen=True)
class Format:
    """A way to keep weights in files.

    Attributes:
        name: as ``--from`` and ``--to`` take it.
        suffixes: of its files, the default first; ``""`` for a folder.
        about: one line for people.
        layout: how it names and orders the axes of each role.
        foreign: whether it belongs to another library, so that a rename table is needed.
        wrapper: the key under which a .pth of it keeps the state dict.
        resize: how its library brings position tables to another grid.
        fixed: fields of the config that its library decides, whatever the weights; others it
            takes as arguments, or from a file beside the weights.
    """

    name: str
    suffixes: tuple[str, ...]
    about: str
    layout: Layout
    foreign: bool = False
    wrapper: str = "state_dict"
    resize: str = "torch_bicubic"
    fixed: tuple[tuple[str, Any], ...] = ()


EXACT, TANH = ("activation", "gelu"), ("activation", "gelu_tanh")
QUICK = ("activation", "quick_gelu")
EPS_5, EPS_6 = ("norm_eps", 1e-5), ("norm_eps", 1e-6)
BATCH_NORM_EPS = ("batch_norm_eps", 1e-5)
PTH, ALIGNED, FOLDER = (".pth", ".safetensors"), "bilinear_align_corners", ""


def _theirs(name: str, about: str, layout: Layout = TORCH, **settings: Any) -> Format:
    """A format of another library; in the containers of torch unless it says otherwise."""
    return Format(name, settings.pop("suffixes", PTH), about, layout, foreign=True, **settings)


# fmt: off
FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format("isovit", (".safetensors",), "canonical weights, config in the metadata", CANONICAL),
        Format("torch", (".pth", ".pt", ".safetensors"), "state dict of the torch model", TORCH),
        Format("flax", (".npz", FOLDER), "arrays or orbax folder of the Flax model", CANONICAL),
        Format("keras", (".weights.h5", ".keras"), "the Keras model's weights, or all", CANONICAL),
        _theirs("hf", "Hugging Face's ViT, DeiT, ViTMAE, LeViT, CvT",
                suffixes=(FOLDER, *reversed(PTH))),
        _theirs("google", "vit_jax", CANONICAL, suffixes=(".npz",), resize=ALIGNED,
                fixed=(TANH, EPS_6)),
        _theirs("big_vision", "google's big_vision", CANONICAL, suffixes=(".npz",), resize=ALIGNED,
                fixed=(TANH, EPS_6)),
        _theirs("scenic", "google's scenic: TokenLearner", CANONICAL, suffixes=(".npz",),
                resize=ALIGNED, fixed=(TANH, EPS_6)),
        _theirs("vit_pytorch", "vit-pytorch", fixed=(EXACT, EPS_5)),
        _theirs("dino", "DINO", wrapper="teacher", resize="dino_bicubic", fixed=(EXACT, EPS_6)),
        _theirs("mae", "MAE's encoder", wrapper="model", fixed=(EXACT, EPS_6)),
        _theirs("deit", "DeiT, distilled or not", wrapper="model", fixed=(EXACT, EPS_6)),
        _theirs("timm", "timm", resize="torch_bicubic_antialias", fixed=(EXACT, EPS_6)),
        _theirs("yitu", "official T2T-ViT", suffixes=(".pth", ".pth.tar", ".safetensors"),
                fixed=(EXACT, EPS_5)),
        _theirs("ibm", "official CrossViT, RegionViT", wrapper="model", fixed=(EXACT, EPS_6)),
        _theirs("dvit", "official DeepViT", fixed=(EXACT, EPS_6, BATCH_NORM_EPS)),
        _theirs("levit", "official LeViT", wrapper="model"),
        _theirs("microsoft", "official CvT", fixed=(QUICK, EPS_5)),
    )
}
# fmt: on

# The format that a target's name asks for when nobody says one.
DEFAULT_FORMATS = {
    ".safetensors": "isovit",
    ".pth": "torch",
    ".pt": "torch",
    ".npz": "flax",
    ".weights.h5": "keras",
    ".keras": "keras",
    "": "flax",
}
SUFFIXES = (".weights.h5", ".pth.tar", ".safetensors", ".pth", ".pt", ".bin", ".npz", ".keras")


def suffix_of(path: Path) -> str:
    """The suffix that decides the container; ``""`` for a folder.

    Raises:
        InputError: if no format has it.
    """
    for suffix in SUFFIXES:
        if path.name.endswith(suffix):
            return suffix
    if path.is_dir() or not path.suffix or path.suffix == ".orbax":
        return ""
    raise InputError(
        f"{path}: no format has the suffix {path.suffix}; wanted one of "
        f"{', '.join(SUFFIXES)}, or a folder"
    )


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


def rename_table(format: str, config: BaseConfig) -> RenameTable:
    """The rename table of a foreign format for a config.

    Raises:
        InputError: if the foreign library has no such family.
    """
    tables: Mapping[str, Callable[[BaseConfig], RenameTable]]
    tables = import_module(f"isovit.weight_convert.{home(config.family)}").TABLES
    if format not in tables:
        wanted = ", ".join(tables) or f"a part of it alone, {' or '.join(config.parts)}"
        raise InputError(f"format {format} has no family {config.family}; wanted {wanted}")
    return tables[format](config)


def table(name: str, config: BaseConfig) -> RenameTable | NativeTable:
    """What relates the param tree of a config to the names of a format."""
    return rename_table(name, config) if FORMATS[name].foreign else NativeTable()


def check_fit(name: str, config: BaseConfig) -> None:
    """Check that the model of a format's library can be what a config says.

    Raises:
        InputError: saying what it cannot.
    """
    if FORMATS[name].foreign:
        rename_table(name, config)
        misfits = import_module(f"isovit.weight_convert.{home(config.family)}").MISFITS
        if lines := list(misfits[name](config)):
            raise InputError(f"format {name} cannot hold this model: it has {'; '.join(lines)}")
