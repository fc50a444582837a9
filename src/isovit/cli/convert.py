"""``isovit convert``: any format to any format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from isovit.cli.output import SetOption


def command(
    src: Annotated[Path, typer.Argument(help="A checkpoint of any format.")],
    dst: Annotated[Path, typer.Argument(help="Target; its suffix says the container.")],
    source_format: Annotated[
        str | None, typer.Option("--from", metavar="FORMAT", help="Format of SRC.")
    ] = None,
    target_format: Annotated[
        str | None, typer.Option("--to", metavar="FORMAT", help="Format of DST.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model, where SRC does not say.")] = None,
    changes: SetOption = None,
    ema: Annotated[bool, typer.Option(help="Averaged weights, where SRC has both.")] = True,
) -> None:
    """Convert a checkpoint; the weights stay the same, bit for bit."""
    from isovit.spec.config import parse_assignments
    from isovit.spec.families import resolve_config
    from isovit.weight_convert.formats import check_target, load, save

    fields = parse_assignments(changes or [])
    name = check_target(dst, target_format)
    config = resolve_config(model, fields) if model else None
    checkpoint = load(src, config=config, format=source_format, changes=fields, ema=ema)
    save(checkpoint, dst, name)
    print(f"wrote {dst}: {checkpoint.config.family}, {checkpoint.source.format} to {name}")
