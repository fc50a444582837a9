"""Faults of ports of efficient ViT, planted into the PyTorch model."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isovit.backends.torch.families import efficient_vit
from isovit.backends.torch.families.efficient_vit import (
    LinearAttention,
    NystromAttention,
    PerformerAttention,
    pseudo_inverse,
)
from isovit.spec.families.efficient_vit import EfficientViTConfig
from parity_tests.controls.blocks import (
    attention_written_out,
    gelu_tanh,
    loss_averaged,
    norm_eps_of_flax,
    positions_off_by_one,
    scale_by_embed_dim,
    statistics_detached,
    two_pass_variance,
)
from parity_tests.controls.faults import Fault, GradientFault, Model, Patch, modules, rewrite

# 7 tokens in 3 landmarks of 3: two zeros are put first.
NYSTROM = EfficientViTConfig(
    image_size=(8, 12), patch_size=(4, 4), embed_dim=18, depth=2, num_heads=3, mlp_dim=30,
    mixer="nystrom", num_landmarks=3, residual_kernel=5, performer_features=7, norm_eps=1e-5,
    num_classes=5,
)  # fmt: skip

CASES: dict[str, Any] = {
    "nystrom": NYSTROM,
    "nystrom_batch": NYSTROM.replace(pinv_norm="batch", qkv_bias=False, final_norm="pooled"),
    "performer_of_heads": NYSTROM.replace(mixer="performer"),
    "linear_of_heads": NYSTROM.replace(mixer="linear", class_token=False, pool="mean"),
    "efficient_full": NYSTROM.replace(
        mixer="full", transformer_norm=True, pool="mean", final_norm="pooled"
    ),
}


# --- scaffolds: a rule of mixing with one exchangeable part ---------------------------------------


def rewrite_mix(model: Model, kind: type[nn.Module], mix: Callable[..., Tensor]) -> None:
    """Give all mixers of a kind another rule for (q, k, v)."""
    for module in modules(model, kind):
        module.mix = MethodType(mix, module)


def missing(attn: Any, tokens: int) -> int:
    """How many zeros so many tokens need."""
    return -tokens % attn.num_landmarks


def zeros_first(attn: Any, x: Tensor) -> Tensor:
    """The sound padding."""
    zeros = x.new_zeros(*x.shape[:2], missing(attn, x.shape[2]), x.shape[3])
    return torch.cat([zeros, x], dim=2)


def means_of_neighbours(attn: Any, x: Tensor) -> Tensor:
    """The sound landmarks, of padded tokens."""
    return torch.stack([part.mean(dim=2) for part in x.chunk(attn.num_landmarks, dim=2)], dim=2)


def over_keys(scores: Tensor) -> Tensor:
    """The sound softmax."""
    return scores.softmax(dim=-1)


def stepwise(attn: Any, a: Tensor) -> Tensor:
    """The sound pseudo-inverse."""
    return pseudo_inverse(a, attn.pinv_iterations, attn.pinv_norm)


def convolved(attn: Any, v: Tensor) -> Tensor:
    """The sound convolution, over the tokens."""
    return attn.residual_conv(v.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def second(_: Tensor, y: Tensor) -> Tensor:
    """The sound residual: of v and its convolution the latter."""
    return y


def rewrite_nystrom(
    model: Model,
    *,
    pad: Callable[[Any, Tensor], Tensor] = zeros_first,
    landmarks: Callable[[Any, Tensor], Tensor] = means_of_neighbours,
    to_landmarks: Callable[[Tensor], Tensor] = over_keys,
    from_landmarks: Callable[[Tensor], Tensor] = over_keys,
    inverse: Callable[[Any, Tensor], Tensor] = stepwise,
    residual: Callable[[Tensor, Tensor], Tensor | float] = second,
) -> None:
    """Give all Nyström attentions the package's order of products, with one part exchanged."""

    def mix(attn: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, tokens = q * attn.scale, q.shape[2]
        queries, keys, values = pad(attn, q), pad(attn, k), pad(attn, v)
        q_landmarks, k_landmarks = landmarks(attn, queries), landmarks(attn, keys)
        first = to_landmarks(queries @ k_landmarks.mT)
        middle = inverse(attn, over_keys(q_landmarks @ k_landmarks.mT))
        last = from_landmarks(q_landmarks @ keys.mT)
        y = (first @ middle) @ (last @ values)
        shown = slice(0, tokens) if pad is zeros_behind else slice(y.shape[2] - tokens, None)
        return y[:, :, shown] + residual(v, convolved(attn, v))

    rewrite_mix(model, NystromAttention, mix)


def exponent_of(attn: Any, x: Tensor) -> Tensor:
    """W x − ‖x‖² / 2."""
    return x @ attn.random_features.mT - x.square().sum(-1, keepdim=True) / 2


def rewrite_performers(
    model: Model,
    *,
    exponent: Callable[[Any, Tensor], Tensor] = exponent_of,
    q_share: float = 0.5,
    shift_keys: tuple[int, ...] = (-2, -1),
    added: float = 0.0,
) -> None:
    """Give all performers a matrix of weights, with one part exchanged."""

    def features(attn: Any, x: Tensor, together: tuple[int, ...]) -> Tensor:
        powers = exponent(attn, x)
        powers = torch.exp(powers - powers.detach().amax(dim=together, keepdim=True))
        return (powers + added) / math.sqrt(len(attn.random_features))

    def mix(attn: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = features(attn, q * attn.scale**q_share, (-1,))
        k = features(attn, k * attn.scale ** (1 - q_share), shift_keys)
        weights = torch.einsum("bhqf,bhkf->bhqk", q, k)
        return (weights / (weights.sum(-1, keepdim=True) + attn.eps)) @ v

    rewrite_mix(model, PerformerAttention, mix)


def rewrite_linear(
    model: Model,
    *,
    of_q: Callable[[Tensor], Tensor] = over_keys,
    of_k: Callable[[Tensor], Tensor] = lambda k: k.softmax(dim=-2),
    scaled: Callable[[Any], float] = lambda _: 1.0,
) -> None:
    """Give all linear attentions a matrix of weights, with one part exchanged."""

    def mix(attn: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled(attn) * torch.einsum("bhqd,bhkd->bhqk", of_q(q), of_k(k)) @ v

    rewrite_mix(model, LinearAttention, mix)


# --- faults: landmarks ----------------------------------------------------------------------------


def zeros_behind(attn: Any, x: Tensor) -> Tensor:
    """Padding at the other end."""
    return F.pad(x, (0, 0, 0, missing(attn, x.shape[2])))


def padded_behind(model: Model, _: Patch) -> None:
    """Zeros behind the tokens, as sequences are padded everywhere else."""
    rewrite_nystrom(model, pad=zeros_behind)


def padding_not_counted(model: Model, _: Patch) -> None:
    """A landmark as the mean of the tokens in it, without the zeros: with a mask, as in BERT."""

    def landmarks(attn: Any, x: Tensor) -> Tensor:
        tokens = torch.ones_like(x[:, :, model.config.padding :, :1])
        ones = zeros_first(attn, tokens)
        return means_of_neighbours(attn, x) / means_of_neighbours(attn, ones)

    rewrite_nystrom(model, landmarks=landmarks)


def padding_masked(model: Model, _: Patch) -> None:
    """Keys that are padding left out of the softmax: with a mask, too."""

    def masked(scores: Tensor) -> Tensor:
        seen = torch.arange(scores.shape[-1]) >= model.config.padding
        return torch.where(seen, scores, -math.inf).softmax(dim=-1)

    rewrite_nystrom(model, from_landmarks=masked)


def padding_projected(model: Model, _: Patch) -> None:
    """Zeros put before the projection, as in the package: with a bias they are zeros no more."""

    def forward(attn: Any, x: Tensor) -> Tensor:
        zeros = missing(attn, x.shape[1])
        x = F.pad(x, (0, 0, zeros, 0))
        q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q = q * attn.scale
        q_landmarks, k_landmarks = means_of_neighbours(attn, q), means_of_neighbours(attn, k)
        middle = stepwise(attn, over_keys(q_landmarks @ k_landmarks.mT))
        y = over_keys(q @ k_landmarks.mT) @ middle @ over_keys(q_landmarks @ k.mT) @ v
        y = (y + convolved(attn, v))[:, :, zeros:]
        return attn.proj(y.transpose(1, 2).flatten(2))

    rewrite(modules(model, NystromAttention), forward)


def landmarks_strided(model: Model, _: Patch) -> None:
    """Means of every third token, einops' "(l n)", for those of three neighbours."""
    rewrite_nystrom(
        model, landmarks=lambda attn, x: x.unflatten(2, (-1, attn.num_landmarks)).mean(dim=2)
    )


def landmarks_summed(model: Model, _: Patch) -> None:
    """Sums for means: the package sums first, and divides in another line."""
    rewrite_nystrom(
        model, landmarks=lambda attn, x: x.unflatten(2, (attn.num_landmarks, -1)).sum(dim=3)
    )


def softmax_over_queries(model: Model, _: Patch) -> None:
    """The first softmax over its queries, the columns."""
    rewrite_nystrom(model, to_landmarks=lambda scores: scores.softmax(dim=-2))


# --- faults: pseudo-inverse -----------------------------------------------------------------------


def norm_of_each_matrix(model: Model, _: Patch) -> None:
    """nystrom-attention's weights with a start for each matrix: transformers' ``init_option``."""
    for attn in modules(model, NystromAttention):
        attn.pinv_norm = "matrix"


def norm_of_the_batch(model: Model, _: Patch) -> None:
    """``torch.max(x)`` for ``torch.max(x, dim=-1)``: one image changes the logits of another."""
    for attn in modules(model, NystromAttention):
        attn.pinv_norm = "batch"


def inverse_by_decomposition(model: Model, _: Patch) -> None:
    """The pseudo-inverse itself, which six steps only come near."""
    rewrite_nystrom(model, inverse=lambda _, a: torch.linalg.pinv(a))


def one_step_less(model: Model, _: Patch) -> None:
    """A loop from 1."""
    for attn in modules(model, NystromAttention):
        attn.pinv_iterations -= 1


def steps_of_second_order(model: Model, _: Patch) -> None:
    """Z ← Z(2I − AZ), of Newton and Schulz: as right in the end, and slower."""

    def inverse(attn: Any, a: Tensor) -> Tensor:
        z, eye = (
            a.mT / a.sum(dim=-2, keepdim=True).amax(dim=-1, keepdim=True),
            torch.eye(len(a[0, 0])),
        )
        for _ in range(attn.pinv_iterations):
            z = z @ (2 * eye - a @ z)
        return z

    rewrite_nystrom(model, inverse=inverse)


def start_not_transposed(model: Model, _: Patch) -> None:
    """A / ‖A‖₁ for Aᵀ / ‖A‖₁: no shape protests."""

    def inverse(attn: Any, a: Tensor) -> Tensor:
        z, eye = a / a.sum(dim=-2, keepdim=True).amax(dim=-1, keepdim=True), torch.eye(len(a[0, 0]))
        for _ in range(attn.pinv_iterations):
            az = a @ z
            z = z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))) / 4
        return z

    rewrite_nystrom(model, inverse=inverse)


