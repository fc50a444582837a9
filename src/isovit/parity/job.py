"""A parity job on disk: what the harness hands to each backend's process, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from isovit.errors import InputError
from isovit.spec.config import Config, config_from_dict
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


@dataclass(frozen=True)
class Job:
    """What every backend gets: the same config, weights, images and cotangent, bit for bit."""

    config: Config
    weights: Mapping[str, np.ndarray]
    images: np.ndarray
    cotangent: np.ndarray
    settings: Settings

    def save(self, folder: Path) -> None:
        """Write the job into a folder."""
        (folder / "config.json").write_text(self.config.to_json(), encoding="utf-8")
        (folder / "settings.json").write_bytes(msgspec.json.encode(self.settings))
        write_npz(folder / "weights.npz", Tensors.of(self.weights), comment="")
        np.savez(folder / "inputs.npz", images=self.images, cotangent=self.cotangent)

    @staticmethod
    def load(folder: Path) -> Job:
        """Read the job of a folder."""
        weights, _ = read_npz(folder / "weights.npz")
        with np.load(folder / "inputs.npz") as inputs:
            return Job(
                config_from_dict(msgspec.json.decode((folder / "config.json").read_bytes())),
                weights,
                inputs["images"],
                inputs["cotangent"],
                msgspec.json.decode((folder / "settings.json").read_bytes(), type=Settings),
            )


def draw_inputs(config: Config, batch: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images and a cotangent from a seed, standard normal.

    Returns:
        (batch, height, width, channels) float32, and float64 in the shape of the output.
    """
    rng = np.random.default_rng([seed, 1])
    images = rng.standard_normal((batch, *config.image_size, config.in_channels), np.float32)
    return images, draw_cotangent(config, batch, seed)


def draw_cotangent(config: Config, batch: int, seed: int) -> np.ndarray:
    """Weights of the outputs in the scalar loss Σ output · cotangent, standard normal."""
    output = param_tree(config).output
    assert output is not None
    return np.random.default_rng([seed, 2]).standard_normal((batch, *output))


def check_images(config: Config, images: np.ndarray) -> None:
    """Check that an array holds images for a model.

    Raises:
        InputError: saying what was wanted and what came.
    """
    config.check_images(images.shape)
    if not len(images):
        raise InputError("the batch is empty; wanted one image or more")
    if images.dtype.kind != "f":
        raise InputError(f"the images are {images.dtype}; wanted normalised float32")
