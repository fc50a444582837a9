"""``isovit look``: attention and feature maps over a photograph."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from isovit.cli.output import SetOption
from isovit.errors import InputError


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_FILE", help="What looks.")],
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The photograph.")],
    out: Annotated[Path, typer.Option(metavar="FILE.png", help="Where to put the picture.")],
    backend: Annotated[str, typer.Option(help="torch, flax, keras or keras:ENGINE.")] = "torch",
    engine: Annotated[str | None, typer.Option(help="Of Keras: tensorflow, jax, torch.")] = None,
    block: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Whose heads; by default the last one's.")
    ] = None,
    arrays: Annotated[
        Path | None,
        typer.Option(metavar="FILE.npz", help="Keep maps: (heads, rows, columns) by path."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float64, float32 or bfloat16.")] = "float64",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, tpu.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights of a MODEL.")] = 0,
    changes: SetOption = None,
) -> None:
    """Draw what a model looks at: rollout, the heads of a block, and feature maps of all blocks.

    In float64, so that the picture is the same in every backend.
    """
    from isovit.backends import check_dtype, get_backend, parse_backend
    from isovit.look.attention import attention_maps, rollout
    from isovit.look.picture import draw, features, photograph, write_picture
    from isovit.preprocess import load_images
    from isovit.spec.config import parse_assignments, require_model
    from isovit.weight_convert.files import check_target, write_npz
    from isovit.weight_convert.store import checkpoint_of
    from isovit.weight_convert.tensors import Tensors

    name = f"{backend}:{engine}" if engine else backend
    parse_backend(name)
    check_dtype(dtype)
    if name == "onnx":
        raise InputError("onnx has no modules to look into; take torch, flax or keras")
    if out.suffix != ".png":
        raise InputError(f"wanted --out FILE.png, got {out}")
    for target in (out, arrays):
        if target is not None:
            check_target(target)
    checkpoint = checkpoint_of(model, parse_assignments(changes or []), seed)
    config = require_model(checkpoint.config, "isovit look")
    inputs = load_images(config, [image])
    runtime = get_backend(name)
    runtime.exact_arithmetic()
    built = runtime.build(config, checkpoint.weights, dtype=dtype, device=device)
    outputs = runtime.trace(built, inputs)
    maps = attention_maps(config, checkpoint.weights, outputs)
    paths = list(maps)
    if block is not None and block >= len(paths):
        raise InputError(f"--block {block}: the model has {len(paths)}, of 0 to {len(paths) - 1}")
    at = paths[-1 if block is None else block]
    blocks = features(outputs, maps)
    if arrays is not None:
        seen = {path: found.seen()[0] for path, found in maps.items()}
        tensors = Tensors.of({"rollout": rollout(list(maps.values()))[0], **seen})
        write_npz(arrays, tensors, comment="")
    write_picture(out, draw(photograph(config, inputs[0]), maps, blocks, at))
    print(f"wrote {out}: {len(paths)} attentions, heads of {at}, {len(blocks)} blocks")
