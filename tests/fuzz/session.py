"""Many cases over several processes, each with a limit of time and of memory."""

from __future__ import annotations

import os
import selectors
import shutil
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import msgspec

from parity_tests.compiling import XLA_FLAGS
from tests.fuzz.check import Result, resident
from tests.fuzz.corpus import build
from tests.fuzz.plan import case_of

LIMIT_S = 10.0
"""Both commands on one file take less."""

LIMIT_BYTES = 1 << 30
"""The memory of the process grows by less."""

PATIENCE_S = 120.0
"""A worker that starts, or makes the file of a case, takes less."""

ROOT = Path(__file__).parents[2]


@dataclass
class Worker:
    """A process and the case that it has."""

    process: subprocess.Popen[bytes]
    heard: bytes = b""
    number: int | None = None
    since: float = 0.0
    running: bool = False
    ended: bool = False
    before_bytes: int = 0

    @property
    def status(self) -> Path:
        """Where the system tells of its memory."""
        return Path(f"/proc/{self.process.pid}/status")


@dataclass
class Session:
    """A number of cases.

    Attributes:
        corpus: folder of the seeds.
        work: folder for the files of the cases.
        workers: number of processes.
        limit_s: seconds for a case.
        limit_bytes: growth of memory for a case.
        fault: planted in every worker, a name in ``faults.FAULTS``.
        log: where the workers' standard error goes; None for nowhere.
    """

    corpus: Path
    work: Path
    workers: int = 2
    limit_s: float = LIMIT_S
    limit_bytes: int = LIMIT_BYTES
    fault: str = ""
    log: IO[Any] | None = None
    results: list[Result] = field(default_factory=list[Result])

    def run(
        self, numbers: Sequence[int], tell: Callable[[Result], None] = lambda _: None
    ) -> Report:
        """Run cases by number; ``tell`` gets each result as it comes."""
        start = time.monotonic()
        build_apart(self.corpus)
        self.seeds = build(self.corpus)
        self.selector = selectors.DefaultSelector()
        waiting = deque(numbers)
        late: set[int] = set()
        busy = [worker for _ in range(self.workers) if (worker := self._next(None, waiting))]
        try:
            while busy:
                heard = [key.data for key, _ in self.selector.select(timeout=0.02)]
                for worker in list(busy):
                    result = self._hear(worker) if worker in heard else self._watch(worker)
                    if result is None:
                        continue
                    busy.remove(worker)
                    if result.seconds > self.limit_s and result.number not in late:
                        late.add(result.number)  # perhaps the machine was busy: once more
                        waiting.append(result.number)
                    else:
                        self.results.append(result)
                        tell(result)
                    if following := self._next(worker, waiting):
                        busy.append(following)
        finally:
            for worker in busy:
                self._end(worker)
            self.selector.close()
        return Report(self.results, time.monotonic() - start)

    @property
    def _log(self) -> Any:
        return subprocess.DEVNULL if self.log is None else self.log

    def _next(self, worker: Worker | None, waiting: deque[int]) -> Worker | None:
        """Give a worker, or a new one, the next case; None if there are no more."""
        if not waiting:
            if worker is not None:
                self._end(worker)
            return None
        number = waiting.popleft()
        if worker is None or worker.ended:
            worker = self._start()
        worker.number, worker.since, worker.running = number, time.monotonic(), False
        assert worker.process.stdin is not None
        worker.process.stdin.write(b"%d\n" % number)
        worker.process.stdin.flush()
        return worker

    def _start(self) -> Worker:
        command = [sys.executable, "-m", "tests.fuzz.worker", str(self.corpus), str(self.work)]
        process = subprocess.Popen(
            [*command, self.fault] if self.fault else command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            bufsize=0,  # or lines wait where no selector sees them
            cwd=ROOT,
            env=environment(),
        )
        worker = Worker(process)
        assert process.stdout is not None
        self.selector.register(process.stdout, selectors.EVENT_READ, worker)
        return worker

    def _end(self, worker: Worker) -> None:
        if worker.ended:
            return
        worker.ended = True
        assert worker.process.stdout is not None
        assert worker.process.stdin is not None
        if worker.process.stdout.closed:
            return
        self.selector.unregister(worker.process.stdout)
        worker.process.kill()
        worker.process.wait()
        shutil.rmtree(self.work / str(worker.process.pid), ignore_errors=True)
        worker.process.stdout.close()
        worker.process.stdin.close()

    def _hear(self, worker: Worker) -> Result | None:
        """Take in what a worker says: its result, or that it is gone; None for neither yet."""
        assert worker.process.stdout is not None
        if not (said := os.read(worker.process.stdout.fileno(), 1 << 16)):
            worker.process.wait()
            return self._failed(worker, f"the process ended with {worker.process.returncode}")
        *lines, worker.heard = (worker.heard + said).split(b"\n")
        for line in lines:
            if not line.startswith(b'{"ready"'):
                return self._judged(msgspec.json.decode(line, type=Result))
            worker.running, worker.since = True, time.monotonic()
            worker.before_bytes = resident(worker.status, "VmRSS")
        return None

    def _judged(self, result: Result) -> Result:
        """A result with what it has to say about the limits."""
        if result.seconds > self.limit_s:
            result.faults.append(f"took {result.seconds:.1f} s")
        if result.growth_bytes > self.limit_bytes:
            result.faults.append(f"took {result.growth_bytes:,} bytes of memory")
        return result

    def _watch(self, worker: Worker) -> Result | None:
        """See whether a worker that says nothing has broken a limit."""
        waited = time.monotonic() - worker.since
        if waited > (self.limit_s if worker.running else PATIENCE_S):
            doing = "runs" if worker.running else "is not made"
            return self._failed(worker, f"after {waited:.0f} s the case still {doing}")
        grown = resident(worker.status, "VmRSS") - worker.before_bytes
        if worker.running and grown > 2 * self.limit_bytes:  # before the machine has none left
            return self._failed(worker, f"took {grown:,} bytes of memory and still runs")
        return None

    def _failed(self, worker: Worker, fault: str) -> Result:
        self._end(worker)
        assert worker.number is not None
        case = case_of(worker.number, self.seeds)
        seconds = time.monotonic() - worker.since
        return Result(case.number, case.name, faults=[fault], seconds=seconds)


