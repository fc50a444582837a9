"""Programs for accelerators that are not here: JAX lowers for them, and the text can be read."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from isovit.spec.config import Config

Mode = Literal["infer", "train"]
Plant = Callable[[Any], Any]

PLATFORMS = ("tpu", "cuda")
BATCH = 2
NAMES = {"float32": "f32", "bfloat16": "bf16"}

PRODUCT = re.compile(r"stablehlo\.(?:dot_general|convolution)[^\n]*")
OPERANDS = re.compile(r": \(tensor<(?:\d+x)*(\w+)>, tensor<(?:\d+x)*(\w+)>\) -> tensor")
CUSTOM_CALL = re.compile(r"custom_call @(\w+)")


def trace(backend: str, config: Config, dtype: str, mode: Mode, plant: Plant | None = None) -> Any:
    """A step of a model as JAX traces it, from shapes alone; 32-bit as a user's JAX is.

    Args:
        backend: ``flax`` or ``keras:jax``.
        config: of any family and any size.
        dtype: ``float32`` or ``bfloat16``.
        mode: a forward pass, or a step of AdamW as it is timed.
        plant: a fault, applied to the output of a forward pass.
    """
    import jax

    with jax.enable_x64(False):
        images = jax.ShapeDtypeStruct((BATCH, *config.image_size, config.in_channels), dtype)
        labels = jax.ShapeDtypeStruct((BATCH,), np.int32)
        make = _flax if backend == "flax" else _keras
        run, arguments = make(config, dtype, mode, images, labels)
        if plant is not None:
            whole = run
            run = jax.jit(lambda *arguments: plant(whole(*arguments)))
        return run.trace(*arguments)


def lower(traced: Any, platform: str) -> str:
    """The program for a platform, in StableHLO."""
    import jax

    with jax.enable_x64(False):
        return traced.lower(lowering_platforms=(platform,)).as_text()


def faults(text: str, dtype: str, products: int, *, upcast: bool = False) -> list[str]:
    """What is wrong with a program.

    Args:
        text: StableHLO.
        dtype: that the model should compute in.
        products: how many there must be at least.
        upcast: whether the config asks for float32 in some products of a narrower model.
    """
    found = [f"calls {name}" for name in CUSTOM_CALL.findall(text)]
    if re.search(r"[<x]f64>", text):
        found.append("computes in float64")
    lines = PRODUCT.findall(text)
    if len(lines) < products:
        found.append(f"{len(lines)} products, wanted {products}")
    allowed = {NAMES[dtype]} | ({"f32"} if upcast else set())
    for line in lines:
        operands = OPERANDS.search(line)
        if operands is None or not set(operands.groups()) <= allowed:
            found.append(f"not in {dtype}: {line[-120:]}")
        elif "f32" in operands.groups() and "HIGHEST" not in line:
            found.append(f"rounded before it is multiplied: {line[-120:]}")
    if not any(NAMES[dtype] in line for line in lines):
        found.append(f"no product in {dtype}")
    return found


def _flax(config: Config, dtype: str, mode: Mode, images: Any, labels: Any) -> tuple[Any, Any]:
    import jax
    from flax import nnx

    from isovit.backends.flax import runtime

    model = runtime._shapes(config, dtype)
    if mode == "infer":
        model.eval()
        graphdef, state = nnx.split(model)
        return jax.jit(lambda state, x: runtime._forward(graphdef, state, x)), (state, images)
    model.train()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    state = jax.eval_shape(runtime._optimizer().init, params)
    return runtime._update, (graphdef, params, rest, state, images, labels)


def _keras(config: Config, dtype: str, mode: Mode, images: Any, labels: Any) -> tuple[Any, Any]:
    import jax
    import keras

    from isovit.backends.keras import runtime

    def shapes(variables: Any) -> list[Any]:
        return [jax.ShapeDtypeStruct(variable.shape, variable.dtype) for variable in variables]

    with keras.StatelessScope(initialize_variables=False):  # variables without values
        model = runtime._empty(config, dtype)
    held = shapes(model.trainable_variables), shapes(model.non_trainable_variables)
    if mode == "infer":

        @jax.jit
        def run(trained: Any, fixed: Any, x: Any) -> Any:
            return model.stateless_call(trained, fixed, x, training=False)[0]

        return run, (*held, images)
    runtime._prepare_training(model, "jit")
    with keras.StatelessScope(initialize_variables=False):
        model.optimizer.build(model.trainable_variables)
        model._symbolic_build(data_batch=(images, labels))
    state = (*held, shapes(model.optimizer.variables), shapes(model.metrics_variables))
    return jax.jit(model.train_step), (state, (images, labels))
