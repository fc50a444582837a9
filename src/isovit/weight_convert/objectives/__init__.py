"""Rename tables of the objectives."""
