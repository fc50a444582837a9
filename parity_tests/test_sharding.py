"""Eight devices compute what one computes: the batch divided, or the model too."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from isovit.parity.budgets import LIMITS
from isovit.parity.compare import error
from isovit.spec.families import FAMILIES
from parity_tests.agreement import assert_agree
from parity_tests.apart import Results, process_of
from parity_tests.compiling import XLA_FLAGS
from parity_tests.examples import NIGHTLY
from parity_tests.subject import Subject

pytestmark = pytest.mark.slow

DTYPES = {"flax": "float64", "keras:jax": "float32"}
"""One for each: how a model is divided does not depend on it, and the loss of Keras is float32."""
KERAS = ("vit", "levit")
"""Of Keras, whose layouts are the same few lines for every model; all families when nightly."""
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_X64": "0",
    "XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {XLA_FLAGS}",
}


@pytest.fixture(scope="module")
def eight_devices(
    backend: Subject, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Results]]:
    """A process that has them: gives what it finds of a family."""
    if backend.name not in DTYPES:
        pytest.skip("concerns JAX only")
    settings = {"folder": tmp_path_factory.mktemp("sharded"), "environment": ENVIRONMENT}
    arguments = (backend.name, DTYPES[backend.name])
    with process_of("parity_tests.sharded", *arguments, **settings) as find:
        yield find


@pytest.fixture(scope="module", params=FAMILIES)
def results(
    backend: Subject, eight_devices: Callable[[str], Results], request: pytest.FixtureRequest
) -> Results:
    """What was found of a family."""
    if backend.name == "keras:jax" and request.param not in KERAS and not NIGHTLY:
        pytest.skip(
            "Keras lays out every model by the same lines: HYPOTHESIS_PROFILE=nightly runs it"
        )
    return eight_devices(request.param)


@pytest.mark.parametrize("kind", ["data", "model"])
def test_all_devices_give_the_output_of_one(results: Results, backend: Subject, kind: str) -> None:
    dtype = DTYPES[backend.name]
    found, wanted = (results[key] for key in (kind, "one"))
    assert found.dtype == wanted.dtype == dtype
    assert_agree({"": found}, {"": wanted}, "output", dtype)


@pytest.mark.parametrize("kind", ["data", "model"])
def test_a_shard_on_the_wrong_device_is_caught(
    results: Results, backend: Subject, kind: str
) -> None:
    found, wanted = (results[key] for key in (f"{kind}, misplaced", "one"))
    assert error(found, wanted) > 100 * LIMITS[DTYPES[backend.name]]["output"]


def gradients(results: Results, kind: str) -> Results:
    head = f"{kind} gradient "
    return {key.removeprefix(head): a for key, a in results.items() if key.startswith(head)}


def test_a_step_over_all_devices_has_the_loss_and_gradients_of_one(
    results: Results, backend: Subject
) -> None:
    dtype = DTYPES[backend.name]
    found, wanted = (gradients(results, kind) for kind in ("data", "one"))
    assert len(wanted) > 15
    assert_agree(found, wanted, "gradient", dtype)
    losses = [results[f"{kind} loss"] for kind in ("data", "one")]
    assert error(*losses) <= LIMITS[dtype]["output"]


def test_a_model_computes_on_the_device_it_was_built_for(results: Results) -> None:
    assert results["placed"] == 3
