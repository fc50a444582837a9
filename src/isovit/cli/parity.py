"""``isovit parity``: the proof."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from isovit.cli.output import JsonOption, SetOption, print_json, print_table, progress

if TYPE_CHECKING:
    from isovit.parity.report import ParityReport


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_FILE", help="What to compare.")],
    backends: Annotated[
        str, typer.Option(metavar="B,B…", help="torch, flax, keras, keras:ENGINE, onnx.")
    ] = "torch,flax,keras",
    dtype: Annotated[str, typer.Option(help="float64, float32 or bfloat16.")] = "float64",
    gradients: Annotated[bool, typer.Option("--gradients", help="Compare gradients too.")] = False,
    trace: Annotated[bool, typer.Option("--trace", help="Compare every module's output.")] = False,
    changes: SetOption = None,
    images: Annotated[
        list[Path] | None, typer.Option(metavar="FILE…", help="Photographs; else random images.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Number of random images.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Of images, weights of a MODEL, loss.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, tpu.")] = "cpu",
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write one self-contained page.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Prove that backends compute one function; exit 0 if they do, 1 if not."""
    from isovit.parity.harness import BackendError, parity
    from isovit.preprocess import load_images
    from isovit.spec.config import BaseConfig, parse_assignments, require_model
    from isovit.spec.families import resolve_config
    from isovit.weight_convert.files import check_target
    from isovit.weight_convert.store import checkpoint_of, names_file

    if report is not None:
        check_target(report)
    fields = parse_assignments(changes or [])
    subject = checkpoint_of(model, fields) if names_file(model) else resolve_config(model, fields)
    config = subject if isinstance(subject, BaseConfig) else subject.config
    names = [name.strip() for name in backends.split(",")]
    with progress("parity", len(names)) as step:
        try:
            found = parity(
                subject,
                names,
                dtype=dtype,
                gradients=gradients,
                trace=trace,
                images=load_images(require_model(config, "--images"), images) if images else None,
                batch=batch,
                seed=seed,
                device=device,
                progress=step,
            )
        except BackendError as error:
            typer.echo(f"isovit: {error}", err=True)
            raise typer.Exit(1) from None
    if report is not None:
        found.write_html(report)
    if as_json:
        print_json(found.to_dict())
    else:
        _print(found, trace)
    raise typer.Exit(0 if found.equal else 1)


def _print(found: ParityReport, trace: bool) -> None:
    heads = ["pair", *(f"{kind} " for kind in found.kinds)]
    limits = ["limit", *(f"{found.limits[kind]:.0e}" for kind in found.kinds)]
    rows = [
        [f"{a} ~ {b}", *(f"{found.worst(kind, (a, b)).error:.1e}" for kind in found.kinds)]
        for a, b in found.pairs
    ]
    print_table(heads, [*rows, limits])
    if trace:
        print()
        _print_trace(found)
    print()
    print("\n".join(found.verdict()))


def _print_trace(found: ParityReport) -> None:
    """The worst pair of every module, in the order in which the modules complete."""
    worst: dict[str, float] = {}
    for row in found.differences:
        if row.kind == "activation":
            worst[row.path] = max(worst.get(row.path, 0.0), row.error)
    limit = found.limits["activation"]
    print_table(
        ["module", "worst pair ", ""],
        [(path, f"{e:.1e}", "" if e <= limit else "beyond") for path, e in worst.items()],
    )
