"""Is a LeViT whose BatchNorms are folded into its products the same function? Module by module."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest

from isovit.parity.budgets import LIMITS
from isovit.parity.compare import error
from isovit.spec.families import param_tree
from isovit.spec.families.levit import LeViTConfig, fuse
from isovit.spec.param import STATISTICS
from parity_tests.agreement import assert_traces_agree
from parity_tests.examples import EXAMPLES, traced
from parity_tests.subject import Subject

NORMED = ("levit", "levit_pytorch", "levit_features")

Weights = Mapping[str, np.ndarray]
Fused = tuple[LeViTConfig, Weights]


def traced_fused(backend: Subject, example: str, fused: Fused) -> dict[str, np.ndarray]:
    """Every activation of a fused model, for the images of an example."""
    model = backend.runtime.build(*fused, dtype="float64", device="cpu")
    return backend.runtime.trace(model, EXAMPLES[example].images)


@pytest.mark.parametrize("example", NORMED)
def test_every_module_of_a_fused_model_is_the_same(backend: Subject, example: str) -> None:
    case = EXAMPLES[example]
    fused = fuse(case.config, case.weights)
    params = param_tree(fused[0]).parameters()
    assert list(fused[1]) == list(params)
    assert not any(param.role in STATISTICS for param in params.values())
    found, wanted = traced_fused(backend, example, fused), traced(backend, example, "float64")
    assert_traces_agree(found, {path: wanted[path] for path in found})


def test_a_fused_model_is_given_back_as_it_is() -> None:
    case = EXAMPLES["levit_fused"]
    config, weights = fuse(case.config, case.weights)
    assert config == case.config
    assert all(np.array_equal(weights[path], case.weights[path]) for path in case.weights)


def without_epsilon(config: LeViTConfig, weights: Weights) -> Fused:
    """scale / √var."""
    fused, folded = fuse(config.replace(batch_norm_eps=1e-300), weights)
    return fused.replace(batch_norm_eps=config.batch_norm_eps), folded


def without_means(config: LeViTConfig, weights: Weights) -> Fused:
    """The bias of the norm for bias − mean · scale."""
    means = {path: 0 * array for path, array in weights.items() if path.endswith("norm.mean")}
    return fuse(config, {**weights, **means})


def heads_as_products_before(config: LeViTConfig, weights: Weights) -> Fused:
    """The heads' norm on the output, where it is on the input: what lies there is left out."""
    fused, folded = fuse(config, weights)
    return fused, {**folded, "head.bias": weights["head.linear.bias"]}


def bias_left_as_it_was(config: LeViTConfig, weights: Weights) -> Fused:
    """A bias before the norm that is added, but not multiplied by the norm's scale."""
    fused, folded = fuse(config, weights)
    path = "stages.0.blocks.0.attn.proj"
    scale = weights[f"{path}.norm.scale"] / np.sqrt(
        weights[f"{path}.norm.var"] + config.batch_norm_eps
    )
    bias = folded[f"{path}.bias"] + weights[f"{path}.linear.bias"] * (1 - scale)
    return fused, {**folded, f"{path}.bias": bias}


FAULTS: list[tuple[Callable[[LeViTConfig, Weights], Fused], str]] = [
    (without_epsilon, "levit"),
    (without_means, "levit"),
    (heads_as_products_before, "levit"),
    (bias_left_as_it_was, "levit_pytorch"),
]


@pytest.mark.parametrize(
    ("fault", "example"), FAULTS, ids=lambda row: getattr(row, "__name__", row)
)
def test_a_norm_that_is_folded_wrongly_is_caught(
    backend: Subject, fault: Callable[[LeViTConfig, Weights], Fused], example: str
) -> None:
    case = EXAMPLES[example]
    found = traced_fused(backend, example, fault(case.config, case.weights))
    assert error(found[""], traced(backend, example, "float64")[""]) > LIMITS["float64"]["output"]
