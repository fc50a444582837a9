"""The backend under test: its runtime, and what only its framework's own tools can tell.

The protocol runs models in evaluation mode and speaks of canonical weights. Training mode, native
names and single layers are reached as a user of that framework would reach them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np

from isovit.backends.protocol import Backend, Gradients
from isovit.backends.torch.layout import COUNTER
from parity_tests.strategies import Case

Native = dict[str, tuple[tuple[int, ...], bool]]
"""Shape, and whether it trains, of every parameter by the framework's own name."""


@dataclass(frozen=True)
class Subject:
    """A backend under test.

    Attributes:
        name: as ``--backend`` takes it.
        runtime: its functions.
    """

    name: str
    runtime: Backend

    @property
    def framework(self) -> str:
        """The name without the engine."""
        return self.name.partition(":")[0]

    def module(self, name: str) -> ModuleType:
        """A module of the backend's package, ``layers`` or ``families.vit``."""
        return import_module(f"isovit.backends.{self.framework}.{name}")

    def build(self, case: Case, dtype: str = "float64") -> Any:
        """The model of a case."""
        return self.runtime.build(case.config, case.weights, dtype=dtype, device="cpu")

    def forward(self, case: Case, dtype: str = "float64") -> np.ndarray:
        """Output of the model of a case."""
        return self.runtime.forward(self.build(case, dtype), case.images, case.others)

    def trace(self, case: Case, dtype: str = "float64") -> dict[str, np.ndarray]:
        """Every activation of the model of a case, ``""`` for its output."""
        return self.runtime.trace(self.build(case, dtype), case.images, case.others)

    def gradients(self, case: Case) -> Gradients:
        """Gradients of the model of a case, in float64."""
        images, cotangent, others = case.inputs
        return self.runtime.gradients(self.build(case), images, cotangent, others)

    def tensor(self, array: np.ndarray) -> Any:
        """A float64 tensor of the framework."""
        if self.framework == "torch":
            import torch

            return torch.tensor(array, dtype=torch.float64)
        if self.framework == "flax":
            import jax.numpy as jnp

            return jnp.asarray(array, jnp.float64)
        import keras

        return keras.ops.convert_to_tensor(np.asarray(array, np.float64), dtype="float64")

    def array(self, tensor: Any) -> np.ndarray:
        """A tensor of the framework as NumPy."""
        if self.framework == "keras":
            import keras

            return keras.ops.convert_to_numpy(tensor)
        return np.asarray(tensor.detach() if hasattr(tensor, "detach") else tensor)

    def seed(self) -> None:
        """Make dropout repeatable; Flax's models always start from one seed. Call before build."""
        if self.framework == "torch":
            import torch

            torch.manual_seed(0)
        elif self.framework == "keras":
            import keras

            keras.utils.set_random_seed(0)

    def train(self, model: Any, images: np.ndarray) -> np.ndarray:
        """Output in training mode, by the framework's own switch."""
        x = self.tensor(images)
        if self.framework == "torch":
            model.train()
            output = model(x)
            model.eval()
        elif self.framework == "flax":
            model.train()
            output = _compiled()(model, x)
            model.eval()
        else:
            output = model(x, training=True)
        return self.array(output)

    def native(self, model: Any) -> Native:
        """What the framework itself says that the model holds."""
        if self.framework == "torch":
            state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
            counted = {name: t for name, t in state.items() if not name.endswith(COUNTER)}
            return {name: (tuple(t.shape), t.requires_grad) for name, t in counted.items()}
        if self.framework == "flax":
            from flax import nnx

            flat = nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.RngState)))
            return {
                ".".join(map(str, path)): (tuple(variable.shape), isinstance(variable, nnx.Param))
                for path, variable in flat
            }
        return {
            variable.path.partition("/")[2]: (tuple(variable.shape), variable.trainable)
            for variable in model.weights
        }

    def native_name(self, path: str) -> str:
        """The framework's own name of a canonical path; shapes and leaves are the layout's."""
        if self.framework == "keras":
            return re.sub(r"\.(\d+)", r"_\1", path).replace(".", "/")
        return path


@cache
def _compiled() -> Callable[[Any, Any], Any]:
    """A call of a Flax model, compiled once for each structure."""
    from flax import nnx

    return nnx.jit(lambda model, x: model(x))
