"""``isovit inspect``: what a file holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from isovit.cli.output import JsonOption, SetOption, print_json


def command(
    file: Annotated[Path, typer.Argument(help="A checkpoint.")],
    model: Annotated[str | None, typer.Option(help="The model, where the file says none.")] = None,
    source_format: Annotated[
        str | None, typer.Option("--from", metavar="FORMAT", help="The format, if it is known.")
    ] = None,
    changes: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Tell format, family and config, and what is missing, unexpected or misshaped."""
    from isovit.spec.config import parse_assignments
    from isovit.spec.families import resolve_config
    from isovit.weight_convert.store import inspect

    fields = parse_assignments(changes or [])
    config = resolve_config(model, fields) if model else None
    found = inspect(file, config=config, format=source_format, changes=fields)
    if as_json:
        print_json(found)
    else:
        print(f"file      {file}")
        print(f"format    {found.format}")
        print(f"family    {found.config.family}")
        print(f"variant   {found.variant or 'none of the published ones'}")
        print(f"tensors   {found.tensors}, {found.parameters:,} numbers, {', '.join(found.dtypes)}")
        for line in found.notes:
            print(f"note      {line}")
        for line in found.problems:
            print(f"problem   {line}")
        print()
        print(found.config.to_toml(), end="")
    if found.problems:
        raise typer.Exit(1)
