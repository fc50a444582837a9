"""The docs say what was measured, of every format in every backend."""

from __future__ import annotations

from importlib import import_module

from benchmarks import tables
from isovit.parity.budgets import LIMITS
from isovit.spec.families import FAMILIES


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
    assert tables.replaced(page, "speed", tables.speed_tables()) == page
    assert page.count("### ") == len(list(tables.ERRORS.parent.glob(tables.PEERS))) > 0


def test_lines_of_the_suite_become_the_worst_of_each() -> None:
    lines = [
        f'{{"family": "vit", "format": "hf", "backend": "{name}", "error": {error}}}'
        for name, error in (("torch", 1e-15), ("torch", 3e-15), ("flax", 2e-15))
    ]
    assert tables.collect(lines) == {"vit hf": {"flax": 2e-15, "torch": 3e-15}}
