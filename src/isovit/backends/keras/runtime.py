"""Building, reading, writing and running Keras models, on whichever engine this process has."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import h5py
import keras
import numpy as np
from keras.src.backend.common import dtypes as keras_dtypes

from isovit.backends import model_class, resolve
from isovit.backends.devices import jax_device, jax_precision, kind_of, missing
from isovit.backends.keras.layout import LAYOUT
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
from isovit.spec.layout import from_native, native_path, to_native
from isovit.spec.param import Param

ENGINE = keras.backend.backend()

# Keras places what is made inside ``keras.device``: the computation must be inside it too.
_DEVICES: WeakKeyDictionary[Any, str | None] = WeakKeyDictionary()


def build(
    config: BaseConfig, weights: Weights, *, dtype: str = "float32", device: str | None = None
) -> keras.Model:
    """See ``Backend.build``."""
    with _on(device):
        model = _empty(config, dtype)
        write(model, weights)
    _DEVICES[model] = device
    return model


def require_device(device: str) -> None:
    """See ``Backend.require_device``."""
    _on(device)


def read(model: Model) -> dict[str, np.ndarray]:
    """See ``Backend.read``."""
    native = {name: _numpy(v.value) for name, v in _variables(model).items()}
    return from_native(_params(model), native, LAYOUT)


def write(model: Model, weights: Weights) -> None:
    """See ``Backend.write``."""
    native = to_native(_params(model), weights, LAYOUT)
    for name, variable in _variables(model).items():
        # A copy, as JAX may keep the caller's own memory; in the variable's dtype where NumPy has
        # it, as JAX would compile a conversion for every shape.
        kind = None if variable.dtype == "bfloat16" else variable.dtype
        variable.assign(np.array(native[name], kind))


def forward(model: Model, images: np.ndarray, others: Others = NO_OTHERS) -> np.ndarray:
    """See ``Backend.forward``."""
    return _numpy(_run(model, images, others)[0])


def trace(model: Model, images: np.ndarray, others: Others = NO_OTHERS) -> dict[str, np.ndarray]:
    """See ``Backend.trace``."""
    paths = list(param_tree(model.config).activations())
    output, outputs = _run(model, images, others, paths)
    outputs[""] = output
    return {path: _numpy(outputs[path]) for path in paths}


def gradients(
    model: Model, images: np.ndarray, cotangent: np.ndarray, others: Others = NO_OTHERS
) -> Gradients:
    """See ``Backend.gradients``."""
    trainable = {path: param for path, param in _params(model).items() if param.trainable}
    by_name = _variables(model)
    variables = [by_name[native_path(path, param, LAYOUT)] for path, param in trainable.items()]
    differentiate = {
        "tensorflow": _gradients_tensorflow,
        "jax": _gradients_jax,
        "torch": _gradients_torch,
    }[ENGINE]
    with _on(_DEVICES.get(model)):
        x, weighting = _like(model, images), _like(model, cotangent)
        given = _put_all(model, others)
        by_image, *by_variable = differentiate(model, variables, x, weighting, given)
    native = {
        native_path(path, param, LAYOUT): _numpy(gradient)
        for (path, param), gradient in zip(trainable.items(), by_variable, strict=True)
    }
    return Gradients(_numpy(by_image), from_native(trainable, native, LAYOUT))


WAYS = {"tensorflow": ("graph", "xla"), "jax": ("jit",), "torch": ("eager", "graph")}[ENGINE]


def put(model: Model, array: np.ndarray) -> Any:
    """See ``Backend.put``."""
    with _on(_DEVICES.get(model)):
        is_integer = array.dtype.kind == "i"
        there = keras.ops.convert_to_tensor(array) if is_integer else _like(model, array)
    _wait(there)
    return there


def _put_all(model: Model, arrays: Others) -> dict[str, Any]:
    """Arrays by name, each as ``put`` gives it."""
    return {name: put(model, array) for name, array in arrays.items()}


def inference(model: Model, images: Any, way: str) -> Callable[[], Any]:
    """See ``Backend.inference``."""
    if ENGINE == "jax":
        import jax

        run, trained, fixed = _stateless(model)
        with _on(_DEVICES.get(model)):
            compiled = jax.jit(run).lower(trained, fixed, images).compile()
        return lambda: jax.block_until_ready(compiled(trained, fixed, images))
    if ENGINE == "tensorflow":
        import tensorflow as tf

        call = tf.function(lambda x: model(x, training=False), jit_compile=way == "xla")
        return lambda: call(images).numpy()
    import torch

    call = functools.partial(model, training=False)
    predict = _recorded(model, images) if way == "graph" else call

    def step() -> Any:
        with torch.inference_mode(), _on(_DEVICES.get(model)):
            output = predict(images)
        synchronize(model)
        return output

    return step


def _recorded(model: Model, images: Any) -> Callable[[Any], Any]:
    """The operators of torch that a call makes of images of this shape, without Keras's layers."""
    import torch
    from torch.fx.experimental.proxy_tensor import make_fx

    run, trained, fixed = _stateless(model)
    with torch.no_grad(), _on(_DEVICES.get(model)):  # of fakes: nothing is computed or kept
        graph = make_fx(run, tracing_mode="fake")(trained, fixed, images)
    return functools.partial(graph, trained, fixed)


