"""Negative controls: faults that ports really have, planted one at a time, must be caught.

A parity check that passes proves nothing unless it can fail. Here a sound PyTorch model and a copy
with one planted fault go through the harness's own comparison. Of every fault is asked:

* the output keeps its shape and stays finite, so that nothing but the measure can tell;
* the error of the output is beyond the limit;
* the trace names the module that a reader would want to look at first, or none where all modules
  are right and only what the model makes of them is wrong.

Against crying wolf, ``HARMLESS`` holds rewrites that are the same mathematics with other rounding,
among them the scaffolds into which faults are planted: all of them must pass. Each
family has its tables in ``controls/families``; what families share is in ``controls/blocks``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the faults are planted into the PyTorch models")

import torch

from isovit.backends.torch import runtime
from isovit.errors import InputError
from isovit.parity import worker
from isovit.parity.budgets import LIMITS
from isovit.parity.compare import error
from isovit.parity.harness import BackendError, _compare
from isovit.parity.job import Job, Settings, draw_inputs
from isovit.parity.report import ParityReport
from isovit.spec.families import FAMILIES, home
from isovit.spec.initialize import probe
from isovit.spec.objectives import OBJECTIVES
from parity_tests.controls.blocks import (
    fast_variance,
    gelu_tanh,
    norm_eps_of_transformers,
    norm_in_float32,
    softmax_in_float32,
)
from parity_tests.controls.families.t2t_vit import (
    performer_eps_dropped,
    performer_eps_in_features,
    performer_root_missing,
    sinusoid_in_float32,
)
from parity_tests.controls.families.vit import VIT
from parity_tests.controls.faults import Fault, GradientFault, Model, Patch, Plant

Results = Mapping[str, np.ndarray]

PAIR = ("sound", "other")
MIN_FAULTS, MIN_FAULTS_OF_OBJECTIVES = 8, 5
"""Of each family; of each objective, whose models are those of families."""

TABLES = {
    family: import_module(f"parity_tests.controls.{home(family)}")
    for family in (*FAMILIES, *OBJECTIVES)
}
CASES: dict[str, Any] = {
    name: config for tables in TABLES.values() for name, config in tables.CASES.items()
}
FAULTS: list[Fault] = [row for tables in TABLES.values() for row in tables.FAULTS]
HARMLESS: list[Fault] = [row for tables in TABLES.values() for row in tables.HARMLESS]
GRADIENT_FAULTS: list[GradientFault] = [
    row for tables in TABLES.values() for row in tables.GRADIENT_FAULTS
]


@cache
def weights(case: str) -> dict[str, np.ndarray]:
    """Probe weights: ordinary ones, but for the case that moves all tokens to a mean of 500."""
    drawn = probe(CASES[case], seed=0)
    return drawn | {"pos_embed": drawn["pos_embed"] + 500} if case == "vit_offset" else drawn


def build(case: str) -> Model:
    """A sound model."""
    return runtime.build(CASES[case], weights(case), dtype="float64")


def run(model: Model, *, gradients: bool = False) -> dict[str, np.ndarray]:
    """The arrays that a backend's process hands to the harness."""
    images, cotangent, others = draw_inputs(model.config, batch=2, seed=0)
    activations = runtime.trace(model, images, others)
    results = {"output": activations.pop("")}
    results |= {f"activation/{path}": array for path, array in activations.items()}
    if gradients:
        grads = runtime.gradients(model, images, cotangent, others)
        results["gradient/images"] = grads.images
        results |= {f"gradient/{path}": array for path, array in grads.weights.items()}
    return results


@cache
def run_sound(case: str, gradients: bool = False) -> dict[str, np.ndarray]:
    """The arrays of a sound model."""
    return run(build(case), gradients=gradients)


def with_fault(case: str, plant: Plant, *, gradients: bool = False) -> dict[str, np.ndarray]:
    """The arrays of a model with a fault; the fault is gone on return."""
    model = build(case)
    with pytest.MonkeyPatch.context() as patch:
        plant(model, patch)
        return run(model, gradients=gradients)


def report(case: str, sound: Results, other: Results) -> ParityReport:
    """What the harness says of two sets of arrays."""
    results = {"sound": dict(sound), "other": dict(other)}
    return ParityReport(
        config=CASES[case],
        backends=PAIR,
        dtype="float64",
        limits=LIMITS["float64"],
        differences=tuple(_compare(results)),
        seconds={},
    )


# --- tests ---------------------------------------------------------------------------------------

