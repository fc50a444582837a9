"""DINO in NumPy loops, one view and one pair of views after another."""

from __future__ import annotations

from importlib import import_module

import numpy as np

from isovit.spec.families import home
from isovit.spec.objectives.dino import DINOConfig
from parity_tests.oracles.arrays import ACTIVATIONS, Array, widen
from parity_tests.oracles.arrays import Reference as Base


class Network(Base):
    """A model and its head."""

    config: DINOConfig

    def output(self, images: Array) -> Array:
        """See ``Reference.output``; of one view of each image."""
        config = self.config
        family = import_module(f"parity_tests.oracles.{home(config.net.family)}")
        net = self.part("net", family.Reference, config.net)
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

    def output(self, images: Array, teacher_images: Array) -> Array:
        """See ``Reference.output``."""
        config = self.config
        student, teacher = (self.part(n, Network, config) for n in ("student", "teacher"))
        images, teacher_images = (np.moveaxis(x, 1, 0) for x in (images, widen(teacher_images)))
        ours = [self.keep("student", student.output(view)) for view in images]
        theirs = [self.keep("teacher", teacher.output(view)) for view in teacher_images]
        total, count = 0.0, 0
        for t, wanted in enumerate(theirs):
            for s, said in enumerate(ours):
                if t == s:
                    continue
                probs = np.exp(log_softmax((wanted - self.weights["center"]) / config.teacher_temp))
                total = total - (probs * log_softmax(said / config.student_temp)).sum(-1)
                count += 1
        return np.asarray(total / count)


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
