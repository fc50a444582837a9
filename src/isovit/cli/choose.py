"""``isovit choose``: a backend, with the reasons."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from isovit.cli.bench import check_model, keeper, kind_of_memory, numbers, split
from isovit.cli.output import JsonOption, MemoryOption, SetOption, print_json, progress
from isovit.errors import InputError


def command(
    models: Annotated[list[str], typer.Argument(metavar="MODEL…", help="What is to run.")],
    objective: Annotated[str, typer.Option(help="latency, throughput or memory.")] = "latency",
    results: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="Of isovit bench; what it lacks is measured."),
    ] = None,
    backends: Annotated[
        str | None,
        typer.Option(metavar="B,B…", help="Those to take; keras for any engine."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, tpu.")] = "cpu",
    batch: Annotated[
        str | None, typer.Option(metavar="N,N…", help="Images at a time; by the objective.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, float64 or bfloat16.")] = "float32",
    memory: MemoryOption = None,
    limit: Annotated[float, typer.Option(min=0.1, help="Seconds for each, at most.")] = 6.0,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="A page with plots and all figures.")
    ] = None,
    changes: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Recommend a backend for this device: which, how sure, and what another would cost."""
    from isovit.backends import check_dtype
    from isovit.benchmarks.choose import BATCHES, UNITS, Objective, choose
    from isovit.benchmarks.driver import measure_all, plan, start
    from isovit.benchmarks.report import write_choices
    from isovit.spec.config import parse_assignments
    from isovit.weight_convert.files import check_target
    from isovit.weight_convert.store import names_file

    if objective not in UNITS:
        raise InputError(f"--objective {objective!r}: wanted {', '.join(UNITS)}")
    wanted = cast("Objective", objective)
    check_dtype(dtype)
    for target in (results, report):
        if target is not None:
            check_target(target)
    fields = parse_assignments(changes or [])
    for model in models:
        check_model(model, fields)
    names = allowed(backends)
    cases = plan(
        models,
        backends=names,
        dtypes=(dtype,),
        batches=numbers(batch) if batch else BATCHES[wanted],
        device=device,
        changes=fields,
        memory=kind_of_memory(memory),
    )
    run = start(results)
    with progress("measuring", len(cases) + 4) as step:
        measure_all(run, cases, limit_s=limit, keep=keeper(results), progress=step)
    run.records = [record for case in cases if (record := run.find(case))]
    choices = [choose(run, model, wanted, names) for model in models]
    files = [model if names_file(model) else f"{model}.safetensors" for model in models]
    if report is not None:
        write_choices(run, choices, files, report)
    if as_json:
        print_json(choices)
        return
    for file, choice in zip(files, choices, strict=True):
        print("\n".join(choice.verdict()))
        print(f"\n{choice.code(file)}")


def allowed(backends: str | None) -> list[str]:
    """The backends that may be taken: ``keras`` stands for every engine that is installed.

    Raises:
        InputError: if one is unknown or not installed.
    """
    from isovit.backends import full_name, require_installed
    from isovit.benchmarks.driver import installed

    if backends is None:
        return installed()
    names: list[str] = []
    for name in split(backends):
        if name == "keras":
            names += [found for found in installed() if found.startswith("keras:")]
        else:
            require_installed(name)
            names.append(full_name(name))
    if not names:
        raise InputError(f"--backends {backends}: none of them is installed")
    return list(dict.fromkeys(names))
