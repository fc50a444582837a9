"""Another head, another image size: what changes, what stays, and what is said about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import isovit
from isovit.errors import InputError
from isovit.spec.config import Config
from isovit.spec.initialize import init, probe
from isovit.weight_convert.checkpoint import Checkpoint
from isovit.weight_convert.store import load, save
from parity_tests.oracles.importing import mend_torchvision
from tests.small import VIT

SIZES: dict[str, Any] = dict(embed_dim=12, depth=1, num_heads=3, mlp_dim=20, num_classes=5)
SQUARE = isovit.config("vit_s16", image_size=64, **SIZES)
LINEN = SQUARE.replace(activation="gelu_tanh")
DISTILLED = isovit.config("deit_s16_distilled", image_size=64, **SIZES)
T2T = isovit.config("t2t_vit_7", image_size=64, **SIZES)


def written(folder: Path, config: Config, name: str = "a.safetensors", format: Any = None) -> Path:
    save(Checkpoint(config, probe(config)), folder / name, format)
    return folder / name


def assert_rest_kept(found: Checkpoint, config: Config, changed: set[str]) -> None:
    before = probe(config)
    assert {
        p for p in found.weights if not np.array_equal(found.weights[p], before.get(p))
    } == changed


# The head


@pytest.mark.parametrize(
    ("config", "heads"), [(VIT, ["head"]), (T2T, ["head"]), (DISTILLED, ["head", "head_dist"])]
)
def test_a_new_head_is_drawn_and_all_else_is_kept(config, heads, tmp_path: Path) -> None:
    found = load(written(tmp_path, config), num_classes=7)
    changed = {f"{head}.{leaf}" for head in heads for leaf in ("kernel", "bias")}
    assert_rest_kept(found, config, changed)
    drawn = init(config.replace(num_classes=7))
    assert all(np.array_equal(found.weights[path], drawn[path]) for path in changed)
    assert found.config == config.replace(num_classes=7)
    assert found.source.notes == ("the head of 5 classes is replaced by a new one of 7, seed 0",)


def test_a_head_of_as_many_classes_is_kept(tmp_path: Path) -> None:
    found = load(written(tmp_path, VIT), num_classes=5)
    assert_rest_kept(found, VIT, set())
    assert found.source.notes == ()


def test_no_classes_leave_out_the_head(tmp_path: Path) -> None:
    found = load(written(tmp_path, VIT), num_classes=0)
    assert_rest_kept(found, VIT, set())
    assert "head.kernel" not in found.weights
    assert found.source.notes == ("left out the head of 5 classes",)


def test_a_new_head_has_the_dtype_of_the_file(tmp_path: Path) -> None:
    weights = {path: array.astype(np.float64) for path, array in probe(VIT).items()}
    save(Checkpoint(VIT, weights), tmp_path / "a.npz")
    assert load(tmp_path / "a.npz", num_classes=7).weights["head.kernel"].dtype == np.float64


# The image


def bicubic(table: torch.Tensor, size: tuple[int, int], **how: Any) -> np.ndarray:
    """What the torch libraries do with (1, patches, dim)."""
    side = round(table.shape[1] ** 0.5)
    grid = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=size, mode="bicubic", align_corners=False, **how)
    return grid.permute(0, 2, 3, 1).flatten(1, 2).numpy()


@pytest.mark.parametrize("size", [96, (32, 80)])
@pytest.mark.parametrize(
    ("config", "name", "format", "how"),
    [
        (SQUARE, "a.pth", "timm", dict(antialias=True)),
        (SQUARE, "a.pth", "deit", {}),
        (SQUARE, "a.pth", "mae", {}),
        (DISTILLED, "a.pth", "deit", {}),
        (T2T, "a.pth.tar", "yitu", {}),
    ],
)
def test_positions_are_resized_as_the_library_of_the_file_does(
    config, name: str, format: str, how: Any, size: Any, tmp_path: Path
) -> None:
    found = load(written(tmp_path, config, name, format), image_size=size)
    assert found.config == config.replace(image_size=size)
    assert_rest_kept(found, config, {"pos_embed"})
    before, after = probe(config)["pos_embed"], found.weights["pos_embed"]
    prefix = config.prefix_tokens
    np.testing.assert_array_equal(after[:, :prefix], before[:, :prefix])
    wanted = bicubic(torch.tensor(before[:, prefix:]), found.config.grid, **how)
    np.testing.assert_allclose(after[:, prefix:], wanted, rtol=0, atol=2e-6 * abs(wanted).max())
    assert "positions are resized from 4x4 to " in found.source.notes[-1]


def test_a_google_file_is_resized_with_corners_on_corners(tmp_path: Path) -> None:
    path = written(tmp_path, LINEN, "a.npz", "google")
    found = load(path, image_size=112)
    table = found.weights["pos_embed"][0, 1:].reshape(7, 7, -1)
    before = probe(LINEN)["pos_embed"][0, 1:].reshape(4, 4, -1)
    np.testing.assert_array_equal(table[::6, ::6], before[::3, ::3])  # the corners
    np.testing.assert_allclose(table[2, 4], before[1, 2], rtol=1e-6)  # every second falls on one
    other = load(path, image_size=112, resize="torch_bicubic").weights["pos_embed"]
    assert abs(other[0, 1:].reshape(7, 7, -1) - table).max() > 1e-2


def test_the_same_size_changes_nothing(tmp_path: Path) -> None:
    found = load(written(tmp_path, SQUARE), image_size=64)
    assert_rest_kept(found, SQUARE, set())
    assert found.source.notes == ()


def test_the_sinusoid_of_t2t_vit_is_carried_or_recomputed(tmp_path: Path) -> None:
    path = written(tmp_path, T2T)
    carried = load(path, image_size=96).weights["pos_embed"]
    recomputed = load(path, image_size=96, resize="recompute").weights["pos_embed"]
    np.testing.assert_array_equal(recomputed, init(T2T.replace(image_size=96))["pos_embed"])
    assert abs(carried - recomputed).max() > 0.1


@pytest.mark.parametrize("target", [32, 64, 96])
def test_positions_of_nest_are_resized_as_timm_does(target: int, tmp_path: Path) -> None:
    """Window by window in the table, over the whole image in the resizing."""
    mend_torchvision()
    nest = pytest.importorskip("timm.models.nest")
    fields: dict[str, Any] = dict(patch_size=4, embed_dims=(6, 8), depths=(1, 1), num_heads=(2, 2))
    config = isovit.config("nest_t", image_size=48, num_classes=5, **fields)
    path = written(tmp_path, config)
    found = load(path, image_size=target, resize="torch_bicubic")
    before, shapes = probe(config), init(config.replace(image_size=target))
    for name in ("levels.0.pos_embed", "levels.1.pos_embed"):
        theirs = nest.resize_pos_embed(torch.tensor(before[name]), torch.tensor(shapes[name]))
        np.testing.assert_allclose(found.weights[name], theirs.numpy(), atol=2e-6)
        assert target == 48 or not np.array_equal(found.weights[name], before[name])


def test_nest_goes_to_an_image_that_is_not_square(tmp_path: Path) -> None:
    """What varies along its columns alone does so in a table of other rows."""
    config = isovit.config(
        "nest_t", image_size=32, patch_size=4, embed_dims=(6, 8), depths=(1, 1), num_heads=(2, 2)
    )
    weights = probe(config)
    ramp = np.tile(np.linspace(0, 1, 8, dtype=np.float32), (8, 1))  # (rows, columns)
    windows = ramp.reshape(2, 4, 2, 4).swapaxes(1, 2).reshape(1, 4, 16, 1)
    weights["levels.0.pos_embed"] = np.repeat(windows, 6, axis=-1)
    save(Checkpoint(config, weights), tmp_path / "a.safetensors")
    found = load(tmp_path / "a.safetensors", image_size=(64, 32)).weights["levels.0.pos_embed"]
    found = found.reshape(2, 2, 8, 4, 6).swapaxes(1, 2).reshape(16, 8, 6)
    np.testing.assert_allclose(found, np.broadcast_to(ramp[:1, :, None], (16, 8, 6)), atol=1e-6)


def test_the_first_positions_are_those_of_vit_pytorch(tmp_path: Path) -> None:
    """It takes smaller images, with positions from the front of its table, whatever their rows."""
    mend_torchvision()
    library = pytest.importorskip("vit_pytorch")
    torch.manual_seed(0)
    told: dict[str, Any] = dict(dim=12, depth=1, heads=2, mlp_dim=9, dim_head=5, num_classes=3)
    original = library.ViT(image_size=24, patch_size=4, **told).double().eval()
    images = torch.randn(2, 3, 16, 12, dtype=torch.float64)
    torch.save(original.state_dict(), tmp_path / "theirs.pt")
    small: dict[str, Any] = dict(image_size=(16, 12), changes={"num_heads": 2})
    ours = load(tmp_path / "theirs.pt", resize="first", **small)
    resized = load(tmp_path / "theirs.pt", resize="torch_bicubic", **small)
    with torch.inference_mode():
        wanted = original(images)
        found, other = (
            isovit.build(c.config, "torch", c.weights, dtype="float64")(images.permute(0, 2, 3, 1))
            for c in (ours, resized)
        )
    assert abs(found - wanted).max() < 1e-12 * abs(wanted).max()
    assert abs(other - wanted).max() > 1e-3 * abs(wanted).max()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (dict(image_size=96, resize="first"), "first is for smaller images"),
        (dict(image_size=60), "image_size=.* must be divisible"),
        (dict(image_size=96, resize="lanczos"), "resize='lanczos': wanted torch_bicubic, "),
        (dict(image_size=96, resize="recompute"), "recompute is for fixed positions"),
        (dict(num_classes=-1), "num_classes"),
    ],
)
def test_what_cannot_be_is_refused(asked: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load(written(tmp_path, SQUARE), **asked)
