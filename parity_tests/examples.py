"""A few fixed cases with every module and option between them, for tests that need no search.

Each family has its own, as ``EXAMPLES`` of its module in ``families``; each objective in
``objectives``.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module

import numpy as np

from isovit.spec.families import FAMILIES
from isovit.spec.objectives import OBJECTIVES
from parity_tests.strategies import Case
from parity_tests.subject import Subject

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
"""Whether to run what takes long and differs in sizes alone from what always runs."""

EXAMPLES: dict[str, Case] = {
    name: Case(config)
    for family in FAMILIES
    for name, config in import_module(f"parity_tests.families.{family}").EXAMPLES.items()
}

TRAINERS: dict[str, Case] = {
    name: Case(config)
    for objective in OBJECTIVES
    for name, config in import_module(f"parity_tests.objectives.{objective}").EXAMPLES.items()
}
"""Those of the objectives, which take more than images."""

ALL = {**EXAMPLES, **TRAINERS}


@cache
def traced(backend: Subject, example: str, dtype: str) -> dict[str, np.ndarray]:
    """Every activation of an example, computed once for all tests."""
    return backend.trace(ALL[example], dtype)
