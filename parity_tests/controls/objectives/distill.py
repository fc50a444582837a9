"""Faults of ports of distillation."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from isovit.backends.torch.objectives import distill
from isovit.spec.objectives.distill import DistillConfig
from parity_tests.controls.blocks import loss_averaged, statistics_detached
from parity_tests.controls.families.vit import VIT
from parity_tests.controls.faults import Fault, GradientFault, Model, Patch

APPENDED = DistillConfig(student=VIT, dist_norm=True, alpha=0.3, temperature=3.0)

CASES: dict[str, Any] = {
    "distill": APPENDED,
    "distill_mean": APPENDED.replace(**{"student.pool": "mean"}),
    "distill_hard": APPENDED.replace(hard=True),
    "distill_deit": DistillConfig(
        student=VIT.replace(dist_token=True, dist_head=True),
        token="own", alpha=0.3, temperature=3.0, reduction="numel",
    ),
}  # fmt: skip


# --- scaffolds: a part of the forward exchanged ---------------------------------------------------


def token_last(_: Any, x: Tensor, token: Tensor) -> Tensor:
    """The sound place of the token."""
    return torch.cat([x, token], dim=1)


def rewrite_heads(
    model: Model,
    *,
    place: Callable[[Any, Tensor, Tensor], Tensor] = token_last,
    kept: Callable[[Tensor], Tensor] = lambda x: x[:, :-1],
    head_dist: Callable[[Any, Tensor], Tensor] = lambda model, x: model.head_dist(
        model.norm_dist(x[:, -1])
    ),
) -> None:
    """Give a distillation with an appended token other heads."""

    def forward_heads(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        x = model.student.embed(images)
        x = place(model, x, model.dist_token.expand(len(x), -1, -1))
        x = model.student.encode(x)
        return model.student.classify(kept(x)), head_dist(model, x)

    model.forward_heads = MethodType(forward_heads, model)


def rewrite_pair(model: Model, pair: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    """Give a distillation other logits for labels and teacher, made of the sound ones."""
    sound = model.forward_heads
    model.forward_heads = lambda images: pair(*sound(images))


def rewrite_teach(model: Model, teach: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
    """Give a distillation another (model, logits, teacher's logits) distance from the teacher."""
    model.teach = MethodType(teach, model)


# --- faults: the token ----------------------------------------------------------------------------


def token_with_position(model: Model, _: Patch) -> None:
    """A token appended before the positions are added gets one of them; here that of the last."""

    def place(model: Any, x: Tensor, token: Tensor) -> Tensor:
        return torch.cat([x, token + model.student.pos_embed[:, -1:]], dim=1)

    rewrite_heads(model, place=place)


def token_first(model: Model, _: Patch) -> None:
    """Put before all others, as class tokens are, but read and taken away at the end."""
    rewrite_heads(model, place=lambda _, x, token: torch.cat([token, x], dim=1))


def token_pooled(model: Model, _: Patch) -> None:
    """The mean takes in the token of the teacher; that of the class token would not show it."""
    rewrite_heads(model, kept=lambda x: x)


def head_dist_on_class_token(model: Model, _: Patch) -> None:
    """Two heads on one token, as further losses are often added; hand ports."""
    rewrite_heads(model, head_dist=lambda model, x: model.head_dist(model.norm_dist(x[:, 0])))


def norm_dist_skipped(model: Model, _: Patch) -> None:
    """vit-pytorch's default, ``mlp_layernorm=False``: an Identity, which loads nothing."""

    def head_dist(model: Any, x: Tensor) -> Tensor:
        return model.head_dist(x[:, -1] + 0 * model.norm_dist(x[:, -1]))  # 0: for the trace

    rewrite_heads(model, head_dist=head_dist)


def heads_swapped(model: Model, _: Patch) -> None:
    """The class token before the teacher, the other before the labels; both fit."""
    rewrite_pair(model, lambda logits, dist_logits: (dist_logits, logits))


def labels_before_the_mean(model: Model, _: Patch) -> None:
    """The mean of both heads, which is for evaluation, before the labels."""
    rewrite_pair(model, lambda logits, dist_logits: ((logits + dist_logits) / 2, dist_logits))


# --- faults: the loss -----------------------------------------------------------------------------


def divided_by_classes(model: Model, _: Patch) -> None:
    """DeiT's divisor, all numbers, in vit-pytorch's loss, which has that of the images."""
    model.config = model.config.replace(reduction="numel")


def not_divided_by_classes(model: Model, _: Patch) -> None:
    """``batchmean``, which torch recommends, in DeiT's loss: as many times as there are classes."""
    model.config = model.config.replace(reduction="batchmean")


def temperature_square_missing(model: Model, _: Patch) -> None:
    """Gradients that fade with the temperature; Hinton et al. 2015, section 2, has the square."""

    def teach(model: Any, logits: Tensor, teacher_logits: Tensor) -> Tensor:
        temperature = model.config.temperature
        return distill.divergence(logits / temperature, teacher_logits / temperature)

    rewrite_teach(model, teach)


def temperature_on_the_teacher_alone(model: Model, _: Patch) -> None:
    """Only the targets softened, as smoothed labels are; hand ports."""

    def teach(model: Any, logits: Tensor, teacher_logits: Tensor) -> Tensor:
        temperature = model.config.temperature
        return distill.divergence(logits, teacher_logits / temperature) * temperature**2

    rewrite_teach(model, teach)


def divergence_turned_round(_: Model, patch: Patch) -> None:
    """KL(student ‖ teacher): torch's ``kl_div`` takes input and target, the other way round."""
    sound = distill.divergence
    patch.setattr(distill, "divergence", lambda logits, targets: sound(targets, logits))


def entropy_not_taken_off(model: Model, _: Patch) -> None:
    """Cross-entropy with the teacher for the divergence: the gradients are right, the loss not."""

    def teach(model: Any, logits: Tensor, teacher_logits: Tensor) -> Tensor:
        temperature = model.config.temperature
        targets = (teacher_logits / temperature).softmax(dim=-1)
        return distill.cross_entropy(logits / temperature, targets) * temperature**2

    rewrite_teach(model, teach)


def alpha_exchanged(model: Model, _: Patch) -> None:
    """Alpha as the share of the labels, as other papers have it."""
    model.config = model.config.replace(alpha=1 - model.config.alpha)


def soft_for_hard(model: Model, _: Patch) -> None:
    """vit-pytorch's default, ``hard=False``, for a loss with hard labels."""
    model.config = model.config.replace(hard=False)


def hard_by_least(model: Model, _: Patch) -> None:
    """The label from sorted logits, ascending, taken at the front; hand ports."""

    def teach(_: Any, logits: Tensor, teacher_logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, teacher_logits.argmin(dim=-1), reduction="none")

    rewrite_teach(model, teach)


def targets_rounded(_: Model, patch: Patch) -> None:
    """Mixed targets brought to labels, for a loss that takes integers."""

    def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets.argmax(dim=-1), reduction="none")

    patch.setattr(distill, "cross_entropy", cross_entropy)