# --- faults: convolution of v ---------------------------------------------------------------------


def residual_left_out(model: Model, _: Patch) -> None:
    """The equation of the paper without its convolution; hand ports."""
    rewrite_nystrom(model, residual=lambda v, y: 0.0)


def residual_is_v(model: Model, _: Patch) -> None:
    """v itself for its convolution."""
    rewrite_nystrom(model, residual=lambda v, y: v)


def kernel_turned_round(model: Model, _: Patch) -> None:
    """A convolution in the sense of ``numpy.convolve``, where frameworks correlate."""
    for attn in modules(model, NystromAttention):
        attn.residual_conv.weight.data = attn.residual_conv.weight.data.flip(2)


def convolved_over_the_width(model: Model, _: Patch) -> None:
    """A kernel of (1, n) for (n, 1): over the numbers of a head and not over the tokens."""
    for attn in modules(model, NystromAttention):
        kernel = attn.residual_conv.weight
        attn.residual_conv.weight.data = kernel.data.mT.contiguous()
        attn.residual_conv.padding = attn.residual_conv.padding[::-1]


# --- faults: performer ----------------------------------------------------------------------------


def features_of_one_length(model: Model, _: Patch) -> None:
    """Rows of norm √m, as in T2T-ViT, for the lengths of normal vectors."""
    for attn in modules(model, PerformerAttention):
        rows = attn.random_features.data
        rows *= math.sqrt(len(rows)) / rows.norm(dim=1, keepdim=True)


