"""Building, reading, writing and running Flax models."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx

from isovit.backends import model_class
from isovit.backends.flax.layout import LAYOUT
from isovit.backends.protocol import Gradients, Model, Optimizer, Weights
from isovit.errors import InputError, reason
from isovit.spec.config import Config
from isovit.spec.families import param_tree
from isovit.spec.layout import from_native, to_native

UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)
"""What orbax raises on broken folders."""


def build(
    config: Config, weights: Weights, *, dtype: str = "float32", device: str | None = None
) -> nnx.Module:
    """See ``Backend.build``."""
    if dtype == "float64":
        jax.config.update("jax_enable_x64", True)  # for the whole process; JAX offers no less
    kind = jnp.dtype(dtype)
    cls = model_class("flax", config.family)
    model = nnx.eval_shape(
        lambda: cls(config, dtype=kind, param_dtype=kind, rngs=nnx.Rngs(params=0, dropout=0))
    )
    with jax.default_device(_device(device)) if device else nullcontext():
        nnx.reseed(model, dropout=0)  # the keys were shapes only
        write(model, weights)
    if device:  # committed, so that the computation stays there too
        nnx.update(model, jax.device_put(nnx.state(model), _device(device)))
    model.eval()
    return model


def read(model: Model) -> dict[str, np.ndarray]:
    """See ``Backend.read``."""
    native = {path: _numpy(variable[...]) for path, variable in _variables(model).items()}
    return from_native(param_tree(model.config).parameters(), native, LAYOUT)


def write(model: Model, weights: Weights) -> None:
    """See ``Backend.write``."""
    native = to_native(param_tree(model.config).parameters(), weights, LAYOUT)
    for path, variable in _variables(model).items():
        # A copy: JAX may otherwise keep the caller's own memory.
        variable.set_value(jnp.array(native[path], variable.dtype, copy=True))


def forward(model: Model, images: np.ndarray) -> np.ndarray:
    """See ``Backend.forward``."""
    graphdef, state = nnx.split(_evaluating(model))
    return _numpy(_forward(graphdef, state, _like(model, images)))


@partial(jax.jit, static_argnums=0)
def _forward(graphdef: nnx.GraphDef, state: nnx.State, x: jax.Array) -> jax.Array:
    """Compiled once for every config and batch, however often a model of it is built."""
    return nnx.merge(graphdef, state)(x)


def trace(model: Model, images: np.ndarray) -> dict[str, np.ndarray]:
    """See ``Backend.trace``."""
    graphdef, state = nnx.split(_evaluating(model))
    paths = list(param_tree(model.config).activations())

    @jax.jit
    def run(state: nnx.State, x: jax.Array) -> dict[str, jax.Array]:
        model = nnx.merge(graphdef, state)
        capture = nnx.capture(model, nnx.Intermediate, method_outputs=nnx.Intermediate)
        _, outputs = capture(x)
        flat = {".".join(map(str, path)): value for path, value in nnx.to_flat_state(outputs)}
        return {path: flat[f"{path}.__call__".lstrip(".")][0] for path in paths}

    outputs = run(state, _like(model, images))  # jit sorts the keys
    return {path: _numpy(outputs[path]) for path in paths}


def gradients(model: Model, images: np.ndarray, cotangent: np.ndarray) -> Gradients:
    """See ``Backend.gradients``."""
    graphdef, params, rest = nnx.split(_evaluating(model), nnx.Param, ...)
    weighting = _like(model, cotangent)

    @jax.jit
    def run(params: nnx.State, x: jax.Array) -> tuple[nnx.State, jax.Array]:
        def loss(params: nnx.State, x: jax.Array) -> jax.Array:
            return (nnx.merge(graphdef, params, rest)(x) * weighting).sum()

        return jax.grad(loss, argnums=(0, 1))(params, x)

    by_param, by_image = run(params, _like(model, images))
    native = {
        ".".join(map(str, path)): _numpy(variable[...])
        for path, variable in nnx.to_flat_state(by_param)
    }
    tree = param_tree(model.config).parameters()
    trainable = {path: param for path, param in tree.items() if param.trainable}
    return Gradients(_numpy(by_image), from_native(trainable, native, LAYOUT))


WAYS = ("jit",)


def put(model: Model, array: np.ndarray) -> jax.Array:
    """See ``Backend.put``."""
    if array.dtype.kind == "i":
        return jax.device_put(array, next(iter(_variables(model).values()))[...].device)
    return _like(model, array)


def inference(model: Model, images: jax.Array, way: str) -> Callable[[], jax.Array]:
    """See ``Backend.inference``."""
    graphdef, state = nnx.split(_evaluating(model))
    run = _forward.lower(graphdef, state, images).compile()
    return lambda: jax.block_until_ready(run(state, images))


def training(
    model: Model, images: jax.Array, labels: jax.Array, way: str
) -> Callable[[], jax.Array]:
    """See ``Backend.training``."""
    numbers = Optimizer()
    optimizer = optax.adamw(
        numbers.learning_rate,
        b1=numbers.beta1,
        b2=numbers.beta2,
        eps=numbers.epsilon,
        weight_decay=numbers.weight_decay,
    )
    model.train()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @partial(jax.jit, donate_argnums=(0, 1, 2))
    def update(params: nnx.State, rest: nnx.State, state: optax.OptState) -> Any:
        def loss(params: nnx.State) -> tuple[jax.Array, Any]:
            trained = nnx.merge(graphdef, params, rest, copy=True)
            logits = trained(images)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            _, _, moved = nnx.split(trained, nnx.Param, ...)  # the keys of dropout move on
            return losses.mean(), moved

        (value, new_rest), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), new_rest, state, value

    kept = [params, rest, optimizer.init(params)]

    def step() -> jax.Array:
        *kept[:], value = update(*kept)
        return jax.block_until_ready(value)

    return step


def exact_arithmetic() -> None:
    """See ``Backend.exact_arithmetic``."""
    jax.config.update("jax_default_matmul_precision", "highest")


def synchronize(model: Model) -> None:
    """See ``Backend.synchronize``."""
    jax.block_until_ready(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def save_native(config: Config, weights: Weights, path: Path) -> None:
    """See ``Backend.save_native``: an orbax folder."""
    native = to_native(param_tree(config).parameters(), weights, LAYOUT)
    tree = nnx.traversals.unflatten_mapping({tuple(k.split(".")): v for k, v in native.items()})
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), tree)


def load_native(config: Config, path: Path) -> dict[str, np.ndarray]:
    """See ``Backend.load_native``."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax warns of what we report ourselves
    # One array after another: of many at once, those behind a broken one still call back when
    # orbax has closed its event loop, and each prints a traceback. Its list of arrays does so too.
    try:
        listed = msgspec.json.decode((path / "_METADATA").read_bytes(), type=_Listing)
        names = [
            tuple(str(step.key) for step in m.key_metadata) for m in listed.tree_metadata.values()
        ]
        with ocp.PyTreeCheckpointer() as checkpointer:
            return {".".join(name): _restore(checkpointer, path, name) for name in names}
    except (*UNREADABLE, msgspec.DecodeError) as error:
        said = reason(error).partition(" [tensorstore_spec=")[0]
        raise InputError(f"{path}: wanted an orbax folder, but: {said}") from None


