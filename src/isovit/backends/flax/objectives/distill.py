"""Distillation in Flax.

Source: Touvron et al. 2021, arXiv:2012.12877, section 4; see the spec for its forms.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from isovit.backends import model_class
from isovit.backends.flax.layers import Kinds, LayerNorm, Linear, identity
from isovit.spec.objectives.distill import DistillConfig


def cross_entropy(
    logits: Float[Array, "batch classes"], targets: Float[Array, "batch classes"]
) -> Float[Array, " batch"]:
    """−Σ_c target_c log p_c of each image."""
    return -(targets * jax.nn.log_softmax(logits, axis=-1)).sum(axis=-1)


def divergence(
    logits: Float[Array, "batch classes"], targets: Float[Array, "batch classes"]
) -> Float[Array, " batch"]:
    """Σ_c q_c (log q_c − log p_c) of each image, where q are the probabilities of the targets."""
    log_p, log_q = jax.nn.log_softmax(logits, axis=-1), jax.nn.log_softmax(targets, axis=-1)
    return (jnp.exp(log_q) * (log_q - log_p)).sum(axis=-1)


class Distill(nnx.Module):
    """Distillation: the loss of a student before labels and before a teacher.

    Called with (batch, height, width, channels) images, (batch, classes) target probabilities and
    (batch, classes) logits of a teacher; returns (batch,) losses. The model to keep is ``student``.

    Args:
        config: see ``DistillConfig``.
        dtype: of the computation.
        param_dtype: of the parameters.
        rngs: streams ``params`` and ``dropout``.
    """

    def __init__(
        self,
        config: DistillConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.config, self.dtype = config, dtype
        student: Any = config.student
        dim, classes = student.embed_dim, student.num_classes
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.student = model_class("flax", student.family)(student, **kinds)
        appended, has_norm = config.token == "appended", config.dist_norm
        self.dist_token = nnx.Param(jnp.zeros((1, 1, dim), param_dtype)) if appended else None
        self.norm_dist = LayerNorm(dim, epsilon=student.norm_eps, **kinds) if has_norm else identity
        self.head_dist = Linear(dim, classes, use_bias=True, **kinds) if appended else identity

    def forward_heads(
        self, images: Float[Array, "batch height width channels"]
    ) -> tuple[Float[Array, "batch classes"], Float[Array, "batch classes"]]:
        """Logits for the labels, and logits for the teacher."""
        if self.dist_token is None:
            return self.student.forward_heads(images)
        x = self.student.embed(images)
        dist_token = self.dist_token[...].astype(self.dtype)
        dist_token = jnp.broadcast_to(dist_token, (x.shape[0], 1, x.shape[-1]))
        x = jnp.concat([x, dist_token], axis=1)  # no position
        x = self.student.encode(x)
        logits, x = self.student.classify(x[:, :-1]), x[:, -1]
        return logits, self.head_dist(self.norm_dist(x))

    def teach(
        self,
        logits: Float[Array, "batch classes"],
        teacher_logits: Float[Array, "batch classes"],
    ) -> Float[Array, " batch"]:
        """How far logits are from the teacher's."""
        if self.config.hard:
            labels = jax.nn.one_hot(teacher_logits.argmax(axis=-1), logits.shape[-1])
            return cross_entropy(logits, labels.astype(logits.dtype))
        temperature = self.config.temperature
        distance = divergence(logits / temperature, teacher_logits / temperature)
        return distance * temperature**2 / self.config.divisor

    def __call__(
        self,
        images: Float[Array, "batch height width channels"],
        targets: Float[Array, "batch classes"],
        teacher_logits: Float[Array, "batch classes"],
    ) -> Float[Array, " batch"]:
        logits, dist_logits = self.forward_heads(images)
        by_labels = cross_entropy(logits, targets)
        by_teacher = self.teach(dist_logits, jax.lax.stop_gradient(teacher_logits))
        return (1 - self.config.alpha) * by_labels + self.config.alpha * by_teacher
