"""The scripts of ``examples`` that train: a few steps of each, as a user runs them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from isovit.spec.objectives import OBJECTIVES
from parity_tests.compiling import XLA_FLAGS

EXAMPLES = Path(__file__).parents[1] / "examples"
NUMBER = r"(\d+\.\d+)"
NAMES = [*OBJECTIVES, "token_learner", "t2t_vit_designs", "efficient_vit"]

pytestmark = pytest.mark.slow


def said(name: str, *words: str) -> str:
    """What a script prints."""
    pytest.importorskip({"keras": "tensorflow"}.get(name, name))
    command = [sys.executable, f"digits_{name}.py", *words]
    environment = {
        "KERAS_BACKEND": "tensorflow",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": XLA_FLAGS,
        "OMP_NUM_THREADS": "1",  # other tests run beside it
    }
    done = subprocess.run(
        command,
        cwd=EXAMPLES,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_every_objective_has_a_small_form() -> None:
    text = (EXAMPLES / "digits.py").read_text(encoding="utf-8")
    assert set(OBJECTIVES) <= set(re.findall(r'^    "(\w+)": ', text, re.MULTILINE))


@pytest.mark.parametrize("name", ["torch", "flax", "keras"])
def test_the_loss_of_each_falls(name: str) -> None:
    text = said(name, *NAMES, "--steps", "20")
    for objective in NAMES:
        found = re.search(rf"{objective}: loss {NUMBER} -> {NUMBER} in 20 steps", text)
        assert found, text
        first, last = map(float, found.groups())
        assert last < first or objective == "dino"  # which wants more steps: ``digits.report``