def scale_on_queries_alone(model: Model, _: Patch) -> None:
    """The whole 1/√head_dim on q: the same in a softmax, but not in an estimate of one."""
    rewrite_performers(model, q_share=1.0)


def square_left_out(model: Model, _: Patch) -> None:
    """exp(W x): for q the rest cancels, for k it does not."""
    rewrite_performers(model, exponent=lambda attn, x: x @ attn.random_features.mT)


def keys_shifted_one_by_one(model: Model, _: Patch) -> None:
    """The largest exponent of each key, as of each query: keys then lose their weight."""
    rewrite_performers(model, shift_keys=(-1,))


def eps_in_features(model: Model, _: Patch) -> None:
    """1e-4 added to every feature, as in the authors' own code and in performer-pytorch."""
    rewrite_performers(model, added=1e-4)


def not_stabilized(model: Model, _: Patch) -> None:
    """No largest exponent taken off: all but the same, until something overflows."""
    for attn in modules(model, PerformerAttention):
        attn.stabilized = False


# --- faults: linear attention ---------------------------------------------------------------------


def softmaxes_exchanged(model: Model, _: Patch) -> None:
    """q over the tokens and k over its width."""
    rewrite_linear(model, of_q=lambda q: q.softmax(dim=-2), of_k=lambda k: k.softmax(dim=-1))


