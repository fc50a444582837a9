"""What a module of these tests finds in a process of its own, where it can be set up otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

Results = dict[str, np.ndarray]
DONE = "done"


@contextmanager
def process_of(
    module: str, *arguments: str, folder: Path, environment: Mapping[str, str]
) -> Iterator[Callable[[str], Results]]:
    """A process that is asked for one thing after the other, as starting takes it seconds.

    Args:
        module: its name; it calls ``answer``.
        arguments: for its command line.
        folder: for its files.
        environment: added to that of this process.

    Returns:
        A function that gives the arrays which the module finds of a name.
    """
    root = Path(__file__).parents[1]
    paths = os.pathsep.join([str(root), *filter(None, sys.path)])
    log = folder / "log"
    with (
        log.open("w", encoding="utf-8") as errors,
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env={**os.environ, **environment, "PYTHONPATH": paths},
            cwd=root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        questions, answers = process.stdin, process.stdout
        assert questions is not None
        assert answers is not None

        def ask(name: str) -> Results:
            target = folder / f"{name}.npz"
            print(name, target, file=questions, flush=True)
            said = answers.readline().strip()
            assert said == DONE, log.read_text(encoding="utf-8")[-3000:]
            with np.load(target) as arrays:
                return {key: arrays[key] for key in arrays.files}

        yield ask  # who leaves closes its input, at which it ends


def answer(find: Callable[[str], Results]) -> None:
    """The other end: write what is found of every name that is asked for."""
    for line in sys.stdin:
        name, _, target = line.strip().partition(" ")
        np.savez(target, allow_pickle=False, **find(name))
        print(DONE, flush=True)
