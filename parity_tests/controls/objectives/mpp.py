"""Faults of ports of masked patch prediction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isovit.backends.torch.families.vit import flatten_patches
from isovit.backends.torch.objectives import mpp
from isovit.backends.torch.objectives.mae import take
from isovit.spec.config import Preprocess
from isovit.spec.families.vit import ViTConfig
from isovit.spec.objectives.mpp import MPPConfig
from parity_tests.controls.blocks import gelu_tanh, loss_averaged, norm_eps_of_flax
from parity_tests.controls.faults import Fault, GradientFault, Model, Patch, rewrite

MPP = MPPConfig(
    encoder=ViTConfig(
        image_size=(12, 16), patch_size=(3, 4), patch_embed="norm_linear_norm", embed_dim=18,
        depth=2, num_heads=3, mlp_dim=30, num_classes=0, norm_eps=1e-5,
        preprocess=Preprocess(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3)),
    ),
    output_channel_bits=2, mask_prob=0.6, replace_prob=0.4, random_patch_prob=0.5,
)  # fmt: skip

CASES: dict[str, Any] = {
    "mpp": MPP,
    "mpp_conv": MPP.replace(**{"encoder.patch_embed": "conv"}),
    "mpp_bright": MPP.replace(max_pixel_val=0.6),  # many pixels are brighter
}


# --- scaffolds: a forward with one exchangeable part ----------------------------------------------


def exchange_then_replace(x: Tensor, source: Tensor, replaced: Tensor, token: Tensor) -> Tensor:
    """The sound order: patches are exchanged, and the mask token wins."""
    return torch.where(replaced.bool()[..., None], token, take(x, source))


def where_asked(errors: Tensor, masked: Tensor, _: Tensor) -> Tensor:
    """The sound mean, of (errors, masked, replaced)."""
    return torch.where(masked.bool(), errors, 0.0).sum(1) / masked.sum(1)


def behind_class_token(tokens: Tensor) -> Tensor:
    """The sound tokens that get a colour."""
    return tokens[:, 1:]


def rewrite_mpp(
    model: Model,
    *,
    tamper: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = exchange_then_replace,
    patches: Callable[[Tensor], Tensor] = behind_class_token,
    target: Callable[[Tensor, Tensor], Tensor] = lambda images, _: images,
    mean: Callable[[Tensor, Tensor, Tensor], Tensor] = where_asked,
) -> None:
    """Give an MPP with a class token a forward with one part exchanged."""

    def forward(
        model: Any, images: Tensor, masked: Tensor, source: Tensor, replaced: Tensor
    ) -> Tensor:
        encoder, config = model.encoder, model.config.encoder
        x = tamper(flatten_patches(images, config), source, replaced, model.mask_token)
        x = mpp.unflatten_patches(x, config)
        logits = model.to_bits(patches(encoder.encode(encoder.embed(x))))
        labels = mpp.colour_labels(target(images, x), model.config)
        return mean(mpp.cross_entropy(logits, labels), masked, replaced)

    rewrite([model], forward)


def rewrite_labels(patch: Patch, change: Callable[[Tensor, MPPConfig], Tensor]) -> None:
    """Put another function of (images, config) in the place of the one that tells colours."""
    patch.setattr(mpp, "colour_labels", change)


def mean_colours(images: Tensor, config: MPPConfig) -> Tensor:
    """(batch, patches, channels) colours from 0 to 1, clamped at the brightest pixel."""
    mean, std = (
        images.new_tensor(getattr(config.encoder.preprocess, name)) for name in ("mean", "std")
    )
    x = (images * std + mean).clamp(max=config.max_pixel_val)
    x = flatten_patches(x, config.encoder).unflatten(-1, (-1, config.encoder.in_channels))
    return x.mean(dim=2) / config.max_pixel_val


def labels_of(bins: Tensor, config: MPPConfig) -> Tensor:
    """Classes of (batch, patches, channels) bins."""
    return (bins.long() * torch.tensor(config.places)).sum(dim=-1)


# --- faults: what stands in the place of a patch --------------------------------------------------


def token_then_exchange(model: Model, _: Patch) -> None:
    """Patches exchanged last: another patch then wins over the token, or is one itself."""

    def tamper(x: Tensor, source: Tensor, replaced: Tensor, token: Tensor) -> Tensor:
        return take(torch.where(replaced.bool()[..., None], token, x), source)

    rewrite_mpp(model, tamper=tamper)


def source_of_the_next_image(model: Model, _: Patch) -> None:
    """Indices into the patches of the whole batch: other images' patches stand in for these."""

    def tamper(x: Tensor, source: Tensor, replaced: Tensor, token: Tensor) -> Tensor:
        others = torch.arange(x.shape[1]) != source
        moved = torch.where(others[..., None], take(x.roll(1, dims=0), source), x)
        return torch.where(replaced.bool()[..., None], token, moved)

    rewrite_mpp(model, tamper=tamper)


def patches_never_exchanged(model: Model, _: Patch) -> None:
    """The mask token alone, as in MAE and SimMIM: all that is not it can be trusted."""

    def tamper(x: Tensor, source: Tensor, replaced: Tensor, token: Tensor) -> Tensor:
        return exchange_then_replace(x, torch.arange(x.shape[1]).expand_as(source), replaced, token)

    rewrite_mpp(model, tamper=tamper)


def token_channel_first(model: Model, _: Patch) -> None:
    """The mask token as (channel, height, width), in an image of (height, width, channel)."""
    token = model.mask_token.data
    model.mask_token.data = token.unflatten(-1, (-1, 3)).mT.flatten(-2).contiguous()


