"""What a backend does, as a protocol; each ``runtime`` module is one.

Arrays go in and come out as NumPy: float64 stays float64, everything else comes out as float32,
which holds bfloat16 exactly. Images are (batch, height, width, channels). What an objective takes
beside them (``others``) goes to the model by the names of its arguments; integers stay integers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np

from isovit.spec.config import BaseConfig

Model = Any
Weights = Mapping[str, np.ndarray]
Others = Mapping[str, np.ndarray]

NO_OTHERS: Others = MappingProxyType({})
"""What a model takes that is no objective."""


class Gradients(NamedTuple):
    """Gradients of a scalar loss.

    Attributes:
        images: (batch, height, width, channels).
        weights: of every trainable parameter, by canonical path, in canonical layout.
    """

    images: np.ndarray
    weights: dict[str, np.ndarray]


class Optimizer(NamedTuple):
    """Numbers of AdamW, which no framework's default decides."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.05


class Setting(NamedTuple):
    """Where and how exactly a model computes, read back from its framework.

    Attributes:
        device: as the framework calls it: ``cpu``, ``NVIDIA H200``, ``TPU v4``.
        precision: dtype of the parameters, and the switches that round products of float32.
    """

    device: str
    precision: str


class Backend(Protocol):
    """The functions of a ``runtime`` module."""

    def build(
        self,
        config: BaseConfig,
        weights: Weights,
        *,
        dtype: str = "float32",
        device: str | None = None,
    ) -> Model:
        """A model with these canonical weights, in evaluation mode.

        Raises:
            InputError: if the weights do not fit the config, or there is no such device.
        """
        ...

    def require_device(self, device: str) -> None:
        """Check that this process has a device.

        Raises:
            InputError: saying what was wanted, what is there and what to do.
        """
        ...

    def read(self, model: Model) -> dict[str, np.ndarray]:
        """The model's weights, canonical, in the order of the param tree."""
        ...

    def write(self, model: Model, weights: Weights) -> None:
        """Put canonical weights into a model; its dtype stays."""
        ...

    def forward(self, model: Model, images: np.ndarray, others: Others = NO_OTHERS) -> np.ndarray:
        """The model's output in evaluation mode."""
        ...

    def trace(
        self, model: Model, images: np.ndarray, others: Others = NO_OTHERS
    ) -> dict[str, np.ndarray]:
        """Output of every module of the param tree by path, ``""`` for the model's own.

        Of a module that runs several times, that of the last.
        """
        ...

    def gradients(
        self,
        model: Model,
        images: np.ndarray,
        cotangent: np.ndarray,
        others: Others = NO_OTHERS,
    ) -> Gradients:
        """Gradients of the loss Σ output · cotangent in evaluation mode."""
        ...

    WAYS: tuple[str, ...]
    """Ways to run a model, the usual first: ``eager``, ``compile``, ``torchax``, ``jit``,
    ``graph``, ``xla``, ``onnxruntime``."""

    def put(self, model: Model, array: np.ndarray) -> Any:
        """An array on the device of the model, in its dtype; integers stay integers.

        The whole of it is there when this returns.
        """
        ...

    def inference(self, model: Model, images: Any, way: str) -> Callable[[], object]:
        """One forward pass, as a function that returns its output when the device is done.

        Args:
            model: in float32, say; it is put into evaluation mode.
            images: as ``put`` gives them.
            way: one of ``WAYS``.
        """
        ...

    def training(self, model: Model, images: Any, labels: Any, way: str) -> Callable[[], object]:
        """One step of AdamW on the mean cross-entropy, as a function that returns the loss.

        The optimiser's numbers are those of ``Optimizer``; the model's weights change.

        Raises:
            InputError: if the way has no gradients.
        """
        ...

    def exact_arithmetic(self) -> None:
        """Switch off, for this process, whatever rounds products of float32 (TF32, bfloat16)."""
        ...

    def setting(self, model: Model, way: str) -> Setting:
        """Where a model runs by a way, and what this process does to its products."""
        ...

    def device_memory(self, model: Model, way: str) -> int | None:
        """The most bytes that this process has had on the model's accelerator.

        Returns:
            None on a CPU, and where nobody counts.
        """
        ...

    def synchronize(self, model: Model) -> None:
        """Wait until the device has done all that was asked of it."""
        ...


class NativeFiles(Protocol):
    """What the ``runtime`` modules of Flax and Keras add: files that only they can write.

    A torch state dict, an npz and a safetensors file need nothing of the model.
    """

    def save_native(self, config: BaseConfig, weights: Weights, path: Path) -> None:
        """Write a file or folder that the framework's own tools read.

        Raises:
            InputError: if it cannot hold the dtype of the weights.
        """
        ...

    def load_native(self, config: BaseConfig, path: Path) -> dict[str, np.ndarray]:
        """Read such a file back; whether the arrays fit the config is for the caller to check.

        Raises:
            InputError: if it is none, or cannot be read without its config and does not fit it.
        """
        ...
