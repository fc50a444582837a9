"""``isovit convert``: any format to any format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from isovit.cli.output import SetOption, note, track
from isovit.errors import InputError


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
    part: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of an objective, the model it trained.")
    ] = None,
    ema: Annotated[bool, typer.Option(help="Averaged weights, where SRC has both.")] = True,
    num_classes: Annotated[
        int | None, typer.Option(min=0, help="Classes of a new head; 0 for no head.")
    ] = None,
    image_size: Annotated[
        str | None, typer.Option(metavar="S", help="384, or 384x256: resize the positions.")
    ] = None,
    resize: Annotated[
        str | None,
        typer.Option(metavar="METHOD", help="How; by default as the library of SRC does."),
    ] = None,
) -> None:
    """Convert a checkpoint; weights that the target keeps stay the same, bit for bit."""
    from isovit.spec.config import parse_assignments
    from isovit.spec.families import resolve_config
    from isovit.weight_convert.formats import check_target
    from isovit.weight_convert.store import opened, save

    fields = parse_assignments(changes or [])
    name = check_target(dst, target_format)
    checkpoint = opened(
        src,
        config=resolve_config(model, fields) if model else None,
        format=source_format,
        changes=fields,
        ema=ema,
        num_classes=num_classes,
        image_size=parse_size(image_size),
        resize=resize,
        part=part,
    )
    notes = save(checkpoint, dst, name, track("converting"))
    for line in (*checkpoint.source.notes, *notes):
        note(line)
    print(f"wrote {dst}: {checkpoint.config.family}, {checkpoint.source.format} to {name}")


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Height and width from ``384`` or ``384x256``.

    Raises:
        InputError: if it is neither.
    """
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise InputError(f"--image-size {text!r}: wanted pixels, as in 384 or 384x256")
    return int(sides[0]), int(sides[-1])
