"""SimMIM beside vit-pytorch's and transformers', which hide what ours is told to hide.

vit-pytorch's ``SimMIM`` does not run with the ViT of its own release, whose table of positions has
lost its first axis. Here it gets one of the shape that it was written for, with a row for a class
token that it skips; nothing else is mended. transformers' ``ViTForMaskedImageModeling`` is the
official model around the ViT that this project has, too: its head is a convolution and a
PixelShuffle, and it adds 1e-5 to the number of hidden pixels, which is taken out of the answer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import isovit
from isovit.backends.protocol import Gradients
from isovit.parity.job import draw_inputs
from isovit.spec.families import param_tree
from isovit.spec.families.vit import ViTConfig
from isovit.spec.objectives.simmim import SimMIMConfig
from parity_tests.agreement import assert_agree, assert_outputs_agree
from parity_tests.oracles.importing import import_oracle
from parity_tests.subject import Subject
from parity_tests.test_foreign import randomised

pytestmark = pytest.mark.oracles

BATCH = 3


class Theirs(NamedTuple):
    """What an original has and finds.

    Attributes:
        config: what it should be.
        weights: its own, canonical.
        losses: of each image, found one at a time.
        gradients: of the mean loss by the mask token and the bias of the head, canonical.
    """

    config: SimMIMConfig
    weights: dict[str, np.ndarray]
    losses: np.ndarray
    gradients: dict[str, np.ndarray]


# --- the originals --------------------------------------------------------------------------------


def canonical(encoder: nn.Module, config: ViTConfig, path: Path) -> dict[str, np.ndarray]:
    """The weights of an encoder in the objective, read from a file of its state dict."""
    save_file({n: t.clone() for n, t in encoder.state_dict().items()}, path / "a.safetensors")
    found = isovit.load(path / "a.safetensors", config=config)
    return {f"encoder.{name}": np.asarray(array) for name, array in found.weights.items()}


def array(tensor: Tensor | None) -> np.ndarray:
    """A tensor as NumPy."""
    assert tensor is not None
    return tensor.detach().numpy()


def channel_first(images: np.ndarray) -> Tensor:
    """Images as the originals take them."""
    return torch.tensor(images).double().permute(0, 3, 1, 2)


def of_vit_pytorch(path: Path, patch: pytest.MonkeyPatch, request: pytest.Config) -> Theirs:
    """vit-pytorch's, with its positions mended and its random numbers replaced by our order."""
    vits = import_oracle("vit_pytorch", request)
    library = import_oracle("vit_pytorch.simmim", request)
    encoder = ViTConfig(
        image_size=(12, 12), patch_size=(3, 4), num_classes=0, patch_embed="norm_linear_norm",
        embed_dim=14, depth=2, num_heads=2, head_dim=5, qkv_bias=False, mlp_dim=17, norm_eps=1e-5,
        class_token=False, pool="none",
    )  # fmt: skip
    config = SimMIMConfig(
        encoder=encoder, mask_ratio=0.45, mask_rounds="down", mask_unit=(1, 1),
        divided_by_hidden=True,
    )  # fmt: skip
    vit = vits.ViT(
        image_size=(12, 12), patch_size=(3, 4), num_classes=0, dim=14, depth=2, heads=2,
        dim_head=5, mlp_dim=17, pool="mean",
    )  # fmt: skip
    original: Any = randomised(library.SimMIM(encoder=vit, masking_ratio=0.45))
    weights = canonical(vit, encoder, path)
    with_row = torch.cat([torch.full((1, 14), torch.nan), vit.pos_embedding.detach()])[None]
    vit.pos_embedding = nn.Parameter(with_row)
    original.double()
    weights["mask_token"] = array(original.mask_token)[None, None]
    weights["to_pixels.kernel"] = array(original.to_pixels.weight).T
    weights["to_pixels.bias"] = array(original.to_pixels.bias)

    images, _, others = draw_inputs(config, BATCH, seed=0)
    places = torch.tensor(others["order"]).argsort(dim=1)
    losses = []
    for image, place in zip(channel_first(images), places, strict=True):
        patch.setattr(torch, "rand", lambda *_, place=place, **__: -place[None].double())
        losses.append(original(image[None]))
    patch.undo()
    torch.stack(losses).mean().backward()
    gradients = {
        "mask_token": array(original.mask_token.grad)[None, None],
        "to_pixels.bias": array(original.to_pixels.bias.grad),
    }
    return Theirs(config, weights, array(torch.stack(losses)), gradients)


