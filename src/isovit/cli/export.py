"""``isovit export``: a file that runs without isovit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from isovit.cli.output import SetOption, progress


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_FILE", help="What to export.")],
    out: Annotated[
        Path,
        typer.Argument(help="Target: .onnx, .pt2, .stablehlo, or a folder for a SavedModel."),
    ],
    backend: Annotated[str, typer.Option(help="torch, flax, keras or keras:ENGINE.")],
    opset: Annotated[int | None, typer.Option(help="Of ONNX; each backend has its own.")] = None,
    fused_attention: Annotated[
        bool, typer.Option("--fused-attention", help="ONNX Attention operators; opset 23.")
    ] = False,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Fix the number of images; else any.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights of a MODEL.")] = 0,
    changes: SetOption = None,
) -> None:
    """Export a model in float32; the file is kept if it computes what the model computes."""
    from isovit.export.exporter import LIMIT, ExportError, export
    from isovit.export.forms import target
    from isovit.spec.config import parse_assignments
    from isovit.weight_convert.store import checkpoint_of

    wanted = target(out, backend, opset=opset, fused_attention=fused_attention, batch=batch)
    checkpoint = checkpoint_of(model, parse_assignments(changes or []), seed)
    with progress("export", 3) as step:
        try:
            done = export(checkpoint, wanted, step)
        except ExportError as error:
            typer.echo(f"isovit: {error}", err=True)
            raise typer.Exit(1) from None
    how = f", opset {wanted.opset}" if wanted.opset else ""
    print(
        f"wrote {out}: {wanted.form}{how}, from {wanted.backend}, {batch or 'any'} images, "
        f"{done.bytes / 1e6:.1f} MB, error {done.error:.1e} (limit {LIMIT:.0e})"
    )
