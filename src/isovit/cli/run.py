"""``isovit run``: logits or top-k."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from isovit.cli.output import SetOption, print_table
from isovit.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from isovit.spec.config import Config


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_FILE", help="What to run.")],
    backend: Annotated[str, typer.Option(help="torch, flax, keras, keras:ENGINE or onnx.")],
    engine: Annotated[str | None, typer.Option(help="Of Keras: tensorflow, jax, torch.")] = None,
    images: Annotated[list[Path] | None, typer.Option(metavar="FILE…", help="Photographs.")] = None,
    array: Annotated[
        Path | None,
        typer.Option("--input", metavar="X.npy", help="Normalised float32 images, NHWC."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="Y.npy", help="Where to put the logits.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, float64 or bfloat16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, tpu.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Classes to print for each image.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights of a MODEL.")] = 0,
    changes: SetOption = None,
) -> None:
    """Run a model on photographs or arrays; print the top classes, or write the logits."""
    from isovit.backends import check_dtype, get_backend, parse_backend, require_inference
    from isovit.spec.config import parse_assignments, require_model
    from isovit.weight_convert.files import check_target
    from isovit.weight_convert.store import checkpoint_of

    name = f"{backend}:{engine}" if engine else backend
    parse_backend(name)
    check_dtype(dtype)
    if bool(images) == (array is not None):
        raise InputError("wanted either --images FILE… or --input X.npy")
    if output is not None:
        check_target(output)
    require_inference([name], dtype)
    if model.endswith(".onnx"):
        config, result = _run_file(Path(model), name, changes, images or [], array, device)
    else:
        checkpoint = checkpoint_of(model, parse_assignments(changes or []), seed)
        config = require_model(checkpoint.config, "isovit run")
        inputs = _inputs(config, images or [], array)
        runtime = get_backend(name)
        runtime.exact_arithmetic()
        built = runtime.build(config, checkpoint.weights, dtype=dtype, device=device)
        result = runtime.forward(built, inputs)
    if output is not None:
        _write(output, result)
        print(f"wrote {output}: {result.dtype} {'x'.join(map(str, result.shape))}")
    elif config.num_classes:
        _print_top(result, [path.name for path in images or []], top)
    else:
        raise InputError("the model has no head to rank classes with; give --output Y.npy")


def _run_file(
    model: Path,
    backend: str,
    changes: list[str] | None,
    images: list[Path],
    array: Path | None,
    device: str | None,
) -> tuple[Config, np.ndarray]:
    """Config and output of an exported file, which needs no framework."""
    from isovit.backends import require_module

    if backend != "onnx" or changes:
        wrong = f"--backend {backend}" if backend != "onnx" else "--set"
        raise InputError(f"{model} is an exported model: it runs by --backend onnx, not {wrong}")
    require_module("backend onnx", "onnxruntime", "onnx")
    from isovit.backends.onnx import runtime

    built = runtime.load(model, device)
    return built.config, runtime.forward(built, _inputs(built.config, images, array))


def _inputs(config: Config, images: list[Path], array: Path | None) -> np.ndarray:
    import numpy as np

    from isovit.parity.job import check_images
    from isovit.preprocess import load_images

    if array is None:
        return load_images(config, images)
    try:
        inputs = np.load(array, allow_pickle=False)
    except OSError as error:
        raise InputError(f"cannot read {array}: {error.strerror or error}") from None
    except (ValueError, EOFError) as error:
        raise InputError(f"{array}: wanted a .npy file of numbers: {error}") from None
    if not isinstance(inputs, np.ndarray):
        raise InputError(f"{array}: wanted one array in a .npy file, got an archive")
    check_images(config, inputs)
    return inputs


def _write(path: Path, array: np.ndarray) -> None:
    import numpy as np

    from isovit.weight_convert.files import replacing

    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, array)


def _print_top(logits: np.ndarray, names: list[str], top: int) -> None:
    import numpy as np

    odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
    odds /= odds.sum(axis=-1, keepdims=True)
    rows = []
    for i, row in enumerate(logits):
        for rank, label in enumerate(np.argsort(-row)[:top], start=1):
            name = (names[i] if i < len(names) else str(i)) if rank == 1 else ""
            rows.append((name, rank, label, f"{row[label]:.6f}", f"{odds[i, label]:.4f}"))
    print_table(["image", "rank ", "class ", "logit ", "probability "], rows)
