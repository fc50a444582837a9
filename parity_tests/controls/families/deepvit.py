"""Faults of ports of DeepViT, planted into the PyTorch model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from isovit.backends.torch.families import deepvit
from isovit.backends.torch.layers import BatchNorm
from isovit.spec.families.deepvit import DeepViTConfig
from parity_tests.controls.blocks import gelu_tanh, norm_eps_of_flax
from parity_tests.controls.faults import Fault, GradientFault, Model, Patch, modules, rewrite

DEEPVIT = DeepViTConfig(
    image_size=(8, 12), patch_size=(4, 4), embed_dim=18, depth=2, num_heads=3, mlp_dim=30,
    num_classes=5,
)  # fmt: skip

CASES: dict[str, Any] = {
    "deepvit": DEEPVIT,
    "deepvit_convs": DEEPVIT.replace(
        patch_embed="convs", stem_dim=7, re_attention_depth=1, re_attention_scale=6**-0.5,
        branch_scale=0.5,
    ),
    # As many heads as tokens: a norm over the wrong one of the two fits.
    "deepvit_pytorch": DEEPVIT.replace(
        patch_embed="norm_linear_norm", num_heads=7, head_dim=5, qkv_bias=False, norm_eps=1e-5,
        re_attention_bias=False, re_attention_norm="layer_norm", final_norm="pooled",
    ),
}  # fmt: skip


# Scaffolds: a forward with one exchangeable part


def softmax_and_mix(attn: Any, scores: Tensor) -> Tensor:
    """The sound mixture, of (batch, queries, keys, heads) scores: softmax over the keys first."""
    return attn.mix(scores.softmax(dim=2))


def norm_over_heads(attn: Any, mixture: Tensor) -> Tensor:
    """The sound norm of a mixture."""
    return attn.mix_norm(mixture)


def rewrite_re_attention(
    model: Model,
    *,
    mix: Callable[[Any, Tensor], Tensor] = softmax_and_mix,
    normalise: Callable[[Any, Tensor], Tensor] = norm_over_heads,
) -> None:
    """Give all re-attention modules a forward, by einsum, with one part exchanged."""

    def forward(attn: Any, x: Tensor) -> Tensor:
        q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).unbind(2)
        scores = torch.einsum("bqhd,bkhd->bqkh", q, k) * attn.scale
        weights = normalise(attn, mix(attn, scores)) * attn.mixed_scale
        return attn.proj(torch.einsum("bqkh,bkhd->bqhd", weights, v).flatten(2))

    rewrite(modules(model, deepvit.ReAttention), forward)


def times(x: Tensor, scale: float) -> Tensor:
    """The sound input of a norm."""
    return x * scale


def over(y: Tensor, scale: float) -> Tensor:
    """The sound output of a branch."""
    return y / scale


def rewrite_block(
    model: Model,
    *,
    before: Callable[[Tensor, float], Tensor] = times,
    behind: Callable[[Tensor, float], Tensor] = over,
) -> None:
    """Give all blocks other tokens before the norms, or other outputs of the branches."""

    def forward(block: Any, x: Tensor) -> Tensor:
        scale = block.branch_scale
        x = x + behind(block.attn(block.norm1(before(x, scale))), scale)
        return x + behind(block.mlp(block.norm2(before(x, scale))), scale)

    rewrite(modules(model, deepvit.Block), forward)


# Faults


def mixture_transposed(model: Model, _: Patch) -> None:
    """vit-pytorch's matrix is (from, to), a convolution's (to, from), and both are square."""
    for attn in modules(model, deepvit.ReAttention):
        attn.mix.weight.data = attn.mix.weight.data.T.contiguous()


def mixture_bias_dropped(model: Model, _: Patch) -> None:
    """Official weights in a port of vit-pytorch's, whose mixture, like the paper's, has no bias."""
    for attn in modules(model, deepvit.ReAttention):
        attn.mix.bias = None


def mixture_before_softmax(model: Model, _: Patch) -> None:
    """Logits mixed in place of weights: talking heads, arXiv:2003.02436, mix on either side."""
    rewrite_re_attention(model, mix=lambda attn, scores: attn.mix(scores).softmax(dim=2))


def mixture_missing(model: Model, _: Patch) -> None:
    """The norm on each head's own weights; hand port."""
    rewrite_re_attention(  # 0: for the trace
        model, mix=lambda attn, scores: scores.softmax(dim=2) + 0 * softmax_and_mix(attn, scores)
    )


