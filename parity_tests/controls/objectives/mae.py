"""Faults of ports of MAE."""

CASES = {}
FAULTS = []
HARMLESS = []
GRADIENT_FAULTS = []
