"""Masked patch prediction beside vit-pytorch's, which tampers with the same patches.

vit-pytorch's ``MPP`` does not run with the ViT of its own release, whose class token and positions
have lost their first axis. Here it gets them in the shape that it was written for; nothing else is
mended. Its random numbers are replaced by what ``draw`` gives, and the probabilities that it asks
for are compared with ours.
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
from isovit.parity.job import draw_inputs
from isovit.spec.config import ConfigError, Preprocess
from isovit.spec.families import param_tree
from isovit.spec.families.vit import ViTConfig
from isovit.spec.objectives.mpp import MPPConfig
from parity_tests.agreement import assert_agree, assert_outputs_agree
from parity_tests.oracles.importing import import_oracle
from parity_tests.subject import Subject
from parity_tests.test_foreign import randomised

pytestmark = pytest.mark.oracles

BATCH = 3

CONFIG = MPPConfig(
    encoder=ViTConfig(
        image_size=(12, 12), patch_size=(3, 3), num_classes=0, patch_embed="norm_linear_norm",
        embed_dim=14, depth=2, num_heads=2, head_dim=5, qkv_bias=False, mlp_dim=17, norm_eps=1e-5,
        preprocess=Preprocess(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3)),
    ),
    mask_prob=0.45, replace_prob=0.4, random_patch_prob=0.45,
)  # fmt: skip


class Theirs(NamedTuple):
    """What the original has and finds.

    Attributes:
        config: what it should be.
        weights: its own, canonical.
        losses: of each image, found one at a time.
        gradients: of the mean loss by the mask token and the bias of the head, canonical.
        asked: the probabilities that it asked for, for each image.
    """

    config: MPPConfig
    weights: dict[str, np.ndarray]
    losses: np.ndarray
    gradients: dict[str, np.ndarray]
    asked: list[float]


def array(tensor: Tensor | None) -> np.ndarray:
    """A tensor as NumPy."""
    assert tensor is not None
    return tensor.detach().numpy()


def statistics(config: MPPConfig) -> dict[str, Any]:
    """Their arguments for what the images were normalised by."""
    preprocess = config.encoder.preprocess
    given = {"mean": list(preprocess.mean), "std": list(preprocess.std)}
    return given if config.normalized_images else {}


def original(config: MPPConfig, path: Path, request: pytest.Config) -> tuple[Any, dict[str, Any]]:
    """vit-pytorch's, mended and in float64, and its weights."""
    vits = import_oracle("vit_pytorch", request)
    library = import_oracle("vit_pytorch.mpp", request)
    vit = vits.ViT(
        image_size=12, patch_size=3, num_classes=0, dim=14, depth=2, heads=2, dim_head=5,
        mlp_dim=17,
    )  # fmt: skip
    model: Any = randomised(
        library.MPP(
            transformer=vit, patch_size=3, dim=14, mask_prob=config.mask_prob,
            replace_prob=config.replace_prob, random_patch_prob=config.random_patch_prob,
            output_channel_bits=config.output_channel_bits, max_pixel_val=config.max_pixel_val,
            **statistics(config),
        )
    )  # fmt: skip
    save_file({n: t.clone() for n, t in vit.state_dict().items()}, path / "vit.safetensors")
    found = isovit.load(path / "vit.safetensors", config=config.encoder, format="vit_pytorch")
    weights: dict[str, Any] = {f"encoder.{n}": np.asarray(a) for n, a in found.weights.items()}
    weights["mask_token"] = array(model.mask_token)
    weights["to_bits.kernel"] = array(model.to_bits.weight).T
    weights["to_bits.bias"] = array(model.to_bits.bias)
    vit.cls_token = nn.Parameter(vit.cls_token.detach()[None])
    vit.pos_embedding = nn.Parameter(vit.pos_embedding.detach()[None])
    for name in ("mean", "std"):  # no buffers: ``double`` leaves them alone
        if config.normalized_images:
            exact = torch.tensor(statistics(config)[name], dtype=torch.float64)
            setattr(model.loss, name, exact.view(-1, 1, 1))
    return model.double(), weights