class _Step(msgspec.Struct):
    key: str | int


class _Entry(msgspec.Struct):
    key_metadata: list[_Step]


class _Listing(msgspec.Struct):
    """What orbax's ``_METADATA`` says of the arrays of a folder."""

    tree_metadata: dict[str, _Entry]


def _restore(checkpointer: ocp.PyTreeCheckpointer, path: Path, name: tuple[str, ...]) -> np.ndarray:
    """One array of an orbax folder."""
    item = nnx.traversals.unflatten_mapping({name: 0})
    as_numpy = nnx.traversals.unflatten_mapping({name: ocp.RestoreArgs(restore_type=np.ndarray)})
    wanted = ocp.args.PyTreeRestore(item=item, restore_args=as_numpy, partial_restore=True)
    return nnx.traversals.flatten_mapping(checkpointer.restore(path.absolute(), args=wanted))[name]


def _variables(model: Model) -> dict[str, nnx.Variable]:
    """Parameters, trained and fixed, by dotted path."""
    state = nnx.state(model, nnx.Not(nnx.RngState))
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def _evaluating(model: Model) -> Model:
    """The same variables in evaluation mode; the model itself keeps its mode."""
    return nnx.view(model, deterministic=True, raise_if_not_found=False)


def _device(name: str) -> Any:
    """A device of this process by name."""
    try:
        return jax.local_devices(backend={"cuda": "gpu"}.get(name, name))[0]
    except RuntimeError:
        raise InputError(
            f"device {name}: jax finds no such device here; use --device cpu"
        ) from None


def _like(model: Model, array: np.ndarray) -> jax.Array:
    """An array in the dtype of the model, on its device."""
    weight = next(iter(_variables(model).values()))[...]
    return jax.device_put(np.asarray(array, weight.dtype), weight.device)


def _numpy(array: jax.Array) -> np.ndarray:
    return np.asarray(array, np.float64 if array.dtype == jnp.float64 else np.float32)
