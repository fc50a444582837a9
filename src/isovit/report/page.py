"""A page in one file: no script, nothing loaded, readable at any width; and tables for it.

Pages are trees of elements, so that text is escaped and elements are closed where the tree is
written, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element, tostring

from isovit.weight_convert.files import replacing

COLOURS = ("#0072b2", "#d55e00", "#00855f", "#b8478f", "#8a6d00", "#4aa3df", "#7a2230", "#555555")
"""Of curves; after Okabe and Ito, who see to it that colour-blind readers tell them apart."""

SHADES = ("#f0f2f4", "#e4eefa", "#d5e4f7", "#c4d9f3", "#b3ceef", "#a1c2eb", "#8eb6e7", "#7ba9e2",
          "#689cdd", "#f5a623", "#d9482b", "#8c1010")  # fmt: skip
"""Of errors: eight steps up to the limit, three beyond it; ``plots.shade`` gives the number."""

STYLE = """
:root { color-scheme: light }
body { background: #fff; color: #1a1f24; font: 15px/1.45 system-ui, sans-serif }
body { margin: 1rem auto; max-width: 70rem; overflow-wrap: anywhere; padding: 0 1rem }
h1 { font-size: 1.4rem; line-height: 1.25 } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
code, pre { font: .87em/1.45 ui-monospace, monospace }
pre { background: #f4f6f8; overflow-x: auto; overflow-wrap: normal; padding: .6rem .8rem }
pre code { font: inherit } summary { cursor: pointer }
.verdict { border-left: .3rem solid; font-size: 1.1rem; font-weight: 600; padding-left: .7rem }
.verdict p { margin: .2rem 0 }
.good { color: #176b2c } .bad { color: #a51414 }
.box { margin: 1rem 0; overflow-wrap: normal; overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { font-weight: 400; padding: .15rem .5rem; text-align: left; white-space: nowrap }
thead th { border-bottom: 1px solid #b8c0c8; font-weight: 600; vertical-align: bottom }
thead th { white-space: normal }
tbody tr:nth-child(even) { background: #f4f6f8 }
.n { text-align: right }
dl { display: grid; gap: .1rem 1rem; grid-template-columns: minmax(5rem, max-content) 1fr }
dt { color: #56616b } dd { margin: 0 }
.plots { display: grid; gap: 1rem 1.5rem }
.plots { grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)) }
.maps { grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)) }
figure { margin: 0; max-width: 32rem } figcaption { font-weight: 600; margin-bottom: .3rem }
svg { display: block; height: auto; width: 100% }
svg text { fill: #1a1f24; font: 11px system-ui, sans-serif }
svg .path { font: 10px ui-monospace, monospace } svg .over { fill: #a51414; font-weight: 700 }
.key { display: flex; flex-wrap: wrap; gap: .1rem 1rem; list-style: none; padding: 0 }
.key svg { display: inline-block; margin-right: .35rem; vertical-align: middle; width: 28px }
"""

Content = str | Element


def element(tag: str, *content: Content, **attributes: object) -> Element:
    """An element of a page.

    Args:
        tag: its name.
        content: text and elements, in their order.
        attributes: by name; ``class_`` is ``class``, and ``text_anchor`` is ``text-anchor``.
    """
    names = {name: name.rstrip("_").replace("_", "-") for name in attributes}
    made = Element(tag, {names[name]: str(value) for name, value in attributes.items()})
    last: Element | None = None
    for part in content:
        if isinstance(part, Element):
            made.append(part)
            last = part
        elif last is None:
            made.text = (made.text or "") + part
        else:
            last.tail = (last.tail or "") + part
    return made


def write_page(path: Path, title: str, content: Iterable[Element]) -> None:
    """Write a page, all or nothing."""
    with replacing(path) as temporary:
        # A name of a file that is no Unicode cannot be written; a question mark stands for it.
        temporary.write_text(page(title, content), encoding="utf-8", errors="replace")


def page(title: str, content: Iterable[Element]) -> str:
    """A page as text."""
    colours = "".join(f".c{i} {{ color: {colour} }}\n" for i, colour in enumerate(COLOURS))
    shades = "".join(
        f".s{i} {{ background: {shade}; fill: {shade}{'; color: #fff' if i > 9 else ''} }}\n"
        for i, shade in enumerate(SHADES)
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", STYLE + colours + shades),
    )
    main = element("main", element("h1", title), *content)
    for block in main.iter():
        if block.tag in ("tr", "g", "figure", "h2", "p", "li", "dd"):
            block.tail = (block.tail or "") + "\n"
    document = element("html", head, element("body", main), lang="en")
    return f"<!doctype html>\n{tostring(document, encoding='unicode', method='html')}\n"


def table(heads: Sequence[str], rows: Iterable[Sequence[Content]], *, label: str) -> Element:
    """A table in a box of its own, which scrolls where it is wider than the page.

    Args:
        heads: of the columns; those that end in a space are of numbers.
        rows: texts, or cells that are made already; the first one names the row. A column of empty
            texts is left out.
        label: what the table has, for those who do not see it.
    """
    lines = [list(row) for row in rows]
    columns = [i for i in range(len(heads)) if not lines or any(line[i] != "" for line in lines)]

    def cell(tag: str, content: Content, i: int, **attributes: str) -> Element:
        if isinstance(content, Element) and content.tag == "td":
            return content
        return element(
            tag, content, **attributes, **({"class": "n"} if heads[i][-1:] == " " else {})
        )

    head = element("tr", *(cell("th", heads[i].strip(), i, scope="col") for i in columns))
    body = (
        element(
            "tr",
            cell("th", line[0], 0, scope="row"),
            *(cell("td", line[i], i) for i in columns[1:]),
        )
        for line in lines
    )
    content = element("table", element("thead", head), element("tbody", *body))
    return element("div", content, class_="box", role="region", aria_label=label, tabindex=0)


def facts(pairs: Mapping[str, Content]) -> Element:
    """Names with their values."""
    parts = (
        part
        for name, value in pairs.items()
        for part in (element("dt", name), element("dd", value))
    )
    return element("dl", *parts)


def number(value: float) -> str:
    """A figure in four digits, or in all that are before its point."""
    return f"{value:.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
