"""The measure of error, the limits, and what a report says as text, JSON and HTML."""

from __future__ import annotations

import re
from pathlib import Path

import ml_dtypes
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from isovit.errors import InputError
from isovit.parity.budgets import LIMITS
from isovit.parity.compare import error
from isovit.parity.harness import parity
from isovit.parity.job import Job, Settings, check_images, draw_inputs
from isovit.parity.report import Difference, ParityReport
from isovit.spec.initialize import probe
from tests.markup import Markup
from tests.small import T2T, VIT

INF = float("inf")
ARRAYS = npst.arrays(np.float64, npst.array_shapes(), elements=st.floats(-1e6, 1e6))


# The measure


@pytest.mark.parametrize(
    ("a", "b", "wanted"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0, 0.0], [0.0, -0.0], 0.0),
        ([], [], 0.0),
        ([0.0], [1e-300], 1.0),  # nothing but zero is near zero
        ([0.0, 4.0], [1.0, 4.0], 0.25),  # relative to the largest, not to its own element
        ([-8.0, 0.0], [-8.0, 2.0], 0.25),
        ([1.0], [-1.0], 2.0),
        ([np.nan], [np.nan], INF),
        ([1.0], [np.nan], INF),
        ([np.inf], [np.inf], INF),
        ([1.0, 2.0], [1.0], INF),
        ([[1.0]], [1.0], INF),
    ],
)
def test_the_error_is_the_largest_difference_over_the_largest_value(a, b, wanted: float) -> None:
    assert error(np.array(a, np.float64), np.array(b, np.float64)) == wanted


@given(ARRAYS, st.floats(0.5, 2))
def test_the_error_is_symmetric_and_has_no_unit(a: np.ndarray, factor: float) -> None:
    b = a + 1e-3 * np.cos(np.arange(a.size)).reshape(a.shape)
    assert error(a, b) == error(b, a)
    assert error(a, a) == 0
    assert error(factor * a, factor * b) == pytest.approx(error(a, b), rel=1e-6)


def test_float32_arrays_are_compared_in_float64() -> None:
    a = np.array([1.0], np.float32)
    assert error(a, np.nextafter(a, np.float32(2))) == pytest.approx(2.0**-23, rel=1e-6)
    largest = np.array([np.finfo(np.float32).max])
    assert error(largest, -largest) == 2  # the difference is no float32


def test_every_dtype_has_limits_and_the_finer_one_the_smaller() -> None:
    for kind in ("output", "activation", "gradient"):
        exact, single = LIMITS["float64"][kind], LIMITS["float32"][kind]
        assert exact < 1e-10 < single  # no fault that ports have shows below 3e-9
        assert kind == "gradient" or single < LIMITS["bfloat16"][kind]
    assert "gradient" not in LIMITS["bfloat16"]  # no bound tells rounding from a fault there


# The report


def report(*rows: tuple[str, str, str, str, float]) -> ParityReport:
    """A report in float64 of (kind, path, a, b, error)."""
    names = ("kind", "path", "a", "b", "error")
    differences = tuple(Difference(**dict(zip(names, row, strict=True))) for row in rows)
    backends = tuple(dict.fromkeys(name for row in rows for name in row[2:4]))
    return ParityReport(
        config=VIT,
        backends=backends,
        dtype="float64",
        limits=LIMITS["float64"],
        differences=differences,
        seconds=dict.fromkeys(backends, 1.0),
    )


def three(at: float, path: str = "blocks.1") -> ParityReport:
    """torch and flax agree; keras is ``at`` away from both in one activation."""
    pairs = (("torch", "flax", 1e-16), ("torch", "keras:jax", at), ("flax", "keras:jax", at))
    return report(
        *(
            row
            for a, b, away in pairs
            for row in (
                ("output", "", a, b, 3e-16),
                ("activation", "blocks.0", a, b, 2e-16),
                ("activation", path, a, b, away),
                ("activation", "norm", a, b, 2 * away),
            )
        )
    )


def test_errors_within_their_limits_are_one_function() -> None:
    found = three(2e-13)
    assert found.equal
    assert found.verdict() == [
        "equal: torch, flax, keras:jax are one function in float64 (largest error 4.0e-13)"
    ]
    assert found.pairs == [("torch", "flax"), ("torch", "keras:jax"), ("flax", "keras:jax")]
    assert found.kinds == ["output", "activation"]


def test_a_limit_itself_is_still_equal_and_each_kind_has_its_own() -> None:
    assert report(("output", "", "torch", "flax", 1e-12)).equal
    assert not report(("output", "", "torch", "flax", 2e-12)).equal
    assert report(("gradient", "head.bias", "torch", "flax", 1e-11)).equal


def test_the_first_module_beyond_is_named_for_each_pair_that_parts() -> None:
    found = three(1e-9)
    assert not found.equal
    assert found.first_beyond(("torch", "flax")) is None
    first = found.first_beyond(("torch", "keras:jax"))
    assert first is not None
    assert (first.path, first.error) == ("blocks.1", 1e-9)  # norm is worse, but later
    assert found.verdict() == [
        "NOT equal: torch and keras:jax part first at blocks.1 (error 1.0e-09)",
        "NOT equal: flax and keras:jax part first at blocks.1 (error 1.0e-09)",
    ]


