"""Position tables on another grid: equal to what PyTorch, SciPy, timm and DINO make of them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest

pytest.importorskip("torch", reason="most originals are PyTorch's")

import ml_dtypes
import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given
from hypothesis import strategies as st

from isovit.errors import InputError
from isovit.weight_convert.resize import METHODS, resize_table
from parity_tests.oracles.importing import import_oracle

Grid = tuple[int, int]

LIMIT = 1e-12
"""Of the largest value, in float64: the weights are of order 1, and at most 20 * 20 are added."""
LIMIT_FLOAT32 = 16 * float(np.finfo(np.float32).eps)
"""For an original that computes in float32 whatever it is given."""
APART = 1e-3
"""By at least so much do two methods differ; an equality test within ``LIMIT`` tells them apart."""


def dino(patches: torch.Tensor, target: Grid) -> torch.Tensor:
    """DINO's ``interpolate_pos_encoding``, for a grid that need not be square."""
    factors = [(new + 0.1) / old for new, old in zip(target, patches.shape[2:], strict=True)]
    resized = F.interpolate(patches, scale_factor=tuple(factors), mode="bicubic")
    assert resized.shape[2:] == target
    return resized


ORIGINALS: dict[str, Callable[[torch.Tensor, Grid], torch.Tensor]] = {
    "torch_bicubic": lambda x, size: F.interpolate(x, size, mode="bicubic", align_corners=False),
    "torch_bicubic_antialias": lambda x, size: F.interpolate(
        x, size, mode="bicubic", align_corners=False, antialias=True
    ),
    "torch_bilinear": lambda x, size: F.interpolate(x, size, mode="bilinear", align_corners=False),
    "bilinear_align_corners": lambda x, size: F.interpolate(
        x, size, mode="bilinear", align_corners=True
    ),
    "dino_bicubic": dino,
}
"""What each method stands for; (1, dim, rows, columns) to the same on another grid."""

grids = st.tuples(st.integers(1, 20), st.integers(1, 20))