def theirs(config: MPPConfig, path: Path, request: pytest.Config) -> Theirs:
    """Their losses, image by image, with our draws in the place of theirs."""
    library = import_oracle("vit_pytorch.mpp", request)
    model, weights = original(config, path, request)
    images, _, others = draw_inputs(config, BATCH, seed=0)
    found, asked = [], []
    for b, image in enumerate(torch.tensor(images).double().permute(0, 3, 1, 2)):
        masked, source, replaced = (
            torch.tensor(others[name][b : b + 1]) for name in ("masked", "source", "replaced")
        )
        chosen = [source != torch.arange(source.shape[1]), replaced.bool()]
        chosen = chosen if config.random_patch_prob else chosen[1:]

        def like(_: Tensor, prob: float, chosen: list[Tensor] = chosen) -> Tensor:
            asked.append(prob)
            return chosen.pop(0)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(library, "prob_mask_like", like)
            patch.setattr(torch, "rand", lambda *_, masked=masked, **__: masked.double())
            patch.setattr(torch, "randint", lambda *_, source=source, **__: source.long())
            found.append(model(image[None]))
    losses = torch.stack(found)
    losses.mean().backward()
    gradients = {
        "mask_token": array(model.mask_token.grad),
        "to_bits.bias": array(model.to_bits.bias.grad),
    }
    return Theirs(config, weights, array(losses), gradients, asked)


def losses(
    backend: Subject, theirs: Theirs, change: dict[str, Any] | None = None, seed: int = 0
) -> np.ndarray:
    """Our losses with their weights: of the same config, or of one with fields changed."""
    config = theirs.config.replace(**change or {})
    images, _, _ = draw_inputs(theirs.config, BATCH, seed=0)
    _, _, others = draw_inputs(theirs.config, BATCH, seed)
    model = backend.runtime.build(config, theirs.weights, dtype="float64", device="cpu")
    return backend.runtime.forward(model, images, others)


FORMS = {
    "normalised": CONFIG,
    "not normalised": CONFIG.replace(normalized_images=False, output_channel_bits=2),
    "never exchanged": CONFIG.replace(random_patch_prob=0.0, max_pixel_val=0.75),
}