# --- harmless rewrites ----------------------------------------------------------------------------


def heads_written_out(model: Model, _: Patch) -> None:
    """The scaffold of the faults in the token, with nothing exchanged."""
    rewrite_heads(model)
    rewrite_pair(model, lambda logits, dist_logits: (logits, dist_logits))


def losses_of_torch(_: Model, patch: Patch) -> None:
    """``F.cross_entropy`` with probabilities and ``F.kl_div``, as both codes have them."""

    def divergence(logits: Tensor, targets: Tensor) -> Tensor:
        log_p, log_q = logits.log_softmax(dim=-1), targets.log_softmax(dim=-1)
        return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(dim=-1)

    def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, reduction="none")

    patch.setattr(distill, "divergence", divergence)
    patch.setattr(distill, "cross_entropy", cross_entropy)


# --- faults that only a gradient shows ------------------------------------------------------------


def token_detached(model: Model, _: Patch) -> None:
    """The detach of the teacher's logits set on the token: the head learns, the model does not."""
    rewrite_heads(
        model, head_dist=lambda model, x: model.head_dist(model.norm_dist(x[:, -1].detach()))
    )


def student_by_labels_alone(model: Model, _: Patch) -> None:
    """The same in DeiT's form: a linear probe of the teacher on a student that never hears it."""
    sound = model.teach
    model.teach = lambda logits, teacher_logits: sound(logits.detach(), teacher_logits)


# --- tables ---------------------------------------------------------------------------------------


FAULTS = (
    Fault(token_with_position, "distill", "student.blocks.0.norm1"),
    Fault(token_first, "distill", "student.blocks.0.norm1"),
    Fault(token_pooled, "distill_mean", "student.head"),
    Fault(head_dist_on_class_token, "distill", "norm_dist"),
    Fault(norm_dist_skipped, "distill", "head_dist"),
    Fault(heads_swapped, "distill_deit"),
    Fault(labels_before_the_mean, "distill_deit"),
    Fault(divided_by_classes, "distill"),
    Fault(not_divided_by_classes, "distill_deit"),
    Fault(temperature_square_missing, "distill"),
    Fault(temperature_on_the_teacher_alone, "distill"),
    Fault(divergence_turned_round, "distill"),
    Fault(divergence_turned_round, "distill_deit"),
    Fault(entropy_not_taken_off, "distill"),
    Fault(alpha_exchanged, "distill"),
    Fault(alpha_exchanged, "distill_hard"),
    Fault(soft_for_hard, "distill_hard"),
    Fault(hard_by_least, "distill_hard"),
    Fault(targets_rounded, "distill"),
)


HARMLESS = (
    Fault(heads_written_out, "distill"),
    Fault(heads_written_out, "distill_mean"),
    Fault(losses_of_torch, "distill"),
    Fault(losses_of_torch, "distill_deit"),
    Fault(losses_of_torch, "distill_hard"),
)


GRADIENT_FAULTS = (
    GradientFault(token_detached, "distill", "dist_token", "head_dist.kernel"),
    GradientFault(student_by_labels_alone, "distill_deit", "student.head_dist.kernel", None),
    GradientFault(statistics_detached, "distill", "student.patch_embed.proj.kernel", None),
    GradientFault(loss_averaged, "distill", "student.head.bias", None),
)
