"""Arrays by name that are read one at a time, when they are asked for.

A checkpoint passes through conversion as a chain of such views: of the file, of its canonical
weights, of the target's names. Names, shapes and dtypes are known throughout, so that everything
is checked before the first number is read; in memory is only the array that is on its way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from isovit.errors import InputError

MOST_ARRAYS = 20_000
"""No model here has more: a file that does is there to keep the reader busy."""

LONGEST_AXIS = 1 << 24
"""No axis of a model is longer, where an array of no numbers may claim anything."""

BLOCK = 256
"""Side of the squares in which a matrix is transposed; two of them fit a cache."""


class Spec(NamedTuple):
    """What is known of an array before it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Number of numbers."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.size * self.dtype.itemsize


class Tensors(Mapping[str, np.ndarray]):
    """Arrays by name; each is read when it is asked for, and not kept.

    Attributes:
        specs: shape and dtype of every array, in order.
    """

    def __init__(self, specs: Mapping[str, Spec], fetch: Callable[[str], np.ndarray]) -> None:
        self.specs = dict(specs)
        self._fetch = fetch

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> Tensors:
        """The view of arrays that may be in memory already."""
        if isinstance(arrays, Tensors):
            return arrays
        specs = {name: Spec(tuple(a.shape), a.dtype) for name, a in arrays.items()}
        return cls(specs, arrays.__getitem__)

    def renamed(self, names: Mapping[str, str]) -> Tensors:
        """Some of the arrays under other names: new name to old name."""
        specs = {new: self.specs[old] for new, old in names.items()}
        return Tensors(specs, lambda name: self[names[name]])

    def check(self) -> None:
        """Check that these can be the arrays of a model, before anything counts along them.

        Raises:
            InputError: naming what is too many or too long.
        """
        check_number(len(self))
        for name, spec in self.specs.items():
            if max(spec.shape, default=0) > LONGEST_AXIS:
                raise InputError(f"{name} has the shape {spec.shape}, which no model here has")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every array."""
        return {name: spec.shape for name, spec in self.specs.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.specs:
            raise KeyError(name)
        return self._fetch(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __contains__(self, name: object) -> bool:
        return name in self.specs


def check_number(arrays: int) -> None:
    """Check that a file holds no more arrays than a model can have.

    Raises:
        InputError: if it does.
    """
    if arrays > MOST_ARRAYS:
        raise InputError(f"it holds {arrays:,} arrays, which no model here does")


def renaming(names: Iterable[str], rule: Callable[[str], str]) -> dict[str, str]:
    """New name to old name.

    Raises:
        InputError: if two become one.
    """
    old: dict[str, str] = {}
    for name in names:
        new = rule(name)
        if new in old:
            raise InputError(f"both {old[new]} and {name} stand for {new}")
        old[new] = name
    return old


def chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    """The bytes of an array in C order, without a copy of the whole.

    Of a transposed matrix, NumPy's own copy fetches a cache line of the source for every number.
    Square by square, each copied as it lies and then turned, takes a quarter of the time.
    """
    if array.flags.c_contiguous or array.ndim != 2:
        yield np.asarray(array, order="C").reshape(-1).view(np.uint8)
        return
    for i in range(0, len(array), BLOCK):
        rows = np.empty(array[i : i + BLOCK].shape, array.dtype)
        for j in range(0, array.shape[1], BLOCK):
            rows[:, j : j + BLOCK] = array[i : i + BLOCK, j : j + BLOCK].copy(order="K")
        yield rows.reshape(-1).view(np.uint8)
