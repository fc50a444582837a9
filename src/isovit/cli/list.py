"""``isovit list``: families and variants."""

from __future__ import annotations

from typing import Annotated

import typer

from isovit.cli.output import JsonOption, print_json, print_table
from isovit.errors import InputError


def command(
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List families and variants with parameters and multiply-adds."""
    from isovit.spec.families import FAMILIES, param_tree, variants

    if family is not None and family not in FAMILIES:
        raise InputError(f"no family named {family!r}; wanted one of {', '.join(FAMILIES)}")
    rows = []
    for name, config in variants().items():
        if family in (None, config.family):
            tree = param_tree(config)
            rows.append(
                {
                    "name": name,
                    "family": config.family,
                    "image_size": config.image_size,
                    "parameters": tree.count(),
                    "multiply_adds": tree.multiply_adds(),
                }
            )
    if as_json:
        print_json(rows)
        return
    print_table(
        ["model", "family", "image ", "parameters ", "multiply-adds "],
        [
            (
                row["name"],
                row["family"],
                "x".join(map(str, row["image_size"])),
                f"{row['parameters']:,}",
                f"{row['multiply_adds'] / 1e9:.2f} G",
            )
            for row in rows
        ],
    )
