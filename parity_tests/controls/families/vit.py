"""Faults of ports of ViT and DeiT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isovit.backends.torch.families import vit
from isovit.spec.families.vit import ViTConfig
from parity_tests.controls.blocks import (
    attention_written_out,
    class_token_fixed,
    dropout_left_on,
    fast_variance,
    final_norm_after_pooling,
    final_norm_missing,
    gelu_by_erf,
    gelu_tanh,
    heads_merged_inside_out,
    heads_not_merged,
    layer_scale_skipped,
    loss_averaged,
    norm_eps_of_flax,
    norm_eps_of_keras,
    norm_eps_of_torch,
    norm_eps_of_transformers,
    norm_in_float32,
    positions_off_by_one,
    q_and_k_swapped,
    q_and_v_swapped,
    qkv_bias_dropped,
    qkv_split_by_head,
    quick_gelu,
    residual_from_norm,
    scale_missing,
    scale_on_queries,
    scale_twice,
    softmax_in_float32,
    softmax_over_queries,
    softmax_written_out,
    square_kernel_untransposed,
    statistics_detached,
    two_pass_variance,
    unbiased_variance,
    weights_through_bfloat16,
)
from parity_tests.controls.faults import Fault, GradientFault, Model, Patch, rewrite

VIT = ViTConfig(
    image_size=(8, 12), patch_size=(4, 4), embed_dim=18, depth=2, num_heads=3, mlp_dim=30,
    num_classes=5,
)  # fmt: skip

CASES: dict[str, Any] = {
    "vit": VIT,
    "vit_offset": VIT,  # with tokens far from zero, see ``weights``
    "vit_mean": VIT.replace(pool="mean"),
    "vit_mean_patches": VIT.replace(pool="mean_patches"),
    "vit_distilled": VIT.replace(dist_token=True, dist_head=True),
    "vit_distilled_mean": VIT.replace(dist_token=True, pool="mean_patches"),
    "vit_pre_logits": VIT.replace(pre_logits_dim=18),  # as wide as a token, as Google's are
    "vit_layer_scale": VIT.replace(layer_scale_init=0.1),
    "vit_dropout": VIT.replace(dropout_rate=0.1),
    "vit_pytorch": VIT.replace(
        patch_embed="norm_linear_norm", qkv_bias=False, norm_eps=1e-5, head_dim=5
    ),
}


# --- scaffolds: a forward with one exchangeable part ----------------------------------------------


def class_token_first(cls: Tensor, dist: Tensor, patches: Tensor) -> list[Tensor]:
    """The sound order of the tokens."""
    return [cls, dist, patches]


def mean_of_heads(model: Any, x: Tensor) -> Tensor:
    """The sound logits of normalised tokens."""
    return (model.head(x[:, 0]) + model.head_dist(x[:, 1])) / 2


def rewrite_distilled(
    model: Model,
    *,
    order: Callable[[Tensor, Tensor, Tensor], list[Tensor]] = class_token_first,
    logits: Callable[[Any, Tensor], Tensor] = mean_of_heads,
) -> None:
    """Give a distilled ViT a forward with one part exchanged."""

    def forward(model: Any, images: Tensor) -> Tensor:
        x = model.patch_embed(images)
        cls, dist = (t.expand(len(x), -1, -1) for t in (model.cls_token, model.dist_token))
        x = torch.cat(order(cls, dist, x), dim=1) + model.pos_embed
        for block in model.blocks:
            x = block(x)
        return logits(model, model.norm(x))

    rewrite([model], forward)


def rewrite_pre_logits(model: Model, features: Callable[[Any, Tensor], Tensor]) -> None:
    """Give a ViT other features of (model, class token) behind the final norm."""

    def forward(model: Any, images: Tensor) -> Tensor:
        x = model.encode(model.embed(images))[:, 0]
        return model.head(features(model, x))

    rewrite([model], forward)


# --- faults: weights ------------------------------------------------------------------------------


def conv_kernel_reversed(model: Model, _: Patch) -> None:
    """``kernel.T`` of (h, w, in, out) is (out, in, w, h): height and width are exchanged."""
    model.patch_embed.proj.weight.data = model.patch_embed.proj.weight.data.mT.contiguous()


# --- faults: tokens, positions, pooling -----------------------------------------------------------


def patches_channel_first(model: Model, _: Patch) -> None:
    """Patches flattened as (c, kh, kw) for (kh, kw, c): JAX's patches in vit-pytorch's stem."""

    def reorder(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0].unflatten(-1, (-1, model.config.in_channels)).mT.flatten(-2),)

    model.patch_embed.norm1.register_forward_pre_hook(reorder)


def patches_column_major(model: Model, _: Patch) -> None:
    """The grid flattened column by column: sizes as (width, height), as Pillow gives them."""

    def forward(embed: Any, images: Tensor) -> Tensor:
        return embed.proj(images).transpose(1, 2).flatten(1, 2)

    rewrite([model.patch_embed], forward)


def class_token_last(model: Model, _: Patch) -> None:
    """Token appended and read at the end, as vit-pytorch does with the distillation token."""

    def forward(vit: Any, images: Tensor) -> Tensor:
        x = vit.patch_embed(images)
        x = torch.cat([x, vit.cls_token.expand(x.shape[0], -1, -1)], dim=1) + vit.pos_embed
        for block in vit.blocks:
            x = block(x)
        return vit.head(vit.norm(x)[:, -1])

    rewrite([model], forward)


def class_token_without_position(model: Model, _: Patch) -> None:
    """Positions added before the class token is put in front, as in big_vision."""
    model.pos_embed.data[:, 0] = 0


def mean_over_class_token(model: Model, _: Patch) -> None:
    """vit-pytorch's mean took in the class token before 1.16; timm's ``avg`` leaves it out."""
    model.config = model.config.replace(pool="mean")


def mean_over_dist_token(_: Model, patch: Patch) -> None:
    """The mean over x[:, 1:], "all but the class token", takes in a second token; hand ports."""
    patch.setattr(vit, "pool", lambda x, _: x[:, 1:].mean(dim=1))


def dist_token_first(model: Model, _: Patch) -> None:
    """Put before all others, as was the class token before it; DeiT's stands second."""
    rewrite_distilled(model, order=lambda cls, dist, x: [dist, cls, x])


