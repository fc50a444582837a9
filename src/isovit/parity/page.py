"""A parity report as one self-contained page: the verdict, heat maps, and every error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from xml.etree.ElementTree import Element

import msgspec

from isovit.parity.budgets import Kind
from isovit.parity.report import ParityReport
from isovit.report.page import element, facts, table, write_page
from isovit.report.plots import heat_map, shade


def write_report(report: ParityReport, path: Path) -> None:
    """Write the page, all or nothing."""
    write_page(path, f"Parity of {report.config.family} in {report.dtype}", _content(report))


def _content(report: ParityReport) -> Iterator[Element]:
    lines = (element("p", line) for line in report.verdict())
    yield element("div", *lines, class_="verdict good" if report.equal else "verdict bad")
    yield element("p", "The error is max|Δ| / max|reference| of two backends.")
    yield _worst(report)
    yield element("h2", "Layer by layer")
    yield element("div", *_maps(report), class_="plots maps")
    if "activation" not in report.kinds:
        yield element("p", "With --trace the output of every module is compared.")
    yield element("h2", "Every error")
    yield _every(report)
    yield element("h2", "How it was compared")
    software = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    yield facts(
        {
            "backends": ", ".join(f"{b}, {report.seconds[b]:.1f} s" for b in report.backends),
            "dtype": report.dtype,
            "software": software or "unknown",
        }
    )
    config = msgspec.json.format(report.config.to_json(), indent=2)
    yield element("details", element("summary", "Config"), element("pre", config, tabindex=0))


def _worst(report: ParityReport) -> Element:
    """The largest error of each kind, pair by pair."""
    rows = (
        (
            element("span", f"{a} ~", element("br"), b),
            *(_cell(report, kind, report.worst(kind, (a, b)).error) for kind in report.kinds),
        )
        for a, b in report.pairs
    )
    limits = ("limit", *(f"{report.limits[kind]:.0e}" for kind in report.kinds))
    heads = ("pair", *(f"{kind} " for kind in report.kinds))
    return table(heads, [*rows, limits], label="the largest error of each pair")


def _maps(report: ParityReport) -> Iterator[Element]:
    """Modules in the order in which they complete, the output last; and parameters."""
    by_kind: dict[Kind, dict[str, list[float]]] = {}
    for (kind, path), errors in report.errors().items():
        by_kind.setdefault(kind, {})[path or kind] = errors
    outputs = by_kind.get("activation", {}) | by_kind.get("output", {})
    yield heat_map(
        "Error of outputs, by module", report.pairs, outputs, limit=report.limits["output"]
    )
    if gradients := by_kind.get("gradient"):
        yield heat_map(
            "Error of gradients, by parameter",
            report.pairs,
            gradients,
            limit=report.limits["gradient"],
        )


def _every(report: ParityReport) -> Element:
    rows = (
        (
            path or kind,
            *(_cell(report, kind, error) for error in errors),
            f"{report.limits[kind]:.0e}",
            kind,
        )
        for (kind, path), errors in report.errors().items()
    )
    heads = ("array", *(f"{a} ~ {b} " for a, b in report.pairs), "limit ", "kind")
    return table(heads, rows, label="the error of every array")


def _cell(report: ParityReport, kind: Kind, error: float) -> Element:
    """An error on the colour that the heat maps give it."""
    return element("td", f"{error:.1e}", class_=f"n s{shade(error, report.limits[kind])}")
