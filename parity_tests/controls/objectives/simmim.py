"""Faults of ports of SimMIM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from isovit.backends.torch.families.vit import flatten_patches
from isovit.backends.torch.objectives import simmim
from isovit.spec.families.vit import ViTConfig
from isovit.spec.objectives.simmim import SimMIMConfig
from parity_tests.controls.blocks import (
    final_norm_missing,
    gelu_tanh,
    loss_averaged,
    norm_eps_of_torch,
    two_pass_variance,
)
from parity_tests.controls.faults import Fault, GradientFault, Model, Patch, rewrite

ENCODER = ViTConfig(
    image_size=(12, 24), patch_size=(3, 4), embed_dim=18, depth=2, num_heads=3, mlp_dim=30,
    num_classes=0,
)  # fmt: skip

CASES: dict[str, Any] = {
    "simmim": SimMIMConfig(encoder=ENCODER),  # 2 by 3 units of 2 by 2 patches, 4 of them hidden
    "simmim_pytorch": SimMIMConfig(
        encoder=ENCODER.replace(
            patch_embed="norm_linear_norm", class_token=False, pool="mean", norm_eps=1e-5
        ),
        mask_ratio=0.5,
        mask_rounds="down",
        mask_unit=(1, 1),
        divided_by_hidden=True,
    ),
}


# --- scaffolds: a forward with one exchangeable part ----------------------------------------------


def hide_then_place(x: Tensor, positions: Tensor, token: Tensor, hidden: Tensor) -> Tensor:
    """The sound tokens: a hidden patch is the mask token, and every patch has its position."""
    return torch.where(hidden, token, x) + positions


def hidden_errors(painted: Tensor, pixels: Tensor, hidden: Tensor) -> Tensor:
    """The sound loss, by a mask of numbers: the mean of |painted - pixels| over what is hidden."""
    errors = (painted - pixels).abs() * hidden
    return errors.sum(dim=(1, 2)) / hidden.sum(dim=(1, 2)) / pixels.shape[-1]


def rewrite_simmim(
    model: Model,
    *,
    tokens: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = hide_then_place,
    patches: slice = slice(1, None),
    loss: Callable[[Tensor, Tensor, Tensor], Tensor] = hidden_errors,
    target: Callable[[Tensor, ViTConfig], Tensor] = flatten_patches,
) -> None:
    """Give a SimMIM with a class token a forward with one part exchanged."""

    def forward(model: Any, images: Tensor, order: Tensor) -> Tensor:
        encoder, config = model.encoder, model.config.encoder
        hidden = simmim.hidden_patches(order, model.config)[..., None]
        first, others = encoder.pos_embed[:, :1], encoder.pos_embed[:, 1:]
        x = tokens(encoder.patch_embed(images), others, model.mask_token, hidden)
        x = torch.cat([(encoder.cls_token + first).expand(len(x), -1, -1), x], dim=1)
        for block in encoder.blocks:
            x = block(x)
        x = encoder.norm(x)[:, patches]
        return loss(model.to_pixels(x), target(images, config), hidden)

    rewrite([model], forward)


def rewrite_hidden(patch: Patch, hidden: Callable[[Tensor, SimMIMConfig], Tensor]) -> None:
    """Put another function of (order, config) in the place of the one that says what is hidden."""
    patch.setattr(simmim, "hidden_patches", hidden)


# --- faults: what is hidden -----------------------------------------------------------------------


def order_read_as_places(_: Model, patch: Patch) -> None:
    """The order taken for the places in it: the other of the two readings of an ``argsort``."""

    def hidden(order: Tensor, config: SimMIMConfig) -> Tensor:
        return sound_hidden(order.argsort(dim=1), config)

    rewrite_hidden(patch, hidden)


def first_are_shown(_: Model, patch: Patch) -> None:
    """MAE's reading of an order: its first patches are those that the encoder is shown."""
    rewrite_hidden(patch, lambda order, config: sound_hidden(order.flip(1), config))


def one_unit_too_few(_: Model, patch: Patch) -> None:
    """The number of units rounded down, as in vit-pytorch, where the official code rounds up."""

    def hidden(order: Tensor, config: SimMIMConfig) -> Tensor:
        return sound_hidden(order, config.replace(mask_rounds="down"))

    rewrite_hidden(patch, hidden)


def units_repeated_as_a_whole(_: Model, patch: Patch) -> None:
    """``np.tile`` for ``np.repeat``: both have the shape, and hide as many patches."""

    def hidden(order: Tensor, config: SimMIMConfig) -> Tensor:
        units = order.argsort(dim=1) < config.hidden_units
        return units.unflatten(1, config.units).tile(1, *config.mask_unit).flatten(1)

    rewrite_hidden(patch, hidden)


def units_column_by_column(_: Model, patch: Patch) -> None:
    """Units counted down the columns: sizes as (width, height), as Pillow gives them."""

    def hidden(order: Tensor, config: SimMIMConfig) -> Tensor:
        (rows, columns), units = config.units, order.argsort(dim=1)
        places = units.unflatten(1, (columns, rows)).mT.flatten(1)
        return sound_hidden(places.argsort(dim=1), config)

    rewrite_hidden(patch, hidden)


def mask_token_without_position(model: Model, _: Patch) -> None:
    """The token put in behind the positions: no hidden patch then knows where it is."""

    def tokens(x: Tensor, positions: Tensor, token: Tensor, hidden: Tensor) -> Tensor:
        return torch.where(hidden, token, x + positions)

    rewrite_simmim(model, tokens=tokens)


