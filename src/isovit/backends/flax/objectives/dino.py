"""DINO in Flax.

Source: Caron et al. 2021, arXiv:2104.14294, section 3.1 and algorithm 1; see the spec for its
forms.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from isovit.backends import model_class
from isovit.backends.flax.layers import ACTIVATIONS, Fixed, Kinds, Linear, identity, resample
from isovit.spec.config import Config
from isovit.spec.objectives.dino import DINOConfig
from isovit.spec.resample import dino_bicubic


def normalize(x: Float[Array, "batch dim"], eps: float) -> Float[Array, "batch dim"]:
    """Vectors of length 1, but where they are shorter than ``eps``."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), eps)


def fix(module: nnx.Module) -> None:
    """Make parameters that nothing trains of all of a module's."""
    for _, part in nnx.iter_modules(module):
        for name, variable in list(vars(part).items()):
            if isinstance(variable, nnx.Param):
                setattr(part, name, Fixed(variable.get_value()))


class WeightNormLinear(Linear):
    """x·W, columns of W in directions and of lengths of their own; arXiv:1602.07868, eq. 2."""

    def __init__(
        self,
        dim: int,
        dim_out: int,
        gain_trains: bool,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(
            dim, dim_out, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.gain = (nnx.Param if gain_trains else Fixed)(jnp.ones(dim_out, param_dtype))

    def __call__(
        self, inputs: Float[Array, "batch dim"], out_sharding: object = None
    ) -> Float[Array, "batch dim_out"]:
        kernel, gain = (x[...].astype(inputs.dtype) for x in (self.kernel, self.gain))
        length = jnp.linalg.norm(kernel, axis=0)
        return inputs @ (gain * kernel / length)


class Head(nnx.Module):
    """Products with activations, a vector of length 1, and a last product."""

    def __init__(
        self, config: DINOConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.config, dims = config, config.head_dims
        self.mlp = nnx.List(
            [
                Linear(dims[i], dims[i + 1], use_bias=True, **kinds)
                for i in range(config.head_layers)
            ]
        )
        self.activation = ACTIVATIONS[config.activation]
        self.last_layer = (
            WeightNormLinear(dims[-1], config.out_dim, config.last_gain_trains, **kinds)
            if config.last_layer == "weight_norm"
            else Linear(dims[-1], config.out_dim, use_bias=True, **kinds)
        )

    def __call__(self, x: Float[Array, "batch dim"]) -> Float[Array, "batch out_dim"]:
        for i, product in enumerate(self.mlp):
            x = product(x)
            if i + 1 < self.config.head_layers or self.config.head_last_activation:
                x = self.activation(x)
        return self.last_layer(normalize(x, self.config.normalize_eps))


class ResizePositions(nnx.Module):
    """Positions of the patches of local views, R X Cᵀ of the net's; the others stay as they are."""

    def __init__(self, config: DINOConfig) -> None:
        self.grid, self.prefix, _ = config.net.position_tables["pos_embed"]
        self.local_grid = config.local_net.grid

    def __call__(self, table: Float[Array, "1 positions dim"]) -> Float[Array, "1 local dim"]:
        rows, columns = map(dino_bicubic, self.grid, self.local_grid)
        prefix, x = table[:, : self.prefix], table[:, self.prefix :]
        x = x.reshape(1, *self.grid, x.shape[-1])  # (1, rows, columns, dim)
        x = resample(x, rows, columns)
        return jnp.concat([prefix, x.reshape(1, -1, x.shape[-1])], axis=1)


class Network(nnx.Module):
    """A model and its head: the student, or the teacher."""

    def __init__(
        self,
        config: DINOConfig,
        net: Config,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.net = model_class("flax", net.family)(net, **kinds)
        self.head = Head(config, **kinds)

    def __call__(
        self,
        images: Float[Array, "batch height width channels"],
        pos_embed: Float[Array, "1 positions dim"] | None = None,
    ) -> Float[Array, "batch out_dim"]:
        if pos_embed is None:
            return self.head(self.net(images))
        x = self.net.positioned(self.net.patch_embed(images), pos_embed)
        return self.head(self.net.classify(self.net.encode(x)))


class DINO(nnx.Module):
    """Student and teacher: the loss of what the one says of a view and the other of another.

    Called with the student's views, (batch, views, height, width, channels), the teacher's and, if
    the config has some, the student's local ones; returns (batch,) cross-entropies. After it,
    ``update_center``; after the optimiser's step, ``update_teacher``.

    Args:
        config: see ``DINOConfig``.
        dtype: of the computation.
        param_dtype: of the parameters.
        rngs: streams ``params`` and ``dropout``.
    """

    def __init__(
        self,
        config: DINOConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.config, self.dtype = config, dtype
        self.center = Fixed(jnp.zeros((1, config.out_dim), param_dtype))
        self.student = Network(config, config.net, **kinds)
        self.teacher = Network(config, config.teacher_net, **kinds)
        fix(self.teacher)
        self.resize = ResizePositions(config) if config.resizes else identity

    def project_student(
        self,
        images: Float[Array, "batch views height width channels"],
        local_images: Float[Array, "batch local_views rows columns channels"] | None = None,
    ) -> Float[Array, "batch all_views out_dim"]:
        """What the student says of each view, the local ones last."""
        self.config.check_images(images.shape)
        self.config.check_local_images(None if local_images is None else local_images.shape)
        outputs = [self.student(view) for view in images.swapaxes(0, 1)]
        if local_images is not None:
            pos_embed = self.resize(self.student.net.pos_embed[...])
            outputs += [self.student(view, pos_embed) for view in local_images.swapaxes(0, 1)]
        return jnp.stack(outputs, axis=1)

    def project_teacher(
        self, images: Float[Array, "batch views height width channels"]
    ) -> Float[Array, "batch views out_dim"]:
        """What the teacher says of each view; no gradient goes through it."""
        self.config.check_teacher_images(images.shape)
        outputs = jnp.stack([self.teacher(view) for view in images.swapaxes(0, 1)], axis=1)
        return jax.lax.stop_gradient(outputs)

    def losses(
        self,
        student: Float[Array, "batch all_views out_dim"],
        teacher: Float[Array, "batch teacher_views out_dim"],
        teacher_temp: float | None = None,
    ) -> Float[Array, " batch"]:
        """Of each image, the mean cross-entropy of the pairs of views."""
        temp = self.config.teacher_temp if teacher_temp is None else teacher_temp
        center = self.center[...].astype(teacher.dtype)
        probs = jax.nn.softmax((jax.lax.stop_gradient(teacher) - center) / temp, axis=-1)
        log_probs = jax.nn.log_softmax(student / self.config.student_temp, axis=-1)
        pairs = [-(probs[:, t] * log_probs[:, s]).sum(axis=-1) for t, s in self.config.pairs]
        return jnp.stack(pairs, axis=1).mean(axis=1)

    def __call__(
        self,
        images: Float[Array, "batch views height width channels"],
        teacher_images: Float[Array, "batch teacher_views height width channels"],
        local_images: Float[Array, "batch local_views rows columns channels"] | None = None,
        teacher_temp: float | None = None,
    ) -> Float[Array, " batch"]:
        student = self.project_student(images, local_images)
        teacher = self.project_teacher(teacher_images)
        return self.losses(student, teacher, teacher_temp)


def update_teacher(model: DINO, decay: float) -> None:
    """Move the teacher towards its student: t ← decay·t + (1 − decay)·s, for all that trains."""
    teachers = dict(nnx.to_flat_state(nnx.state(model.teacher, Fixed)))
    for path, student in nnx.to_flat_state(nnx.state(model.student, nnx.Param)):
        teacher = teachers[path]
        teacher.set_value(decay * teacher[...] + (1 - decay) * student[...])


def update_center(
    model: DINO, teacher: Float[Array, "batch teacher_views out_dim"], momentum: float
) -> None:
    """Move the centre towards the mean of what the teacher said: c ← momentum·c + (1 − m)·mean."""
    mean = teacher.mean(axis=(0, 1))[None].astype(model.center.dtype)  # (1, out_dim)
    model.center.set_value(momentum * model.center[...] + (1 - momentum) * mean)
