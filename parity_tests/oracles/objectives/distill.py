"""Distillation in NumPy loops, and vit-pytorch's and DeiT's beside it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np

from isovit.spec.objectives.distill import DistillConfig
from parity_tests.oracles.arrays import Array
from parity_tests.oracles.arrays import Reference as Base


class Reference(Base):
    """Distillation; one image after another, one class after another."""

    config: DistillConfig

    def output(self, images: Array, targets: Array, teacher_logits: Array) -> Array:
        """See ``Reference.output``."""
        config, (logits, dist_logits) = self.config, self.heads(images)
        losses = []
        for row, dist_row, target, teacher in zip(
            logits, dist_logits, targets, teacher_logits, strict=True
        ):
            labelled = sum(-p * y for p, y in zip(target, log_softmax(row), strict=True))
            taught = self.teach(dist_row, teacher.astype(np.float64))
            losses.append((1 - config.alpha) * labelled + config.alpha * taught)
        return np.array(losses)

    def heads(self, images: Array) -> tuple[Array, Array]:
        """Logits of both tokens."""
        config, family = self.config, self.config.student.family
        kind = import_module(f"parity_tests.oracles.families.{family}").Reference
        student = self.part("student", kind, config.student)
        x = student.embed(images)
        if config.token == "own":
            x = student.encode(x)
            return student.dense("head", x[:, 0]), student.dense("head_dist", x[:, 1])
        token = np.repeat(self.weights["dist_token"], len(x), axis=0)
        x = student.encode(np.concatenate([x, token], axis=1))
        logits, x = student.classify(x[:, : x.shape[1] - 1]), x[:, x.shape[1] - 1]
        x = self.norm("norm_dist", x, config.student.norm_eps) if config.dist_norm else x
        return logits, self.dense("head_dist", x)

    def teach(self, logits: Array, teacher: Array) -> Any:
        """How far the logits of one image are from the teacher's."""
        config = self.config
        if config.hard:
            return -log_softmax(logits)[list(teacher).index(max(teacher))]
        log_p = log_softmax(logits / config.temperature)
        log_q = log_softmax(teacher / config.temperature)
        total = sum(np.exp(b) * (b - a) for a, b in zip(log_p, log_q, strict=True))
        classes = len(teacher) if config.reduction == "numel" else 1
        return config.temperature**2 * total / classes


def log_softmax(x: Array) -> Array:
    """log p of the logits of one image; analytic, as the shift is a constant."""
    shift = x.real.max()
    return x - shift - np.log(np.exp(x - shift).sum())


# The originals.


def deit_loss(
    heads: tuple[Any, Any], targets: Any, teacher_logits: Any, config: DistillConfig
) -> Any:
    """The loss of a batch as DeiT has it, by torch's own losses.

    Source: Touvron et al. 2021, arXiv:2012.12877, equations 2 and 3; the divisor is that of
    facebookresearch/deit.
    """
    import torch.nn.functional as F

    logits, dist_logits = heads
    temperature = config.temperature
    labelled = F.cross_entropy(logits, targets)  # torch takes probabilities, too
    if config.hard:
        taught = F.cross_entropy(dist_logits, teacher_logits.argmax(dim=1))
    else:
        taught = F.kl_div(
            F.log_softmax(dist_logits / temperature, dim=1),
            F.log_softmax(teacher_logits / temperature, dim=1),
            reduction="sum",
            log_target=True,
        )
        taught = taught * (temperature * temperature) / dist_logits.numel()
    return labelled * (1 - config.alpha) + taught * config.alpha


def vit_pytorch_student(
    library: ModuleType, config: Any, state: Mapping[str, Any] | None = None
) -> Any:
    """A student of vit-pytorch's, its sizes the config's; with weights it is mended, too.

    In release 1.26.11 ``DistillMixin`` takes its class token and positions for (tokens, dim), which
    ViT's are; those of T2T-ViT and efficient ViT have an axis more, and their forward fails. When
    they are loaded here, they lose it.
    """
    import torch

    sizes: dict[str, Any] = dict(
        num_classes=config.num_classes, dim=config.embed_dim, depth=config.depth,
        heads=config.num_heads, dim_head=config.block.head_dim, mlp_dim=config.mlp_dim,
        pool=config.pool, channels=config.in_channels,
    )  # fmt: skip
    if config.family == "vit":
        student = library.DistillableViT(
            image_size=config.image_size, patch_size=config.patch_size, **sizes
        )
    elif config.family == "efficient_vit":
        transformer = import_module("vit_pytorch.vit").Transformer
        student = library.DistillableEfficientViT(
            image_size=config.image_size, patch_size=config.patch_size[0],
            num_classes=config.num_classes, dim=config.embed_dim, pool=config.pool,
            channels=config.in_channels,
            transformer=transformer(
                config.embed_dim, config.depth, config.num_heads, config.block.head_dim,
                config.mlp_dim,
            ),
        )  # fmt: skip
    else:
        layers = tuple((split.kernel, split.stride) for split in config.t2t_layers)
        student = library.DistillableT2TViT(
            image_size=config.image_size[0], t2t_layers=layers, **sizes
        )
    if state is not None:
        student.double().load_state_dict(state, strict=True)
        for name in ("cls_token", "pos_embedding"):
            table = getattr(student, name).detach()
            setattr(student, name, torch.nn.Parameter(table.reshape(-1, config.embed_dim)))
    return student


def of_part(weights: dict[str, Array], prefix: str) -> dict[str, Array]:
    """The weights of a part, by its own paths."""
    start = f"{prefix}."
    return {
        path.removeprefix(start): array for path, array in weights.items() if path.startswith(start)
    }
