"""The one exception for everything that is the caller's to mend."""

from __future__ import annotations

LONGEST = 1500
"""Characters of a message: file names and eight problems fit."""


class InputError(ValueError):
    """The input is at fault: the message says what was wanted, what came, and what to do.

    The command line prints the message and exits with code 2; the Python API raises it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """A text as a terminal can show it, whatever a file put into it."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} … {text[-LONGEST // 4 :]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def reason(error: Exception) -> str:
    """The first line of an error that says something, or else the error's type."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if " " in line), type(error).__name__)


class FitError(InputError):
    """Weights that do not fit a config; every problem at once.

    Attributes:
        problems: what is missing, unexpected or misshaped, a line each.
    """

    SHOWN = 8

    def __init__(self, problems: list[str]) -> None:
        self.problems = tuple(map(one_line, problems))
        rest = len(problems) - self.SHOWN
        more = f"; and {rest} more" if rest > 0 else ""
        super().__init__(
            f"the weights do not fit the config: {'; '.join(self.problems[: self.SHOWN])}{more}"
        )
