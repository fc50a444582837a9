"""Where the time of a forward pass goes, by operator.

Usage: python benchmarks/operators.py MODEL… [--backends torch,flax,keras:jax,keras:torch,onnx]
                                    [--batch 8] [--steps 5] [--out FILE.json]

By the profilers of PyTorch and of onnxruntime, operator by operator, and by that of JAX, whose
compiled program is made of fusions: each goes by the costly operations in it, so that attention is
``dot+reduce+exponential`` and a product behind its LayerNorm ``dot+reduce``. Each model and backend
is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import isovit
from isovit.backends import get_backend, quiet
from isovit.backends.devices import worker_environment
from isovit.benchmarks.device import facts
from isovit.parity.job import draw_inputs
from isovit.weight_convert.files import replacing

BACKENDS = ("torch", "flax", "keras:jax", "keras:torch", "onnx")
SMALLEST = 0.01
"""Operators that take less are the rest."""

COSTLY = ("dot", "convolution", "concatenate", "gather", "reduce", "exponential", "erf")
"""Operations of XLA that a fusion is named after, where it has some of them."""

Times = tuple[float, dict[str, float]]
"""Seconds of a step, and seconds by operator."""


def step_of(model: str, backend_name: str, batch: int, way: str) -> Callable[[], Any]:
    """A forward pass, with memory kept, as ``isovit bench`` measures it."""
    isovit.keep_memory()
    config, backend = isovit.config(model), get_backend(backend_name)
    built = backend.build(config, isovit.init(config, seed=0), device="cpu")
    images = backend.put(built, draw_inputs(config, batch, seed=0)[0])
    return backend.inference(built, images, way)


def by_torch(model: str, backend_name: str, batch: int, steps: int) -> Times:
    """A model of torch, or of Keras on it."""
    from torch.profiler import ProfilerActivity, profile

    step = step_of(model, backend_name, batch, "eager")
    seconds = timed(step, steps)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
    microseconds = {
        event.key.removeprefix("aten::"): event.self_cpu_time_total
        for event in profiler.key_averages()
    }
    return seconds, {name: time_us / 1e6 / steps for name, time_us in microseconds.items()}


def by_jax(model: str, backend_name: str, batch: int, steps: int) -> Times:
    """A model of Flax, or of Keras on JAX, as XLA compiled it."""
    import jax

    step = step_of(model, backend_name, batch, "jit")
    seconds = timed(step, steps)
    operations: dict[tuple[str, str], str] = {}
    for executable in jax.devices("cpu")[0].client.live_executables():
        for module in executable.hlo_modules():
            for name, operation in operations_of(module.to_string()).items():
                operations[module.name, name] = operation
    with tempfile.TemporaryDirectory(prefix="isovit-") as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                step()
        (path,) = Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(path)).planes
        events = [event for plane in planes for line in plane.lines for event in line.events]
    times: dict[str, float] = defaultdict(float)
    for event in events:
        said = dict(event.stats)
        if "hlo_op" in said:
            operation = operations[said["hlo_module"], said["hlo_op"]]
            times[operation] += event.duration_ns / 1e9 / steps
    times.pop("while", None)  # what is in it is there by itself
    return seconds, times


def operations_of(program: str) -> dict[str, str]:
    """What each instruction of a program of XLA does, by its name; of a fusion the costly parts."""
    within: dict[str, set[str]] = {}
    found: dict[str, tuple[str, str | None]] = {}
    computation = ""
    for line in program.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*{$", line):
            computation = header[1]
        elif told := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = (?:\(.*?\)|\S+) ([\w-]+)\(", line):
            calls = re.search(r"calls=%?([\w.-]+)", line)
            found[told[1]] = told[2], calls and calls[1]
            within.setdefault(computation, set()).add(told[2])
    return {
        name: "+".join(part for part in COSTLY if part in within.get(calls or "", ())) or operation
        for name, (operation, calls) in found.items()
    }


def by_onnxruntime(model: str, backend_name: str, batch: int, steps: int) -> Times:
    """A model as ``isovit export`` writes it from torch."""
    import onnxruntime

    config = isovit.config(model)
    images = draw_inputs(config, batch, seed=0)[0]
    with tempfile.TemporaryDirectory(prefix="isovit-") as folder:
        path = Path(folder) / "model.onnx"
        command = ["-m", "isovit", "export", model, str(path), "--backend", "torch"]
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
        options = onnxruntime.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: images}
        seconds = timed(lambda: session.run(None, feed), steps)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    operators: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            operators[event["args"]["op_name"]] += event["dur"] / 1e6
    runs = sum(event["name"] == "model_run" for event in events)
    return seconds, {name: total / runs for name, total in operators.items()}


def timed(step: Callable[[], Any], steps: int) -> float:
    """Seconds of the fastest of some steps, after two that warm up."""
    times: list[float] = []
    for _ in range(2 + steps):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return min(times[2:])


def measure(model: str, backend: str, batch: int, steps: int) -> dict[str, Any]:
    """The shares of a step by operator, largest first."""
    profilers = {"onnx": by_onnxruntime, "flax": by_jax, "keras:jax": by_jax}
    profiler = profilers.get(backend, by_torch)
    with quiet():
        seconds, operators = profiler(model, backend, batch, steps)
    total = sum(operators.values())
    shares = {name: round(part / total, 3) for name, part in operators.items()}
    large = sorted((-share, name) for name, share in shares.items() if share >= SMALLEST)
    return {
        "model": model,
        "backend": backend,
        "batch": batch,
        "step_ms": round(1e3 * seconds, 1),
        "operators": {name: -share for share, name in large},
    }


def main() -> None:
    """Profile each model in each backend, and print or keep what came of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("models", nargs="+")
    parser.add_argument("--backends", default=",".join(BACKENDS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    backends = chosen.backends.split(",")
    if chosen.here:
        print(json.dumps(measure(chosen.models[0], backends[0], chosen.batch, chosen.steps)))
        return
    records: list[dict[str, Any]] = []
    for model in chosen.models:
        for backend in backends:
            counts = [f"--batch={chosen.batch}", f"--steps={chosen.steps}"]
            said = subprocess.run(
                [sys.executable, __file__, model, "--backends", backend, *counts, "--here"],
                env=worker_environment("cpu", os.environ),
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            records.append(json.loads(said.splitlines()[-1]))
            told = ", ".join(
                f"{name} {share:.0%}" for name, share in records[-1]["operators"].items()
            )
            print(f"{model} {backend}: {records[-1]['step_ms']} ms: {told}", flush=True)
    if chosen.out:
        run = {
            "command": shlex.join(["python", "benchmarks/operators.py", *sys.argv[1:]]),
            "device": facts(),
            "profiles": records,
        }
        with replacing(chosen.out) as temporary:
            temporary.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
