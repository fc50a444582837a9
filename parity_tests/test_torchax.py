"""By torchax a PyTorch model is the same function on JAX, and lowers for a TPU."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from isovit.parity.budgets import LIMITS
from isovit.parity.compare import error
from parity_tests.agreement import assert_outputs_agree
from parity_tests.apart import Results, process_of
from parity_tests.examples import EXAMPLES
from parity_tests.lowering import NAMES, PLATFORMS, faults
from parity_tests.subject import Subject

pytestmark = pytest.mark.slow

ENVIRONMENT = {"JAX_ENABLE_X64": "0"}
MODELS = ("vit_timm", "t2t_performer")


@pytest.fixture(scope="module")
def results(backend: Subject, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What a process with torchax found."""
    if backend.name != "torch":
        pytest.skip("concerns torch only")
    if find_spec("torchax") is None:
        pytest.skip("torchax has an environment of its own: nox -s torchax")
    settings = {"folder": tmp_path_factory.mktemp("torchax"), "environment": ENVIRONMENT}
    with process_of("parity_tests.through_torchax", **settings) as find:
        return find("everything")


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name", MODELS)
def test_torchax_gives_the_output_of_torch(results: Results, name: str, dtype: str) -> None:
    found, wanted = (results[f"{name} {dtype} {way}"] for way in ("torchax", "torch"))
    assert_outputs_agree(found, wanted, dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", MODELS)
def test_weights_off_by_a_thousandth_are_caught(results: Results, name: str, dtype: str) -> None:
    found = results[f"{name} {dtype} torchax, other weights"]
    assert error(found, results[f"{name} {dtype} torch"]) > LIMITS[dtype]["output"]


@pytest.mark.parametrize("name", MODELS)
def test_torchax_trains_as_torch_does(results: Results, name: str) -> None:
    found, wanted = (results[f"{name} float64 losses by {way}"] for way in ("torchax", "eager"))
    assert found[0] == pytest.approx(wanted[0], rel=LIMITS["float64"]["output"])
    assert found == pytest.approx(wanted, rel=1e-4)
    assert found[-1] < found[0]


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("name", MODELS)
def test_it_lowers(results: Results, name: str, dtype: str, platform: str) -> None:
    config = EXAMPLES[name].config
    text = str(results[f"{name} {dtype} for {platform}"])
    upcast = getattr(config, "performer_upcast", False)
    assert not faults(text, dtype, 6 * config.depth, upcast=upcast)
