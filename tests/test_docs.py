"""The docs say what was measured, of every format in every backend."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks import tables
from docs import draw
from isovit.parity.budgets import LIMITS
from isovit.spec.families import FAMILIES, family_module


def run(lines: list[str]) -> None:
    """As a process of its own, since Keras has one engine in a process."""
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


OBJECTIVES_EXAMPLES = {
    page.stem: re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    for page in (Path(__file__).parents[1] / "docs/objectives").glob("*.md")
}


def test_every_format_was_measured_in_every_backend_within_the_limit() -> None:
    known = {
        f"{family} {name}"
        for family in FAMILIES
        for name in import_module(f"isovit.weight_convert.families.{family}").TABLES
    }
    errors = tables.load()
    assert errors.keys() == known
    for key, row in errors.items():
        assert row.keys() == set(tables.BACKENDS), key
        assert max(row.values()) <= LIMITS["float64"]["output"], key


def test_the_page_shows_the_record() -> None:
    page = tables.PAGE.read_text(encoding="utf-8")
    assert tables.drawn(page) == page
    assert all(f"| {key.replace(' ', ', ')} |" in page for key in tables.load())


def test_the_page_of_speed_shows_the_records() -> None:
    page = tables.SPEED.read_text(encoding="utf-8")
    assert tables.speed_page(page) == page
    results = tables.ERRORS.parent
    assert page.count("### ") == len(list(results.glob(tables.PEERS))) > 0
    assert page.count("| model | lane |") == len(list(results.glob(tables.MEMORY))) > 0
    assert page.count("| model | backend |") == len(list(results.glob(tables.OPERATORS))) > 0


def test_the_figure_of_growth_shows_the_records() -> None:
    assert tables.GROWN.read_text(encoding="utf-8") == tables.growth_figure()


def test_memory_grows_with_the_tokens_and_not_with_their_square() -> None:
    for (model, lane), (_, memory) in tables.growth().items():
        most = max(memory["224"])
        grown = memory["512"][most].value / memory["224"][most].value
        tokens = (512 / 224) ** 2
        assert grown < 1.5 * tokens < tokens**2 / 3, (model, lane)


def test_lines_of_the_suite_become_the_worst_of_each() -> None:
    lines = [
        f'{{"family": "vit", "format": "hf", "backend": "{name}", "error": {error}}}'
        for name, error in (("torch", 1e-15), ("torch", 3e-15), ("flax", 2e-15))
    ]
    assert tables.collect(lines) == {"vit hf": {"flax": 2e-15, "torch": 3e-15}}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_page_of_a_family_is_what_its_docstrings_and_its_tree_say(family: str) -> None:
    for name, text in draw.files(family).items():
        assert (draw.PAGES / name).read_text(encoding="utf-8") == text, "run python docs/draw.py"


def test_a_page_for_every_family_and_no_more() -> None:
    wanted = {f"{family}.{suffix}" for family in FAMILIES for suffix in ("md", "svg")}
    assert {path.name for path in draw.PAGES.iterdir()} == wanted


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", sorted(name for name, blocks in OBJECTIVES_EXAMPLES.items() if blocks)
)
def test_the_examples_of_a_page_of_objectives_run(page: str) -> None:
    """One after the other, as who reads the page may run them."""
    lines = ["import math"]
    for block in OBJECTIVES_EXAMPLES[page]:
        lines += [
            block,
            'assert "loss" not in globals() or math.isfinite(float(loss))',
            'assert "losses" not in globals() or tuple(losses.shape) == (2,)',
        ]
    run(lines)


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["torch", "flax", "keras"])
def test_the_examples_of_the_pages_run(framework: str) -> None:
    """All families' in one process; the width of the logits is the example's own."""
    lines = ["import numpy"]
    for family in FAMILIES:
        first = next(iter(family_module(family).VARIANTS))
        lines += [draw.examples(first)[framework], "assert tuple(logits.shape) == (2, 10)"]
    run(lines)
