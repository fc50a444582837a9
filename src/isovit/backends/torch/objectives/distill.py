"""Distillation in PyTorch.

Source: Touvron et al. 2021, arXiv:2012.12877, section 4; see the spec for its forms.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from isovit.backends import model_class
from isovit.backends.torch.layers import Linear
from isovit.spec.objectives.distill import DistillConfig


def cross_entropy(
    logits: Float[Tensor, "batch classes"], targets: Float[Tensor, "batch classes"]
) -> Float[Tensor, " batch"]:
    """−Σ_c target_c log p_c of each image."""
    return -(targets * F.log_softmax(logits, dim=-1)).sum(dim=-1)


def divergence(
    logits: Float[Tensor, "batch classes"], targets: Float[Tensor, "batch classes"]
) -> Float[Tensor, " batch"]:
    """Σ_c q_c (log q_c − log p_c) of each image, where q are the probabilities of the targets."""
    log_p, log_q = F.log_softmax(logits, dim=-1), F.log_softmax(targets, dim=-1)
    return (log_q.exp() * (log_q - log_p)).sum(dim=-1)


class Distill(nn.Module):
    """Distillation: the loss of a student before labels and before a teacher.

    Called with (batch, height, width, channels) images, (batch, classes) target probabilities and
    (batch, classes) logits of a teacher; returns (batch,) losses. The model to keep is ``student``.
    """

    def __init__(self, config: DistillConfig) -> None:
        super().__init__()
        self.config = config
        student: Any = config.student
        dim, classes = student.embed_dim, student.num_classes
        self.student = model_class("torch", student.family)(student)
        appended, has_norm = config.token == "appended", config.dist_norm
        self.dist_token = nn.Parameter(torch.zeros(1, 1, dim)) if appended else None
        self.norm_dist = nn.LayerNorm(dim, eps=student.norm_eps) if has_norm else nn.Identity()
        self.head_dist = Linear(dim, classes, bias=True) if appended else nn.Identity()

    def forward_heads(
        self, images: Float[Tensor, "batch height width channels"]
    ) -> tuple[Float[Tensor, "batch classes"], Float[Tensor, "batch classes"]]:
        """Logits for the labels, and logits for the teacher."""
        if self.dist_token is None:
            return self.student.forward_heads(images)
        x = self.student.embed(images)
        x = torch.cat([x, self.dist_token.expand(x.shape[0], -1, -1)], dim=1)  # no position
        x = self.student.encode(x)
        logits, x = self.student.classify(x[:, :-1]), x[:, -1]
        return logits, self.head_dist(self.norm_dist(x))

    def teach(
        self,
        logits: Float[Tensor, "batch classes"],
        teacher_logits: Float[Tensor, "batch classes"],
    ) -> Float[Tensor, " batch"]:
        """How far logits are from the teacher's."""
        if self.config.hard:
            labels = F.one_hot(teacher_logits.argmax(dim=-1), logits.shape[-1])
            return cross_entropy(logits, labels.to(logits.dtype))
        temperature = self.config.temperature
        distance = divergence(logits / temperature, teacher_logits / temperature)
        return distance * temperature**2 / self.config.divisor

    def forward(
        self,
        images: Float[Tensor, "batch height width channels"],
        targets: Float[Tensor, "batch classes"],
        teacher_logits: Float[Tensor, "batch classes"],
    ) -> Float[Tensor, " batch"]:
        logits, dist_logits = self.forward_heads(images)
        by_labels = cross_entropy(logits, targets)
        by_teacher = self.teach(dist_logits, teacher_logits.detach())
        return (1 - self.config.alpha) * by_labels + self.config.alpha * by_teacher
