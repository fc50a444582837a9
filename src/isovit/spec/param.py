"""The param tree: every module of a model with its parameters, output shape and multiply-adds.

One description serves all: the contract for the backends (paths, shapes, roles), the exact
parameter count, the seeded initialisation, the activation shapes and the multiply-adds.
Shapes are those of one image, without the batch axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum

Shape = tuple[int, ...]


class Role(Enum):
    """What a parameter is to its module; a backend's layout is a table over roles."""

    DENSE_KERNEL = "dense kernel"  # (in, out)
    CONV_KERNEL = "conv kernel"  # (height, width, in / groups, out)
    DEPTHWISE_KERNEL = "depthwise kernel"  # (height, width, 1, dim)
    BIAS = "bias"  # (out,)
    NORM_SCALE = "norm scale"  # (dim,)
    NORM_BIAS = "norm bias"  # (dim,)
    NORM_MEAN = "norm mean"  # (dim,), of a BatchNorm: state that training moves, no parameter
    NORM_VAR = "norm variance"  # (dim,), likewise
    OWN = "own"  # the model's own parameter, under its own name and in one shape everywhere


@dataclass(frozen=True)
class Init:
    """How a parameter is drawn: a distribution by name and its one number.

    ``constant`` (value), ``normal`` (std), ``trunc_normal`` (std, cut at ±2 in absolute units, as
    in timm), ``lecun_normal`` (std after the cut at two deviations, as in Flax), ``uniform``
    (bound), ``orthogonal_rows`` (norm of a row), ``orthogonal_normal`` (std; as many rows at a time
    are orthogonal as they are wide), ``sinusoid`` (base of the wavelengths), ``sincos_2d`` (the
    same, over ``grid``).
    """

    kind: str
    value: float = 0.0
    grid: tuple[int, int] | None = None


STATISTICS = (Role.NORM_MEAN, Role.NORM_VAR)
"""Roles of state: it is kept with the weights, but nobody counts it among the parameters."""

ZEROS = Init("constant", 0.0)
ONES = Init("constant", 1.0)


@dataclass(frozen=True)
class Param:
    """One parameter: its leaf name, canonical shape, role, initialiser, and whether it trains.

    Attributes:
        probe_gain: factor on the standard deviation of probe weights, for the rare layer whose
            inputs must stay small for the function to be well conditioned.
        source: path of the parameter whose draw it repeats, where the two start alike, as a teacher
            and its student do; None for a draw of its own.
        moves: whether training moves it though no gradient does, as an average of other parameters;
            ``probe`` then draws it like one that trains.
    """

    name: str
    shape: Shape
    role: Role
    init: Init
    trainable: bool = True
    probe_gain: float = 1.0
    source: str | None = None
    moves: bool = False


@dataclass(frozen=True)
class ParamTree:
    """A module: a node of the tree.

    Attributes:
        name: attribute name in its parent, or the index in a list.
        params: the module's own parameters.
        children: sub-modules, in the order in which they run.
        output: shape of what the module returns for one image, the last time where it runs several
            times; None for a list of modules, or where several arrays are returned.
        own_macs: multiply-adds of the module itself, without its children.
    """

    name: str
    params: tuple[Param, ...] = ()
    children: tuple[ParamTree, ...] = ()
    output: Shape | None = None
    own_macs: int = 0

    def parameters(self) -> dict[str, Param]:
        """Every parameter by its canonical path, ``blocks.0.attn.qkv.kernel``."""
        return {
            join(path, param.name): param for path, node in self.walk() for param in node.params
        }

    def walk(self, prefix: str = "") -> Iterator[tuple[str, ParamTree]]:
        """Every module with its path, parents after their children: the order of completion."""
        for child in self.children:
            yield from child.walk(join(prefix, child.name))
        yield prefix, self

    def activations(self) -> dict[str, Shape]:
        """Output shape of every module that computes, by path, in order of completion."""
        return {path: node.output for path, node in self.walk() if node.output is not None}

    def count(self, trainable: bool | None = None) -> int:
        """Number of parameters, running statistics aside: all, or only trainable or fixed ones."""
        params = [param for param in self.parameters().values() if param.role not in STATISTICS]
        return sum(math.prod(p.shape) for p in params if trainable in (None, p.trainable))

    def size(self) -> int:
        """How many numbers are kept: parameters and running statistics."""
        return sum(math.prod(param.shape) for param in self.parameters().values())

    def multiply_adds(self) -> int:
        """Multiply-adds of one image through every product with weights or between activations."""
        return sum(node.own_macs for _, node in self.walk())

    def renamed(self, name: str) -> ParamTree:
        """The same module under another name."""
        return replace(self, name=name)


