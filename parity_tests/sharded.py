"""A model over eight devices and over one.

``python -m parity_tests.sharded BACKEND DTYPE``, which ``test_sharding`` starts and asks for one
family after the other. The devices are the host's own, which JAX divides when it starts: hence a
process of its own. The batch lies over all of them, or over four pairs that divide heads and hidden
layers among the two.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from isovit.backends import get_backend
from isovit.parity.job import draw_inputs
from isovit.spec.config import Config
from isovit.spec.initialize import probe
from parity_tests.apart import Results, answer

DEVICES = 8
LABELS = np.arange(DEVICES, dtype=np.int32) % 5
BETA1 = 0.9

# Kernels whose columns, and kernels whose rows, the second axis of devices divides.
COLUMNS = r".*blocks[._]\d+[./].*(attn[./]qkv|mlp[./]fc1)[./]kernel"
COLUMN_BIASES = r".*blocks[._]\d+[./].*(attn[./]qkv|mlp[./]fc1)[./]bias"
ROWS = r".*blocks[._]\d+[./].*(attn[./]proj|mlp[./]fc2)[./]kernel"


def misplaced(array: jax.Array) -> jax.Array:
    """The same shards, each on the device after its own: the planted fault."""
    shards = sorted(array.addressable_shards, key=lambda shard: shard.device.id)
    turned = [*shards[1:], shards[0]]
    pieces = [jax.device_put(new.data, old.device) for old, new in zip(shards, turned, strict=True)]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, pieces)


def run_flax(config: Config, dtype: str) -> Results:
    """Outputs of a Flax model, over one device and over all; and a step of training."""
    from flax import nnx

    from isovit.backends.flax import runtime

    images = draw_inputs(config, DEVICES, 0).images
    model = runtime.build(config, probe(config), dtype=dtype, device="cpu")
    graphdef, state = nnx.split(model)
    auto = AxisType.Auto
    data = jax.make_mesh((DEVICES,), ("data",), axis_types=(auto,))
    both = jax.make_mesh((DEVICES // 2, 2), ("data", "model"), axis_types=(auto, auto))

    def spec(name: str) -> PartitionSpec:
        if re.fullmatch(COLUMNS, name):
            return PartitionSpec(None, "model")
        if re.fullmatch(COLUMN_BIASES, name):
            return PartitionSpec("model")
        return PartitionSpec("model", None) if re.fullmatch(ROWS, name) else PartitionSpec()

    def put(state: Any, mesh: Any, fault: str = "nowhere") -> Any:
        """A state's variables, each where its name says; all of them everywhere on one axis."""
        placed: list[Any] = []
        for path, variable in nnx.to_flat_state(state):
            name = ".".join(map(str, path))
            where = spec(name) if mesh is both else PartitionSpec()
            array = jax.device_put(variable.get_raw_value(), NamedSharding(mesh, where))
            array = misplaced(array) if re.fullmatch(fault, name) else array
            placed.append((path, variable.replace(array)))
        return nnx.from_flat_state(placed)

    def over(mesh: Any, array: np.ndarray) -> jax.Array:
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec("data")))

    def forward(mesh: Any, state: Any, x: jax.Array) -> jax.Array:
        output = runtime._forward(graphdef, state, x)
        assert {shard.data.shape[0] for shard in output.addressable_shards} == {
            DEVICES // mesh.shape["data"]
        }, "not divided"
        return output

    x = images.astype(dtype)
    found = {
        "one": runtime.forward(model, images),
        "data": forward(data, put(state, data), over(data, x)),
        "model": forward(both, put(state, both), over(both, x)),
        "data, misplaced": forward(data, put(state, data), misplaced(over(data, x))),
        "model, misplaced": forward(both, put(state, both, COLUMNS), over(both, x)),
    }
    model.train()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    for kind, mesh in (("one", None), ("data", data)):
        held, others = (params, rest) if mesh is None else (put(params, data), put(rest, data))
        held, others = jax.tree.map(lambda array: array.copy(), (held, others))  # they are given up
        batch = (x, LABELS) if mesh is None else (over(data, x), over(data, LABELS))
        moments = runtime._optimizer().init(held)
        _, _, (adam, *_), loss = runtime._update(graphdef, held, others, moments, *batch)
        found[f"{kind} loss"] = loss
        for path, mu in nnx.to_flat_state(adam.mu):  # after one step: gradient × (1 − β1)
            found[f"{kind} gradient {'.'.join(map(str, path))}"] = mu[...] / (1 - BETA1)
    return {key: np.asarray(value) for key, value in found.items()}


