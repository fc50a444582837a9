"""Lines, bars and heat maps as SVG, drawn 340 units wide: the width of a phone.

A plot has the figure's caption as its name, and the exact value of each mark on hover; the tables
beside it have every value for those who cannot hover.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple
from xml.etree.ElementTree import Element

from isovit.report.page import COLOURS, SHADES, element, number

WIDTH = 340

MARKS = ("m-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0z", "m-3.2-3.2h6.4v6.4h-6.4z",
         "m0-4.5l4.4 7.8h-8.8z", "m0-4.7l4.5 4.7l-4.5 4.7l-4.5-4.7z")  # fmt: skip
"""Disc, square, triangle and diamond, from the middle."""


class Value(NamedTuple):
    """A figure with its interval, which is empty where there is none."""

    value: float
    low: float
    high: float


def exact(value: float) -> Value:
    """A figure without an interval."""
    return Value(value, value, value)


def interval(value: Value) -> str:
    """The interval of a figure in words; nothing where there is none."""
    return f"{number(value.low)} to {number(value.high)}" if value.high > value.low else ""


Curves = Mapping[str, Mapping[int, Value]]
"""A figure by name and batch; the place of a name gives its colour."""


class Axis(NamedTuple):
    """A range of values with the ticks to draw."""

    low: float
    high: float
    ticks: Sequence[float]
    log: bool

    def part(self, value: float) -> float:
        """Where a value lies on the axis, from 0 to 1."""
        if self.low == self.high:
            return 0.5
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return (at - low) / (high - low)


def linear_axis(highest: float) -> Axis:
    """From zero to a round number, in five steps or fewer."""
    step = next(s for s in _round_numbers(highest / 50 or 1.0) if 5 * s >= highest)
    count = max(1, math.ceil(highest / step - 1e-9))
    return Axis(0.0, count * step, [i * step for i in range(count + 1)], log=False)


def log_axis(lowest: float, highest: float) -> Axis:
    """From one round number to another; powers of ten alone are ticks where there are many."""
    upward = list(itertools.takewhile(lambda n: n < highest, _round_numbers(lowest / 10)))
    low = max(n for n in upward if n <= lowest)
    high = next(n for n in _round_numbers(highest / 10) if n >= highest and n > low)
    ticks = [low, *(n for n in upward if n > low), high]
    if len(ticks) > 7:
        ticks = [n for n in ticks if math.log10(n) % 1 < 1e-9]
    return Axis(low, high, ticks, log=True)


def _round_numbers(start: float) -> Iterable[float]:
    """1, 2 and 5 times the powers of ten, from the power of ten at or under the start."""
    first = math.floor(math.log10(start))
    return (float(f"{digit}e{power}") for power in itertools.count(first) for digit in (1, 2, 5))


def short(value: float) -> str:
    """A number for a tick: 0.5, 200, 20k."""
    for least, unit, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if value >= least:
            return f"{value / unit:.4g}{letter}"
    return f"{value:g}"


def by_batch(caption: str, curves: Curves, *, unit: str, log: bool = False) -> Element:
    """Figures against the batch: lines, or bars where there is one batch alone.

    Args:
        caption: what they are.
        curves: by name and batch.
        unit: of the figures.
        log: whether their axis is logarithmic; that of the batch always is.
    """
    batches = sorted({batch for points in curves.values() for batch in points})
    if len(batches) == 1:
        values = {name: points[batches[0]] for name, points in curves.items()}
        return bars(f"{caption} at batch {batches[0]}", values, unit=unit)
    height, top, bottom, right = 220, 8, 30, 12
    values = [value for points in curves.values() for value in points.values()]
    highest = max(value.high for value in values)
    y_axis = log_axis(min(value.low for value in values), highest) if log else linear_axis(highest)
    x_axis = Axis(batches[0], batches[-1], batches, log=True)
    left = 12 + 6.5 * max(len(short(tick)) for tick in y_axis.ticks)

    def x(batch: float) -> float:
        return left + 8 + x_axis.part(batch) * (WIDTH - left - right - 8)

    def y(value: float) -> float:
        return height - bottom - y_axis.part(value) * (height - bottom - top)

    drawn: list[Element] = []
    for tick in y_axis.ticks:
        drawn += [
            _line(left, y(tick), WIDTH, y(tick), stroke="#dde2e6"),
            _text(left - 6, y(tick) + 4, short(tick), text_anchor="end"),
        ]
    drawn += [
        _text(x(tick), height - bottom + 15, short(tick), text_anchor="middle")
        for tick in _apart(x_axis.ticks, x)
    ]
    drawn.append(_text(left, height - 2, "batch"))
    for i, (name, points) in enumerate(curves.items()):
        places = {batch: (x(batch), points[batch]) for batch in sorted(points)}
        path = " ".join(f"{at:.1f},{y(value.value):.1f}" for at, value in places.values())
        marks = (
            part
            for batch, (at, value) in places.items()
            for part in (
                _line(at, y(value.low), at, y(value.high)),
                _mark(i, at, y(value.value), f"{name}, batch {batch}: {_told(value, unit)}"),
            )
        )
        drawn.append(element("g", _curve(i, path), *marks, class_=_colour(i)))
    return _figure(f"{caption}, {unit}", height, drawn)


def bars(caption: str, values: Mapping[str, Value], *, unit: str) -> Element:
    """A bar for each name, with its figure and interval.

    Args:
        caption: what they are.
        values: by name.
        unit: of the figures.
    """
    row, room = 34, WIDTH - 62
    highest = max(value.high for value in values.values()) or 1.0
    drawn: list[Element] = []
    for i, (name, value) in enumerate(values.items()):
        top, long = row * i, room * value.value / highest
        low, high = room * value.low / highest, room * value.high / highest
        title = element("title", f"{name}: {_told(value, unit)}")
        bar = element("rect", title, y=top + 16, width=f"{long:.1f}", height=11)
        whisker = [_line(low, top + 21.5, high, top + 21.5, stroke="#1a1f24")] if high > low else []
        drawn += [
            _text(0, top + 11, _shortened(name, 54)),
            element("g", bar, *whisker, class_=_colour(0), fill="currentColor"),
            _text(high + 5, top + 26, number(value.value)),
        ]
    return _figure(f"{caption}, {unit}", row * len(values), drawn)


def key(names: Iterable[str]) -> Element:
    """Which colour and mark is whose, for the plots of ``by_batch``."""
    items = (
        element(
            "li",
            element(
                "svg",
                element("g", _curve(i, "0,6 28,6"), _mark(i, 14, 6), class_=_colour(i)),
                viewBox="0 0 28 12",
                aria_hidden="true",
            ),
            name,
        )
        for i, name in enumerate(names)
    )
    return element("ul", *items, class_="key")


def shade(error: float, limit: float) -> int:
    """The number of an error's colour: 0 at a ten-thousandth of the limit, 8 at it, 9 beyond."""
    if error > limit:
        return 9 if error <= 10 * limit else 10 if error <= 1000 * limit else 11
    return max(0, math.ceil(2 * (4 + math.log10(max(error, 1e-300) / limit))))


