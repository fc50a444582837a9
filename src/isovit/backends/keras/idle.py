"""Layers that mostly do nothing, and then cost nothing.

The call of any Keras layer takes a tenth of a millisecond and more where nothing is compiled, on
torch: 135 of the 282 calls of ``t2t_vit_14`` do nothing, see docs/decisions/fast-paths.md.
"""

from __future__ import annotations

from typing import Any

import keras

Tensor = Any  # of whichever engine runs


class Idle(keras.layers.Layer):
    """A layer that hands on what it is given, but at a positive ``rate`` in training."""

    rate: float

    def __call__(self, x: Tensor, training: bool | None = None) -> Tensor:
        """What the layer makes of x, or x."""
        return super().__call__(x, training=training) if training and self.rate > 0.0 else x


class Dropout(Idle, keras.layers.Dropout):
    """Dropout; Srivastava et al. 2014, JMLR 15, section 4."""


class Identity(keras.layers.Identity):
    """What stands where a config leaves a layer out."""

    def __call__(self, x: Tensor, training: bool | None = None) -> Tensor:
        """As it is."""
        return x
