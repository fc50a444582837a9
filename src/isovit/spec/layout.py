"""Layouts: how a backend names and orders the axes of each role; data, applied both ways.

A layout says per role the leaf's name and its axes as letters: torch keeps a dense kernel as
``weight`` with axes ``o i``. The transpose from the canonical ``i o`` and its inverse are computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from isovit.errors import FitError
from isovit.spec.param import Param, Role


class Leaf(NamedTuple):
    """Name and axes of a role's parameters; an empty name stands for the parameter's own."""

    name: str
    axes: str


Layout = Mapping[Role, Leaf]

CANONICAL: Layout = {
    Role.DENSE_KERNEL: Leaf("kernel", "i o"),
    Role.CONV_KERNEL: Leaf("kernel", "h w i o"),
    Role.DEPTHWISE_KERNEL: Leaf("kernel", "h w i o"),
    Role.BIAS: Leaf("bias", "o"),
    Role.NORM_SCALE: Leaf("scale", "c"),
    Role.NORM_BIAS: Leaf("bias", "c"),
    Role.NORM_MEAN: Leaf("mean", "c"),
    Role.NORM_VAR: Leaf("var", "c"),
    Role.OWN: Leaf("", ""),
}


def native_path(path: str, param: Param, layout: Layout) -> str:
    """The dotted path of a parameter under a layout: only the leaf's name differs."""
    module, dot, _ = path.rpartition(".")
    return module + dot + (layout[param.role].name or param.name)


def native_shape(param: Param, layout: Layout) -> tuple[int, ...]:
    """The shape of a parameter under a layout."""
    axes = permutation(CANONICAL[param.role].axes, layout[param.role].axes, len(param.shape))
    return tuple(param.shape[axis] for axis in axes)


def to_native(
    params: Mapping[str, Param], weights: Mapping[str, np.ndarray], layout: Layout
) -> dict[str, np.ndarray]:
    """Canonical weights as a layout names and orders them; views, no copies.

    Raises:
        FitError: if the weights are not those of the tree.
    """
    check_weights(params, weights)
    return {
        native_path(path, param, layout): weights[path].transpose(
            permutation(CANONICAL[param.role].axes, layout[param.role].axes, weights[path].ndim)
        )
        for path, param in params.items()
    }


def from_native(
    params: Mapping[str, Param], native: Mapping[str, np.ndarray], layout: Layout
) -> dict[str, np.ndarray]:
    """The inverse of ``to_native``; views, no copies.

    Raises:
        FitError: if names or shapes are not those of the tree under the layout.
    """
    paths = {native_path(path, param, layout): path for path, param in params.items()}
    shapes = {name: native_shape(params[path], layout) for name, path in paths.items()}
    check_shapes(shapes, {name: array.shape for name, array in native.items()})
    weights: dict[str, np.ndarray] = {}
    for name, path in paths.items():
        role, array = params[path].role, native[name]
        weights[path] = array.transpose(
            permutation(layout[role].axes, CANONICAL[role].axes, array.ndim)
        )
    return weights


def check_weights(params: Mapping[str, Param], weights: Mapping[str, np.ndarray]) -> None:
    """Check that canonical weights have the tree's names and shapes.

    Raises:
        FitError: listing all that is missing, unexpected or misshaped.
    """
    check_shapes(
        {path: param.shape for path, param in params.items()},
        {path: array.shape for path, array in weights.items()},
    )


def problems(
    wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """What is missing, unexpected or misshaped, a line each."""
    lines = [f"missing {name} {wanted[name]}" for name in wanted if name not in found]
    lines += [f"unexpected {name} {found[name]}" for name in found if name not in wanted]
    lines += [
        f"misshaped {name}: wanted {wanted[name]}, got {found[name]}"
        for name in wanted
        if name in found and tuple(found[name]) != tuple(wanted[name])
    ]
    return lines


def check_shapes(
    wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> None:
    """Check names and shapes, all problems in one error.

    Raises:
        FitError: listing what is missing, unexpected or misshaped.
    """
    if lines := problems(wanted, found):
        raise FitError(lines)


def permutation(source: str, target: str, ndim: int) -> tuple[int, ...]:
    """Axes of the target in terms of the source; a role without letters keeps its axes."""
    if not source or not target:
        return tuple(range(ndim))
    letters = source.split()
    return tuple(letters.index(letter) for letter in target.split())