def mask_token_added(model: Model, _: Patch) -> None:
    """The token added to the patch that it should replace, which it then does not hide."""

    def tokens(x: Tensor, positions: Tensor, token: Tensor, hidden: Tensor) -> Tensor:
        return x + token * hidden + positions

    rewrite_simmim(model, tokens=tokens)


# --- faults: head and loss ------------------------------------------------------------------------


def class_token_painted(model: Model, _: Patch) -> None:
    """Tokens from the first, with a class token among them: each paints its neighbour's pixels."""
    rewrite_simmim(model, patches=slice(None, -1))


def encoder_norm_missing(model: Model, patch: Patch) -> None:
    """The head on tokens that the encoder's last norm has not seen; the shape is the same."""
    final_norm_missing(model.encoder, patch)


def loss_over_all_patches(model: Model, _: Patch) -> None:
    """The mean over shown patches too, as an autoencoder has it; Xie et al. 2022, section 4.1.4."""
    rewrite_simmim(model, loss=lambda painted, pixels, _: (painted - pixels).abs().mean((1, 2)))


def loss_squared(model: Model, _: Patch) -> None:
    """MAE's loss, the square for the absolute value."""

    def loss(painted: Tensor, pixels: Tensor, hidden: Tensor) -> Tensor:
        errors = (painted - pixels).square() * hidden
        return errors.sum(dim=(1, 2)) / hidden.sum(dim=(1, 2)) / pixels.shape[-1]

    rewrite_simmim(model, loss=loss)


def loss_summed_over_channels(model: Model, _: Patch) -> None:
    """The sum over a pixel's channels, where only the number of hidden pixels divides."""

    def loss(painted: Tensor, pixels: Tensor, hidden: Tensor) -> Tensor:
        return 3 * hidden_errors(painted, pixels, hidden)

    rewrite_simmim(model, loss=loss)


def pixels_channel_first(model: Model, _: Patch) -> None:
    """A patch as (channel, height, width): the order of PixelShuffle, which the official head has.

    That head has its columns in that order, this one in the order of the patches.
    """

    def target(images: Tensor, config: ViTConfig) -> Tensor:
        pixels = flatten_patches(images, config)
        return pixels.unflatten(-1, (-1, config.in_channels)).mT.flatten(-2)

    rewrite_simmim(model, target=target)


def divided_once(model: Model, _: Patch) -> None:
    """The paper's mean, where vit-pytorch divides it by the number of hidden patches again."""
    model.config = model.config.replace(divided_by_hidden=False)


# --- harmless rewrites ----------------------------------------------------------------------------


def mask_of_numbers(model: Model, _: Patch) -> None:
    """The scaffold of the faults, with the official way to hide: x·(1 - w) + token·w."""

    def tokens(x: Tensor, positions: Tensor, token: Tensor, hidden: Tensor) -> Tensor:
        w = hidden.to(x.dtype)
        return x * (1 - w) + token * w + positions

    rewrite_simmim(model, tokens=tokens)


def positions_on_both(model: Model, _: Patch) -> None:
    """vit-pytorch's way to hide: positions on patches and on tokens, and then one of the two."""

    def tokens(x: Tensor, positions: Tensor, token: Tensor, hidden: Tensor) -> Tensor:
        return torch.where(hidden, token + positions, x + positions)

    rewrite_simmim(model, tokens=tokens)


# --- faults that only a gradient shows ------------------------------------------------------------


def mask_token_detached(model: Model, _: Patch) -> None:
    """A mask token made without a gradient, as a constant of zeros in a buffer is."""

    def tokens(x: Tensor, positions: Tensor, token: Tensor, hidden: Tensor) -> Tensor:
        return hide_then_place(x, positions, token.detach(), hidden)

    rewrite_simmim(model, tokens=tokens)


sound_hidden = simmim.hidden_patches

FAULTS = (
    Fault(norm_eps_of_torch, "simmim", "encoder.blocks.0.norm1"),
    Fault(gelu_tanh, "simmim", "encoder.blocks.0.mlp.fc2"),
    Fault(order_read_as_places, "simmim", "encoder.blocks.0.norm1"),
    Fault(first_are_shown, "simmim", "encoder.blocks.0.norm1"),
    Fault(one_unit_too_few, "simmim", "encoder.blocks.0.norm1"),
    Fault(units_repeated_as_a_whole, "simmim", "encoder.blocks.0.norm1"),
    Fault(units_column_by_column, "simmim", "encoder.blocks.0.norm1"),
    Fault(mask_token_without_position, "simmim", "encoder.blocks.0.norm1"),
    Fault(mask_token_added, "simmim", "encoder.blocks.0.norm1"),
    Fault(class_token_painted, "simmim", "to_pixels"),
    Fault(encoder_norm_missing, "simmim", "encoder.norm"),
    Fault(loss_over_all_patches, "simmim"),
    Fault(loss_squared, "simmim"),
    Fault(loss_summed_over_channels, "simmim"),
    Fault(pixels_channel_first, "simmim"),
    Fault(order_read_as_places, "simmim_pytorch", "encoder.blocks.0.norm1"),
    Fault(divided_once, "simmim_pytorch"),
)


HARMLESS = (
    Fault(mask_of_numbers, "simmim"),
    Fault(positions_on_both, "simmim"),
    Fault(two_pass_variance, "simmim_pytorch"),
)


GRADIENT_FAULTS = (
    GradientFault(mask_token_detached, "simmim", "mask_token", "encoder.blocks.0.norm1.scale"),
    GradientFault(loss_averaged, "simmim", "to_pixels.bias", None),
)
