"""Objectives: configs within configs, what is drawn, files, and every refusal in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import isovit
from isovit.backends import BACKENDS
from isovit.spec.config import ConfigError, config_from_dict, config_from_file
from isovit.spec.families import objectives, variant_name
from isovit.spec.objectives import OBJECTIVES
from isovit.weight_convert.checkpoint import Checkpoint
from tests.small import TRAINERS
from tests.test_structure import PACKAGE, REPOSITORY

# The house


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_objective_is_the_same_files_everywhere(objective: str) -> None:
    homes = ("spec", *(f"backends/{name}" for name in BACKENDS), "weight_convert")
    assert all((PACKAGE / home / "objectives" / f"{objective}.py").is_file() for home in homes)
    tests = REPOSITORY / "parity_tests"
    for home in ("", "oracles", "controls"):
        assert (tests / home / "objectives" / f"{objective}.py").is_file()
    assert (tests / f"test_{objective}.py").is_file()
    assert (REPOSITORY / "docs" / "objectives" / f"{objective}.md").is_file()


def test_no_folder_of_objectives_has_a_file_of_none() -> None:
    for root in (PACKAGE, REPOSITORY / "parity_tests"):
        files = {path.stem for path in root.rglob("objectives/*.py")}
        assert files - {"__init__"} == OBJECTIVES.keys()


# Configs


@pytest.mark.parametrize("name", objectives())
def test_plain_data_json_and_toml_give_the_config_back(name: str, tmp_path: Path) -> None:
    config = objectives()[name]
    (tmp_path / "a.json").write_text(config.to_json(), encoding="utf-8")
    (tmp_path / "a.toml").write_text(config.to_toml(), encoding="utf-8")
    assert config_from_dict(config.to_dict()) == config
    assert config_from_file(tmp_path / "a.json") == config
    assert config_from_file(tmp_path / "a.toml") == config
    assert variant_name(config) == name


def test_fields_of_the_model_within_are_changed_by_dotted_name() -> None:
    changes = {"encoder.in_channels": 1, "mask_ratio": 0.5}
    config = isovit.config("mae_vit_b16", **changes)
    assert (config.encoder.in_channels, config.mask_ratio) == (1, 0.5)
    assert config.encoder.preprocess.mean == (0.5,)  # of what is not colour
    config = config.replace(**{"encoder.preprocess.crop_fraction": 0.5})
    assert config.encoder.preprocess.crop_fraction == 0.5
    whole = isovit.config("mae_vit_b16", encoder=config.encoder)
    assert whole.encoder == config.encoder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"encoder.depht": 2}, "depht: no such field of vit; did you mean depth?"),
        ({"encoder.num_classes": 5}, "encoder.num_classes=5: must be 0 here"),
        ({"encoder": isovit.config("cait_xxs24")}, "encoder: wanted the config of vit, got cait"),
        ({"encoder": 3}, "encoder: wanted the config of vit, got 3"),
        ({"mask_ratio": 0.0}, "mask_ratio=0.0: must keep and hide one or more"),
        ({"decoder_dim": 90}, "decoder_dim=90: must be divisible by"),
        ({"decoder_embed": False}, "decoder_embed=False: decoder_dim=512 other than"),
        ({"decoder.depth": 2}, "decoder.depth: decoder has no fields of its own"),
    ],
)
def test_a_config_that_cannot_be_is_refused_by_name(changes: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace(".", r"\.").replace("?", r"\?")):
        isovit.config("mae_vit_b16", **changes)


# What is drawn


@pytest.mark.parametrize("name", TRAINERS)
def test_the_same_seed_draws_the_same(name: str) -> None:
    config = TRAINERS[name]
    one, same, other = (config.draw(3, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert one
    for key, array in one.items():
        assert len(array) == 3
        assert array.dtype in (np.int32, np.float32)
        np.testing.assert_array_equal(array, same[key])
    assert any(not np.array_equal(one[key], other[key]) for key in one)


def test_an_order_has_every_patch_once() -> None:
    order = TRAINERS["mae_official"].draw(50, np.random.default_rng(0))["order"]
    assert (np.sort(order, axis=1) == np.arange(order.shape[1])).all()
    assert len({tuple(row) for row in order.tolist()}) > 45


# Files


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".npz"])
@pytest.mark.parametrize("name", TRAINERS)
def test_files_give_the_weights_back(name: str, suffix: str, tmp_path: Path) -> None:
    ours = Checkpoint(TRAINERS[name], isovit.init(TRAINERS[name], seed=3))
    isovit.save(ours, tmp_path / f"a{suffix}")
    found = isovit.load(tmp_path / f"a{suffix}")
    assert found.config == ours.config
    assert all(np.array_equal(found.weights[n], array) for n, array in ours.weights.items())


# The command line


@pytest.mark.parametrize("name", objectives())
def test_list_and_show_know_it(run, name: str) -> None:
    family = objectives()[name].family
    done = run("list", "--family", family, "--json")
    assert name in {row["name"] for row in json.loads(done.out)}
    assert run("show", name, "--tree").code == 0


@pytest.mark.parametrize(
    "words",
    [
        ("look", "mae_vit_b16", "examples/chelsea.png", "--out", "x.png"),
        ("bench", "mae_vit_b16"),
        ("choose", "mae_vit_b16"),
        ("run", "mae_vit_b16", "--backend", "torch", "--images", "examples/chelsea.png"),
        ("export", "mae_vit_b16", "x.onnx", "--backend", "torch"),
        ("parity", "mae_vit_b16", "--images", "examples/chelsea.png"),
    ],
    ids=lambda words: words[0],
)
def test_what_wants_a_model_says_so_in_one_line(run, words: tuple[str, ...]) -> None:
    done = run(*words)
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert "wants a model; mae is an objective" in done.err
    assert not Path("x.png").exists()


@pytest.mark.slow
def test_parity_of_an_objective_is_a_proof(run, tmp_path: Path) -> None:
    path = tmp_path / "mae.json"
    path.write_text(TRAINERS["mae_official"].to_json(), encoding="utf-8")
    words = ("--backends", "torch,flax", "--gradients", "--trace", "--json")
    done = run("parity", str(path), *words)
    assert done.code == 0
    found = json.loads(done.out)
    assert found["equal"]
