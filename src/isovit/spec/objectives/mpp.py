"""MPP, masked patch prediction: a ViT learns to tell the colours of patches tampered with.

Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", arXiv:2010.11929, section 4.6 and
appendix B.1.2, after BERT; vit-pytorch's ``mpp.py`` (MIT), whose form this is.

Of the patches some are *masked*: the model must say their mean colours, each a class of its own,
whatever stands in their place. That is the mask token for some of them, another patch of the same
image for others, and for the rest the patch itself, so that no token can be trusted. Mask token and
other patches stand in the image, before the patch embedding; the paper puts them behind it.

Chance decides three things, all drawn by ``draw``. Of each image exactly the whole number above
``mask_prob`` times its patches is masked. A masked patch becomes another patch with the probability
``random_patch_prob / (1 - replace_prob)``, and then, whatever it became, the mask token with the
probability ``replace_prob``: so it ends as another with ``random_patch_prob``.

A channel's colours have ``2 ** output_channel_bits`` bins of equal width from 0 to
``max_pixel_val``: a colour on an edge is in the bin beneath, as by ``torch.bucketize``. What is
compared are sums over a patch, with sums at the edges that are brought to normalised pixels in
float64, so that no division decides. Where the sums are exact, as of whole numbers, a label is the
same in every framework and dtype; else a colour that rounding can carry over an edge, and no other,
may be in either of its bins.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated

import msgspec
import numpy as np

from isovit.spec.config import BaseConfig, Epsilon, Positive, require
from isovit.spec.families import vit
from isovit.spec.families.vit import VIT_PYTORCH, ViTConfig
from isovit.spec.objectives.mae import check_encoder, draw_order
from isovit.spec.param import Param, ParamTree, Role, dense
from isovit.spec.published import Published
from isovit.spec.scheme import Scheme

Probability = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]

MAX_BITS = 24
"""Of a label: a head for 2 ** 24 classes is beyond any use."""


class MPPConfig(BaseConfig, frozen=True, kw_only=True, tag="mpp"):
    """Config of masked patch prediction.

    Called with (batch, height, width, channels) images and three arrays of (batch, patches)
    integers: ``masked``, 1 where a colour is asked for; ``source``, the patch whose pixels stand in
    the place of a patch, its own number where nothing is exchanged; ``replaced``, 1 where the mask
    token stands, whatever ``source`` says.

    Attributes:
        encoder: the ViT that learns: without a head.
        output_channel_bits: a channel has 2 to the power of this many colours.
        max_pixel_val: the brightest a pixel can be, before normalisation; brighter ones count as
            such.
        normalized_images: whether the images are normalised by ``encoder.preprocess``, which is
            undone before colours are told; vit-pytorch's ``mean=None, std=None`` says that they
            are not.
        mask_prob: fraction of the patches that is masked; their number is rounded up.
        replace_prob: probability that a masked patch becomes the mask token.
        random_patch_prob: probability that it becomes another patch of its image.
    """

    encoder: ViTConfig = ViTConfig(num_classes=0)
    output_channel_bits: Positive = 3
    max_pixel_val: Epsilon = 1.0
    normalized_images: bool = True
    mask_prob: Probability = 0.15
    replace_prob: Probability = 0.5
    random_patch_prob: Probability = 0.5

    def check(self) -> None:
        """Check that the encoder can be one, that some patch is masked, and that odds add up."""
        # Its dropout stays: the tokens take the encoder's own way.
        check_encoder("encoder", self.encoder.replace(embed_dropout_rate=0.0))
        require(self.mask_prob > 0, "mask_prob", self.mask_prob, "must mask one patch or more")
        require(
            self.replace_prob + self.random_patch_prob <= 1,
            "random_patch_prob",
            self.random_patch_prob,
            f"a patch cannot be two things: with replace_prob={self.replace_prob} more than 1",
        )
        require(
            self.output_channel_bits * self.encoder.in_channels <= MAX_BITS,
            "output_channel_bits",
            self.output_channel_bits,
            f"times in_channels={self.encoder.in_channels} must be {MAX_BITS} or less: the head "
            "has a class for every colour",
        )

    @property
    def masked(self) -> int:
        """Number of patches that are masked."""
        return math.ceil(self.mask_prob * self.encoder.patches)

    @property
    def exchange_prob(self) -> float:
        """Probability that a masked patch becomes another, before the mask token may replace it."""
        kept = 1 - self.replace_prob
        return min(self.random_patch_prob / kept, 1.0) if kept else 0.0

    @property
    def levels(self) -> int:
        """Number of bins of a channel."""
        return 2**self.output_channel_bits

    @property
    def colours(self) -> int:
        """Number of classes: every channel's bins with every other's."""
        return self.levels**self.encoder.in_channels

    @property
    def places(self) -> np.ndarray:
        """What a bin of each channel is worth in a label, (channels,) int32: first the least."""
        return self.levels ** np.arange(self.encoder.in_channels, dtype=np.int32)

    @property
    def brightest(self) -> np.ndarray:
        """The brightest pixel as the images have it, (channels,) float64."""
        mean, std = self._statistics
        return (self.max_pixel_val - mean) / std

    @property
    def edges(self) -> np.ndarray:
        """Sums over a patch at the edges between bins, (channels, levels - 1) float64."""
        mean, std = (statistic[:, None] for statistic in self._statistics)
        edges = self.max_pixel_val * np.arange(1, self.levels) / self.levels
        return (edges - mean) / std * math.prod(self.encoder.patch_size)

    @property
    def _statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation of the images before they were normalised, (channels,) each."""
        preprocess, channels = self.encoder.preprocess, self.encoder.in_channels
        if not self.normalized_images:
            return np.zeros(channels), np.ones(channels)
        return np.array(preprocess.mean), np.array(preprocess.std)

    def draw(self, batch: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Which patches are masked, and what stands in their place."""
        shape = (batch, self.encoder.patches)
        masked = draw_order(*shape, rng) < self.masked
        exchanged = masked & (rng.random(shape) < self.exchange_prob)
        replaced = masked & (rng.random(shape) < self.replace_prob)
        source = np.where(exchanged, rng.integers(shape[1], size=shape), np.arange(shape[1]))
        arrays = {"masked": masked, "source": source, "replaced": replaced}
        return {name: array.astype(np.int32) for name, array in arrays.items()}


def param_tree(config: MPPConfig) -> ParamTree:
    """The modules of masked patch prediction; it returns a number for each image."""
    encoder = config.encoder
    scheme, dim, patch_dim = Scheme(encoder.init_scheme), encoder.embed_dim, encoder.patch_dim
    kernel, bias = scheme.dense_kernel(dim, config.colours), scheme.dense_bias(dim)
    return ParamTree(
        name="",
        params=(Param("mask_token", (1, 1, patch_dim), Role.OWN, scheme.positions()),),
        children=(
            replace(vit.param_tree(encoder), name="encoder", output=None),
            dense("to_bits", (encoder.patches,), dim, config.colours, kernel, bias),
        ),
        output=(),
    )


VARIANTS: dict[str, MPPConfig] = {
    # README of vit-pytorch, section "Masked Patch Prediction"; its images are from 0 to 1.
    "mpp_vit_pytorch": MPPConfig(
        encoder=VIT_PYTORCH.replace(
            num_classes=0, embed_dropout_rate=0.1, dropout_rate=0.1, attn_dropout_rate=0.1
        ),
        normalized_images=False,
        random_patch_prob=0.3,
    ),
}

PUBLISHED: dict[str, Published] = {}

ALIASES: dict[str, str] = {}
