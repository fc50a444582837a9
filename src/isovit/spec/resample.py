"""Resampling along an axis, as a matrix: what bicubic interpolation means, whoever computes it.

With R for the rows and C for the columns, each of shape (size_out, size_in), an image X becomes
R X Cᵀ. Frameworks differ in their cubic kernels and in whether they widen them, so that models
multiply by these matrices instead of asking a framework to resize.
"""

from __future__ import annotations

import numpy as np


def torch_bicubic(size_in: int, size_out: int) -> np.ndarray:
    """Cubic, half-pixel centres, a = -0.75, not antialiased; DeiT, MAE, T2T-ViT, CrossViT.

    Returns:
        (size_out, size_in) in float64; each row sums to 1.

    Source: ``interpolate(mode="bicubic", align_corners=False)`` of PyTorch, by ``size``.
    """
    return bicubic(size_in, size_out, size_in / size_out)


def dino_bicubic(size_in: int, size_out: int) -> np.ndarray:
    """``torch_bicubic`` with the spacing of a grid larger by 0.1; DINO.

    DINO gives PyTorch a factor in place of a size, enlarged against rounding down; PyTorch spaces
    the positions by this factor. Thus an axis whose size stays is resampled too.

    Source: DINO vision_transformer.py ``interpolate_pos_encoding``, and its issue 8.
    """
    return bicubic(size_in, size_out, 1.0 / ((size_out + 0.1) / size_in))


def bicubic(size_in: int, size_out: int, spacing: float) -> np.ndarray:
    """Keys' kernel of width 4, never widened; beyond the border, the border's value."""
    taps = np.arange(-2, size_in + 2)
    weights = keys(centres(size_out, spacing)[:, None] - taps, a=-0.75)
    border = np.clip(taps, 0, size_in - 1)[:, None] == np.arange(size_in)  # (size_in + 4, size_in)
    return weights @ border.astype(np.float64)


def centres(size_out: int, spacing: float) -> np.ndarray:
    """Where outputs lie among inputs at 0, 1, ..., if a pixel reaches 1/2 to either side."""
    return spacing * (np.arange(size_out) + 0.5) - 0.5


def keys(x: np.ndarray, a: float) -> np.ndarray:
    """Cubic convolution; Keys 1981, doi:10.1109/TASSP.1981.1163711, who settles on a = -0.5."""
    x = np.abs(x)
    inner = (a + 2) * x**3 - (a + 3) * x**2 + 1
    outer = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, inner, np.where(x < 2, outer, 0.0))
