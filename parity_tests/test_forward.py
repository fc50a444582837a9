"""Is it the same function? Logits and every activation, backend against reference.

The reference is the torch backend; of the torch backend itself, the NumPy oracle.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isovit.backends import get_backend
from isovit.spec.families import FAMILIES
from parity_tests.agreement import assert_traces_agree
from parity_tests.oracles.arrays import reference
from parity_tests.strategies import Case, cases
from parity_tests.subject import Subject


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
def test_float64_is_the_same_function(backend: Subject, family: str, data: st.DataObject) -> None:
    case = data.draw(cases(family))
    assert_traces_agree(backend.trace(case), _wanted(backend, case, "float64"))


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
def test_float32_is_as_close_as_rounding_allows(
    backend: Subject, family: str, data: st.DataObject
) -> None:
    # One logit may come out near zero by chance, and then has any relative error; eight do not.
    case = replace(data.draw(cases(family)), batch=8)
    found = backend.trace(case, "float32")
    assert {array.dtype for array in found.values()} == {np.dtype(np.float32)}
    assert_traces_agree(found, _wanted(backend, case, "float32"), "float32")


def _wanted(backend: Subject, case: Case, dtype: str) -> dict[str, np.ndarray]:
    if backend.name == "torch":
        return reference(case.config, case.weights, case.images)
    return Subject("torch", get_backend("torch")).trace(case, dtype)
