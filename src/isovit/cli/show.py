"""``isovit show``: the whole spec of one model."""

from __future__ import annotations

from typing import Annotated

import typer

from isovit.cli.output import JsonOption, SetOption, print_json, print_table


def command(
    model: Annotated[str, typer.Argument(help="A variant, or a config file (JSON, TOML).")],
    changes: SetOption = None,
    tree: Annotated[bool, typer.Option("--tree", help="Every module and parameter.")] = False,
    toml: Annotated[bool, typer.Option("--toml", help="The config as TOML.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="JSON Schema of the config.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show a model: config, parameters, multiply-adds, shapes, preprocessing."""
    from isovit.spec.config import json_schema, parse_assignments
    from isovit.spec.families import param_tree, resolve_config

    config = resolve_config(model, parse_assignments(changes or []))
    params = param_tree(config)
    if schema:
        print_json(json_schema(type(config)))
        return
    if toml:
        print(config.to_toml(), end="")
        return
    if as_json:
        print_json(
            {
                "model": model,
                "config": config.to_dict(),
                "parameters": params.count(),
                "trainable_parameters": params.count(trainable=True),
                "multiply_adds": params.multiply_adds(),
                "activations": params.activations(),
                "tree": [
                    {
                        "path": path,
                        "shape": param.shape,
                        "role": param.role.value,
                        "init": param.init.kind,
                        "trainable": param.trainable,
                    }
                    for path, param in params.parameters().items()
                ],
            }
        )
        return
    fixed = params.count(trainable=False)
    note = f", of which {fixed:,} do not train" if fixed else ""
    print(f"{model}: family {config.family}")
    print(f"parameters     {params.count():,}{note}")
    print(f"multiply-adds  {params.multiply_adds() / 1e9:.2f} G an image")
    print(f"output         {'x'.join(map(str, params.output or ()))}")
    print()
    print(config.to_toml(), end="")
    if tree:
        print()
        _print_tree(params)


def _print_tree(params) -> None:
    rows = []
    for path, node in params.walk():
        shape = "x".join(map(str, node.output)) if node.output else ""
        rows.append((path or "(model)", shape, ""))
        for param in node.params:
            fixed = "" if param.trainable else "  fixed"
            rows.append((f"  {param.name}", "", f"{'x'.join(map(str, param.shape))}{fixed}"))
    print_table(["module / parameter", "output", "shape"], rows)
