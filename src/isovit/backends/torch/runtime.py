"""Building, reading, writing and running PyTorch models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isovit.backends import model_class, resolve
from isovit.backends.protocol import Gradients, Model, Optimizer, Weights
from isovit.backends.torch.layout import LAYOUT
from isovit.errors import InputError
from isovit.spec.config import Config
from isovit.spec.families import param_tree
from isovit.spec.layout import from_native, to_native


def build(
    config: Config, weights: Weights, *, dtype: str = "float32", device: str | None = None
) -> nn.Module:
    """See ``Backend.build``."""
    with torch.device("meta"):
        model: nn.Module = model_class("torch", config.family)(config)
    state = _tensors(to_native(param_tree(config).parameters(), weights, LAYOUT))
    model.load_state_dict(state, strict=True, assign=True)
    return model.to(device=_device(device), dtype=getattr(torch, dtype)).eval()


def read(model: Model) -> dict[str, np.ndarray]:
    """See ``Backend.read``."""
    state = {name: _numpy(tensor) for name, tensor in model.state_dict().items()}
    return from_native(param_tree(model.config).parameters(), state, LAYOUT)


def write(model: Model, weights: Weights) -> None:
    """See ``Backend.write``."""
    state = _tensors(to_native(param_tree(model.config).parameters(), weights, LAYOUT))
    model.load_state_dict(state, strict=True)


def forward(model: Model, images: np.ndarray) -> np.ndarray:
    """See ``Backend.forward``."""
    with torch.inference_mode(), _evaluating(model):
        return _numpy(model(_like(model, images)))


def trace(model: Model, images: np.ndarray) -> dict[str, np.ndarray]:
    """See ``Backend.trace``."""
    outputs: dict[str, np.ndarray] = {}

    def record(path: str) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, _: object, output: Tensor) -> None:
            is_conv = isinstance(module, nn.Conv2d)  # (batch, dim, rows, columns)
            outputs[path] = _numpy(output.permute(0, 2, 3, 1) if is_conv else output)

        return resolve(model, path).register_forward_hook(hook)

    handles = [record(path) for path in param_tree(model.config).activations()]
    try:
        forward(model, images)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def gradients(model: Model, images: np.ndarray, cotangent: np.ndarray) -> Gradients:
    """See ``Backend.gradients``."""
    x = _like(model, images).requires_grad_()
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with _evaluating(model):
        loss = (model(x) * _like(model, cotangent)).sum()
    image_gradient, *rest = torch.autograd.grad(loss, [x, *params.values()], materialize_grads=True)
    native = {name: _numpy(grad) for name, grad in zip(params, rest, strict=True)}
    tree = param_tree(model.config).parameters()
    trainable = {path: param for path, param in tree.items() if param.trainable}
    return Gradients(_numpy(image_gradient), from_native(trainable, native, LAYOUT))


WAYS = ("eager", "compile")


def put(model: Model, array: np.ndarray) -> Tensor:
    """See ``Backend.put``."""
    if array.dtype.kind == "i":
        return torch.tensor(array, device=next(model.parameters()).device)
    return _like(model, array)


def inference(model: Model, images: Tensor, way: str) -> Callable[[], Tensor]:
    """See ``Backend.inference``."""
    run = torch.compile(model.eval()) if way == "compile" else model.eval()

    def step() -> Tensor:
        with torch.inference_mode():
            output = run(images)
        synchronize(model)
        return output

    return step


def training(model: Model, images: Tensor, labels: Tensor, way: str) -> Callable[[], Tensor]:
    """See ``Backend.training``."""
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


def synchronize(model: Model) -> None:
    """See ``Backend.synchronize``."""
    if next(model.parameters()).is_cuda:
        torch.cuda.synchronize()


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
        raise InputError(
            f"device {name}: torch finds no such device here; use --device cpu"
        ) from None
    return device


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
