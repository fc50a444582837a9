"""What the verbs share: tables, JSON and progress."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import msgspec
import typer

SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Change a config field; nested by dots."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON instead of text.")]
MemoryOption = Annotated[
    str | None, typer.Option(help="kept or returned; by default kept, where the system can.")
]


def print_json(data: object) -> None:
    """Print data as indented JSON."""
    print(msgspec.json.format(msgspec.json.encode(data), indent=2).decode())


def print_table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; columns of numbers (heads that end in a space) are aligned to the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in heads:
        table.add_column(head.strip(), justify="right" if head.endswith(" ") else "left")
    for row in rows:
        table.add_row(*map(str, row))
    width = None if sys.stdout.isatty() else 200
    Console(width=width, highlight=False, markup=False).print(table)


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[str], Any]]:
    """A bar on a terminal, a plain line for each step elsewhere; both on standard error."""
    if not sys.stderr.isatty():
        done = 0

        def line(step: str) -> None:
            nonlocal done
            done += 1
            print(f"{title}: {step} ({done}/{total})", file=sys.stderr)

        yield line
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda step: bar.update(task, advance=1, description=f"{title}: {step}")


def track(title: str, every_s: float = 5.0) -> Callable[[Iterable[str]], Iterator[str]]:
    """Pass names through: a bar on a terminal, elsewhere a plain line every few seconds."""

    def follow(names: Iterable[str]) -> Iterator[str]:
        steps = list(names)
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import track as rich_track

            yield from rich_track(steps, title, console=Console(stderr=True), transient=True)
            return
        said = time.monotonic()
        for done, name in enumerate(steps):
            yield name
            if time.monotonic() - said > every_s:
                said = time.monotonic()
                print(f"{title}: {done + 1}/{len(steps)} tensors", file=sys.stderr)

    return follow


def note(line: str) -> None:
    """A remark that is no result: on standard error."""
    print(f"isovit: note: {line}", file=sys.stderr)
