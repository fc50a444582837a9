"""``isovit init``: seeded canonical weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from isovit.cli.output import SetOption


def command(
    model: Annotated[str, typer.Argument(help="A variant, or a config file (JSON, TOML).")],
    out: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="Target.")],
    seed: Annotated[int, typer.Option(min=0, help="Of the generator.")] = 0,
    changes: SetOption = None,
) -> None:
    """Draw weights by the published scheme; the same seed gives the same bits everywhere."""
    from isovit.spec.config import parse_assignments
    from isovit.spec.families import resolve_config
    from isovit.spec.initialize import init
    from isovit.weight_convert.checkpoint import Checkpoint
    from isovit.weight_convert.formats import check_target
    from isovit.weight_convert.store import save

    config = resolve_config(model, parse_assignments(changes or []))
    check_target(out, "isovit")
    save(Checkpoint(config, init(config, seed)), out, "isovit")
    print(f"wrote {out}: {model}, seed {seed}")
