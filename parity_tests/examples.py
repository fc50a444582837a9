"""A few fixed cases with every module and option between them, for tests that need no search.

Each family has its own, as ``EXAMPLES`` of its module in ``families``.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module

import numpy as np

from isovit.spec.families import FAMILIES
from parity_tests.strategies import Case
from parity_tests.subject import Subject

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
"""Whether to run what takes long and differs in sizes alone from what always runs."""

EXAMPLES: dict[str, Case] = {
    name: Case(config)
    for family in FAMILIES
    for name, config in import_module(f"parity_tests.families.{family}").EXAMPLES.items()
}


@cache
def traced(backend: Subject, example: str, dtype: str) -> dict[str, np.ndarray]:
    """Every activation of an example, computed once for all tests."""
    return backend.trace(EXAMPLES[example], dtype)