def dist_token_last(model: Model, _: Patch) -> None:
    """Appended and read at the end, as in vit-pytorch's ``DistillWrapper``."""
    rewrite_distilled(
        model,
        order=lambda cls, dist, x: [cls, x, dist],
        logits=lambda model, x: (model.head(x[:, 0]) + model.head_dist(x[:, -1])) / 2,
    )


def heads_summed(model: Model, _: Patch) -> None:
    """Sum for the mean: the classes keep their order, probabilities and losses do not."""
    rewrite_distilled(model, logits=lambda model, x: 2 * mean_of_heads(model, x))


def heads_swapped(model: Model, _: Patch) -> None:
    """Each head on the other token: both have one shape; hand ports."""
    rewrite_distilled(model, logits=lambda model, x: mean_of_heads(model, x[:, [1, 0]]))


def class_head_only(model: Model, _: Patch) -> None:
    """``head_dist`` ignored, as by Hugging Face's ``DeiTForImageClassification``."""
    rewrite_distilled(
        model,  # the other head runs for the trace alone
        logits=lambda model, x: model.head(x[:, 0]) + 0 * model.head_dist(x[:, 1]),
    )


def dist_head_on_class_token(model: Model, _: Patch) -> None:
    """Both heads on the pooled vector, as ensembles of heads have it; hand ports."""
    rewrite_distilled(model, logits=lambda model, x: mean_of_heads(model, x[:, [0, 0]]))


def tanh_missing(model: Model, _: Patch) -> None:
    """``pre_logits`` as two products with nothing between; tanh has no weights to miss it by."""
    rewrite_pre_logits(model, lambda model, x: model.pre_logits(x))


def pre_logits_skipped(model: Model, _: Patch) -> None:
    """The head on the class token itself, in a model without such a layer, as timm's; it fits."""
    rewrite_pre_logits(model, lambda model, x: x + 0 * model.pre_logits(x))  # 0: for the trace


# --- harmless rewrites ----------------------------------------------------------------------------


def convolution_as_product(model: Model, _: Patch) -> None:
    """The patch embedding as a product with flattened patches."""

    def forward(conv: Any, x: Tensor) -> Tensor:
        rows = x.shape[1] // conv.kernel_size[0]
        patches = F.unfold(x.permute(0, 3, 1, 2), conv.kernel_size, stride=conv.stride)
        y = patches.mT @ conv.weight.flatten(1).T + conv.bias
        return y.unflatten(1, (rows, -1))

    rewrite([model.patch_embed.proj], forward)


def distilled_written_out(model: Model, _: Patch) -> None:
    """The scaffold of the faults in a distilled ViT, with nothing exchanged."""
    rewrite_distilled(model)


def pre_logits_written_out(model: Model, _: Patch) -> None:
    """The scaffold of the faults in ``pre_logits``, with tanh by exponentials."""
    rewrite_pre_logits(model, lambda model, x: 1 - 2 / (torch.exp(2 * model.pre_logits(x)) + 1))


# --- faults that only a gradient shows ------------------------------------------------------------


