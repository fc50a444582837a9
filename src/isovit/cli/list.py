"""``isovit list``: families and variants."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from isovit.cli.output import JsonOption, print_json, print_table
from isovit.errors import InputError


def command(
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List families and variants with parameters, multiply-adds and published accuracy.

    Behind the families come the objectives, which train a model: of an encoder and what learns
    with it, parameters and multiply-adds are counted together.
    """
    from isovit.spec.families import FAMILIES, objectives, param_tree, published, variants
    from isovit.spec.objectives import OBJECTIVES

    known = (*FAMILIES, *OBJECTIVES)
    if family is not None and family not in known:
        raise InputError(f"no family named {family!r}; wanted one of {', '.join(known)}")
    rows = []
    for name, config in {**variants(), **objectives()}.items():
        if family in (None, config.family):
            tree, said = param_tree(config), published(name)
            rows.append(
                {
                    "name": name,
                    "family": config.family,
                    "image_size": config.input_shape[-3:-1],
                    "parameters": tree.count(),
                    "multiply_adds": tree.multiply_adds(),
                    "published": said and said._asdict(),
                }
            )
    if as_json:
        print_json(rows)
        return
    print_table(
        ["model", "family", "image ", "parameters ", "multiply-adds ", "top-1 "],
        [
            (
                row["name"],
                row["family"],
                "x".join(map(str, row["image_size"])),
                f"{row['parameters']:,}",
                f"{row['multiply_adds'] / 1e9:.2f} G",
                _top1(row["published"], row["image_size"]),
            )
            for row in rows
        ],
    )


def _top1(published: dict[str, Any] | None, image_size: tuple[int, int]) -> str:
    """Published accuracy, with the size of its images where the variant has another."""
    if published is None or published["top1"] is None:
        return ""
    side = published["image_size"]
    return f"{published['top1']:.1f} %" + (f" at {side}" if (side, side) != image_size else "")
