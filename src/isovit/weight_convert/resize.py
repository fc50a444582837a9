"""Position tables to another grid, as the originals do it, by two small matrices.

Every method is linear and treats the axes one by one: with R for the rows and C for the columns,
each of shape (size_out, size_in), the new grid is R X Cᵀ. The originals differ in the positions
that they read, in the kernel around them, and in what they do at the border.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from isovit.errors import InputError
from isovit.spec.resample import centres, dino_bicubic, keys, torch_bicubic


def torch_bicubic_antialias(size_in: int, size_out: int) -> np.ndarray:
    """Cubic, a = -0.5, widened to the new spacing when shrinking; what timm does by default.

    At the border the kernel is cut off and the rest brought back to a sum of 1. The bounds of
    PyTorch's window need no code: outside of them the kernel is 0.

    Source: ``interpolate(mode="bicubic", antialias=True)`` of PyTorch, in its UpSampleKernel.cpp
    ``_compute_indices_min_size_weights_aa``; timm layers/pos_embed.py ``resample_abs_pos_embed``.
    """
    spacing = size_in / size_out
    distance = centres(size_out, spacing)[:, None] - np.arange(size_in)
    weights = keys(distance / max(spacing, 1.0), a=-0.5)
    return weights / weights.sum(axis=1, keepdims=True)


def torch_bilinear(size_in: int, size_out: int) -> np.ndarray:
    """Linear, half-pixel centres, not antialiased; what timm does with Google's .npz files.

    Source: ``interpolate(mode="bilinear", align_corners=False)`` of PyTorch; timm
    models/vision_transformer.py ``_load_weights``.
    """
    return _linear(size_in, centres(size_out, size_in / size_out))


def bilinear_align_corners(size_in: int, size_out: int) -> np.ndarray:
    """Linear, corners on corners; Google's vit_jax and big_vision.

    Source: ``scipy.ndimage.zoom(order=1)`` in vit_jax/checkpoint.py ``load_pretrained``. Where
    SciPy's last position is rounded to beyond the corner, it makes the last row 0 (32 to 16 is one
    such pair of sizes); here that row is the corner's, as for all other sizes.
    """
    return _linear(size_in, np.linspace(0.0, size_in - 1.0, size_out))


METHODS: dict[str, Callable[[int, int], np.ndarray]] = {
    "torch_bicubic": torch_bicubic,
    "torch_bicubic_antialias": torch_bicubic_antialias,
    "torch_bilinear": torch_bilinear,
    "bilinear_align_corners": bilinear_align_corners,
    "dino_bicubic": dino_bicubic,
}
"""From (size_in, size_out) to the matrix of one axis, (size_out, size_in) in float64."""


def resize_table(
    table: np.ndarray,
    grid: tuple[int, int],
    target: tuple[int, int],
    method: str,
    prefix: int = 0,
) -> np.ndarray:
    """Resize a table of positions to another grid; to the same grid, it stays bit for bit.

    Args:
        table: (1, prefix + rows * columns, dim), row-major over the grid.
        grid: rows and columns of the table.
        target: rows and columns wanted.
        method: a name in ``METHODS``.
        prefix: how many entries come before the grid (class token, registers); kept as they are.

    Returns:
        (1, prefix + target rows * columns, dim) in the table's dtype, computed in float64.

    Raises:
        InputError: if the method is unknown, a size is below 1, or the table does not fit the grid.
    """
    if method not in METHODS:
        raise InputError(f"method={method!r} is unknown; there are {', '.join(METHODS)}")
    if min(*grid, *target) < 1 or prefix < 0:
        raise InputError(f"sizes start at 1 and prefix at 0, got {grid=}, {target=}, {prefix=}")
    tokens = prefix + grid[0] * grid[1]
    if table.ndim != 3 or table.shape[:2] != (1, tokens):
        raise InputError(
            f"a table of {prefix} + {grid[0]} * {grid[1]} positions has the shape "
            f"(1, {tokens}, dim), got {table.shape}"
        )
    if grid == target:
        return table.copy()
    rows, columns = (METHODS[method](*sizes) for sizes in zip(grid, target, strict=True))
    patches = table[0, prefix:].astype(np.float64).reshape(*grid, -1)  # (rows, columns, dim)
    resized = np.einsum("ir,jc,rcd->ijd", rows, columns, patches, optimize=True)
    resized = resized.reshape(1, target[0] * target[1], -1).astype(table.dtype)
    return np.concatenate([table[:, :prefix], resized], axis=1)


def _linear(size_in: int, centres: np.ndarray) -> np.ndarray:
    """A hat of width 2 around each centre; beyond the border, the border's value."""
    distance = np.clip(centres, 0.0, size_in - 1.0)[:, None] - np.arange(size_in)
    return np.maximum(1.0 - np.abs(distance), 0.0)