# Where float32 is not enough: these are smaller than what rounding does to a right model there.
HIDDEN_IN_FLOAT32 = (
    Fault(norm_eps_of_transformers, "vit"),
    Fault(softmax_in_float32, "vit"),
    Fault(norm_in_float32, "vit"),
    Fault(sinusoid_in_float32, "performer"),
    Fault(performer_eps_dropped, "performer"),
    Fault(performer_eps_in_features, "performer"),
    Fault(performer_root_missing, "performer"),
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Models this small spend more time on waking threads than on sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ids(table: Iterable[Any]) -> list[str]:
    """Test ids of a table."""
    return [row.id for row in table]


def test_tables_are_large_and_without_repeats() -> None:
    for family, tables in TABLES.items():
        least = MIN_FAULTS if family in FAMILIES else MIN_FAULTS_OF_OBJECTIVES
        assert len({fault.plant for fault in tables.FAULTS}) >= least
    assert sum(map(len, (tables.CASES for tables in TABLES.values()))) == len(CASES)
    for table in (FAULTS, HARMLESS, GRADIENT_FAULTS):
        assert len(set(ids(table))) == len(table)
    assert {fault.case for fault in (*FAULTS, *HARMLESS)} == set(CASES)
    assert all(fault.plant.__doc__ for fault in (*FAULTS, *HARMLESS, *GRADIENT_FAULTS))


@pytest.mark.parametrize("case", CASES)
def test_sound_model_passes(case: str) -> None:
    found = report(case, run_sound(case), run(build(case)))
    assert found.equal
    assert found.first_beyond(PAIR) is None


@pytest.mark.parametrize("fault", HARMLESS, ids=ids(HARMLESS))
def test_harmless_rewrite_passes(fault: Fault) -> None:
    found = report(fault.case, run_sound(fault.case), with_fault(fault.case, fault.plant))
    assert found.equal, found.verdict()


@pytest.mark.parametrize("fault", FAULTS, ids=ids(FAULTS))
def test_fault_is_caught(fault: Fault) -> None:
    sound, faulty = run_sound(fault.case), with_fault(fault.case, fault.plant)
    found = report(fault.case, sound, faulty)
    output = found.worst("output").error

    # Neither shape nor NaN gives the fault away.
    assert faulty["output"].shape == sound["output"].shape
    assert math.isfinite(output)

    assert output > LIMITS["float64"]["output"]
    assert not found.equal
    first = found.first_beyond(PAIR)
    assert (first.path if first else "") == fault.first


@pytest.mark.parametrize("fault", HIDDEN_IN_FLOAT32, ids=ids(HIDDEN_IN_FLOAT32))
def test_float32_would_hide_it(fault: Fault) -> None:
    sound, faulty = run_sound(fault.case), with_fault(fault.case, fault.plant)
    output = error(sound["output"], faulty["output"])
    assert LIMITS["float64"]["output"] < output < LIMITS["float32"]["output"]


def test_fast_variance_in_float32() -> None:
    """The accuracy of LayerNorm at mean 30, std 1: the formula of Flax overspends the budget.

    At mean 100 the two-pass formula would, too: float32 then holds the tokens to 4e-6 only.
    """
    tokens = 30 + torch.randn(64, 18, generator=torch.Generator().manual_seed(0))
    wide: Model = build("vit")
    narrow: Model = runtime.build(VIT, weights("vit"), dtype="float32")

    def accuracy() -> float:
        answer = wide.blocks[0].norm1(tokens.double())
        return error(narrow.blocks[0].norm1(tokens).detach().numpy(), answer.detach().numpy())

    limit = LIMITS["float32"]["activation"]
    assert accuracy() <= limit
    with pytest.MonkeyPatch.context() as patch:
        fast_variance(narrow, patch)
    assert accuracy() > limit


@pytest.mark.parametrize("fault", GRADIENT_FAULTS, ids=ids(GRADIENT_FAULTS))
def test_gradient_fault_is_caught(fault: GradientFault) -> None:
    sound = run_sound(fault.case, gradients=True)
    found = report(fault.case, sound, with_fault(fault.case, fault.plant, gradients=True))
    errors = {d.path: d.error for d in found.differences if d.kind == "gradient"}
    limits = LIMITS["float64"]

    # The forward pass cannot tell.
    assert found.worst("output").error <= limits["output"]
    assert found.worst("activation").error <= limits["activation"]

    assert math.isfinite(errors[fault.wrong])
    assert errors[fault.wrong] > limits["gradient"]
    assert not found.equal
    assert fault.right is None or errors[fault.right] <= limits["gradient"]


def test_fixed_parameter_that_trains_is_refused() -> None:
    """The sinusoid is saved with the weights, so a port easily hands it to the optimiser."""
    model = build("performer")
    model.pos_embed.requires_grad_(True)
    with pytest.raises(InputError, match=r"unexpected pos_embed \(1, 5, 18\)"):
        run(model, gradients=True)


def test_trainable_parameter_that_is_fixed_is_refused() -> None:
    model = build("vit")
    model.blocks[1].norm2.weight.requires_grad_(False)
    with pytest.raises(InputError, match=r"missing blocks\.1\.norm2\.weight \(18,\)"):
        run(model, gradients=True)


def test_process_of_a_backend_and_report_find_the_fault(monkeypatch: Patch) -> None:
    """What ``parity`` does with each backend, on a job with a fault in the second block only."""
    settings = Settings(trace=True, gradients=True)
    job = Job(VIT, weights("vit"), draw_inputs(VIT, batch=2, seed=0), settings)
    sound = worker.run(job, "torch")
    assert report("vit", sound, worker.run(job, "torch")).equal

    build_sound = runtime.build

    def build_faulty(*args: Any, **kwargs: Any) -> Model:
        model: Model = build_sound(*args, **kwargs)
        model.blocks[1].norm1.eps = 1e-5
        return model

    monkeypatch.setattr(runtime, "build", build_faulty)
    found = report("vit", sound, worker.run(job, "torch"))
    assert not found.equal
    first = found.first_beyond(PAIR)
    assert first is not None
    assert first.path == "blocks.1.norm1"
    (line,) = found.verdict()
    assert line.startswith("NOT equal: sound and other")
    assert "blocks.1.norm1" in line


@pytest.mark.parametrize("path", ["patch_embed.proj", "blocks.1.attn", "head"])
@pytest.mark.parametrize(("limits", "equal"), [(0.5, True), (2.0, False)])
def test_one_number_of_one_activation_decides(path: str, limits: float, equal: bool) -> None:
    """One number is off by half the limit, or by twice the limit."""
    sound = run_sound("vit")
    array = sound[f"activation/{path}"].copy()
    array.flat[array.size // 2] += limits * LIMITS["float64"]["activation"] * np.abs(array).max()
    found = report("vit", sound, {**sound, f"activation/{path}": array})
    assert found.equal is equal
    first = found.first_beyond(PAIR)
    assert (first.path if first else None) == (None if equal else path)
    assert found.verdict()[0].startswith("equal: " if equal else "NOT equal: ")


def test_verdict_names_the_backend_that_is_wrong() -> None:
    """Of three backends one is wrong: the two pairs that it is in, and no other, are named."""
    sound, faulty = run_sound("vit"), with_fault("vit", gelu_tanh)
    differences = _compare({"torch": dict(sound), "flax": dict(faulty), "keras": dict(sound)})
    found = ParityReport(
        config=VIT,
        backends=("torch", "flax", "keras"),
        dtype="float64",
        limits=LIMITS["float64"],
        differences=tuple(differences),
        seconds={},
    )
    assert not found.equal
    first, second = found.verdict()
    assert first.startswith("NOT equal: torch and flax")
    assert second.startswith("NOT equal: flax and keras")
    assert "blocks.0.mlp.fc2" in first
    assert "blocks.0.mlp.fc2" in second


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("both", [False, True])
def test_what_is_not_finite_is_never_equal(value: float, both: bool) -> None:
    """NaN compares as False with any limit, and two models that both overflow prove nothing."""
    good = run_sound("vit")["output"]
    bad = good.copy()
    bad[0, 0] = value
    assert error(bad, bad if both else good) == float("inf")


def test_shapes_that_broadcast_are_not_equal() -> None:
    """NumPy would subtract (2, 5) and (1, 2, 5), or a row and a matrix, without a word."""
    output = run_sound("vit")["output"]
    assert error(output, output[None]) == float("inf")
    assert error(output[:1], np.broadcast_to(output[:1], output.shape)) == float("inf")


def test_error_sees_one_number_among_many() -> None:
    """A mean over the tensor would divide the difference by its size; the largest one does not."""
    good = np.ones((100, 100))
    bad = good.copy()
    bad[3, 7] += 1e-9
    assert error(good, bad) == error(bad, good) > LIMITS["float64"]["output"]
    assert np.abs(good - bad).mean() < LIMITS["float64"]["output"]


def test_missing_activation_is_refused() -> None:
    sound = run_sound("vit")
    fewer = {key: array for key, array in sound.items() if key != "activation/blocks.0.mlp"}
    with pytest.raises(BackendError, match=r"activation/blocks\.0\.mlp"):
        report("vit", sound, fewer)
