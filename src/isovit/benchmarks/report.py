"""A run, or a choice made from it, as one self-contained page: plots, and every figure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

from isovit.benchmarks.choose import UNITS, Choice
from isovit.benchmarks.records import Case, Record, Result, Run
from isovit.report.page import Content, element, facts, number, table, write_page
from isovit.report.plots import Value, bars, by_batch, exact, interval, key

HEADS = (
    "backend", "batch ", "ms ", "low ", "high ", "repeats ", "images/s ", "host MB ", "device MB ",
    "page faults ", "weights MB ", "build s ", "first call s ", "transfer ms ", "GFLOP ",
    "GFLOP/s ", "utilisation ", "software ",
)  # fmt: skip


def write_run(run: Run, path: Path) -> None:
    """Write the page of ``isovit bench``, all or nothing."""
    write_page(path, f"Speed on {_device(run)}", measurements(run))


def write_choices(run: Run, choices: Sequence[Choice], files: Sequence[str], path: Path) -> None:
    """Write the page of ``isovit choose``, all or nothing.

    Args:
        run: from which the choices were made.
        choices: one for each model.
        files: with the weights of each model, for the code to start from.
        path: of the page.
    """
    found = (
        part for choice, file in zip(choices, files, strict=True) for part in _choice(choice, file)
    )
    write_page(path, f"A backend on {_device(run)}", [*found, *measurements(run)])


def measurements(run: Run) -> Iterator[Element]:
    """Plots and every figure for each model, and how they were measured."""
    groups: dict[str, list[Record]] = {}
    for record in run.records:
        groups.setdefault(_subject(record.case), []).append(record)
    software = list(dict.fromkeys(_software(record) for record in run.records))
    for name, records in groups.items():
        yield element("h2", name)
        yield from _plots(run, records)
        rows = [
            _row(run, record, record.result, software.index(_software(record)) + 1)
            for record in records
            if record.result
        ]
        if rows:
            yield table(HEADS, rows, label=f"every figure of {name}")
        for record in records:
            if record.error:
                yield element(
                    "p",
                    f"{_name(record.case)}, batch {record.case.batch}, did not run: {record.error}",
                )
    yield element("h2", "How it was measured")
    yield element(
        "p",
        "ms: median of a step; low, high: its 95% confidence interval. Host MB: largest resident "
        "memory of the process beyond that of its imports. Page faults: pages of memory that the "
        "system had to give to the process for a step. First call: tracing, compiling and the "
        "first step. Transfer: of a batch of images to the device. GFLOP: operations of the "
        "forward pass; utilisation: their rate over the best product rate.",
    )
    yield facts({**_machine(run), **{f"software {i}": s for i, s in enumerate(software, 1)}})


def _choice(choice: Choice, file: str) -> Iterator[Element]:
    best, unit = choice.best, UNITS[choice.objective]
    yield element("h2", f"{choice.model}: {choice.objective}")
    yield element("div", element("p", choice.verdict()[0]), class_="verdict good")
    yield element("p", _how_sure(choice))
    values = {f"{o.backend} {o.way}": Value(o.value, o.low, o.high) for o in choice.options}
    figure = bars(choice.objective.capitalize(), values, unit=unit)
    yield element("div", figure, class_="plots")
    heads = ("backend", f"{unit} ", "costs × ", "", "95% interval ", "batch ")
    rows = (
        (
            f"{option.backend} {option.way}",
            number(option.value),
            f"{choice.cost(option):.2f}",
            "taken" if option is best else choice.certainty(option),
            interval(Value(option.value, option.low, option.high)),
            str(option.batch),
        )
        for option in choice.options
    )
    yield table(heads, rows, label=f"what each backend costs for {choice.model}")
    for line in choice.failed:
        yield element("p", line)
    yield element("p", "Start from:")
    yield element("pre", element("code", choice.code(file)), tabindex=0)


def _how_sure(choice: Choice) -> str:
    best = choice.best.backend
    if not choice.options[1:]:
        return f"Nothing else than {best} was measured."
    if choice.objective == "memory":
        return "Memory is read once, so that no interval tells how sure this is."
    if choice.equals:
        others = ", ".join(option.backend for option in choice.equals)
        return f"Not certain: the 95% intervals of {best} and of {others} overlap."
    return f"Certain: the 95% interval of {best} is apart from that of every other."


def _plots(run: Run, records: Sequence[Record]) -> Iterator[Element]:
    """Throughput, memory and utilisation against the batch, a line for each way."""
    rates: dict[str, dict[int, Value]] = {}
    memory: dict[str, dict[int, Value]] = {}
    shares: dict[str, dict[int, Value]] = {}
    for record in records:
        if record.result:
            name, batch, step = _name(record.case), record.case.batch, record.result.step
            times = (step.median_ms, step.high_ms, step.low_ms)
            rates.setdefault(name, {})[batch] = Value(*(1e3 * batch / ms for ms in times))
            memory.setdefault(name, {})[batch] = exact(record.result.used_bytes / 1e6)
            share = run.utilisation(record)
            if share is not None:
                shares.setdefault(name, {})[batch] = exact(100 * share)
    figures = [
        by_batch(caption, curves, unit=unit, log=unit == "images/s")
        for caption, unit, curves in (
            ("Throughput", "images/s", rates),
            ("Peak memory", "MB", memory),
            ("Utilisation", "%", shares),
        )
        if curves
    ]
    yield element("div", *figures, class_="plots")
    if len({batch for points in rates.values() for batch in points}) > 1:
        yield key(rates)


def _row(run: Run, record: Record, result: Result, software: int) -> list[Content]:
    case = record.case
    step, share = result.step, run.utilisation(record)
    return [
        _name(case),
        str(case.batch),
        f"{step.median_ms:.2f}",
        f"{step.low_ms:.2f}",
        f"{step.high_ms:.2f}",
        str(step.repeats),
        f"{result.images_per_s(case.batch):.1f}",
        f"{result.host_bytes / 1e6:.0f}",
        "" if result.device_bytes is None else f"{result.device_bytes / 1e6:.0f}",
        "" if result.page_faults is None else str(result.page_faults),
        f"{result.weight_bytes / 1e6:.1f}",
        f"{result.build_s:.2f}",
        f"{result.first_call_s:.2f}",
        f"{result.transfer_ms:.2f}",
        f"{result.operations / 1e9:.2f}",
        f"{result.gflops:.1f}",
        "" if share is None else f"{share:.2f}",
        str(software),
    ]


def _machine(run: Run) -> dict[str, Content]:
    """Facts of the device and of the run."""
    device = run.device
    clock, memory = device.get("clock_mhz"), device.get("memory_bytes")
    return {
        "command": element("code", run.command),
        "started": run.started,
        "processor": _device(run),
        "clock": f"{clock} MHz" if clock else "unknown",
        "memory": f"{memory / 1e9:.0f} GB" if memory else "unknown",
        "accelerators": ", ".join(device.get("accelerators") or ["none"]),
        "system": f"{device.get('system')}, Python {device.get('python')}",
        "load": f"{device.get('load')} at the start",
        "products": ", ".join(f"{p.library} {p.gflops:.0f}" for p in run.products)
        + " GFLOP/s (2048³, float32)",
    }


def _device(run: Run) -> str:
    return f"{run.device.get('processor')}, {run.device.get('cores')} cores"


def _subject(case: Case) -> str:
    """What is measured; its backend, way and batch tell how."""
    changes = "".join(f" {field}={value}" for field, value in case.changes.items())
    return (
        f"{case.model}{changes}, {case.mode}, {case.dtype} on {case.device}, memory {case.memory}"
    )


def _name(case: Case) -> str:
    return f"{case.backend} {case.way}"


def _software(record: Record) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    return f"{packages or 'unknown'}; float32 products: {record.precision}"
