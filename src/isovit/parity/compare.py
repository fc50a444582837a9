"""The measure of error."""

from __future__ import annotations

import numpy as np


def error(a: np.ndarray, b: np.ndarray) -> float:
    """max|a − b| over the larger of max|a| and max|b|.

    Element-wise relative error is no measure: a sum that cancels has any relative error. One
    number for a whole tensor is, because rounding is relative to the terms, not to their sum.

    Returns:
        0 for equal arrays, all zeros included; infinity if a shape differs or a value is not
        finite.
    """
    if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    difference = np.abs(a.astype(np.float64) - b.astype(np.float64)).max(initial=0.0)
    scale = max(np.abs(a).max(initial=0.0), np.abs(b).max(initial=0.0))
    return float(difference / scale) if difference else 0.0
