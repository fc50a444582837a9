"""The pages of bench, choose and parity: what is on them, as text and in a browser."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isovit.benchmarks.choose import choose
from isovit.benchmarks.driver import WAYS
from isovit.benchmarks.records import Case, Record
from isovit.benchmarks.report import write_choices, write_run
from isovit.parity.budgets import LIMITS
from isovit.parity.report import Difference, ParityReport
from isovit.report.page import SHADES, element, page, table
from isovit.report.plots import Value, bars, by_batch, linear_axis, log_axis, shade, short
from tests.browser import CHROMIUM, look
from tests.markup import Markup
from tests.measured import a_run, record
from tests.small import T2T

NASTY = "a folder/<script>alert('no')</script>&\"of_a_long_name_that_has_no_spaces_in_it.npz"
EVERY_WAY = [(backend, way) for backend, ways in WAYS.items() for way in ways]


# The pages, with as much on them as there can be


def bench(path: Path) -> None:
    """Eight ways at seven batches, a model at one batch, and one that failed."""
    records = [
        record(backend, (20 + 9 * i) * batch**0.9, batch, way=way, spread=0.04 + 0.02 * i)
        for i, (backend, way) in enumerate(EVERY_WAY)
        for batch in (1, 2, 3, 4, 8, 16, 256)
    ]
    records += [
        record(backend, 1e4 + i, model=NASTY, way=way, changes={"norm_eps": 1e-5})
        for i, (backend, way) in enumerate(EVERY_WAY)
    ]
    records += [record("torch", 3.0, batch, mode="train") for batch in (1, 8)] + [
        Record(case=Case(model="m", backend="flax", way="jit", dtype="bfloat16"), error=NASTY)
    ]
    write_run(a_run(*records), path)


def choice(path: Path) -> None:
    """An uncertain choice and a certain one, of two models."""
    run = a_run(
        *(record(b, 10.0 + i, model=m, way=w, spread=0.02)
          for m in ("m", NASTY) for i, (b, w) in enumerate(EVERY_WAY)),
        Record(case=Case(model="m", backend="flax", way="xla"), error=NASTY),
    )  # fmt: skip
    choices = [
        choose(run, "m", "latency", list(WAYS)),
        choose(run, NASTY, "throughput", ["onnx", "torch"]),
    ]
    write_choices(run, choices, ["m.npz", NASTY], path)


def proof(path: Path, backends: int = 6, away: float = 1e-9) -> None:
    """All backends in a T2T-ViT; the last one is away from the others from a block on."""
    names, rng = list(WAYS)[:backends], random.Random(0)
    blocks = [f"tokens_to_token.attention{i}.attn.performer.kqv" for i in (1, 2)]
    blocks += [f"blocks.{i}.{part}" for i in range(12) for part in ("norm1", "attn", "mlp.fc1")]
    paths = {"output": [""], "activation": blocks, "gradient": ["images", NASTY, "head.kernel"]}
    rows = [
        Difference(
            kind=kind,
            path=path,
            a=a,
            b=b,
            error=away if b == names[-1] and i > 20 else 10 ** rng.uniform(-18, -13),
        )
        for a, b in itertools.combinations(names, 2)
        for kind in paths
        for i, path in enumerate(paths[kind])
    ]
    ParityReport(
        config=T2T,
        backends=tuple(names),
        dtype="float64",
        limits=LIMITS["float64"],
        differences=tuple(rows),
        seconds=dict.fromkeys(names, 1.0),
        versions={"isovit": "0.1.0"},
    ).write_html(path)


def proof_of_two(path: Path) -> None:
    """Two backends that agree."""
    proof(path, backends=2, away=0.0)


PAGES = {"bench": (bench, 8), "choose": (choice, 8), "parity": (proof, 2), "two": (proof_of_two, 2)}
"""How each is written, and the number of its plots."""


# The text


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_closed_loads_nothing_and_takes_names_for_text(name: str, tmp_path: Path) -> None:
    write, plots = PAGES[name]
    write(tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert Markup(text).problems == []
    assert text.count("<figure>") == plots
    assert text.startswith('<!doctype html>\n<html lang="en">')
    assert len(text) < 500_000
    assert list(tmp_path.iterdir()) == [tmp_path / "a.html"]


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ("<p>open", "not closed: p"),
        ("<p><code></p></code>", "closed out of turn: p"),
        ("<script></script>", "no element of reports: script"),
        ('<img src="https://example.org/a.png">', "img loads or runs: src"),
        ('<p onclick="a()"></p>', "p loads or runs: onclick"),
        ("<style>@import 'a.css'</style>", "a style loads something"),
        ("<table><tr><th></th></tr></table>", "th without scope"),
        ("<svg></svg>", "svg without a name"),
    ],
)
def test_a_fault_of_a_page_is_seen(fault: str, problem: str) -> None:
    assert problem in Markup(fault).problems


def test_a_run_is_told_in_full(tmp_path: Path) -> None:
    bench(tmp_path / "a.html")
    text = " ".join(Markup((tmp_path / "a.html").read_text(encoding="utf-8")).words)
    for words in ("isovit bench m", "2026", "first call s", "build s", "transfer ms", "weights MB",
                  "float32_matmul_precision=highest", "a 200, b 400 GFLOP/s",
                  "norm_eps=1e-05", "did not run: a folder",
                  "m, train, float32 on cpu"):  # fmt: skip
        assert words in text


def test_a_choice_is_told_with_how_sure_it_is_and_the_code(tmp_path: Path) -> None:
    choice(tmp_path / "a.html")
    text = " ".join(Markup((tmp_path / "a.html").read_text(encoding="utf-8")).words)
    assert "m: take torch (eager), 10 ms at batch 1 Certain: the 95% interval of torch" in text
    assert "flax jit 13 1.30 certain 12.74 to 13.26 1" in text
    assert "torch eager 10 1.00 taken" in text
    assert "flax (xla) did not run: a folder" in text
    assert 'isovit.load("m.npz")' in text
    run = a_run(record("torch", 10.0), record("flax", 10.1))
    for objective, sure in (
        ("latency", "Not certain: the 95% intervals of torch and of flax overlap."),
        ("memory", "Memory is read once"),
    ):
        found = choose(run, "m", objective, ["torch", "flax"])
        write_choices(run, [found], ["m"], tmp_path / "a.html")
        assert sure in (tmp_path / "a.html").read_text(encoding="utf-8")
    alone = choose(run, "m", "latency", ["torch"])
    write_choices(run, [alone], ["m"], tmp_path / "a.html")
    assert "Nothing else than torch" in (tmp_path / "a.html").read_text(encoding="utf-8")


def test_a_heat_map_has_each_error_once_and_names_what_is_beyond(tmp_path: Path) -> None:
    proof(tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    pairs, modules, parameters = 15, 38 + 1, 3
    assert text.count("</title></rect>") == pairs * (modules + parameters)
    assert text.count('class="path over"') == 38 - 21
    assert "blocks.11.mlp.fc1, torch ~ onnx: 1.0e-09" in text
    assert "limit 1e-12" in text
    assert "limit 1e-11" in text


def test_a_name_that_is_no_unicode_is_written_as_far_as_it_goes(tmp_path: Path) -> None:
    write_run(a_run(record("torch", 1.0, model="b\udcffd")), tmp_path / "a.html")
    assert "b?d, infer" in (tmp_path / "a.html").read_text(encoding="utf-8")


def test_a_column_without_texts_is_left_out() -> None:
    made = table(["a", "b ", "c"], [["x", "", "1"], ["y", "", "2"]], label="t")
    assert [cell.text for cell in made.iter("th") if cell.get("scope") == "col"] == ["a", "c"]
    assert [cell.text for cell in made.iter("td")] == ["1", "2"]


# The plots


@given(st.floats(1e-6, 1e5), st.floats(1, 1e6))
def test_an_axis_holds_its_values_and_has_a_few_round_ticks(low: float, factor: float) -> None:
    high = low * factor
    for axis in (log_axis(low, high), linear_axis(high)):
        assert axis.low <= low <= high <= axis.high * (1 + 1e-9)
        assert 0 <= axis.part(high) <= 1 + 1e-9
        assert 2 <= len(axis.ticks) <= 8
        assert all(axis.low <= tick <= axis.high * (1 + 1e-9) for tick in axis.ticks)
        assert all(len(short(tick)) <= 7 for tick in axis.ticks)


@given(st.floats(0, 1e3), st.floats(0, 1e3))
def test_a_larger_error_has_no_lighter_colour_and_the_limit_parts_them(a: float, b: float) -> None:
    assert shade(min(a, b), 1.0) <= shade(max(a, b), 1.0)
    assert (shade(a, 1.0) > 8) == (a > 1)


def test_the_colours_end_at_nothing_and_at_infinity() -> None:
    assert (shade(0.0, 1e-12), shade(1e-16, 1e-12), shade(1e-12, 1e-12)) == (0, 0, 8)
    assert shade(math.inf, 1e-12) == len(SHADES) - 1


def test_one_batch_makes_bars_and_several_make_lines() -> None:
    value = Value(1.0, 0.9, 1.1)
    assert by_batch("a", {"x": {4: value}}, unit="u").findall(".//polyline") == []
    assert len(by_batch("a", {"x": {4: value, 8: value}}, unit="u").findall(".//polyline")) == 1


def test_figures_of_zero_are_drawn() -> None:
    zero = Value(0.0, 0.0, 0.0)
    for made in (
        bars("a", {"x": zero}, unit="u"),
        by_batch("a", {"x": {1: zero, 2: zero}}, unit="u"),
    ):
        assert "nan" not in page("t", [made])


# In a browser


chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")


@chromium
@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_a_phone_and_a_desk(name: str, tmp_path: Path) -> None:
    write, plots = PAGES[name]
    write(tmp_path / "a.html")
    seen = look((tmp_path / "a.html").read_text(encoding="utf-8"))
    assert seen.console == []
    assert [view.width for view in seen.views] == [360, 1200]
    for view in seen.views:
        assert (view.plots, view.requests, view.problems) == (plots, [], [])


@chromium
def test_the_browser_sees_what_is_wrong_with_a_page() -> None:
    wide = element("p", "x", style="width: 500px")
    image = element("img", src="https://example.org/a.png")
    plot = by_batch("a", {"x": {1: Value(1, 1, 1), 2: Value(1, 1, 1)}}, unit="u")
    svg = plot[1]
    for x, words in ((300, "cut off at the end"), (10, "one"), (12, "two")):
        svg.append(element("text", words, x=x, y=100))
    svg.append(element("text", "tiny", x=100, y=50, style="font-size: 5px"))
    seen = look(page("t", [wide, image, plot, element("script", "nothing.at_all")]))
    phone, desk = seen.views
    assert any("page too wide: 5" in problem for problem in phone.problems)
    assert not any("page too wide" in problem for problem in desk.problems)
    for problem in ("text outside its plot: cut off at the end", "small text: tiny",
                    "overlapping texts: one and two"):  # fmt: skip
        assert problem in phone.problems
    assert phone.requests == ["https://example.org/a.png"]
    assert any("nothing is not defined" in line for line in seen.console)
