"""Distillation in Keras.

Source: Touvron et al. 2021, arXiv:2012.12877, section 4; see the spec for its forms.
"""

from __future__ import annotations

import keras
from jaxtyping import Float
from keras import ops

from isovit.backends import model_class
from isovit.backends.keras.idle import Identity
from isovit.backends.keras.layers import DType, Linear, SpecModel, Tensor, layer_norm
from isovit.spec.objectives.distill import DistillConfig


def cross_entropy(
    logits: Float[Tensor, "batch classes"], targets: Float[Tensor, "batch classes"]
) -> Float[Tensor, " batch"]:
    """−Σ_c target_c log p_c of each image."""
    return -ops.sum(targets * ops.log_softmax(logits, axis=-1), axis=-1)


def divergence(
    logits: Float[Tensor, "batch classes"], targets: Float[Tensor, "batch classes"]
) -> Float[Tensor, " batch"]:
    """Σ_c q_c (log q_c − log p_c) of each image, where q are the probabilities of the targets."""
    log_p, log_q = ops.log_softmax(logits, axis=-1), ops.log_softmax(targets, axis=-1)
    return ops.sum(ops.exp(log_q) * (log_q - log_p), axis=-1)


@keras.saving.register_keras_serializable(package="isovit")
class Distill(SpecModel):
    """Distillation: the loss of a student before labels and before a teacher.

    Called with (batch, height, width, channels) images, (batch, classes) target probabilities and
    (batch, classes) logits of a teacher; returns (batch,) losses. The model to keep is ``student``.

    Args:
        config: see ``DistillConfig``.
        name: of the model.
        dtype: policy, ``float32`` or ``mixed_bfloat16`` for example; None for the global one.
    """

    def __init__(
        self, config: DistillConfig, *, name: str = "distill", dtype: DType = None
    ) -> None:
        super().__init__(config, name=name, dtype=dtype)
        dtype, student = self.dtype_policy, config.student
        self.student = model_class("keras", student.family)(student, name="student", dtype=dtype)
        appended, has_norm = config.token == "appended", config.dist_norm
        self.norm_dist = (
            layer_norm(student.norm_eps, name="norm_dist", dtype=dtype)
            if has_norm
            else Identity(name="norm_dist", dtype=dtype)
        )
        self.head_dist = (
            Linear(student.num_classes, use_bias=True, name="head_dist", dtype=dtype)
            if appended
            else Identity(name="head_dist", dtype=dtype)
        )

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        dim = self.config.student.embed_dim
        self.dist_token = (
            self.add_weight(shape=(1, 1, dim), initializer="zeros", name="dist_token")
            if self.config.token == "appended"
            else None
        )
        self.student.build(input_shape)
        self.norm_dist.build((None, dim))
        self.head_dist.build((None, dim))

    def forward_heads(
        self, images: Float[Tensor, "batch height width channels"], training: bool | None = None
    ) -> tuple[Float[Tensor, "batch classes"], Float[Tensor, "batch classes"]]:
        """Logits for the labels, and logits for the teacher."""
        if self.dist_token is None:
            return self.student.forward_heads(images, training=training)
        x = self.student.embed(images, training=training)
        dist_token = ops.broadcast_to(self.dist_token, (ops.shape(x)[0], 1, x.shape[-1]))
        x = ops.concatenate([x, dist_token], axis=1)  # no position
        x = self.student.encode(x, training=training)
        logits, x = self.student.classify(x[:, :-1]), x[:, -1]
        return logits, self.head_dist(self.norm_dist(x))

    def teach(
        self,
        logits: Float[Tensor, "batch classes"],
        teacher_logits: Float[Tensor, "batch classes"],
    ) -> Float[Tensor, " batch"]:
        """How far logits are from the teacher's."""
        if self.config.hard:
            labels = ops.one_hot(ops.argmax(teacher_logits, axis=-1), logits.shape[-1])
            return cross_entropy(logits, ops.cast(labels, logits.dtype))
        temperature = self.config.temperature
        distance = divergence(logits / temperature, teacher_logits / temperature)
        return distance * temperature**2 / self.config.divisor

    def call(
        self,
        images: Float[Tensor, "batch height width channels"],
        targets: Float[Tensor, "batch classes"],
        teacher_logits: Float[Tensor, "batch classes"],
        training: bool | None = None,
    ) -> Float[Tensor, " batch"]:
        logits, dist_logits = self.forward_heads(images, training=training)
        by_labels = cross_entropy(logits, targets)
        by_teacher = self.teach(dist_logits, ops.stop_gradient(teacher_logits))
        return (1 - self.config.alpha) * by_labels + self.config.alpha * by_teacher
