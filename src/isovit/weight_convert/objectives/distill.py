"""Rename tables of distillation: what is published is the student, in the formats of its family."""

TABLES = {}
MISFITS = {}
