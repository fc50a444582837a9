"""SimMIM in NumPy loops."""

from __future__ import annotations

import numpy as np

from isovit.spec.objectives.simmim import SimMIMConfig
from parity_tests.oracles.arrays import Array
from parity_tests.oracles.arrays import Reference as Base
from parity_tests.oracles.families import vit


class Encoder(vit.Reference):
    """A ViT some of whose patches are one token."""

    def encode(self, images: Array, hidden: list[list[int]], mask_token: Array) -> Array:
        """Tokens of all patches, of which those hidden are put in one after another."""
        config, positions = self.config, self.weights["pos_embed"][0]
        embedded = self.patch_embed(config, images)
        x = embedded.astype(np.result_type(embedded, mask_token))
        for image, patches in zip(x, hidden, strict=True):
            for patch in patches:
                image[patch] = mask_token
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
    """SimMIM; one hidden patch after another."""

    config: SimMIMConfig

    def output(self, images: Array, order: Array) -> Array:
        """See ``Reference.output``."""
        config, encoder = self.config, self.config.encoder
        hidden = [self.hidden(units[: config.hidden_units]) for units in order]
        encode = self.part("encoder", Encoder, encoder).encode
        x = encode(images, hidden, self.weights["mask_token"][0, 0])
        painted = self.dense("to_pixels", x)
        losses = []
        for image, colours, patches in zip(images, painted, hidden, strict=True):
            errors = [absolute(colours[p] - pixels(image, p, encoder)).mean() for p in patches]
            loss = sum(errors) / len(patches)
            losses.append(loss / len(patches) if config.divided_by_hidden else loss)
        return np.stack(losses)

    def hidden(self, units: Array) -> list[int]:
        """The patches of some units."""
        height, width = self.config.mask_unit
        across = self.config.encoder.grid[1]
        corners = [divmod(int(unit), across // width) for unit in units]
        return [
            (row * height + i) * across + column * width + j
            for row, column in corners
            for i in range(height)
            for j in range(width)
        ]


def absolute(x: Array) -> Array:
    """|x| by the sign of its real part: analytic but at zero."""
    return np.where(x.real < 0, -x, x)


def pixels(image: Array, patch: int, encoder: vit.ViTConfig) -> Array:
    """The numbers of a patch, (height, width, channel) in a row."""
    height, width = encoder.patch_size
    top, left = patch // encoder.grid[1] * height, patch % encoder.grid[1] * width
    return image[top : top + height, left : left + width].reshape(-1)
