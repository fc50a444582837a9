"""Fixed tables of positions."""

from __future__ import annotations

import numpy as np


def sinusoidal_positions(tokens: int, dim: int, base: float = 10000.0) -> np.ndarray:
    """Fixed 1-D table: angle pos / base^(2⌊j/2⌋/dim), sine in even columns, cosine in odd ones.

    Args:
        tokens: number of positions.
        dim: width.
        base: longest wavelength, in units of 2π positions.

    Returns:
        (tokens, dim) float32, computed in float64.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.5, as in the official T2T-ViT code.
    """
    column = np.arange(dim)
    angle = np.arange(tokens)[:, None] / np.power(base, 2 * (column // 2) / dim)
    return np.where(column % 2 == 0, np.sin(angle), np.cos(angle)).astype(np.float32)


def sincos_positions(
    grid: tuple[int, int], dim: int, prefix: int = 0, base: float = 10000.0
) -> np.ndarray:
    """Fixed 2-D table: a quarter each of sin x, cos x, sin y, cos y, angles n / base^(4j/dim).

    Args:
        grid: rows (y) and columns (x) of patches.
        dim: width, divisible by 4.
        prefix: tokens before the patches, whose positions are zeros.
        base: longest wavelength, in units of 2π positions.

    Returns:
        (prefix + patches, dim) float32, row by row, computed in float64.

    Source: He et al. 2022, arXiv:2111.06377, appendix A, as in the official MAE code.
    """
    frequency = base ** -(np.arange(dim // 4) / (dim // 4))
    y, x = np.indices(grid).reshape(2, -1)
    angles = [np.multiply.outer(n, frequency) for n in (x, y)]
    table = np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1)
    return np.pad(table, ((prefix, 0), (0, 0))).astype(np.float32)