def output_scaled(model: Model, _: Patch) -> None:
    """1/√head_dim on the weights, as in the package linear-attention-transformer."""
    rewrite_linear(model, scaled=lambda attn: attn.scale)


def elu_for_softmax(model: Model, _: Patch) -> None:
    """elu(x) + 1 and a denominator: the linear attention of Katharopoulos et al. 2020."""

    def mix(attn: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (F.elu(q) + 1) @ (F.elu(k) + 1).mT
        return weights / weights.sum(-1, keepdim=True) @ v

    rewrite_mix(model, LinearAttention, mix)


# --- faults: transformer and head -----------------------------------------------------------------


def transformer_norm_missing(model: Model, _: Patch) -> None:
    """The head's norm taken for vit-pytorch's, which comes before the pooling."""
    model.transformer.norm = nn.Identity()


def norm_before_pooling(model: Model, _: Patch) -> None:
    """A head's norm over all tokens."""
    model.config = model.config.replace(final_norm="tokens")


# --- harmless rewrites ----------------------------------------------------------------------------


def nystrom_written_out(model: Model, _: Patch) -> None:
    """The scaffold of the faults, which multiplies in the package's order."""
    rewrite_nystrom(model)


def both_norms_of_the_softmax(model: Model, _: Patch) -> None:
    """The start divided by ‖A‖₁ ‖A‖∞, of which the second is 1; of the whole batch."""

    def inverse(attn: Any, a: Tensor) -> Tensor:
        z, eye = a.mT / (a.sum(dim=-2).max() * a.sum(dim=-1).max()), torch.eye(len(a[0, 0]))
        for _ in range(attn.pinv_iterations):
            az = a @ z
            z = 0.25 * z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az)))
        return z

    rewrite_nystrom(model, inverse=inverse)


def performers_written_out(model: Model, _: Patch) -> None:
    """The scaffold of the faults in performers: all weights at once."""
    rewrite_performers(model)


def linear_written_out(model: Model, _: Patch) -> None:
    """The scaffold of the faults in linear attention: all weights at once."""
    rewrite_linear(model)


# --- faults that only a gradient shows ------------------------------------------------------------


def inverse_fixed(model: Model, _: Patch) -> None:
    """A pseudo-inverse without a gradient: made under ``no_grad``, to save memory."""
    rewrite_nystrom(model, inverse=lambda attn, a: stepwise(attn, a).detach())


