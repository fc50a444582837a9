"""One case: inspect it, convert it, and see whether every promise was kept.

The promise: a file that cannot be read gets one clear line, exit code 2, and nothing else happens:
no traceback, no code run, no half a target, no file left behind.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import typer

from isovit.cli import convert, inspect
from isovit.errors import InputError
from isovit.weight_convert.store import load
from tests.fuzz.corpus import Seed
from tests.fuzz.plan import Case, make
from tests.fuzz.sample import Sample

LONGEST_LINE = 2000


class Result(msgspec.Struct):
    """What became of a case.

    Attributes:
        number: of the case.
        name: of the case, for people.
        codes: exit codes of ``inspect`` and ``convert``.
        faults: the promises that were broken, a line or a traceback each.
        said: the messages.
        seconds: that both took together.
        growth_bytes: by which the memory of the process grew at its peak.
    """

    number: int
    name: str
    codes: tuple[int | None, ...] = ()
    faults: list[str] = msgspec.field(default_factory=list)
    said: list[str] = msgspec.field(default_factory=list)
    seconds: float = 0.0
    growth_bytes: int = 0


def run_case(
    case: Case, seeds: Sequence[Seed], corpus: Path, work: Path, ready: Callable[[], Any] = int
) -> Result:
    """Make the file of a case, run both commands on it, and look for faults.

    Args:
        case: which.
        seeds: all seeds.
        corpus: folder of the seeds.
        work: a folder that is not there yet; it is left for the caller to look at and remove.
        ready: called when the file is made and the commands begin.
    """
    result = Result(case.number, case.name)
    sample = make(case, seeds, corpus, work)
    target = work / "out" / "out.safetensors"
    before = listing(work)
    gc.collect()  # of what an earlier case left, or its memory would count as this one's
    with at_home_in(work):
        memory = Memory()
        ready()
        start = time.perf_counter()
        changes = list(sample.seed.changes)
        result.codes = (
            attempt(result, lambda: inspect.command(sample.path, changes=changes)),
            attempt(result, lambda: convert.command(sample.path, target, changes=changes)),
        )
        result.seconds = time.perf_counter() - start
        result.growth_bytes = memory.growth()
        look_around(result, sample, target, before)
    return result


@contextlib.contextmanager
def at_home_in(work: Path) -> Iterator[None]:
    """Let temporary files, and files of no folder, be made where they are seen."""
    folder, temporary = Path.cwd(), tempfile.tempdir
    os.chdir(work)
    tempfile.tempdir = str(work / "tmp")
    try:
        yield
    finally:
        os.chdir(folder)
        tempfile.tempdir = temporary


def attempt(result: Result, command: Callable[[], None]) -> int | None:
    """The exit code of a command; None for an exception that would be a traceback."""
    errors, out = io.StringIO(), io.StringIO()
    code: int | None = 0
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(errors),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            command()
    except InputError as error:
        code = 2
        check_line(result, str(error))
    except typer.Exit as error:
        code = error.exit_code
    except BaseException:  # also what ends a process: nothing may
        code = None
        result.faults.append(f"a traceback:\n{traceback.format_exc(limit=-6)}")
    for line in errors.getvalue().splitlines():
        if not line.startswith(("isovit: ", "converting: ")):
            result.faults.append(f"on standard error: {line[:300]}")
    return code


def check_line(result: Result, message: str) -> None:
    """A message is one line that a terminal can show."""
    result.said.append(message[:LONGEST_LINE])
    if not message.strip():
        result.faults.append("the message is empty")
    if not message.isprintable():
        result.faults.append(f"the message is no single printable line: {message[:500]!r}")
    if len(message) >= LONGEST_LINE:
        result.faults.append(f"the message has {len(message)} characters: {message[:200]}…")


def look_around(
    result: Result, sample: Sample, target: Path, before: dict[str, tuple[int, ...]]
) -> None:
    """See what is in the folder that was not, or not so."""
    after = listing(sample.work)
    made = str(target.relative_to(sample.work))
    converted = result.codes[-1:] == (0,)
    if (made in after) != converted:
        result.faults.append(f"exit code {result.codes[-1]}, target there: {made in after}")
    result.faults += [f"left behind: {name}" for name in after.keys() - before.keys() - {made}]
    result.faults += [f"gone: {name}" for name in before.keys() - after.keys()]
    result.faults += [
        f"changed: {n}" for n in before.keys() & after.keys() if before[n] != after[n]
    ]
    if sample.trap.exists():
        result.faults.append("code of the checkpoint ran")
    if converted and made in after:
        try:
            load(target)
        except Exception as error:  # whatever it is, the target is broken
            result.faults.append(f"the target does not load: {error}")
    if sample.must == "succeed" and result.codes != (0, 0):
        result.faults.append(f"refused, though nothing is wrong with it: {result.said}")
    if sample.must == "fail" and 0 in result.codes:
        result.faults.append(f"read what must not be read: exit codes {result.codes}")


def listing(folder: Path) -> dict[str, tuple[int, ...]]:
    """Every file below a folder, with kind, size and time of the last change; folders by kind."""
    found: dict[str, tuple[int, ...]] = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            told = path.lstat()
            is_folder = path.is_dir() and not path.is_symlink()
            about = () if is_folder else (told.st_size, told.st_mtime_ns)
            found[str(path.relative_to(folder))] = (told.st_mode, *about)
    return found


class Memory:
    """The peak of this process from here on; nothing where the system does not tell."""

    STATUS, PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def __init__(self) -> None:
        self.start = 0
        with contextlib.suppress(OSError):
            self.PEAK.write_text("5", encoding="ascii")  # the peak so far is forgotten
            self.start = resident(self.STATUS, "VmRSS")

    def growth(self) -> int:
        """Bytes by which the peak is above the start."""
        return max(resident(self.STATUS, "VmHWM") - self.start, 0) if self.start else 0


def resident(status: Path, field: str) -> int:
    """A number of bytes from ``/proc/…/status``; 0 if there is none."""
    with contextlib.suppress(OSError):
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return 0
