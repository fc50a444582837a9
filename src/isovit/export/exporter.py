"""Export a model, read the file back, and keep it only if it computes what the model computes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np

from isovit.backends import exporting, get_backend, quiet
from isovit.backends.onnx.layout import header
from isovit.errors import InputError, reason
from isovit.export.forms import Target
from isovit.parity.budgets import LIMITS
from isovit.parity.compare import error
from isovit.parity.job import draw_inputs
from isovit.spec.config import require_model
from isovit.weight_convert.checkpoint import Checkpoint
from isovit.weight_convert.files import FOLDER_MARK, replacing

LIMIT = LIMITS["float32"]["output"]
BATCHES = (1, 3)
"""Numbers of images that a file for any number is checked with; the exporters' example has 2."""

Function = Callable[[np.ndarray], np.ndarray]


class ExportError(RuntimeError):
    """An exporter failed, or what it wrote is not the model; nothing was kept."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        error: max|Δ| / max|reference| between file and model.
        bytes: size, of all files together.
    """

    error: float
    bytes: int


def export(
    checkpoint: Checkpoint, target: Target, progress: Callable[[str], object] | None = None
) -> Exported:
    """Export a model in float32; what is written stays only if it computes what the model does.

    Args:
        checkpoint: config and weights.
        target: what to write, as ``isovit.export.forms.target`` gives it.
        progress: called with ``built``, ``written`` and ``checked`` as each is done.

    Raises:
        InputError: if the model is too large for the form, has no attention to fuse, or cannot be
            written there.
        ExportError: if the exporter fails, or what it wrote is not the model.
    """
    step = progress or (lambda name: None)
    config = require_model(checkpoint.config, "export")
    target.check_size(config)
    runtime = get_backend(target.backend)
    # On the CPU, where float32 is exact: switches for other devices would go into the file.
    model = runtime.build(config, checkpoint.weights, dtype="float32", device="cpu")
    step("built")
    module = import_module(f"isovit.export.{target.backend.partition(':')[0]}")
    with replacing(target.path, target.is_folder) as temporary:
        with _exporting(target):
            getattr(module, f"write_{target.form}")(model, temporary, target)
            if target.is_folder:
                text = header(target.form, config)
                (temporary / FOLDER_MARK).write_text(text, encoding="utf-8")
        step("written")
        worst = 0.0
        with _exporting(target):
            function = _opened(target, module, temporary)
            for count in [target.batch] if target.batch else BATCHES:
                images = draw_inputs(config, count, seed=count).images
                worst = max(worst, error(function(images), runtime.forward(model, images)))
        if not worst <= LIMIT:
            raise ExportError(
                f"{target.path.name} is not the model, nothing is kept: "
                f"error {worst:.1e}, limit {LIMIT:.0e}"
            )
        step("checked")
        files = [file for file in temporary.parent.rglob("*") if file.is_file()]
        size = sum(file.stat().st_size for file in files)
        _move_data(temporary, target.path)
    return Exported(worst, size)


@contextmanager
def _exporting(target: Target) -> Iterator[None]:
    """Within it a framework's exporter works: silently, and whatever it raises is one line."""
    plain = exporting.set(target.form == "onnx")
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except InputError:
        raise
    except Exception as failure:  # exporters have no class of errors in common
        raise ExportError(
            f"{target.form} from {target.backend} failed, nothing is kept: {reason(failure)}"
        ) from failure
    finally:
        exporting.reset(plain)


def _opened(target: Target, module: ModuleType, path: Path) -> Function:
    """The function of what was written."""
    if target.form == "onnx":
        from isovit.backends.onnx.runtime import load

        return load(path)
    return getattr(module, f"open_{target.form}")(path)


def _move_data(temporary: Path, path: Path) -> None:
    """Put the weights of a large ONNX model, which lie in a second file, beside the target."""
    data = temporary.with_name(f"{temporary.name}.data")
    if data.is_file():
        data.replace(path.with_name(data.name))
