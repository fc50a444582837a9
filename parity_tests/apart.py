"""What a module of these tests finds in a process of its own, where it can be set up otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

Results = dict[str, np.ndarray]


def results_of(
    module: str, *arguments: str, target: Path, environment: Mapping[str, str]
) -> Results:
    """The arrays that a module writes.

    Args:
        module: its name; its last argument is the file to write, a ``.npz``.
        arguments: those before.
        target: that file.
        environment: added to that of this process.
    """
    root = Path(__file__).parents[1]
    paths = os.pathsep.join([str(root), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments, str(target)],
        env={**os.environ, **environment, "PYTHONPATH": paths},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(target) as arrays:
        return {key: arrays[key] for key in arrays.files}
