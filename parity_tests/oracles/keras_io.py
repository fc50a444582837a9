"""The mini ViT of keras.io's TokenLearner example, of stock Keras layers: an independent oracle.

Written from a description of what it computes, not from the models of isovit. What it makes of its
pixels before (rescaling, enlarging, cropping) is left out, and so is the softmax behind the head.
Every argument that has to do with the function is as the example gives it, or is left to Keras
where the example does. Dropout, which evaluation leaves out, is not there but in the attention,
which without it would be computed in another way, on JAX with a softmax in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from isovit.spec.families.token_learner import TokenLearnerConfig

Weights = Mapping[str, np.ndarray]


class Positions(layers.Layer):
    """A learned vector added to each token."""

    def __init__(self, tokens: int, dim: int, dtype: str) -> None:
        super().__init__(dtype=dtype)
        self.tokens = tokens
        self.table = layers.Embedding(tokens, dim, dtype=dtype)

    def call(self, x: Any) -> Any:
        return x + self.table(ops.expand_dims(ops.arange(self.tokens), axis=0))


class Mini:
    """A functional model, and which of its layers has which weights of isovit.

    Attributes:
        model: from images to logits.
        layers: by the canonical path of the module.
        num_heads: of the attention.
    """

    def __init__(self, config: TokenLearnerConfig, dtype: str) -> None:
        self.dtype, self.num_heads = dtype, config.num_heads
        self.layers: dict[str, Any] = {}
        (height, width), channels = config.image_size, config.in_channels
        inputs = layers.Input((height, width, channels), dtype=dtype)
        embed = layers.Conv2D(
            config.embed_dim, config.patch_size, strides=config.patch_size, padding="VALID",
            dtype=dtype,
        )  # fmt: skip
        x = self.named("patch_embed.proj", embed)(inputs)
        patches = math.prod(x.shape[1:3])
        x = layers.Reshape((patches, config.embed_dim), dtype=dtype)(x)
        x = self.named("pos_embed", Positions(patches, config.embed_dim, dtype))(x)
        for i in range(config.depth):
            x = self.block(f"blocks.{i}", config, x)
            if config.learner != "none" and i == config.learner_loc - 1:
                x = layers.Reshape((*config.grid, config.embed_dim), dtype=dtype)(x)
                x = self.token_learner("learners.0", config.learned_tokens, x)
        x = self.norm("norm", x)
        x = layers.GlobalAveragePooling1D(dtype=dtype)(x)
        head = layers.Dense(config.num_classes, dtype=dtype)
        self.model = keras.Model(inputs, self.named("head", head)(x))

    def named(self, path: str, layer: Any) -> Any:
        """Note a layer with weights."""
        self.layers[path] = layer
        return layer

    def norm(self, path: str, x: Any) -> Any:
        """The one epsilon of the example."""
        layer = layers.LayerNormalization(epsilon=1e-6, dtype=self.dtype)
        return self.named(path, layer)(x)

    def block(self, path: str, config: TokenLearnerConfig, x: Any) -> Any:
        """Attention, then an MLP with a GELU behind each of its layers."""
        y = self.norm(f"{path}.norm1", x)
        key_dim = config.block.head_dim
        attention = layers.MultiHeadAttention(
            config.num_heads, key_dim, dropout=0.1, dtype=self.dtype
        )
        x = layers.Add(dtype=self.dtype)([self.named(f"{path}.attn", attention)(y, y), x])
        y = self.norm(f"{path}.norm2", x)
        for name, units in (("fc1", config.mlp_dim), ("fc2", config.embed_dim)):
            dense = layers.Dense(units, activation=ops.gelu, dtype=self.dtype)
            y = self.named(f"{path}.mlp.{name}", dense)(y)
        return layers.Add(dtype=self.dtype)([y, x])

    def token_learner(self, path: str, tokens: int, x: Any) -> Any:
        """Four convolutions of the normalised grid, whose maps weigh the grid itself."""
        maps = self.norm(f"{path}.norm", x)
        for i, activation in enumerate([ops.gelu, ops.gelu, ops.gelu, "sigmoid"]):
            conv = layers.Conv2D(
                tokens, (3, 3), activation=activation, padding="same", use_bias=False,
                dtype=self.dtype,
            )  # fmt: skip
            maps = self.named(f"{path}.convs.{i}", conv)(maps)
        maps = layers.Reshape((-1, tokens), dtype=self.dtype)(maps)
        maps = layers.Permute((2, 1), dtype=self.dtype)(maps)
        flat = layers.Reshape((1, -1, x.shape[-1]), dtype=self.dtype)(x)
        return ops.mean(ops.expand_dims(maps, axis=-1) * flat, axis=2)

    def logits(self, images: Any) -> Any:
        """In evaluation mode."""
        return self.model(images, training=False)

    def assign(self, weights: Weights) -> None:
        """Give the layers the canonical weights of isovit; each is used."""
        used: set[str] = set()
        for path, layer in self.layers.items():
            mine = {name: array for name, array in weights.items() if owner(name, path)}
            used |= mine.keys()
            for variable in layer.weights:
                variable.assign(self.array(variable.path.split("/")[-2:], path, mine))
        assert used == weights.keys()

    def array(self, names: list[str], path: str, weights: Weights) -> np.ndarray:
        """What a variable of a layer is in isovit."""
        parent, leaf = names
        if path == "pos_embed":
            return weights["pos_embed"][0]
        if not path.endswith(".attn"):
            return weights[f"{path}.{LEAVES.get(leaf, leaf)}"]
        if parent == "attention_output":
            proj = weights[f"{path}.proj.{leaf}"]
            return proj.reshape(self.num_heads, -1, proj.shape[-1]) if leaf == "kernel" else proj
        qkv = np.split(weights[f"{path}.qkv.{leaf}"], 3, axis=-1)
        part = qkv[["query", "key", "value"].index(parent)]
        return part.reshape(*part.shape[:-1], self.num_heads, -1)


LEAVES = {"gamma": "scale", "beta": "bias"}
"""What Keras's LayerNormalization calls its weights."""


def owner(name: str, path: str) -> bool:
    """Whether a parameter is in a module, or is it."""
    return name == path or name.startswith(f"{path}.")
