"""Rename tables of TokenLearner."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from isovit.spec.families.token_learner import TokenLearnerConfig
from isovit.weight_convert.detect import Infer
from isovit.weight_convert.rename import RenameTable

TABLES: dict[str, Callable[[TokenLearnerConfig], RenameTable]] = {}

MISFITS: dict[str, Callable[[TokenLearnerConfig], Iterator[str]]] = {}

INFER: dict[str, Infer] = {}
