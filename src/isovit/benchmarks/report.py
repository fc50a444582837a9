"""A run as one self-contained page: a plot of throughput for each model, and every figure."""

from __future__ import annotations

import html
import math
from pathlib import Path

from isovit.benchmarks.records import Record, Run
from isovit.weight_convert.files import replacing

COLOURS = ("#1f5fa8", "#c4541c", "#26804a", "#7d3c98", "#a8871f", "#8c2a3c", "#3c8c8c", "#555555")
WIDTH, HEIGHT, LEFT, BOTTOM = 560, 280, 56, 36

STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 1rem auto; max-width: 70rem; padding: 0 1rem }
.table { overflow-x: auto } table { border-collapse: collapse }
th, td { padding: .15rem .5rem; font-weight: 400; text-align: right; white-space: nowrap }
td:nth-child(-n+4), th:nth-child(-n+4) { text-align: left }
thead th { font-weight: 600 } tbody tr:nth-child(odd) { background: #f4f6f8 }
svg { width: 100%; max-width: 40rem; height: auto } svg text { font-size: 12px }
.key span { display: inline-block; margin-right: 1rem; white-space: nowrap }
.key i { display: inline-block; width: .8rem; height: .8rem; margin-right: .3rem }
"""


def write_html(run: Run, path: Path) -> None:
    """Write the page, all or nothing."""
    with replacing(path) as temporary:
        temporary.write_text(page(run), encoding="utf-8")


def page(run: Run) -> str:
    """The page as text."""
    device = html.escape(f"{run.device['processor']}, {run.device['cores']} cores")
    accelerators = html.escape(", ".join(run.device["accelerators"]) or "none")
    rates = html.escape(", ".join(f"{p.library} {p.gflops:.0f}" for p in run.products))
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in run.records:
        case = record.case
        groups.setdefault((case.model, case.mode, case.dtype), []).append(record)
    plots = "".join(
        f"<h2>{html.escape(model)}, {mode}, {dtype}</h2>{plot(records)}"
        for (model, mode, dtype), records in groups.items()
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Speed on {device}</title>
<style>{STYLE}</style>
<h1>Speed on {device}</h1>
<p>Accelerators: {accelerators}. Products of 2048³ in float32, GFLOP/s: {rates}.
Measured {html.escape(run.started)} by <code>{html.escape(run.command)}</code>.</p>
{plots}
<h2>Every figure</h2>
<div class="table"><table><thead><tr>{_heads()}</tr></thead>
<tbody>{"".join(_row(run, record) for record in run.records)}</tbody></table></div>
<p>ms: median of a step, with half its 95% confidence interval. MB: most memory in use, of the
device, or else of the process beyond its imports. Utilisation: operations of the forward pass over
the best product rate.</p>
</html>
"""


def plot(records: list[Record]) -> str:
    """Images per second against the batch, a line for each way, both axes logarithmic."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        if record.result is not None:
            case = record.case
            point = (case.batch, record.result.images_per_s(case.batch))
            lines.setdefault(f"{case.backend} {case.way}", []).append(point)
    if not lines:
        return "<p>Nothing could be measured.</p>"
    batches = sorted({batch for points in lines.values() for batch, _ in points})
    rates = [rate for points in lines.values() for _, rate in points]
    low, high = math.floor(math.log2(min(rates))), math.ceil(math.log2(max(rates)) + 1e-9)

    def x(batch: int) -> float:
        span = math.log2(batches[-1] / batches[0]) or 1.0
        part = math.log2(batch / batches[0]) / span if len(batches) > 1 else 0.5
        return LEFT + 12 + part * (WIDTH - LEFT - 36)

    def y(rate: float) -> float:
        return (
            HEIGHT - BOTTOM - (math.log2(rate) - low) / max(1, high - low) * (HEIGHT - BOTTOM - 16)
        )

    grid = "".join(
        f'<line x1="{LEFT}" x2="{WIDTH - 12}" y1="{y(2.0**n):.1f}" y2="{y(2.0**n):.1f}" '
        f'stroke="#ddd"/><text x="{LEFT - 6}" y="{y(2.0**n) + 4:.1f}" text-anchor="end">'
        f"{2.0**n:g}</text>"
        for n in range(low, high + 1)
    )
    ticks = "".join(
        f'<text x="{x(batch):.1f}" y="{HEIGHT - 14}" text-anchor="middle">{batch}</text>'
        for batch in batches
    )
    curves, key = "", ""
    for i, (name, points) in enumerate(lines.items()):
        colour = COLOURS[i % len(COLOURS)]
        places = [(x(batch), y(rate)) for batch, rate in sorted(points)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        dots = "".join(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5"/>' for a, b in places)
        line = f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
        curves += f'{line}<g fill="{colour}">{dots}</g>'
        key += f'<span><i style="background:{colour}"></i>{html.escape(name)}</span>'
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="images per second by batch">'
        f'{grid}{ticks}<text x="{LEFT}" y="11">images/s</text>'
        f'<text x="{WIDTH - 12}" y="{HEIGHT - 1}" text-anchor="end">batch</text>{curves}</svg>'
        f'<p class="key">{key}</p>'
    )


def _heads() -> str:
    names = ("model", "backend", "mode", "dtype", "batch", "ms", "±", "images/s", "MB",
             "first call s", "transfer ms", "utilisation")  # fmt: skip
    return "".join(f"<th>{name}</th>" for name in names)


def _row(run: Run, record: Record) -> str:
    case, result = record.case, record.result
    cells = [case.model, f"{case.backend} {case.way}", case.mode, case.dtype, str(case.batch)]
    if result is None:
        return (
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
            + f'<td colspan="7">{html.escape(record.error or "")}</td></tr>'
        )  # fmt: skip
    share = run.utilisation(record)
    cells += [
        f"{result.step.median_ms:.2f}",
        f"{100 * result.step.spread:.1f}%",
        f"{result.images_per_s(case.batch):.1f}",
        f"{(result.device_bytes or result.host_bytes) / 1e6:.0f}",
        f"{result.first_call_s:.2f}",
        f"{result.transfer_ms:.2f}",
        "" if share is None else f"{share:.2f}",
    ]
    return "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
