"""BatchNorm: a step of training moves the running statistics alike in every framework."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from isovit.parity.budgets import LIMITS
from isovit.parity.compare import error
from parity_tests.agreement import assert_agree
from parity_tests.subject import Subject

MOMENTUM, EPSILON = 0.2, 1e-3
BATCH, ROWS, COLUMNS, DIM = 2, 2, 3, 5

State = dict[str, np.ndarray]


@pytest.fixture
def state() -> State:
    """Scale, bias and statistics in which no two numbers are equal."""
    rng = np.random.default_rng(0)
    drawn = {name: rng.standard_normal(DIM) for name in ("scale", "bias", "mean")}
    return {**drawn, "var": np.exp(rng.standard_normal(DIM))}


@pytest.fixture
def x() -> np.ndarray:
    """(batch, rows, columns, dim), far from a mean of 0 and a variance of 1."""
    return 3 + 2 * np.random.default_rng(1).standard_normal((BATCH, ROWS, COLUMNS, DIM))


def expected(state: State, x: np.ndarray, *, train: bool) -> tuple[np.ndarray, State]:
    """Output and statistics, by the definition."""
    over = (0, 1, 2)
    mean, var = (x.mean(over), x.var(over)) if train else (state["mean"], state["var"])
    y = (x - mean) / np.sqrt(var + EPSILON) * state["scale"] + state["bias"]
    if not train:
        return y, state
    moved = {"mean": mean, "var": x.var(over, ddof=1)}
    return y, state | {n: (1 - MOMENTUM) * state[n] + MOMENTUM * moved[n] for n in moved}


def run(backend: Subject, state: State, x: np.ndarray, *, train: bool) -> tuple[np.ndarray, State]:
    """Output and statistics of a backend's layer."""
    run_layer = {"torch": _torch, "flax": _flax, "keras": _keras}[backend.framework]
    return run_layer(backend, state, x, train)


def _torch(backend: Subject, state: State, x: np.ndarray, train: bool) -> tuple[np.ndarray, State]:
    layer = backend.module("layers").BatchNorm(DIM, eps=EPSILON, momentum=MOMENTUM).double()
    tensors = {name: backend.tensor(array) for name, array in state.items()}
    layer.load_state_dict(
        {
            "weight": tensors["scale"],
            "bias": tensors["bias"],
            "running_mean": tensors["mean"],
            "running_var": tensors["var"],
        }
    )
    y = backend.array(layer.train(train)(backend.tensor(x)))
    found = {"mean": layer.running_mean, "var": layer.running_var}
    return y, state | {name: backend.array(tensor) for name, tensor in found.items()}


def _flax(backend: Subject, state: State, x: np.ndarray, train: bool) -> tuple[np.ndarray, State]:
    from flax import nnx

    kinds = dict(dtype="float64", param_dtype="float64", rngs=nnx.Rngs(0))
    make: Callable[..., Any] = backend.module("layers").BatchNorm
    layer = make(DIM, epsilon=EPSILON, momentum=MOMENTUM, **kinds)
    for name, array in state.items():
        getattr(layer, name).set_value(backend.tensor(array))
    layer.set_attributes(use_running_average=not train)
    y = backend.array(layer(backend.tensor(x)))
    return y, state | {n: backend.array(getattr(layer, n)[...]) for n in ("mean", "var")}


def _keras(backend: Subject, state: State, x: np.ndarray, train: bool) -> tuple[np.ndarray, State]:
    make: Callable[..., Any] = backend.module("layers").BatchNorm
    layer = make(epsilon=EPSILON, momentum=MOMENTUM, name="norm", dtype="float64")
    layer.build(x.shape)
    variables = {
        "scale": layer.gamma,
        "bias": layer.beta,
        "mean": layer.moving_mean,
        "var": layer.moving_variance,
    }
    for name, variable in variables.items():
        variable.assign(backend.tensor(state[name]))
    y = backend.array(layer(backend.tensor(x), training=train))
    return y, {name: backend.array(variable.value) for name, variable in variables.items()}


@pytest.fixture(autouse=True)
def float64(backend: Subject) -> None:
    """JAX and Keras are put into float64 by the first model of it that is built."""
    from parity_tests.examples import EXAMPLES

    backend.build(EXAMPLES["vit_timm"])


@pytest.mark.parametrize("train", [False, True])
def test_output_and_statistics_are_those_of_the_definition(
    backend: Subject, state: State, x: np.ndarray, train: bool
) -> None:
    (found, moved), (wanted, expected_state) = (
        run(backend, state, x, train=train),
        expected(state, x, train=train),
    )
    assert_agree({"": found}, {"": wanted}, "output")
    assert_agree(moved, expected_state, "output")


@pytest.mark.parametrize("fault", ["population", "momentum of the others"])
def test_a_port_of_the_statistics_is_caught(
    backend: Subject, state: State, x: np.ndarray, fault: str
) -> None:
    """What Flax and Keras do by themselves: the population's variance, the old one's weight."""
    _, moved = run(backend, state, x, train=True)
    weight = 1 - MOMENTUM if fault == "momentum of the others" else MOMENTUM
    var = x.var((0, 1, 2), ddof=int(fault != "population"))
    other = (1 - weight) * state["var"] + weight * var
    assert error(moved["var"], other) > 100 * LIMITS["float64"]["output"]
