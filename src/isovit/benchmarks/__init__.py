"""Measured speed and memory of models on this device, and the choice of a backend by it."""
