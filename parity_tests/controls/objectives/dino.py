"""Faults of ports of DINO."""

CASES = {}
FAULTS = []
HARMLESS = []
GRADIENT_FAULTS = []
