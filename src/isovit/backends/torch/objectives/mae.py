"""MAE in PyTorch.

Source: He et al. 2022, arXiv:2111.06377, section 3; see the spec for its forms.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from isovit.backends.torch.families.vit import ViT, flatten_patches
from isovit.backends.torch.layers import Block, Linear
from isovit.spec.objectives.mae import PIXEL_EPS, MAEConfig


def take(
    x: Float[Tensor, "batch patches dim"], index: Int[Tensor, "batch some"]
) -> Float[Tensor, "batch some dim"]:
    """Of each image its own choice of patches."""
    return torch.take_along_dim(x, index[..., None].long(), dim=1)


def normalize_pixels(
    x: Float[Tensor, "batch patches patch"],
) -> Float[Tensor, "batch patches patch"]:
    """The pixels of each patch with mean 0 and the variance of a sample 1."""
    mean, variance = x.mean(dim=-1, keepdim=True), x.var(dim=-1, correction=1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + PIXEL_EPS)


class MAE(nn.Module):
    """Masked autoencoder: the loss of painting hidden patches.

    Called with (batch, height, width, channels) images and (batch, patches) integers, an order of
    the patches of each image, the first of which are shown; returns (batch,) mean squared errors.
    """

    def __init__(self, config: MAEConfig) -> None:
        super().__init__()
        self.config, encoder, dim = config, config.encoder, config.decoder_dim
        self.encoder = ViT(encoder)
        self.decoder_embed = (
            Linear(encoder.embed_dim, dim, bias=True) if config.decoder_embed else nn.Identity()
        )
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        learned, positions = encoder.pos_embed == "learned", torch.zeros(1, encoder.tokens, dim)
        if not learned:
            positions = torch.tensor(config.sincos_table)
        self.decoder_pos_embed = nn.Parameter(positions, requires_grad=learned)
        self.decoder_blocks = nn.ModuleList(Block(block) for block in config.decoder_blocks)
        self.decoder_norm = nn.LayerNorm(dim, eps=encoder.norm_eps)
        self.decoder_pred = Linear(dim, encoder.patch_dim, bias=True)

    def encode(
        self,
        images: Float[Tensor, "batch height width channels"],
        shown: Int[Tensor, "batch kept"],
    ) -> Float[Tensor, "batch tokens dim"]:
        """The patches that are shown, behind the class token if there is one."""
        prefix = self.config.encoder.prefix_tokens
        x = self.encoder.embed(images)
        x = torch.cat([x[:, :prefix], take(x[:, prefix:], shown)], dim=1)
        return self.encoder.encode(x)

    def decode(
        self, x: Float[Tensor, "batch tokens dim"], order: Int[Tensor, "batch patches"]
    ) -> Float[Tensor, "batch patches dim"]:
        """Every patch, from those that were shown and a token in the place of each other."""
        x = self.decoder_embed(x)
        prefix = self.config.encoder.prefix_tokens
        hidden = self.mask_token.expand(x.shape[0], self.config.hidden, -1)
        patches = torch.cat([x[:, prefix:], hidden], dim=1)  # in the given order
        patches = take(patches, order.argsort(dim=1))  # row by row
        x = torch.cat([x[:, :prefix], patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, prefix:]

    def forward(
        self,
        images: Float[Tensor, "batch height width channels"],
        order: Int[Tensor, "batch patches"],
    ) -> Float[Tensor, " batch"]:
        self.config.check_images(images.shape)
        shown, hidden = order[:, : self.config.kept], order[:, self.config.kept :]
        painted = self.decoder_pred(take(self.decode(self.encode(images, shown), order), hidden))
        pixels = take(flatten_patches(images, self.config.encoder), hidden)
        if self.config.normalized_pixels:
            pixels = normalize_pixels(pixels)
        return (painted - pixels).square().mean(dim=(1, 2))
