"""Models of original libraries, as data: what to make, from what, and under which format.

Each family names its own, as ``ORIGINALS`` of its module in ``families``, and ``test_foreign`` runs
them all. What is special to files of one library (Google's, Hugging Face's) is written there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from hypothesis import strategies as st

from parity_tests.oracles.pairs import Pair


@dataclass(frozen=True)
class Original:
    """A model of an original library.

    Attributes:
        format: of its files.
        module: to import; of these tests where the original is no package.
        make: the model's constructor, of the module.
        pairs: its arguments, each with the config that they mean.
    """

    format: str
    module: str
    make: Callable[[ModuleType], Callable[..., Any]]
    pairs: Callable[[], st.SearchStrategy[Pair]]
