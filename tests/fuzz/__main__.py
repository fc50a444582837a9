"""Thousands of broken checkpoints: ``python -m tests.fuzz --cases 20000 --workers 2``.

Every case is a small real file of some format with something wrong. ``isovit inspect`` and
``isovit convert`` must either succeed or say what is wrong in one line, quickly, in little memory,
without running code of the file and without leaving anything behind. A case is made from its
number alone.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from tests.fuzz.check import Result, run_case
from tests.fuzz.corpus import build
from tests.fuzz.plan import case_of
from tests.fuzz.session import Session


def main(words: Sequence[str]) -> int:
    """Run the cases; 1 if any of them fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--only", type=int, help="this case alone, in this process")
    parser.add_argument("--keep", type=Path, help="with --only: a new folder for its files")
    parser.add_argument("--log", type=Path, help="file for what the workers print")
    parser.add_argument("--corpus", type=Path, help="folder of the seeds, to use them again")
    parser.add_argument("--build", action="store_true", help="write the seeds and no more")
    options = parser.parse_args(words)
    with tempfile.TemporaryDirectory(prefix="isovit-fuzz-") as text:
        work = Path(text)
        corpus = options.corpus or work / "corpus"
        corpus.mkdir(exist_ok=True)
        if options.build or options.only is not None:
            seeds = build(corpus)
        if options.build:
            return 0
        if options.only is not None:
            return one(options.only, seeds, corpus, options.keep or work / "case")
        log = options.log.open("wb") if options.log else None
        session = Session(corpus, work, options.workers, log=log)
        report = session.run(range(options.start, options.start + options.cases), Progress())
    print("\n".join(report.lines()))
    return int(bool(report.failed))


def one(number: int, seeds, corpus: Path, work: Path) -> int:
    """Run a case and tell all of it."""
    result = run_case(case_of(number, seeds), seeds, corpus, work)
    print(f"case {result.name}: exit codes {result.codes}, {result.seconds:.2f} s")
    for line in (*result.said, *result.faults):
        print(line)
    return int(bool(result.faults))


class Progress:
    """A line for every thousand cases and for every failure."""

    def __init__(self) -> None:
        self.done = 0

    def __call__(self, result: Result) -> None:
        """Count a result."""
        self.done += 1
        if self.done % 1000 == 0:
            print(f"{self.done} cases", file=sys.stderr, flush=True)
        if result.faults:
            print(f"FAILED {result.name}: {result.faults[0][-300:]}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
