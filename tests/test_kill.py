"""``kill -9`` in the midst of a conversion: the target is absent, the old file, or the new one.

A process with everything imported forks a child for each conversion and kills it at a random moment
of the time that a whole one takes, so that most moments fall into the writing.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

import isovit
from isovit.spec.initialize import init
from isovit.weight_convert import files
from isovit.weight_convert.checkpoint import Checkpoint
from isovit.weight_convert.store import opened, save

MOMENTS = 50
SUFFIXES = (".safetensors", ".npz")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "absent"


def convert(source: Path, target: Path) -> None:
    save(opened(source), target)


@contextmanager
def in_place(path: Path, folder: bool = False) -> Iterator[Path]:
    """What ``files.replacing`` is there to prevent."""
    yield path


def killed_after(delay_s: float, source: Path, target: Path) -> None:
    """Convert in a child, and kill it."""
    child = os.fork()
    if child == 0:
        convert(source, target)
        os._exit(0)
    time.sleep(delay_s)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def outcomes(folder: Path, suffix: str) -> Counter[str]:
    """How often each state of the target was found, ``absent``, ``old``, ``new`` or ``torn``."""
    source, target, old = folder / "source.npz", folder / f"a{suffix}", folder / f"old{suffix}"
    convert(folder / "other.npz", old)
    start = time.perf_counter()
    convert(source, target)
    whole_s = time.perf_counter() - start
    names = {digest(old): "old", digest(target): "new", "absent": "absent"}
    rng, found = random.Random(0), Counter[str]()
    for moment in range(MOMENTS // len(SUFFIXES)):
        target.unlink(missing_ok=True)
        if moment % 2:
            shutil.copy(old, target)
        # The first two are over before the end, and long after it.
        delay_s = (0.2 * whole_s, 5 * whole_s)[moment] if moment < 2 else rng.random() * whole_s * 2
        killed_after(delay_s, source, target)
        found[names.get(digest(target), "torn")] += 1
        for left in folder.glob(f".{target.name}.*"):  # what a killed process cannot take away
            shutil.rmtree(left)
    return found


def main() -> None:
    folder, writer = Path(sys.argv[1]), sys.argv[2]
    if writer == "in place":
        files.replacing = in_place
    found = {suffix: outcomes(folder, suffix) for suffix in SUFFIXES}
    print(msgspec.json.encode(found).decode())


def run(folder: Path, writer: str) -> dict[str, dict[str, int]]:
    """The outcomes in a process that has no threads of others."""
    config = isovit.config("vit_ti16", depth=6)
    for name, seed in (("source", 1), ("other", 2)):
        save(Checkpoint(config, init(config, seed)), folder / f"{name}.npz")
    command = [sys.executable, "-m", "tests.test_kill", str(folder), writer]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return msgspec.json.decode(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_conversion_leaves_the_old_file_or_the_whole_new_one(tmp_path: Path) -> None:
    for suffix, found in run(tmp_path, "as it is").items():
        assert found.keys() <= {"absent", "old", "new"}, suffix
        assert found["new"] > 0, f"{suffix}: no conversion came to its end"
        assert found.keys() & {"absent", "old"}, f"{suffix}: every conversion came to its end"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_writer_in_place_is_caught(tmp_path: Path) -> None:
    found = run(tmp_path, "in place")
    assert all(outcome.get("torn", 0) > 0 for outcome in found.values()), found


if __name__ == "__main__":
    main()
