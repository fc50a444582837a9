"""The process in which cases run: it may hang, swell or die, and is then replaced.

It reads case numbers from standard input, a line each, and writes what happens as JSON lines:
``{"ready": N}`` when the file of a case is made and the clock starts, then the result.
"""

from __future__ import annotations

import gc
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from parity_tests.compiling import XLA_FLAGS

os.environ.setdefault("KERAS_BACKEND", "torch")  # before Keras; TensorFlow takes seconds to start
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", XLA_FLAGS)

import msgspec

from tests.fuzz.check import Result, run_case
from tests.fuzz.corpus import Seed, build
from tests.fuzz.plan import Case, case_of


def main(corpus: Path, work: Path, fault: str = "") -> None:
    """Run the cases whose numbers come in."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer

    def answer(content: Any) -> None:
        answers.write(msgspec.json.encode(content).decode() + "\n")
        answers.flush()

    seeds = build(corpus)
    if fault:
        from tests.fuzz.faults import FAULTS

        FAULTS[fault](setattr)
    warm: set[str] = set()
    for line in sys.stdin:
        number = int(line)
        case = case_of(number, seeds)
        place = work / str(os.getpid())
        if case.seed.container not in warm and not fault:
            warm_up(case, seeds, corpus, place)
            warm.add(case.seed.container)
        try:
            ready = lambda number=number: answer({"ready": number})  # noqa: E731
            result = run_case(case, seeds, corpus, place, ready)
        except Exception as error:
            said = f"the mutator failed: {type(error).__name__}: {error}"
            result = Result(number, case.name, faults=[said])
        shutil.rmtree(place, ignore_errors=True)
        answer(result)


def warm_up(case: Case, seeds: list[Seed], corpus: Path, work: Path) -> None:
    """Read the seed itself, so that no case pays for imports."""
    run_case(Case(case.number, case.seed, ()), seeds, corpus, work)
    shutil.rmtree(work)
    gc.collect()
    gc.freeze()  # frameworks have a million objects, which nobody need go through again


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]), *sys.argv[3:])
