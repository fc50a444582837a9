"""Is training mode on only when it should be, and does it drop what it should?"""

from __future__ import annotations

import numpy as np
import pytest

from isovit.parity.budgets import LIMITS
from isovit.parity.compare import error
from isovit.spec.blocks import TransformerConfig
from parity_tests.agreement import assert_outputs_agree
from parity_tests.examples import EXAMPLES
from parity_tests.oracles.arrays import reference
from parity_tests.strategies import Case
from parity_tests.subject import Subject

RATES = {
    "vit_timm": ["embed_dropout_rate", "dropout_rate", "attn_dropout_rate", "drop_path_rate"],
    "t2t_performer": ["token_dropout_rate", "embed_dropout_rate"],
    "t2t_transformer": ["token_dropout_rate"],
    "t2t_full": ["token_dropout_rate"],
}
"""The fields that make each example stochastic; what examples share is tested on one of them."""

RATE = 0.5
STANDARD_ERRORS = 6.0
"""How far a right mean may stray: a normal variable goes beyond once in 5e8 draws."""


def _with_rates(example: str, *fields: str) -> Case:
    config = EXAMPLES[example].config
    return Case(config.replace(**dict.fromkeys(fields, RATE)))


@pytest.mark.parametrize("example", RATES)
def test_evaluation_ignores_every_rate(backend: Subject, example: str) -> None:
    dropping = _with_rates(example, *RATES[example])
    np.testing.assert_array_equal(backend.forward(dropping), backend.forward(EXAMPLES[example]))


@pytest.mark.parametrize("example", RATES)
def test_training_without_rates_is_evaluation(backend: Subject, example: str) -> None:
    case = EXAMPLES[example]
    model = backend.build(case)
    trained = backend.train(model, case.images)
    assert_outputs_agree(trained, backend.runtime.forward(model, case.images))


@pytest.mark.parametrize(
    ("example", "field"), [(example, field) for example in RATES for field in RATES[example]]
)
def test_each_rate_makes_training_stochastic(backend: Subject, example: str, field: str) -> None:
    case = _with_rates(example, field)
    backend.seed()
    model = backend.build(case)
    evaluated = backend.runtime.forward(model, case.images)
    first, second = (backend.train(model, case.images) for _ in range(2))
    limit = LIMITS["float64"]["output"]
    assert min(error(first, evaluated), error(second, evaluated), error(first, second)) > limit
    np.testing.assert_array_equal(backend.runtime.forward(model, case.images), evaluated)


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
