"""Process-wide choices, made before any framework is imported, and how many examples to draw."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from isovit.cli import main
from parity_tests.compiling import XLA_FLAGS
from parity_tests.oracles.importing import REQUIRE
from tests.outcome import Outcome

os.environ["KERAS_BACKEND"] = "torch"  # TensorFlow takes seconds to start
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", XLA_FLAGS)

settings.register_profile(
    "unit",
    max_examples=50,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("unit")


def pytest_configure(config: pytest.Config) -> None:
    """Skip the comparison with an original library where it is absent; excuse one warning."""
    config.stash.setdefault(REQUIRE, False)
    # save_weights: ``__array__`` of Keras 3.15's Variable lacks the ``copy`` of NumPy 2.
    excused = "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
    config.addinivalue_line("filterwarnings", excused)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def call(*words: str | Path) -> Outcome:
        with pytest.raises(SystemExit) as caught:
            main([str(word) for word in words])
        return Outcome(int(caught.value.code or 0), *capsys.readouterr())

    return call
