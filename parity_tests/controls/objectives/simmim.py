"""Faults of ports of SimMIM."""

from __future__ import annotations

from typing import Any

CASES: dict[str, Any] = {}
FAULTS: tuple = ()
HARMLESS: tuple = ()
GRADIENT_FAULTS: tuple = ()
