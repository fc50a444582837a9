"""Foreign checkpoints without a config: format and config from names, shapes and what lies beside.

That the weights then compute what they did where they come from is shown in ``parity_tests``.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import isovit
from isovit.spec.config import Config, Preprocess
from isovit.spec.initialize import probe
from isovit.weight_convert.formats import FORMATS, rename_table
from isovit.weight_convert.store import inspect, load

Arrays = dict[str, np.ndarray]
Write = Callable[[Path, Arrays], Path]


def foreign(name: str, config: Config, weights: Arrays) -> Arrays:
    """Weights under the names and in the shapes of a format."""
    table, params = rename_table(name, config), isovit.param_tree(config).parameters()
    arrays = table.write(params, weights, FORMATS[name].layout)
    return {key: np.ascontiguousarray(array) for key, array in arrays.items()}


# Files as others write them


def safetensors(folder: Path, arrays: Arrays) -> Path:
    save_file(arrays, folder / "model.safetensors")
    return folder / "model.safetensors"


def npz(folder: Path, arrays: Arrays, prefix: str = "") -> Path:
    named = {prefix + key.replace(".", "/"): array for key, array in arrays.items()}
    np.savez(folder / "model.npz", **named)
    return folder / "model.npz"


def tensors(arrays: Arrays, prefix: str = "") -> dict[str, Any]:
    import torch

    return {prefix + key: torch.from_numpy(array) for key, array in arrays.items()}


def pth(around: Callable[[Arrays], Any] = tensors) -> Write:
    """A writer of a .pth with what a function puts around the weights."""

    def write(folder: Path, arrays: Arrays) -> Path:
        import torch

        torch.save(around(arrays), folder / "model.pth")
        return folder / "model.pth"

    return write


def hf_folder(**said: Any) -> Write:
    """A writer of a folder with a ``config.json`` that says so."""

    def write(folder: Path, arrays: Arrays) -> Path:
        safetensors(folder, arrays)
        (folder / "config.json").write_text(json.dumps(said), encoding="utf-8")
        return folder

    return write


@dataclass(frozen=True)
class File:
    """A file, and what it should be taken for.

    Attributes:
        format: that it is of.
        config: of its model.
        write: puts foreign arrays into a folder; gives the path to load.
        told: what nothing in it tells.
    """

    format: str
    config: Config
    write: Write = safetensors
    told: dict[str, Any] = field(default_factory=dict)


SMALL = dict(image_size=32, depth=1, embed_dim=24, num_heads=3, mlp_dim=20, num_classes=5)
VIT = isovit.config("vit_s16", **SMALL, patch_size=8)
DEIT = VIT.replace(preprocess=Preprocess())
DISTILLED = DEIT.replace(dist_token=True, dist_head=True)
HEADLESS = DEIT.replace(num_classes=0)
FINE_TUNED = DEIT.replace(pool="mean_patches", final_norm="pooled")
FREE: dict[str, Any] = dict(
    qkv_bias=False, norm_eps=1e-5, head_dim=8, init_scheme="vit_pytorch", image_size=64
)
SQUASHED = Preprocess(
    aspect="squash", crop_fraction=1.0, interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3
)
HF_CONFIG = dict(num_attention_heads=3, layer_norm_eps=1e-12, hidden_act="gelu", image_size=32)
GOOGLE = VIT.replace(preprocess=SQUASHED, activation="gelu_tanh", init_scheme="vit_jax")
HEADS = {"num_heads": 3}
FACTORS = {"re_attention_scale": 1.0, "branch_scale": 1.0}

LEARNER = isovit.config(
    "token_learner_b16", **{**SMALL, "depth": 2}, patch_size=8, learner_loc=1, learned_tokens=5
)
LOC = {"learner_loc": 1}

NYSTROM = isovit.config(
    "efficient_vit_nystrom_pytorch", **{**SMALL, "mlp_dim": 96}, patch_size=8, head_dim=5,
    num_landmarks=7,
)  # fmt: skip
PLUGGED = isovit.config(
    "efficient_vit_full", **{**SMALL, **FREE}, patch_size=8, transformer_norm=True,
    class_token=True, pool="cls", num_landmarks=64,
)  # fmt: skip

CAIT = isovit.config("cait_s24", **SMALL, patch_size=8, layer_scale_init=None)

FILES: dict[str, File] = {
    "timm": File("timm", VIT, told=HEADS),
    "timm pooled": File("timm", VIT.replace(pool="mean_patches", final_norm="pooled"), told=HEADS),
    "timm without class token": File(
        "timm", VIT.replace(class_token=False, pool="mean_patches"), told=HEADS
    ),
    "timm without a position for the class token": File(
        "timm", VIT.replace(pos_embed_tokens="patches", layer_scale_init=1e-5), told=HEADS
    ),
    "timm distilled": File(
        "timm", DISTILLED.replace(preprocess=Preprocess(crop_fraction=0.9)), told=HEADS
    ),
    "timm in training": File(
        "timm", VIT, pth(lambda a: {"state_dict": tensors(a), "arch": "vit"}), HEADS
    ),
    "timm compiled": File("timm", VIT, pth(lambda a: tensors(a, "_orig_mod.")), HEADS),
    "deit": File("deit", DEIT, pth(lambda a: {"model": tensors(a)}), HEADS),
    "deit distilled": File("deit", DISTILLED, pth(lambda a: {"model": tensors(a)}), HEADS),
    "deit in training": File(
        "deit", DEIT, pth(lambda a: {"model": tensors(a), "model_ema": tensors(a)}), HEADS
    ),
    "mae": File("mae", HEADLESS, pth(lambda a: {"model": tensors(a)}), HEADS),
    "mae fine-tuned": File("mae", FINE_TUNED, pth(lambda a: {"model": tensors(a)}), HEADS),
    "mae with its decoder": File(
        "mae",
        HEADLESS,
        lambda folder, a: safetensors(folder, a | {"mask_token": np.zeros((1, 1, 8), np.float32)}),
        HEADS,
    ),
    "dino": File("dino", HEADLESS, pth(), HEADS),
    "dino in training": File(
        "dino",
        HEADLESS,
        pth(
            lambda a: {
                "student": tensors(a, "module.backbone."),
                "teacher": tensors(a, "backbone."),
                "args": Namespace(arch="vit_small"),
            }
        ),
        HEADS,
    ),
    "hf": File("hf", VIT.replace(norm_eps=1e-12, preprocess=SQUASHED), hf_folder(**HF_CONFIG)),
    "hf of DeiT": File(
        "hf",
        DISTILLED.replace(norm_eps=1e-12, preprocess=Preprocess(aspect="squash")),
        hf_folder(**HF_CONFIG, model_type="deit"),
    ),
    "hf of MAE": File(
        "hf",
        HEADLESS.replace(
            norm_eps=1e-12,
            preprocess=Preprocess(aspect="squash", crop_fraction=1.0, interpolation="bilinear"),
        ),
        hf_folder(**HF_CONFIG, model_type="vit_mae"),
    ),
    "hf without a folder": File(
        "hf", VIT.replace(norm_eps=1e-12, preprocess=SQUASHED), pth(), HEADS
    ),
    "google": File("google", GOOGLE, npz),
    "google in training": File("google", GOOGLE, lambda f, a: npz(f, a, "opt/target/")),
    "google by the mean": File(
        "google", GOOGLE.replace(class_token=False, pool="mean_patches"), npz
    ),
    "google with a hidden layer": File("google", GOOGLE.replace(pre_logits_dim=24), npz),
    "big_vision": File(
        "big_vision",
        GOOGLE.replace(pos_embed_tokens="patches"),
        lambda folder, a: npz(folder, a, "params/"),
    ),
    "big_vision by the mean": File(
        "big_vision", GOOGLE.replace(class_token=False, pool="mean_patches"), npz
    ),
    "scenic": File("scenic", LEARNER, npz, LOC),
    "scenic of v1": File(
        "scenic", LEARNER.replace(learner="conv"), lambda f, a: npz(f, a, "opt/target/"), LOC
    ),
    "scenic with fusers": File(
        "scenic", LEARNER.replace(fuser=True), lambda f, a: npz(f, a, "params/")
    ),
    "scenic of v1 with fusers": File("scenic", LEARNER.replace(learner="conv", fuser=True), npz),
    "vit_pytorch": File(
        "vit_pytorch",
        DEIT.replace(**{**FREE, "patch_embed": "norm_linear_norm"}),
        told=HEADS,
    ),
    "yitu performer": File("yitu", isovit.config("t2t_vit_14", **SMALL), told=HEADS),
    "yitu transformer": File("yitu", isovit.config("t2t_vit_t_14", **SMALL), told=HEADS),
    "yitu of CIFAR": File(
        "yitu",
        isovit.config("t2t_vit_14", **SMALL),
        pth(lambda a: {"net": tensors(a, "module."), "acc": 98.3, "epoch": 59}),
        HEADS,
    ),
    "yitu of SE": File("yitu", isovit.config("t2t_vit_14_se", **SMALL, se_dim=1), told=HEADS),
    "yitu of ghosts": File(
        "yitu", isovit.config("t2t_vit_16_ghost", **{**SMALL, "mlp_dim": 72}), told=HEADS
    ),
    "yitu of dense blocks": File(
        "yitu",
        isovit.config(
            "t2t_vit_dense", **{**SMALL, "depth": 3}, dense_depths=(2, 1), dense_growth=12
        ),
        pth(lambda a: {"state_dict_ema": tensors(a), "epoch": 309}),
        HEADS,
    ),
    "vit_pytorch of T2T-ViT": File(
        "vit_pytorch", isovit.config("t2t_vit_pytorch", **{**SMALL, **FREE}), told=HEADS
    ),
    "timm of CaiT": File("timm", CAIT),
    "deit of CaiT, as released": File(
        "deit", CAIT, pth(lambda a: {"model": tensors(a, "module.")})
    ),
    "deit of CaiT in training": File(
        "deit", CAIT, pth(lambda a: {"model": tensors(a), "model_ema": tensors(a), "epoch": 3})
    ),
    "timm of CaiT, class blocks alone": File("timm", CAIT.replace(depth=0, mlp_dim=24), told=HEADS),
    "timm of CaiT, class blocks wider": File("timm", CAIT.replace(cls_mlp_dim=22)),
    "vit_pytorch of CaiT": File(
        "vit_pytorch", isovit.config("cait_pytorch", **{**SMALL, "head_dim": 5, "patch_size": 8})
    ),
    "dvit": File("dvit", isovit.config("deepvit_16", **SMALL), told=FACTORS),
    "dvit with its stem": File(
        "dvit",
        isovit.config("deepvit_l", **{**SMALL, "depth": 2}, re_attention_depth=1),
        pth(),
        FACTORS | {"branch_scale": 0.5},
    ),
    "vit_pytorch of DeepViT": File(
        "vit_pytorch", isovit.config("deepvit_pytorch", **{**SMALL, **FREE})
    ),
    "vit_pytorch, efficient": File("vit_pytorch", PLUGGED, told=HEADS),
    "vit_pytorch, efficient, of a Nystromformer": File(
        "vit_pytorch", NYSTROM, told={"num_landmarks": 7}
    ),
}


def written(file: File, folder: Path) -> Path:
    return file.write(folder, foreign(file.format, file.config, probe(file.config)))


@pytest.mark.parametrize("case", FILES)
def test_format_config_and_weights_are_found(case: str, tmp_path: Path) -> None:
    file = FILES[case]
    found = load(written(file, tmp_path), changes=file.told)
    assert found.source.format == file.format
    assert found.config == file.config
    wanted = probe(file.config)
    assert found.weights.keys() == wanted.keys()
    assert all(np.array_equal(found.weights[path], wanted[path]) for path in wanted)


@pytest.mark.parametrize("case", FILES)
def test_inspect_tells_format_and_family(case: str, tmp_path: Path) -> None:
    file = FILES[case]
    about = inspect(written(file, tmp_path), changes=file.told)
    assert (about.format, about.config, about.problems) == (file.format, file.config, ())
    assert about.config.family == file.config.family


@pytest.mark.parametrize("case", [case for case in FILES if "num_heads" in FILES[case].told])
def test_heads_that_no_shape_tells_are_asked_for(case: str, tmp_path: Path) -> None:
    with pytest.raises(isovit.InputError, match=r"num_heads cannot be read.*--set num_heads=1\|"):
        load(written(FILES[case], tmp_path))


@pytest.mark.parametrize("case", [case for case in FILES if "learner_loc" in FILES[case].told])
def test_a_place_among_the_blocks_that_no_name_tells_is_asked_for(
    case: str, tmp_path: Path
) -> None:
    said = r"learner_loc cannot be read.*--set learner_loc=0\|1$"
    with pytest.raises(isovit.InputError, match=said):
        load(written(FILES[case], tmp_path))


def test_landmarks_that_no_shape_tells_are_asked_for(tmp_path: Path) -> None:
    said = r"num_landmarks cannot be read.*--set num_landmarks=64\|128\|256$"
    with pytest.raises(isovit.InputError, match=said):
        load(written(FILES["vit_pytorch, efficient, of a Nystromformer"], tmp_path))


@pytest.mark.parametrize("name", FACTORS)
def test_factors_that_no_shape_tells_are_asked_for(name: str, tmp_path: Path) -> None:
    """With what they may be in a model of this width and these heads."""
    told = {other: FACTORS[other] for other in FACTORS if other != name}
    said = {"re_attention_scale": r"1\.0\|0\.353", "branch_scale": r"1\.0\|0\.5"}[name]
    with pytest.raises(isovit.InputError, match=f"{name} cannot be read.*--set {name}={said}"):
        load(written(FILES["dvit"], tmp_path), changes=told)


def test_sides_that_no_shape_tells_are_asked_for_and_taken(tmp_path: Path) -> None:
    """Also where the patches do not divide the usual 224 pixels."""
    config = VIT.replace(image_size=(24, 15), patch_size=(12, 5))
    path = safetensors(tmp_path, foreign("timm", config, probe(config)))
    with pytest.raises(isovit.InputError, match=r"image_size cannot be read from the weights: 6"):
        load(path, changes=HEADS)
    assert load(path, changes={**HEADS, "image_size": (24, 15)}).config == config


def test_a_size_that_is_given_tells_which_tokens_have_positions(tmp_path: Path) -> None:
    """Eight patches and a class token have as many positions as nine patches alone."""
    config = VIT.replace(image_size=(24, 20), patch_size=(12, 5))
    path = safetensors(tmp_path, foreign("timm", config, probe(config)))
    assert load(path, changes={**HEADS, "image_size": (24, 20)}).config == config


def test_names_of_no_format_are_refused(tmp_path: Path) -> None:
    save_file({"weight": np.zeros((2, 2), np.float32)}, tmp_path / "odd.safetensors")
    with pytest.raises(isovit.InputError, match="names of no format that isovit knows"):
        load(tmp_path / "odd.safetensors")


@pytest.mark.parametrize(
    ("averaged", "last"),
    [("state_dict_ema", "state_dict"), ("model_ema", "model"), ("teacher", "student")],
)
def test_averaged_weights_go_before_the_last_ones_unless_told(
    averaged: str, last: str, tmp_path: Path
) -> None:
    file = FILES["yitu performer"]
    first, second = (probe(file.config, seed) for seed in (0, 1))
    states = {averaged: first, last: second}
    around = {key: tensors(foreign("yitu", file.config, w)) for key, w in states.items()}
    path = pth(lambda _: {**around, "epoch": 309, "metric": 81.5})(tmp_path, {})
    for ema, wanted in ((True, first), (False, second)):
        found = load(path, changes=HEADS, ema=ema)
        assert all(np.array_equal(found.weights[name], wanted[name]) for name in wanted)


# Published models


@dataclass(frozen=True)
class Published:
    """A file of a published size.

    Attributes:
        format: that it is of.
        variant: whose sizes it has.
        write: puts foreign arrays into a folder; gives the path to load.
        changes: fields in which the file's model differs from the variant.
    """

    format: str
    variant: str
    write: Write
    changes: dict[str, Any] = field(default_factory=dict)


PUBLISHED: dict[str, Published] = {
    "timm": Published("timm", "vit_ti16", safetensors),
    "deit": Published("deit", "deit_ti16", pth(lambda a: {"model": tensors(a)})),
    "deit distilled": Published(
        "deit", "deit_ti16_distilled", pth(lambda a: {"model": tensors(a)})
    ),
    "dino": Published("dino", "deit_ti16", pth(), {"num_classes": 0}),
    "mae": Published("mae", "deit_ti16", pth(lambda a: {"model": tensors(a)}), {"num_classes": 0}),
    # transformers' epsilon and google's GELU are not those of timm's variant
    "hf": Published(
        "hf",
        "vit_ti16",
        hf_folder(num_attention_heads=3, layer_norm_eps=1e-12, hidden_act="gelu", image_size=224),
        {"norm_eps": 1e-12, "preprocess": SQUASHED},
    ),
    "google": Published(
        "google",
        "vit_ti16",
        npz,
        {"activation": "gelu_tanh", "init_scheme": "vit_jax", "preprocess": SQUASHED},
    ),
    "scenic": Published("scenic", "token_learner_ti16", npz),
    "yitu": Published("yitu", "t2t_vit_7", pth()),
    "yitu of CIFAR": Published(
        "yitu",
        "t2t_vit_7",
        pth(lambda a: {"net": tensors(a, "module."), "acc": 97.1, "epoch": 59}),
        {"num_classes": 10},
    ),
    "yitu of SE": Published("yitu", "t2t_vit_14_se", pth()),
    "yitu of ghosts": Published("yitu", "t2t_vit_16_ghost", pth()),
    "yitu of dense blocks": Published("yitu", "t2t_vit_dense", pth()),
    "vit_pytorch of T2T-ViT": Published("vit_pytorch", "t2t_vit_pytorch", safetensors),
    "timm of CaiT": Published("timm", "cait_xxs36", safetensors),
    "deit of CaiT": Published(
        "deit", "cait_xxs24_384", pth(lambda a: {"model": tensors(a, "module.")})
    ),
    "vit_pytorch of CaiT": Published("vit_pytorch", "cait_pytorch", safetensors),
    "timm of Twins-SVT": Published("timm", "twins_svt_s", safetensors),
    "timm of CrossViT": Published("timm", "crossvit_9", safetensors),
    "timm of CrossViT, fine-tuned": Published(
        "timm", "crossvit_15_dagger_408", safetensors, {"preprocess": Preprocess()}
    ),
    "ibm": Published("ibm", "crossvit_9_dagger", pth(lambda a: {"model": tensors(a)})),
    "vit_pytorch of CrossViT": Published("vit_pytorch", "crossvit_pytorch", safetensors),
    "timm of NesT": Published("timm", "nest_t", safetensors, {"activation": "gelu"}),
    "vit_pytorch of NesT": Published("vit_pytorch", "nest_pytorch", safetensors),
    "dvit": Published("dvit", "deepvit_16", pth()),
    "dvit with its stem": Published("dvit", "deepvit_s", pth()),
    "dvit of larger images": Published("dvit", "deepvit_l_384", safetensors),
    "vit_pytorch of DeepViT": Published("vit_pytorch", "deepvit_pytorch", safetensors),
    "vit_pytorch, efficient, of a Nystromformer": Published(
        "vit_pytorch", "efficient_vit_nystrom_pytorch", safetensors
    ),
    "levit": Published("levit", "levit_128s", pth(lambda a: {"model": tensors(a)})),
    "timm of LeViT": Published(
        "timm", "levit_192", safetensors, {"preprocess": Preprocess(crop_fraction=0.9)}
    ),
    "vit_pytorch of LeViT": Published("vit_pytorch", "levit_pytorch", safetensors),
    "microsoft": Published("microsoft", "cvt_13", pth()),
    "hf of CvT": Published("hf", "cvt_21", hf_folder(depth=[1, 4, 16]), {"activation": "gelu"}),
    "vit_pytorch of CvT": Published("vit_pytorch", "cvt_pytorch", safetensors),
    "ibm of RegionViT": Published("ibm", "regionvit_ti", pth(lambda a: {"model": tensors(a)})),
    "vit_pytorch of RegionViT": Published("vit_pytorch", "regionvit_pytorch", safetensors),
}


@pytest.mark.parametrize("case", PUBLISHED)
def test_a_published_size_needs_no_option_and_is_named(case: str, tmp_path: Path) -> None:
    file = PUBLISHED[case]
    config = isovit.config(file.variant).replace(**file.changes)
    params = isovit.param_tree(config).parameters()
    zeros = {path: np.zeros(param.shape, np.float16) for path, param in params.items()}
    about = inspect(file.write(tmp_path, foreign(file.format, config, zeros)))
    assert (about.format, about.config, about.problems) == (file.format, config, ())
    assert about.variant == file.variant


@pytest.mark.parametrize(("format", "stages"), [("timm", 2), ("vit_pytorch", 4)])
def test_what_no_shape_of_a_twins_svt_tells_is_asked_for(
    format: str, stages: int, tmp_path: Path
) -> None:
    """A library's own sizes would fit the shapes as well, and be another function."""
    sizes = dict(
        image_size=16, num_classes=5, embed_dims=(8,) * stages, mlp_dims=(32,) * stages,
        num_heads=(8,) * stages, reductions=(1,) * stages,
    )  # fmt: skip
    if format == "timm":
        config = isovit.config(
            "twins_svt_s", **sizes, depths=(2, 2), patch_sizes=(2, 2), window_sizes=(4, 2),
            peg_after=(1, 1),
        )  # fmt: skip
        untold = {"num_heads": [8, 8], "window_sizes": [4, 2]}
    else:
        config = isovit.config(
            "twins_svt_pytorch", **sizes, patch_sizes=(2, 1, 1, 2), window_sizes=(4, 2, 2, 0),
            depths=(2, 2, 2, 1),
        )  # fmt: skip
        untold = {"window_sizes": [4, 2, 2, 0]}
    path = safetensors(tmp_path, foreign(format, config, probe(config)))
    told: dict[str, Any] = {"image_size": 16}
    for name, value in untold.items():
        with pytest.raises(isovit.InputError, match=f"{name} cannot be read from the weights"):
            load(path, changes=told)
        told[name] = value
    assert load(path, changes=told).config == config


