"""The table of backends. Each is a folder here and is imported only when it is asked for."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from isovit.backends.protocol import Backend
from isovit.errors import InputError
from isovit.spec.config import BaseConfig
from isovit.spec.families import class_name, home

BACKENDS = {
    "torch": ("torch", "torch"),
    "flax": ("flax", "flax"),
    "keras": ("keras", "keras"),
}
"""Backend name to the module it needs and the extra that installs it."""

INFERENCE = {
    "onnx": {"onnxruntime": "onnx", "onnx": "onnx", "onnxscript": "onnx", "torch": "torch"},
}
"""Backends without models of their own, which run those of another in float32: name to the
modules that they need, each with the extra that installs it."""

ENGINES = {
    "tensorflow": ("tensorflow", "keras-tf"),
    "jax": ("jax", "flax"),
    "torch": ("torch", "torch"),
}
"""Engine of Keras to the module it needs and the extra that installs it."""

DTYPES = ("float32", "float64", "bfloat16")


def parse_backend(name: str) -> tuple[str, str | None]:
    """Split ``keras:jax`` into backend and engine; the engine is None for other backends.

    ``keras`` alone takes the engine that Keras already runs on, or else the one that KERAS_BACKEND
    or Keras's own ``keras.json`` names, or else the first installed of tensorflow, jax, torch.

    Raises:
        InputError: for an unknown backend or engine.
    """
    backend, colon, engine = name.partition(":")
    if backend not in (*BACKENDS, *INFERENCE) or (colon and backend != "keras"):
        known = [b for b in (*BACKENDS, *INFERENCE) if b != "keras"]
        known += [f"keras:{e}" for e in ENGINES]
        raise InputError(f"no backend named {name!r}; wanted one of {', '.join(known)}")
    if backend != "keras":
        return backend, None
    if colon and engine not in ENGINES:
        raise InputError(f"no Keras engine named {engine!r}; wanted one of {', '.join(ENGINES)}")
    return backend, engine or _default_engine()


def full_name(name: str) -> str:
    """The backend's name with its engine: ``keras`` becomes ``keras:tensorflow``, for example."""
    backend, engine = parse_backend(name)
    return f"{backend}:{engine}" if engine else backend


def get_backend(name: str) -> Backend:
    """Import a backend.

    Args:
        name: ``torch``, ``flax``, ``keras``, ``keras:ENGINE`` or ``onnx``.

    Raises:
        InputError: if it is unknown or not installed, or if Keras already runs on another engine
            in this process.
    """
    backend, engine = parse_backend(name)
    require_installed(name)
    if engine is not None:
        _choose_engine(engine)
    with quiet() if engine == "tensorflow" else nullcontext():
        return import_module(f"isovit.backends.{backend}.runtime")  # type: ignore[return-value]


def require_installed(name: str) -> None:
    """Check that what a backend needs is installed, without importing it.

    Raises:
        InputError: naming the extra that installs it.
    """
    backend, engine = parse_backend(name)
    needs = [BACKENDS[backend]] if backend in BACKENDS else [*INFERENCE[backend].items()]
    for module, extra in [*needs, *([ENGINES[engine]] if engine else [])]:
        require_module(f"backend {name}", module, extra)


def require_module(who: str, module: str, extra: str) -> None:
    """Check that a module is installed, without importing it.

    Args:
        who: needs it.
        module: its name.
        extra: of isovit, that installs it.

    Raises:
        InputError: naming the extra.
    """
    if find_spec(module) is None:
        raise InputError(
            f'{who} needs {module}, which is not installed: pip install "isovit[{extra}]"'
        )


def require_inference(
    names: Iterable[str], dtype: str, *, trace: bool = False, gradients: bool = False
) -> None:
    """Check that no backend that only runs models is asked for more than that.

    Raises:
        InputError: naming the backend, and what it has not.
    """
    wanted = [dtype] if dtype != "float32" else []
    wanted += ["activations"] * trace + ["gradients"] * gradients
    for name in names:
        if name in INFERENCE and wanted:
            raise InputError(
                f"backend {name} is float32 inference and has no {' or '.join(wanted)}: "
                "give --dtype float32, without --trace and --gradients, or take another backend"
            )


