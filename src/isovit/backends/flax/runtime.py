"""Building, reading, writing and running Flax models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
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
import tensorstore
from flax import nnx

from isovit.backends import model_class
from isovit.backends.devices import jax_device, jax_precision
from isovit.backends.flax.layout import LAYOUT
from isovit.backends.protocol import (
    NO_OTHERS,
    Gradients,
    Model,
    Optimizer,
    Others,
    Setting,
    Weights,
)
from isovit.errors import InputError, reason
from isovit.spec.config import BaseConfig
from isovit.spec.families import param_tree
from isovit.spec.layout import from_native, to_native


def build(
    config: BaseConfig, weights: Weights, *, dtype: str = "float32", device: str | None = None
) -> nnx.Module:
    """See ``Backend.build``."""
    if dtype == "float64":
        jax.config.update("jax_enable_x64", True)  # for the whole process; JAX offers no less
    model = _shapes(config, dtype)
    with jax.default_device(jax_device(device)) if device else nullcontext():
        nnx.reseed(model, dropout=0)  # the keys were shapes only
        write(model, weights)
    if device:  # committed, so that the computation stays there too
        nnx.update(model, jax.device_put(nnx.state(model), jax_device(device)))
    model.eval()
    return model


def _shapes(config: BaseConfig, dtype: str) -> nnx.Module:
    """A model that has shapes in the place of weights."""
    kind, cls = jnp.dtype(dtype), model_class("flax", config.family)

    def make() -> nnx.Module:
        rngs: Any = nnx.Rngs(dropout=0)
        rngs.params = _OneKey(0, tag="params")
        return cls(config, dtype=kind, param_dtype=kind, rngs=rngs)

    return nnx.eval_shape(make)


class _OneKey(nnx.RngStream):
    """The same key whenever it is asked: enough for shapes, and JAX traces no count of the keys.

    A step of that count takes as long as there are steps before it: 0.9 of 1.5 s for
    ``t2t_vit_14``.
    """

    def __call__(self) -> jax.Array:
        return self.key[...]


def require_device(device: str) -> None:
    """See ``Backend.require_device``."""
    jax_device(device)


def read(model: Model) -> dict[str, np.ndarray]:
    """See ``Backend.read``."""
    native = {path: _numpy(variable[...]) for path, variable in _variables(model).items()}
    return from_native(param_tree(model.config).parameters(), native, LAYOUT)


def write(model: Model, weights: Weights) -> None:
    """See ``Backend.write``."""
    native = to_native(param_tree(model.config).parameters(), weights, LAYOUT)
    for path, variable in _variables(model).items():
        # A copy, as JAX may keep the caller's own memory; by NumPy, as JAX would compile its own.
        variable.set_value(jax.device_put(np.array(native[path], variable.dtype)))


def forward(model: Model, images: np.ndarray, others: Others = NO_OTHERS) -> np.ndarray:
    """See ``Backend.forward``."""
    graphdef, state = nnx.split(_evaluating(model))
    return _numpy(_forward(graphdef, state, _like(model, images), **_put_all(model, others)))


@partial(jax.jit, static_argnums=0)
def _forward(
    graphdef: nnx.GraphDef, state: nnx.State, x: jax.Array, **others: jax.Array
) -> jax.Array:
    """Compiled once for every config and batch, however often a model of it is built."""
    return nnx.merge(graphdef, state)(x, **others)


def trace(model: Model, images: np.ndarray, others: Others = NO_OTHERS) -> dict[str, np.ndarray]:
    """See ``Backend.trace``."""
    graphdef, state = nnx.split(_evaluating(model))
    paths = list(param_tree(model.config).activations())

    @jax.jit
    def run(state: nnx.State, x: jax.Array, others: dict[str, Any]) -> dict[str, jax.Array]:
        model = nnx.merge(graphdef, state)
        capture = nnx.capture(model, nnx.Intermediate, method_outputs=nnx.Intermediate)
        _, outputs = capture(x, **others)
        flat = {".".join(map(str, path)): value for path, value in nnx.to_flat_state(outputs)}
        return {path: flat[f"{path}.__call__".lstrip(".")][-1] for path in paths}

    outputs = run(state, _like(model, images), _put_all(model, others))  # jit sorts the keys
    return {path: _numpy(outputs[path]) for path in paths}


def gradients(
    model: Model, images: np.ndarray, cotangent: np.ndarray, others: Others = NO_OTHERS
) -> Gradients:
    """See ``Backend.gradients``."""
    graphdef, params, rest = nnx.split(_evaluating(model), nnx.Param, ...)
    weighting, given = _like(model, cotangent), _put_all(model, others)

    @jax.jit
    def run(params: nnx.State, x: jax.Array) -> tuple[nnx.State, jax.Array]:
        def loss(params: nnx.State, x: jax.Array) -> jax.Array:
            return (nnx.merge(graphdef, params, rest)(x, **given) * weighting).sum()

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
    is_integer = array.dtype.kind == "i"
    there = jax.device_put(array, _place(model)) if is_integer else _like(model, array)
    return jax.block_until_ready(there)


def _put_all(model: Model, arrays: Others) -> dict[str, jax.Array]:
    """Arrays by name, each as ``put`` gives it."""
    return {name: put(model, array) for name, array in arrays.items()}


def inference(model: Model, images: jax.Array, way: str) -> Callable[[], jax.Array]:
    """See ``Backend.inference``."""
    graphdef, state = nnx.split(_evaluating(model))
    run = _forward.lower(graphdef, state, images).compile()
    return lambda: jax.block_until_ready(run(state, images))


def training(
    model: Model, images: jax.Array, labels: jax.Array, way: str
) -> Callable[[], jax.Array]:
    """See ``Backend.training``."""
    model.train()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    kept = [params, rest, _optimizer().init(params)]
    run = _update.lower(graphdef, *kept, images, labels).compile()

    def step() -> jax.Array:
        *kept[:], value = run(*kept, images, labels)
        return jax.block_until_ready(value)

    return step


@partial(jax.jit, static_argnums=0, donate_argnums=(1, 2, 3))
def _update(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    rest: nnx.State,
    state: optax.OptState,
    images: jax.Array,
    labels: jax.Array,
) -> Any:
    """One step: what trains, what does not, the optimiser's state, and the loss before it."""

    def loss(params: nnx.State) -> tuple[jax.Array, Any]:
        trained = nnx.merge(graphdef, params, rest, copy=True)
        logits = trained(images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        _, _, moved = nnx.split(trained, nnx.Param, ...)  # the keys of dropout move on
        return losses.mean(), moved

    (value, new_rest), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    updates, state = _optimizer().update(gradients, state, params)
    return optax.apply_updates(params, updates), new_rest, state, value


def _optimizer() -> optax.GradientTransformation:
    numbers = Optimizer()
    return optax.adamw(
        numbers.learning_rate,
        b1=numbers.beta1,
        b2=numbers.beta2,
        eps=numbers.epsilon,
        weight_decay=numbers.weight_decay,
    )


def exact_arithmetic() -> None:
    """See ``Backend.exact_arithmetic``."""
    jax.config.update("jax_default_matmul_precision", "highest")


def setting(model: Model, way: str) -> Setting:
    """See ``Backend.setting``."""
    return Setting(_device(model).device_kind, f"{_weight(model).dtype}; {jax_precision()}")


def device_memory(model: Model, way: str) -> int | None:
    """See ``Backend.device_memory``."""
    return (_device(model).memory_stats() or {}).get("peak_bytes_in_use")


def synchronize(model: Model) -> None:
    """See ``Backend.synchronize``."""
    jax.block_until_ready(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def save_native(config: BaseConfig, weights: Weights, path: Path) -> None:
    """See ``Backend.save_native``: an orbax folder."""
    native = to_native(param_tree(config).parameters(), weights, LAYOUT)
    tree = nnx.traversals.unflatten_mapping({tuple(k.split(".")): v for k, v in native.items()})
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), tree)