def _stateless(model: Model) -> tuple[Callable[..., Any], list[Any], list[Any]]:
    """The output as a function of variables and images; which variables train, and which do not."""

    def run(trained: Any, fixed: Any, x: Any) -> Any:
        return model.stateless_call(trained, fixed, x, training=False)[0]

    trained = [variable.value for variable in model.trainable_variables]
    fixed = [variable.value for variable in model.non_trainable_variables]
    return run, trained, fixed


def training(model: Model, images: Any, labels: Any, way: str) -> Callable[[], Any]:
    """See ``Backend.training``.

    Raises:
        InputError: by a graph of torch, which has the operators of a forward pass.
    """
    if ENGINE == "torch" and way == "graph":
        raise InputError("keras:torch trains by eager, not by graph")
    with _on(_DEVICES.get(model)):
        _prepare_training(model, way)

    def step() -> Any:
        with _on(_DEVICES.get(model)):
            value = model.train_on_batch(images, labels)
        synchronize(model)
        return value

    return step


def _prepare_training(model: Model, way: str) -> None:
    """Give a model its optimiser and loss."""
    numbers = Optimizer()
    optimizer = keras.optimizers.AdamW(
        numbers.learning_rate,
        beta_1=numbers.beta1,
        beta_2=numbers.beta2,
        epsilon=numbers.epsilon,
        weight_decay=numbers.weight_decay,
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, jit_compile=way in ("xla", "jit"))


def exact_arithmetic() -> None:
    """See ``Backend.exact_arithmetic``."""
    if ENGINE == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_tensor_float_32_execution(False)
    elif ENGINE == "jax":
        import jax

        jax.config.update("jax_default_matmul_precision", "highest")
    else:
        import torch

        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False


def setting(model: Model, way: str) -> Setting:
    """See ``Backend.setting``."""
    words, device = [str(model.compute_dtype)], model.variables[0].value.device
    if ENGINE == "tensorflow":
        import tensorflow as tf

        allowed = tf.config.experimental.tensor_float_32_execution_enabled()
        words.append(f"tensor_float_32_execution={allowed}")
        kind = tf.DeviceSpec.from_string(device).device_type.lower()
        name = "cpu" if kind == "cpu" else _tensorflow_gpu(device)
    elif ENGINE == "jax":
        words.append(jax_precision())
        name = device.device_kind
    else:
        import torch

        words.append(f"float32_matmul_precision={torch.get_float32_matmul_precision()}")
        if device.type == "cuda":
            words.append(f"cudnn.allow_tf32={torch.backends.cudnn.allow_tf32}")
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Setting(name, "; ".join(words))


def _tensorflow_gpu(device: str) -> str:
    """The name of a GPU, of which TensorFlow's devices have but the number."""
    import tensorflow as tf

    index = tf.DeviceSpec.from_string(device).device_index or 0
    gpu = tf.config.list_physical_devices("GPU")[index]
    return tf.config.experimental.get_device_details(gpu).get("device_name", gpu.name)


