"""Rename tables of MAE."""

TABLES = {}
MISFITS = {}
