"""Rename tables of DINO."""

TABLES = {}
MISFITS = {}
