"""Measuring and choosing: statistics, records, resuming, ranking, the page, the commands."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from isovit.backends.memory import can_keep_memory
from isovit.benchmarks import driver
from isovit.benchmarks.choose import KEEP, START, choose
from isovit.benchmarks.measure import LEAST, WARM_UP, measure, summary
from isovit.benchmarks.records import Case, Record, Run, Timing, load_run
from isovit.benchmarks.report import write_run
from isovit.benchmarks.worker import PRODUCTS
from isovit.cli.output import print_table
from isovit.errors import InputError
from tests.measured import a_run, record
from tests.outcome import Outcome
from tests.small import SMALL


def clock(durations: list[float]) -> tuple[Callable[[], float], Callable[[], None]]:
    """A clock that a step moves on by the durations in turn, again and again."""
    now, steps = 0.0, 0

    def step() -> None:
        nonlocal now, steps
        now += durations[steps % len(durations)]
        steps += 1

    return lambda: now, step


def test_a_steady_step_is_measured_as_seldom_as_allowed() -> None:
    now, step = clock([0.010])
    timing = measure(step, limit_s=60, clock=now)
    assert timing == Timing(median_ms=pytest.approx(10), low_ms=pytest.approx(10),
                            high_ms=pytest.approx(10), repeats=LEAST)  # fmt: skip
    assert now() == pytest.approx(0.010 * (LEAST + WARM_UP))


def test_an_unsteady_step_is_repeated_until_the_median_is_known_or_the_time_is_up() -> None:
    now, step = clock([0.010, 0.012, 0.011, 0.010, 0.0105])
    timing = measure(step, limit_s=60, clock=now)
    assert timing.repeats > LEAST
    assert timing.spread <= 0.03
    now, step = clock([0.010, 0.030])
    timing = measure(step, limit_s=0.5, clock=now)
    assert now() < 0.6
    assert timing.spread > 0.03


def test_a_step_longer_than_the_limit_is_run_seven_times() -> None:
    now, step = clock([100.0])
    assert measure(step, limit_s=3, clock=now).repeats == LEAST
    assert now() == pytest.approx(100 * (LEAST + 1))


@pytest.mark.parametrize("n", [LEAST, 20, 101])
def test_the_interval_holds_the_true_median_19_times_in_20(n: int) -> None:
    rng = np.random.default_rng(n)
    samples = rng.lognormal(0.0, 0.5, (2000, n))  # of median 1
    intervals = [summary(list(sample)) for sample in samples]
    held = np.mean([timing.low_ms <= 1 <= timing.high_ms for timing in intervals])
    assert 0.94 <= held <= 0.995


def test_utilisation_is_of_the_best_product_of_any_library() -> None:
    subject = record("torch", 10.0)  # 2e9 operations in 10 ms: 200 GFLOP/s
    assert a_run(subject).utilisation(subject) == pytest.approx(0.5)


def test_a_run_is_read_back_as_it_was_and_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    monkeypatch.setattr("sys.argv", ["/bin/isovit", "bench", "m", "--batch", "8"])
    a_run(record("torch", 10.0)).save(path)
    assert load_run(path) == a_run(record("torch", 10.0))
    again = driver.start(path)
    assert again.records == [record("torch", 10.0)]
    assert again.command == "isovit bench m; isovit bench m --batch 8"
    again.save(path)
    assert driver.start(path).command == again.command
    other = a_run()
    other.device["processor"] = "abacus"
    other.save(path)
    with pytest.raises(InputError, match="was measured on abacus, this is"):
        driver.start(path)
    path.write_text("no results", encoding="utf-8")
    with pytest.raises(InputError, match="wanted results of isovit bench"):
        driver.start(path)


def test_the_best_way_of_each_backend_is_ranked_with_its_cost() -> None:
    found = choose(
        a_run(record("torch", 30.0), record("flax", 10.0), record("keras:jax", 10.1)),
        "m", "latency", ["torch", "flax", "keras:jax"],
    )  # fmt: skip
    assert [option.backend for option in found.options] == ["flax", "keras:jax", "torch"]
    assert [option.backend for option in found.equals] == ["keras:jax"]
    assert found.cost(found.options[2]) == pytest.approx(3.0)
    assert found.verdict()[0] == "m: take flax (eager), 10 ms at batch 1"
    assert (
        "keras:jax (eager) costs 1.01 times as much: 10.1 ms at batch 1, no certain"
        in (found.verdict()[1])
    )
    assert "nnx.split(model)" in found.code("w.safetensors")


def test_throughput_is_that_of_the_best_batch_and_memory_of_the_least() -> None:
    subject = a_run(
        record("torch", 10.0), record("torch", 40.0, batch=8), record("flax", 11.0, batch=1)
    )
    found = choose(subject, "m", "throughput", ["torch", "flax"])
    assert (found.best.backend, found.best.batch, found.best.value) == ("torch", 8, 200.0)
    assert found.cost(found.options[1]) == pytest.approx(200 / (1000 / 11))
    least = choose(subject, "m", "memory", ["torch", "flax"])
    assert least.best.value == 10.0
    assert "certain" not in least.verdict()[1]
    assert least.verdict()[1].endswith("at batch 1, of one reading")


def test_what_failed_is_told_and_nothing_at_all_is_refused() -> None:
    broken = Record(case=Case(model="m", backend="flax", way="jit"), error="no memory")
    found = choose(a_run(record("torch", 1.0), broken), "m", "latency", ["torch", "flax"])
    assert found.verdict()[-1] == "  flax (jit) did not run: no memory"
    with pytest.raises(InputError, match="nothing was measured of m in flax"):
        choose(a_run(broken), "m", "latency", ["flax"])


@pytest.mark.parametrize("backend", START)
def test_the_code_to_start_from_is_python(backend: str) -> None:
    words = {"backend": backend, "engine": "jax", "memory": KEEP, "file": "f"}
    compile(START[backend].format(**words), "start", "exec")


def test_the_code_keeps_memory_where_the_measurement_did() -> None:
    for kind, line in (
        ("kept", "isovit.keep_memory()  # as measured"),
        ("returned", "isovit.load"),
    ):
        found = choose(a_run(record("torch", 1.0, memory=kind)), "m", "latency", ["torch"])
        code = found.code("w.safetensors")
        assert line in code
        assert ("keep_memory" in code) == (kind == "kept")


def test_the_page_has_every_figure(tmp_path: Path) -> None:
    broken = Record(case=Case(model="m", backend="flax", way="jit"), error="<no> memory")
    subject = a_run(record("torch", 12.345), record("torch", 40.0, batch=8), broken)
    write_run(subject, tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert '<td class="n">12.35</td>' in text
    assert "flax jit, batch 1, did not run: &lt;no&gt; memory" in text
    assert text.count("<figure>") == 3
    assert len(re.findall("<polyline[^>]+></polyline><line", text)) == 3


def test_a_way_that_is_unknown_is_refused_with_those_that_are() -> None:
    with pytest.raises(InputError, match="no way named warp; wanted one of compile, eager"):
        driver.plan(["vit_s16"], backends=["torch"], ways=["warp"])


@pytest.mark.parametrize(
    ("backend", "asked"),
    [
        ("onnx", {"modes": ["train"]}),
        ("onnx", {"dtypes": ["bfloat16"]}),
        ("keras:torch", {"modes": ["train"], "ways": ["graph"]}),
    ],
)
def test_what_runs_forward_only_is_not_asked_to_train(backend: str, asked: dict) -> None:
    with pytest.raises(InputError, match="wanted cases to measure, found none: keras:torch by g"):
        driver.plan(["vit_s16"], backends=[backend], **asked)
    both = driver.plan(["vit_s16"], backends=["keras:torch"], modes=["infer", "train"])
    assert [(case.mode, case.way) for case in both] == [
        ("infer", "eager"),
        ("infer", "graph"),
        ("train", "eager"),
    ]


def test_a_recorded_graph_comes_with_lines_of_its_own() -> None:
    for way, line in {"graph": "make_fx(call", "eager": "model.predict(images)"}.items():
        found = choose(a_run(record("keras:torch", 10.0, way=way)), "m", "latency", ["keras:torch"])
        assert line in found.code("w.npz")
    of_tensorflow = a_run(record("keras:tensorflow", 10.0, way="graph"))
    assert "predict(images)" in choose(of_tensorflow, "m", "latency", ["keras:tensorflow"]).code(
        "w.npz"
    )


def test_the_ways_are_those_of_the_backends() -> None:
    from isovit.backends import get_backend

    for name in ("torch", "flax", "keras:torch"):
        assert driver.WAYS[name] == get_backend(name).WAYS
    assert driver.LIBRARIES.keys() == PRODUCTS.keys()


def test_a_table_prints_brackets_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["error"], [['pip install "isovit[torchax]"']])
    assert 'pip install "isovit[torchax]"' in capsys.readouterr().out


# The commands


@pytest.fixture
def one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "LIBRARIES", {"torch": "torch"})


@pytest.mark.slow
def test_bench_measures_keeps_and_resumes(
    run: Callable[..., Outcome],
    one_product: None,
    tmp_path: Path,
) -> None:
    out, html = tmp_path / "a.json", tmp_path / "a.html"
    command = ("bench", "vit_s16", *SMALL, "--backends", "torch", "--ways", "eager", "--limit",
               "0.2", "--mode", "both", "--batch", "1,2", "--out", out)  # fmt: skip
    outcome = run(*command, "--report", html)
    assert outcome.code == 0, outcome.err
    assert "torch eager" in outcome.out
    assert "memory    kept (isovit.keep_memory())" in outcome.out or not can_keep_memory()
    kept = load_run(out)
    assert [(r.case.mode, r.case.batch) for r in kept.records] == [
        ("infer", 1), ("infer", 2), ("train", 1), ("train", 2)
    ]  # fmt: skip
    assert all(r.result and r.result.step.median_ms > 0 for r in kept.records)
    assert kept.products[0].gflops > 1
    assert "<svg" in html.read_text(encoding="utf-8")
    again = msgspec.json.decode(run(*command, "--json").out, type=Run)
    assert again.records == kept.records, "measured again"


@pytest.mark.slow
def test_choose_ends_with_a_backend_and_code(
    run: Callable[..., Outcome],
    one_product: None,
    tmp_path: Path,
) -> None:
    options = (*SMALL, "--backends", "torch", "--limit", "0.2", "--results", tmp_path / "a.json")
    html = tmp_path / "a.html"
    outcome = run("choose", "vit_s16", *options, "--report", html)
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("vit_s16: take torch (")
    assert 'isovit.load("vit_s16.safetensors")' in outcome.out
    assert "vit_s16: take torch (" in html.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("bench vit_s61", "no model named 'vit_s61'"),
        ("bench vit_s16 --mode walk", "--mode 'walk': wanted infer, train or both"),
        ("bench vit_s16 --batch 0", "--batch '0': wanted numbers of images"),
        ("bench vit_s16 --dtype int8", "no dtype named 'int8'"),
        ("bench vit_s16 --backends caffe", "no backend named 'caffe'"),
        ("bench vit_s16 --memory lost", "--memory 'lost': wanted returned or kept"),
        ("bench vit_s16 --out absent/a.json", "there is no folder absent"),
        ("choose vit_s16 --objective beauty", "--objective 'beauty': wanted latency, throughput"),
        ("choose vit_s16 --report absent/a.html", "there is no folder absent"),
        ("choose absent.npz", "cannot read absent.npz"),
    ],
)
def test_wrong_input_is_one_line(
    command: str,
    message: str,
    run: Callable[..., Outcome],
) -> None:
    outcome = run(*command.split())
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
