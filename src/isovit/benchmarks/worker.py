"""One measurement in a process of its own; ``python -m isovit.benchmarks.worker``.

Thread pools, engines, memory and compilers are the process's, so no case sees another's.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from isovit.backends import get_backend
from isovit.backends.devices import jax_device, kind_of, missing
from isovit.backends.memory import keep_memory
from isovit.benchmarks.measure import measure
from isovit.benchmarks.records import Case, Product, Record, Result
from isovit.errors import InputError
from isovit.spec.config import require_model
from isovit.spec.families import param_tree
from isovit.versions import versions
from isovit.weight_convert.store import checkpoint_of, file_bytes

PRODUCT_SIZE = 2048


TRANSFER_LIMIT_S = 1.0


def run(case: Case, limit_s: float) -> Record:
    """Build the model of a case and time its step.

    Raises:
        InputError: if the backend has no such way, or the case cannot be.
    """
    backend = get_backend(case.backend)
    if case.way not in backend.WAYS:
        raise InputError(f"{case.backend} runs by {', '.join(backend.WAYS)}, not by {case.way}")
    backend.exact_arithmetic()
    checkpoint = checkpoint_of(case.model, case.changes)
    config = require_model(checkpoint.config, "a measurement")
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((case.batch, *config.image_size, config.in_channels), np.float32)
    before = peak_memory()
    built, build_s = timed(
        lambda: backend.build(config, checkpoint.weights, dtype=case.dtype, device=case.device)
    )
    transfer = measure(lambda: backend.put(built, pixels), min(TRANSFER_LIMIT_S, limit_s))
    images = backend.put(built, pixels)
    if case.mode == "train":
        labels = backend.put(built, rng.integers(0, max(1, config.num_classes), case.batch))
        make = lambda: backend.training(built, images, labels, case.way)  # noqa: E731
    else:
        make = lambda: backend.inference(built, images, case.way)  # noqa: E731
    step, make_s = timed(make)
    _, first_s = timed(step)
    timing = measure(step, limit_s)
    faults = page_faults(step)
    result = Result(
        step=timing,
        build_s=build_s,
        first_call_s=make_s + first_s,
        compile_s=max(0.0, make_s + first_s - timing.median_ms / 1e3),
        transfer_ms=transfer.median_ms,
        host_bytes=peak_memory() - before,
        device_bytes=backend.device_memory(built, case.way),
        operations=2 * case.batch * param_tree(config).multiply_adds(),
        weight_bytes=sum(array.nbytes for array in checkpoint.weights.values()),
        file_bytes=file_bytes(checkpoint),
        page_faults=faults,
    )
    device, precision = backend.setting(built, case.way)
    return Record(case=case, result=result, versions=versions(), device=device, precision=precision)


def record(case: Case, limit_s: float) -> Record:
    """The record of a case, with its result or with the line that says why there is none."""
    try:
        return run(case, limit_s)
    except InputError as error:
        return Record(case=case, error=str(error), versions=versions())


def absence(backend: str, device: str) -> str:
    """Why a backend cannot have a device here; empty if it can."""
    try:
        get_backend(backend).require_device(device)
    except InputError as error:
        return str(error)
    return ""


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """What a function returns, and the seconds it took."""
    start = time.perf_counter()
    value = function()
    return value, time.perf_counter() - start


def peak_memory() -> int:
    """The largest resident memory that this process has had, in bytes."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def page_faults(step: Callable[[], Any]) -> int:
    """How many pages of memory the system gives to this process for a step."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def product(library: str, device: str, limit_s: float = 3.0) -> Product:
    """Rate of a square float32 product in a library, at full precision.

    Args:
        library: ``torch``, ``torch onednn``, ``jax`` or ``tensorflow``.
        device: where.
        limit_s: seconds to spend.
    """
    a = np.random.default_rng(0).standard_normal((PRODUCT_SIZE, PRODUCT_SIZE), np.float32)
    step = PRODUCTS[library](a, device)
    best_ms = measure(step, limit_s).low_ms
    rate = 2 * PRODUCT_SIZE**3 / best_ms / 1e6
    return Product(library=library, gflops=rate, device=device)


def _torch_product(a: np.ndarray, device: str) -> Callable[[], object]:
    import torch

    get_backend("torch").exact_arithmetic()
    x = torch.tensor(a, device=device)
    cuda = x.is_cuda

    def step() -> None:
        torch.mm(x, x)
        if cuda:
            torch.cuda.synchronize()

    return step


def _onednn_product(a: np.ndarray, device: str) -> Callable[[], object]:
    import torch

    x = torch.tensor(a)
    return lambda: torch.ops.mkldnn._linear_pointwise(x, x, None, "none", [], "")


def _jax_product(a: np.ndarray, device: str) -> Callable[[], object]:
    import jax

    get_backend("flax").exact_arithmetic()
    x = jax.device_put(a, jax_device(device))
    multiply = jax.jit(lambda x: x @ x)
    return lambda: jax.block_until_ready(multiply(x))


def _tensorflow_product(a: np.ndarray, device: str) -> Callable[[], object]:
    import tensorflow as tf

    if kind_of(device) == "cuda" and not tf.config.list_physical_devices("GPU"):
        raise missing(device, "tensorflow", "cpu only")  # it would take the CPU without a word
    tf.config.experimental.enable_tensor_float_32_execution(False)
    x = tf.constant(a)

    @tf.function
    def multiply(x: Any) -> Any:
        return x @ x

    def step() -> None:
        multiply(x)
        tf.test.experimental.sync_devices()

    return step


PRODUCTS: dict[str, Callable[[np.ndarray, str], Callable[[], object]]] = {
    "torch": _torch_product,
    "torch onednn": _onednn_product,
    "jax": _jax_product,
    "tensorflow": _tensorflow_product,
}


class Job(msgspec.Struct):
    """What the driver hands over: a case, the library of a product, or a backend to ask."""

    limit_s: float = 0.0
    case: Case | None = None
    library: str | None = None
    backend: str | None = None
    device: str = "cpu"

    def settle_memory(self) -> None:
        """Keep the memory of this process if the case says so; a product always does."""
        if self.case is None or self.case.memory == "kept":
            keep_memory()


def main() -> None:
    """Run the job of the command line; the record goes to the file that it names."""
    source, target = map(Path, sys.argv[1:])
    job = msgspec.json.decode(source.read_bytes(), type=Job)
    job.settle_memory()
    if job.case is not None:
        found: object = record(job.case, job.limit_s)
    elif job.backend is not None:
        found = absence(job.backend, job.device)
    else:
        found = product(str(job.library), job.device, job.limit_s)
    target.write_bytes(msgspec.json.encode(found))


if __name__ == "__main__":
    main()