@cache
def model_class(backend: str, family: str) -> type[Any]:
    """The model class of a family or an objective in a backend."""
    return getattr(import_module(f"isovit.backends.{backend}.{home(family)}"), class_name(family))


def backend_of(model: Any) -> str:
    """The backend that built a model.

    Raises:
        InputError: if none did.
    """
    package = type(model).__module__.split(".")
    if package[:2] != ["isovit", "backends"]:
        raise InputError(f"wanted a model that isovit built, got {type(model).__qualname__}")
    return package[2]


def resolve(model: Any, path: str) -> Any:
    """The module at a canonical path: attributes and list indices have one name everywhere."""
    module = model
    for name in path.split(".") if path else ():
        module = module[int(name)] if name.isdigit() else getattr(module, name)
    return module


def check_dtype(dtype: str) -> None:
    """Check the name of a dtype.

    Raises:
        InputError: naming the known ones.
    """
    if dtype not in DTYPES:
        raise InputError(f"no dtype named {dtype!r}; wanted one of {', '.join(DTYPES)}")


def build(
    config: BaseConfig,
    backend: str,
    weights: dict[str, Any] | None = None,
    *,
    dtype: str = "float32",
    device: str | None = None,
) -> Any:
    """Build an ordinary model of a framework, with weights, ready for inference.

    Args:
        config: of any family or objective.
        backend: ``torch``, ``flax``, ``keras`` or ``keras:ENGINE``; or ``onnx``, for inference.
        weights: canonical weights; None draws those of seed 0.
        dtype: ``float32``, ``float64`` or ``bfloat16``, of parameters and computation. In JAX and
            in Keras float64 is a choice for the whole process. bfloat16 is for inference: an
            optimiser's steps are lost in parameters of 8 bits.
        device: ``cpu``, ``cuda``, ``tpu``; None for the framework's default.

    Returns:
        ``torch.nn.Module``, ``flax.nnx.Module`` or ``keras.Model``, called with
        (batch, height, width, channels) images.

    Raises:
        InputError: if the backend, dtype or device cannot be had, or the weights do not fit.
    """
    from isovit.spec.initialize import init

    check_dtype(dtype)
    weights = init(config) if weights is None else weights
    return get_backend(backend).build(config, weights, dtype=dtype, device=device)


def _default_engine() -> str:
    if "keras" in sys.modules:
        return sys.modules["keras"].backend.backend()
    home = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras")
    try:
        written = msgspec.json.decode((home / "keras.json").read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError):
        written = {}
    installed = next((e for e, (module, _) in ENGINES.items() if find_spec(module)), "tensorflow")
    named = os.environ.get("KERAS_BACKEND") or written.get("backend")
    return named if named in ENGINES else installed


def _choose_engine(engine: str) -> None:
    if "keras" in sys.modules:
        running = sys.modules["keras"].backend.backend()
        if running != engine:
            raise InputError(
                f"Keras already runs on {running} in this process and cannot change to {engine}: "
                "use one process for each engine"
            )
    os.environ["KERAS_BACKEND"] = engine


exporting = ContextVar("exporting", default=False)
"""Set while a model becomes an ONNX graph: it then computes by operators that every runtime has."""


@contextmanager
def quiet() -> Iterator[None]:
    """Within it nothing is printed: frameworks make notes while they load and while they export.

    TensorFlow writes them to the file descriptor, whatever its log level.
    """
    saved, disabled = {number: os.dup(number) for number in (1, 2)}, logging.root.manager.disable
    _flush()
    with Path(os.devnull).open("wb") as nowhere:
        for number in saved:
            os.dup2(nowhere.fileno(), number)
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        _flush()
        logging.disable(disabled)
        for number, descriptor in saved.items():
            os.dup2(descriptor, number)
            os.close(descriptor)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
