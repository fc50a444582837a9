"""Distillation: a classifier learns from labels and, by a token for it, from another model.

Source: Touvron et al. 2021, "Training data-efficient image transformers & distillation through
attention", arXiv:2012.12877, section 4 and equations 2 and 3; the official code
(facebookresearch/deit, Apache-2.0) for its divergence; vit-pytorch's ``distill.py`` (MIT) for its
form; the soft loss is that of Hinton et al. 2015, arXiv:1503.02531, section 2.

The teacher is no part of the model: its logits are an input. It may be any function of any
framework, and no gradient goes there. Both forms are one config: DeiT's student has a distillation
token and a head for it, which it keeps; vit-pytorch appends a token to any student, and token and
head are of use in training alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from isovit.spec.blocks import TransformerConfig
from isovit.spec.config import BaseConfig, Config, Epsilon, require
from isovit.spec.families import family_module, vit
from isovit.spec.families.vit import VIT_PYTORCH, ViTConfig
from isovit.spec.param import Param, ParamTree, Role, dense, layer_norm
from isovit.spec.published import Published
from isovit.spec.scheme import Scheme

STUDENTS = ("vit", "t2t_vit", "efficient_vit")
"""Families that can learn so.

The models of such a family have ``embed`` (images to tokens with positions), ``encode`` (those to
tokens behind the blocks) and ``classify`` (these to logits), and one token more disturbs none of
them. Its param tree takes the number of tokens that go through the blocks; its config says
``tokens``, ``embed_dim``, ``norm_eps`` and ``init_scheme``.
"""

Share = Annotated[float, msgspec.Meta(gt=0.0, lt=1.0)]


class DistillConfig(BaseConfig, frozen=True, kw_only=True, tag="distill"):
    """Config of a distillation.

    Called with (batch, height, width, channels) images, ``targets``, (batch, classes)
    probabilities, and ``teacher_logits``, (batch, classes). Labels are targets with a single 1;
    those of mixed or smoothed labels are probabilities.

    Attributes:
        student: the classifier that learns, of a family in ``STUDENTS``.
        token: which learns from the teacher: one that is ``appended`` behind all others, without a
            position, and taken away before pooling (vit-pytorch), or the student's ``own`` (DeiT).
        dist_norm: whether a LayerNorm is put before the head of an appended token.
        alpha: share of the teacher in the loss.
        hard: whether the teacher counts by its most likely class alone, of equals the first; else
            by its probabilities.
        temperature: divides the logits of both where it counts by probabilities; the divergence is
            multiplied by its square.
        reduction: by what the sum of the divergence over a batch is divided: its number of images
            (``batchmean``, vit-pytorch) or of logits (``numel``, DeiT).
    """

    student: Config = ViTConfig()
    token: Literal["appended", "own"] = "appended"
    dist_norm: bool = False
    alpha: Share = 0.5
    hard: bool = False
    temperature: Epsilon = 1.0
    reduction: Literal["batchmean", "numel"] = "batchmean"

    def check(self) -> None:
        """Check that the student can learn so, and that the token is where the config says."""
        student, own = self.student, getattr(self.student, "dist_head", False)
        require(
            student.family in STUDENTS,
            "student.family",
            student.family,
            f"must be one of {', '.join(STUDENTS)}",
        )
        require(
            student.num_classes > 1,
            "student.num_classes",
            student.num_classes,
            "a loss of classes needs two or more",
        )
        require(
            self.token == "own" or not getattr(student, "dist_token", False),
            "token",
            self.token,
            "the student has one: needs student.dist_token=false, or token=own",
        )
        require(
            self.token == "appended" or own, "token", self.token, "needs student.dist_head=true"
        )
        require(
            self.token == "appended" or not self.dist_norm,
            "dist_norm",
            self.dist_norm,
            "stands before the head of an appended token: needs token=appended",
        )

    @property
    def divisor(self) -> int:
        """What the divergence of one image is divided by."""
        return self.student.num_classes if self.reduction == "numel" else 1

    def draw(self, batch: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Targets, every other of one class and the rest of two, and the logits of a teacher."""
        classes = self.student.num_classes
        first = rng.integers(classes, size=batch)
        second = (first + rng.integers(1, classes, size=batch)) % classes
        share = np.where(np.arange(batch) % 2, 1.0, rng.random(batch))[:, None]
        targets = share * np.eye(classes)[first] + (1 - share) * np.eye(classes)[second]
        logits = 2 * rng.standard_normal((batch, classes))
        drawn = {"targets": targets, "teacher_logits": logits}
        return {name: array.astype(np.float32) for name, array in drawn.items()}


def param_tree(config: DistillConfig) -> ParamTree:
    """The modules of a distillation; it returns a number for each image."""
    student: Any = config.student
    family = family_module(student.family)
    if config.token == "own":
        inner = replace(family.param_tree(student), name="student", output=None)
        return ParamTree(name="", children=(inner,), output=())
    return ParamTree(
        name="",
        params=(_dist_token(student),),
        children=(
            replace(family.param_tree(student, student.tokens + 1), name="student", output=None),
            *((layer_norm("norm_dist", (), student.embed_dim),) if config.dist_norm else ()),
            _head_dist(student),
        ),
        output=(),
    )


def _dist_token(student: TransformerConfig) -> Param:
    scheme = Scheme(student.init_scheme)
    return Param("dist_token", (1, 1, student.embed_dim), Role.OWN, scheme.class_token())


def _head_dist(student: TransformerConfig) -> ParamTree:
    scheme, dim, classes = Scheme(student.init_scheme), student.embed_dim, student.num_classes
    kernel, bias = scheme.head_kernel(dim, classes), scheme.dense_bias(dim)
    return dense("head_dist", (), dim, classes, kernel, bias)


def _deit(size: str) -> DistillConfig:
    """Touvron et al. 2021, equation 3: each half of the loss; the official code's temperature."""
    return DistillConfig(
        student=vit.VARIANTS[f"deit_{size}16_distilled"],
        token="own",
        alpha=0.5,
        hard=True,
        temperature=1.0,
        reduction="numel",
    )


# README of vit-pytorch, section "Distillation".
PYTORCH: dict[str, Any] = dict(
    student=VIT_PYTORCH.replace(embed_dropout_rate=0.1, dropout_rate=0.1, attn_dropout_rate=0.1),
    alpha=0.5,
    temperature=3.0,
)

VARIANTS: dict[str, DistillConfig] = {
    **{f"distill_deit_{size}16": _deit(size) for size in ("ti", "s", "b")},
    "distill_vit_pytorch": DistillConfig(**PYTORCH),
}

PUBLISHED: dict[str, Published] = {}
"""What a student learned so is published of itself, as of ``deit_b16_distilled``."""

ALIASES: dict[str, str] = {}
