"""What a parity run found: as objects, as JSON, as text and as one HTML page."""

from __future__ import annotations

import html
import math
from pathlib import Path
from typing import Any

import msgspec

from isovit.parity.budgets import Kind
from isovit.spec.config import Config


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """How far two backends are apart in one array.

    Attributes:
        kind: of the array: ``output``, ``activation`` or ``gradient``.
        path: of the module or parameter; ``images`` for the gradient of the images.
        a: one backend.
        b: the other.
        error: max|Δ| / max|reference|.
    """

    kind: Kind
    path: str
    a: str
    b: str
    error: float


class ParityReport(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of a parity run.

    Attributes:
        config: of the model.
        backends: that were compared, each with each.
        dtype: in which they ran.
        limits: largest error allowed, by kind.
        differences: of every pair and array, in the order in which the arrays were made.
        seconds: that each backend took, without imports of Python itself.
    """

    config: Config
    backends: tuple[str, ...]
    dtype: str
    limits: dict[Kind, float]
    differences: tuple[Difference, ...]
    seconds: dict[str, float]

    @property
    def equal(self) -> bool:
        """Whether every difference is within its limit."""
        return all(d.error <= self.limits[d.kind] for d in self.differences)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Every pair of backends."""
        return list(dict.fromkeys((d.a, d.b) for d in self.differences))

    @property
    def kinds(self) -> list[Kind]:
        """The kinds of arrays that were compared."""
        return list(dict.fromkeys(d.kind for d in self.differences))

    def worst(self, kind: Kind, pair: tuple[str, str] | None = None) -> Difference:
        """The largest difference of a kind, of one pair or of all."""
        found = [d for d in self.differences if d.kind == kind and pair in (None, (d.a, d.b))]
        return max(found, key=lambda d: d.error)

    def first_beyond(self, pair: tuple[str, str]) -> Difference | None:
        """The first module, in the order of completion, whose output parts a pair."""
        for d in self.differences:
            if d.kind == "activation" and (d.a, d.b) == pair and d.error > self.limits[d.kind]:
                return d
        return None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data; an infinite error is the string ``inf``, as JSON has none."""
        data = msgspec.to_builtins(self)
        data["equal"] = self.equal
        for row in data["differences"]:
            row["error"] = row["error"] if math.isfinite(row["error"]) else "inf"
        return data

    def verdict(self) -> list[str]:
        """One line if all are equal; otherwise a line for each pair that parts."""
        if self.equal:
            worst = max((self.worst(kind) for kind in self.kinds), key=lambda d: d.error)
            return [
                f"equal: {', '.join(self.backends)} are one function in {self.dtype} "
                f"(largest error {worst.error:.1e})"
            ]
        lines = []
        for pair in self.pairs:
            beyond = [d for d in self.differences if (d.a, d.b) == pair]
            beyond = [d for d in beyond if d.error > self.limits[d.kind]]
            if not beyond:
                continue
            first = self.first_beyond(pair)
            if first:
                where = f"part first at {first.path} (error {first.error:.1e})"
            else:
                top = max(beyond, key=lambda d: d.error)
                name = f"{top.kind} {top.path}".strip()
                where = f"differ in {name} (error {top.error:.1e})"
                if "activation" not in self.kinds:
                    where += "; --trace finds the first module"
            lines.append(f"NOT equal: {pair[0]} and {pair[1]} {where}")
        return lines

    def write_html(self, path: Path) -> None:
        """Write one self-contained page: the verdict, the worst of each pair, a heat map of all."""
        from isovit.weight_convert.files import replacing

        with replacing(path) as temporary:
            temporary.write_text(_page(self), encoding="utf-8")


def _page(report: ParityReport) -> str:
    title = f"Parity of {html.escape(report.config.family)} in {report.dtype}"
    heads = "".join(f"<th>{html.escape(a)}<br>{html.escape(b)}</th>" for a, b in report.pairs)
    by_array: dict[tuple[Kind, str], dict[tuple[str, str], float]] = {}
    for d in report.differences:
        by_array.setdefault((d.kind, d.path), {})[d.a, d.b] = d.error
    worst = "".join(
        _row(
            f"worst {kind}",
            [report.worst(kind, pair).error for pair in report.pairs],
            report.limits[kind],
        )
        for kind in report.kinds
    )
    rows = "".join(
        _row(f"{kind} {path}".strip(), [errors[pair] for pair in report.pairs], report.limits[kind])
        for (kind, path), errors in by_array.items()
    )
    verdict = "<br>".join(html.escape(line) for line in report.verdict())
    config = html.escape(msgspec.json.format(report.config.to_json(), indent=2))
    colour = "#176b2c" if report.equal else "#a51414"
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif }}
body {{ margin: 1rem auto; max-width: 70rem; padding: 0 1rem }}
.table {{ overflow-x: auto }} table {{ border-collapse: collapse }}
th, td {{ padding: .15rem .5rem; font-weight: 400; text-align: right; white-space: nowrap }}
td:first-child, th:first-child {{ text-align: left; font-family: monospace }}
thead th {{ font-weight: 600; vertical-align: bottom }}
.verdict {{ font-size: 1.1rem; font-weight: 600; color: {colour} }}
</style>
<h1>{title}</h1>
<p class="verdict">{verdict}</p>
<p>max|Δ| / max|reference| of every pair; shade is the error on a scale from nothing to the limit,
red is beyond it.</p>
<div class="table"><table><thead><tr><th></th>{heads}<th>limit</th></tr></thead>
<tbody>{worst}</tbody></table></div>
<h2>Every array</h2>
<div class="table"><table><thead><tr><th></th>{heads}<th>limit</th></tr></thead>
<tbody>{rows}</tbody></table></div>
<details><summary>Config</summary><pre>{config}</pre></details>
</html>
"""


def _row(name: str, errors: list[float], limit: float) -> str:
    cells = "".join(f'<td style="{_shade(e, limit)}">{e:.1e}</td>' for e in errors)
    return f"<tr><td>{html.escape(name)}</td>{cells}<td>{limit:.0e}</td></tr>"


def _shade(error: float, limit: float) -> str:
    """Colour of an error: from white at four orders under the limit to blue at it, red beyond."""
    if error > limit:
        return "background:#e05252;color:#fff"
    depth = max(0.0, 1 + math.log10(max(error, 1e-300) / limit) / 4)
    return f"background:rgba(60,120,200,{0.5 * depth:.2f})"
