"""Building, reading, writing and running PyTorch models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isovit.backends import model_class, require_module, resolve
from isovit.backends.devices import jax_device, kind_of, missing
from isovit.backends.protocol import (
    NO_OTHERS,
    Gradients,
    Model,
    Optimizer,
    Others,
    Setting,
    Weights,
)
from isovit.backends.torch.layout import COUNTER, LAYOUT
from isovit.errors import InputError
from isovit.spec.config import BaseConfig
from isovit.spec.families import param_tree
from isovit.spec.layout import from_native, to_native

# torch has no TPU of its own: such a model stays on the host, and JAX runs it on this device.
_TPUS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def build(
    config: BaseConfig, weights: Weights, *, dtype: str = "float32", device: str | None = None
) -> nn.Module:
    """See ``Backend.build``."""
    tpu = _tpu(device) if device and kind_of(device) == "tpu" else None
    place = torch.device("cpu") if tpu else _device(device)
    with torch.device("meta"):
        model: nn.Module = model_class("torch", config.family)(config)
    state = _tensors(to_native(param_tree(config).parameters(), weights, LAYOUT))
    model.load_state_dict(state, strict=True, assign=True)
    if tpu is not None:
        _TPUS[model] = tpu
    return model.to(device=place, dtype=getattr(torch, dtype)).eval()


def require_device(device: str) -> None:
    """See ``Backend.require_device``."""
    if kind_of(device) == "tpu":
        _tpu(device)
    else:
        _device(device)


def read(model: Model) -> dict[str, np.ndarray]:
    """See ``Backend.read``."""
    state = {
        name: _numpy(tensor)
        for name, tensor in model.state_dict().items()
        if not name.endswith(COUNTER)
    }
    return from_native(param_tree(model.config).parameters(), state, LAYOUT)


def write(model: Model, weights: Weights) -> None:
    """See ``Backend.write``."""
    state = _tensors(to_native(param_tree(model.config).parameters(), weights, LAYOUT))
    model.load_state_dict(state, strict=True)


def forward(model: Model, images: np.ndarray, others: Others = NO_OTHERS) -> np.ndarray:
    """See ``Backend.forward``."""
    if model in _TPUS:
        output = inference(model, put(model, images), "torchax")()
        return np.asarray(output, np.float64 if output.dtype == "float64" else np.float32)
    with torch.inference_mode(), _evaluating(model):
        return _numpy(model(_like(model, images), **_put_all(model, others)))


def trace(model: Model, images: np.ndarray, others: Others = NO_OTHERS) -> dict[str, np.ndarray]:
    """See ``Backend.trace``."""
    _require_torch(model, "activations")
    outputs: dict[str, np.ndarray] = {}

    def record(path: str) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, _: object, output: Tensor) -> None:
            outputs.pop(path, None)  # of a module that runs again, the last run counts
            outputs[path] = _numpy(output)

        return resolve(model, path).register_forward_hook(hook)

    handles = [record(path) for path in param_tree(model.config).activations()]
    try:
        forward(model, images, others)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def gradients(
    model: Model, images: np.ndarray, cotangent: np.ndarray, others: Others = NO_OTHERS
) -> Gradients:
    """See ``Backend.gradients``."""
    _require_torch(model, "gradients")
    x = _like(model, images).requires_grad_()
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with _evaluating(model):
        output = model(x, **_put_all(model, others))
        loss = (output * _like(model, cotangent)).sum()
    image_gradient, *rest = torch.autograd.grad(loss, [x, *params.values()], materialize_grads=True)
    native = {name: _numpy(grad) for name, grad in zip(params, rest, strict=True)}
    tree = param_tree(model.config).parameters()
    trainable = {path: param for path, param in tree.items() if param.trainable}
    return Gradients(_numpy(image_gradient), from_native(trainable, native, LAYOUT))


WAYS = ("eager", "compile", "torchax")


def put(model: Model, array: np.ndarray) -> Any:
    """See ``Backend.put``."""
    if model in _TPUS:
        return _on_jax().put(array, next(model.parameters()).dtype, _TPUS[model])
    is_integer = array.dtype.kind == "i"
    device = next(model.parameters()).device
    there = torch.tensor(array, device=device) if is_integer else _like(model, array)
    synchronize(model)
    return there


def _put_all(model: Model, arrays: Others) -> dict[str, Tensor]:
    """Arrays by name, each as ``put`` gives it."""
    return {name: put(model, array) for name, array in arrays.items()}


def inference(model: Model, images: Any, way: str) -> Callable[[], Any]:
    """See ``Backend.inference``."""
    if way == "torchax":
        device = _jax_place(model)
        images = images if model in _TPUS else _on_jax().put(images, images.dtype, device)
        return _on_jax().inference(model, images, device)
    run = torch.compile(model.eval()) if way == "compile" else model.eval()

    def step() -> Tensor:
        with torch.inference_mode():
            output = run(images)
        synchronize(model)
        return output

    return step


def training(model: Model, images: Any, labels: Any, way: str) -> Callable[[], Any]:
    """See ``Backend.training``; by torchax it is a copy of the weights that is trained."""
    if way == "torchax":
        device = _jax_place(model)
        if model not in _TPUS:
            images, labels = (
                _on_jax().put(array, images.dtype, device) for array in (images, labels)
            )
        return _on_jax().training(model, images, labels, device)
    run = torch.compile(model.train()) if way == "compile" else model.train()
    numbers = Optimizer()
    optimizer = torch.optim.AdamW(
        (parameter for parameter in model.parameters() if parameter.requires_grad),
        lr=numbers.learning_rate,
        betas=(numbers.beta1, numbers.beta2),
        eps=numbers.epsilon,
        weight_decay=numbers.weight_decay,
    )

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(run(images), labels)
        loss.backward()
        optimizer.step()
        synchronize(model)
        return loss.detach()

    return step


def exact_arithmetic() -> None:
    """See ``Backend.exact_arithmetic``."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def setting(model: Model, way: str) -> Setting:
    """See ``Backend.setting``."""
    if way == "torchax":
        return _on_jax().setting(model, _jax_place(model))
    parameter = next(model.parameters())
    words = [
        str(parameter.dtype).removeprefix("torch."),
        f"float32_matmul_precision={torch.get_float32_matmul_precision()}",
    ]
    if not parameter.is_cuda:
        return Setting(parameter.device.type, "; ".join(words))
    words.append(f"cudnn.allow_tf32={torch.backends.cudnn.allow_tf32}")
    if parameter.dtype == torch.bfloat16:
        allowed = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
        words.append(f"allow_bf16_reduced_precision_reduction={allowed}")
    return Setting(torch.cuda.get_device_name(parameter.device), "; ".join(words))


