"""Rename tables of SimMIM."""

TABLES = {}
MISFITS = {}