@pytest.mark.parametrize("form", FORMS)
def test_losses_and_gradients_are_the_originals(
    backend: Subject, form: str, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    found = theirs(FORMS[form], tmp_path, pytestconfig)
    assert found.weights.keys() == param_tree(found.config).parameters().keys()
    assert_outputs_agree(losses(backend, found), found.losses)

    images, _, others = draw_inputs(found.config, BATCH, seed=0)
    model = backend.runtime.build(found.config, found.weights, dtype="float64", device="cpu")
    mean = np.full(BATCH, 1 / BATCH)
    gradients = backend.runtime.gradients(model, images, mean, others).weights
    ours = {path: gradients[path] for path in found.gradients}
    assert_agree(ours, found.gradients, "gradient")


def test_what_is_not_the_originals_is_seen(
    backend: Subject, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    found = theirs(CONFIG, tmp_path, pytestconfig)
    changes: list[dict[str, Any]] = [
        {"normalized_images": False},
        {"max_pixel_val": 0.75},
        {"encoder.norm_eps": 1e-6},
        {"encoder.preprocess.std": (0.3, 0.25, 0.2)},
    ]
    others = [losses(backend, found, change) for change in changes]
    for other in (*others, losses(backend, found, seed=1)):
        with pytest.raises(AssertionError, match="output beyond 1e-12"):
            assert_outputs_agree(other, found.losses)


# --- labels ---------------------------------------------------------------------------------------


def bucketized(images: np.ndarray, config: MPPConfig, request: pytest.Config) -> np.ndarray:
    """Labels of vit-pytorch's loss, each read off the loss of a patch by itself."""
    library = import_oracle("vit_pytorch.mpp", request)
    encoder = config.encoder
    loss = library.MPPLoss(
        encoder.patch_size[0], encoder.in_channels, config.output_channel_bits,
        config.max_pixel_val, None, None,
    )  # fmt: skip
    target = torch.tensor(images).double().permute(0, 3, 1, 2)
    shape, labels = (len(images), encoder.patches), []
    logits = torch.arange(config.colours).double()
    everywhere = logits.expand(*shape, -1)
    for i in range(shape[0] * shape[1]):
        mask = torch.zeros(shape, dtype=torch.bool)
        mask.view(-1)[i] = True
        labels.append(round(float(logits.logsumexp(0) - loss(everywhere, target, mask))))
    return np.array(labels).reshape(shape)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("brightest", [1.0, 255.0])
def test_a_colour_on_an_edge_is_in_the_bin_beneath(
    backend: Subject, dtype: str, brightest: float, pytestconfig: pytest.Config
) -> None:
    """Also where a patch has a number of pixels by which no float can be divided exactly."""
    config = CONFIG.replace(normalized_images=False, max_pixel_val=brightest, output_channel_bits=2)
    levels = np.arange(-1, 6) / 4  # every edge, both ends, and what is beyond them
    colours = np.random.default_rng(0).choice(levels, (4, 4, 4, 3)) * brightest
    steps = np.random.default_rng(1).choice([-1, 0, 1], colours.shape) * brightest / 8
    flat = colours.repeat(3, axis=1).repeat(3, axis=2)  # patches of one colour, 3 by 3 pixels
    mixed = flat.copy()  # and of two, whose mean is that colour
    mixed[:, ::3, ::3] += steps
    mixed[:, 1::3, 1::3] -= steps
    for images in (flat, mixed):
        inputs = images.astype(dtype)
        assert (inputs == images).all()
        found = labels(backend, inputs, config)
        assert (found == bucketized(images, config, pytestconfig)).all()
        assert (found == by_hand(images, config)).all()


def labels(backend: Subject, images: np.ndarray, config: MPPConfig) -> np.ndarray:
    """Ours, in the dtype of the images."""
    x = backend.tensor(images)
    if images.dtype == np.float32:
        name = "float32"
        if backend.framework == "keras":
            import keras

            x = keras.ops.cast(x, name)
        else:
            x = x.float() if backend.framework == "torch" else x.astype(name)
    return backend.array(backend.module("objectives.mpp").colour_labels(x, config))


def by_hand(images: np.ndarray, config: MPPConfig) -> np.ndarray:
    """Labels in whole numbers: eighths of the brightest pixel, times the pixels of a patch."""
    eighths = np.round(np.minimum(images / config.max_pixel_val, 1) * 8).astype(int)
    sums = eighths.reshape(4, 4, 3, 4, 3, 3).sum(axis=(2, 4)).reshape(4, 16, 3)
    bins = sum((sums > 9 * 2 * k).astype(int) for k in range(1, 4))
    return bins @ np.array([1, 4, 16])


# --- draws ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("replace", "random"), [(0.5, 0.3), (0.4, 0.45), (0.5, 0.5), (1.0, 0.0)])
def test_patches_become_what_the_probabilities_say(replace: float, random: float) -> None:
    """As many masked as are said, and a token, another patch or itself with the odds of each."""
    config = CONFIG.replace(mask_prob=0.15, replace_prob=replace, random_patch_prob=random)
    drawn = config.draw(20_000, np.random.default_rng(0))
    masked, source, replaced = (drawn[name] for name in ("masked", "source", "replaced"))
    assert {array.dtype for array in drawn.values()} == {np.dtype(np.int32)}
    assert (masked.sum(axis=1) == 3).all()  # ceil(0.15 · 16)
    moved = source != np.arange(16)
    assert not (moved & ~masked.astype(bool)).any()
    assert not (replaced & ~masked.astype(bool)).any()
    tokens = replaced.sum() / masked.sum()
    others = (moved & ~replaced.astype(bool)).sum() / masked.sum()
    assert tokens == pytest.approx(replace, abs=0.01)
    assert others == pytest.approx(random * 15 / 16, abs=0.01)  # one of 16 is the patch itself


def test_the_original_asks_for_the_same_probabilities(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    found = theirs(CONFIG, tmp_path, pytestconfig)
    assert found.asked == [CONFIG.exchange_prob, CONFIG.replace_prob] * BATCH


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"replace_prob": 0.6, "random_patch_prob": 0.5}, "random_patch_prob"),
        ({"mask_prob": 0.0}, "mask_prob"),
        ({"output_channel_bits": 9}, "output_channel_bits"),
        ({"encoder.num_classes": 5}, "encoder.num_classes"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        CONFIG.replace(**change)
