"""Faults of ports of T2T-ViT.

Numbers of the flax port in docstrings are rows of the list of how conceptofmind's ``t2t.py``
departs from vit-pytorch's; "hand port" marks a slip of the pen that belongs to no one framework.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import MethodType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isovit.backends.torch.families import t2t_vit
from isovit.spec.families.t2t_vit import YITU, SoftSplit, T2TViTConfig
from isovit.spec.initialize import init
from parity_tests.controls.blocks import (
    attention_written_out,
    final_norm_missing,
    gelu_by_erf,
    gelu_tanh,
    loss_averaged,
    norm_eps_of_flax,
    norm_in_float32,
    norm_without_bias,
    positions_off_by_one,
    scale_by_embed_dim,
    softmax_over_keys,
    two_pass_variance,
)
from parity_tests.controls.faults import Fault, GradientFault, Model, Patch, modules, rewrite

T2T = T2TViTConfig(
    image_size=(20, 28), embed_dim=18, depth=2, num_heads=3, mlp_dim=30, num_classes=5,
    token_dim=10, token_mlp_dim=14, performer_features=6, **YITU,
)  # fmt: skip

TWO_SPLITS = (SoftSplit(3, 2, 1), SoftSplit(3, 2, 1))

CASES: dict[str, Any] = {
    "performer": T2T,
    "performer_square": T2T.replace(image_size=(20, 20)),
    # The first patch, 2 channels of 3 x 3, is as wide as a token: x fits where v belongs.
    "performer_thin": T2T.replace(in_channels=2, t2t_layers=TWO_SPLITS, token_dim=18),
    "transformer": T2T.replace(token_mixer="transformer"),
    "full": T2T.replace(token_mixer="full", t2t_layers=TWO_SPLITS, pos_embed="learned"),
}


# --- scaffolds: a forward with one exchangeable part ----------------------------------------------


def rewrite_performer(model: Model, residual: Callable[[Tensor, Tensor], Tensor | float]) -> None:
    """Give all performers a residual of (x, v) in place of v."""

    def forward(mixer: Any, x: Tensor) -> Tensor:
        k, q, v = mixer.kqv(mixer.norm1(x)).chunk(3, dim=-1)
        y = residual(x, v) + mixer.proj(mixer.attention(q, k, v))
        return y + mixer.mlp(mixer.norm2(y))

    rewrite(modules(model, t2t_vit.TokenPerformer), forward)


def rewrite_token_attention(
    model: Model, residual: Callable[[Tensor, Tensor], Tensor | float]
) -> None:
    """Give all transformer mixers a residual of (x, v) in place of v."""

    def forward(attn: Any, x: Tensor) -> Tensor:
        q, k, v = attn.qkv(x).chunk(3, dim=-1)
        return residual(x, v) + attn.proj(softmax_over_keys(q @ k.mT * attn.scale) @ v)

    rewrite(modules(model, t2t_vit.TokenAttention), forward)


def exponential_features(
    model: Model,
    *,
    square: float = 0.5,
    inputs: float = 1.0,
    added: float = 0.0,
    divide: bool = True,
) -> None:
    """Give all performers φ(x) = (exp(W(ax) - s‖ax‖²) + e) / √m with a, s, e to choose."""

    def feature_map(mixer: Any, x: Tensor) -> Tensor:
        x, w = x * inputs, mixer.random_features
        features = torch.exp(x @ w.mT - square * x.square().sum(-1, keepdim=True)) + added
        return features / math.sqrt(len(w)) if divide else features

    for mixer in modules(model, t2t_vit.TokenPerformer):
        mixer.feature_map = MethodType(feature_map, mixer)


def unfold_by_slices(x: Tensor, split: SoftSplit, pad: Callable[[Tensor], Tensor]) -> Tensor:
    """Patches of padded images, (batch, rows, columns, kernel, kernel, channels), by indexing."""
    x = pad(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    x = x.unfold(1, split.kernel, split.stride).unfold(2, split.kernel, split.stride)
    return x.permute(0, 1, 2, 4, 5, 3)


def zeros_around(split: SoftSplit) -> Callable[[Tensor], Tensor]:
    """The sound padding: equally many zeros on all sides."""
    return lambda x: F.pad(x, 4 * (split.padding,))


def tokens_by_channel(patches: Tensor) -> Tensor:
    """The sound flattening: (channel, height, width)."""
    return patches.flatten(1, 2).permute(0, 1, 4, 2, 3).flatten(2)


def rewrite_last_split(model: Model, patches: Callable[[Tensor, SoftSplit], Tensor]) -> None:
    """Give the last soft split patches that are written out, (batch, tokens, patch)."""

    def forward(project: Any, x: Tensor) -> Tensor:
        return F.linear(patches(x, project.split), project.weight, project.bias)

    rewrite(modules(model, t2t_vit.SplitProjection), forward)


# --- faults: norms --------------------------------------------------------------------------------


def mixer_norm_missing(model: Model, _: Patch) -> None:
    """No LayerNorm at the end of a full-width token mixer; the flax port, row 6."""
    for mixer in modules(model, t2t_vit.FullMixer):
        mixer.norm = nn.Identity()


# --- faults: tokens, positions, pooling -----------------------------------------------------------


def sinusoid_in_halves(model: Model, _: Patch) -> None:
    """All sines, then all cosines, as in MAE's table; T2T-ViT's alternate."""
    table = model.pos_embed.data
    model.pos_embed.data = torch.cat([table[..., 0::2], table[..., 1::2]], dim=-1)


def sinusoid_in_float32(model: Model, _: Patch) -> None:
    """Table computed in float32, JAX's default, in place of float64 and one rounding."""
    _, tokens, dim = model.pos_embed.shape
    column = np.arange(dim)
    wavelength = np.power(np.float32(10000), (2 * (column // 2) / dim).astype(np.float32))
    angle = np.arange(tokens, dtype=np.float32)[:, None] / wavelength
    table = np.where(column % 2 == 0, np.sin(angle), np.cos(angle))
    assert table.dtype == np.float32
    model.pos_embed.data = torch.from_numpy(table)[None].to(torch.float64)


# --- faults: soft split of T2T-ViT ----------------------------------------------------------------


def patches_same(x: Tensor, split: SoftSplit) -> Tensor:
    """Padding "SAME" puts the odd pixel behind: windows a pixel off."""

    def pad(x: Tensor) -> Tensor:
        rows, columns = (
            (math.ceil(n / split.stride) - 1) * split.stride + split.kernel - n for n in x.shape[2:]
        )
        return F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))

    return tokens_by_channel(unfold_by_slices(x, split, pad))


def patches_channel_last(x: Tensor, split: SoftSplit) -> Tensor:
    """Flattened as (kh, kw, c), as TensorFlow and Keras extract patches."""
    return unfold_by_slices(x, split, zeros_around(split)).flatten(1, 2).flatten(2)


def soft_split_same(_: Model, patch: Patch) -> None:
    """Padding "SAME"; the flax port, row 1."""
    patch.setattr(t2t_vit, "soft_split", patches_same)


def soft_split_channel_last(_: Model, patch: Patch) -> None:
    """Patches with their channels last; the flax port, row 2."""
    patch.setattr(t2t_vit, "soft_split", patches_channel_last)


def last_split_same(model: Model, _: Patch) -> None:
    """Padding "SAME" in the last soft split alone, as a convolution of Flax or Keras has it."""
    rewrite_last_split(model, patches_same)


def last_split_channel_last(model: Model, _: Patch) -> None:
    """The kernels of the last soft split read as (height, width, channel), as those of Flax lie."""
    rewrite_last_split(model, patches_channel_last)


def soft_split_edges_repeated(_: Model, patch: Patch) -> None:
    """Edges repeated, ``jnp.pad(mode="edge")``, where Unfold puts zeros; hand ports."""

    def soft_split(x: Tensor, split: SoftSplit) -> Tensor:
        pad = 4 * (split.padding,)
        return tokens_by_channel(
            unfold_by_slices(x, split, lambda x: F.pad(x, pad, mode="replicate"))
        )

    patch.setattr(t2t_vit, "soft_split", soft_split)


def grid_transposed(model: Model, _: Patch) -> None:
    """Tokens put back as (columns, rows): shapes protest unless the image is square."""

    def forward(stem: Any, images: Tensor) -> Tensor:
        x = images
        for stage, mixer in zip(stem.stages, stem.mixers, strict=False):
            x = mixer(t2t_vit.soft_split(x, stage.split))
            x = x.unflatten(1, stage.grid[::-1]).transpose(1, 2)
        return stem.project(x)

    rewrite([model.tokens_to_token], forward)


# --- faults: token mixers of T2T-ViT --------------------------------------------------------------


def kqv_read_as_qkv(model: Model, _: Patch) -> None:
    """The performer's product holds k, q, v; every other attention of T2T-ViT holds q, k, v."""

    def swapped(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda q, k, v: attention(k, q, v)

    for mixer in modules(model, t2t_vit.TokenPerformer):
        mixer.attention = swapped(mixer.attention)


def mixer_scale_by_head(model: Model, _: Patch) -> None:
    """1/√token_dim, what attention has everywhere else; T2T-ViT divides by √ of the input width."""
    for attn in modules(model, t2t_vit.TokenAttention):
        attn.scale = model.config.token_dim**-0.5


def mixer_residual_missing(model: Model, _: Patch) -> None:
    """No residual where the width falls, as no x fits; the official code adds v."""
    rewrite_performer(model, residual=lambda x, v: 0.0)
    rewrite_token_attention(model, residual=lambda x, v: 0.0)


def mixer_residual_projected(model: Model, _: Patch) -> None:
    """A shortcut of x brought to the width, as residual networks have it, in place of v."""

    def shortcut(x: Tensor, v: Tensor) -> Tensor:
        return F.adaptive_avg_pool1d(x, v.shape[-1])

    rewrite_performer(model, shortcut)
    rewrite_token_attention(model, shortcut)


def mixer_residual_from_input(model: Model, _: Patch) -> None:
    """x in place of v, the residual of every other block; shapes let it pass in a thin stem."""
    rewrite_performer(model, residual=lambda x, v: x)


def performer_eps_dropped(model: Model, _: Patch) -> None:
    """Nothing added to the denominator, 1e-8 in the official code; hand ports."""
    for mixer in modules(model, t2t_vit.TokenPerformer):
        mixer.eps = 0.0


def performer_eps_in_features(model: Model, patch: Patch) -> None:
    """Epsilon added to every feature: Google's code and performer-pytorch (there 1e-4)."""
    exponential_features(model, added=1e-8)
    performer_eps_dropped(model, patch)


def performer_square_missing(model: Model, _: Patch) -> None:
    """exp(Wx) without -‖x‖²/2. In q it would cancel but for epsilon; in k it weighs the tokens."""
    exponential_features(model, square=0.0)


def performer_square_not_halved(model: Model, _: Patch) -> None:
    """exp(Wx - ‖x‖²): the half forgotten; hand ports."""
    exponential_features(model, square=1.0)


def performer_inputs_scaled(model: Model, _: Patch) -> None:
    """q and k times dim^-1/4, as in Google's code and performer-pytorch; T2T-ViT does not."""
    exponential_features(model, inputs=model.config.token_dim**-0.25)


def performer_root_missing(model: Model, _: Patch) -> None:
    """φ without 1/√m.

    It cancels between numerator and denominator, but for epsilon, which it makes m times smaller
    beside them. So it is as small as an error of epsilon and still shows in float64. With epsilon
    times m it is the same function: ``performer_root_moved`` in ``HARMLESS``.
    """
    exponential_features(model, divide=False)


def random_features_redrawn(model: Model, _: Patch) -> None:
    """Orthogonal rows drawn afresh, as performer-pytorch does: they belong to the weights."""
    for path, array in init(model.config, seed=1).items():
        if path.endswith("random_features"):
            model.get_parameter(path).data = torch.from_numpy(array).to(torch.float64)


# --- harmless rewrites ----------------------------------------------------------------------------


def soft_split_by_slices(model: Model, patch: Patch) -> None:
    """The scaffolds of the faults in the soft splits, with nothing exchanged."""

    def soft_split(x: Tensor, split: SoftSplit) -> Tensor:
        return tokens_by_channel(unfold_by_slices(x, split, zeros_around(split)))

    patch.setattr(t2t_vit, "soft_split", soft_split)
    rewrite_last_split(model, soft_split)


def mixers_written_out(model: Model, _: Patch) -> None:
    """The scaffolds of the faults in the token mixers, with nothing exchanged."""
    exponential_features(model)
    rewrite_performer(model, residual=lambda x, v: v)
    rewrite_token_attention(model, residual=lambda x, v: v)


def performer_root_moved(model: Model, patch: Patch) -> None:
    """φ without 1/√m and epsilon times m: numerator and denominator m times as large."""
    performer_root_missing(model, patch)
    for mixer in modules(model, t2t_vit.TokenPerformer):
        mixer.eps = mixer.eps * len(mixer.random_features)


def random_features_reordered(model: Model, _: Patch) -> None:
    """The random features in another order: they are only ever summed over."""
    for mixer in modules(model, t2t_vit.TokenPerformer):
        mixer.random_features.data = mixer.random_features.data.flip(0)


# --- faults that only a gradient shows ------------------------------------------------------------


def residual_detached(model: Model, _: Patch) -> None:
    """``stop_gradient`` on the residual v, left from an experiment or from a target network."""
    rewrite_performer(model, residual=lambda x, v: v.detach())
    rewrite_token_attention(model, residual=lambda x, v: v.detach())


def denominator_detached(model: Model, _: Patch) -> None:
    """The performer's denominator taken as a constant, as some linear attentions do."""

    def attention(mixer: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = mixer.feature_map(q), mixer.feature_map(k)
        denominator = (q @ k.sum(dim=1, keepdim=True).mT).detach()
        return q @ (k.mT @ v) / (denominator + mixer.eps)

    for mixer in modules(model, t2t_vit.TokenPerformer):
        mixer.attention = MethodType(attention, mixer)


STEM = "tokens_to_token."
BEHIND = STEM + "mixers.1.norm2.scale"

# --- tables ---------------------------------------------------------------------------------------


FAULTS = (
    Fault(norm_eps_of_flax, "performer", STEM + "mixers.0.norm1"),
    Fault(norm_eps_of_flax, "transformer", STEM + "mixers.0.norm1"),
    Fault(norm_in_float32, "performer", STEM + "mixers.0.norm1"),
    Fault(norm_without_bias, "full", STEM + "mixers.0.block.norm1"),
    Fault(final_norm_missing, "performer", "norm"),
    Fault(mixer_norm_missing, "full", STEM + "mixers.0.norm"),
    Fault(gelu_tanh, "performer", STEM + "mixers.0.mlp.fc2"),
    Fault(scale_by_embed_dim, "performer", "blocks.0.attn.proj"),
    Fault(positions_off_by_one, "performer", "blocks.0.norm1"),
    Fault(sinusoid_in_halves, "performer", "blocks.0.norm1"),
    Fault(sinusoid_in_float32, "performer", "blocks.0.norm1"),
    Fault(soft_split_same, "performer", STEM + "mixers.0.norm1"),
    Fault(soft_split_channel_last, "performer", STEM + "mixers.0.norm1"),
    Fault(soft_split_edges_repeated, "performer", STEM + "mixers.0.norm1"),
    Fault(last_split_same, "performer", STEM + "project"),
    Fault(last_split_channel_last, "performer", STEM + "project"),
    Fault(grid_transposed, "performer_square", STEM + "mixers.1.norm1"),
    Fault(kqv_read_as_qkv, "performer", STEM + "mixers.0.proj"),
    Fault(mixer_scale_by_head, "transformer", STEM + "mixers.0.attn.proj"),
    Fault(mixer_residual_missing, "performer", STEM + "mixers.0.norm2"),
    Fault(mixer_residual_missing, "transformer", STEM + "mixers.0.attn"),
    Fault(mixer_residual_projected, "performer", STEM + "mixers.0.norm2"),
    Fault(mixer_residual_projected, "transformer", STEM + "mixers.0.attn"),
    Fault(mixer_residual_from_input, "performer_thin", STEM + "mixers.0.norm2"),
    Fault(performer_eps_dropped, "performer", STEM + "mixers.0.proj"),
    Fault(performer_eps_in_features, "performer", STEM + "mixers.0.proj"),
    Fault(performer_square_missing, "performer", STEM + "mixers.0.proj"),
    Fault(performer_square_not_halved, "performer", STEM + "mixers.0.proj"),
    Fault(performer_inputs_scaled, "performer", STEM + "mixers.0.proj"),
    Fault(performer_root_missing, "performer", STEM + "mixers.0.proj"),
    Fault(random_features_redrawn, "performer", STEM + "mixers.0.proj"),
)


HARMLESS = (
    Fault(attention_written_out, "performer"),
    Fault(gelu_by_erf, "performer"),
    Fault(two_pass_variance, "performer"),
    Fault(soft_split_by_slices, "performer"),
    Fault(mixers_written_out, "performer"),
    Fault(mixers_written_out, "performer_thin"),
    Fault(mixers_written_out, "transformer"),
    Fault(performer_root_moved, "performer"),
    Fault(random_features_reordered, "performer"),
)


GRADIENT_FAULTS = (
    GradientFault(residual_detached, "performer", STEM + "mixers.1.kqv.kernel", BEHIND),
    GradientFault(residual_detached, "transformer", STEM + "mixers.1.attn.qkv.kernel", BEHIND),
    GradientFault(denominator_detached, "performer", STEM + "mixers.1.kqv.kernel", BEHIND),
    GradientFault(loss_averaged, "performer", "images", None),
)