def random_table(grid: Grid, prefix: int = 0, dim: int = 3, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng([seed, *grid])
    return generator.standard_normal((1, prefix + grid[0] * grid[1], dim))


def original(table: np.ndarray, grid: Grid, target: Grid, method: str) -> np.ndarray:
    patches = torch.from_numpy(table).reshape(1, *grid, -1).permute(0, 3, 1, 2)
    resized = ORIGINALS[method](patches, target)
    return resized.permute(0, 2, 3, 1).reshape(1, target[0] * target[1], -1).numpy()


def difference(found: np.ndarray, wanted: np.ndarray) -> float:
    """Largest difference over the largest value."""
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def test_every_method_has_an_original() -> None:
    assert ORIGINALS.keys() == METHODS.keys()


@pytest.mark.parametrize("method", METHODS)
@given(grid=grids, target=grids)
@example(grid=(14, 14), target=(24, 24))
@example(grid=(14, 14), target=(14, 20))
@example(grid=(16, 16), target=(37, 37))
@example(grid=(37, 37), target=(16, 7))
@example(grid=(1, 20), target=(20, 1))
@example(grid=(5, 1), target=(9, 1))
@example(grid=(5, 3), target=(2, 1))
def test_a_table_becomes_what_the_original_makes_of_it(
    method: str, grid: Grid, target: Grid
) -> None:
    assume(grid != target)  # then nothing is computed, in DINO's model either
    table = random_table(grid)
    found = resize_table(table, grid, target, method)
    assert difference(found, original(table, grid, target, method)) < LIMIT


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size_in", range(1, 21))
def test_the_matrix_of_an_axis_is_the_originals(method: str, size_in: int) -> None:
    """Every size, equal ones too: the identity, put in, shows the matrix itself.

    Along the columns: with ``antialias`` on the CPU, PyTorch 2.13 fills a contiguous tensor of one
    column with its first row. A table comes to it permuted, which it does rightly.
    """
    identity = torch.eye(size_in, dtype=torch.float64)[None, :, None]  # (1, dim, 1, columns)
    for size_out in range(1, 41):
        found = METHODS[method](size_in, size_out)
        wanted = ORIGINALS[method](identity, (1, size_out))
        assert found.dtype == np.float64
        assert difference(found, wanted[0, :, 0].numpy().T) < LIMIT
        np.testing.assert_allclose(found.sum(axis=1), 1.0, atol=LIMIT)


@pytest.mark.parametrize("grid_and_target", [((7, 12), (12, 7)), ((14, 14), (24, 24))])
@pytest.mark.parametrize("other", METHODS)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_no_other_methods_original(
    method: str, other: str, grid_and_target: tuple[Grid, Grid]
) -> None:
    """Negative control: the comparison above fails for each of the wrong originals."""
    grid, target = grid_and_target
    table = random_table(grid)
    apart = difference(
        resize_table(table, grid, target, method), original(table, grid, target, other)
    )
    assert apart < LIMIT if other == method else apart > APART


def test_the_two_cubic_kernels_differ_far_from_the_border_too() -> None:
    """Negative control: enlarging, and away from the border, a is all that differs."""
    middle = slice(8, 32)
    plain, antialias = (
        METHODS[name](20, 40)[middle] for name in ("torch_bicubic", "torch_bicubic_antialias")
    )
    np.testing.assert_array_equal(plain != 0, antialias != 0)
    assert difference(plain, antialias) > APART


def test_antialiasing_reads_more_when_shrinking() -> None:
    """Negative control: a third of the size makes the kernel three times as wide."""
    count = {name: np.count_nonzero(METHODS[name](60, 20)[10]) for name in METHODS}
    assert count["torch_bicubic_antialias"] == 9  # 5 each way, but for the zeros at 3
    assert count["torch_bicubic"] == 1  # every third input, hit in its centre
    assert count["torch_bilinear"] == 1


def test_dinos_factor_gives_the_plain_method_when_recomputed() -> None:
    """Negative control: what sets DINO apart is the factor that PyTorch keeps."""
    patches = torch.from_numpy(random_table((14, 14))).reshape(1, 14, 14, -1).permute(0, 3, 1, 2)
    recomputed = F.interpolate(
        patches, scale_factor=24.1 / 14, mode="bicubic", recompute_scale_factor=True
    )
    wanted = ORIGINALS["torch_bicubic"](patches, (24, 24))
    assert difference(recomputed.numpy(), wanted.numpy()) < LIMIT
    assert difference(dino(patches, (24, 24)).numpy(), wanted.numpy()) > APART


def scipy_overshoots(size_in: int, size_out: int) -> bool:
    """Whether SciPy's last position, rounded, lies beyond the corner; it then reads a 0 there."""
    last = size_out - 1
    return last > 0 and (size_in - 1) / last * last > size_in - 1


@pytest.mark.oracles
def test_corners_on_corners_is_what_google_does(pytestconfig: pytest.Config) -> None:
    """All square grids to 40: equal, but for the last row and column of 22 pairs of sizes.

    There SciPy (1.17) reads beyond the corner, by its rounding, and puts in 0. The pairs are known
    from the arithmetic: not 7 to 12, 14 to 24, 16 to 28; but 8 to 26, 16 to 30, 24 to 22, 32 to 16.
    """
    zoom = import_oracle("scipy.ndimage", pytestconfig).zoom
    excused = set()
    for size_in, size_out in product(range(1, 41), repeat=2):
        grid, target, factor = (size_in, size_in), (size_out, size_out), size_out / size_in
        table = random_table(grid, dim=2)
        found = resize_table(table, grid, target, "bilinear_align_corners").reshape(*target, -1)
        wanted = zoom(table.reshape(*grid, -1), (factor, factor, 1), order=1)  # as in vit_jax
        if scipy_overshoots(size_in, size_out):
            excused.add((size_in, size_out))
            assert not wanted[-1].any() or difference(found, wanted) < LIMIT
            found, wanted = found[:-1, :-1], wanted[:-1, :-1]
        assert difference(found, wanted) < LIMIT, (size_in, size_out)
    assert len(excused) == 22
    assert excused >= {(8, 26), (16, 30), (24, 22), (32, 16)}
    assert excused.isdisjoint({(7, 12), (14, 24), (16, 28)})


@pytest.mark.oracles
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("torch_bicubic_antialias", {}),
        ("torch_bicubic", {"antialias": False}),
        ("torch_bilinear", {"interpolation": "bilinear", "antialias": False}),
    ],
)
@pytest.mark.parametrize("target", [(24, 24), (7, 9), (14, 20)])
def test_timm_makes_the_same_of_a_table(
    method: str, options: dict, target: Grid, pytestconfig: pytest.Config
) -> None:
    layers = import_oracle("timm.layers", pytestconfig)
    table = random_table((14, 14), prefix=2)
    found = resize_table(table, (14, 14), target, method, prefix=2)
    wanted = layers.resample_abs_pos_embed(
        torch.from_numpy(table), list(target), [14, 14], num_prefix_tokens=2, **options
    ).numpy()
    assert difference(found, wanted) < LIMIT_FLOAT32


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_dtype_is_kept_and_all_is_computed_in_float64(dtype: type, method: str) -> None:
    table = random_table((4, 6), prefix=1).astype(dtype)
    found = resize_table(table, (4, 6), (7, 5), method, prefix=1)
    wanted = resize_table(table.astype(np.float64), (4, 6), (7, 5), method, prefix=1)
    assert found.dtype == dtype
    assert found.tobytes() == wanted.astype(dtype).tobytes()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_the_prefix_is_carried_bit_for_bit(prefix: int, method: str) -> None:
    table = random_table((4, 6), prefix).astype(np.float32)
    table[:, :prefix, 0] = -0.0
    table[:, :prefix, 1] = np.nan
    found = resize_table(table, (4, 6), (3, 8), method, prefix)
    assert found.shape == (1, prefix + 24, 3)
    assert found[:, :prefix].tobytes() == table[:, :prefix].tobytes()
    alone = resize_table(table[:, prefix:], (4, 6), (3, 8), method)
    np.testing.assert_array_equal(found[:, prefix:], alone)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, ml_dtypes.bfloat16])
