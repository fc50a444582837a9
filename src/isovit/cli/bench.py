"""``isovit bench``: measured speed and memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from isovit.cli.output import (
    JsonOption,
    MemoryOption,
    SetOption,
    note,
    print_json,
    print_table,
    progress,
)
from isovit.errors import InputError

if TYPE_CHECKING:
    from isovit.backends.memory import Memory
    from isovit.benchmarks.records import Mode, Run

MODES: dict[str, tuple[Mode, ...]] = {
    "infer": ("infer",),
    "train": ("train",),
    "both": ("infer", "train"),
}


def command(
    models: Annotated[list[str], typer.Argument(metavar="MODEL…", help="What to measure.")],
    backends: Annotated[
        str | None, typer.Option(metavar="B,B…", help="By default all that are installed.")
    ] = None,
    ways: Annotated[
        str | None, typer.Option(metavar="W,W…", help="eager, compile, torchax, jit, graph, xla.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, tpu.")] = "cpu",
    batch: Annotated[str, typer.Option(metavar="N,N…", help="Images at a time.")] = "1",
    dtype: Annotated[
        str, typer.Option(metavar="D,D…", help="float32, float64, bfloat16.")
    ] = "float32",
    mode: Annotated[str, typer.Option(help="infer, train or both.")] = "infer",
    memory: MemoryOption = None,
    limit: Annotated[float, typer.Option(min=0.1, help="Seconds for each, at most.")] = 20.0,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Keep results; go on from them.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="A page with plots and all figures.")
    ] = None,
    changes: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure latency, throughput, memory and utilisation, each case in a process of its own."""
    from isovit.backends import check_dtype
    from isovit.benchmarks.driver import measure_all, plan, start
    from isovit.benchmarks.report import write_run
    from isovit.spec.config import parse_assignments
    from isovit.weight_convert.files import check_target

    for target in (out, report):
        if target is not None:
            check_target(target)
    dtypes = split(dtype)
    for name in dtypes:
        check_dtype(name)
    if mode not in MODES:
        raise InputError(f"--mode {mode!r}: wanted infer, train or both")
    fields = parse_assignments(changes or [])
    for model in models:
        check_model(model, fields)
    cases = plan(
        models,
        backends=split(backends) if backends else None,
        ways=split(ways) if ways else None,
        modes=MODES[mode],
        dtypes=dtypes,
        batches=numbers(batch),
        device=device,
        changes=fields,
        memory=kind_of_memory(memory),
        note=note,
    )
    run = start(out)
    with progress("bench", len(cases) + 4) as step:
        measure_all(run, cases, limit_s=limit, keep=keeper(out), progress=step)
    run.records = [record for case in cases if (record := run.find(case))]
    if report is not None:
        write_run(run, report)
    if as_json:
        print_json(run)
    else:
        print_run(run)
    if all(record.error for record in run.records):
        raise typer.Exit(1)


def keeper(path: Path | None) -> Callable[[Run], None]:
    """Saves a run after each case, where there is a file for it."""
    return lambda run: run.save(path) if path else None


def check_model(name: str, changes: dict[str, object]) -> None:
    """Check, before anything is measured, that there is such a model.

    Raises:
        InputError: if not.
    """
    from isovit.spec.config import require_model
    from isovit.spec.families import resolve_config
    from isovit.weight_convert.store import inspect, names_file

    if names_file(name):
        config = inspect(name, changes=changes).config
    else:
        config = resolve_config(name, changes)
    require_model(config, "a measurement")


def kind_of_memory(name: str | None) -> Memory | None:
    """What ``--memory`` says.

    Raises:
        InputError: if it is neither.
    """
    from isovit.backends.memory import Memory

    if name is not None and name not in get_args(Memory):
        raise InputError(f"--memory {name!r}: wanted {' or '.join(get_args(Memory))}")
    return cast("Memory | None", name)


def split(text: str) -> list[str]:
    """Words between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers(text: str) -> list[int]:
    """Positive numbers between commas.

    Raises:
        InputError: if they are none.
    """
    words = split(text)
    if not words or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise InputError(f"--batch {text!r}: wanted numbers of images, as in 1,8,64")
    return [int(word) for word in words]


def print_run(run: Run) -> None:
    """The table of a run, and what it was measured against."""
    rows: list[tuple[object, ...]] = []
    for record in run.records:
        case, result = record.case, record.result
        head = (case.model, f"{case.backend} {case.way}", case.mode, case.dtype, case.batch)
        if result is None:
            rows.append((*head, *[""] * 5, record.error or ""))
            continue
        share = run.utilisation(record)
        rows.append(
            (
                *head,
                f"{result.step.median_ms:.1f}",
                f"{100 * result.step.spread:.0f}%",
                f"{result.images_per_s(case.batch):.1f}",
                f"{result.used_bytes / 1e6:.0f}",
                f"{result.first_call_s:.1f}",
                "" if share is None else f"{share:.2f}",
            )
        )
    heads = ["model", "backend", "mode", "dtype", "batch ", "ms ", "± ", "images/s ", "MB ",
             "first call s ", "utilisation "]  # fmt: skip
    print_table(heads, rows)
    print()
    rates = ", ".join(f"{p.library} {p.gflops:.0f}" for p in run.products)
    print(f"device    {run.device['processor']}, {run.device['cores']} cores")
    print(f"products  {rates} GFLOP/s (2048³, float32); utilisation is of the best")
    for device, precision in dict.fromkeys((r.device, r.precision) for r in run.records):
        if precision:
            print(f"precision {precision} ({device})")
    for memory in dict.fromkeys(record.case.memory for record in run.records):
        print(f"memory    {memory}{' (isovit.keep_memory())' if memory == 'kept' else ''}")
