"""Measuring many cases, each in a process of its own, and keeping what is found at once."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from itertools import product as combinations
from pathlib import Path

import msgspec

from isovit.backends import full_name, require_installed, require_module
from isovit.backends.devices import kind_of, worker_environment
from isovit.backends.memory import Memory, can_keep_memory, usual_memory
from isovit.benchmarks.device import facts
from isovit.benchmarks.records import Case, Mode, Product, Record, Run, load_run, same_device
from isovit.errors import InputError
from isovit.versions import versions

WAYS = {
    "torch": ("eager", "compile", "torchax"),
    "flax": ("jit",),
    "keras:tensorflow": ("graph", "xla"),
    "keras:jax": ("jit",),
    "keras:torch": ("eager", "graph"),
    "onnx": ("onnxruntime",),
}
"""Ways of every backend, as its ``WAYS`` has them; here so that no framework need be imported."""

FORWARD_ONLY = (("keras:torch", "graph"), ("onnx", "onnxruntime"))
"""Backends and ways that do not train."""

ON_TPU = {"torch": ("torchax",), "flax": ("jit",), "keras:jax": ("jit",)}
"""The backends that reach a TPU, with the ways by which they do."""

LIBRARIES = {
    "torch": "torch",
    "torch onednn": "torch",
    "jax": "jax",
    "tensorflow": "tensorflow",
}
"""Whose matrix products are timed, and the module that each needs."""

LIMIT_S = 20.0


def plan(
    models: Sequence[str],
    *,
    backends: Sequence[str] | None = None,
    ways: Sequence[str] | None = None,
    modes: Sequence[Mode] = ("infer",),
    dtypes: Sequence[str] = ("float32",),
    batches: Sequence[int] = (1,),
    device: str = "cpu",
    changes: dict[str, object] | None = None,
    memory: Memory | None = None,
    note: Callable[[str], object] = lambda line: None,
) -> list[Case]:
    """All combinations as cases.

    Args:
        models: variants, config files or checkpoints.
        backends: with their engines; None for all that are installed.
        ways: to run; None for all of each backend, but ``torchax`` where torch has ways of its own.
        modes: ``infer``, ``train``.
        dtypes: of parameters and computation.
        batches: numbers of images.
        device: where.
        changes: of every model's config.
        memory: kept or returned; None for kept, where the C library can.
        note: gets a line on each backend that is left out for want of the device.

    Raises:
        InputError: for an unknown backend or way, or one that is not installed, or if no backend
            finds the device, or none does what is asked, or if memory cannot be kept.
    """
    if memory == "kept" and not can_keep_memory():
        raise InputError(
            "--memory kept: wanted the C library glibc, found another; take --memory returned"
        )
    names = [full_name(name) for name in backends] if backends else installed()
    for name in names:
        require_installed(name)
    known = {name: found for name in names if (found := ways_on(name, device))}
    if not known:
        raise InputError(
            f"device {device}: {', '.join(names)} cannot run there; wanted one of "
            f"{', '.join(ON_TPU)}"
        )
    for name in names if backends else ():
        if name not in known:
            note(f"device {device}: {name} cannot run there and is left out")
    chosen = {name: [w for w in known[name] if _wanted(w, ways, device)] for name in known}
    if ways and not any(chosen.values()):
        words = sorted({way for found in known.values() for way in found})
        raise InputError(f"no way named {', '.join(ways)}; wanted one of {', '.join(words)}")
    if ways and "torchax" in chosen.get("torch", ()):
        require_module("way torchax", "torchax", "torchax")
    names = having([name for name in known if chosen[name]], device, note)
    cases = [
        Case(
            model=model,
            changes=changes or {},
            backend=name,
            way=way,
            mode=mode,
            dtype=dtype,
            batch=batch,
            device=device,
            memory=memory or usual_memory(),
        )
        for model, mode, dtype, batch, name in combinations(models, modes, dtypes, batches, names)
        for way in chosen[name]
        if mode == "infer" or (name, way) not in FORWARD_ONLY
        if name != "onnx" or dtype == "float32"
    ]
    if models and not cases:
        words = " and ".join(f"{name} by {way}" for name, way in FORWARD_ONLY)
        raise InputError(
            f"wanted cases to measure, found none: {words} run forward only, and onnx in float32"
        )
    return cases


def ways_on(backend: str, device: str) -> tuple[str, ...]:
    """The ways by which a backend can run on a device; none if it cannot."""
    if kind_of(device) == "tpu":
        return ON_TPU.get(backend, ())
    return tuple(way for way in WAYS[backend] if way != "torchax" or kind_of(device) == "cpu")


def _wanted(way: str, ways: Sequence[str] | None, device: str) -> bool:
    """By default torchax is for TPUs: elsewhere nobody who has torch would take it."""
    return way in ways if ways else way != "torchax" or kind_of(device) == "tpu"


def having(
    names: Sequence[str], device: str, note: Callable[[str], object] = lambda line: None
) -> list[str]:
    """Those backends that find a device here; each is asked in a process of its own.

    Args:
        names: of backends.
        device: for which they are asked; a CPU is always there.
        note: gets a line on each that does not find it, if another does.

    Raises:
        InputError: if none does.
    """
    if kind_of(device) == "cpu":
        return list(names)
    absent = {name: _absence(name, device) for name in names}
    if all(absent.values()):
        lines = list(dict.fromkeys(absent.values()))
        if len(lines) > 1:
            prefix = f"device {device}: "
            found = [line.partition("; ")[0].removeprefix(prefix) for line in lines]
            advice = "use --device cpu, or see docs/devices.md for what each needs"
            lines = [prefix + "; ".join([*found, advice])]
        raise InputError(lines[0])
    for line in filter(None, absent.values()):
        note(line)
    return [name for name in names if not absent[name]]


def installed() -> list[str]:
    """Every backend that can run here."""
    found: list[str] = []
    for name in WAYS:
        try:
            require_installed(name)
        except InputError:
            continue
        found.append(name)
    return found


def start(path: Path | None, program: str = "isovit") -> Run:
    """The run that a file holds, to be continued, or a new one; it has the commands of both.

    Args:
        path: of the file; it need not be there.
        program: what is run, as a user writes it before its arguments.

    Raises:
        InputError: if the file is of another machine.
    """
    here, command = facts(), shlex.join([*program.split(), *sys.argv[1:]])
    if path is not None and path.exists():
        run = load_run(path)
        if not same_device(run.device, here):
            raise InputError(
                f"{path}: was measured on {run.device.get('processor')}, this is "
                f"{here['processor']}; give another --out"
            )
        if command not in run.command.split("; "):
            run.command += f"; {command}"
        return run
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Run(command=command, started=now, device=here)


def measure_all(
    run: Run,
    cases: Iterable[Case],
    *,
    limit_s: float = LIMIT_S,
    keep: Callable[[Run], None] = lambda run: None,
    progress: Callable[[str], object] = lambda step: None,
) -> None:
    """Measure products and cases that a run lacks, or has of other versions.

    Args:
        run: gets the results.
        cases: to measure.
        limit_s: seconds to spend on each.
        keep: called after each, to save what there is.
        progress: gets a word on each that is done.
    """
    cases = list(cases)
    device = cases[0].device if cases else "cpu"
    have = {product.library for product in run.products if product.device == device}
    for library, module in LIBRARIES.items():
        if library not in have and find_spec(module) is not None and _multiplies(library, device):
            if rate := _product(library, device):
                run.products.append(rate)
                keep(run)
            progress(f"product in {library}")
    for case in cases:
        old = run.find(case)
        if old is None or old.versions != versions():
            run.put(_record(case, limit_s))
            keep(run)
        progress(f"{case.model} {case.backend} {case.way}, batch {case.batch}")


def _multiplies(library: str, device: str) -> bool:
    """Whether a library can have products on a device."""
    kind = kind_of(device)
    return kind == "cpu" or library == "jax" or (kind != "tpu" and library != "torch onednn")


def _absence(backend: str, device: str) -> str:
    text, error = _work({"backend": backend, "device": device}, device)
    return msgspec.json.decode(text, type=str) if text else f"device {device}: {backend}: {error}"


def _product(library: str, device: str) -> Product | None:
    text, _ = _work({"library": library, "device": device, "limit_s": 3.0}, device)
    return msgspec.json.decode(text, type=Product) if text else None


def _record(case: Case, limit_s: float) -> Record:
    text, error = _work({"case": case, "limit_s": limit_s}, case.device)
    if text:
        return msgspec.json.decode(text, type=Record)
    return Record(case=case, error=error, versions=versions())


def _work(job: dict[str, object], device: str) -> tuple[bytes | None, str]:
    """The worker's answer, or the last line of what it said when it died."""
    with tempfile.TemporaryDirectory(prefix="isovit-") as text:
        source, target = Path(text) / "job.json", Path(text) / "result.json"
        source.write_bytes(msgspec.json.encode(job))
        command = [sys.executable, "-m", "isovit.benchmarks.worker", str(source), str(target)]
        environment = worker_environment(device, os.environ)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if target.exists():
            return target.read_bytes(), ""
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return None, lines[-1]