def load_native(config: BaseConfig, path: Path) -> dict[str, np.ndarray]:
    """See ``Backend.load_native``.

    Orbax lists the arrays and tensorstore reads them. Orbax would read all that a folder claims,
    however large, and print a traceback for every array that is broken.
    """
    try:
        listed = msgspec.json.decode((path / "_METADATA").read_bytes(), type=_Listing)
        names = {
            ".".join(str(step.key) for step in entry.key_metadata)
            for entry in listed.tree_metadata.values()
        }
        arrays = {name: _open_array(path, name, listed.use_zarr3) for name in sorted(names)}
        _check_size(path, arrays.values())
        return {name: array.read().result() for name, array in arrays.items()}
    except Exception as error:  # a broken folder makes tensorstore raise anything
        said = reason(error).partition(" [")[0]
        raise InputError(f"{path}: wanted an orbax folder, but: {said}") from None


class _Step(msgspec.Struct):
    key: str | int


class _Entry(msgspec.Struct):
    key_metadata: list[_Step]


class _Listing(msgspec.Struct):
    """What orbax's ``_METADATA`` says of the arrays of a folder."""

    tree_metadata: dict[str, _Entry]
    use_zarr3: bool = False


def _open_array(path: Path, name: str, zarr3: bool) -> tensorstore.TensorStore:
    """One array of an orbax folder, not read yet."""
    if "/" in name or name in ("", ".", ".."):
        raise InputError(f"it lists an array {name!r}")
    folder = f"{path.absolute()}/"
    if (path / "manifest.ocdbt").is_file():
        store = {"driver": "ocdbt", "base": {"driver": "file", "path": folder}, "path": f"{name}/"}
    else:
        store = {"driver": "file", "path": f"{folder}{name}/"}
    spec = {"driver": "zarr3" if zarr3 else "zarr", "kvstore": store}
    return tensorstore.open(spec, open=True, read=True).result()


