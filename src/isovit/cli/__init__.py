"""The command line: one module per verb; this one puts them together and reports errors.

Exit codes: 0 done, 1 the check failed, 2 the input is at fault.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence

import typer

from isovit.cli import bench, choose, convert, export, init, inspect, list, look, parity, run, show
from isovit.errors import InputError

app = typer.Typer(
    name="isovit",
    help="Vision transformers in PyTorch, Flax and Keras: one spec, one function, proven.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for verb in (list, show, init, inspect, convert, run, parity, bench, choose, look, export):
    app.command(verb.__name__.rpartition(".")[2])(verb.command)

# Options that take several values in a row, with what may follow one.
REPEATED: dict[str, Callable[[str], bool]] = {
    "--images": lambda text: True,
    "--set": lambda text: "=" in text,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: without the program's name; None for those of the process.
    """
    words = [*spread(sys.argv[1:] if arguments is None else arguments)]
    try:
        code = app(words, standalone_mode=False)
    except InputError as error:
        code = _complain(str(error))
    except typer.TyperException as error:
        code = _complain(f"{error.format_message()} (isovit --help shows the options)")
    sys.exit(code or 0)


def spread(arguments: Sequence[str]) -> Iterator[str]:
    """``--images A B`` as ``--images A --images B``: the parser takes one value an option."""
    option, taken = "", 0
    for word in arguments:
        if word.startswith("--"):
            option, taken = word, 0
        elif option in REPEATED and (taken == 0 or REPEATED[option](word)):
            taken += 1
            if taken > 1:
                yield option
        else:
            option, taken = "", 0
        yield word


def _complain(message: str) -> int:
    print(f"isovit: {message}", file=sys.stderr)
    return 2
