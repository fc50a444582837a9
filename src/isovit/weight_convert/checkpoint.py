"""A checkpoint in memory: a config, canonical weights, and where they came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from isovit.backends import backend_of, get_backend
from isovit.errors import InputError
from isovit.spec.config import BaseConfig
from isovit.spec.families import param_tree
from isovit.spec.layout import check_shapes
from isovit.weight_convert.tensors import Tensors


@dataclass(frozen=True)
class Source:
    """Where a checkpoint came from.

    Attributes:
        path: the file or folder.
        format: its format, as in ``FORMATS``.
        notes: what a reader should know, a line each.
    """

    path: str
    format: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """A config and the canonical weights of its model.

    Raises:
        InputError: if the weights are not those of the config.
    """

    config: BaseConfig
    weights: Mapping[str, np.ndarray]
    source: Source = field(default=Source("", "isovit"))

    def __post_init__(self) -> None:
        params = param_tree(self.config).parameters()
        wanted = {path: param.shape for path, param in params.items()}
        check_shapes(wanted, Tensors.of(self.weights).shapes)


def read(model: Any) -> Checkpoint:
    """The weights of a model, after training for example; the inverse of ``build``.

    Args:
        model: that ``build`` made, in any framework; also compiled or wrapped by torch.

    Returns:
        A copy of its weights, canonical: float64 as such, everything else as float32.

    Raises:
        InputError: if it is no model of isovit's.
    """
    for wrapper in ("_orig_mod", "module"):  # torch.compile, DataParallel
        model = getattr(model, wrapper, model)
    backend = backend_of(model)
    return Checkpoint(model.config, get_backend(backend).read(model), Source("", backend))


def part(whole: Checkpoint | Any, name: str) -> Checkpoint:
    """The weights of one of the models that another is made of, as a model of its own.

    Of an objective that is what it trained: ``part(model, "student")`` of a distillation,
    ``part(model, "encoder")`` of MAE. ``build`` makes it in any framework.

    Args:
        whole: a checkpoint; or a model that ``build`` made, which is read.
        name: path of the part among the modules, as ``config.parts`` has it.

    Returns:
        Its config and weights, with the source of the whole.

    Raises:
        InputError: if there is no such part.
    """
    whole = whole if isinstance(whole, Checkpoint) else read(whole)
    parts, family = whole.config.parts, whole.config.family
    if name not in parts:
        there = f"wanted {' or '.join(parts)}" if parts else "it is a model in one piece"
        raise InputError(f"{family} has no part named {name!r}: {there}")
    prefix, weights = f"{name}.", Tensors.of(whole.weights)
    inner = {path.removeprefix(prefix): path for path in weights if path.startswith(prefix)}
    notes = (*whole.source.notes, f"took {name} of {family}, without its other weights")
    source = replace(whole.source, notes=notes)
    return Checkpoint(parts[name], weights.renamed(inner), source)
