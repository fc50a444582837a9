"""Rename tables: how a foreign checkpoint names the modules of the param tree; strict, invertible.

A row maps a *module* to a *module*; the names of the leaves and their transposes follow from roles
and from the format's layout. Rows hold for both directions. A table is applied from the side of
the param tree: each parameter asks for its source, so that every target is made exactly once, and
what is then left over in the source must be a key that the table drops, with a reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from isovit.backends.torch.layout import COUNTER
from isovit.errors import FitError, InputError
from isovit.spec.layout import (
    CANONICAL,
    Layout,
    Leaf,
    check_shapes,
    native_path,
    native_shape,
    permutation,
)
from isovit.spec.param import Param, Role, join
from isovit.weight_convert.tensors import Spec, Tensors

INDEX = re.compile(r"\{(?:(\d*)([a-z]))?(?:\+?(\d+))?\}")
ONE = "1"
"""Among letters of axes, one of length 1."""


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
        shares: how wide the foreign parts are, in proportion; empty if all alike.
        by_head: number of heads, where the parts lie side by side within each; else 1.
        interleaved: number of heads, where the foreign model goes along the input of a dense kernel
            number by number and then head by head, and not the other way round; else 1.
        pixels: axes of which the input of a dense kernel is made up, where the foreign module is a
            convolution over them: channels, height, width.
        order: gives where among the foreign numbers along the last axis of a parameter each of ours
            stands; None where the order is the same.
        leaves: those of the foreign module that are not as its format has them, by role.
        axes: of a single parameter that is named whole on both sides, leaf included; as letters in
            the foreign order. Where the role has no letters, those of the canonical axes are in
            alphabetical order.

    Among the letters of ``leaves`` and ``axes``, ``1`` is an axis of length 1.
    """

    foreign: tuple[str, ...]
    canonical: str
    squeeze: bool = False
    heads: int = 1
    axis: str = ""
    shares: tuple[int, ...] = ()
    by_head: int = 1
    interleaved: int = 1
    pixels: tuple[int, ...] = ()
    order: Callable[[], Iterable[int]] | None = None
    leaves: Layout = field(default_factory=dict[Role, Leaf])
    axes: str = ""

    def leaf(self, param: Param, layout: Layout) -> Leaf:
        """Name and axes of a foreign parameter."""
        if self.axes:
            return Leaf("", self.axes)
        found = self.leaves.get(param.role, layout[param.role])
        return Leaf(found.name or param.name, found.axes)

    def part(self, width: int, part: int) -> slice:
        """Where a foreign part lies in an output of the canonical width, or of one head's."""
        shares = self.shares or (1,) * len(self.foreign)
        unit, before = width // sum(shares), sum(shares[:part])
        return slice(before * unit, (before + shares[part]) * unit)


@dataclass(frozen=True)
class Drop:
    """Foreign keys, as a regular expression, that the config has no use for, with the reason.

    Attributes:
        write: the array that the foreign model wants under this key all the same.
        copies: those of the keys under which it wants another array once more, each with the
            foreign key of that array.
    """

    foreign: str
    reason: str
    write: np.ndarray | None = None
    copies: Mapping[str, str] = field(default_factory=dict[str, str])

    def matches(self, name: str) -> bool:
        """Whether a foreign key is among them."""
        return re.fullmatch(self.foreign, name) is not None


def rename(foreign: str, canonical: str, heads: int = 1, axis: str = "") -> Row:
    """One module, or one parameter of its own, under another name."""
    return Row((foreign,), canonical, heads=heads, axis=axis)


def squeeze(foreign: str, canonical: str) -> Row:
    """A parameter whose foreign shape lacks the leading axes of length 1; both forms are read."""
    return Row((foreign,), canonical, squeeze=True)


def parameter(foreign: str, canonical: str, axes: str) -> Row:
    """One parameter whose foreign path has no leaf, or whose axes are not those of its role."""
    return Row((foreign,), canonical, axes=axes)


def interleave(foreign: str, canonical: str, heads: int) -> Row:
    """A dense layer behind heads whose numbers alternate: one of each head, then the next."""
    return Row((foreign,), canonical, interleaved=heads)


def convolve(foreign: str, canonical: str, pixels: tuple[int, int, int]) -> Row:
    """A dense layer over flattened (channels, height, width) that is a convolution there."""
    return Row((foreign,), canonical, pixels=pixels)