def heat_map(
    caption: str,
    columns: Sequence[tuple[str, str]],
    rows: Mapping[str, Sequence[float]],
    *,
    limit: float,
) -> Element:
    """Errors by row and pair, on a logarithmic scale of colours that has the limit in it.

    Args:
        caption: what they are.
        columns: the pairs; dots tell which names each is of, as no long label could.
        rows: an error for each pair, by the name of the row.
        limit: the largest error allowed. Names of rows with more are red, too.
    """
    names = list(dict.fromkeys(name for pair in columns for name in pair))
    step = min(35.0, 140 / len(columns))
    left, letters = WIDTH - step * len(columns), int((WIDTH - step * len(columns) - 6) / 6.1)
    top, start = 52, 52 + 13 * len(names)
    drawn = [_scale(limit)]
    for i, name in enumerate(names):
        drawn.append(_text(0, top + 13 * i + 4, _shortened(name, letters), class_="path"))
    for i, pair in enumerate(columns):
        at, ends = left + step * (i + 0.5), [top + 13 * names.index(name) for name in pair]
        dots = (
            element("circle", cx=f"{at:.1f}", cy=top + 13 * j, r=3 if name in pair else 1)
            for j, name in enumerate(names)
        )
        line = _line(at, ends[0], at, ends[1])
        title = element("title", " ~ ".join(pair))
        drawn.append(element("g", title, line, *dots, fill="currentColor"))
    for i, (name, errors) in enumerate(rows.items()):
        over = any(error > limit for error in errors)
        label = _text(0, 9, _shortened(name, letters), class_="path over" if over else "path")
        label.append(element("title", name))
        cells = (
            element(
                "rect",
                element("title", f"{name}, {' ~ '.join(pair)}: {error:.1e}"),
                x=f"{left + step * j:.1f}",
                width=f"{step - 1:.1f}",
                height=11,
                class_=f"s{shade(error, limit)}",
            )
            for j, (pair, error) in enumerate(zip(columns, errors, strict=True))
        )
        drawn.append(element("g", label, *cells, transform=f"translate(0 {start + 12 * i})"))
    return _figure(caption, start + 12 * len(rows), drawn)


