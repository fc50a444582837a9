"""Readers and writers that break the promise: the suite must catch every one of them."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from isovit.errors import InputError
from isovit.weight_convert import files, huggingface, store

Plant = Callable[[Any, str, Any], None]
"""``setattr``, or what undoes itself, as pytest's."""

read, write = files.read_safetensors, files.write_safetensors


def says(message: str) -> InputError:
    """An error whose message was not made one line."""
    error = InputError("")
    error.args = (message,)
    return error


def reader(action: Callable[[Path], None]) -> Callable[[Plant], None]:
    """Plant an action before every safetensors file that is read."""

    def broken(path: Path) -> Any:
        action(path)
        return read(path)

    return lambda plant: plant(files, "read_safetensors", broken)


def fail(error: BaseException) -> Callable[[Path], None]:
    def action(path: Path) -> None:
        raise error

    return action


def leave_a_file(path: Path) -> None:
    path.with_suffix(".lock").write_text("", encoding="utf-8")


def leave_a_temporary_file(path: Path) -> None:
    os.close(tempfile.mkstemp()[0])


def change_the_source(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def die(path: Path) -> None:
    os._exit(7)


def sleep(path: Path) -> None:
    time.sleep(60)


def swell(path: Path) -> None:
    np.ones(150 << 20, np.uint8)


def write_half(plant: Plant) -> None:
    def broken(path: Path, *arguments: Any) -> None:
        path.write_bytes(b"half")
        raise InputError(f"cannot write {path}: no space left")

    plant(files, "write_safetensors", broken)


def write_nonsense(plant: Plant) -> None:
    def broken(path: Path, *arguments: Any) -> None:
        path.write_bytes(b"nonsense")

    plant(files, "write_safetensors", broken)


def write_nothing(plant: Plant) -> None:
    plant(files, "write_safetensors", lambda *_: None)


def run_pickles(plant: Plant) -> None:
    import torch

    def broken(path: Path) -> Any:
        try:
            return torch.load(path, weights_only=False)
        except Exception as error:
            raise InputError(f"{path}: {error}") from None

    plant(files, "read_pth", broken)


def follow_paths(plant: Plant) -> None:
    """Take whatever an index says for the name of a shard beside it."""
    plant(huggingface, "Path", lambda name: SimpleNamespace(name=name))


def refuse_all(plant: Plant) -> None:
    def broken(path: Path, wanted: Any) -> None:
        raise InputError(f"{path}: no")

    plant(store, "open_file", broken)


FAULTS: dict[str, Callable[[Plant], None]] = {
    "raises": reader(fail(ValueError("invalid literal"))),
    "exits": reader(fail(SystemExit(1))),
    "runs out of stack": reader(fail(RecursionError("maximum recursion depth exceeded"))),
    "says nothing": reader(fail(says(""))),
    "says two lines": reader(fail(says("wanted this\ngot that"))),
    "clears the screen": reader(fail(says("\x1b[2Jgone"))),
    "says too much": reader(fail(says("x" * 5000))),
    "leaves a file": reader(leave_a_file),
    "leaves a temporary file": reader(leave_a_temporary_file),
    "changes the source": reader(change_the_source),
    "writes half": write_half,
    "writes nonsense": write_nonsense,
    "writes nothing": write_nothing,
    "runs pickles": run_pickles,
    "follows paths": follow_paths,
    "refuses all": refuse_all,
    "dies": reader(die),
    "hangs": reader(sleep),
    "takes memory": reader(swell),
}
