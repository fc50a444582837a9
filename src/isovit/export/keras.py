"""Forms of a Keras model, on whichever engine this process has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras
import numpy as np

from isovit.backends.onnx.layout import BATCH, INPUT, OUTPUT
from isovit.export.forms import Target

ENGINE = keras.backend.backend()


def write_onnx(model: Any, path: Path, target: Target) -> None:
    """Write ONNX."""
    {"tensorflow": _onnx_tensorflow, "jax": _onnx_jax, "torch": _onnx_torch}[ENGINE](
        model, path, target
    )


def write_saved_model(model: Any, path: Path, target: Target) -> None:
    """Write a SavedModel; without ``model.export``, which in Keras 3.15 stores variables twice."""
    import tensorflow as tf

    config = model.config
    shape = (target.batch, *config.image_size, config.in_channels)
    images = tf.TensorSpec(shape, tf.float32, name=INPUT)
    module: Any = tf.Module()
    make = _serving_tensorflow if ENGINE == "tensorflow" else _serving_jax
    with _erf_for_tensorflow():
        module.weights, serve = make(model, target)
        module.serve = tf.function(serve, input_signature=[images], autograph=False)
        named = tf.function(
            lambda images: {OUTPUT: module.serve(images)}, input_signature=[images], autograph=False
        )
        tf.saved_model.save(module, str(path), signatures={"serving_default": named})


Served = tuple[list[Any], Callable[[Any], Any]]
"""The variables of a model, and its function of images; both TensorFlow's."""


def _serving_tensorflow(model: Any, target: Target) -> Served:
    return [variable.value for variable in model.variables], lambda x: model(x, training=False)


def _serving_jax(model: Any, target: Target) -> Served:
    import tensorflow as tf
    from jax.experimental import jax2tf

    trained, fixed = model.trainable_variables, model.non_trainable_variables
    arrays = [np.asarray(variable.value) for variable in (*trained, *fixed)]
    weights = [tf.Variable(tf.constant(array)) for array in arrays]

    def function(weights: list[Any], images: Any) -> Any:
        split = len(trained)
        return model.stateless_call(weights[:split], weights[split:], images, training=False)[0]

    free = None if target.batch else f"({BATCH}, ...)"
    converted = jax2tf.convert(function, polymorphic_shapes=[None, free], with_gradient=False)
    return weights, lambda images: converted(weights, images)


def open_saved_model(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """The function of a SavedModel."""
    import tensorflow as tf

    loaded: Any = tf.saved_model.load(str(path))
    return lambda images: loaded.serve(tf.constant(images)).numpy()


def _onnx_tensorflow(model: Any, path: Path, target: Target) -> None:
    import onnx_ir as ir

    from isovit.backends.onnx import graph

    config, raw = model.config, path.with_name("raw.onnx")
    shape = (target.batch, *config.image_size, config.in_channels)
    images = keras.InputSpec(dtype="float32", shape=shape, name=INPUT)
    model.export(
        raw, format="onnx", verbose=False, input_signature=[images], opset_version=target.opset
    )
    graph.write(graph.finish(ir.load(raw), config), path)
    raw.unlink()


def _onnx_jax(model: Any, path: Path, target: Target) -> None:
    from isovit.export.from_jax import write

    trained = [variable.value for variable in model.trainable_variables]
    fixed = [variable.value for variable in model.non_trainable_variables]

    def function(images: Any) -> Any:
        return model.stateless_call(trained, fixed, images, training=False)[0]

    write(function, model.config, path, target)


def _onnx_torch(model: Any, path: Path, target: Target) -> None:
    """By way of torch: Keras 3.15's own route fails at LayerNormalization for a free batch."""
    import torch

    from isovit.export.torch import write_onnx as write

    class Inference(torch.nn.Module):
        """The model with the argument of evaluation mode filled in."""

        def __init__(self) -> None:
            super().__init__()
            self.model, self.config = model, model.config

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.model(images, training=False)

    write(Inference().eval(), path, target)


@contextmanager
def _erf_for_tensorflow() -> Iterator[None]:
    """Within it JAX writes erf in operations that TensorFlow 2.21 reads.

    JAX 0.10 keeps erf as ``vhlo.composite_v2``, of a newer StableHLO than TensorFlow has; erfc it
    writes out (github.com/openxla/xla/pull/47670).
    """
    if ENGINE != "jax":
        yield
        return
    import jax

    erf = jax.lax.erf
    jax.lax.erf = lambda x: 1 - jax.lax.erfc(x)
    try:
        yield
    finally:
        jax.lax.erf = erf
