"""Broken checkpoints of every format: each is read, or refused in one line, and nothing is left.

``ISOVIT_FUZZ_CASES=20000`` runs more of them, ``ISOVIT_FUZZ_ONLY=1234`` that one;
``python -m tests.fuzz`` does the same with a report.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.fuzz.check import Result, listing, run_case
from tests.fuzz.corpus import CONTAINERS, Seed, build
from tests.fuzz.faults import FAULTS
from tests.fuzz.mutators import raw
from tests.fuzz.plan import STRUCTURED, Case, a_round, case_of, make
from tests.fuzz.session import Session, build_apart, environment

pytestmark = pytest.mark.slow

CASES = int(os.environ.get("ISOVIT_FUZZ_CASES", "500"))
ONLY = os.environ.get("ISOVIT_FUZZ_ONLY")
NUMBERS = [int(ONLY)] if ONLY else range(CASES)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    build_apart(folder)
    return folder


@pytest.fixture(scope="module")
def seeds(corpus: Path) -> list[Seed]:
    return build(corpus)


def test_a_broken_file_is_read_or_refused_in_one_line(corpus: Path, tmp_path: Path) -> None:
    report = Session(corpus, tmp_path).run(NUMBERS)
    assert not report.failed, "\n".join(report.lines())
    assert len(report.results) == len(NUMBERS)
    codes = {result.codes[-1] for result in report.results}
    assert ONLY or codes == {0, 2}, "the cases are all alike"


def test_five_hundred_cases_have_every_mutator_of_every_container(seeds: list[Seed]) -> None:
    assert len(a_round()) <= 500
    drawn = {(case.seed.container, case.mutators[0]) for case in cases(500, seeds)}
    assert drawn >= {(c, mutator) for c in CONTAINERS for mutator in STRUCTURED[c]}
    assert {mutator for _, mutator in drawn} >= raw.MUTATORS.keys()


def test_a_number_always_stands_for_the_same_bytes(
    corpus: Path, seeds: list[Seed], tmp_path: Path
) -> None:
    for case in [c for c in cases(60, seeds) if c.seed.container == "safetensors"]:
        files = []
        for name in ("one", "other"):
            sample = make(case, seeds, corpus, tmp_path / name / str(case.number))
            is_file = sample.path.is_file() and not sample.path.is_symlink()
            files.append(beginning(sample.path) if is_file else None)
        assert files[0] == files[1], case.name


def beginning(path: Path) -> tuple[int, bytes]:
    """Size and first megabyte: some files are gigabytes of nothing."""
    with path.open("rb") as file:
        return path.stat().st_size, file.read(1 << 20)


# The command line itself

# How many cases of a container go through it; frameworks take seconds to start.
SHARES = {"safetensors": 5, "npz": 4, "hf": 3, "pth": 4, "h5": 1, "keras": 1, "orbax": 2}


def test_the_command_line_says_one_line_and_exits_with_2(
    corpus: Path, seeds: list[Seed], tmp_path: Path
) -> None:
    chosen = [
        case
        for container, share in SHARES.items()
        for case in [c for c in cases(400, seeds) if c.seed.container == container][:share]
    ]
    assert len(chosen) == 20

    def run(case: Case) -> tuple[Case, list[str]]:
        return case, command_line(case, seeds, corpus, tmp_path / str(case.number))

    with ThreadPoolExecutor(2) as pool:
        faults = {case.name: found for case, found in pool.map(run, chosen) if found}
    assert not faults


def command_line(case: Case, seeds: list[Seed], corpus: Path, work: Path) -> list[str]:
    """What is wrong with what ``isovit inspect``, or ``isovit convert``, does with a case."""
    sample = make(case, seeds, corpus, work)
    target = work / "out" / "out.safetensors"
    words = [word for change in sample.seed.changes for word in ("--set", change)]
    verb = ["inspect", sample.path] if case.number % 2 else ["convert", sample.path, target]
    before = listing(work)
    done = subprocess.run(
        [sys.executable, "-m", "isovit", *map(str, verb), *words],
        cwd=work,
        env={**environment(), "TMPDIR": str(work / "tmp")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    after = listing(work)
    lines = done.stderr.splitlines()
    faults = [f"on standard error: {line}" for line in lines if not line.startswith("isovit: ")]
    faults += [
        f"left behind: {name}" for name in after.keys() - before.keys() - {"out/" + target.name}
    ]
    faults += [f"changed: {n}" for n in before if n != "out" and before[n] != after.get(n)]
    if done.returncode not in (0, 1, 2):
        faults.append(f"exit code {done.returncode}")
    if done.returncode == 2 and len(lines) != 1:
        faults.append(f"{len(lines)} lines on standard error")
    if target.exists() != (done.returncode == 0 and verb[0] == "convert"):
        faults.append(f"exit code {done.returncode}, target there: {target.exists()}")
    return faults


# Planted faults

# What each must be caught as, on a file that has nothing wrong with it unless it says so.
CAUGHT = {
    "raises": "a traceback:",
    "exits": "a traceback:",
    "runs out of stack": "a traceback:",
    "says nothing": "the message is empty",
    "says two lines": "the message is no single printable line",
    "clears the screen": "the message is no single printable line",
    "says too much": "the message has 5000 characters",
    "leaves a file": "left behind: in/",
    "leaves a temporary file": "left behind: tmp/",
    "changes the source": "changed: in/",
    "writes half": "exit code 2, target there: True",
    "writes nonsense": "the target does not load",
    "writes nothing": "exit code 0, target there: False",
    "runs pickles": "code of the checkpoint ran",
    "follows paths": "read what must not be read",
    "refuses all": "refused, though nothing is wrong with it",
}
APART = {
    "dies": "the process ended with 7",
    "hangs": "after 2 s the case still runs",
    "takes memory": "bytes of memory",
}
NEEDS = {"runs pickles": ("pth", "code"), "follows paths": ("hf", "paths_in_the_index")}


def test_every_planted_fault_is_tried() -> None:
    assert FAULTS.keys() == CAUGHT.keys() | APART.keys()


@pytest.mark.parametrize("fault", CAUGHT)
def test_the_suite_catches_a_reader_or_writer_that(
    fault: str, corpus: Path, seeds: list[Seed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    container, mutator = NEEDS.get(fault, ("safetensors", "nothing"))
    chosen = those(seeds, container, mutator)
    assert not any(faults_of(chosen[:4], seeds, corpus, tmp_path / "without"))
    FAULTS[fault](monkeypatch.setattr)
    found = faults_of(chosen, seeds, corpus, tmp_path / "with")
    assert any(line.startswith(CAUGHT[fault]) for lines in found for line in lines), found[:3]


@pytest.mark.parametrize("fault", APART)
def test_the_suite_outlives_and_catches_a_reader_that(
    fault: str, corpus: Path, seeds: list[Seed], tmp_path: Path
) -> None:
    numbers = [case.number for case in those(seeds, "safetensors", "nothing")[:1]]
    limits = {"limit_s": 2.0, "limit_bytes": 100 << 20}
    assert not Session(corpus, tmp_path, **limits).run(numbers).failed
    report = Session(corpus, tmp_path, workers=1, fault=fault, **limits).run(numbers)
    assert [APART[fault] in line for r in report.failed for line in r.faults[:1]] == [True]
    assert f"python -m tests.fuzz --only {numbers[0]}" in "\n".join(report.lines())
    assert not list(tmp_path.iterdir())


def cases(count: int, seeds: list[Seed]) -> list[Case]:
    return [case_of(number, seeds) for number in range(count)]


def those(seeds: list[Seed], container: str, mutator: str) -> list[Case]:
    """Cases of a container in which one thing is done."""
    return [
        case
        for case in cases(3 * len(a_round()), seeds)
        if case.seed.container == container and [m.__name__ for m in case.mutators] == [mutator]
    ]


def faults_of(chosen: list[Case], seeds: list[Seed], corpus: Path, work: Path) -> list[list[str]]:
    results: list[Result] = [
        run_case(case, seeds, corpus, work / str(case.number)) for case in chosen
    ]
    return [result.faults for result in results]