@pytest.mark.parametrize(("side", "variant"), [(224, "cvt_13"), (384, "cvt_13_384")])
def test_the_processor_of_the_published_cvts_tells_the_size_and_what_is_cropped(
    side: int, variant: str, tmp_path: Path
) -> None:
    config = isovit.config(variant, activation="gelu")
    params = isovit.param_tree(config).parameters()
    zeros = {path: np.zeros(param.shape, np.float16) for path, param in params.items()}
    path = hf_folder()(tmp_path, foreign("hf", config, zeros))
    said = dict(
        image_processor_type="ConvNextImageProcessor", size={"shortest_edge": side},
        crop_pct=0.875, resample=3, image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    (path / "preprocessor_config.json").write_text(json.dumps(said), encoding="utf-8")
    about = inspect(path)
    assert (about.config, about.variant) == (config, variant)


SMALL_CVT: dict[str, Any] = dict(
    image_size=64,
    embed_dims=(6, 12, 18),
    mlp_dims=(12, 24, 36),
    depths=(1, 2, 3),
    num_classes=5,
    activation="gelu",
)


@pytest.mark.parametrize("key", ["stride_q", "padding_q", "padding_kv"])
def test_a_convolution_of_which_isovit_has_no_such_is_refused(key: str, tmp_path: Path) -> None:
    config = isovit.config("cvt_13", **SMALL_CVT)
    path = hf_folder(depth=SMALL_CVT["depths"], **{key: [2, 2, 2]})(
        tmp_path, foreign("hf", config, probe(config))
    )
    with pytest.raises(isovit.InputError, match=rf"config.json: {key}=\[2, 2, 2\]"):
        load(path)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({}, "num_heads"),
        ({"patch_sizes": (7, 3, 5)}, "patch_strides"),
        ({"patch_sizes": (7, 3, 5)}, "patch_paddings"),
    ],
)
def test_what_no_shape_of_a_cvt_tells_is_asked_for(
    changes: dict[str, Any], field: str, tmp_path: Path
) -> None:
    """Where it is of no published size."""
    config = isovit.config("cvt_13", **SMALL_CVT, **changes)
    path = safetensors(tmp_path, foreign("hf", config, probe(config)))
    told: dict[str, Any] = {
        name: config.to_dict()[name]
        for name in ("image_size", "num_heads", "patch_strides", "patch_paddings")
    }
    assert load(path, changes=told).config == config
    del told[field]
    with pytest.raises(isovit.InputError, match=f"{field} cannot be read from the weights"):
        load(path, changes=told)
