"""A model out of an objective: what it trained, alone, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import isovit
from isovit.errors import InputError
from isovit.spec.families import param_tree
from isovit.spec.initialize import probe
from isovit.weight_convert.checkpoint import Checkpoint
from isovit.weight_convert.store import load, save
from tests.outcome import Outcome
from tests.small import TRAINERS, VIT

Run = Callable[..., Outcome]

PARTS = [(name, part) for name, config in TRAINERS.items() for part in config.parts]
WHOLE = "distill_t2t"


def assert_is_part(found: Checkpoint, whole: str, part: str) -> None:
    config, weights = TRAINERS[whole], probe(TRAINERS[whole])
    assert found.config == config.parts[part]
    assert list(found.weights) == list(param_tree(found.config).parameters())
    for path, array in found.weights.items():
        assert array.tobytes() == weights[f"{part}.{path}"].tobytes(), path


def test_every_objective_has_parts() -> None:
    assert {whole for whole, _ in PARTS} == TRAINERS.keys()


@pytest.mark.parametrize(("whole", "part"), PARTS)
def test_a_part_of_a_checkpoint_is_its_config_and_its_weights(whole: str, part: str) -> None:
    checkpoint = Checkpoint(TRAINERS[whole], probe(TRAINERS[whole]))
    assert_is_part(isovit.part(checkpoint, part), whole, part)


@pytest.mark.parametrize("framework", ["torch", "flax"])
def test_a_part_of_a_model_is_read_from_it(framework: str) -> None:
    model = isovit.build(TRAINERS[WHOLE], framework, probe(TRAINERS[WHOLE]))
    found = isovit.part(model, "student")
    assert_is_part(found, WHOLE, "student")
    assert found.source.format == framework


def test_a_part_is_built_in_another_framework() -> None:
    found = isovit.part(isovit.build(TRAINERS[WHOLE], "torch", probe(TRAINERS[WHOLE])), "student")
    alone = isovit.build(found.config, "flax", dict(found.weights))
    assert_is_part(
        Checkpoint(TRAINERS[WHOLE].student, isovit.read(alone).weights), WHOLE, "student"
    )


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["safetensors", "pth", "npz", "keras"])
@pytest.mark.parametrize(("whole", "part"), PARTS)
def test_convert_writes_a_part(
    run: Run, whole: str, part: str, suffix: str, tmp_path: Path
) -> None:
    source, target = tmp_path / f"whole.{suffix}", tmp_path / "part.safetensors"
    save(Checkpoint(TRAINERS[whole], probe(TRAINERS[whole])), source)
    done = run("convert", str(source), str(target), "--part", part)
    assert done.code == 0, done.err
    assert f"took {part} of {TRAINERS[whole].family}, without its other weights" in done.err
    assert_is_part(load(target), whole, part)


def test_convert_writes_a_part_in_the_format_of_its_family(run: Run, tmp_path: Path) -> None:
    """The student of DeiT as timm has it, which has no distillation."""
    source, target = tmp_path / "whole.safetensors", tmp_path / "part.pth"
    config = TRAINERS["distill_deit"]
    save(Checkpoint(config, probe(config)), source)
    words = ["convert", str(source), str(target), "--part", "student", "--to", "timm"]
    assert run(*words).code == 0
    assert_is_part(load(target, config=config.student), "distill_deit", "student")


def test_a_format_that_has_no_such_objective_names_its_parts(run: Run, tmp_path: Path) -> None:
    source, target = tmp_path / "whole.safetensors", tmp_path / "whole.pth"
    save(Checkpoint(TRAINERS[WHOLE], probe(TRAINERS[WHOLE])), source)
    done = run("convert", str(source), str(target), "--to", "timm")
    line = "isovit: format timm has no family distill; wanted a part of it alone, student\n"
    assert (done.code, done.err) == (2, line)


def test_classes_and_size_are_those_of_the_part(tmp_path: Path) -> None:
    config = TRAINERS["distill_deit"]
    save(Checkpoint(config, probe(config)), tmp_path / "whole.safetensors")
    found = load(tmp_path / "whole.safetensors", part="student", num_classes=9, image_size=(15, 12))
    assert (found.config.num_classes, found.config.image_size) == (9, (15, 12))
    assert found.weights["head_dist.kernel"].shape == (21, 9)
    assert found.weights["pos_embed"].shape == (1, 2 + 5 * 3, 21)


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (TRAINERS[WHOLE], "distill has no part named 'teacher': wanted student"),
        (TRAINERS["mae_official"], "mae has no part named 'teacher': wanted encoder"),
        (VIT, "vit has no part named 'teacher': it is a model in one piece"),
    ],
    ids=["distill", "mae", "vit"],
)
def test_a_wrong_name_is_one_clear_line(run: Run, config: Any, line: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(config, probe(config))
    with pytest.raises(InputError, match=line):
        isovit.part(checkpoint, "teacher")
    save(checkpoint, tmp_path / "whole.safetensors")
    words = ["convert", str(tmp_path / "whole.safetensors"), str(tmp_path / "part.safetensors")]
    done = run(*words, "--part", "teacher")
    assert (done.code, done.out, done.err) == (2, "", f"isovit: {line}\n")
    assert not (tmp_path / "part.safetensors").exists()


def test_weights_that_are_not_the_parts_are_refused() -> None:
    config = TRAINERS[WHOLE]
    lacking = {path: a for path, a in probe(config).items() if path != "student.head.bias"}
    with pytest.raises(InputError, match=r"missing student\.head\.bias"):
        isovit.part(Checkpoint(config, lacking), "student")


def test_a_part_reads_one_array_at_a_time(tmp_path: Path) -> None:
    """Nothing is read before it is asked for: the view has shapes alone."""
    from isovit.weight_convert.store import opened

    config = TRAINERS[WHOLE]
    save(Checkpoint(config, probe(config)), tmp_path / "whole.safetensors")
    found = opened(tmp_path / "whole.safetensors", part="student")
    assert not isinstance(found.weights, dict)
    np.testing.assert_array_equal(found.weights["head.bias"], probe(config)["student.head.bias"])