# --- faults: head and labels ----------------------------------------------------------------------


def class_token_asked(model: Model, _: Patch) -> None:
    """Tokens from the first, with a class token among them: each tells its neighbour's colour."""
    rewrite_mpp(model, patches=lambda tokens: tokens[:, :-1])


def colours_of_what_is_seen(model: Model, _: Patch) -> None:
    """Labels of the image that was tampered with, where the original's are wanted: no clone."""
    rewrite_mpp(model, target=lambda _, seen: seen)


def colours_of_normalised_pixels(model: Model, _: Patch) -> None:
    """``mean`` and ``std`` not given for images that are normalised: half of them is bin 0."""
    model.config = model.config.replace(normalized_images=False)


def brightest_not_clamped(_: Model, patch: Patch) -> None:
    """Pixels brighter than the brightest counted in full, which lifts the mean of their patch."""
    patch.setattr(MPPConfig, "brightest", property(lambda config: np.full(3, np.inf)))


def channels_reversed(_: Model, patch: Patch) -> None:
    """The first channel worth most, as digits are written: colours of BGR for those of RGB."""

    def change(images: Tensor, config: MPPConfig) -> Tensor:
        bins = (mean_colours(images, config) * config.levels).floor()
        bins = bins.clamp(0, config.levels - 1)
        return labels_of(bins.flip(-1), config)

    rewrite_labels(patch, change)


def bins_rounded(_: Model, patch: Patch) -> None:
    """Nearest of the levels, as pixels are quantised, where a bin is what lies between edges."""

    def change(images: Tensor, config: MPPConfig) -> Tensor:
        bins = (mean_colours(images, config) * (config.levels - 1)).round()
        return labels_of(bins.clamp(0, config.levels - 1), config)

    rewrite_labels(patch, change)


# --- faults: loss ---------------------------------------------------------------------------------


def asked_of_all_patches(model: Model, _: Patch) -> None:
    """The mean over every patch, most of which show what is asked."""
    rewrite_mpp(model, mean=lambda errors, *_: errors.mean(dim=1))


def asked_of_tokens_alone(model: Model, _: Patch) -> None:
    """The mean where the mask token stands: masked patches that are others, or kept, count too."""
    rewrite_mpp(model, mean=lambda errors, _, replaced: where_asked(errors, replaced, replaced))


def errors_summed(model: Model, _: Patch) -> None:
    """The sum over the masked patches, as ``reduction="sum"`` has it."""
    rewrite_mpp(model, mean=lambda errors, masked, _: (errors * masked).sum(dim=1))


# --- harmless rewrites ----------------------------------------------------------------------------


def written_out(model: Model, _: Patch) -> None:
    """The scaffold of the faults with nothing exchanged."""
    rewrite_mpp(model)


def bins_by_floor(_: Model, patch: Patch) -> None:
    """Colours times levels, rounded down: another bin on the edges alone."""

    def change(images: Tensor, config: MPPConfig) -> Tensor:
        bins = (mean_colours(images, config) * config.levels).floor()
        return labels_of(bins.clamp(0, config.levels - 1), config)

    rewrite_labels(patch, change)


def entropy_of_the_framework(_: Model, patch: Patch) -> None:
    """torch's own cross-entropy."""

    def change(logits: Tensor, labels: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none")

    patch.setattr(mpp, "cross_entropy", change)


# --- faults that only a gradient shows ------------------------------------------------------------


def mask_token_detached(model: Model, _: Patch) -> None:
    """The token written into a clone of the image without a gradient."""

    def tamper(x: Tensor, source: Tensor, replaced: Tensor, token: Tensor) -> Tensor:
        return exchange_then_replace(x, source, replaced, token.detach())

    rewrite_mpp(model, tamper=tamper)


# --- tables ---------------------------------------------------------------------------------------

FAULTS = (
    Fault(norm_eps_of_flax, "mpp", "encoder.patch_embed.norm1"),
    Fault(gelu_tanh, "mpp_conv", "encoder.blocks.0.mlp.fc2"),
    Fault(token_then_exchange, "mpp", "encoder.patch_embed.norm1"),
    Fault(source_of_the_next_image, "mpp", "encoder.patch_embed.norm1"),
    Fault(patches_never_exchanged, "mpp", "encoder.patch_embed.norm1"),
    Fault(token_channel_first, "mpp", "encoder.patch_embed.norm1"),
    Fault(token_channel_first, "mpp_conv", "encoder.patch_embed.proj"),
    Fault(class_token_asked, "mpp", "to_bits"),
    Fault(colours_of_what_is_seen, "mpp"),
    Fault(colours_of_normalised_pixels, "mpp"),
    Fault(brightest_not_clamped, "mpp_bright"),
    Fault(channels_reversed, "mpp"),
    Fault(bins_rounded, "mpp"),
    Fault(asked_of_all_patches, "mpp"),
    Fault(asked_of_tokens_alone, "mpp"),
    Fault(errors_summed, "mpp"),
)


HARMLESS = (
    Fault(written_out, "mpp"),
    Fault(bins_by_floor, "mpp"),
    Fault(entropy_of_the_framework, "mpp_conv"),
)


GRADIENT_FAULTS = (
    GradientFault(mask_token_detached, "mpp", "mask_token", "encoder.patch_embed.proj.kernel"),
    GradientFault(loss_averaged, "mpp", "to_bits.bias", None),
)
