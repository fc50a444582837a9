"""What is wrong with a page, as far as its text tells: no browser is needed."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "br", "link", "img", "input", "hr"}
KNOWN = {
    *("html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "p", "br", "div"),
    *("table", "thead", "tbody", "tr", "th", "td", "dl", "dt", "dd", "ul", "li", "span", "code"),
    *("pre", "details", "summary", "figure", "figcaption", "svg", "g", "text", "line", "rect"),
    *("circle", "path", "polyline"),
}


class Markup(HTMLParser):
    """Collects problems, and the words of the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.problems: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        self.problems += [f"not closed: {tag}" for tag in self.open]
        if re.search(r"url\(|@import", text):
            self.problems.append("a style loads something")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        self.problems += [f"{tag} has {name} twice" for name in set(names) if names.count(name) > 1]
        self.problems += [f"{tag} loads or runs: {name}" for name in names
                          if name in ("src", "href", "xlink:href", "action", "data", "srcset")
                          or name.startswith("on")]  # fmt: skip
        if tag not in KNOWN:
            self.problems.append(f"no element of reports: {tag}")
        if tag == "th" and "scope" not in names:
            self.problems.append("th without scope")
        if tag == "svg" and not {"aria-label", "aria-hidden"} & set(names):
            self.problems.append("svg without a name")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"closed out of turn: {tag}")

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words += data.split()
