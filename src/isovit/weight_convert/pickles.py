"""Pickles, looked at before torch reads them.

Torch's weights-only loader runs no code, but a few bytes can still keep it busy for ever or fill
the memory. What does so is in no checkpoint.
"""

from __future__ import annotations

import pickletools
from typing import IO, Any

import numpy as np

from isovit.errors import InputError

MOST_ITEMS = 1_000_000
"""In a tuple, with all that is in its items, counted as often as it stands there."""

LARGEST_SCALAR = 32
"""Bytes of the largest number that NumPy has."""

MARK = 0
PUTS, GETS = ("BINPUT", "LONG_BINPUT"), ("BINGET", "LONG_BINGET")


def check_pickle(stream: IO[bytes]) -> None:
    """Go through one pickle without making what it describes.

    Raises:
        InputError: for a call of ``bytearray``, which makes a gigabyte of a number; and for a tuple
            that holds a tuple twice, which holds another twice, and so on: as the key of a dict it
            takes for ever.
        ValueError: if it is no whole pickle.
    """
    stack: list[int] = []  # what is on the stack: MARK, the items in a tuple, or 1
    kept: dict[Any, int] = {}
    for code, argument, _ in pickletools.genops(stream):
        if code.name == "GLOBAL" and str(argument).endswith(" bytearray"):
            raise InputError("it wants bytearray, which is no part of a checkpoint")
        items = 0
        for kind in reversed(code.stack_before):
            if kind is pickletools.stackslice:
                while stack and stack[-1] != MARK:
                    items += stack.pop()
            elif stack:
                items += stack.pop()
        size = 1
        if code.name == "MARK":
            size = MARK
        elif code.name.startswith("TUPLE"):
            size += items
        elif code.name in GETS:
            size = kept.get(argument, 1)
        elif code.name in PUTS and stack:
            kept[argument] = stack[-1]
        if size > MOST_ITEMS:
            raise InputError("it holds tuples in tuples without end")
        stack += [size] * len(code.stack_after)


def scalar(dtype: object, data: object = b"") -> Any:
    """NumPy's own function of that name, for numbers alone.

    Raises:
        InputError: for a dtype of many bytes, which would be as large in memory.
    """
    if not isinstance(dtype, np.dtype) or dtype.itemsize > LARGEST_SCALAR:
        raise InputError("it holds a NumPy scalar that is no number")
    return getattr(np, "_core").multiarray.scalar(dtype, data)  # noqa: B009 -- NumPy's own
