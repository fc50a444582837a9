"""Checkpoints of every format to and from canonical weights; needs no framework of its own."""
