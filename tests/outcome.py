"""What a command of the command line did."""

from __future__ import annotations

from typing import NamedTuple


class Outcome(NamedTuple):
    """Exit code, standard output and standard error."""

    code: int
    out: str
    err: str
