"""Importing the original libraries, past a torchvision that cannot load."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest

REQUIRE = pytest.StashKey[bool]()
"""Whether an absent library fails, kept in ``config.stash``."""


def import_oracle(name: str, config: pytest.Config) -> ModuleType:
    """A module of an original library; skips the test, or fails it, where there is none.

    Args:
        name: dotted module, ``timm.models``.
        config: of pytest, which knows of ``--require``.
    """
    mend_torchvision()
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        reason = f"oracle {name} is not installed: {error}"
        if config.stash[REQUIRE]:
            pytest.fail(reason)
        pytest.skip(reason)


@cache
def mend_torchvision() -> Any:
    """Let ``import torchvision`` succeed beside a torch of another build.

    A torchvision built for CUDA does not load its operators beside the CPU build of torch, and
    then fails where it describes two of them. Declaring the two is enough: no oracle calls them.

    Returns:
        The library of the declarations, which last as long as it does: the cache keeps it.
    """
    import torch

    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor x) -> Tensor")
        return library
    return None