def device_memory(model: Model, way: str) -> int | None:
    """See ``Backend.device_memory``."""
    device = model.variables[0].value.device
    if ENGINE == "jax":
        return (device.memory_stats() or {}).get("peak_bytes_in_use")
    if ENGINE == "torch":
        import torch

        return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    import tensorflow as tf

    spec = tf.DeviceSpec.from_string(device)
    if spec.device_type == "CPU":
        return None
    return tf.config.experimental.get_memory_info(f"GPU:{spec.device_index or 0}")["peak"]


def synchronize(model: Model) -> None:
    """See ``Backend.synchronize``."""
    _wait([variable.value for variable in model.variables])


def _wait(tensors: Any) -> None:
    """Wait for tensors; TensorFlow and torch wait for all that was asked of the device."""
    if ENGINE == "jax":
        import jax

        jax.block_until_ready(tensors)
    elif ENGINE == "torch":
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
    else:
        import tensorflow as tf

        tf.test.experimental.sync_devices()


def save_native(config: BaseConfig, weights: Weights, path: Path) -> None:
    """See ``Backend.save_native``: ``.weights.h5``, or the whole model as ``.keras``."""
    kinds = {array.dtype.name for array in weights.values()}
    if not kinds <= {"float32", "float64"}:
        raise InputError(
            f"cannot write {path.name}: Keras has float32 or float64, not {', '.join(kinds)}"
        )
    model = build(config, weights, dtype="float64" if "float64" in kinds else "float32")
    if path.suffix == ".keras":
        model.save(path)
    else:
        model.save_weights(path)


def load_native(config: BaseConfig, path: Path) -> dict[str, np.ndarray]:
    """See ``Backend.load_native``."""
    kinds: set[str] = set()
    try:
        with h5py.File(path, "r") as file:
            file.visititems(lambda _, item: kinds.add(str(getattr(item, "dtype", ""))))
        model = _empty(config, "float64" if "float64" in kinds else "float32")
        model.load_weights(path)
    except Exception as error:  # a broken file makes h5py and Keras raise anything
        raise InputError(
            f"{path}: wanted the Keras weights of this config, but: {reason(error)}"
        ) from None
    return read(model)


def _gradients_tensorflow(
    model: Any, variables: Any, x: Any, weighting: Any, given: dict[str, Any]
) -> list[Any]:
    import tensorflow as tf

    targets = [x, *(variable.value for variable in variables)]
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.reduce_sum(model(x, training=False, **given) * weighting)
    return tape.gradient(loss, targets, unconnected_gradients=tf.UnconnectedGradients.ZERO)


def _gradients_jax(
    model: Any, variables: Any, x: Any, weighting: Any, given: dict[str, Any]
) -> list[Any]:
    import jax

    fixed = [variable.value for variable in model.non_trainable_variables]

    def loss(trained: list[jax.Array], x: jax.Array) -> jax.Array:
        output, _ = model.stateless_call(trained, fixed, x, training=False, **given)
        return (output * weighting).sum()

    trained = [variable.value for variable in model.trainable_variables]
    by_trained, by_image = jax.jit(jax.grad(loss, argnums=(0, 1)))(trained, x)
    by_id = {id(v): g for v, g in zip(model.trainable_variables, by_trained, strict=True)}
    return [by_image, *(by_id[id(variable)] for variable in variables)]


def _gradients_torch(
    model: Any, variables: Any, x: Any, weighting: Any, given: dict[str, Any]
) -> list[Any]:
    import torch

    x = x.detach().requires_grad_()
    loss = (model(x, training=False, **given) * weighting).sum()
    targets = [x, *(variable.value for variable in variables)]
    return list(torch.autograd.grad(loss, targets, materialize_grads=True))


def _run(
    model: Model, images: np.ndarray, others: Others, record: list[str] | None = None
) -> tuple[Any, dict[str, Any]]:
    """Output and recorded activations; compiled on JAX, whose eager mode is slower still."""
    record = record or []
    with _on(_DEVICES.get(model)):
        x, given = _like(model, images), _put_all(model, others)
        if ENGINE == "jax":
            return _run_jax(model, x, given, record)
        with _no_gradients(), _recording(model, record) as outputs:
            return model(x, training=False, **given), outputs


