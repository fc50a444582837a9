"""Masked patch prediction in PyTorch.

Source: Dosovitskiy et al. 2021, arXiv:2010.11929, appendix B.1.2; vit-pytorch's form, see the spec.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from isovit.backends.torch.families.vit import ViT, flatten_patches
from isovit.backends.torch.layers import Linear
from isovit.backends.torch.objectives.mae import take
from isovit.spec.families.vit import ViTConfig
from isovit.spec.objectives.mpp import MPPConfig


def unflatten_patches(
    x: Float[Tensor, "batch patches patch"], config: ViTConfig
) -> Float[Tensor, "batch height width channels"]:
    """Images of patches: the inverse of ``flatten_patches``."""
    x = x.unflatten(2, (*config.patch_size, config.in_channels)).unflatten(1, config.grid)
    x = x.transpose(2, 3)  # (batch, rows, height, columns, width, channels)
    return x.flatten(3, 4).flatten(1, 2)


def colour_labels(
    images: Float[Tensor, "batch height width channels"], config: MPPConfig
) -> Int[Tensor, "batch patches"]:
    """The mean colour of each patch as a class; a mean on an edge is in the bin beneath."""
    brightest = torch.as_tensor(config.brightest).to(images)  # (channels,)
    x = flatten_patches(torch.minimum(images, brightest), config.encoder)
    x = x.unflatten(-1, (-1, config.encoder.in_channels))
    sums = x.sum(dim=2)  # (batch, patches, channels)
    edges = torch.as_tensor(config.edges).to(images)  # (channels, levels - 1)
    bins = (sums[..., None] > edges).sum(dim=-1)  # one for each channel
    return (bins * torch.as_tensor(config.places).to(bins)).sum(dim=-1)


def cross_entropy(
    logits: Float[Tensor, "batch patches colours"], labels: Int[Tensor, "batch patches"]
) -> Float[Tensor, "batch patches"]:
    """Minus the logarithm of the probability of each label."""
    chosen = torch.take_along_dim(logits, labels[..., None], dim=-1)
    return logits.logsumexp(dim=-1) - chosen[..., 0]


class MPP(nn.Module):
    """The loss of telling the colours of patches that were tampered with.

    Called with (batch, height, width, channels) images and three arrays of (batch, patches)
    integers: where a colour is asked for, whose pixels stand in the place of a patch, and where the
    mask token does; returns (batch,) mean cross-entropies.
    """

    def __init__(self, config: MPPConfig) -> None:
        super().__init__()
        self.config, encoder = config, config.encoder
        self.encoder = ViT(encoder)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.patch_dim))
        self.to_bits = Linear(encoder.embed_dim, config.colours, bias=True)

    def encode(
        self,
        images: Float[Tensor, "batch height width channels"],
        source: Int[Tensor, "batch patches"],
        replaced: Int[Tensor, "batch patches"],
    ) -> Float[Tensor, "batch patches dim"]:
        """Every patch behind the blocks, of images with patches exchanged and replaced."""
        encoder, config = self.encoder, self.config.encoder
        x = take(flatten_patches(images, config), source)
        x = torch.where(replaced.bool()[..., None], self.mask_token, x)
        x = encoder.encode(encoder.embed(unflatten_patches(x, config)))
        return x[:, config.prefix_tokens :]

    def forward(
        self,
        images: Float[Tensor, "batch height width channels"],
        masked: Int[Tensor, "batch patches"],
        source: Int[Tensor, "batch patches"],
        replaced: Int[Tensor, "batch patches"],
    ) -> Float[Tensor, " batch"]:
        self.config.check_images(images.shape)
        logits = self.to_bits(self.encode(images, source, replaced))
        errors = cross_entropy(logits, colour_labels(images, self.config))  # (batch, patches)
        asked = masked.to(errors)
        return (errors * asked).sum(dim=1) / asked.sum(dim=1)
