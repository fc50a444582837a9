"""Photographs: bit for bit the evaluation transforms of torchvision, as timm puts them together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from isovit.errors import InputError
from isovit.preprocess import load_images, preprocess
from isovit.spec.config import Config
from isovit.spec.families import config
from parity_tests.oracles.importing import import_oracle
from tests.small import VIT

CHELSEA = Path(__file__).parents[1] / "examples" / "chelsea.png"


def random_image(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def published(model: Config, image: Image.Image, request: pytest.FixtureRequest) -> np.ndarray:
    """What timm makes of an image, (height, width, channels)."""
    data = import_oracle("timm.data", request.config)
    transform = data.create_transform(
        (3, *model.image_size),
        is_training=False,
        crop_pct=model.preprocess.crop_fraction,
        interpolation=model.preprocess.interpolation,
        mean=model.preprocess.mean,
        std=model.preprocess.std,
    )
    return transform(image).numpy().transpose(1, 2, 0)


@pytest.mark.oracles
@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("t2t_vit_14", {}),
        ("t2t_vit_14", {"image_size": 384}),
        ("t2t_vit_14", {"preprocess.crop_fraction": 1.0}),
        ("vit_s16", {}),
        ("vit_b16", {"preprocess.interpolation": "bilinear", "preprocess.crop_fraction": 0.875}),
        ("vit_h14", {"image_size": 518, "preprocess.crop_fraction": 0.95}),
    ],
)
def test_the_photograph_becomes_what_timm_makes_of_it(
    model: str, changes: dict, request: pytest.FixtureRequest
) -> None:
    chosen = config(model, **changes)
    with Image.open(CHELSEA) as image:
        wanted = published(chosen, image, request)
    found = load_images(chosen, [CHELSEA])[0]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.oracles
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    "size",
    [(640, 480), (480, 641), (333, 333), (57, 223), (1001, 37), (256, 256), (255, 249), (1, 9)],
    ids=lambda size: f"{size[0]}x{size[1]}",
)
@pytest.mark.parametrize("crop_fraction", [0.875, 0.9, 1.0])
def test_images_of_odd_sizes_become_what_timm_makes_of_them(
    size: tuple[int, int],
    interpolation: str,
    crop_fraction: float,
    request: pytest.FixtureRequest,
) -> None:
    """Landscape, portrait, square, smaller than the target, narrow: every way of rounding."""
    changes = {"preprocess.interpolation": interpolation, "preprocess.crop_fraction": crop_fraction}
    chosen = config("vit_ti16", image_size=112, **changes)
    image = random_image(*size)
    np.testing.assert_array_equal(preprocess(chosen, image), published(chosen, image, request))


@pytest.mark.parametrize("target", [(16, 48), (48, 16), (32, 40), (224, 32)])
@pytest.mark.parametrize("size", [(100, 100), (301, 97), (97, 301), (10, 7)])
def test_a_target_that_is_no_square_is_covered(
    target: tuple[int, int], size: tuple[int, int]
) -> None:
    """A white image stays white to its edges: the crop never reaches beyond the resized image."""
    chosen = config("vit_s16", image_size=target, patch_size=8)
    image = Image.new("RGB", size, "white")
    found = preprocess(chosen, image)
    assert found.shape == (*target, 3)
    assert set(found.ravel()) == {1.0}


def test_the_aspect_is_kept_for_a_target_that_is_no_square() -> None:
    """The top left quarter of a wide image is the top left quarter of a wide input."""
    chosen = config("vit_s16", image_size=(32, 64), **{"preprocess.crop_fraction": 1.0})
    pixels = np.zeros((256, 512, 3), np.uint8)
    pixels[:128, :256] = 255
    found = preprocess(chosen, Image.fromarray(pixels))
    assert (found[:14, :30] > 0.9).all()
    assert (found[18:] < -0.9).all()
    assert (found[:, 34:] < -0.9).all()


def test_grey_photographs_and_grey_models_go_together(tmp_path: Path) -> None:
    values = np.random.default_rng(1).integers(0, 256, (30, 40), np.uint8)
    Image.fromarray(values).save(tmp_path / "grey.png")
    plain = {"preprocess.mean": [0.0] * 3, "preprocess.std": [1.0] * 3}
    as_colour = load_images(VIT.replace(**plain), [tmp_path / "grey.png"])[0]
    np.testing.assert_array_equal(as_colour[..., 0], as_colour[..., 1])
    np.testing.assert_array_equal(as_colour[..., 0], as_colour[..., 2])
    single = {"preprocess.mean": [0.0], "preprocess.std": [1.0]}
    grey = load_images(VIT.replace(in_channels=1, **single), [tmp_path / "grey.png"])[0]
    assert grey.shape == (*VIT.image_size, 1)
    np.testing.assert_array_equal(grey[..., 0], as_colour[..., 0])


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("crop_fraction", [1.0, 0.875, 0.9])
@pytest.mark.parametrize("size", [(640, 480), (31, 97), (300, 300), (1001, 37), (5, 9)])
@pytest.mark.parametrize("target", [(224, 224), (64, 96)])
def test_a_squashed_image_is_resized_along_each_axis_by_itself(
    target: tuple[int, int], size: tuple[int, int], crop_fraction: float, interpolation: str
) -> None:
    """The crop taken first, as a box among the pixels of the image, by another path of Pillow."""
    changes = {"preprocess.interpolation": interpolation, "preprocess.crop_fraction": crop_fraction}
    squash = {"preprocess.aspect": "squash"}
    chosen = config("vit_s16", image_size=target, patch_size=32, **changes, **squash)
    image = random_image(*size)
    boxes = []
    for side, pixels in zip(target[::-1], size, strict=True):
        resized = int(side / crop_fraction)
        start, scale = round((resized - side) / 2), pixels / resized
        boxes.append((start * scale, (start + side) * scale))
    (left, right), (top, bottom) = boxes
    resample = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    wanted = image.resize(target[::-1], resample[interpolation], (left, top, right, bottom))
    found = preprocess(chosen, image)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found * 127.5 + 127.5, np.asarray(wanted, np.float64), atol=1.01)


def test_squashing_is_the_resize_of_pillow_where_nothing_is_cropped() -> None:
    whole = {"preprocess.crop_fraction": 1.0, "preprocess.aspect": "squash"}
    image = random_image(77, 50)
    pixels = np.asarray(image.resize((96, 64), Image.Resampling.BICUBIC))
    found = preprocess(config("vit_s16", image_size=(64, 96), **whole), image)
    np.testing.assert_array_equal(np.rint(found * 127.5 + 127.5), pixels)


def test_aspects_differ_unless_the_image_has_that_of_the_target() -> None:
    keep = config("vit_s16", image_size=(64, 96))
    squash = keep.replace(**{"preprocess.aspect": "squash"})
    same, wide = random_image(300, 200), random_image(300, 100)
    np.testing.assert_array_equal(preprocess(squash, same), preprocess(keep, same))
    assert not np.array_equal(preprocess(squash, wide), preprocess(keep, wide))


def test_several_photographs_make_a_batch_in_their_order(tmp_path: Path) -> None:
    paths = []
    for seed in range(3):
        paths.append(tmp_path / f"{seed}.png")
        random_image(20 + seed, 30, seed).save(paths[-1])
    batch = load_images(VIT, paths)
    assert batch.shape == (3, *VIT.image_size, 3)
    for path, image in zip(paths, batch, strict=True):
        np.testing.assert_array_equal(load_images(VIT, [path])[0], image)


def test_transparency_and_palettes_are_read_as_colours(tmp_path: Path) -> None:
    image = random_image(40, 40)
    image.save(tmp_path / "plain.png")
    image.convert("RGBA").save(tmp_path / "alpha.png")
    wanted = load_images(VIT, [tmp_path / "plain.png"])
    np.testing.assert_array_equal(load_images(VIT, [tmp_path / "alpha.png"]), wanted)
    image.quantize(256).save(tmp_path / "palette.png")
    assert load_images(VIT, [tmp_path / "palette.png"]).shape == wanted.shape


def test_a_file_that_is_no_photograph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image", encoding="utf-8")
    whole = tmp_path / "whole.png"
    random_image(50, 50).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:2000])
    for name in ("text.png", "cut.png", "absent.png", ""):
        with pytest.raises(InputError, match=r"cannot read .* as an image: "):
            load_images(VIT, [tmp_path / name])


def test_a_model_of_two_channels_takes_no_photographs() -> None:
    with pytest.raises(InputError, match="the model has in_channels=2; give --input"):
        load_images(VIT.replace(in_channels=2), [CHELSEA])
