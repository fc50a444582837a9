"""The same config, weights and images through several backends, and every pair compared."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from isovit.backends import check_dtype, full_name, require_inference, require_installed
from isovit.backends.devices import kind_of, worker_environment
from isovit.errors import InputError
from isovit.parity.budgets import LIMITS, Kind
from isovit.parity.compare import error
from isovit.parity.job import Job, Settings, check_images, draw_inputs, inputs_of
from isovit.parity.report import Difference, ParityReport
from isovit.spec.config import BaseConfig
from isovit.spec.families import resolve_config
from isovit.spec.initialize import probe
from isovit.versions import versions
from isovit.weight_convert.checkpoint import Checkpoint

Progress = Callable[[str], None]


class BackendError(RuntimeError):
    """A backend's process failed; the message ends with the last line that it printed."""


def parity(
    model: Checkpoint | BaseConfig | str,
    backends: Sequence[str] = ("torch", "flax", "keras"),
    *,
    dtype: str = "float64",
    gradients: bool = False,
    trace: bool = False,
    images: np.ndarray | None = None,
    batch: int = 2,
    seed: int = 0,
    device: str | None = "cpu",
    progress: Progress | None = None,
) -> ParityReport:
    """Prove that backends compute one function, or find where they part.

    Args:
        model: a checkpoint, whose weights are used; or a config or the name of a variant, which
            gets probe weights: random ones under which every parameter shows in the output.
        backends: two or more of ``torch``, ``flax``, ``keras``, ``keras:ENGINE``, ``onnx``.
        dtype: ``float64`` for the proof; ``float32`` or ``bfloat16`` for the accuracy.
        gradients: whether to compare those of all parameters and of the images, of a fixed loss.
        trace: whether to compare the output of every module.
        images: (batch, height, width, channels) normalised images; None for random ones.
        batch: number of random images.
        seed: of the random images, of the probe weights and of the loss.
        device: where to run; None for each framework's default.
        progress: called with the name of each backend as it ends.

    Returns:
        Every pair's error for every output, activation and gradient, with the limits.

    Raises:
        InputError: if there are not two different backends, one is not installed, or the images
            do not fit the model.
        BackendError: if a backend fails.
    """
    names = _check_backends(backends)
    check_dtype(dtype)
    require_inference(names, dtype, trace=trace, gradients=gradients)
    if gradients and "gradient" not in LIMITS[dtype]:
        raise InputError(f"gradients have no limit in {dtype}: compare them in float64 or float32")
    if isinstance(model, str):
        model = resolve_config(model)
    if isinstance(model, BaseConfig):
        model = Checkpoint(model, probe(model, seed))
    if images is None:
        inputs = draw_inputs(model.config, batch, seed)
    else:
        check_images(model.config, images)
        inputs = inputs_of(model.config, images, seed)
    settings = Settings(dtype=dtype, device=device, trace=trace, gradients=gradients)
    job = Job(model.config, model.weights, inputs, settings)
    results = _run_all(job, names, progress or (lambda name: None))
    seconds = {name: float(arrays.pop("seconds")) for name, arrays in results.items()}
    return ParityReport(
        config=model.config,
        backends=tuple(names),
        dtype=dtype,
        limits=LIMITS[dtype],
        differences=tuple(_compare(results)),
        seconds=seconds,
        versions=versions(),
    )


def _check_backends(backends: Sequence[str]) -> list[str]:
    names = [full_name(name) for name in backends]
    if len(names) < 2 or len(set(names)) < len(names):
        raise InputError(f"wanted two or more different backends, got {', '.join(backends)}")
    for name in names:
        require_installed(name)
    return names


def _run_all(job: Job, names: list[str], progress: Progress) -> dict[str, dict[str, np.ndarray]]:
    """Results by backend; as many processes at a time as there are cores, on a TPU one."""
    with tempfile.TemporaryDirectory(prefix="isovit-") as text:
        folder = Path(text)
        job.save(folder)

        def run(name: str) -> dict[str, np.ndarray]:
            result = folder / f"{name.replace(':', '-')}.npz"
            _run_one(folder, name, result, job.settings.device)
            progress(name)
            with np.load(result) as arrays:
                return {key: arrays[key] for key in arrays.files}

        alone = kind_of(job.settings.device or "") == "tpu"  # which one process has to itself
        workers = 1 if alone else min(len(names), os.cpu_count() or 1)
        with ThreadPoolExecutor(max_workers=workers) as pool:
            return dict(zip(names, pool.map(run, names), strict=True))


def _run_one(folder: Path, name: str, result: Path, device: str | None) -> None:
    command = [sys.executable, "-m", "isovit.parity.worker", str(folder), name, str(result)]
    environment = worker_environment(device, os.environ)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 2:
        raise InputError(done.stderr.strip().splitlines()[-1])
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise BackendError(f"backend {name} failed: {last}")


def _compare(results: dict[str, dict[str, np.ndarray]]) -> list[Difference]:
    names = list(results)
    differences: list[Difference] = []
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            if results[a].keys() != results[b].keys():
                odd = sorted(results[a].keys() ^ results[b].keys())
                raise BackendError(f"{a} and {b} do not give the same arrays: {', '.join(odd[:4])}")
            for key in results[a]:
                head, _, path = key.partition("/")
                kind: Kind = head  # type: ignore[assignment]
                value = error(results[a][key], results[b][key])
                differences.append(Difference(kind=kind, path=path, a=a, b=b, error=value))
    return differences
