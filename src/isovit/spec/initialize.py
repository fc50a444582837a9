"""Seeded weights from a param tree, in NumPy: the same bits on every machine and every run.

Each parameter has a generator of its own, seeded by the seed and the parameter's path. What one
parameter gets therefore depends neither on the others nor on their order.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable

import numpy as np

from isovit.spec.config import BaseConfig
from isovit.spec.families import param_tree
from isovit.spec.param import STATISTICS, Init, Param, Role
from isovit.spec.positions import sincos_positions, sinusoidal_positions

Array = np.ndarray
Draw = Callable[[np.random.Generator, tuple[int, ...], Init], Array]


def init(config: BaseConfig, seed: int = 0) -> dict[str, Array]:
    """Draw canonical weights by the initialisation that ``config.init_scheme`` names.

    Args:
        config: any family's config.
        seed: any non-negative integer.

    Returns:
        float32 arrays by canonical path, in the order of the param tree.
    """
    params = param_tree(config).parameters()
    return {path: draw(param, path, seed) for path, param in params.items()}


def draw(param: Param, path: str, seed: int) -> Array:
    """One parameter of ``init``: float32, by the seed and its path alone, or that of its source."""
    rng, init = _generator(seed, param.source or path), param.init
    return INITIALIZERS[init.kind](rng, param.shape, init)


def probe(config: BaseConfig, seed: int = 0) -> dict[str, Array]:
    """Draw weights under which every parameter shows in the output.

    Published initialisations hide faults: zero biases hide a missing bias, unit scales a missing
    norm, and kernels of 0.02 a permuted q and k. Here kernels keep the variance of their input,
    scales are 1 + N(0, 0.2²), biases N(0, 0.2²), tokens and positions N(0, 0.5²), running means
    N(0, 0.2²) and running variances the exponential of such a number. Parameters that nothing moves
    (sinusoid, random features) are what they always are.

    Args:
        config: any family's config.
        seed: any non-negative integer.

    Returns:
        float32 arrays by canonical path, in the order of the param tree.
    """
    weights = init(config, seed)
    for path, param in param_tree(config).parameters().items():
        if param.trainable or param.moves or param.role in STATISTICS:
            mean, std = _probe_moments(param)
            noise = _generator(seed, "probe." + path).standard_normal(param.shape)
            drawn = mean + std * param.probe_gain * noise
            drawn = np.exp(drawn) if param.role is Role.NORM_VAR else drawn
            weights[path] = drawn.astype(np.float32)
    return weights


def _generator(seed: int, path: str) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(path.encode())])


def _probe_moments(param: Param) -> tuple[float, float]:
    match param.role:
        case Role.DENSE_KERNEL | Role.CONV_KERNEL | Role.DEPTHWISE_KERNEL:
            return 0.0, 1 / math.sqrt(math.prod(param.shape[:-1]))
        case Role.NORM_SCALE:
            return 1.0, 0.2
        case Role.BIAS | Role.NORM_BIAS | Role.NORM_MEAN | Role.NORM_VAR:
            return 0.0, 0.2
        case Role.OWN:
            return 0.0, 0.5


def _constant(_: np.random.Generator, shape: tuple[int, ...], init: Init) -> Array:
    return np.full(shape, init.value, np.float32)


def _normal(rng: np.random.Generator, shape: tuple[int, ...], init: Init) -> Array:
    return (init.value * rng.standard_normal(shape)).astype(np.float32)


def _uniform(rng: np.random.Generator, shape: tuple[int, ...], init: Init) -> Array:
    return rng.uniform(-init.value, init.value, shape).astype(np.float32)


def _trunc_normal(rng: np.random.Generator, shape: tuple[int, ...], init: Init) -> Array:
    """N(0, std²) cut at ±2 in absolute units, as in timm: for std 0.02 the cut never bites."""
    return _cut_normal(rng, shape, cut=2.0 / init.value, std=init.value)


def _lecun_normal(rng: np.random.Generator, shape: tuple[int, ...], init: Init) -> Array:
    """Normal cut at two deviations and widened to have deviation ``std``, as in Flax."""
    return _cut_normal(rng, shape, cut=2.0, std=init.value / 0.87962566103423978)


def _cut_normal(rng: np.random.Generator, shape: tuple[int, ...], cut: float, std: float) -> Array:
    values = rng.standard_normal(shape)
    while (outside := np.abs(values) > cut).any():
        values[outside] = rng.standard_normal(int(outside.sum()))
    return (std * values).astype(np.float32)


def _orthogonal_rows(rng: np.random.Generator, shape: tuple[int, ...], init: Init) -> Array:
    """Orthogonal rows of one norm."""
    return (init.value * _orthonormal(rng.standard_normal(shape))).astype(np.float32)


def _orthogonal_normal(rng: np.random.Generator, shape: tuple[int, ...], init: Init) -> Array:
    """Rows each of which is normal, though they are orthogonal, as many at a time as can be."""
    features, dim = shape
    normal = rng.standard_normal(shape)
    blocks = [_orthonormal(normal[first : first + dim]) for first in range(0, features, dim)]
    lengths = [math.sqrt(math.fsum((row * row).tolist())) for row in rng.standard_normal(shape)]
    return (init.value * np.array(lengths)[:, None] * np.concatenate(blocks)).astype(np.float32)


def _orthonormal(vectors: Array) -> Array:
    """Rows made orthonormal, by Gram-Schmidt with exact sums: LAPACK differs by machine."""
    rows: list[Array] = []
    for row in vectors:
        for _ in range(2):  # the second pass removes what rounding left
            for other in rows:
                row = row - math.fsum((row * other).tolist()) * other
        rows.append(row / math.sqrt(math.fsum((row * row).tolist())))
    return np.array(rows)


def _sinusoid(_: np.random.Generator, shape: tuple[int, ...], init: Init) -> Array:
    return sinusoidal_positions(shape[1], shape[2], init.value)[None]


def _sincos_2d(_: np.random.Generator, shape: tuple[int, ...], init: Init) -> Array:
    assert init.grid is not None, "the param tree says what the table is laid over"
    tokens, dim = shape[-2:]
    prefix = tokens - math.prod(init.grid)
    return sincos_positions(init.grid, dim, prefix, init.value).reshape(shape)


def orthogonal_features(features: int, dim: int, seed: int = 0) -> Array:
    """Random features of a performer that is not given any: orthogonal rows of norm √features.

    Unlike those of ``init`` their last bits depend on the machine: LAPACK makes them.

    Returns:
        (features, dim) float32.

    Source: Choromanski et al. 2021, arXiv:2009.14794, section 2.4, as in the official T2T-ViT code.
    """
    columns, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((dim, features)))
    return (math.sqrt(features) * columns.T).astype(np.float32)


def normal_features(features: int, dim: int, seed: int = 0) -> Array:
    """Random features of a performer over heads that is not given any: see ``orthogonal_normal``.

    Unlike those of ``init`` their last bits depend on the machine: LAPACK makes them.

    Returns:
        (features, dim) float32.

    Source: Choromanski et al. 2021, arXiv:2009.14794, section 2.4.
    """
    rng = np.random.default_rng(seed)
    counts = [min(dim, features - first) for first in range(0, features, dim)]
    rows = [np.linalg.qr(rng.standard_normal((dim, count)))[0].T for count in counts]
    lengths = np.linalg.norm(rng.standard_normal((features, dim)), axis=1, keepdims=True)
    return (lengths * np.concatenate(rows)).astype(np.float32)


INITIALIZERS: dict[str, Draw] = {
    "constant": _constant,
    "normal": _normal,
    "trunc_normal": _trunc_normal,
    "lecun_normal": _lecun_normal,
    "uniform": _uniform,
    "orthogonal_rows": _orthogonal_rows,
    "orthogonal_normal": _orthogonal_normal,
    "sinusoid": _sinusoid,
    "sincos_2d": _sincos_2d,
}