def test_without_a_trace_the_verdict_names_the_array_and_how_to_find_the_module() -> None:
    found = report(("output", "", "torch", "flax", 1e-9), ("gradient", "a.b", "torch", "flax", 1.0))
    assert found.verdict() == [
        "NOT equal: torch and flax differ in gradient a.b (error 1.0e+00); "
        "--trace finds the first module"
    ]


def test_a_gradient_beyond_its_limit_is_named_though_all_activations_agree() -> None:
    found = report(
        ("activation", "norm", "torch", "flax", 0.0), ("gradient", "images", "torch", "flax", 1e-3)
    )
    assert found.verdict() == [
        "NOT equal: torch and flax differ in gradient images (error 1.0e-03)"
    ]


def test_the_worst_is_of_a_kind_and_of_one_pair_or_all() -> None:
    found = three(1e-9)
    assert found.worst("activation").error == 2e-9
    assert found.worst("activation", ("torch", "flax")).error == 2e-16
    assert found.worst("output").error == 3e-16


def test_an_infinite_error_is_not_equal_and_a_string_in_json() -> None:
    found = three(INF)
    assert not found.equal
    data = msgspec.json.decode(msgspec.json.encode(found.to_dict()))
    assert data["equal"] is False
    assert [row["error"] for row in data["differences"]].count("inf") == 4
    assert "part first at blocks.1 (error inf)" in found.verdict()[0]


def test_json_has_everything_that_the_report_has() -> None:
    data = three(1e-13).to_dict()
    assert data["equal"] is True
    assert (data["dtype"], data["limits"]) == ("float64", LIMITS["float64"])
    assert list(data["backends"]) == ["torch", "flax", "keras:jax"]
    assert data["config"] == VIT.to_dict()
    assert data["differences"][2] == {
        "kind": "activation",
        "path": "blocks.1",
        "a": "torch",
        "b": "flax",
        "error": 1e-16,
    }


@pytest.mark.parametrize("away", [1e-13, 1e-9, INF])
def test_the_html_page_is_whole_in_itself(away: float, tmp_path: Path) -> None:
    three(away).write_html(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert Markup(text).problems == []
    assert text.count("<tr>") == 2 + 3 + 1 + 4  # heads, pairs, limit, arrays
    assert "keras:jax" in text
    assert '"embed_dim": 12' in text
    beyond = len(re.findall('<td class="n s(9|10|11)"', text))
    assert beyond == (0 if away < 1e-12 else 2 + 4)  # worst of two pairs; two arrays of each
    assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]


def test_the_html_page_escapes_what_it_did_not_write(tmp_path: Path) -> None:
    three(1e-9, path="<b>&").write_html(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<b>" not in text
    assert text.count("&lt;b&gt;&amp;") == 2 + 2 + 3 + 1  # verdict, label, cells, row


# The job


def test_a_job_comes_back_from_disk_bit_for_bit(tmp_path: Path) -> None:
    inputs = draw_inputs(T2T, batch=2, seed=1)._replace(others={"order": np.arange(3)})
    settings = Settings(dtype="float32", device=None, trace=True, gradients=True)
    Job(T2T, probe(T2T), inputs, settings).save(tmp_path)
    found = Job.load(tmp_path)
    assert (found.config, found.settings) == (T2T, settings)
    np.testing.assert_array_equal(found.inputs.images, inputs.images)
    np.testing.assert_array_equal(found.inputs.cotangent, inputs.cotangent)
    assert found.inputs.others["order"].tolist() == [0, 1, 2]
    assert all(np.array_equal(found.weights[n], array) for n, array in probe(T2T).items())


def test_a_job_keeps_weights_in_bfloat16(tmp_path: Path) -> None:
    weights = {name: array.astype(ml_dtypes.bfloat16) for name, array in probe(T2T).items()}
    Job(T2T, weights, draw_inputs(T2T, batch=2, seed=1), Settings()).save(tmp_path)
    for name, array in Job.load(tmp_path).weights.items():
        np.testing.assert_array_equal(array.astype(np.float32), weights[name].astype(np.float32))


def test_images_and_cotangent_follow_the_seed_and_the_shape_of_the_output() -> None:
    images, cotangent, others = draw_inputs(VIT, batch=3, seed=5)
    assert not others
    assert (images.shape, images.dtype) == ((3, 16, 24, 3), np.float32)
    assert (cotangent.shape, cotangent.dtype) == ((3, 5), np.float64)
    np.testing.assert_array_equal(draw_inputs(VIT, 3, 5)[0], images)
    assert not np.array_equal(draw_inputs(VIT, 3, 6)[0], images)
    tokens = VIT.replace(num_classes=0, pool="none")
    assert draw_inputs(tokens, 3, 5).cotangent.shape == (3, tokens.tokens, 12)


@pytest.mark.parametrize("shape", [(16, 24, 3), (1, 24, 16, 3), (1, 16, 24, 1)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"the model wants \(batch, 16, 24, 3\)"):
        check_images(VIT, np.zeros(shape, np.float32))


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(InputError, match="the batch is empty"):
        check_images(VIT, np.zeros((0, 16, 24, 3), np.float32))


@pytest.mark.parametrize("backends", [[], ["torch"], ["torch", "torch"], ["keras", "keras:torch"]])
def test_parity_wants_two_different_backends(backends: list[str]) -> None:
    with pytest.raises(InputError, match="wanted two or more different backends"):
        parity(VIT, backends)
