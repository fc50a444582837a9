"""Photographs to inputs: one implementation for all backends, since it is part of the function.

The steps are those of torchvision's evaluation transforms, bit for bit, without torchvision:
resize on the uint8 image with Pillow, centre crop, scale to [0, 1], subtract mean, divide by std.
The resize keeps the aspect of a photograph, or squashes it, as Hugging Face's ViTImageProcessor
and Google's vit_jax do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from isovit.errors import InputError
from isovit.spec.config import Config, Preprocess

MODES = {1: "L", 3: "RGB"}
"""Pillow's mode for a number of channels."""


def load_images(config: Config, paths: Sequence[str | Path]) -> np.ndarray:
    """Read photographs as the model's input.

    Args:
        config: its ``image_size``, ``in_channels`` and ``preprocess`` say how.
        paths: JPEG, PNG or whatever else Pillow reads. An orientation in EXIF is left alone, as
            the published evaluations do.

    Returns:
        (batch, height, width, channels) float32.

    Raises:
        InputError: if a file is no image, or the model takes no photographs.
    """
    if config.in_channels not in MODES:
        raise InputError(
            f"a photograph has 1 or 3 channels, the model has in_channels={config.in_channels}; "
            "give --input X.npy"
        )
    return np.stack([preprocess(config, _open(Path(path), config)) for path in paths])


def preprocess(config: Config, image: Image.Image) -> np.ndarray:
    """Resize, crop and normalise one image.

    Args:
        config: of the model.
        image: in the mode that its channels ask for.

    Returns:
        (height, width, channels) float32.
    """
    height, width = config.image_size
    image = image.resize(
        _resized(image.size, (width, height), config.preprocess),
        Image.Resampling[config.preprocess.interpolation.upper()],
    )
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    image = image.crop((left, top, left + width, top + height))
    pixels = np.asarray(image, np.float32).reshape(height, width, -1) / np.float32(255)
    mean = np.array(config.preprocess.mean, np.float32)
    std = np.array(config.preprocess.std, np.float32)
    return (pixels - mean) / std


def _resized(size: tuple[int, int], target: tuple[int, int], how: Preprocess) -> tuple[int, int]:
    """Width and height that fill, or just cover, the target widened by the crop."""
    (w, h), (width, height) = size, target
    box = math.floor(width / how.crop_fraction), math.floor(height / how.crop_fraction)
    if how.aspect == "squash":
        return box
    if box[0] * h >= box[1] * w:  # the width decides
        return box[0], max(box[1], int(box[0] * h / w))
    return max(box[0], int(box[1] * w / h)), box[1]


def _open(path: Path, config: Config) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert(MODES[config.in_channels])
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot read {path} as an image: {reason}") from None
