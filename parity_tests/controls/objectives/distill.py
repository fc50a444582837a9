"""Faults of ports of distillation."""

CASES = {}
FAULTS = []
HARMLESS = []
GRADIENT_FAULTS = []