def _check_size(path: Path, arrays: Iterable[tensorstore.TensorStore]) -> None:
    """Refuse arrays that are far larger than their files: what is not there reads as zeros."""
    claimed = 0
    for array in arrays:
        chunk = [size or 1 for size in array.chunk_layout.read_chunk.shape or ()]
        numbers = max(math.prod(array.shape), math.prod(chunk))
        claimed += numbers * array.dtype.numpy_dtype.itemsize
    packed = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    if claimed > 1 << 28 and claimed > 20 * packed:
        raise InputError(f"its {packed:,} bytes would become {claimed:,}; weights never shrink so")


def _variables(model: Model) -> dict[str, nnx.Variable]:
    """Parameters, trained and fixed, by dotted path."""
    state = nnx.state(model, nnx.Not(nnx.RngState))
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def _evaluating(model: Model) -> Model:
    """The same variables in evaluation mode; the model itself keeps its mode."""
    return nnx.view(model, deterministic=True, use_running_average=True, raise_if_not_found=False)


def _weight(model: Model) -> jax.Array:
    """One for all, of one dtype and one device; training leaves no more of it than these."""
    return next(iter(_variables(model).values())).get_raw_value()


def _place(model: Model) -> jax.sharding.Sharding:
    return _weight(model).sharding


def _device(model: Model) -> Any:
    return next(iter(_place(model).device_set))


def _like(model: Model, array: np.ndarray) -> jax.Array:
    """An array in the dtype of the model, on its device."""
    return jax.device_put(np.asarray(array, _weight(model).dtype), _place(model))


def _numpy(array: jax.Array) -> np.ndarray:
    return np.asarray(array, np.float64 if array.dtype == jnp.float64 else np.float32)
