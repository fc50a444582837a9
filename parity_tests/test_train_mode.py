"""Is training mode on only when it should be, and does it drop what it should?"""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest

from isovit.backends import get_backend
from isovit.parity.budgets import LIMITS
from isovit.parity.compare import error
from isovit.spec.blocks import TransformerConfig
from isovit.spec.families import FAMILIES, param_tree
from isovit.spec.param import STATISTICS
from parity_tests.agreement import assert_agree, assert_outputs_agree
from parity_tests.examples import EXAMPLES, require_usual
from parity_tests.oracles.arrays import reference
from parity_tests.strategies import Case
from parity_tests.subject import Subject

RATES: dict[str, list[str]] = {
    example: fields
    for family in FAMILIES
    for example, fields in import_module(f"parity_tests.families.{family}").RATES.items()
}
"""The fields that make each example stochastic; what examples share is tested on one of them."""

STATEFUL = [
    name
    for name, case in EXAMPLES.items()
    if any(param.role in STATISTICS for param in param_tree(case.config).parameters().values())
]
"""Examples with running statistics: to them training is another function than evaluation."""

RATE = 0.5
STANDARD_ERRORS = 6.0
"""How far a right mean may stray: a normal variable goes beyond once in 5e8 draws."""


def _with_rates(example: str, *fields: str) -> Case:
    config = EXAMPLES[example].config
    return Case(config.replace(**dict.fromkeys(fields, RATE)))


@pytest.mark.parametrize("example", RATES)
def test_evaluation_ignores_every_rate(backend: Subject, example: str) -> None:
    require_usual(backend, example)
    dropping = _with_rates(example, *RATES[example])
    np.testing.assert_array_equal(backend.forward(dropping), backend.forward(EXAMPLES[example]))


@pytest.mark.parametrize("example", [name for name in RATES if name not in STATEFUL])
def test_training_without_rates_is_evaluation(backend: Subject, example: str) -> None:
    require_usual(backend, example)
    case = EXAMPLES[example]
    model = backend.build(case)
    trained = backend.train(model, case.images)
    assert_outputs_agree(trained, backend.runtime.forward(model, case.images))


@pytest.mark.parametrize("example", STATEFUL)
def test_training_moves_the_statistics_as_torch_does(backend: Subject, example: str) -> None:
    case, torch = EXAMPLES[example], Subject("torch", get_backend("torch"))
    models = [(subject, subject.build(case)) for subject in (backend, torch)]
    outputs = [subject.train(model, case.images) for subject, model in models]
    found, wanted = (subject.runtime.read(model) for subject, model in models)
    assert_outputs_agree(*outputs)
    params = param_tree(case.config).parameters()
    moved = [path for path, param in params.items() if param.role in STATISTICS]
    assert all(error(wanted[path], case.weights[path]) > 1e-3 for path in moved)
    assert_agree({p: found[p] for p in moved}, {p: wanted[p] for p in moved}, "activation")
    kept = params.keys() - moved
    assert all(np.array_equal(found[path], case.weights[path]) for path in kept)


@pytest.mark.parametrize(
    ("example", "field"), [(example, field) for example in RATES for field in RATES[example]]
)
def test_each_rate_makes_training_stochastic(backend: Subject, example: str, field: str) -> None:
    require_usual(backend, example)
    case = _with_rates(example, field)
    backend.seed()
    model = backend.build(case)
    evaluated = backend.runtime.forward(model, case.images)
    first, second = (backend.train(model, case.images) for _ in range(2))
    limit = LIMITS["float64"]["output"]
    assert min(error(first, evaluated), error(second, evaluated), error(first, second)) > limit
    if example in STATEFUL:
        backend.runtime.write(model, case.weights)  # training has moved the statistics
    np.testing.assert_array_equal(backend.runtime.forward(model, case.images), evaluated)


@pytest.mark.parametrize("mixed", [True, False])
def test_weights_are_dropped_behind_the_mixing_of_heads_or_before(
    backend: Subject, mixed: bool
) -> None:
    """A mix that gives its bias alone, whatever the weights, hides what was dropped before it."""
    config = EXAMPLES["cait_official"].config
    case = Case(config.replace(attn_dropout_rate=RATE, mixed_dropout=mixed))
    kernels = [path for path in case.weights if path.endswith("proj_w.kernel")]
    case.weights.update({path: np.zeros_like(case.weights[path]) for path in kernels})
    backend.seed()
    model = backend.build(case)
    trained, evaluated = backend.train(model, case.images), backend.forward(case)
    assert kernels
    assert (error(trained, evaluated) > LIMITS["float64"]["output"]) == mixed


def test_stochastic_depth_drops_whole_samples_and_rescales(backend: Subject) -> None:
    """The last block keeps or drops each branch: four outcomes, each known exactly."""
    case = _with_rates("vit_timm", "drop_path_rate")  # of its two blocks the first never drops
    images = np.repeat(case.images[:1], 64, axis=0)  # one outcome is missed once in 1e8 draws
    backend.seed()
    found = backend.train(backend.build(case), images)
    outcomes = [
        _outcome(case, attn_factor, mlp_factor)
        for attn_factor in (0.0, 1 / (1 - RATE))
        for mlp_factor in (0.0, 1 / (1 - RATE))
    ]
    errors = np.array([[error(sample, outcome) for outcome in outcomes] for sample in found])
    hits = errors <= LIMITS["float64"]["output"]
    assert (hits.sum(axis=1) == 1).all(), "a sample is none of the four outcomes"
    assert hits.any(axis=0).all(), "an outcome never came"


def test_dropout_keeps_the_mean(backend: Subject) -> None:
    """Without blocks and norms the output is linear in what is dropped, so its mean stays."""
    config: TransformerConfig = EXAMPLES["vit_timm"].config.replace(
        depth=0, final_norm="none", pool="mean", embed_dropout_rate=RATE
    )
    case = Case(config)
    images = np.repeat(case.images[:1], 4000, axis=0)
    backend.seed()
    model = backend.build(case)
    found = backend.train(model, images)
    wanted = backend.runtime.forward(model, images[:1])[0]
    spread = found.std(axis=0)
    assert (spread > 0).all()
    strays = np.abs(found.mean(axis=0) - wanted) / (spread / np.sqrt(len(images)))
    assert (strays < STANDARD_ERRORS).all()


def _outcome(case: Case, attn_factor: float, mlp_factor: float) -> np.ndarray:
    """The first image's output, with the branches of the last block times these factors."""
    factors = {"blocks.1.attn.proj": attn_factor, "blocks.1.mlp.fc2": mlp_factor}
    weights = {
        path: array * factors.get(path.rpartition(".")[0], 1.0)
        for path, array in case.weights.items()
    }
    return reference(case.config, weights, case.images[:1])[""][0]