def _scale(limit: float) -> Element:
    """The colours of a heat map, with the errors at which they change."""
    step = WIDTH / len(SHADES)
    swatches = (
        element("rect", x=f"{step * i:.1f}", y=14, width=f"{step:.1f}", height=10, class_=f"s{i}")
        for i in range(len(SHADES))
    )
    labels = (
        _text(step * place, 35, f"{limit * 10.0**power:.0e}", text_anchor="middle")
        for place, power in ((1, -4), (5, -2), (11, 3))
    )
    end = step * 9
    mark = _line(end, 13, end, 26, stroke="#1a1f24", stroke_width=2)
    name = _text(end, 10, f"limit {limit:.0e}", text_anchor="middle")
    return element("g", *swatches, *labels, mark, name)


def _figure(caption: str, height: float, drawn: Iterable[Element]) -> Element:
    svg = element("svg", *drawn, viewBox=f"0 0 {WIDTH} {height:g}", role="img", aria_label=caption)
    return element("figure", element("figcaption", caption), svg)


def _colour(i: int) -> str:
    return f"c{i % len(COLOURS)}"


def _curve(i: int, points: str) -> Element:
    """A line; those that have no colour of their own any more are dashed."""
    dashes = {"stroke_dasharray": "5 3"} if i >= len(COLOURS) else {}
    return element(
        "polyline", points=points, fill="none", stroke="currentColor", stroke_width=2, **dashes
    )


def _mark(i: int, x: float, y: float, title: str = "") -> Element:
    content = [element("title", title)] if title else []
    shape = MARKS[i % len(MARKS)]
    return element("path", *content, d=f"M{x:.1f} {y:.1f}{shape}", fill="currentColor")


def _line(x1: float, y1: float, x2: float, y2: float, **attributes: object) -> Element:
    ends = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
    places = {name: f"{value:.1f}" for name, value in ends.items()}
    return element("line", **places, **{"stroke": "currentColor"} | attributes)


def _text(x: float, y: float, text: str, **attributes: object) -> Element:
    return element("text", text, x=f"{x:.1f}", y=f"{y:.1f}", **attributes)


def _told(value: Value, unit: str) -> str:
    return ", ".join(filter(None, (f"{number(value.value)} {unit}", interval(value))))


def _apart(ticks: Sequence[float], x: Callable[[float], float]) -> list[float]:
    """Ticks whose labels do not touch; the last one is among them."""
    kept: list[float] = []
    for tick in reversed(ticks):
        if not kept or x(kept[-1]) - x(tick) >= 7 * len(short(tick)) + 8:
            kept.append(tick)
    return kept


def _shortened(name: str, letters: int) -> str:
    """A name without its beginning, where that is too long."""
    return name if len(name) <= letters else f"…{name[1 - letters :]}"