def of_transformers(path: Path, _: pytest.MonkeyPatch, request: pytest.Config) -> Theirs:
    """transformers', given the mask of our order."""
    library = import_oracle("transformers", request)
    encoder = ViTConfig(
        image_size=(16, 16), patch_size=(4, 4), num_classes=0, embed_dim=15, depth=2, num_heads=3,
        mlp_dim=17, norm_eps=1e-6, pool="none",
    )  # fmt: skip
    config = SimMIMConfig(encoder=encoder)
    original: Any = randomised(
        library.ViTForMaskedImageModeling(
            library.ViTConfig(
                image_size=16, patch_size=4, encoder_stride=4, hidden_size=15, num_hidden_layers=2,
                num_attention_heads=3, intermediate_size=17, layer_norm_eps=1e-6,
            )
        )
    )  # fmt: skip
    folder = path / "theirs"
    original.save_pretrained(folder)
    found = isovit.load(folder, config=encoder)
    original.double()
    weights = {f"encoder.{name}": np.asarray(array) for name, array in found.weights.items()}
    conv = original.decoder[0]
    weights["mask_token"] = array(original.vit.embeddings.mask_token)
    weights["to_pixels.kernel"] = pixel_by_pixel(array(conv.weight)[..., 0, 0].T)
    weights["to_pixels.bias"] = pixel_by_pixel(array(conv.bias))

    drawn = draw_inputs(config, BATCH, seed=0)
    losses = []
    for image, order in zip(channel_first(drawn.images), drawn.others["order"], strict=True):
        mask = np.zeros((2, 2), bool)
        mask.flat[order[: config.hidden_units]] = True
        mask = mask.repeat(2, axis=0).repeat(2, axis=1).reshape(1, -1)
        loss = original(image[None], bool_masked_pos=torch.tensor(mask)).loss
        pixels = torch.tensor(mask.sum() * 4 * 4)
        losses.append(loss * (pixels + 1e-5).double() / pixels)  # the sum is float32, theirs too
    torch.stack(losses).mean().backward()
    gradients = {
        "mask_token": array(original.vit.embeddings.mask_token.grad),
        "to_pixels.bias": pixel_by_pixel(array(conv.bias.grad)),
    }
    return Theirs(config, weights, array(torch.stack(losses)), gradients)


def pixel_by_pixel(x: np.ndarray) -> np.ndarray:
    """Columns in PixelShuffle's order, (channel, height, width), as (height, width, channel)."""
    x = x.reshape(*x.shape[:-1], 3, 4, 4)
    return np.moveaxis(x, -3, -1).reshape(*x.shape[:-3], -1)


ORIGINALS = {"vit-pytorch": of_vit_pytorch, "transformers": of_transformers}


