"""T2T-ViT in NumPy loops."""

from __future__ import annotations

import math

import numpy as np

from isovit.spec.families.t2t_vit import SoftSplit, T2TViTConfig
from parity_tests.oracles import pairs
from parity_tests.oracles.arrays import Array, TransformerReference, attend
from parity_tests.oracles.originals import Original


def soft_split(image: Array, split: SoftSplit) -> Array:
    """Patches of one (rows, columns, dim) image, each as (channel, height, width), row by row."""
    kernel, stride, padding = split
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    rows, columns, _ = padded.shape
    return np.array(
        [
            [padded[i + di, j + dj, c] for c in range(image.shape[2])
             for di in range(kernel) for dj in range(kernel)]
            for i in range(0, rows - kernel + 1, stride)
            for j in range(0, columns - kernel + 1, stride)
        ]
    )  # fmt: skip


class Reference(TransformerReference):
    """T2T-ViT; a soft split visits one patch after another."""

    config: T2TViTConfig

    def output(self, images: Array) -> Array:
        """See ``Reference.output``."""
        return self.backbone(self.tokens_to_token(self.config, images), positions_first=False)

    def tokens_to_token(self, config: T2TViTConfig, images: Array) -> Array:
        """The stem."""
        mixers = {
            "performer": self.performer,
            "transformer": self.transformer,
            "full": self.full,
        }
        *mixed, last = config.stages
        x = images
        for j, stage in enumerate(mixed):
            x = np.stack([soft_split(image, stage.split) for image in x])
            x = mixers[config.token_mixer](f"tokens_to_token.mixers.{j}", config, x)
            x = x.reshape(len(x), *stage.grid, -1)
        x = np.stack([soft_split(image, last.split) for image in x])
        return self.keep("tokens_to_token", self.dense("tokens_to_token.project", x))

    def performer(self, path: str, config: T2TViTConfig, x: Array) -> Array:
        """Linear attention, by the kernel of every token with every other."""
        kqv = self.dense(f"{path}.kqv", self.norm(f"{path}.norm1", x))
        k, q, v = (kqv[..., i * config.token_dim : (i + 1) * config.token_dim] for i in range(3))
        features = self.weights[f"{path}.random_features"]

        def phi(z: Array) -> Array:
            exponents = [z @ w - (z * z).sum(-1) / 2 for w in features]
            return np.exp(np.stack(exponents, axis=-1)) / math.sqrt(len(features))

        kernel = np.einsum("bqm,bkm->bqk", phi(q), phi(k))  # of every token with every other
        y = np.einsum("bqk,bkd->bqd", kernel, v)
        y = y / (kernel.sum(-1, keepdims=True) + config.performer_eps)
        y = v + self.dense(f"{path}.proj", y)
        y = y + self.mlp(f"{path}.mlp", config.activation, self.norm(f"{path}.norm2", y))
        return self.keep(path, y)

    def transformer(self, path: str, config: T2TViTConfig, x: Array) -> Array:
        """Softmax attention whose residual is v."""
        scale = (x.shape[-1] if config.token_scale == "input_dim" else config.token_dim) ** -0.5
        qkv = self.dense(f"{path}.attn.qkv", self.norm(f"{path}.norm1", x))
        v = qkv[..., 2 * config.token_dim :]
        y = self.dense(f"{path}.attn.proj", attend(qkv, 1, scale))
        y = self.keep(f"{path}.attn", v + y)
        y = y + self.mlp(f"{path}.mlp", config.activation, self.norm(f"{path}.norm2", y))
        return self.keep(path, y)

    def full(self, path: str, config: T2TViTConfig, x: Array) -> Array:
        """A block at full width."""
        x = self.block(f"{path}.block", config.full_mixer(x.shape[-1]), x)
        return self.keep(path, self.norm(f"{path}.norm", x))


ORIGINALS = {
    "vit_pytorch": Original(
        "vit_pytorch", "vit_pytorch.t2t", lambda m: m.T2TViT, pairs.vit_pytorch_t2t_vits
    ),
    "yitu": Original("yitu", "parity_tests.oracles.yitu", lambda m: m.T2TViT, pairs.yitu_vits),
}
