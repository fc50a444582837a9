"""Vision transformers in PyTorch, Flax and Keras, from one spec, proven to be one function.

The names here are the Python API. Importing isovit loads no framework; each is loaded when a
model is built in it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isovit.backends import build as build
    from isovit.backends.memory import keep_memory as keep_memory
    from isovit.errors import InputError as InputError
    from isovit.look.attention import activations as activations
    from isovit.look.attention import attention as attention
    from isovit.parity.harness import parity as parity
    from isovit.spec.config import config_from_file as config_from_file
    from isovit.spec.families import config as config
    from isovit.spec.families import param_tree as param_tree
    from isovit.spec.families import variants as variants
    from isovit.spec.initialize import init as init
    from isovit.weight_convert.checkpoint import Checkpoint as Checkpoint
    from isovit.weight_convert.checkpoint import part as part
    from isovit.weight_convert.checkpoint import read as read
    from isovit.weight_convert.store import load as load
    from isovit.weight_convert.store import save as save

__version__ = "0.1.0"

_HOME = {
    "Checkpoint": "isovit.weight_convert.checkpoint",
    "InputError": "isovit.errors",
    "activations": "isovit.look.attention",
    "attention": "isovit.look.attention",
    "build": "isovit.backends",
    "config": "isovit.spec.families",
    "config_from_file": "isovit.spec.config",
    "init": "isovit.spec.initialize",
    "keep_memory": "isovit.backends.memory",
    "load": "isovit.weight_convert.store",
    "param_tree": "isovit.spec.families",
    "parity": "isovit.parity.harness",
    "part": "isovit.weight_convert.checkpoint",
    "read": "isovit.weight_convert.checkpoint",
    "save": "isovit.weight_convert.store",
    "variants": "isovit.spec.families",
}

__all__ = [
    "Checkpoint",
    "InputError",
    "__version__",
    "activations",
    "attention",
    "build",
    "config",
    "config_from_file",
    "init",
    "keep_memory",
    "load",
    "param_tree",
    "parity",
    "part",
    "read",
    "save",
    "variants",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOME:
        raise AttributeError(f"module 'isovit' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