def test_the_same_grid_keeps_every_bit(dtype: type, method: str) -> None:
    table = random_table((4, 6), prefix=1).astype(dtype)
    table[0, 3] = [-0.0, np.nan, np.inf]
    found = resize_table(table, (4, 6), (4, 6), method, prefix=1)
    assert found.dtype == dtype
    assert found.tobytes() == table.tobytes()
    assert not np.shares_memory(found, table)


def test_a_grid_of_another_aspect_and_as_many_positions_is_resized() -> None:
    table = random_table((4, 6))
    found = resize_table(table, (4, 6), (6, 4), "torch_bilinear")
    assert found.shape == table.shape
    assert difference(found, table) > APART


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match="method='bicubic' is unknown; there are") as error:
        resize_table(random_table((2, 2)), (2, 2), (3, 3), "bicubic")
    assert all(name in str(error.value) for name in METHODS)


@pytest.mark.parametrize("shape", [(1, 24, 3), (1, 26, 3), (2, 25, 3), (25, 3), (1, 25), (1, 4, 6)])
@pytest.mark.parametrize("target", [(4, 6), (3, 8)])
def test_a_table_that_does_not_fit_the_grid_is_refused(
    shape: tuple[int, ...], target: Grid
) -> None:
    with pytest.raises(InputError, match=r"1 \+ 4 \* 6 positions has the shape \(1, 25, dim\)"):
        resize_table(np.zeros(shape), (4, 6), target, "torch_bicubic", prefix=1)


@pytest.mark.parametrize(
    ("grid", "target", "prefix"),
    [((2, 2), (0, 3), 0), ((-2, -2), (3, 3), 0), ((2, 2), (3, -1), 0), ((5, 1), (3, 3), -1)],
)
def test_sizes_that_are_none_are_refused(grid: Grid, target: Grid, prefix: int) -> None:
    with pytest.raises(InputError, match="sizes start at 1 and prefix at 0, got"):
        resize_table(np.zeros((1, 4, 3)), grid, target, "torch_bicubic", prefix)
