"""Masked patch prediction in NumPy loops."""

from __future__ import annotations

import numpy as np

from isovit.spec.objectives.mpp import MPPConfig
from parity_tests.oracles.arrays import Array
from parity_tests.oracles.arrays import Reference as Base
from parity_tests.oracles.families import vit


class Encoder(vit.Reference):
    """A ViT that gives all its patches."""

    def encode(self, images: Array) -> Array:
        """Tokens of the patches."""
        config, positions = self.config, self.weights["pos_embed"][0]
        x = self.patch_embed(config, images)
        x = x + positions[len(positions) - config.patches :]
        if config.class_token:
            token = self.weights["cls_token"][0]
            token = token + positions[:1] if config.pos_embed_tokens == "all" else token
            x = np.stack([np.concatenate([token, image]) for image in x])
        for i, block in enumerate(config.blocks):
            x = self.block(f"blocks.{i}", block, x)
        x = self.norm("norm", x) if config.final_norm == "tokens" else x
        return x[:, config.prefix_tokens :]


class Reference(Base):
    """Masked patch prediction; one patch after another."""

    config: MPPConfig

    def output(self, images: Array, masked: Array, source: Array, replaced: Array) -> Array:
        """See ``Reference.output``."""
        config = self.config
        token = self.weights["mask_token"].reshape(*config.encoder.patch_size, -1)
        tampered = images.astype(np.result_type(images, token))
        for b, p in np.ndindex(masked.shape):
            other = images[b][self.place(source[b, p])]
            tampered[b][self.place(p)] = token if replaced[b, p] else other
        x = self.part("encoder", Encoder, config.encoder).encode(tampered)
        logits = self.dense("to_bits", x)
        losses = []
        for b, image in enumerate(images):
            asked = [p for p in range(masked.shape[1]) if masked[b, p]]
            errors = [cross_entropy(logits[b, p], self.label(image, p)) for p in asked]
            losses.append(sum(errors) / len(errors))
        return np.stack(losses)

    def place(self, patch: int) -> tuple[slice, slice]:
        """Rows and columns of the pixels of a patch."""
        (height, width), columns = self.config.encoder.patch_size, self.config.encoder.grid[1]
        top, left = patch // columns * height, patch % columns * width
        return slice(top, top + height), slice(left, left + width)

    def label(self, image: Array, patch: int) -> int:
        """The class of the mean colour of a patch."""
        config, preprocess = self.config, self.config.encoder.preprocess
        pixels, label = image[self.place(patch)].real, 0
        if config.normalized_images:
            pixels = pixels * np.array(preprocess.std) + np.array(preprocess.mean)
        colour = np.minimum(pixels, config.max_pixel_val).mean(axis=(0, 1))
        bins = 2**config.output_channel_bits
        for channel, value in enumerate(colour):
            beneath = [k for k in range(1, bins) if config.max_pixel_val * k / bins < value]
            label += bins**channel * len(beneath)
        return label


def cross_entropy(logits: Array, label: int) -> Array:
    """-log softmax, of one of the classes."""
    largest = logits.real.max()
    return np.log(np.exp(logits - largest).sum()) + largest - logits[label]
