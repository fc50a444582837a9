"""PyTorch models as functions of JAX, by torchax: the way on which torch reaches a TPU.

torchax runs a model's own ``forward`` on JAX arrays; jit, gradients and optimiser are then JAX's.
The torch model stays on the host as it is: the copy of its weights on the device is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
import torch
import torchax  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn

from isovit.backends.devices import jax_precision
from isovit.backends.protocol import Optimizer, Setting

State = Mapping[str, jax.Array]

# torch's own switch for float32 products, in JAX's words.
PRECISIONS = {"highest": "highest", "high": "high", "medium": "default"}


def put(array: np.ndarray | Tensor, dtype: torch.dtype, device: Any) -> jax.Array:
    """An array on a device of JAX; integers stay integers."""
    if isinstance(array, Tensor):
        kept = torch.float64 if array.dtype == torch.float64 else torch.float32
        array = (array.to(kept) if array.is_floating_point() else array).numpy(force=True)
    _allow_wide(dtype)
    kind = np.asarray(array).dtype
    array = np.asarray(array, kind if kind.kind == "i" else _name(dtype))
    return jax.block_until_ready(jax.device_put(array, device))


def inference(model: nn.Module, images: jax.Array, device: Any) -> Callable[[], jax.Array]:
    """See ``Backend.inference``."""
    weights, run = _function(model.eval(), device)
    with _precision():
        compiled = jax.jit(run).lower(weights, images).compile()
    return lambda: jax.block_until_ready(compiled(weights, images))


def training(
    model: nn.Module, images: jax.Array, labels: jax.Array, device: Any
) -> Callable[[], jax.Array]:
    """See ``Backend.training``; the trained weights are those on the device."""
    weights, run = _function(model.train(), device)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    fixed = {name: weight for name, weight in weights.items() if name not in trained}
    numbers, environment = Optimizer(), torchax.default_env()
    optimizer = optax.adamw(
        numbers.learning_rate,
        b1=numbers.beta1,
        b2=numbers.beta2,
        eps=numbers.epsilon,
        weight_decay=numbers.weight_decay,
    )

    @partial(jax.jit, donate_argnums=(0, 1, 2))
    def update(
        params: State,
        state: optax.OptState,
        key: jax.Array,
        fixed: State,
        images: jax.Array,
        labels: jax.Array,
    ) -> Any:
        def loss(params: State) -> tuple[jax.Array, jax.Array]:
            with environment.override_property(prng=key):
                logits = run({**params, **fixed}, images)
                moved = environment.prng_key  # the key of dropout moves on
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), moved

        (value, moved), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, moved, value

    params = {name: weights[name] for name in weights if name in trained}
    kept = [params, optimizer.init(params), jax.device_put(jax.random.key(0), device)]
    with _precision():
        compiled = update.lower(*kept, fixed, images, labels).compile()

    def step() -> jax.Array:
        *kept[:], value = compiled(*kept, fixed, images, labels)
        return jax.block_until_ready(value)

    return step


def setting(model: nn.Module, device: Any) -> Setting:
    """See ``Backend.setting``."""
    with _precision():
        return Setting(
            device.device_kind, f"{_name(next(model.parameters()).dtype)}; {jax_precision()}"
        )


def device_memory(device: Any) -> int | None:
    """See ``Backend.device_memory``."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use")


def _function(
    model: nn.Module, device: Any
) -> tuple[dict[str, jax.Array], Callable[[State, jax.Array], jax.Array]]:
    """A model's weights on a device of JAX, and its forward pass as a function of them."""
    _allow_wide(next(model.parameters()).dtype)
    weights, call = torchax.extract_jax(model)
    return jax.device_put(weights, device), lambda weights, images: call(weights, (images,))


def _precision() -> Any:
    return jax.default_matmul_precision(PRECISIONS[torch.get_float32_matmul_precision()])


def _allow_wide(dtype: torch.dtype) -> None:
    """JAX would store float64 as float32; the switch is the whole process's."""
    if dtype == torch.float64:
        jax.config.update("jax_enable_x64", True)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