def _run_jax(
    model: Model, x: Any, given: dict[str, Any], record: list[str]
) -> tuple[Any, dict[str, Any]]:
    import jax

    @jax.jit
    def run(trained: Any, fixed: Any, x: Any, given: Any) -> tuple[Any, dict[str, Any]]:
        with _recording(model, record) as outputs:
            output, _ = model.stateless_call(trained, fixed, x, training=False, **given)
        return output, outputs

    trained = [variable.value for variable in model.trainable_variables]
    fixed = [variable.value for variable in model.non_trainable_variables]
    return run(trained, fixed, x, given)


def _no_gradients() -> AbstractContextManager[Any]:
    if ENGINE == "torch":
        import torch

        return torch.no_grad()
    return nullcontext()


@contextmanager
def _recording(model: Model, paths: list[str]) -> Iterator[dict[str, Any]]:
    """Within it, the output of every layer at ``paths`` is kept.

    Keras has no hooks, so the ``call`` of each layer, and of no other, is wrapped.
    """
    outputs: dict[str, Any] = {}

    def record(path: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            outputs[path] = call(*args, **kwargs)
            return outputs[path]

        return recorded

    layers = {path: resolve(model, path) for path in paths if path}
    for path, layer in layers.items():
        object.__setattr__(layer, "call", record(path, layer.call))
    try:
        yield outputs
    finally:
        for layer in layers.values():
            object.__delattr__(layer, "call")


def _empty(config: BaseConfig, dtype: str) -> keras.Model:
    if dtype == "float64":
        _enable_float64()
    model: keras.Model = model_class("keras", config.family)(config, dtype=dtype)
    model.build((None, *config.input_shape))
    return model


def _params(model: Model) -> dict[str, Param]:
    return param_tree(model.config).parameters()


def _variables(model: Model) -> dict[str, keras.Variable]:
    """Parameters by dotted path with Keras's leaf names."""
    paths = (native_path(path, param, LAYOUT) for path, param in _params(model).items())
    return {
        path: getattr(resolve(model, path.rpartition(".")[0]), path.rpartition(".")[2])
        for path in paths
    }


def _enable_float64() -> None:
    """Keep float64 where Keras on JAX and torch would demote it, see docs/decisions/float64.md.

    Raises:
        RuntimeError: if this version of Keras has no such table: then its float64 is float32.
    """
    if ENGINE == "jax":
        import jax

        jax.config.update("jax_enable_x64", True)
    if ENGINE != "tensorflow":
        table = getattr(keras_dtypes, "BIT64_TO_BIT32_DTYPE", {})
        if "float64" not in table:
            raise RuntimeError(
                f"Keras {keras.__version__} has no BIT64_TO_BIT32_DTYPE['float64'] to mend; its "
                f"float64 on {ENGINE} may be float32 inside"
            )
        table["float64"] = "float64"


def _on(device: str | None) -> AbstractContextManager[Any]:
    """What is made inside lies on this device."""
    if device is None:
        return nullcontext()
    if ENGINE == "jax":
        jax_device(device)
    elif kind_of(device) != "cpu" and kind_of(device) not in (here := _accelerators()):
        found = " and ".join(["cpu", *sorted(here)]) if here else "cpu only"
        raise missing(device, ENGINE, found)
    kind, _, index = device.replace("cuda", "gpu").partition(":")
    # On torch, "cpu:0" is not the device "cpu" that parameters are made on: moving the integer
    # state of a Dropout between the two fails.
    return keras.device(kind if ENGINE == "torch" and not index else f"{kind}:{index or 0}")


def _accelerators() -> set[str]:
    if ENGINE == "torch":
        import torch

        return {"cuda"} if torch.cuda.is_available() else set()
    names = {kind_of(name) for name in keras.distribution.list_devices()} - {"cpu"}
    return {"cuda" if name == "gpu" else name for name in names}


def _like(model: keras.Model, array: np.ndarray) -> Any:
    """A tensor in the dtype of the model. The cast is NumPy's: Keras's own may pass float32."""
    dtype = model.compute_dtype
    if dtype == "bfloat16":
        return keras.ops.cast(keras.ops.convert_to_tensor(np.float32(array)), dtype)
    return keras.ops.convert_to_tensor(np.asarray(array, dtype), dtype=dtype)


def _numpy(tensor: Any) -> np.ndarray:
    if keras.backend.standardize_dtype(tensor.dtype) == "bfloat16":
        tensor = keras.ops.cast(tensor, "float32")
    return np.array(keras.ops.convert_to_numpy(tensor))  # with memory of its own