def run_keras(config: Config, dtype: str) -> Results:
    """The same of a Keras model, with the distributions of Keras."""
    import keras

    from isovit.backends.keras import runtime

    images = draw_inputs(config, DEVICES, 0).images
    names = keras.distribution.list_devices("cpu")
    mesh = keras.distribution.DeviceMesh((DEVICES // 2, 2), ("data", "model"), names)
    layouts = keras.distribution.LayoutMap(mesh)
    layouts[COLUMNS], layouts[COLUMN_BIASES] = (None, "model"), ("model",)
    layouts[ROWS] = ("model", None)
    data = keras.distribution.DataParallel(devices=names)
    both = keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="data")

    def forward(over: Any, fault: Callable[[Any, Any], Any] = lambda model, x: x) -> np.ndarray:
        with over.scope():
            model = runtime.build(config, probe(config), dtype=dtype)
            x = divided(over, images.astype(dtype))
            output = runtime.inference(model, fault(model, x), "jit")()
        parts = DEVICES // (1 if over is data else 2)
        assert {s.data.shape[0] for s in output.addressable_shards} == {DEVICES // parts}
        return output

    def divided(over: Any, array: np.ndarray) -> jax.Array:
        return keras.distribution.distribute_tensor(
            jax.numpy.asarray(array), over.get_data_layout(array.shape)
        )

    def misplace_weights(model: Any, x: Any) -> Any:
        for variable in model.trainable_variables:
            if re.fullmatch(COLUMNS, variable.path):
                variable._value = misplaced(variable.value)
        return x

    found: dict[str, Any] = {
        "one": runtime.forward(runtime.build(config, probe(config), dtype=dtype), images),
        "data": forward(data),
        "model": forward(both),
        "data, misplaced": forward(data, lambda model, x: misplaced(x)),
        "model, misplaced": forward(both, misplace_weights),
    }
    for kind, over in (("one", None), ("data", data)):
        if over is None:
            model = runtime.build(config, probe(config), dtype=dtype)
            batch = (jax.numpy.asarray(images, dtype), jax.numpy.asarray(LABELS))
            loss = runtime.training(model, *batch, "jit")()
        else:
            with over.scope():
                model = runtime.build(config, probe(config), dtype=dtype)
                batch = (divided(over, images.astype(dtype)), divided(over, LABELS))
                loss = runtime.training(model, *batch, "jit")()
        found[f"{kind} loss"] = loss
        pairs = zip(model.trainable_variables, model.optimizer._momentums, strict=True)
        for variable, momentum in pairs:
            name = variable.path.partition("/")[2]
            found[f"{kind} gradient {name}"] = np.asarray(momentum.value) / (1 - BETA1)
    return {key: np.asarray(value) for key, value in found.items()}


def placed(name: str, config: Config) -> int:
    """The device on which a model computes that was built for the fourth of them."""
    backend = get_backend(name)
    model = backend.build(config, probe(config), device="cpu:3")
    images = draw_inputs(config, 2, 0).images
    output: Any = backend.inference(model, backend.put(model, images), "jit")()
    return output.device.id


def found_of(family: str) -> Results:
    """What is found of a family's model."""
    name, dtype = sys.argv[1:]
    config = import_module(f"parity_tests.families.{family}").SHARDED
    run = run_flax if name == "flax" else run_keras
    return {"placed": np.array(placed(name, config)), **run(config, dtype)}


def main() -> None:
    """Answer for one family after the other."""
    assert jax.device_count() == DEVICES, "start it with XLA_FLAGS as test_sharding does"
    get_backend(sys.argv[1]).exact_arithmetic()
    answer(found_of)


if __name__ == "__main__":
    main()
