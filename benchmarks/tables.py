"""Redraw the tables of the docs from the records: ``python benchmarks/tables.py [ERRORS.jsonl]``.

Speed beside the public code is measured by ``benchmarks/peers.py``, a file for each device; what
operators take by ``benchmarks/operators.py``; what it takes to give memory back by
``benchmarks/peers.py --memory returned,kept``; growth by ``isovit bench``, a run for each size of
image.

Errors of formats are measured by the parity suite, which adds a line for each comparison to the
file that ISOVIT_FORMAT_ERRORS names; given here, they become the record first.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree.ElementTree import Element, tostring

from isovit.benchmarks.driver import WAYS
from isovit.report.page import COLOURS, element
from isovit.report.plots import Value, by_batch, exact

ROOT = Path(__file__).parents[1]
ERRORS = ROOT / "benchmarks" / "results" / "format-errors.json"
PAGE = ROOT / "docs" / "formats.md"
PEERS = "peers-*.json"
SPEED = ROOT / "docs" / "speed.md"
TITLES = {"infer": "Inference", "train": "A step of training"}
OPERATORS = "operators-*.json"
MEMORY = "memory-*.json"
GROWTH = "growth-*.json"
GROWN = ROOT / "docs" / "growth.svg"
LEAST = 0.03
"""Operators of smaller shares are in the record alone."""
PANEL, CAPTION = (340, 220), 44
"""Width and height of one plot, and the height of what stands above it."""
MARKS = "●■▲"
"""Of the curves of ``by_batch``, in their order."""
KEPT = ", memory kept"
LANES = (
    "public eager",
    "public onnxruntime",
    *(f"{backend} {way}" for backend, ways in WAYS.items() for way in ways),
)
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


def speed_page(text: str) -> str:
    """The page of speed with its tables as the records have them."""
    text = replaced(text, "speed", speed_tables())
    text = replaced(text, "memory", memory_tables())
    return replaced(text, "operators", operator_tables())


def speed_tables() -> str:
    """Each device that was measured, as Markdown."""
    return "\n\n".join(
        map(speed_table, sorted(ERRORS.parent.glob(PEERS), key=lambda path: path.stem))
    )


def speed_table(path: Path) -> str:
    """A run on a device: a table for each mode, of times, factors and utilisation."""
    run = json.loads(path.read_text(encoding="utf-8"))
    device, products = run["device"], run["products"]
    rates = ", ".join(f"{product['library']} {product['gflops']:.0f}" for product in products)
    modes = {record["case"]["mode"] for record in run["records"]}
    said = " and ".join(TITLES[mode].lower() for mode in TITLES if mode in modes)
    lines = [
        f"### {device['processor']}, {device['cores']} cores, {device['clock_mhz']} MHz: {said}",
        "",
        f"Products of 2048³ in float32, GFLOP/s: {rates}. Measured {run['started'][:10]}.",
    ]
    for mode, title in TITLES.items():
        records = [r for r in run["records"] if r["case"]["mode"] == mode and r["result"]]
        if not records:
            continue
        models = list(dict.fromkeys(r["case"]["model"] for r in records))
        lines += ["", f"{title}, batch {records[0]['case']['batch']}:", ""]
        lines += [f"| | {' | '.join(models)} |", f"|---|{'---|' * len(models)}"]
        times = {(_lane(r["case"]), r["case"]["model"]): r for r in records}
        for lane in (f"{name}{kept}" for name in LANES for kept in ("", KEPT)):
            cells = [_cell(times.get((lane, model))) for model in models]
            if any(cells):
                lines.append(f"| {lane} | {' | '.join(cell or '–' for cell in cells)} |")
        if told := _certainty([r["beside"] for r in records], mode):
            lines += ["", told]
    return "\n".join(lines)


def _certainty(besides: list[dict], mode: str) -> str:
    """How wide the 95% intervals of a table are; nothing where a record has none."""
    parts: list[str] = []
    kinds = (
        {"faster": "factors"}
        if mode == "train"
        else {"faster": "factors", "utilisation": "utilisation"}
    )
    for key, name in kinds.items():
        intervals = [(row[key], found) for row in besides if (found := row.get(f"{key}_interval"))]
        halves = [(high - low) / (2 * median) for median, (low, high) in intervals if high > low]
        if halves:
            parts.append(f"of {name} {statistics.median(halves):.0%}, at most {max(halves):.0%}")
    return f"Half of the 95% interval: {'; '.join(parts)}." if parts else ""


def _lane(case: dict) -> str:
    """The name of a lane."""
    return f"{case['backend']} {case['way']}{KEPT if case['memory'] == 'kept' else ''}"


def _cell(record: dict | None) -> str:
    """Milliseconds, how many times as fast as the public code, and utilisation of inference."""
    if record is None:
        return ""
    result, beside = record["result"], record["beside"]
    text = f"{result['step']['median_ms']:.0f} ms, {beside['faster']:.2f}×"
    if record["case"]["mode"] == "train":
        return f"{text}, {result['host_bytes'] / 1e6:.0f} MB"
    return f"{text}, {beside['utilisation']:.2f}"


def memory_tables() -> str:
    """Steps with memory returned and kept on each device that was measured, as Markdown."""
    tables: list[str] = []
    for path in sorted(ERRORS.parent.glob(MEMORY)):
        run = json.loads(path.read_text(encoding="utf-8"))
        device, batch = run["device"], run["records"][0]["case"]["batch"]
        lines = [
            f"{device['processor']}, {device['cores']} cores; batch {batch}:",
            "",
            "| model | lane | faults, returned | ms | faults, kept | ms | times as fast |",
            "|---|---|---|---|---|---|---|",
        ]
        found: dict[tuple[str, str], dict[str, dict]] = {}
        for record in run["records"]:
            case = record["case"]
            key = (case["model"], f"{case['backend']} {case['way']}")
            found.setdefault(key, {})[case["memory"]] = record
        for (model, lane), both in found.items():
            if both.keys() < {"returned", "kept"}:  # onnxruntime keeps its own
                continue
            cells = [model, lane]
            for record in (both["returned"], both["kept"]):
                result = record["result"]
                cells += [f"{result['page_faults']:,}", f"{result['step']['median_ms']:.0f}"]
            factor = both["kept"]["beside"]["faster"] / both["returned"]["beside"]["faster"]
            lines.append(f"| {' | '.join(cells)} | {factor:.2f} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def operator_tables() -> str:
    """Where a step goes on each device that was measured, as Markdown."""
    tables: list[str] = []
    for path in sorted(ERRORS.parent.glob(OPERATORS)):
        run = json.loads(path.read_text(encoding="utf-8"))
        device, profiles = run["device"], run["profiles"]
        lines = [
            f"{device['processor']}, {device['cores']} cores; batch {profiles[0]['batch']}:",
            "",
            "| model | backend | ms | shares of operators |",
            "|---|---|---|---|",
        ]
        for profile in profiles:
            shares = profile["operators"].items()
            told = ", ".join(f"`{name}` {share:.0%}" for name, share in shares if share >= LEAST)
            cells = (profile["model"], profile["backend"], f"{profile['step_ms']:.0f}", told)
            lines.append(f"| {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


Sizes = dict[str, dict[int, Value]]
"""A figure by size of the images and by batch."""


def growth() -> dict[tuple[str, str], tuple[Sizes, Sizes]]:
    """Seconds and megabytes of a step, by model and lane."""
    grown: dict[tuple[str, str], tuple[Sizes, Sizes]] = {}
    for path in sorted(ERRORS.parent.glob(GROWTH)):
        for record in json.loads(path.read_text(encoding="utf-8"))["records"]:
            case, result = record["case"], record["result"]
            if result is None:
                continue
            size = case["changes"].get("image_size", "224")
            lane = (case["model"], f"{case['backend']} {case['way']}")
            seconds, megabytes = grown.setdefault(lane, ({}, {}))
            step = result["step"]
            times = (step[key] / 1e3 for key in ("median_ms", "low_ms", "high_ms"))
            seconds.setdefault(str(size), {})[case["batch"]] = Value(*times)
            megabytes.setdefault(str(size), {})[case["batch"]] = exact(result["host_bytes"] / 1e6)
    return grown


def growth_figure() -> str:
    """Growth as SVG: a row for each model and figure, a column for each lane."""
    grown = growth()
    models, lanes = (list(dict.fromkeys(names)) for names in zip(*grown, strict=True))
    across, down = PANEL[0] + 20, PANEL[1] + CAPTION
    panels = [
        _panel(across * column, down * (2 * row + i), f"{model}, {lane}: {caption}", sizes, unit)
        for row, model in enumerate(models)
        for column, lane in enumerate(lanes)
        for i, (caption, unit) in enumerate((("time of a step", "s"), ("peak memory", "MB")))
        for sizes in [grown[model, lane][i]]
    ]
    width, height = across * len(lanes), 2 * down * len(models)
    style = "text { fill: #1a1f24; font: 11px system-ui, sans-serif }\n" + "".join(
        f".c{i} {{ color: {colour} }} .c{i} text {{ fill: {colour} }}\n"
        for i, colour in enumerate(COLOURS)
    )
    drawn = element(
        "svg",
        element("style", style),
        element("rect", width=width, height=height, fill="#fff"),
        *itertools.chain.from_iterable(panels),
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"-10 -10 {width + 10} {height + 10}",
    )
    return tostring(drawn, encoding="unicode") + "\n"


def _panel(left: int, top: int, caption: str, sizes: Sizes, unit: str) -> Iterator[Element]:
    """One plot, and above it what it shows and whose each mark is."""
    yield element("text", f"{caption}, {unit}", x=left, y=top + 14, font_weight="bold")
    for i, (mark, size) in enumerate(zip(MARKS, sorted(sizes, key=int), strict=False)):
        label = element("text", f"{mark} {size} pixels", x=left + 90 * i, y=top + 30)
        yield element("g", label, class_=f"c{i}")
    curves = {size: sizes[size] for size in sorted(sizes, key=int)}
    plot = by_batch(caption, curves, unit=unit, log=True).find("svg")
    assert plot is not None
    place = {"x": left, "y": top + CAPTION - 6, "width": PANEL[0], "height": PANEL[1]}
    plot.attrib.update({name: str(value) for name, value in place.items()})
    yield plot


def main() -> None:
    """Make the record if lines are given, and redraw the page."""
    for path in sys.argv[1:]:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        ERRORS.write_text(json.dumps(collect(lines), indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(drawn(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    SPEED.write_text(speed_page(SPEED.read_text(encoding="utf-8")), encoding="utf-8")
    GROWN.write_text(growth_figure(), encoding="utf-8")


if __name__ == "__main__":
    main()
