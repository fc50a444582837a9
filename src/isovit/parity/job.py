"""A parity job on disk: what the harness hands to each backend's process, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from isovit.errors import InputError
from isovit.spec.config import BaseConfig, config_from_dict
from isovit.spec.families import param_tree
from isovit.weight_convert.files import read_npz, write_npz
from isovit.weight_convert.tensors import Tensors


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How to run a model.

    Attributes:
        dtype: of parameters and computation.
        device: where to run.
        trace: whether to record every activation.
        gradients: whether to differentiate.
    """

    dtype: str = "float64"
    device: str | None = "cpu"
    trace: bool = False
    gradients: bool = False


class Inputs(NamedTuple):
    """What a model is run and differentiated on.

    Attributes:
        images: (batch, height, width, channels) float32, or views of them.
        cotangent: weights of the outputs in the scalar loss Σ output · cotangent, float64.
        others: what an objective takes beside the images, by argument.
    """

    images: np.ndarray
    cotangent: np.ndarray
    others: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Job:
    """What every backend gets: the same config, weights and inputs, bit for bit."""

    config: BaseConfig
    weights: Mapping[str, np.ndarray]
    inputs: Inputs
    settings: Settings

    def save(self, folder: Path) -> None:
        """Write the job into a folder."""
        (folder / "config.json").write_text(self.config.to_json(), encoding="utf-8")
        (folder / "settings.json").write_bytes(msgspec.json.encode(self.settings))
        write_npz(folder / "weights.npz", Tensors.of(self.weights), comment="")
        images, cotangent, others = self.inputs
        arrays = {"images": images, "cotangent": cotangent, **others}
        np.savez(folder / "inputs.npz", allow_pickle=False, **arrays)

    @staticmethod
    def load(folder: Path) -> Job:
        """Read the job of a folder."""
        weights, _ = read_npz(folder / "weights.npz")
        with np.load(folder / "inputs.npz") as file:
            arrays = dict(file)
        return Job(
            config_from_dict(msgspec.json.decode((folder / "config.json").read_bytes())),
            weights,
            Inputs(arrays.pop("images"), arrays.pop("cotangent"), arrays),
            msgspec.json.decode((folder / "settings.json").read_bytes(), type=Settings),
        )


def draw_inputs(config: BaseConfig, batch: int, seed: int) -> Inputs:
    """Images and a cotangent from a seed, standard normal, and what an objective takes beside."""
    rng = np.random.default_rng([seed, 1])
    images = rng.standard_normal((batch, *config.input_shape), np.float32)
    return inputs_of(config, images, seed)


def inputs_of(config: BaseConfig, images: np.ndarray, seed: int) -> Inputs:
    """Given images, and the rest from a seed."""
    output = param_tree(config).output
    assert output is not None
    cotangent = np.random.default_rng([seed, 2]).standard_normal((len(images), *output))
    others = config.draw(len(images), np.random.default_rng([seed, 3]))
    return Inputs(images, cotangent, others)


def check_images(config: BaseConfig, images: np.ndarray) -> None:
    """Check that an array holds images for a model.

    Raises:
        InputError: saying what was wanted and what came.
    """
    config.check_images(images.shape)
    if not len(images):
        raise InputError("the batch is empty; wanted one image or more")
    if images.dtype.kind != "f":
        raise InputError(f"the images are {images.dtype}; wanted normalised float32")
