"""What an exported file calls its input and output, and how it says whose model it is; data only.

An ONNX file keeps weights as its exporter left them, so there are no names of parameters here.
"""

from __future__ import annotations

from typing import Any

import msgspec

from isovit.errors import InputError
from isovit.spec.config import Config, config_from_dict, require_model

INPUT, OUTPUT = "images", "logits"
BATCH = "batch"
"""Name of the first axis of both, where it may have any length."""

ATTENTION_OPSET = 23
"""The first opset with an Attention operator."""

HEADER = "isovit"
"""Key, in the metadata of a file, of the JSON ``{"format": NAME, "config": {…}}``."""

ABOUT = (
    "images: float32, (batch, height, width, channels), normalised as preprocess of the config "
    "says; logits: float32, (batch, classes), or the features of a model without a head"
)


class _Header(msgspec.Struct):
    config: dict[str, Any]


def header(form: str, config: Config) -> str:
    """What a file says of its model."""
    return msgspec.json.encode({"format": form, "config": config.to_dict()}).decode()


def config_of(text: str | None, path: object) -> Config:
    """The config that a file's header says.

    Raises:
        InputError: if it is no header of isovit's.
    """
    try:
        said = msgspec.json.decode(text or "", type=_Header)
    except msgspec.DecodeError:
        raise InputError(f"{path}: says no config; wanted a file of isovit export") from None
    return require_model(config_from_dict(said.config, str(path)), str(path))
