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

from isovit.backends.torch.layout import COUNTER
from isovit.errors import FitError, InputError
from isovit.spec.layout import (
    CANONICAL,
    Layout,
    check_shapes,
    native_path,
    native_shape,
    permutation,
)
from isovit.spec.param import Param, Role
from isovit.weight_convert.tensors import Spec, Tensors

INDEX = re.compile(r"\{(?:(\d*)([a-z]))?(?:\+?(\d+))?\}")


@dataclass(frozen=True)
class Row:
    """A correspondence between a foreign and a canonical path.

    Attributes:
        foreign: path, with ``{i}`` for an index, or ``{4j+3}`` for one computed from it; several
            paths where the foreign model splits what is one parameter here.
        canonical: path of a module, or of a parameter of its own, with ``{i}``.
        squeeze: whether the foreign shape lacks the leading axes of length 1 (read either way).
        heads: number of heads, where the foreign model splits the axis ``axis`` into heads and
            their width.
        axis: that axis, ``i`` or ``o``, as a layout calls it.
    """

    foreign: tuple[str, ...]
    canonical: str
    squeeze: bool = False
    heads: int = 1
    axis: str = ""


@dataclass(frozen=True)
class Drop:
    """Foreign keys, as a regular expression, that the config has no use for, with the reason.

    Attributes:
        write: shape of the empty array that the foreign model wants under this key all the same.
    """

    foreign: str
    reason: str
    write: tuple[int, ...] | None = None

    def matches(self, name: str) -> bool:
        """Whether a foreign key is among them."""
        return re.fullmatch(self.foreign, name) is not None


def rename(foreign: str, canonical: str, heads: int = 1, axis: str = "") -> Row:
    """One module, or one parameter of its own, under another name."""
    return Row((foreign,), canonical, heads=heads, axis=axis)


def squeeze(foreign: str, canonical: str) -> Row:
    """A parameter whose foreign shape lacks the leading axes of length 1; both forms are read."""
    return Row((foreign,), canonical, squeeze=True)


def fuse(foreign: str, canonical: str, heads: int = 1, axis: str = "") -> Row:
    """Several foreign modules side by side along the output: ``attn.{query|key|value}``."""
    start, _, rest = foreign.partition("{" + (choices := _choices(foreign)) + "}")
    parts = tuple(start + choice + rest for choice in choices.split("|"))
    return Row(parts, canonical, heads=heads, axis=axis)


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
    ) -> Tensors:
        """Foreign arrays as canonical weights; checked now, read one by one later.

        Raises:
            FitError: listing every key that is missing, unexpected, misshaped or wanted twice.
        """
        source = Tensors.of(foreign)
        problems: list[str] = []
        specs: dict[str, Spec] = {}
        recipes: dict[str, tuple[Row, list[str]]] = {}
        used: dict[str, str] = {}
        for path, param in params.items():
            row, names = recipes[path] = self._sources(path, param, layout)
            for name in names:
                if name in used:
                    problems.append(f"{name} is wanted by {used[name]} and by {path}")
                used[name] = path
            problems += [f"missing {name}" for name in names if name not in source]
            found = [source.specs[name] for name in names if name in source]
            wanted = foreign_shape(param, row, layout, len(names))
            problems += [
                f"misshaped {name}: wanted {wanted}, got {source.specs[name].shape}"
                for name in names
                if name in source and not _fits(source.specs[name].shape, wanted, row)
            ]
            dtypes = [spec.dtype for spec in found]
            try:
                specs[path] = Spec(param.shape, np.result_type(*dtypes or [np.float32]))
            except TypeError:
                shown = ", ".join(map(str, dtypes))
                problems.append(f"no dtype holds {' beside '.join(names)}, which are {shown}")
        problems += [
            f"unexpected {name} {spec.shape}"
            for name, spec in source.specs.items()
            if name not in used and not self.drops_key(name)
        ]
        if problems:
            raise FitError(problems)

        def fetch(path: str) -> np.ndarray:
            row, names = recipes[path]
            shape = plain_shape(params[path], row, layout, len(names))
            arrays = [source[name].reshape(shape) for name in names]
            return _to_canonical(params[path], arrays, layout)

        return Tensors(specs, fetch)

    def write(
        self, params: Mapping[str, Param], weights: Mapping[str, np.ndarray], layout: Layout
    ) -> Tensors:
        """Canonical weights as foreign arrays, one by one; the inverse of ``read``.

        Raises:
            InputError: if the foreign model has no place for a parameter.
        """
        source = Tensors.of(weights)
        specs: dict[str, Spec] = {}
        recipes: dict[str, tuple[str, int, int]] = {}
        for path, param in params.items():
            row, names = self._sources(path, param, layout)
            wanted = foreign_shape(param, row, layout, len(names))
            for part, name in enumerate(names):
                specs[name] = Spec(wanted, source.specs[path].dtype)
                recipes[name] = (path, part, len(names))
        for row in self.drops:
            if row.write is not None:
                specs[row.foreign] = Spec(row.write, np.dtype(np.float32))

        def fetch(name: str) -> np.ndarray:
            if name not in recipes:
                return np.zeros(*specs[name])
            path, part, parts = recipes[name]
            array = _from_canonical(params[path], source[path], layout, part, parts)
            return array.reshape(specs[name].shape)

        return Tensors(specs, fetch)

    def drops_key(self, name: str) -> bool:
        """Whether a foreign key is no part of the model."""
        return name.endswith(COUNTER) or any(row.matches(name) for row in self.drops)

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


