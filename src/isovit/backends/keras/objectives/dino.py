"""DINO in Keras.

Source: Caron et al. 2021, arXiv:2104.14294, section 3.1 and algorithm 1; see the spec for its
forms.
"""

from __future__ import annotations

import keras
from jaxtyping import Float
from keras import ops

from isovit.backends import model_class
from isovit.backends.keras.idle import Identity
from isovit.backends.keras.initializers import glorot
from isovit.backends.keras.layers import (
    ACTIVATIONS,
    DType,
    Linear,
    SpecModel,
    Tensor,
    resample,
)
from isovit.spec.config import Config
from isovit.spec.objectives.dino import DINOConfig
from isovit.spec.resample import dino_bicubic


def normalize(x: Float[Tensor, "batch dim"], eps: float) -> Float[Tensor, "batch dim"]:
    """Vectors of length 1, but where they are shorter than ``eps``."""
    return x / ops.maximum(ops.sqrt(ops.sum(ops.square(x), axis=-1, keepdims=True)), eps)


def fix(layer: keras.layers.Layer) -> None:
    """Make parameters that nothing trains of all of a layer's.

    The layer itself stays trainable: Keras has BatchNorm compute otherwise in one that is not.
    """
    for variable in layer.trainable_variables:
        variable.trainable = False


class WeightNormLinear(keras.layers.Layer):
    """x·W, columns of W in directions and of lengths of their own; arXiv:1602.07868, eq. 2.

    No kind of ``Dense``: that saves its kernel and bias, and nothing else.
    """

    def __init__(self, dim_out: int, gain_trains: bool, *, name: str, dtype: DType = None) -> None:
        super().__init__(name=name, dtype=dtype)
        self.dim_out, self.gain_trains = dim_out, gain_trains

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.kernel = self.add_weight(
            shape=(input_shape[-1], self.dim_out), initializer=glorot(), name="kernel"
        )
        self.gain = self.add_weight(
            shape=(self.dim_out,), initializer="ones", trainable=self.gain_trains, name="gain"
        )

    def call(
        self, inputs: Float[Tensor, "batch dim"], training: bool | None = None
    ) -> Float[Tensor, "batch dim_out"]:
        length = ops.sqrt(ops.sum(ops.square(self.kernel), axis=0))
        return ops.matmul(inputs, self.gain * self.kernel / length)


