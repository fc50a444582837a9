"""Telling format, family and config of a foreign checkpoint from what is in it.

A family's ``INFER`` has one function per format. It gets the clues and returns the fields of the
config, ``None`` if the file is not of that format, or raises ``Ask`` for a field that nothing in
the file tells. What the caller gives goes before what is inferred.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, cast

from isovit.errors import InputError
from isovit.spec.blocks import TransformerConfig
from isovit.spec.config import BaseConfig, config_from_dict
from isovit.spec.families import FAMILIES, variant_config, variant_name, variants

Shapes = Mapping[str, tuple[int, ...]]
Fields = dict[str, Any]


@dataclass(frozen=True)
class Clues:
    """What is known of a checkpoint before its weights are read.

    Attributes:
        shapes: of every array, by the file's own names.
        given: fields of the config that the caller knows, by name.
        format: the format, if the caller knows it.
        wrapper: the key under which the weights lay in the file; ``""`` for none.
        container: suffix of the file; ``""`` for a folder.
        sidecars: JSON files beside the weights, by name.
        arch: name of the model that training code noted in the file; ``""`` for none.
    """

    shapes: Shapes
    given: Mapping[str, Any] = field(default_factory=dict[str, Any])
    format: str | None = None
    wrapper: str = ""
    container: str = ""
    sidecars: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Any])
    arch: str = ""


Infer = Callable[[Clues], "Fields | None"]


class Ask(InputError):
    """A field that names and shapes do not tell; names it, with the candidates."""

    def __init__(self, field: str, why: str, candidates: str) -> None:
        super().__init__(f"{field} cannot be read from the weights: {why}; "
                         f"give --set {field}={candidates}")  # fmt: skip


def detect(clues: Clues) -> tuple[str, BaseConfig] | None:
    """Find the format and the config of a foreign checkpoint.

    ViT, the first of the families, is asked last: many of the others only add names to its own.

    Returns:
        Format and config; None if the names are of no format.

    Raises:
        Ask: for a field that nothing in the file tells.
        ConfigError: if what was found or given makes no config.
    """
    for family in reversed(FAMILIES):
        infer: dict[str, Infer]
        infer = import_module(f"isovit.weight_convert.families.{family}").INFER
        for name, function in infer.items():
            if clues.format in (None, name):
                fields = function(clues)
                if fields is not None:
                    if "image_size" in clues.given:  # else a default that patches may not divide
                        fields["image_size"] = clues.given["image_size"]
                    config = config_from_dict({"family": family, **fields})
                    return name, config.replace(**clues.given) if clues.given else config
    return None


def count(shapes: Shapes, pattern: str) -> int:
    """How many of ``pattern.format(0)``, ``pattern.format(1)`` … there are."""
    depth = 0
    while pattern.format(depth) in shapes:
        depth += 1
    return depth


def square_side(patches: int, given: Mapping[str, Any], unit: int) -> int | None:
    """Side of a square grid; None if the caller gives the image's size.

    Raises:
        Ask: for the size of the image if the grid is not square.
    """
    if "image_size" in given:
        return None
    side = math.isqrt(patches)
    if side * side != patches:
        pairs = [(n, patches // n) for n in range(2, side + 1) if patches % n == 0]
        shown = " or ".join(f"[{h * unit},{w * unit}]" for h, w in pairs[-3:]) or "[HEIGHT,WIDTH]"
        raise Ask("image_size", f"{patches} patches make no square", shown)
    return side


def heads(clues: Clues, dim: int, depth: int, family: str = "") -> int:
    """Number of heads, which no shape tells, of the published model of this width and depth.

    Where several have them, the models of ``family`` go before others.

    Raises:
        Ask: if no published model has this width and depth.
    """
    if "num_heads" in clues.given:
        return int(clues.given["num_heads"])
    published = {
        name: cast("TransformerConfig", config).num_heads
        for name, config in variants().items()
        if (getattr(config, "embed_dim", 0), getattr(config, "depth", 0)) == (dim, depth)
    }
    with suppress(InputError):
        if (noted := variant_name(variant_config(clues.arch))) in published:
            return published[noted]
    if published:
        own = [n for name, n in published.items() if variants()[name].family == family]
        return statistics.mode(own or published.values())
    candidates = [n for n in range(1, min(dim, 64) + 1) if dim % n == 0]
    why = f"no published model has embed_dim={dim} and depth={depth}"
    raise Ask("num_heads", why, "|".join(map(str, candidates)))