def reorder(row: Row, order: Callable[[], Iterable[int]]) -> Row:
    """The same row for a parameter along whose last axis the foreign order is another.

    Args:
        row: for the parameter alone.
        order: gives for each number here where the foreign model has it; called when a file is
            known to have as many.
    """
    return replace(row, order=order)


def fuse(
    foreign: str,
    canonical: str,
    heads: int = 1,
    axis: str = "",
    shares: tuple[int, ...] = (),
    by_head: int = 1,
) -> Row:
    """Several foreign modules side by side along the output: ``attn.{query|key|value}``.

    They are equally wide, unless ``shares`` says otherwise: (1, 2) for ``attn.{to_q|to_kv}``.
    """
    start, _, rest = foreign.partition("{" + (choices := _choices(foreign)) + "}")
    parts = tuple(start + choice + rest for choice in choices.split("|"))
    return Row(parts, canonical, heads=heads, axis=axis, shares=shares, by_head=by_head)


def pixelwise(row: Row) -> Row:
    """The same row for a foreign module that keeps the axes of an image, as vit-pytorch's do.

    A dense kernel is a convolution's, of one pixel; a LayerNorm over the channels has ``g``, ``b``.
    """
    return replace(row, leaves=PIXELWISE)


PIXELWISE: Layout = {
    Role.DENSE_KERNEL: Leaf("weight", "o i 1 1"),
    Role.NORM_SCALE: Leaf("g", "1 c 1 1"),
    Role.NORM_BIAS: Leaf("b", "1 c 1 1"),
}


def drop(foreign: str, reason: str, write: np.ndarray | None = None) -> Drop:
    """Keys that are no part of the model."""
    return Drop(foreign, reason, write)


def repeated(foreign: str, reason: str, copies: Mapping[str, str]) -> Drop:
    """Keys of a module that the foreign model has under another name too."""
    return Drop(foreign, reason, copies=copies)


