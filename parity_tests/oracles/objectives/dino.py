"""DINO in NumPy loops, one view and one pair of views after another."""

from __future__ import annotations

import math
from importlib import import_module

import numpy as np

from isovit.spec.families import home
from isovit.spec.objectives.dino import DINOConfig
from parity_tests.oracles.arrays import ACTIVATIONS, Array, widen
from parity_tests.oracles.arrays import Reference as Base
from parity_tests.oracles.families.crossvit import cubic


class Network(Base):
    """A model and its head."""

    config: DINOConfig

    def output(self, images: Array, local: bool = False) -> Array:
        """See ``Reference.output``; of one view of each image, a local one or another."""
        config = self.config
        family = import_module(f"parity_tests.oracles.{home(config.net.family)}")
        net = self.part("net", family.Reference, config.local_net if local else config.net)
        if local:
            net.weights["pos_embed"] = resampled(net.weights["pos_embed"], config)
        x = self.keep("net", net.output(images))
        for i in range(config.head_layers):
            x = self.dense(f"head.mlp.{i}", x)
            if config.head_last_activation or i != config.head_layers - 1:
                x = ACTIVATIONS[config.activation](x)
        x = np.stack([row / longer(length(row), config.normalize_eps) for row in x])
        return self.keep("head", self.last_layer(x))

    def last_layer(self, x: Array) -> Array:
        """The product behind the vector of length 1."""
        if self.config.last_layer == "dense":
            return self.dense("head.last_layer", x)
        kernel = self.weights["head.last_layer.kernel"].T  # a row for each number that comes out
        columns = [x @ (direction / length(direction)) for direction in kernel]
        y = np.stack(columns, axis=-1) * self.weights["head.last_layer.gain"]
        return self.keep("head.last_layer", y)


class Reference(Base):
    """DINO."""

    config: DINOConfig

    def output(
        self, images: Array, teacher_images: Array, local_images: Array | None = None
    ) -> Array:
        """See ``Reference.output``."""
        config = self.config
        student, teacher = (self.part(n, Network, config) for n in ("student", "teacher"))
        images, teacher_images = (np.moveaxis(x, 1, 0) for x in (images, widen(teacher_images)))
        ours = [self.keep("student", student.output(view)) for view in images]
        if local_images is not None:
            for view in np.moveaxis(widen(local_images), 1, 0):
                ours.append(self.keep("student", student.output(view, local=True)))
            del self.outputs["student.net"]  # the model's parts are called for these, not itself
        theirs = [self.keep("teacher", teacher.output(view)) for view in teacher_images]
        total, count = 0.0, 0
        for t, wanted in enumerate(theirs):
            for s, said in enumerate(ours):
                if t == s < config.views:
                    continue
                probs = np.exp(log_softmax((wanted - self.weights["center"]) / config.teacher_temp))
                total = total - (probs * log_softmax(said / config.student_temp)).sum(-1)
                count += 1
        return np.asarray(total / count)


def resampled(table: Array, config: DINOConfig) -> Array:
    """Positions on the grid of local views, axis by axis; those of other tokens as they are."""
    (rows, columns), local = config.net.grid, config.local_net.grid
    if (rows, columns) == local:
        return table
    first = table.shape[1] - rows * columns
    x = table[:, first:].reshape(1, rows, columns, -1)
    x = bicubic(bicubic(x, local[0], 1), local[1], 2)
    return np.concatenate([table[:, :first], x.reshape(1, local[0] * local[1], -1)], axis=1)


def bicubic(x: Array, size: int, axis: int) -> Array:
    """An axis resized as if it became longer by a tenth of a position than it does."""
    x = np.moveaxis(x, axis, 0)
    lines = []
    for i in range(size):
        at = (i + 0.5) * len(x) / (size + 0.1) - 0.5
        below = math.floor(at)
        neighbours = (min(max(below + n, 0), len(x) - 1) for n in (-1, 0, 1, 2))
        lines.append(sum(w * x[n] for w, n in zip(cubic(at - below), neighbours, strict=True)))
    return np.moveaxis(np.stack(lines), 0, axis)


def length(x: Array) -> Array:
    """Length of a vector, of complex numbers by the analytic formula."""
    return np.sqrt((x * x).sum())


def longer(found: Array, least: float) -> Array | float:
    """The larger of two lengths."""
    return found if found.real > least else least


def log_softmax(x: Array) -> Array:
    """Logarithms of what a softmax over the last axis returns."""
    x = x - x.real.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