def start_fixed(_: Model, patch: Patch) -> None:
    """The largest sum as a constant: a gradient of the steps, and none of where they start."""

    def inverse(a: Tensor, iterations: int, norm: str) -> Tensor:
        whole = a.sum(dim=-2, keepdim=True)
        largest = whole.amax() if norm == "batch" else whole.amax(dim=-1, keepdim=True)
        z, eye = a.mT / largest.detach(), torch.eye(a.shape[-1])
        for _ in range(iterations):
            az = a @ z
            z = z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))) / 4
        return z

    patch.setattr(efficient_vit, "pseudo_inverse", inverse)


def features_fixed(model: Model, _: Patch) -> None:
    """φ(k) without a gradient."""
    rewrite_performers(model, exponent=lambda attn, x: exponent_of(attn, x).detach())


# --- tables ---------------------------------------------------------------------------------------

BLOCK = "transformer.blocks.0"
PROJ = f"{BLOCK}.attn.proj"

FAULTS = (
    Fault(padded_behind, "nystrom", PROJ),
    Fault(padding_not_counted, "nystrom", PROJ),
    Fault(padding_masked, "nystrom", PROJ),
    Fault(padding_projected, "nystrom", f"{BLOCK}.attn.qkv"),
    Fault(landmarks_strided, "nystrom", PROJ),
    Fault(landmarks_summed, "nystrom", PROJ),
    Fault(softmax_over_queries, "nystrom", PROJ),
    Fault(norm_of_each_matrix, "nystrom_batch", PROJ),
    Fault(norm_of_the_batch, "nystrom", PROJ),
    Fault(inverse_by_decomposition, "nystrom_batch", PROJ),
    Fault(one_step_less, "nystrom", PROJ),
    Fault(steps_of_second_order, "nystrom", PROJ),
    Fault(start_not_transposed, "nystrom", PROJ),
    Fault(residual_left_out, "nystrom", PROJ),
    Fault(residual_is_v, "nystrom", PROJ),
    Fault(kernel_turned_round, "nystrom", f"{BLOCK}.attn.residual_conv"),
    Fault(convolved_over_the_width, "nystrom", f"{BLOCK}.attn.residual_conv"),
    Fault(features_of_one_length, "performer_of_heads", PROJ),
    Fault(scale_on_queries_alone, "performer_of_heads", PROJ),
    Fault(square_left_out, "performer_of_heads", PROJ),
    Fault(keys_shifted_one_by_one, "performer_of_heads", PROJ),
    Fault(eps_in_features, "performer_of_heads", PROJ),
    Fault(not_stabilized, "performer_of_heads", PROJ),
    Fault(softmaxes_exchanged, "linear_of_heads", PROJ),
    Fault(output_scaled, "linear_of_heads", PROJ),
    Fault(elu_for_softmax, "linear_of_heads", PROJ),
    Fault(transformer_norm_missing, "efficient_full", "transformer.norm"),
    Fault(norm_before_pooling, "efficient_full", "norm"),
    Fault(scale_by_embed_dim, "efficient_full", PROJ),
    Fault(gelu_tanh, "nystrom_batch", f"{BLOCK}.mlp.fc2"),
    Fault(norm_eps_of_flax, "nystrom_batch", "patch_embed.norm1"),
    Fault(positions_off_by_one, "efficient_full", f"{BLOCK}.norm1"),
)


HARMLESS = (
    Fault(nystrom_written_out, "nystrom"),
    Fault(nystrom_written_out, "nystrom_batch"),
    Fault(both_norms_of_the_softmax, "nystrom_batch"),
    Fault(performers_written_out, "performer_of_heads"),
    Fault(linear_written_out, "linear_of_heads"),
    Fault(attention_written_out, "efficient_full"),
    Fault(two_pass_variance, "nystrom"),
)


GRADIENT_FAULTS = (
    GradientFault(inverse_fixed, "nystrom", f"{BLOCK}.attn.qkv.kernel", "norm.scale"),
    GradientFault(start_fixed, "nystrom_batch", f"{BLOCK}.attn.qkv.kernel", "norm.scale"),
    GradientFault(features_fixed, "performer_of_heads", f"{BLOCK}.attn.qkv.kernel", "norm.scale"),
    GradientFault(statistics_detached, "efficient_full", f"{BLOCK}.mlp.fc2.kernel", "norm.scale"),
    GradientFault(loss_averaged, "linear_of_heads", "images", None),
)
