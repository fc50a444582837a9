"""Killed at any moment, a conversion leaves what was there or the whole new file, never a part.

A process that has imported isovit forks one child after another; each converts, and is killed
(SIGKILL, as the system does where memory runs out) at a moment of its own: after a time, once so
many bytes are written, or as soon as the target changes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import isovit
from isovit.spec.initialize import probe
from isovit.weight_convert.checkpoint import Checkpoint
from isovit.weight_convert.store import load, save
from tests.small import VIT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL"),
]

MOMENTS = 50

# Thirty megabytes in a hundred arrays: to write them takes much longer than all else.
LARGE = isovit.config("vit_s16", depth=6, num_classes=10)

FORKING = """
import json, os, signal, sys, time
from contextlib import contextmanager
from pathlib import Path
from isovit.cli import main
import isovit.weight_convert.families.vit
from isovit.weight_convert import files, huggingface, store

@contextmanager
def in_place(path, folder=False):
    yield path

def size(folder):
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except FileNotFoundError:
                pass  # it was moved
    return total

def inode(path):
    return path.stat().st_ino if path.exists() else None

for line in sys.stdin:
    job = json.loads(line)
    target = Path(job["words"][2])
    bytes_before, inode_before = size(target.parent), inode(target)
    start = time.monotonic()
    due = {
        "after_s": lambda wanted: time.monotonic() - start >= wanted,
        "written": lambda wanted: size(target.parent) - bytes_before >= wanted,
        "changed": lambda wanted: inode(target) != inode_before,
        "never": lambda wanted: False,
    }
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if job["in_place"]:
            files.replacing = in_place
        try:
            main(job["words"])
        except SystemExit as end:
            os._exit(end.code)
        os._exit(3)
    event, wanted = job["when"]
    ended, status = 0, 0
    while not ended and not due[event](wanted):
        time.sleep(1e-4)
        ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        os.kill(child, signal.SIGKILL)
        ended, status = os.waitpid(child, 0)
    seconds = time.monotonic() - start
    print(json.dumps({"code": os.waitstatus_to_exitcode(status), "seconds": seconds}), flush=True)
"""


class Forking:
    """The process that forks."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORKING],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def convert(
        self,
        source: Path,
        target: Path,
        when: tuple[str, float] = ("never", 0),
        in_place: bool = False,
    ) -> dict[str, Any]:
        """Convert; the exit code is that of the signal, negative, where the child was killed.

        Args:
            source: the file to convert.
            target: the file or folder to write, in a folder where nothing else changes.
            when: the moment: ``after_s`` and seconds; ``written`` and bytes; the target having
                ``changed``; ``never``.
            in_place: whether the child writes in place, as it must not.
        """
        words = ["convert", str(source), str(target), *(() if target.suffix else ("--to", "hf"))]
        job = {"words": words, "when": when, "in_place": in_place}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def forking() -> Iterator[Forking]:
    server = Forking()
    yield server
    with server.process as process:
        process.kill()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "source.npz"
    save(Checkpoint(LARGE, probe(LARGE)), path)
    return path


def content(path: Path) -> dict[str, bytes] | None:
    """The bytes of a file, or of all files of a folder; None if there is neither."""
    if not path.exists():
        return None
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def states(
    forking: Forking, source: Path, target: Path, moments: int, *, in_place: bool = False
) -> Counter[tuple[str, str]]:
    """What is at the target before and after: ``absent``, ``old``, ``new``, or ``broken``.

    Of ten moments four are after a time, four within the writing, and two when the target changes.
    """
    save(Checkpoint(VIT, probe(VIT)), target, None if target.suffix else "hf")
    old = content(target)
    for path in target.parent.iterdir():
        remove(path)
    runs = [forking.convert(source, target, in_place=in_place) for _ in range(3)]
    assert [run["code"] for run in runs] == [0, 0, 0]
    whole_s = sorted(run["seconds"] for run in runs)[1]
    new = content(target)
    assert new != old
    assert new is not None
    whole_bytes = sum(map(len, new.values()))
    names = {"absent": None, "old": old, "new": new}
    rng = random.Random(0)
    found: Counter[tuple[str, str]] = Counter()
    for i in range(moments):
        before = ("absent", "old")[i % 2]
        for path in target.parent.iterdir():
            remove(path)
        restore(target, names[before])
        part = (i + rng.random()) / moments  # evenly
        when = (
            ("after_s", whole_s * 1.5 * part),  # from the first line to well after the end
            ("written", whole_bytes * part),
            ("changed", 0),
        )[i // 2 % 5 // 2]
        code = forking.convert(source, target, when, in_place=in_place)["code"]
        assert code in (0, -9)
        here = content(target)
        after = next((name for name, wanted in names.items() if here == wanted), "broken")
        assert code != 0 or after == "new", "it ended well without a new file"
        beside = [path.name for path in target.parent.iterdir() if path != target]
        assert all(name.startswith(f".{target.name}.") for name in beside), beside
        found[before, after] += 1
        found["killed", "while writing"] += bool(beside)
    return found


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def restore(target: Path, files: dict[str, bytes] | None) -> None:
    for name, data in (files or {}).items():
        path = target / name if name != "." else target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def test_a_killed_conversion_leaves_the_old_file_or_the_whole_new_one(
    forking: Forking, source: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target.safetensors"
    found = states(forking, source, target, MOMENTS)
    while_writing = found.pop(("killed", "while writing"))
    assert while_writing > MOMENTS // 5, found
    assert found.keys() == {("absent", "absent"), ("absent", "new"), ("old", "old"), ("old", "new")}
    assert found.total() == MOMENTS


def test_what_is_left_in_the_end_is_the_whole_model(
    forking: Forking, source: Path, tmp_path: Path
) -> None:
    """After a killed conversion the next one does its work."""
    target = tmp_path / "target.safetensors"
    whole_s = forking.convert(source, target)["seconds"]
    target.unlink()
    assert forking.convert(source, target, ("after_s", whole_s / 2))["code"] == -9
    assert forking.convert(source, target)["code"] == 0
    found, wanted = load(target).weights, load(source).weights
    assert list(found) == list(wanted)
    assert all(found[name].tobytes() == wanted[name].tobytes() for name in wanted)


def test_a_folder_is_the_old_one_the_whole_new_one_or_for_a_moment_absent(
    forking: Forking, source: Path, tmp_path: Path
) -> None:
    found = states(forking, source, tmp_path / "target", 20)
    assert found.pop(("killed", "while writing")) > 4, found
    assert found.keys() <= {
        ("absent", "absent"),
        ("absent", "new"),
        ("old", "old"),
        ("old", "absent"),
        ("old", "new"),
    }
    assert found["old", "old"] + found["old", "absent"]
    assert found["old", "new"] + found["absent", "new"]


def test_a_writer_that_writes_in_place_is_caught(
    forking: Forking, source: Path, tmp_path: Path
) -> None:
    found = states(forking, source, tmp_path / "target.safetensors", 20, in_place=True)
    assert found["old", "broken"]
    assert found["absent", "broken"]