def within(foreign: str, canonical: str, rows: Iterable[Row | Drop]) -> list[Row | Drop]:
    """Rows of a model that is a part of another.

    Args:
        foreign: what the other calls it; empty where the names of the part are its own names too.
        canonical: path of the part.
        rows: of the part alone. Under another name, keys that it drops are not written.
    """

    def moved(row: Row | Drop) -> Row | Drop:
        if isinstance(row, Row):
            names = tuple(join(foreign, name) for name in row.foreign)
            return replace(row, foreign=names, canonical=join(canonical, row.canonical))
        if not foreign:
            return row
        return Drop(rf"{re.escape(foreign)}\.({row.foreign})", row.reason)

    return [moved(row) for row in rows]


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
            shapes = [foreign_shape(param, row, layout, part) for part in range(len(names))]
            problems += [
                f"misshaped {name}: wanted {wanted}, got {source.specs[name].shape}"
                for name, wanted in zip(names, shapes, strict=True)
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
            return _to_canonical(params[path], [source[name] for name in names], row, layout)

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
        recipes: dict[str, tuple[str, Row, int]] = {}
        for path, param in params.items():
            row, names = self._sources(path, param, layout)
            for part, name in enumerate(names):
                wanted = foreign_shape(param, row, layout, part)
                specs[name] = Spec(wanted, source.specs[path].dtype)
                recipes[name] = (path, row, part)
        others = {row.foreign: row.write for row in self.drops if row.write is not None}
        specs |= {name: Spec(array.shape, array.dtype) for name, array in others.items()}
        for copy, name in (item for row in self.drops for item in row.copies.items()):
            specs[copy], recipes[copy] = specs[name], recipes[name]

        def fetch(name: str) -> np.ndarray:
            if name in others:
                return others[name]
            path, row, part = recipes[name]
            array = _from_canonical(params[path], source[path], row, layout, part)
            return array.reshape(specs[name].shape)

        return Tensors(specs, fetch)

    def drops_key(self, name: str) -> bool:
        """Whether a foreign key is no part of the model."""
        return name.endswith(COUNTER) or any(row.matches(name) for row in self.drops)

    def _sources(self, path: str, param: Param, layout: Layout) -> tuple[Row, list[str]]:
        """The row that makes a parameter, and the foreign keys that it takes."""
        module, _, _ = path.rpartition(".")
        for row in self.rows:
            whole = param.role is Role.OWN or row.axes != ""
            indices = _match(row.canonical, path if whole else module)
            if indices is not None:
                names = [_fill(foreign, indices) for foreign in row.foreign]
                leaf = row.leaf(param, layout).name
                return row, names if whole else [f"{name}.{leaf}" for name in names]
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

        def fetch(path: str) -> np.ndarray:
            return _to_canonical(params[path], [source[names[path]]], AS_IT_IS, layout)

        return Tensors(specs, fetch)

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
            return _from_canonical(params[path], source[path], AS_IT_IS, layout, part=0)

        return Tensors(specs, fetch)


AS_IT_IS = Row(("",), "")
"""The row of a parameter that has its own name."""


def plain_shape(param: Param, row: Row, layout: Layout, part: int) -> tuple[int, ...]:
    """Shape of a foreign array of a row: no axis split into heads, none of length 1 added."""
    canonical = list(param.shape)
    if len(row.foreign) > 1:
        within = row.part(canonical[-1] // row.by_head, part)
        canonical[-1] = (within.stop - within.start) * row.by_head
    order = _order(param, row, layout)
    shape = tuple(canonical[axis] for axis in order)
    return shape[_leading_ones(shape) :] if row.squeeze else shape


def foreign_shape(param: Param, row: Row, layout: Layout, part: int) -> tuple[int, ...]:
    """Shape of a foreign array of a row."""
    shape = plain_shape(param, row, layout, part)
    letters = row.leaf(param, layout).axes.split()
    if ONE in letters:
        lengths = iter(shape)
        shape = tuple(1 if letter == ONE else next(lengths) for letter in letters)
    if row.pixels and "i" in letters:
        at = letters.index("i")
        return (*shape[:at], *row.pixels, *shape[at + 1 :])
    if row.axis not in letters:
        return shape
    at = letters.index(row.axis)
    return (*shape[:at], row.heads, shape[at] // row.heads, *shape[at + 1 :])


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...], row: Row) -> bool:
    return (shape[_leading_ones(shape) :] if row.squeeze else shape) == wanted


def _to_canonical(param: Param, arrays: list[np.ndarray], row: Row, layout: Layout) -> np.ndarray:
    shapes = [plain_shape(param, row, layout, part) for part in range(len(arrays))]
    arrays = [array.reshape(shape) for array, shape in zip(arrays, shapes, strict=True)]
    back = tuple(int(axis) for axis in np.argsort(_order(param, row, layout)))
    if row.by_head > 1:
        parts = [_heads_apart(array.transpose(back), row.by_head) for array in arrays]
        return np.concatenate(parts, axis=-1).reshape(param.shape)
    # Put side by side as they lie in the file: a transposed copy would take longer.
    joined = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=back[-1])
    array = _swapped(param, joined.transpose(back[: joined.ndim]), -1, row.interleaved)
    array = array[..., list(row.order())] if row.order else array
    return array.reshape(param.shape) if param.role is Role.OWN else array


def _from_canonical(
    param: Param, array: np.ndarray, row: Row, layout: Layout, part: int
) -> np.ndarray:
    array = _swapped(param, array, row.interleaved, -1)
    array = array[..., np.argsort(list(row.order()))] if row.order else array
    if len(row.foreign) > 1:
        heads = _heads_apart(array, row.by_head)
        array = heads[..., row.part(heads.shape[-1], part)].reshape(*array.shape[:-1], -1)
    return array.transpose(_order(param, row, layout))


def _order(param: Param, row: Row, layout: Layout) -> tuple[int, ...]:
    """Axes of the foreign array in terms of the canonical one, those of length 1 aside."""
    letters = [letter for letter in row.leaf(param, layout).axes.split() if letter != ONE]
    canonical = CANONICAL[param.role].axes or " ".join(sorted(letters))
    return permutation(canonical, " ".join(letters), len(param.shape))


def _heads_apart(array: np.ndarray, heads: int) -> np.ndarray:
    """The last axis split into heads and their width."""
    return array.reshape(*array.shape[:-1], heads, -1)


def _swapped(param: Param, array: np.ndarray, before: int, after: int) -> np.ndarray:
    """The input of a dense kernel, (before, after) numbers, as (after, before); -1 for the rest."""
    if abs(before * after) == 1 or param.role is not Role.DENSE_KERNEL:
        return array
    return array.reshape(before, after, array.shape[-1]).swapaxes(0, 1).reshape(array.shape)


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
