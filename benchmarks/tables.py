"""Redraw the tables of the docs from the records: ``python benchmarks/tables.py [ERRORS.jsonl]``.

Errors of formats are measured by the parity suite, which adds a line for each comparison to the
file that ISOVIT_FORMAT_ERRORS names; given here, they become the record first.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ERRORS = ROOT / "benchmarks" / "results" / "format-errors.json"
PAGE = ROOT / "docs" / "formats.md"
BACKENDS = ("torch", "flax", "keras:tensorflow", "keras:jax", "keras:torch")

Errors = dict[str, dict[str, float]]


def collect(lines: list[str]) -> Errors:
    """The worst error of each family and format, by backend."""
    worst: Errors = {}
    for line in lines:
        row = json.loads(line)
        backends = worst.setdefault(f"{row['family']} {row['format']}", {})
        backends[row["backend"]] = max(backends.get(row["backend"], 0.0), row["error"])
    return {key: dict(sorted(worst[key].items())) for key in sorted(worst)}


def table(errors: Errors) -> str:
    """The table as Markdown."""
    lines = [
        f"| family, format | {' | '.join(BACKENDS)} |",
        f"|---|{'---|' * len(BACKENDS)}",
    ]
    for key, row in errors.items():
        cells = [f"{row[name]:.1e}" if name in row else "–" for name in BACKENDS]
        lines.append(f"| {key.replace(' ', ', ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def replaced(text: str, name: str, content: str) -> str:
    """A page with what is between two marks replaced."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, _, rest = text.partition(start)
    _, _, after = rest.partition(end)
    return f"{before}{start}\n{content}\n{end}{after}"


def load() -> Errors:
    """The record."""
    return json.loads(ERRORS.read_text(encoding="utf-8"))


def drawn(text: str) -> str:
    """The page with its tables as the records have them."""
    return replaced(text, "errors", table(load()))


def main() -> None:
    """Make the record if lines are given, and redraw the page."""
    for path in sys.argv[1:]:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        ERRORS.write_text(json.dumps(collect(lines), indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(drawn(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
