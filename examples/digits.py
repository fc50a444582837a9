"""Handwritten digits, small models and objectives on them, for the three ``digits_*`` scripts.

The images are the 1,797 of scikit-learn's ``load_digits``, 8 by 8 pixels of grey: real ones that
come with the package. All that chance decides is drawn here, in NumPy, so that every framework
learns from the same batches, masks and views.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import cache

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import isovit

BATCH = 64

digits = load_digits()
IMAGES = ((digits.images[..., None] - 4.9) / 6.0).astype(np.float32)  # mean 0, deviation 1
LABELS = digits.target

BACKBONE = dict(image_size=8, in_channels=1, embed_dim=48, depth=2, num_heads=4, mlp_dim=96)
ENCODER, CLASSES = dict(**BACKBONE, patch_size=2), dict(num_classes=10)


def named(fields: dict, part: str) -> dict:
    """Fields of a part of an objective, by their dotted names."""
    return {f"{part}.{name}": value for name, value in fields.items()}


CONFIGS = {
    "mae": isovit.config(
        "mae_vit_b16", **named(ENCODER, "encoder"),
        decoder_dim=32, decoder_depth=1, decoder_num_heads=4, decoder_mlp_dim=64,
    ),
    "simmim": isovit.config(
        "simmim_vit_b16", **named({**ENCODER, "drop_path_rate": 0.0}, "encoder"), mask_unit=1,
    ),
    "mpp": isovit.config("mpp_vit_pytorch", **named(ENCODER, "encoder"), mask_prob=0.5),
    "distill": isovit.config(
        "distill_vit_pytorch", **named({**ENCODER, **CLASSES}, "student"),
    ),
    "dino": isovit.config(
        "dino_vit_pytorch", **named(ENCODER, "net"),
        head_hidden_dim=64, bottleneck_dim=32, out_dim=64,
    ),
    "token_learner": isovit.config(
        "token_learner_mini_4", **ENCODER, **CLASSES, head_dim=None, learner_loc=1,
    ),
    "t2t_vit_designs": isovit.config(
        "t2t_vit_14_se", **BACKBONE, **CLASSES, t2t_layers=((3, 1, 1), (3, 2, 1)),
    ),
    "efficient_vit": isovit.config(
        "efficient_vit_nystrom", **ENCODER, **CLASSES, num_landmarks=4, residual_kernel=3,
    ),
}  # fmt: skip
"""An objective of each kind, then some models, small enough for a processor."""


def batches(name: str, steps: int) -> Iterator[dict[str, np.ndarray]]:
    """What an objective is called with, step by step, by the name of its argument.

    Of a model: images, and the labels that its logits are compared with.
    """
    rng, config = np.random.default_rng(0), CONFIGS[name]
    for _ in range(steps):
        chosen = rng.choice(len(IMAGES), BATCH, replace=False)
        match name:
            case "dino":
                yield {"images": views(chosen, rng), "teacher_images": views(chosen, rng)}
            case "distill":
                targets = np.eye(10, dtype=np.float32)[LABELS[chosen]]
                yield {"images": IMAGES[chosen], "targets": targets, **taught(chosen)}
            case _ if "num_classes" in config.to_dict():  # a model
                yield {"images": IMAGES[chosen], "labels": LABELS[chosen].astype(np.int32)}
            case _:  # an encoder, and what is hidden from it
                yield {"images": IMAGES[chosen], **config.draw(BATCH, rng)}


def views(chosen: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Two views of each image: moved by a pixel at most, with noise."""
    found = np.stack([IMAGES[chosen]] * 2, axis=1)  # (batch, views, height, width, channels)
    for view in found.reshape(-1, *IMAGES.shape[1:]):
        view[:] = np.roll(view, rng.integers(-1, 2, 2), (0, 1))
    return found + 0.1 * rng.standard_normal(found.shape, np.float32)


@cache
def teacher() -> LogisticRegression:
    """A teacher may be anything that gives logits; this one is of scikit-learn."""
    return LogisticRegression(C=0.01).fit(IMAGES.reshape(len(IMAGES), -1), LABELS)


def taught(chosen: np.ndarray) -> dict[str, np.ndarray]:
    """What the teacher says of some images."""
    logits = teacher().decision_function(IMAGES[chosen].reshape(len(chosen), -1))
    return {"teacher_logits": logits.astype(np.float32)}


def arguments() -> argparse.Namespace:
    """What to train, one after another, and for how many steps."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="+", choices=CONFIGS, metavar=f"{{{','.join(CONFIGS)}}}")
    parser.add_argument("--steps", type=int, default=400)
    return parser.parse_args()


def report(name: str, losses: list[float]) -> None:
    """Say by how much the loss fell: the mean of the last tenth of the steps beside the first's."""
    tenth = max(1, len(losses) // 10)
    first, last = np.mean(losses[:tenth]), np.mean(losses[-tenth:])
    print(f"{name}: loss {first:.4f} -> {last:.4f} in {len(losses)} steps")
    # DINO's rises first: its centre takes away what all images have in common.
    assert last < first or (name == "dino" and len(losses) < 200), "the loss does not fall"
