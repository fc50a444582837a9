"""What the C library does with memory that a step of a model has freed.

Source: GNU C Library Reference Manual, "Malloc Tunable Parameters"; mallopt(3).
"""

from __future__ import annotations

import ctypes
import platform
from typing import Literal

Memory = Literal["returned", "kept"]
"""``returned``: to the system, as the C library does unless told otherwise; ``kept``: for more."""

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # as malloc.h numbers them
KEEP = {
    M_MMAP_MAX: 0,  # no large piece is a mapping of its own, which ends when it is freed
    M_TRIM_THRESHOLD: -1,  # what is free at the end of the heap stays
    M_ARENA_MAX: 1,  # one heap for all threads: those of threads hold no large pieces
}


def can_keep_memory() -> bool:
    """Whether the C library of this process is glibc, which can be told."""
    return platform.libc_ver()[0] == "glibc"


def usual_memory() -> Memory:
    """What a measurement does unless told otherwise: memory is kept where it can be."""
    return "kept" if can_keep_memory() else "returned"


def keep_memory() -> bool:
    """Have the C library keep what is freed, for the next step of a model.

    A step frees all that it takes but the output. Given back to the system, every page of it (4 KB)
    is a page fault in the next step and is filled with zeros again: a sixth of the time of
    T2T-ViT-7 in PyTorch on a CPU (docs/speed.md). JAX pays it too; TensorFlow and onnxruntime keep
    their memory without being asked.

    Call it before a model is built. It is of the whole process and cannot be undone: memory that
    was in use once stays with the process until it ends.

    Returns:
        Whether it did: False, and nothing is changed, where the C library is not glibc.
    """
    if not can_keep_memory():
        return False
    library = ctypes.CDLL(None)
    return all(library.mallopt(parameter, value) for parameter, value in KEEP.items())
