"""How accurate is it? Each backend and dtype against the same backend in float64.

A different question from parity: here rounding is all there is, and its budget is recorded.
"""

from __future__ import annotations

import numpy as np
import pytest

from isovit.parity.budgets import PRECISION
from isovit.parity.compare import error
from parity_tests.examples import EXAMPLES, require_usual, traced
from parity_tests.subject import Subject


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("example", EXAMPLES)
def test_output_is_within_its_budget(backend: Subject, example: str, dtype: str) -> None:
    require_usual(backend, example)
    found = traced(backend, example, dtype)[""]
    assert error(found, traced(backend, example, "float64")[""]) <= PRECISION[dtype]


@pytest.mark.parametrize("example", EXAMPLES)
def test_float64_is_float64_in_every_module(backend: Subject, example: str) -> None:
    """What passed through float32 last would have no more than its digits; float32 has not."""
    require_usual(backend, example)
    for path, array in traced(backend, example, "float64").items():
        assert not _fits_float32(array), path
    assert all(map(_fits_float32, traced(backend, example, "float32").values()))


def test_keras_has_the_table_that_float64_needs(backend: Subject) -> None:
    """The private table that ``_enable_float64`` mends; without it float64 is float32 unasked."""
    if backend.framework != "keras":
        pytest.skip("concerns Keras only")
    from keras.src.backend.common.dtypes import BIT64_TO_BIT32_DTYPE

    assert "float64" in BIT64_TO_BIT32_DTYPE


def _fits_float32(array: np.ndarray) -> bool:
    return bool((array.astype(np.float32) == array).all())