def device_memory(model: Model, way: str) -> int | None:
    """See ``Backend.device_memory``."""
    if way == "torchax":
        return _on_jax().device_memory(_jax_place(model))
    device = next(model.parameters()).device
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def synchronize(model: Model) -> None:
    """See ``Backend.synchronize``."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _evaluating(model: Model) -> Iterator[None]:
    """Evaluation mode within, the mode that was before behind."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name) if name else torch.get_default_device()
        torch.empty(1, device=device).cpu()  # "meta", or an accelerator that is not there
    except (RuntimeError, AssertionError, NotImplementedError):
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        found = f"cpu and {accelerator.type}" if accelerator else "cpu only"
        raise missing(str(name), "torch", found) from None
    return device


def _on_jax() -> Any:
    """The module of the way ``torchax``, which torch itself can do without.

    Raises:
        InputError: if torchax is not installed, or is of a release that does not know this torch.
    """
    require_module("way torchax", "torchax", "torchax")
    try:
        from isovit.backends.torch import on_jax
    except AttributeError as error:
        raise InputError(
            f"way torchax: this torchax does not load with torch {torch.__version__}: {error}; "
            'pip install --upgrade "isovit[torchax]"'
        ) from None
    return on_jax


def _tpu(name: str) -> Any:
    """A TPU, as JAX has it."""
    require_module(f"device {name}: torch", "torchax", "torchax")
    _on_jax()
    return jax_device(name)


def _jax_place(model: Model) -> Any:
    """Where the way ``torchax`` runs a model."""
    if model in _TPUS:
        return _TPUS[model]
    device = next(model.parameters()).device
    if device.type != "cpu":
        raise InputError(f"way torchax runs on cpu and tpu, not on {device.type}")
    return jax_device("cpu")


def _require_torch(model: Model, what: str) -> None:
    if model in _TPUS:
        raise InputError(f"backend torch has no {what} on a TPU: take flax or keras:jax")


def _like(model: Model, array: np.ndarray) -> Tensor:
    """A tensor in the dtype and on the device of the model."""
    parameter = next(model.parameters())
    return torch.tensor(array, dtype=parameter.dtype, device=parameter.device)


def _tensors(arrays: Weights) -> dict[str, Tensor]:
    """Tensors with memory of their own: training must not write into the caller's arrays."""
    return {
        name: torch.from_numpy(np.array(array, dtype=_storable(array), order="C"))
        for name, array in arrays.items()
    }


def _storable(array: np.ndarray) -> np.dtype:
    """NumPy's bfloat16 is an extension type that torch does not read; float32 holds it exactly."""
    return np.dtype(np.float32) if array.dtype.name == "bfloat16" else array.dtype


def _numpy(tensor: Tensor) -> np.ndarray:
    """An array with memory of its own."""
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return tensor.detach().to("cpu", dtype, copy=True).numpy()
