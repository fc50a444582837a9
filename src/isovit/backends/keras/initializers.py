"""What the kernels of Keras models begin as, before weights are written or training starts."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
from keras import ops


class Glorot(keras.initializers.GlorotUniform):
    """Uniform between ±√(6 / (inputs + outputs)); Glorot & Bengio 2010, eq. 16.

    Keras's own draws by the engine, and JAX compiles that for every shape: 2 s for ``t2t_vit_14``.
    """

    def __call__(self, shape: tuple[int, ...], dtype: str | None = None) -> Any:
        """A kernel whose last two axes are inputs and outputs."""
        *window, dim, dim_out = shape
        limit = math.sqrt(6.0 / (math.prod(window) * (dim + dim_out)))
        seed: Any = self.seed  # a number: none was given
        drawn = np.random.default_rng(seed).uniform(-limit, limit, shape)
        kind = dtype if dtype in ("float32", "float64") else "float32"  # NumPy has no bfloat16
        return ops.convert_to_tensor(drawn.astype(kind), dtype=dtype)


def glorot() -> Any:
    """Initialiser of one kernel; another for the next, as each gives the same numbers again."""
    return Glorot()
