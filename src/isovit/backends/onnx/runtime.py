"""Making ONNX models from torch's, and running them in onnxruntime: float32 inference."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnxruntime

from isovit.backends import get_backend, quiet, require_inference
from isovit.backends.devices import missing
from isovit.backends.onnx.layout import HEADER, INPUT, config_of
from isovit.backends.protocol import NO_OTHERS, Gradients, Others, Setting, Weights
from isovit.errors import InputError, reason
from isovit.spec.config import BaseConfig, Config, require_model

WAYS = ("onnxruntime",)


@dataclass(frozen=True)
class OnnxModel:
    """An ONNX graph, ready to run.

    Attributes:
        config: of the model.
        session: that runs it.
    """

    config: Config
    session: onnxruntime.InferenceSession

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """The logits of (batch, height, width, channels) images."""
        return forward(self, images)


def build(
    config: BaseConfig, weights: Weights, *, dtype: str = "float32", device: str | None = None
) -> OnnxModel:
    """See ``Backend.build``; by way of torch, as ``isovit export`` writes it from there."""
    config = require_model(config, "backend onnx")
    require_inference(["onnx"], dtype)
    _providers(device)
    module = get_backend("torch").build(config, weights, device="cpu")
    from isovit.backends.onnx import from_torch, graph

    with tempfile.TemporaryDirectory(prefix="isovit-") as folder:
        path = Path(folder) / "model.onnx"
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph.write(graph.finish(from_torch.to_graph(module, config), config), path)
        return load(path, device)


def load(path: Path, device: str | None = None) -> OnnxModel:
    """Open a file that ``isovit export`` wrote.

    Raises:
        InputError: if it is none, or there is no such device.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    providers = _providers(device)
    if not path.is_file():
        raise InputError(f"cannot read {path}: no such file")
    try:
        session = onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:  # onnxruntime has a class of its own for each of its errors
        raise InputError(f"{path}: wanted an ONNX model, but: {reason(error)}") from None
    if session.get_providers()[0] != providers[0][0]:
        raise _no_device(device)
    said = session.get_modelmeta().custom_metadata_map.get(HEADER)
    return OnnxModel(config_of(said, path), session)


def require_device(device: str) -> None:
    """See ``Backend.require_device``."""
    _providers(device)


def read(model: OnnxModel) -> dict[str, np.ndarray]:
    """Not to be had: an exporter folds and transposes weights."""
    _refuse("gives no weights back: read the checkpoint that the model was made from")


def write(model: OnnxModel, weights: Weights) -> None:
    """Not to be had, as above."""
    _refuse("takes no other weights: build a model of them")


def forward(model: OnnxModel, images: np.ndarray, others: Others = NO_OTHERS) -> np.ndarray:
    """See ``Backend.forward``; there is no graph of an objective."""
    model.config.check_images(images.shape)
    batch = model.session.get_inputs()[0].shape[0]
    if isinstance(batch, int) and batch != len(images):
        raise InputError(f"the model was exported for batches of {batch}, got {len(images)} images")
    (output,) = model.session.run(None, {INPUT: np.asarray(images, np.float32)})
    return np.asarray(output)


def trace(
    model: OnnxModel, images: np.ndarray, others: Others = NO_OTHERS
) -> dict[str, np.ndarray]:
    """Not to be had: the graph has operators, no modules."""
    _refuse("has no activations: trace the model in torch, flax or keras")


def gradients(
    model: OnnxModel, images: np.ndarray, cotangent: np.ndarray, others: Others = NO_OTHERS
) -> Gradients:
    """Not to be had: onnxruntime runs forward only."""
    _refuse("has no gradients: take torch, flax or keras")


def put(model: OnnxModel, array: np.ndarray) -> np.ndarray:
    """See ``Backend.put``; a session takes its input from the memory of the host."""
    return array if array.dtype.kind in "iu" else np.asarray(array, np.float32)


def inference(model: OnnxModel, images: np.ndarray, way: str) -> Callable[[], np.ndarray]:
    """See ``Backend.inference``."""
    return lambda: forward(model, images)


def training(
    model: OnnxModel, images: np.ndarray, labels: np.ndarray, way: str
) -> Callable[[], object]:
    """Not to be had, as the gradients."""
    _refuse("does not train: take torch, flax or keras")


def exact_arithmetic() -> None:
    """See ``Backend.exact_arithmetic``; every session is made so, see ``_providers``."""


def setting(model: OnnxModel, way: str) -> Setting:
    """See ``Backend.setting``; what a session was made with is what it says."""
    provider = model.session.get_providers()[0]
    words = ["float32"]
    if provider == "CUDAExecutionProvider":
        words.append(f"use_tf32={model.session.get_provider_options()[provider]['use_tf32']}")
    return Setting(provider.removesuffix("ExecutionProvider").lower(), "; ".join(words))


def device_memory(model: OnnxModel, way: str) -> None:
    """See ``Backend.device_memory``; onnxruntime does not count."""


def synchronize(model: OnnxModel) -> None:
    """See ``Backend.synchronize``; a run of a session ends when its output is there."""


def _providers(device: str | None) -> Sequence[tuple[str, dict[str, Any]]]:
    """What onnxruntime calls a device, with its options."""
    kind, _, index = (device or "cpu").partition(":")
    if kind == "cpu" and not index:
        return [("CPUExecutionProvider", {})]
    available = onnxruntime.get_available_providers()
    if kind == "cuda" and "CUDAExecutionProvider" in available and (index or "0").isdecimal():
        return [("CUDAExecutionProvider", {"device_id": index or "0", "use_tf32": "0"})]
    raise _no_device(device)


def _no_device(device: str | None) -> InputError:
    return missing(str(device), "onnxruntime", ", ".join(onnxruntime.get_available_providers()))


def _refuse(what: str) -> NoReturn:
    raise InputError(f"backend onnx {what}")
