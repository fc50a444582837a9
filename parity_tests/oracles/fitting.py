"""Configs that each foreign format can hold, for which its library makes the model.

The other way round than ``pairs``: hypothesis draws a config of isovit, the fields in which the
library has no choice are set, and every other field stays as it was drawn. What ``MISFITS`` should
have refused then shows: the library cannot load what was written, or computes something else. Each
family says it for its formats, as ``FITS`` of its module in ``families``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from hypothesis import strategies as st

from isovit.spec.blocks import TransformerConfig
from isovit.spec.config import Config
from isovit.spec.families import FAMILIES

Fields = dict[str, Any]

FOREIGN = [
    (family, name)
    for family in FAMILIES
    for name in import_module(f"isovit.weight_convert.families.{family}").TABLES
]
"""Family and format of every rename table."""


@dataclass(frozen=True)
class Fit:
    """What a library can be told to be, and how.

    Attributes:
        changes: of a drawn config, the fields in which the library has no choice.
        module: to import; of these tests where the original is no package.
        make: the library's model of a config; None where its files take more than a state dict,
            which ``test_foreign`` knows.
    """

    changes: Callable[[st.DrawFn, Any], Fields]
    module: str = ""
    make: Callable[[ModuleType, Any], Any] | None = None


def fit(family: str, name: str) -> Fit:
    """Of a family and a format."""
    return import_module(f"parity_tests.oracles.families.{family}").FITS[name]


def drawn(family: str) -> st.SearchStrategy[Config]:
    """Any config of a family."""
    return import_module(f"parity_tests.families.{family}").configs()


@st.composite
def fitting(draw: st.DrawFn, family: str, name: str) -> Config:
    """A config that a format can hold."""
    config = draw(drawn(family))
    return config.replace(**fit(family, name).changes(draw, config))


# What the libraries of several families have in common


def filled(config: TransformerConfig) -> Fields:
    """Heads that fill the width, and a projection behind them."""
    dim = -(-config.embed_dim // config.num_heads) * config.num_heads
    return dict(embed_dim=dim, head_dim=None, attn_proj=True)


def projects(config: TransformerConfig) -> bool:
    """vit-pytorch leaves the projection out where one head is as wide as the tokens."""
    return not (config.num_heads == 1 and config.block.head_dim == config.embed_dim)


def ratio(config: TransformerConfig) -> float:
    """Hidden width of the MLP as a multiple of the width, which the library cuts to an integer."""
    return (config.mlp_dim + 0.5) / config.embed_dim
