"""What a parity run found: as objects, as JSON and as text; ``page`` draws it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec

from isovit.parity.budgets import Kind
from isovit.spec.config import BaseConfig


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
        versions: of the packages that took part.
    """

    config: BaseConfig
    backends: tuple[str, ...]
    dtype: str
    limits: dict[Kind, float]
    differences: tuple[Difference, ...]
    seconds: dict[str, float]
    versions: dict[str, str] = {}

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

    def errors(self) -> dict[tuple[Kind, str], list[float]]:
        """The errors of each array by kind and path, in the order of the pairs."""
        found: dict[tuple[Kind, str], list[float]] = {}
        for d in self.differences:
            found.setdefault((d.kind, d.path), []).append(d.error)
        return found

    def write_html(self, path: Path) -> None:
        """Write one self-contained page: the verdict, the worst of each pair, heat maps of all."""
        from isovit.parity.page import write_report

        write_report(self, path)