def join(prefix: str, name: str) -> str:
    """Dotted path."""
    return f"{prefix}.{name}" if prefix else name


def dense(
    name: str,
    lead: Shape,
    in_dim: int,
    out_dim: int,
    kernel: Init,
    bias: Init | None,
    probe_gain: float = 1.0,
) -> ParamTree:
    """A product with a matrix over the last axis.

    Args:
        name: attribute name.
        lead: the axes before the last one, ``(tokens,)``.
        in_dim: last axis of the input.
        out_dim: last axis of the output.
        kernel: initialiser of the (in, out) kernel.
        bias: initialiser of the bias; None for no bias.
        probe_gain: see ``Param``.
    """
    params = [Param("kernel", (in_dim, out_dim), Role.DENSE_KERNEL, kernel, probe_gain=probe_gain)]
    if bias is not None:
        params.append(Param("bias", (out_dim,), Role.BIAS, bias))
    macs = math.prod(lead) * in_dim * out_dim
    return ParamTree(name, tuple(params), output=(*lead, out_dim), own_macs=macs)


def conv(
    name: str,
    grid: Shape,
    kernel_size: Shape,
    in_dim: int,
    out_dim: int,
    kernel: Init,
    bias: Init | None,
    groups: int = 1,
) -> ParamTree:
    """A convolution.

    Args:
        name: attribute name.
        grid: (height, width) of its output.
        kernel_size: (height, width).
        in_dim: channels of the input.
        out_dim: channels of the output.
        kernel: initialiser of the (height, width, in_dim / groups, out_dim) kernel.
        bias: initialiser of the bias; None for no bias.
        groups: parts of the channels that do not see each other.
    """
    shape = (*kernel_size, in_dim // groups, out_dim)
    params = [Param("kernel", shape, Role.CONV_KERNEL, kernel)]
    if bias is not None:
        params.append(Param("bias", (out_dim,), Role.BIAS, bias))
    return ParamTree(name, tuple(params), output=(*grid, out_dim), own_macs=math.prod(grid + shape))


def depthwise_conv(
    name: str, grid: Shape, kernel_size: Shape, dim: int, kernel: Init, bias: Init | None
) -> ParamTree:
    """A convolution of each channel by itself onto ``grid``, (height, width) of its output."""
    shape = (*kernel_size, 1, dim)
    params = [Param("kernel", shape, Role.DEPTHWISE_KERNEL, kernel)]
    if bias is not None:
        params.append(Param("bias", (dim,), Role.BIAS, bias))
    return ParamTree(name, tuple(params), output=(*grid, dim), own_macs=math.prod(grid + shape))


def layer_norm(name: str, lead: Shape, dim: int) -> ParamTree:
    """LayerNorm over the last axis, with scale and bias."""
    params = (
        Param("scale", (dim,), Role.NORM_SCALE, ONES),
        Param("bias", (dim,), Role.NORM_BIAS, ZEROS),
    )
    return ParamTree(name, params, output=(*lead, dim))


def batch_norm(name: str, lead: Shape, dim: int, scale: Init = ONES) -> ParamTree:
    """BatchNorm over the last axis, with scale, bias and running statistics."""
    params = (
        Param("scale", (dim,), Role.NORM_SCALE, scale),
        Param("bias", (dim,), Role.NORM_BIAS, ZEROS),
        Param("mean", (dim,), Role.NORM_MEAN, ZEROS, trainable=False),
        Param("var", (dim,), Role.NORM_VAR, ONES, trainable=False),
    )
    return ParamTree(name, params, output=(*lead, dim))


def repeat(name: str, count: int, make: Callable[[int], ParamTree]) -> ParamTree:
    """A list of modules, ``make(i)`` under the name ``i``."""
    return ParamTree(name, children=tuple(make(i).renamed(str(i)) for i in range(count)))