@dataclass
class Report:
    """What became of the cases of a session."""

    results: list[Result]
    seconds: float

    @property
    def failed(self) -> list[Result]:
        """Cases that broke a promise."""
        return sorted((r for r in self.results if r.faults), key=lambda result: result.number)

    def lines(self) -> Iterator[str]:
        """The report as text, failures last."""
        codes = Counter(result.codes[-1] if result.codes else None for result in self.results)
        yield (
            f"{len(self.results)} cases in {self.seconds:.0f} s: {codes[0]} converted, "
            f"{codes[2]} refused in one line, {len(self.failed)} failed"
        )
        if not self.results:
            return
        slowest = max(self.results, key=lambda result: result.seconds)
        largest = max(self.results, key=lambda result: result.growth_bytes)
        yield f"slowest: {slowest.seconds:.2f} s, case {slowest.name}"
        yield f"most memory: {largest.growth_bytes / 1e6:.0f} MB, case {largest.name}"
        for result in self.failed:
            yield f"\nFAILED case {result.name}"
            yield from result.faults
            yield f"again: python -m tests.fuzz --only {result.number}"


def build_apart(corpus: Path) -> None:
    """Write the seeds into a folder, unless it has them, in a process that may load frameworks."""
    if not (corpus / "seeds.json").exists():
        command = [sys.executable, "-m", "tests.fuzz", "--corpus", str(corpus), "--build"]
        subprocess.run(command, cwd=ROOT, check=True, env=environment(), capture_output=True)


def environment() -> dict[str, str]:
    """Of the workers: one thread each, and no plugin or cache of the user's."""
    return {
        **os.environ,
        "KERAS_BACKEND": "torch",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": XLA_FLAGS,
        "OMP_NUM_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PYTHONHASHSEED": "0",
    }
