"""Rows of the tables of planted faults, and how a fault is put into a PyTorch model.

Each family has tables of its own in ``families``: ``CASES`` (configs by name), ``FAULTS``,
``HARMLESS`` and ``GRADIENT_FAULTS``. ``test_negative_controls`` runs them all.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

import pytest
from torch import Tensor, nn

Model = Any  # attributes of torch modules are typed as Tensor | Module: of no use here
Patch = pytest.MonkeyPatch
Plant = Callable[[Model, Patch], None]


class Fault(NamedTuple):
    """A row of the tables.

    Attributes:
        plant: changes a model in place, or a function of its module through the patch.
        case: which model.
        first: the first module, in the order of completion, whose output is wrong; empty for the
            model's own.
    """

    plant: Plant
    case: str
    first: str = ""

    @property
    def id(self) -> str:
        """Name of the fault and of the model."""
        return f"{self.plant.__name__}-{self.case}"


def modules(model: Model, kind: type[nn.Module]) -> list[Any]:
    """All modules of a kind: a port has its fault everywhere."""
    return [module for module in model.modules() if isinstance(module, kind)]


def rewrite(targets: list[Any], forward: Callable[..., Tensor]) -> None:
    """Give modules another forward."""
    for module in targets:
        module.forward = MethodType(forward, module)


class GradientFault(NamedTuple):
    """A row of the table of faults under which the output stays right.

    Attributes:
        plant: changes a model in place.
        case: which model.
        wrong: path of a gradient that is wrong.
        right: path of one that stays right, as it lies behind the fault; None for no such.
    """

    plant: Plant
    case: str
    wrong: str
    right: str | None

    @property
    def id(self) -> str:
        """Name of the fault and of the model."""
        return f"{self.plant.__name__}-{self.case}"
