"""Faults of ports of MAE."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isovit.backends.torch.families.vit import flatten_patches
from isovit.backends.torch.objectives import mae
from isovit.spec.families.vit import ViTConfig
from isovit.spec.objectives.mae import PIXEL_EPS, MAEConfig
from parity_tests.controls.blocks import norm_eps_of_torch, q_and_k_swapped
from parity_tests.controls.faults import Fault, GradientFault, Model, Patch, rewrite

MAE = MAEConfig(
    encoder=ViTConfig(
        image_size=(8, 12), patch_size=(4, 4), embed_dim=18, depth=1, num_heads=3, mlp_dim=30,
        num_classes=0,
    ),
    mask_ratio=0.5, decoder_dim=12, decoder_depth=1, decoder_num_heads=2, decoder_mlp_dim=20,
)  # fmt: skip

CASES: dict[str, Any] = {"mae": MAE, "mae_plain": MAE.replace(normalized_pixels=False)}


# --- scaffold: a forward with one exchangeable part -----------------------------------------------


def inverse(order: Tensor) -> Tensor:
    """The sound way back to the rows of the grid."""
    return order.argsort(dim=1)


def shown_first(order: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """The sound choice: of an order the first are shown."""
    return order[:, :kept], order[:, kept:]


def pixels_of(model: Any, images: Tensor) -> Tensor:
    """The sound targets."""
    return flatten_patches(images, model.config.encoder)


def rewrite_mae(
    model: Model,
    *,
    unshuffle: Any = inverse,
    choose: Any = shown_first,
    prefix: int = 1,
    late_positions: bool = True,
    target: Any = pixels_of,
) -> None:
    """Give an autoencoder with a class token a forward with one part exchanged."""

    def forward(model: Any, images: Tensor, order: Tensor) -> Tensor:
        shown, hidden = choose(order, model.config.kept)
        x = model.decoder_embed(model.encode(images, shown))
        tokens = model.mask_token.expand(len(x), hidden.shape[1], -1)
        patches = torch.cat([x[:, 1:], tokens], dim=1)
        cls_position, positions = model.decoder_pos_embed[:, :1], model.decoder_pos_embed[:, 1:]
        patches = patches if late_positions else patches + positions
        patches = mae.take(patches, unshuffle(order))
        patches = patches + positions if late_positions else patches
        x = torch.cat([x[:, :1] + cls_position, patches], dim=1)
        for block in model.decoder_blocks:
            x = block(x)
        x, pixels = model.decoder_norm(x)[:, prefix:], target(model, images)
        painted, pixels = model.decoder_pred(mae.take(x, hidden)), mae.take(pixels, hidden)
        pixels = mae.normalize_pixels(pixels) if model.config.normalized_pixels else pixels
        return (painted - pixels).square().mean(dim=(1, 2))

    rewrite([model], forward)


def written_out(model: Model, _: Patch) -> None:
    """The scaffold with nothing exchanged."""
    rewrite_mae(model)


# --- faults ---------------------------------------------------------------------------------------


def patches_not_unshuffled(model: Model, _: Patch) -> None:
    """Patches taken by the order itself and not by its inverse: equal where it is its own."""
    rewrite_mae(model, unshuffle=lambda order: order)


def shown_and_hidden_exchanged(model: Model, _: Patch) -> None:
    """The first of an order are hidden, as in vit-pytorch, for an order that shows them."""
    rewrite_mae(model, choose=lambda order, kept: (order[:, -kept:], order[:, :-kept]))


def class_token_painted(model: Model, _: Patch) -> None:
    """The class token left in front of the patches: each is compared with its neighbour."""
    rewrite_mae(model, prefix=0)


def positions_before_the_unshuffling(model: Model, _: Patch) -> None:
    """Positions added to the patches in the order in which they were drawn."""
    rewrite_mae(model, late_positions=False)


def pixels_channel_first(model: Model, _: Patch) -> None:
    """The target flattened as (channel, height, width), the head as (height, width, channel)."""

    def target(model: Any, images: Tensor) -> Tensor:
        pixels = pixels_of(model, images)
        return pixels.unflatten(-1, (-1, model.config.encoder.in_channels)).mT.flatten(-2)

    rewrite_mae(model, target=target)


def variance_of_the_population(model: Model, patch: Patch) -> None:
    """NumPy's and JAX's default variance, where torch's is that of a sample."""
    del model

    def normalize(x: Tensor) -> Tensor:
        variance = x.var(dim=-1, correction=0, keepdim=True)
        return (x - x.mean(dim=-1, keepdim=True)) / torch.sqrt(variance + PIXEL_EPS)

    patch.setattr(mae, "normalize_pixels", normalize)


def pixel_eps_dropped(model: Model, patch: Patch) -> None:
    """Nothing added to the variance of the pixels."""
    del model

    def normalize(x: Tensor) -> Tensor:
        return (x - x.mean(dim=-1, keepdim=True)) / x.std(dim=-1, correction=1, keepdim=True)

    patch.setattr(mae, "normalize_pixels", normalize)


def pixels_detached(model: Model, _: Patch) -> None:
    """No gradient through the target: right for training, another derivative by the image."""
    rewrite_mae(model, target=lambda model, images: pixels_of(model, images).detach())


FAULTS = [
    Fault(patches_not_unshuffled, "mae", "decoder_blocks.0.norm1"),
    Fault(shown_and_hidden_exchanged, "mae", "encoder.blocks.0.norm1"),
    Fault(class_token_painted, "mae", "decoder_pred"),
    Fault(positions_before_the_unshuffling, "mae", "decoder_blocks.0.norm1"),
    Fault(pixels_channel_first, "mae_plain"),
    Fault(variance_of_the_population, "mae"),
    Fault(pixel_eps_dropped, "mae"),
    Fault(q_and_k_swapped, "mae", "encoder.blocks.0.attn.qkv"),
    Fault(norm_eps_of_torch, "mae", "encoder.blocks.0.norm1"),
]

HARMLESS = [Fault(written_out, "mae"), Fault(written_out, "mae_plain")]

GRADIENT_FAULTS = [GradientFault(pixels_detached, "mae", "images", "encoder.norm.scale")]
