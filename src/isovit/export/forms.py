"""The forms, which backends can write each, and what they need for it; data and checks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from isovit.backends import full_name, require_installed, require_module
from isovit.backends.onnx.layout import ATTENTION_OPSET
from isovit.errors import InputError
from isovit.spec.config import Config
from isovit.spec.families import param_tree
from isovit.weight_convert.files import check_target

Form = Literal["onnx", "pt2", "stablehlo", "saved_model"]

SUFFIXES: dict[str, Form] = {
    ".onnx": "onnx",
    ".pt2": "pt2",
    ".stablehlo": "stablehlo",
    ".jax": "stablehlo",
    "": "saved_model",
}
"""Suffix of the target to form; without one it is a folder."""


@dataclass(frozen=True)
class Route:
    """How the models of a backend take a form.

    Attributes:
        needs: modules beside the backend's own, with the extra of isovit that installs each.
        opset: of ONNX, unless the caller says one.
        opsets: that the exporter can write.
        largest: bytes of weights that it can write; None for any number.
    """

    needs: dict[str, str] = field(default_factory=dict[str, str])
    opset: int = 0
    opsets: range = range(0)
    largest: int | None = None


GIB_2 = 2**31
ONNX = {"onnx": "onnx", "onnxruntime": "onnx", "onnxscript": "onnx"}
BY_TORCH = Route(ONNX, opset=20, opsets=range(18, 25))
BY_JAX2ONNX = Route({**ONNX, "jax2onnx": "onnx-jax"}, opset=20, opsets=range(18, 25))

ROUTES: dict[Form, dict[str, Route | str]] = {
    "onnx": {
        "torch": BY_TORCH,
        "flax": BY_JAX2ONNX,
        # tf2onnx freezes the weights into a TensorFlow graph, which is a protobuf message.
        "keras:tensorflow": Route(
            {**ONNX, "tf2onnx": "onnx"}, opset=15, opsets=range(13, 19), largest=GIB_2
        ),
        "keras:jax": BY_JAX2ONNX,
        "keras:torch": BY_TORCH,
    },
    "pt2": {"torch": Route()},
    "stablehlo": {"flax": Route(largest=GIB_2)},  # one flatbuffer
    "saved_model": {
        "keras:tensorflow": Route(),
        "keras:jax": Route({"tensorflow": "keras-tf"}),
        "keras:torch": (
            "Keras writes it through torch_xla, whose last release, 2.9, is for torch 2.9 "
            "(github.com/keras-team/keras/pull/20685); take keras:tensorflow or keras:jax"
        ),
    },
}
"""Form to backend to route, or to the reason why there is none."""


@dataclass(frozen=True)
class Target:
    """What is to be written, from which backend and how; all of it checked.

    Attributes:
        path: the file or folder.
        backend: whose exporter writes, with its engine.
        form: that the suffix of the path asks for.
        opset: of ONNX; 0 for the other forms.
        fused_attention: whether ONNX gets an Attention operator for every softmax attention.
        batch: number of images that the file takes; None for any.
    """

    path: Path
    backend: str
    form: Form
    opset: int = 0
    fused_attention: bool = False
    batch: int | None = None

    @property
    def is_folder(self) -> bool:
        """Whether the form is a folder."""
        return self.form == "saved_model"

    def check_size(self, config: Config) -> None:
        """Check that a model is not too large for the form.

        Raises:
            InputError: saying how large it is.
        """
        size, most = 4 * param_tree(config).size(), self.route.largest
        if most is not None and size >= most:
            raise InputError(
                f"{self.form} from {self.backend} holds less than {most:,} bytes, "
                f"the model has {size:,}"
            )

    @property
    def route(self) -> Route:
        """How the backend writes the form.

        Raises:
            InputError: if it cannot, with the reason.
        """
        route = ROUTES[self.form].get(self.backend)
        if isinstance(route, Route):
            return route
        ways = [name for name, found in ROUTES[self.form].items() if isinstance(found, Route)]
        why = route or f"{self.form} is from {', '.join(ways)}"
        raise InputError(f"{self.backend} has no {self.form} export: {why}")


def target(
    path: str | Path,
    backend: str,
    *,
    opset: int | None = None,
    fused_attention: bool = False,
    batch: int | None = None,
) -> Target:
    """What to export to, checked before a model is built.

    Args:
        path: its suffix decides the form: ``.onnx``, ``.pt2``, ``.stablehlo``, ``.jax``, or none
            for the folder of a SavedModel.
        backend: whose exporter to use: ``torch``, ``flax``, ``keras`` or ``keras:ENGINE``.
        opset: of ONNX; None for the route's own.
        fused_attention: whether ONNX gets one Attention operator for each softmax attention.
        batch: number of images that the file takes; None for any.

    Raises:
        InputError: if the backend has no such form or option, or something is not installed, or
            the target cannot be written.
    """
    found = Target(Path(path), full_name(backend), form_of(Path(path)), batch=batch)
    route, form = found.route, found.form
    if batch is not None and batch < 1:
        raise InputError(f"batch={batch}: wanted 1 or more")
    if form == "onnx":
        chosen = _opset(found.backend, route, opset, fused_attention)
        found = replace(found, opset=chosen, fused_attention=fused_attention)
    elif opset is not None or fused_attention:
        option = "--opset" if opset is not None else "--fused-attention"
        raise InputError(f"{option} is for ONNX; {found.path} asks for {form}")
    require_installed(backend)
    for module, extra in route.needs.items():
        require_module(f"{form} from {found.backend}", module, extra)
    check_target(found.path, found.is_folder)
    return found


def form_of(path: Path) -> Form:
    """The form that a suffix asks for.

    Raises:
        InputError: if none has it.
    """
    if path.suffix not in SUFFIXES:
        wanted = ", ".join(suffix for suffix in SUFFIXES if suffix)
        raise InputError(
            f"{path}: nothing is exported to {path.suffix}; wanted one of {wanted}, "
            "or a folder (no suffix) for a SavedModel"
        )
    return SUFFIXES[path.suffix]


def _opset(backend: str, route: Route, opset: int | None, fused: bool) -> int:
    """The opset to write: as asked for, or else the route's own, or the first that will do."""
    chosen = opset or (max(route.opset, ATTENTION_OPSET) if fused else route.opset)
    if chosen not in route.opsets:
        wish = f"opset {chosen}" + (" for --fused-attention" if opset is None else "")
        raise InputError(
            f"{wish}: the exporter of {backend} writes {route.opsets[0]} to {route.opsets[-1]}"
        )
    if fused and chosen < ATTENTION_OPSET:
        raise InputError(f"--fused-attention needs opset {ATTENTION_OPSET}, got {chosen}")
    return chosen