def norm_missing(model: Model, _: Patch) -> None:
    """Nothing behind the mixture, as in talking heads, arXiv:2003.02436."""
    rewrite_re_attention(  # 0: for the trace
        model, normalise=lambda attn, x: x + 0 * norm_over_heads(attn, x)
    )


def norm_over_keys(model: Model, _: Patch) -> None:
    """LayerNorm over the last axis of (batch, heads, queries, keys), without the two transposes."""
    rewrite_re_attention(model, normalise=lambda attn, x: norm_over_heads(attn, x.mT).mT)


def mixed_scale_missing(model: Model, _: Patch) -> None:
    """The official ``transform_scale``, which S alone sets, left at its default."""
    for attn in modules(model, deepvit.ReAttention):
        attn.mixed_scale = 1.0


def branches_not_divided(model: Model, _: Patch) -> None:
    """Outputs of the branches not divided by ``scale_adjustment``."""
    rewrite_block(model, behind=lambda y, scale: y)


def tokens_not_scaled(model: Model, _: Patch) -> None:
    """Tokens not multiplied by ``scale_adjustment``, which LayerNorm undoes but for epsilon."""
    rewrite_block(model, before=lambda x, scale: x)


def batch_statistics(model: Model, _: Patch) -> None:
    """BatchNorm left in training: an image's weights depend on the other images."""

    def forward(norm: Any, x: Tensor) -> Tensor:
        y = F.batch_norm(
            x.flatten(0, -2), None, None, norm.weight, norm.bias, training=True, eps=norm.eps
        )
        return y.view_as(x)

    rewrite(modules(model, BatchNorm), forward)


def batch_norm_eps_of_keras(model: Model, _: Patch) -> None:
    """The default of ``keras.layers.BatchNormalization``, 1e-3, for 1e-5."""
    for norm in modules(model, BatchNorm):
        norm.eps = 1e-3


def stem_padded_same(model: Model, _: Patch) -> None:
    """``padding="SAME"`` on an even image: two zeros before it and three behind, for 3 and 3."""
    conv = model.patch_embed.conv1
    padded = (0, 0, 2, 3, 2, 3)

    def forward(conv: Any, x: Tensor) -> Tensor:
        y = F.conv2d(F.pad(x, padded).permute(0, 3, 1, 2), conv.weight, stride=conv.stride)
        return y.permute(0, 2, 3, 1)

    rewrite([conv], forward)


def stem_with_one_relu(model: Model, _: Patch) -> None:
    """ReLU behind the first convolution alone; hand port."""

    def forward(stem: Any, images: Tensor) -> Tensor:
        x = F.relu(stem.bn1(stem.conv1(images)))
        return stem.proj(stem.bn2(stem.conv2(x))).flatten(1, 2)

    rewrite([model.patch_embed], forward)


ATTN = "blocks.0.attn"