@pytest.fixture
def theirs(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Theirs:
    """One of the originals, by its name."""
    return ORIGINALS[request.param](tmp_path, monkeypatch, request.config)


def losses(
    backend: Subject, theirs: Theirs, change: dict[str, Any] | None = None, seed: int = 0
) -> np.ndarray:
    """Our losses with their weights: of the same config, or of one with fields changed."""
    config = theirs.config.replace(**change or {})
    images, _, _ = draw_inputs(theirs.config, BATCH, seed=0)
    _, _, others = draw_inputs(theirs.config, BATCH, seed)
    model = backend.runtime.build(config, theirs.weights, dtype="float64", device="cpu")
    return backend.runtime.forward(model, images, others)


# --- tests ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("theirs", ORIGINALS, indirect=True)
def test_the_losses_are_the_originals(backend: Subject, theirs: Theirs) -> None:
    assert theirs.weights.keys() == param_tree(theirs.config).parameters().keys()
    assert_outputs_agree(losses(backend, theirs), theirs.losses)


@pytest.mark.parametrize("theirs", ORIGINALS, indirect=True)
def test_gradients_of_what_is_added_are_the_originals(backend: Subject, theirs: Theirs) -> None:
    images, _, others = draw_inputs(theirs.config, BATCH, seed=0)
    model = backend.runtime.build(theirs.config, theirs.weights, dtype="float64", device="cpu")
    mean = np.full(BATCH, 1 / BATCH)
    found: Gradients = backend.runtime.gradients(model, images, mean, others)
    ours = {path: found.weights[path] for path in theirs.gradients}
    assert_agree(ours, theirs.gradients, "gradient")


@pytest.mark.parametrize(
    "change",
    [
        {"divided_by_hidden": False},
        {"mask_rounds": "up"},
        {"encoder.norm_eps": 1e-6},
        {"encoder.activation": "gelu_tanh"},
    ],
    ids=str,
)
@pytest.mark.parametrize("theirs", ["vit-pytorch"], indirect=True)
def test_another_config_is_seen(backend: Subject, theirs: Theirs, change: dict[str, Any]) -> None:
    with pytest.raises(AssertionError, match="output beyond 1e-12"):
        assert_outputs_agree(losses(backend, theirs, change), theirs.losses)


@pytest.mark.parametrize(
    "change",
    [
        {"divided_by_hidden": True},
        {"mask_rounds": "down"},
        {"encoder.norm_eps": 1e-12},
        {"encoder.final_norm": "none"},
    ],
    ids=str,
)
@pytest.mark.parametrize("theirs", ["transformers"], indirect=True)
def test_another_config_than_the_official_is_seen(
    backend: Subject, theirs: Theirs, change: dict[str, Any]
) -> None:
    if "encoder.final_norm" in change:
        kept = {p: a for p, a in theirs.weights.items() if not p.startswith("encoder.norm.")}
        theirs = theirs._replace(weights=kept)
    with pytest.raises(AssertionError, match="output beyond 1e-12"):
        assert_outputs_agree(losses(backend, theirs, change), theirs.losses)


@pytest.mark.parametrize("theirs", ORIGINALS, indirect=True)
def test_another_order_is_seen(backend: Subject, theirs: Theirs) -> None:
    with pytest.raises(AssertionError, match="output beyond 1e-12"):
        assert_outputs_agree(losses(backend, theirs, seed=1), theirs.losses)


@pytest.mark.parametrize(
    ("side", "unit", "ratio", "rounds", "hidden"),
    [
        (14, 2, 0.6, "up", 30 * 4),  # the paper: ceil(29.4) squares of 32 pixels
        (12, 2, 0.6, "up", 22 * 4),  # ceil(21.6)
        (12, 1, 0.6, "down", 86),  # floor(86.4)
        (8, 1, 0.5, "down", 32),  # README of vit-pytorch
        (8, 2, 0.5, "up", 8 * 4),
    ],
)
def test_as_many_are_hidden_as_the_originals_hide(
    side: int, unit: int, ratio: float, rounds: Any, hidden: int
) -> None:
    encoder = ViTConfig(image_size=(16 * side, 16 * side), num_classes=0)
    form = SimMIMConfig(
        encoder=encoder, mask_ratio=ratio, mask_unit=(unit, unit), mask_rounds=rounds
    )
    assert form.hidden == hidden
    orders = form.draw(4, np.random.default_rng(0))["order"]
    assert orders.dtype == np.int32
    assert (np.sort(orders, axis=1) == np.arange((side // unit) ** 2)).all()
