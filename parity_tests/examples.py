"""A few fixed cases with every module and option between them, for tests that need no search.

Each family has its own, as ``EXAMPLES`` of its module in ``families``; each objective in
``objectives``.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import pytest

from isovit.spec.families import FAMILIES, home
from isovit.spec.objectives import OBJECTIVES
from parity_tests.strategies import Case
from parity_tests.subject import Subject

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
"""Whether to run what takes long and differs in sizes alone from what always runs."""


def examples_of(family: str) -> dict[str, Any]:
    """Configs by name."""
    return import_module(f"parity_tests.{home(family)}").EXAMPLES


EXAMPLES: dict[str, Case] = {
    name: Case(config) for family in FAMILIES for name, config in examples_of(family).items()
}

TRAINERS: dict[str, Case] = {
    name: Case(config)
    for objective in OBJECTIVES
    for name, config in examples_of(objective).items()
}
"""Those of the objectives, which take more than images."""

ALL = {**EXAMPLES, **TRAINERS}


FIRST = {next(iter(examples_of(family))) for family in FAMILIES}


def require_usual(backend: Subject, example: str) -> None:
    """Skip all but an example of each family where Keras's layers are tested on other engines.

    JAX compiles each of them, and takes as long for these as for all else of a suite.
    """
    if backend.name == "keras:jax":
        _require_first(example, "on its other engines; HYPOTHESIS_PROFILE=nightly runs it on JAX")


def require_first(backend: Subject, example: str) -> None:
    """Skip all but an example of each family where JAX compiles each for the dtype alone."""
    if backend.name in ("flax", "keras:jax"):
        _require_first(example, "in its other dtype; HYPOTHESIS_PROFILE=nightly runs it in both")


def _require_first(example: str, where: str) -> None:
    if example not in FIRST and not NIGHTLY:
        pytest.skip(where)


@cache
def traced(backend: Subject, example: str, dtype: str) -> dict[str, np.ndarray]:
    """Every activation of an example, computed once for all tests."""
    return backend.trace(ALL[example], dtype)