class Head(keras.layers.Layer):
    """Products with activations, a vector of length 1, and a last product."""

    def __init__(self, config: DINOConfig, *, name: str, dtype: DType = None) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype, dims = self.dtype_policy, config.head_dims
        self.config = config
        self.mlp = [
            Linear(dims[i + 1], use_bias=True, name=f"mlp_{i}", dtype=dtype)
            for i in range(config.head_layers)
        ]
        self.activation = ACTIVATIONS[config.activation]
        self.last_layer = (
            WeightNormLinear(
                config.out_dim, config.last_gain_trains, name="last_layer", dtype=dtype
            )
            if config.last_layer == "weight_norm"
            else Linear(config.out_dim, use_bias=True, name="last_layer", dtype=dtype)
        )

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        dims = self.config.head_dims
        for product, dim in zip((*self.mlp, self.last_layer), dims, strict=True):
            product.build((None, dim))

    def call(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch out_dim"]:
        for i, product in enumerate(self.mlp):
            x = product(x)
            if i + 1 < self.config.head_layers or self.config.head_last_activation:
                x = self.activation(x)
        return self.last_layer(normalize(x, self.config.normalize_eps))


class ResizePositions(keras.layers.Layer):
    """Positions of the patches of local views, R X Cᵀ of the net's; the others stay as they are."""

    def __init__(self, config: DINOConfig, *, name: str, dtype: DType = None) -> None:
        super().__init__(name=name, dtype=dtype)
        self.grid, self.prefix, _ = config.net.position_tables["pos_embed"]
        self.rows, self.columns = map(dino_bicubic, self.grid, config.local_net.grid)

    def call(self, table: Float[Tensor, "1 positions dim"]) -> Float[Tensor, "1 local dim"]:
        prefix, x = table[:, : self.prefix], table[:, self.prefix :]
        x = ops.reshape(x, (1, *self.grid, x.shape[-1]))  # (1, rows, columns, dim)
        x = resample(x, self.rows, self.columns)
        return ops.concatenate([prefix, ops.reshape(x, (1, -1, table.shape[-1]))], axis=1)


class Network(keras.layers.Layer):
    """A model and its head: the student, or the teacher."""

    def __init__(self, config: DINOConfig, net: Config, *, name: str, dtype: DType = None) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype = self.dtype_policy
        self.net = model_class("keras", net.family)(net, name="net", dtype=dtype)
        self.head = Head(config, name="head", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.net.build(input_shape)
        self.head.build((None, self.head.config.head_dims[0]))

    def call(
        self,
        images: Float[Tensor, "batch height width channels"],
        pos_embed: Float[Tensor, "1 positions dim"] | None = None,
        training: bool | None = None,
    ) -> Float[Tensor, "batch out_dim"]:
        if pos_embed is None:
            return self.head(self.net(images, training=training))
        x = self.net.positioned(self.net.patch_embed(images), pos_embed)
        return self.head(self.net.classify(self.net.encode(x, training=training)))


@keras.saving.register_keras_serializable(package="isovit")
class DINO(SpecModel):
    """Student and teacher: the loss of what the one says of a view and the other of another.

    Called with the student's views, (batch, views, height, width, channels), the teacher's and, if
    the config has some, the student's local ones; returns (batch,) cross-entropies. After it,
    ``update_center``; after the optimiser's step, ``update_teacher``.

    Args:
        config: see ``DINOConfig``.
        name: of the model.
        dtype: policy, ``float32`` or ``mixed_bfloat16`` for example; None for the global one.
    """

    def __init__(self, config: DINOConfig, *, name: str = "dino", dtype: DType = None) -> None:
        super().__init__(config, name=name, dtype=dtype)
        dtype = self.dtype_policy
        self.student = Network(config, config.net, name="student", dtype=dtype)
        self.teacher = Network(config, config.teacher_net, name="teacher", dtype=dtype)
        self.resize = (
            ResizePositions(config, name="resize", dtype=dtype)
            if config.resizes
            else Identity(name="resize", dtype=dtype)
        )

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        shape = (1, self.config.out_dim)
        self.center = self.add_weight(
            shape=shape, initializer="zeros", trainable=False, name="center"
        )
        self.student.build((None, *self.config.net.input_shape))
        self.teacher.build((None, *self.config.net.input_shape))
        self.resize.build((1, None, None))
        fix(self.teacher)

    def project_student(
        self,
        images: Float[Tensor, "batch views height width channels"],
        local_images: Float[Tensor, "batch local_views rows columns channels"] | None = None,
        training: bool | None = None,
    ) -> Float[Tensor, "batch all_views out_dim"]:
        """What the student says of each view, the local ones last."""
        views, images = range(self.config.views), self.checked(images)
        self.config.check_local_images(None if local_images is None else tuple(local_images.shape))
        outputs = [self.student(images[:, i], training=training) for i in views]
        if local_images is not None:
            views, images = range(self.config.local_views), ops.cast(local_images, images.dtype)
            pos_embed = self.resize(ops.cast(self.student.net.pos_embed, images.dtype))
            outputs += [self.student(images[:, i], pos_embed, training=training) for i in views]
        return ops.stack(outputs, axis=1)

    def project_teacher(
        self,
        images: Float[Tensor, "batch views height width channels"],
        training: bool | None = None,
    ) -> Float[Tensor, "batch views out_dim"]:
        """What the teacher says of each view; no gradient goes through it."""
        self.config.check_teacher_images(tuple(images.shape))
        views, images = range(self.config.teacher_views), ops.cast(images, self.compute_dtype)
        outputs = [self.teacher(images[:, i], training=training) for i in views]
        return ops.stop_gradient(ops.stack(outputs, axis=1))

    def losses(
        self,
        student: Float[Tensor, "batch all_views out_dim"],
        teacher: Float[Tensor, "batch teacher_views out_dim"],
        teacher_temp: float | None = None,
    ) -> Float[Tensor, " batch"]:
        """Of each image, the mean cross-entropy of the pairs of views."""
        temp = self.config.teacher_temp if teacher_temp is None else teacher_temp
        center = ops.cast(self.center, teacher.dtype)
        probs = ops.softmax((ops.stop_gradient(teacher) - center) / temp, axis=-1)
        log_probs = ops.log_softmax(student / self.config.student_temp, axis=-1)
        pairs = [-ops.sum(probs[:, t] * log_probs[:, s], axis=-1) for t, s in self.config.pairs]
        return ops.mean(ops.stack(pairs, axis=1), axis=1)

    def call(
        self,
        images: Float[Tensor, "batch views height width channels"],
        teacher_images: Float[Tensor, "batch teacher_views height width channels"],
        local_images: Float[Tensor, "batch local_views rows columns channels"] | None = None,
        teacher_temp: float | None = None,
        training: bool | None = None,
    ) -> Float[Tensor, " batch"]:
        student = self.project_student(images, local_images, training=training)
        teacher = self.project_teacher(teacher_images, training=training)
        return self.losses(student, teacher, teacher_temp)


def update_teacher(model: DINO, decay: float) -> None:
    """Move the teacher towards its student: t ← decay·t + (1 − decay)·s, for all that trains."""
    pairs = zip(model.student.weights, model.teacher.weights, strict=True)
    for student, teacher in pairs:
        if student.trainable:
            teacher.assign(decay * teacher.value + (1 - decay) * student.value)


def update_center(
    model: DINO, teacher: Float[Tensor, "batch teacher_views out_dim"], momentum: float
) -> None:
    """Move the centre towards the mean of what the teacher said: c ← momentum·c + (1 − m)·mean."""
    center = model.center
    mean = ops.cast(ops.mean(teacher, axis=(0, 1))[None], center.dtype)  # (1, out_dim)
    center.assign(momentum * center.value + (1 - momentum) * mean)
