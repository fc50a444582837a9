"""MAE in NumPy loops, and vit-pytorch's and transformers' beside it."""

from __future__ import annotations

import numpy as np

from isovit.spec.objectives.mae import MAEConfig
from parity_tests.oracles.arrays import Array
from parity_tests.oracles.arrays import Reference as Base
from parity_tests.oracles.families import vit


class Encoder(vit.Reference):
    """A ViT that is shown some of its patches."""

    def encode(self, images: Array, shown: Array) -> Array:
        """Tokens of the patches that are shown, one image after another."""
        config, positions = self.config, self.weights["pos_embed"][0]
        x = self.patch_embed(config, images)
        x = x + positions[len(positions) - config.patches :]
        x = np.stack([image[list(choice)] for image, choice in zip(x, shown, strict=True)])
        if config.class_token:
            token = self.weights["cls_token"][0]
            token = token + positions[:1] if config.pos_embed_tokens == "all" else token
            x = np.stack([np.concatenate([token, image]) for image in x])
        for i, block in enumerate(config.blocks):
            x = self.block(f"blocks.{i}", block, x)
        return self.norm("norm", x) if config.final_norm == "tokens" else x


class Reference(Base):
    """MAE; one patch after another."""

    config: MAEConfig

    def output(self, images: Array, order: Array) -> Array:
        """See ``Reference.output``."""
        config, encoder = self.config, self.config.encoder
        shown, hidden = order[:, : config.kept], order[:, config.kept :]
        x = self.part("encoder", Encoder, encoder).encode(images, shown)
        x = self.dense("decoder_embed", x) if config.decoder_embed else x
        tokens = np.repeat(self.weights["mask_token"], encoder.tokens, axis=1)
        tokens = np.repeat(tokens, len(x), axis=0).astype(x.dtype)
        start = encoder.prefix_tokens
        tokens[:, :start] = x[:, :start]
        for image, patches, places in zip(tokens, x[:, start:], shown, strict=True):
            for patch, place in zip(patches, places, strict=True):
                image[start + place] = patch
        x = tokens + self.weights["decoder_pos_embed"]
        for i, block in enumerate(config.decoder_blocks):
            x = self.block(f"decoder_blocks.{i}", block, x)
        x = self.norm("decoder_norm", x, encoder.norm_eps)
        x = np.stack([i[[start + p for p in h]] for i, h in zip(x, hidden, strict=True)])
        painted = self.dense("decoder_pred", x)
        pixels = np.stack([self.pixels(image, h) for image, h in zip(images, hidden, strict=True)])
        return ((painted - pixels) ** 2).mean(axis=(1, 2))

    def pixels(self, image: Array, patches: Array) -> Array:
        """The pixels of some patches, as they are painted."""
        (height, width), (_, columns) = self.config.encoder.patch_size, self.config.encoder.grid
        found = []
        for patch in patches:
            top, left = patch // columns * height, patch % columns * width
            x = image[top : top + height, left : left + width].reshape(-1)
            if self.config.normalized_pixels:
                variance = ((x - x.mean()) ** 2).sum() / (len(x) - 1)
                x = (x - x.mean()) / np.sqrt(variance + 1e-6)
            found.append(x)
        return np.stack(found)
