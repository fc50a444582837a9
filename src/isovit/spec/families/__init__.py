"""The table of families, each a module here with a config class, ``VARIANTS``, ``param_tree``."""

from __future__ import annotations

import difflib
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from isovit.errors import InputError
from isovit.spec.config import BaseConfig, Config, config_from_file
from isovit.spec.objectives import OBJECTIVES
from isovit.spec.param import ParamTree
from isovit.spec.published import Published

FAMILIES = {
    "vit": "ViT",
    "t2t_vit": "T2TViT",
    "cait": "CaiT",
    "twins_svt": "TwinsSVT",
    "crossvit": "CrossViT",
    "nest": "NesT",
    "deepvit": "DeepViT",
    "levit": "LeViT",
    "cvt": "CvT",
    "regionvit": "RegionViT",
    "token_learner": "TokenLearner",
    "t2t_vit_designs": "T2TViTDesigns",
    "efficient_vit": "EfficientViT",
}
"""Family name to the class name that its spec, models and tables share."""


def home(family: str) -> str:
    """The folder of a family's modules in every package, ``families.vit`` or ``objectives.mae``."""
    return f"{'families' if family in FAMILIES else 'objectives'}.{family}"


def class_name(family: str) -> str:
    """The class name of a family's models, or of an objective's."""
    return FAMILIES.get(family) or OBJECTIVES[family]


def family_module(family: str) -> ModuleType:
    """The spec module of a family or an objective."""
    return import_module(f"isovit.spec.{home(family)}")


def config_class(family: str) -> type[BaseConfig]:
    """The config class of a family, ``ViTConfig`` for ``vit``, or of an objective."""
    return getattr(family_module(family), f"{class_name(family)}Config")


def param_tree(config: BaseConfig) -> ParamTree:
    """The param tree of a model: modules, parameters, shapes and multiply-adds."""
    return family_module(config.family).param_tree(config)


def published(name: str) -> Published | None:
    """What the authors say of a variant; None where nothing is known for certain."""
    return family_module(variant_config(name).family).PUBLISHED.get(name)


@cache
def variants() -> dict[str, Config]:
    """Every published variant by name, in the order of the families."""
    return {
        name: row for family in FAMILIES for name, row in family_module(family).VARIANTS.items()
    }


@cache
def objectives() -> dict[str, BaseConfig]:
    """Every named form of an objective, in the order of the table."""
    return {
        name: row for family in OBJECTIVES for name, row in family_module(family).VARIANTS.items()
    }


def variant_config(name: str) -> BaseConfig:
    """The config of a published variant or of an objective; older names are accepted.

    Raises:
        InputError: if there is none of that name.
    """
    aliases: dict[str, str] = {}
    for family in FAMILIES:
        aliases |= family_module(family).ALIASES
    known = {**variants(), **objectives()}
    if (name := aliases.get(name, name)) in known:
        return known[name]
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "isovit list shows the names"
    raise InputError(f"no model named {name!r}; {hint}")


# What libraries and users change without making another model of it.
FREE = ("num_classes", "image_size", "preprocess", "norm_eps", "activation", "init_scheme")


def variant_name(config: BaseConfig) -> str | None:
    """The published variant of which a config is a form; None if of none.

    Its classes, image size, preprocessing, epsilon, GELU and initialisation may be others: the same
    weights have another epsilon in another library. Of several variants (``vit_b16``, ``deit_b16``)
    it is the one with most of these in common.
    """
    wanted = config.to_dict()
    free = {key: wanted[key] for key in FREE if key in wanted}
    known: dict[str, BaseConfig] = {**variants(), **objectives()}
    rows = {name: variant.to_dict() for name, variant in known.items()}
    same = [name for name, row in rows.items() if row | free == wanted]
    return max(
        same, key=lambda name: sum(rows[name][key] == free[key] for key in free), default=None
    )


def config(name: str, **changes: Any) -> Any:
    """The config of a published variant or of an objective, with fields changed.

    Args:
        name: ``t2t_vit_14``, ``mae_vit_b16``; older names are accepted.
        changes: fields to change, ``num_classes=10``; nested ones by dotted name,
            ``**{"preprocess.interpolation": "bilinear"}``.

    Returns:
        A ``Config`` of the family, or the ``BaseConfig`` of an objective.

    Raises:
        InputError: if there is no such variant or field, or the config cannot be.
    """
    variant = variant_config(name)
    return variant.replace(**changes) if changes else variant


def resolve_config(name: str, changes: dict[str, Any] | None = None) -> BaseConfig:
    """The config of a name or of a JSON or TOML config file, with fields changed.

    Args:
        name: a variant (``t2t_vit_14``) or a path that ends in .json or .toml.
        changes: fields to change, nested ones by dotted name.

    Raises:
        InputError: if there is no such variant or file, or the config cannot be.
    """
    is_file = Path(name).suffix in (".json", ".toml")
    config = config_from_file(name) if is_file else variant_config(name)
    return config.replace(**changes) if changes else config
