"""How tests state that arrays agree: the one measure, against the one table of limits."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from isovit.parity.budgets import LIMITS, Kind
from isovit.parity.compare import error


def assert_agree(
    found: Mapping[str, np.ndarray],
    wanted: Mapping[str, np.ndarray],
    kind: Kind,
    dtype: str = "float64",
) -> None:
    """Assert that the same arrays are there and that each is within its limit.

    Raises:
        AssertionError: naming every array that parts, in the order of ``wanted``: for activations
            the first is where two backends part.
    """
    __tracebackhide__ = True
    assert found.keys() == wanted.keys()
    limit = LIMITS[dtype][kind]
    errors = {path: error(found[path], wanted[path]) for path in wanted}
    beyond = {path or "(output)": value for path, value in errors.items() if value > limit}
    assert not beyond, f"{kind} beyond {limit:.0e}: {beyond}"


def assert_traces_agree(
    found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray], dtype: str = "float64"
) -> None:
    """Assert that two traces agree, the output (``""``) among them."""
    __tracebackhide__ = True
    assert_agree(found, wanted, "activation", dtype)
    assert_agree({"": found[""]}, {"": wanted[""]}, "output", dtype)


def assert_outputs_agree(found: np.ndarray, wanted: np.ndarray, dtype: str = "float64") -> None:
    """Assert that two outputs agree."""
    __tracebackhide__ = True
    assert_agree({"": found}, {"": wanted}, "output", dtype)
