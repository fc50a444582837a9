"""The process of one backend: ``python -m isovit.parity.worker FOLDER BACKEND RESULT.npz``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from isovit.backends import get_backend
from isovit.errors import InputError
from isovit.parity.job import Job


def run(job: Job, name: str) -> dict[str, np.ndarray]:
    """Run a job through a backend.

    Args:
        job: what to run.
        name: of the backend, with its engine.

    Returns:
        Arrays by kind and path: ``output``, ``activation/PATH``, ``gradient/PATH``, of which
        ``gradient/images`` is that of the images.
    """
    settings, backend = job.settings, get_backend(name)
    images, cotangent, others = job.inputs
    backend.exact_arithmetic()
    model = backend.build(job.config, job.weights, dtype=settings.dtype, device=settings.device)
    results: dict[str, np.ndarray] = {}
    if settings.trace:
        activations = backend.trace(model, images, others)
        results["output"] = activations.pop("")
        results.update({f"activation/{path}": array for path, array in activations.items()})
    else:
        results["output"] = backend.forward(model, images, others)
    if settings.gradients:
        gradients = backend.gradients(model, images, cotangent, others)
        results["gradient/images"] = gradients.images
        results.update({f"gradient/{path}": array for path, array in gradients.weights.items()})
    return results


def main() -> None:
    """Run the job of the command line."""
    folder, name, result = sys.argv[1:]
    start = time.perf_counter()
    try:
        results = run(Job.load(Path(folder)), name)
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    results["seconds"] = np.array(time.perf_counter() - start)
    np.savez(result, allow_pickle=False, **results)


if __name__ == "__main__":
    main()
