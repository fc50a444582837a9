"""Which backends are tested, the numeric switches of this process, and how many examples.

Nothing here imports a framework before ``pytest_configure`` has set the environment: 64-bit mode
and the Keras engine are process-wide choices that a framework makes when it is first imported.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

from isovit.backends import BACKENDS, ENGINES, get_backend, parse_backend, require_installed
from isovit.errors import InputError
from parity_tests.compiling import XLA_FLAGS
from parity_tests.oracles.importing import REQUIRE
from parity_tests.subject import Subject

NAMES = [name for name in BACKENDS if name != "keras"] + [f"keras:{name}" for name in ENGINES]

PROFILES = {"quick": 2, "dev": 10, "ci": 25, "nightly": 500}
for _name, _examples in PROFILES.items():
    settings.register_profile(
        _name,
        max_examples=_examples,
        deadline=None,  # JAX compiles every new shape
        derandomize=_name != "nightly",  # the same examples on every machine
        database=None,  # a failure prints its @reproduce_failure line; no folder is left behind
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow],
    )


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--backend`` and ``--require``."""
    group = parser.getgroup("isovit")
    group.addoption(
        "--backend",
        action="append",
        choices=NAMES,
        help="backend to test; repeatable, with one Keras engine at most; default torch and flax",
    )
    group.addoption(
        "--require",
        action="store_true",
        help="fail, instead of skip, where a backend or the library of an oracle is absent",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Set the switches of this process, before any framework is imported."""
    engines = sorted({engine for _, engine in map(parse_backend, _names(config)) if engine})
    if len(engines) > 1:
        raise pytest.UsageError(
            f"Keras runs on one engine per process, but {' and '.join(engines)} were asked for: "
            "start pytest once for each"
        )
    if engines:
        os.environ["KERAS_BACKEND"] = engines[0]
    os.environ["JAX_ENABLE_X64"] = "1"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("XLA_FLAGS", XLA_FLAGS)
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"  # oneDNN on TensorFlow knows no float64
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))
    config.stash[REQUIRE] = config.getoption("--require")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test that asks for ``backend`` once for each of ``--backend``."""
    if "backend" in metafunc.fixturenames:
        names = _names(metafunc.config)
        metafunc.parametrize("backend", names, ids=names, indirect=True, scope="session")


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> Subject:
    """The backend under test, with exact products."""
    try:
        require_installed(request.param)
    except InputError as error:
        if request.config.getoption("--require"):
            pytest.fail(str(error))
        pytest.skip(str(error))
    runtime = get_backend(request.param)
    runtime.exact_arithmetic()
    return Subject(request.param, runtime)


def _names(config: pytest.Config) -> list[str]:
    return list(dict.fromkeys(config.getoption("--backend") or ["torch", "flax"]))