class NativeTable:
    """The format of one of isovit's own models: the param tree under a layout, and no more."""

    def read(
        self, params: Mapping[str, Param], foreign: Mapping[str, np.ndarray], layout: Layout
    ) -> Tensors:
        """Native arrays as canonical weights; see ``RenameTable.read``."""
        source = Tensors.of(foreign)
        paths = {native_path(path, param, layout): path for path, param in params.items()}
        names = {path: name for name, path in paths.items()}
        shapes = {name: native_shape(params[path], layout) for name, path in paths.items()}
        found = {name: shape for name, shape in source.shapes.items() if not name.endswith(COUNTER)}
        check_shapes(shapes, found)
        specs = {
            path: Spec(param.shape, source.specs[names[path]].dtype)
            for path, param in params.items()
        }
        return Tensors(
            specs, lambda path: _to_canonical(params[path], [source[names[path]]], layout)
        )

    def write(
        self, params: Mapping[str, Param], weights: Mapping[str, np.ndarray], layout: Layout
    ) -> Tensors:
        """Canonical weights as native arrays; see ``RenameTable.write``."""
        source = Tensors.of(weights)
        paths = {native_path(path, param, layout): path for path, param in params.items()}
        specs = {
            name: Spec(native_shape(params[path], layout), source.specs[path].dtype)
            for name, path in paths.items()
        }

        def fetch(name: str) -> np.ndarray:
            path = paths[name]
            return _from_canonical(params[path], source[path], layout, part=0, parts=1)

        return Tensors(specs, fetch)


def plain_shape(param: Param, row: Row, layout: Layout, parts: int) -> tuple[int, ...]:
    """Shape of each foreign array of a row, no axis split into heads."""
    axes = permutation(CANONICAL[param.role].axes, layout[param.role].axes, len(param.shape))
    canonical = list(param.shape)
    if parts > 1:
        canonical[-1] //= parts
    shape = tuple(canonical[axis] for axis in axes)
    return shape[_leading_ones(shape) :] if row.squeeze else shape


def foreign_shape(param: Param, row: Row, layout: Layout, parts: int) -> tuple[int, ...]:
    """Shape of each foreign array of a row."""
    shape = plain_shape(param, row, layout, parts)
    letters = layout[param.role].axes.split()
    if row.axis not in letters:
        return shape
    at = letters.index(row.axis)
    return (*shape[:at], row.heads, shape[at] // row.heads, *shape[at + 1 :])


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...], row: Row) -> bool:
    return (shape[_leading_ones(shape) :] if row.squeeze else shape) == wanted


def _to_canonical(param: Param, arrays: list[np.ndarray], layout: Layout) -> np.ndarray:
    axes = permutation(layout[param.role].axes, CANONICAL[param.role].axes, arrays[0].ndim)
    # Put side by side as they lie in the file: a transposed copy would take longer.
    joined = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=axes[-1])
    array = joined.transpose(axes)
    return array.reshape(param.shape) if param.role is Role.OWN else array


def _from_canonical(
    param: Param, array: np.ndarray, layout: Layout, part: int, parts: int
) -> np.ndarray:
    axes = permutation(CANONICAL[param.role].axes, layout[param.role].axes, array.ndim)
    width = array.shape[-1] // parts if array.ndim else 0
    piece = array if parts == 1 else array[..., part * width : (part + 1) * width]
    return piece.transpose(axes)


def _leading_ones(shape: tuple[int, ...]) -> int:
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