FAULTS = (
    Fault(mixture_transposed, "deepvit", f"{ATTN}.mix"),
    Fault(mixture_transposed, "deepvit_pytorch", f"{ATTN}.mix"),
    Fault(mixture_bias_dropped, "deepvit", f"{ATTN}.mix"),
    Fault(mixture_before_softmax, "deepvit", f"{ATTN}.mix"),
    Fault(mixture_missing, "deepvit", f"{ATTN}.mix_norm"),
    Fault(norm_missing, "deepvit", f"{ATTN}.proj"),
    Fault(norm_over_keys, "deepvit_pytorch", f"{ATTN}.mix_norm"),
    Fault(mixed_scale_missing, "deepvit_convs", "blocks.1.attn.proj"),
    Fault(branches_not_divided, "deepvit_convs", "blocks.0.norm2"),
    Fault(tokens_not_scaled, "deepvit_convs", "blocks.0.norm1"),
    Fault(batch_statistics, "deepvit", f"{ATTN}.mix_norm"),
    Fault(batch_statistics, "deepvit_convs", "patch_embed.bn1"),
    Fault(batch_norm_eps_of_keras, "deepvit", f"{ATTN}.mix_norm"),
    Fault(batch_norm_eps_of_keras, "deepvit_convs", "patch_embed.bn1"),
    Fault(stem_padded_same, "deepvit_convs", "patch_embed.conv1"),
    Fault(stem_with_one_relu, "deepvit_convs", "patch_embed.proj"),
    # Both are in conceptofmind's DeepViT-flax (commit a380bb4), a port of vit-pytorch's.
    Fault(norm_eps_of_flax, "deepvit_pytorch", "patch_embed.norm1"),
    Fault(gelu_tanh, "deepvit_pytorch", "blocks.0.mlp.fc2"),
)


# Harmless


def re_attention_written_out(model: Model, _: Patch) -> None:
    """The scaffold of the faults in re-attention, with nothing exchanged."""
    rewrite_re_attention(model)


def mixture_by_convolution(model: Model, _: Patch) -> None:
    """The mixture as the official code has it: a convolution of one pixel over (queries, keys)."""

    def forward(mix: Any, x: Tensor) -> Tensor:
        kernel = mix.weight[:, :, None, None]
        return F.conv2d(x.permute(0, 3, 1, 2), kernel, mix.bias).permute(0, 2, 3, 1)

    rewrite([attn.mix for attn in modules(model, deepvit.ReAttention)], forward)


def batch_norm_as_affine(model: Model, _: Patch) -> None:
    """BatchNorm at evaluation is a factor and a summand, as runtimes fold it."""

    def forward(norm: Any, x: Tensor) -> Tensor:
        factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        return x * factor + (norm.bias - norm.running_mean * factor)

    rewrite(modules(model, BatchNorm), forward)


def branch_written_out(model: Model, _: Patch) -> None:
    """The scaffold of the faults in blocks, with nothing exchanged."""
    rewrite_block(model)


def branch_scale_in_epsilon(model: Model, patch: Patch) -> None:
    """Tokens not multiplied, and epsilon over the square: what the factor does to LayerNorm."""
    tokens_not_scaled(model, patch)
    for block in modules(model, deepvit.Block):
        for norm in (block.norm1, block.norm2):
            norm.eps /= block.branch_scale**2


HARMLESS = (
    Fault(re_attention_written_out, "deepvit"),
    Fault(re_attention_written_out, "deepvit_pytorch"),
    Fault(mixture_by_convolution, "deepvit"),
    Fault(batch_norm_as_affine, "deepvit"),
    Fault(batch_norm_as_affine, "deepvit_convs"),
    Fault(branch_written_out, "deepvit_convs"),
    Fault(branch_scale_in_epsilon, "deepvit_convs"),
)


# Faults that only a gradient shows


def weights_detached(model: Model, _: Patch) -> None:
    """A detach meant for a picture of the attention maps, on what is mixed."""
    rewrite_re_attention(model, mix=lambda attn, scores: attn.mix(scores.softmax(dim=2).detach()))


def norm_statistics_detached(model: Model, _: Patch) -> None:
    """Mean and variance over the heads as constants, as those of a BatchNorm at evaluation are."""

    def forward(norm: Any, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
        normed = (x - mean.detach()) / torch.sqrt(variance.detach() + norm.eps)
        return normed * norm.weight + norm.bias

    rewrite([attn.mix_norm for attn in modules(model, deepvit.ReAttention)], forward)


LAST = "blocks.1.attn"

GRADIENT_FAULTS = (
    # fault, model, a gradient that is wrong, one that is right
    GradientFault(weights_detached, "deepvit", f"{LAST}.qkv.kernel", f"{LAST}.mix.kernel"),
    GradientFault(
        norm_statistics_detached, "deepvit_pytorch", f"{LAST}.mix.kernel", f"{LAST}.mix_norm.scale"
    ),
)
