"""Rename tables: how a foreign checkpoint names the modules of the param tree; strict, invertible.

A row maps a *module* to a *module*; the names of the leaves and their transposes follow from roles
and from the format's layout. Rows hold for both directions. A table is applied from the side of
the param tree: each parameter asks for its source, so that every target is made exactly once, and
what is then left over in the source must be a key that the table drops, with a reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from isovit.errors import FitError, InputError
from isovit.spec.layout import CANONICAL, Layout, native_path, permutation
from isovit.spec.param import Param, Role

INDEX = re.compile(r"\{(?:(\d*)([a-z]))?(?:\+?(\d+))?\}")


@dataclass(frozen=True)
class Row:
    """A correspondence between a foreign and a canonical path.

    Attributes:
        foreign: path, with ``{i}`` for an index, or ``{4j+3}`` for one computed from it; several
            paths where the foreign model splits what is one parameter here.
        canonical: path of a module, or of a parameter of its own, with ``{i}``.
        squeeze: whether the foreign shape lacks the leading axes of length 1 (read either way).
    """

    foreign: tuple[str, ...]
    canonical: str
    squeeze: bool = False


@dataclass(frozen=True)
class Drop:
    """Foreign keys, as a regular expression, that the config has no use for, with the reason.

    Attributes:
        write: shape of the empty array that the foreign model wants under this key all the same.
    """

    foreign: str
    reason: str
    write: tuple[int, ...] | None = None


def rename(foreign: str, canonical: str) -> Row:
    """One module, or one parameter of its own, under another name."""
    return Row((foreign,), canonical)


def squeeze(foreign: str, canonical: str) -> Row:
    """A parameter whose foreign shape lacks the leading axes of length 1; both forms are read."""
    return Row((foreign,), canonical, squeeze=True)


def fuse(foreign: str, canonical: str) -> Row:
    """Several foreign modules side by side along the output: ``attn.{query|key|value}``."""
    start, _, rest = foreign.partition("{" + (choices := _choices(foreign)) + "}")
    return Row(tuple(start + choice + rest for choice in choices.split("|")), canonical)


def drop(foreign: str, reason: str, write: tuple[int, ...] | None = None) -> Drop:
    """Keys that are no part of the model."""
    return Drop(foreign, reason, write)


class RenameTable:
    """The rows of one foreign format for one config."""

    def __init__(self, *rows: Row | Drop) -> None:
        self.rows = [row for row in rows if isinstance(row, Row)]
        self.drops = [row for row in rows if isinstance(row, Drop)]

    def read(
        self, params: Mapping[str, Param], foreign: Mapping[str, np.ndarray], layout: Layout
    ) -> dict[str, np.ndarray]:
        """Foreign arrays as canonical weights.

        Raises:
            FitError: listing every key that is missing, unexpected or misshaped.
        """
        problems: list[str] = []
        weights: dict[str, np.ndarray] = {}
        used: set[str] = set()
        for path, param in params.items():
            row, names = self._sources(path, param, layout)
            used.update(names)
            missing = [name for name in names if name not in foreign]
            if missing:
                problems += [f"missing {name}" for name in missing]
                continue
            wanted, arrays = row_shape(param, row, layout, len(names)), [foreign[n] for n in names]
            if row.squeeze:
                arrays = [array.reshape(array.shape[_leading_ones(array) :]) for array in arrays]
            wrong = [
                f"misshaped {name}: wanted {wanted}, got {foreign[name].shape}"
                for name, array in zip(names, arrays, strict=True)
                if array.shape != wanted
            ]
            problems += wrong
            if not wrong:
                weights[path] = _to_canonical(param, arrays, layout)
        problems += [
            f"unexpected {name} {tuple(array.shape)}"
            for name, array in foreign.items()
            if name not in used and not self.drops_key(name)
        ]
        if problems:
            raise FitError(problems)
        return weights

    def write(
        self, params: Mapping[str, Param], weights: Mapping[str, np.ndarray], layout: Layout
    ) -> dict[str, np.ndarray]:
        """Canonical weights as foreign arrays; the inverse of ``read``.

        Raises:
            InputError: if the foreign model has no place for a parameter.
        """
        foreign: dict[str, np.ndarray] = {}
        for path, param in params.items():
            row, names = self._sources(path, param, layout)
            wanted = row_shape(param, row, layout, len(names))
            for name, array in zip(
                names, _from_canonical(param, weights[path], layout, len(names)), strict=True
            ):
                foreign[name] = array.reshape(wanted) if row.squeeze else array
        for row in self.drops:
            if row.write is not None:
                foreign[row.foreign] = np.zeros(row.write, np.float32)
        return foreign

    def drops_key(self, name: str) -> bool:
        """Whether a foreign key is no part of the model."""
        return any(re.fullmatch(row.foreign, name) for row in self.drops)

    def _sources(self, path: str, param: Param, layout: Layout) -> tuple[Row, list[str]]:
        """The row that makes a parameter, and the foreign keys that it takes."""
        own = param.role is Role.OWN
        module, _, _ = path.rpartition(".")
        leaf = native_path(path, param, layout).rpartition(".")[2]
        for row in self.rows:
            indices = _match(row.canonical, path if own else module)
            if indices is not None:
                names = [_fill(foreign, indices) for foreign in row.foreign]
                return row, names if own else [f"{name}.{leaf}" for name in names]
        raise InputError(f"the format has no place for {path}: its model computes no such thing")


def row_shape(param: Param, row: Row, layout: Layout, parts: int) -> tuple[int, ...]:
    """Shape of each foreign array of a row."""
    axes = permutation(CANONICAL[param.role].axes, layout[param.role].axes, len(param.shape))
    canonical = list(param.shape)
    if parts > 1:
        canonical[-1] //= parts
    shape = tuple(canonical[axis] for axis in axes)
    return shape[_count_leading_ones(shape) :] if row.squeeze else shape


def _to_canonical(param: Param, arrays: list[np.ndarray], layout: Layout) -> np.ndarray:
    axes = permutation(layout[param.role].axes, CANONICAL[param.role].axes, arrays[0].ndim)
    parts = [array.transpose(axes) for array in arrays]
    array = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
    return array.reshape(param.shape) if param.role is Role.OWN else array


def _from_canonical(
    param: Param, array: np.ndarray, layout: Layout, parts: int
) -> list[np.ndarray]:
    axes = permutation(CANONICAL[param.role].axes, layout[param.role].axes, array.ndim)
    return [part.transpose(axes) for part in np.split(array, parts, axis=-1)]


def _leading_ones(array: np.ndarray) -> int:
    return _count_leading_ones(array.shape)


def _count_leading_ones(shape: tuple[int, ...]) -> int:
    """Leading axes of length 1, of which two axes at least are kept."""
    return next((i for i, n in enumerate(shape) if n != 1 or i == len(shape) - 2), 0)


def _choices(pattern: str) -> str:
    return next(text for text in re.findall(r"\{([^}]*)\}", pattern) if "|" in text)


def _match(pattern: str, path: str) -> dict[str, int] | None:
    """The indices for which a pattern gives the path; None if it never does."""
    regex = re.sub(r"\\\{([a-z])\\\}", r"(?P<\1>\\d+)", re.escape(pattern))
    found = re.fullmatch(regex, path)
    return {name: int(text) for name, text in found.groupdict().items()} if found else None


def _fill(pattern: str, indices: Mapping[str, int]) -> str:
    """A pattern with its indices put in; ``{4j+3}`` is 4 times the index j, plus 3."""

    def value(found: re.Match[str]) -> str:
        factor, name, offset = found.groups()
        return str(int(factor or 1) * indices.get(name or "", 0) + int(offset or 0))

    return INDEX.sub(value, pattern)
