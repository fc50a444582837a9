"""Is it the same function to an optimiser? Gradients of every parameter and of the images.

The reference is torch's automatic differentiation; that of torch itself is the NumPy oracle's
derivative along random directions.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isovit.backends import get_backend
from isovit.backends.protocol import Gradients
from isovit.spec.families import FAMILIES, param_tree
from isovit.spec.objectives import OBJECTIVES
from parity_tests.agreement import assert_agree
from parity_tests.oracles.arrays import derivative
from parity_tests.strategies import Case, cases
from parity_tests.subject import Subject


@pytest.mark.parametrize("family", [*FAMILIES, *OBJECTIVES])
@given(data=st.data())
def test_gradients_are_those_of_the_reference(
    backend: Subject, family: str, data: st.DataObject
) -> None:
    case = data.draw(cases(family))
    found = backend.gradients(case)
    params = param_tree(case.config).parameters()
    assert list(found.weights) == [path for path, param in params.items() if param.trainable]
    if backend.name == "torch":
        _assert_derivatives_agree(found, case)
    else:
        wanted = Subject("torch", get_backend("torch")).gradients(case)
        assert_agree(_arrays(found), _arrays(wanted), "gradient")


def _assert_derivatives_agree(found: Gradients, case: Case) -> None:
    """Compare along directions: an error in any one gradient turns up in every direction."""
    rng, gradients = np.random.default_rng(case.seed), _arrays(found)
    along_gradients, along_oracle = [], []
    for _ in range(4):
        direction = {path: rng.standard_normal(g.shape) for path, g in gradients.items()}
        along_gradients.append(sum((g * direction[path]).sum() for path, g in gradients.items()))
        by_output = derivative(case.config, case.weights, case.images, direction, case.others)
        along_oracle.append((by_output * case.cotangent).sum())
    wanted = {"directions": np.array(along_oracle)}
    assert_agree({"directions": np.array(along_gradients)}, wanted, "gradient")


def _arrays(gradients: Gradients) -> dict[str, np.ndarray]:
    return {**gradients.weights, "images": gradients.images}
