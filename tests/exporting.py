"""Exports of small models, read back by the form's own library; also as a process of its own.

``python -m tests.exporting KERAS_ENGINE FOLDER`` prints as JSON what ``exercise`` gives for every
form and case of that engine: Keras has one engine in a process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec
import numpy as np

from isovit.backends import get_backend
from isovit.export import exporter
from isovit.export.forms import target
from isovit.parity.compare import error
from isovit.parity.job import draw_inputs
from isovit.spec.config import Config
from isovit.spec.families import FAMILIES
from isovit.spec.initialize import probe
from isovit.weight_convert.checkpoint import Checkpoint
from parity_tests.examples import NIGHTLY, examples_of
from tests.small import T2T, VIT

OWN: dict[str, Config] = {
    "timm": VIT.replace(depth=1),
    "vit_pytorch": VIT.replace(
        depth=1, patch_embed="norm_linear_norm", qkv_bias=False, head_dim=5, norm_eps=1e-5,
        pool="mean", pos_embed_tokens="patches", final_norm="pooled", in_channels=1,
    ),
    "distilled": VIT.replace(depth=1, dist_token=True, dist_head=True, activation="gelu_tanh"),
    "performer": T2T.replace(performer_upcast=True, image_size=(16, 20)),
    "transformer": T2T.replace(token_mixer="transformer", layer_scale_init=0.1),
    "full": T2T.replace(token_mixer="full", pos_embed="learned", num_classes=0, pool="none"),
}  # fmt: skip
EXAMPLES: dict[str, dict[str, Config]] = {
    family: examples_of(family) for family in FAMILIES if family not in ("vit", "t2t_vit")
}
CASES = OWN | {name: config for examples in EXAMPLES.values() for name, config in examples.items()}
"""Of ViT and T2T-ViT the forms that export differently, of the others all their examples."""

NAMES = {"onnx": "a.onnx", "pt2": "a.pt2", "stablehlo": "a.stablehlo", "saved_model": "a"}
FORMS = {
    "torch": ("onnx", "pt2"),
    "flax": ("stablehlo",),
    "keras:torch": ("onnx",),
    "keras:tensorflow": ("onnx", "saved_model"),
    "keras:jax": ("saved_model",),
}
"""Those that need nothing but the shared environment."""


def cases(backend: str, form: str) -> tuple[str, ...]:
    """Those that a backend exports in a form, each in seconds: all of them when nightly."""
    if NIGHTLY:
        return tuple(CASES)
    own = ("vit_pytorch", "distilled", "performer") if backend.startswith("keras") else tuple(OWN)
    some = 2 if (backend, form) == ("torch", "onnx") else 1  # of each family; the first step is pt2
    return (*own, *(name for examples in EXAMPLES.values() for name in list(examples)[:some]))


JAX2ONNX = ("flax", "keras:jax")


def exercise(backend: str, form: str, case: str, folder: Path) -> list[float]:
    """Export a case.

    Returns:
        The error against the model at several numbers of images, as the export itself finds it;
        and against another backend, of the file read by its form's own library.
    """
    config = CASES[case]
    checkpoint = Checkpoint(config, probe(config))
    path = folder / NAMES[form]
    with patch.object(exporter, "BATCHES", (1, 2, 5)):
        done = exporter.export(checkpoint, target(path, backend))
    assert [p.name for p in folder.iterdir()] == [path.name]
    images = draw_inputs(config, 4, seed=0)[0]
    return [done.error, error(OPEN[form](path)(images), reference(checkpoint, images))]


def reference(checkpoint: Checkpoint, images: np.ndarray) -> np.ndarray:
    """The output of the model in torch, which compiles nothing; in Flax where there is no torch."""
    runtime = get_backend("torch" if find_spec("torch") else "flax")
    model = runtime.build(checkpoint.config, checkpoint.weights, device="cpu")
    return runtime.forward(model, images)


def refusal(backend: str, form: str, folder: Path) -> str:
    """What is said of an export whose weights are not quite the model's."""
    config = CASES["timm"]
    weights = probe(config)
    off = weights | {"blocks.0.mlp.fc1.kernel": weights["blocks.0.mlp.fc1.kernel"] * 1.001}
    module = import_module(f"isovit.export.{backend.partition(':')[0]}")
    write = getattr(module, f"write_{form}")
    wrong = get_backend(backend).build(config, off, device="cpu")

    def write_another(_: object, *arguments: object) -> None:
        write(wrong, *arguments)

    with patch.object(module, f"write_{form}", write_another):
        try:
            exporter.export(Checkpoint(config, weights), target(folder / NAMES[form], backend))
        except exporter.ExportError as refused:
            return f"{refused}; left {len(list(folder.iterdir()))}"
    return "kept"


def _open_onnx(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: np.asarray(session.run(["logits"], {"images": images})[0])


def _open_pt2(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    import torch

    module = torch.export.load(path).module()
    return lambda images: module(torch.from_numpy(images)).detach().numpy()


def _open_stablehlo(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    import jax

    call = jax.export.deserialize(bytearray(path.read_bytes())).call
    return lambda images: np.asarray(call(images))


def _open_saved_model(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    import tensorflow as tf

    loaded: Any = tf.saved_model.load(str(path))
    signature = loaded.signatures["serving_default"]
    return lambda images: signature(images=tf.constant(images))["logits"].numpy()


OPEN = {
    "onnx": _open_onnx,
    "pt2": _open_pt2,
    "stablehlo": _open_stablehlo,
    "saved_model": _open_saved_model,
}


def main() -> None:
    """Exercise all forms, or those that are named, of an engine of Keras."""
    backend, folder, *forms = sys.argv[1:]
    found: dict[str, dict[str, Any]] = {}
    for form in forms or FORMS[backend]:
        found[form] = {}
        for case in cases(backend, form):
            place = Path(folder) / form / case
            place.mkdir(parents=True)
            found[form][case] = exercise(backend, form, case, place)
        place = Path(folder) / form / "refused"
        place.mkdir()
        found[form]["refused"] = refusal(backend, form, place)
    print(msgspec.json.encode(found).decode())


if __name__ == "__main__":
    main()
