"""SimMIM in PyTorch.

Source: Xie et al. 2022, arXiv:2111.09886, section 3; see the spec for its forms.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from isovit.backends.torch.families.vit import ViT, flatten_patches
from isovit.backends.torch.layers import Linear
from isovit.spec.objectives.simmim import SimMIMConfig


def hidden_patches(
    order: Int[Tensor, "batch units"], config: SimMIMConfig
) -> Bool[Tensor, "batch patches"]:
    """Whether a patch is hidden: those of the units that come first in the order are."""
    (rows, columns), (height, width) = config.units, config.mask_unit
    hidden = order.argsort(dim=1) < config.hidden_units  # (batch, units): by its place in the order
    hidden = hidden.unflatten(1, (rows, 1, columns, 1))
    return hidden.tile(1, 1, height, 1, width).flatten(1)  # (batch, patches): row by row


class SimMIM(nn.Module):
    """The loss of painting the patches that a mask token stands for.

    Called with (batch, height, width, channels) images and (batch, units) integers, an order of
    the units of each image, the first of which are hidden; returns (batch,) mean absolute errors.
    """

    def __init__(self, config: SimMIMConfig) -> None:
        super().__init__()
        self.config, encoder = config, config.encoder
        self.encoder = ViT(encoder)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.embed_dim))
        self.to_pixels = Linear(encoder.embed_dim, encoder.patch_dim, bias=True)

    def encode(
        self,
        images: Float[Tensor, "batch height width channels"],
        hidden: Bool[Tensor, "batch patches"],
    ) -> Float[Tensor, "batch patches dim"]:
        """Every patch behind the blocks, with the mask token in the place of the hidden ones."""
        x = torch.where(hidden[..., None], self.mask_token, self.encoder.patch_embed(images))
        x = self.encoder.encode(self.encoder.positioned(x))
        return x[:, self.config.encoder.prefix_tokens :]

    def forward(
        self,
        images: Float[Tensor, "batch height width channels"],
        order: Int[Tensor, "batch units"],
    ) -> Float[Tensor, " batch"]:
        self.config.check_images(images.shape)
        hidden = hidden_patches(order, self.config)
        painted = self.to_pixels(self.encode(images, hidden))  # (batch, patches, patch)
        pixels = flatten_patches(images, self.config.encoder)
        errors = (painted - pixels).abs().mean(dim=-1)  # (batch, patches)
        loss = torch.where(hidden, errors, 0.0).sum(dim=1) / self.config.hidden
        return loss / self.config.hidden if self.config.divided_by_hidden else loss
