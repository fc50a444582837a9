"""A picture of what a model looks at: attention over the photograph, and feature maps by block.

The rows of feature maps are those of Yuan et al. 2021, arXiv:2101.11986, figure 2: channels of the
tokens, each laid out as the grid that they are of.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from isovit.look.attention import Array, Maps, rollout
from isovit.spec.config import Config
from isovit.weight_convert.files import replacing

TILE, GAP, LINE = 128, 6, 16
"""Longer side of a tile, space between two, and height of a line of text, in pixels."""
COLUMNS = 8
"""Tiles in a row, and channels of a block."""
RAMP = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""Colours from no attention to the most: viridis, of Smith and van der Walt."""
OPAQUE = 0.6
"""Of the colours over the photograph."""


def features(outputs: Mapping[str, Array], maps: Maps) -> dict[str, Array]:
    """What comes out of each block, laid out as the image.

    Args:
        outputs: of modules, by path.
        maps: attention of the same run; blocks are the modules around them.

    Returns:
        (batch, rows, columns, dim) by the path of the block. Blocks whose output is the class token
        alone have nothing to lay out.
    """
    found: dict[str, Array] = {}
    for path, map_ in maps.items():
        block, _, last = path.rpartition(".")
        size = math.prod(map_.grid)
        if last == "attn" and (map_.order >= map_.prefix).sum() == size:
            x = np.asarray(outputs[block])
            x = x.reshape(len(x), -1, x.shape[-1])  # (batch, tokens, dim)
            grid = np.empty((len(x), size, x.shape[-1]), x.dtype)
            of_grid = map_.order >= map_.prefix
            grid[:, map_.order[of_grid] - map_.prefix] = x[:, of_grid]
            found[block] = grid.reshape(len(x), *map_.grid, -1)
    return found


def photograph(config: Config, image: Array) -> Image.Image:
    """What the model sees: an input, with its normalisation undone."""
    mean, std = np.array(config.preprocess.mean), np.array(config.preprocess.std)
    pixels = np.clip(255 * (image * std + mean), 0, 255).round().astype(np.uint8)
    if pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    return Image.fromarray(pixels).convert("RGB")


def draw(seen: Image.Image, maps: Maps, blocks: Mapping[str, Array], at: str) -> Image.Image:
    """The picture of one image.

    Args:
        seen: the photograph.
        maps: attention of a batch, of which the first image is drawn.
        blocks: ``features`` of the same.
        at: path of the attention whose heads are drawn.

    Returns:
        A row with the photograph, the rollout and the heads, more if there are many, and one for
        each block.
    """
    whole = seen.resize(_tile_size(seen.size), Image.Resampling.BICUBIC)
    heads = maps[at].seen()[0]
    tiles = [whole, over(whole, rollout(list(maps.values()))[0])]
    tiles += [over(whole, head) for head in heads]
    rows = [(f"photograph, rollout, and the {len(heads)} heads of {at}", tiles)]
    for path, grid in blocks.items():
        chosen = np.linspace(0, grid.shape[-1] - 1, COLUMNS).astype(int)
        channels = [grey(grid[0, ..., channel], whole.size) for channel in dict.fromkeys(chosen)]
        rows.append((f"{path}, channels {', '.join(map(str, dict.fromkeys(chosen)))}", channels))
    return _table(rows, whole.size)


def over(image: Image.Image, weights: Array) -> Image.Image:
    """Attention in colours over an image, the most of it in the brightest."""
    heat = np.maximum(weights, 0.0) / max(float(weights.max()), np.finfo(np.float64).tiny)
    smooth = Image.fromarray(heat.astype(np.float32)).resize(image.size, Image.Resampling.BILINEAR)
    level = np.clip(np.asarray(smooth, np.float64), 0, 1) * (len(RAMP) - 1)
    ramp = np.array(RAMP, np.float64)
    colours = np.stack(
        [np.interp(level, np.arange(len(RAMP)), ramp[:, channel]) for channel in range(3)], axis=-1
    )
    return Image.blend(image, Image.fromarray(colours.round().astype(np.uint8)), OPAQUE)


def grey(channel: Array, size: tuple[int, int]) -> Image.Image:
    """One channel of a grid from black, its least, to white; every token one square."""
    pixels = Image.fromarray((255 * _from_0_to_1(channel)).round().astype(np.uint8))
    return pixels.resize(size, Image.Resampling.NEAREST).convert("RGB")


def _from_0_to_1(values: Array) -> Array:
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def write_picture(path: Path, picture: Image.Image) -> None:
    """Write a PNG, all or nothing."""
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")


def _tile_size(size: tuple[int, int]) -> tuple[int, int]:
    width, height = size
    longer = max(size)
    return max(1, round(TILE * width / longer)), max(1, round(TILE * height / longer))


def _table(rows: Sequence[tuple[str, Sequence[Image.Image]]], size: tuple[int, int]) -> Image.Image:
    """Rows of tiles, each under its title; long ones go on in the next line."""
    width, height = size
    lines = [math.ceil(len(tiles) / COLUMNS) for _, tiles in rows]
    total = sum(LINE + GAP + line * (height + GAP) for line in lines)
    sheet = Image.new("RGB", (GAP + COLUMNS * (width + GAP), GAP + total), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    top = GAP
    for (title, tiles), line in zip(rows, lines, strict=True):
        pen.text((GAP, top), title, fill="black", font=font)
        top += LINE
        for i, tile in enumerate(tiles):
            row, column = divmod(i, COLUMNS)
            sheet.paste(tile, (GAP + column * (width + GAP), top + row * (height + GAP)))
        top += line * (height + GAP) + GAP
    return sheet