def dist_token_detached(model: Model, _: Patch) -> None:
    """A detach meant for the teacher's logits, set on the student's distillation token."""

    def logits(model: Any, x: Tensor) -> Tensor:
        return (model.head(x[:, 0]) + model.head_dist(x[:, 1].detach())) / 2

    rewrite_distilled(model, logits=logits)


# --- tables ---------------------------------------------------------------------------------------


FAULTS = (
    Fault(norm_eps_of_torch, "vit", "blocks.0.norm1"),
    Fault(norm_eps_of_flax, "vit_pytorch", "patch_embed.norm1"),
    Fault(norm_eps_of_transformers, "vit", "blocks.0.norm1"),
    Fault(norm_eps_of_keras, "vit", "blocks.0.norm1"),
    Fault(norm_in_float32, "vit", "blocks.0.norm1"),
    Fault(fast_variance, "vit_offset", "blocks.0.norm1"),
    Fault(unbiased_variance, "vit", "blocks.0.norm1"),
    Fault(final_norm_missing, "vit", "norm"),
    Fault(final_norm_after_pooling, "vit_mean", "norm"),
    Fault(gelu_tanh, "vit", "blocks.0.mlp.fc2"),
    Fault(quick_gelu, "vit", "blocks.0.mlp.fc2"),
    Fault(layer_scale_skipped, "vit_layer_scale", "blocks.0.layer_scale1"),
    Fault(residual_from_norm, "vit", "blocks.0.norm2"),
    Fault(dropout_left_on, "vit_dropout", "blocks.0.attn"),
    Fault(q_and_v_swapped, "vit", "blocks.0.attn.proj"),
    Fault(q_and_k_swapped, "vit", "blocks.0.attn.qkv"),
    Fault(qkv_split_by_head, "vit", "blocks.0.attn.proj"),
    Fault(heads_merged_inside_out, "vit", "blocks.0.attn.proj"),
    Fault(heads_not_merged, "vit", "blocks.0.attn.proj"),
    Fault(softmax_in_float32, "vit", "blocks.0.attn.proj"),
    Fault(softmax_over_queries, "vit", "blocks.0.attn.proj"),
    Fault(scale_missing, "vit", "blocks.0.attn.proj"),
    Fault(scale_twice, "vit", "blocks.0.attn.proj"),
    Fault(qkv_bias_dropped, "vit", "blocks.0.attn.qkv"),
    Fault(square_kernel_untransposed, "vit", "blocks.0.attn.proj"),
    Fault(conv_kernel_reversed, "vit", "patch_embed.proj"),
    Fault(weights_through_bfloat16, "vit", "patch_embed.proj"),
    Fault(patches_channel_first, "vit_pytorch", "patch_embed.norm1"),
    Fault(patches_column_major, "vit", "patch_embed"),
    Fault(class_token_last, "vit", "blocks.0.norm1"),
    Fault(positions_off_by_one, "vit", "blocks.0.norm1"),
    Fault(class_token_without_position, "vit", "blocks.0.norm1"),
    Fault(mean_over_class_token, "vit_mean_patches", "head"),
    Fault(mean_over_dist_token, "vit_distilled_mean", "head"),
    Fault(dist_token_first, "vit_distilled", "blocks.0.norm1"),
    Fault(dist_token_last, "vit_distilled", "blocks.0.norm1"),
    Fault(heads_summed, "vit_distilled"),
    Fault(heads_swapped, "vit_distilled", "head"),
    Fault(class_head_only, "vit_distilled"),
    Fault(dist_head_on_class_token, "vit_distilled", "head_dist"),
    Fault(tanh_missing, "vit_pre_logits", "head"),
    Fault(pre_logits_skipped, "vit_pre_logits", "head"),
)


HARMLESS = (
    Fault(attention_written_out, "vit"),
    Fault(scale_on_queries, "vit"),
    Fault(softmax_written_out, "vit"),
    Fault(gelu_by_erf, "vit"),
    Fault(two_pass_variance, "vit"),
    Fault(two_pass_variance, "vit_offset"),
    Fault(fast_variance, "vit"),
    Fault(convolution_as_product, "vit"),
    Fault(distilled_written_out, "vit_distilled"),
    Fault(pre_logits_written_out, "vit_pre_logits"),
)


GRADIENT_FAULTS = (
    GradientFault(statistics_detached, "vit", "blocks.1.mlp.fc2.kernel", "norm.scale"),
    GradientFault(class_token_fixed, "vit", "cls_token", "pos_embed"),
    GradientFault(dist_token_detached, "vit_distilled", "norm.scale", "head_dist.kernel"),
    GradientFault(loss_averaged, "vit", "head.bias", None),
)
