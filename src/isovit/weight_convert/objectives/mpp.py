"""Rename tables of MPP."""

TABLES = {}
MISFITS = {}
