"""Faults of what families share: norms, attention, MLP, weights; and rewrites that are none.

Of attention, they are planted into every ``Attention`` of the backbone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isovit.backends.torch.layers import ACTIVATIONS, Attention, Block, Mlp
from parity_tests.controls.faults import Model, Patch, modules, rewrite

# --- scaffolds: a forward with one exchangeable part ----------------------------------------------


def split_by_kind(attn: Any, qkv: Tensor) -> tuple[Tensor, ...]:
    """The sound split: first q, k, v, then the heads; each (batch, heads, tokens, head_dim)."""
    return qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def softmax_over_keys(logits: Tensor) -> Tensor:
    """The sound softmax."""
    return torch.softmax(logits, dim=-1)


def merge_by_head(x: Tensor) -> Tensor:
    """The sound merge of (batch, heads, tokens, head_dim): a head's numbers stay together."""
    return x.transpose(1, 2).flatten(2)


def rewrite_attention(
    model: Model,
    *,
    split: Callable[[Any, Tensor], tuple[Tensor, ...]] = split_by_kind,
    softmax: Callable[[Tensor], Tensor] = softmax_over_keys,
    merge: Callable[[Tensor], Tensor] = merge_by_head,
) -> None:
    """Give all attention modules of the backbone a forward with one part exchanged."""

    def forward(attn: Any, x: Tensor) -> Tensor:
        q, k, v = split(attn, attn.qkv(x))
        return attn.proj(merge(softmax(q @ k.mT * attn.scale) @ v))

    rewrite(modules(model, Attention), forward)


def rewrite_layer_norm(model: Model, variance: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Give all LayerNorms a variance of (x, mean)."""

    def forward(norm: Any, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        normed = (x - mean) / torch.sqrt(variance(x, mean) + norm.eps)
        return normed * norm.weight + norm.bias

    rewrite(modules(model, nn.LayerNorm), forward)


# --- faults: norms --------------------------------------------------------------------------------


def norm_eps_of_torch(model: Model, _: Patch) -> None:
    """ViT weights of JAX or timm (1e-6) with the default of ``torch.nn.LayerNorm``, 1e-5."""
    for norm in modules(model, nn.LayerNorm):
        norm.eps = 1e-5


def norm_eps_of_flax(model: Model, _: Patch) -> None:
    """T2T-ViT (1e-5) with the default of ``flax.nnx.LayerNorm``, 1e-6; also timm's for ViT."""
    for norm in modules(model, nn.LayerNorm):
        norm.eps = 1e-6


def norm_eps_of_transformers(model: Model, _: Patch) -> None:
    """Hugging Face's ``ViTConfig``: ``layer_norm_eps`` is 1e-12, whatever the weights had."""
    for norm in modules(model, nn.LayerNorm):
        norm.eps = 1e-12


def norm_eps_of_keras(model: Model, _: Patch) -> None:
    """The default of ``keras.layers.LayerNormalization``, 1e-3."""
    for norm in modules(model, nn.LayerNorm):
        norm.eps = 1e-3


def norm_in_float32(model: Model, _: Patch) -> None:
    """LayerNorm that casts to float32, as many bfloat16 recipes do; it must not in float64."""

    def forward(norm: Any, x: Tensor) -> Tensor:
        scale, bias = norm.weight.float(), norm.bias.float()
        return F.layer_norm(x.float(), norm.normalized_shape, scale, bias, norm.eps).to(x.dtype)

    rewrite(modules(model, nn.LayerNorm), forward)


def fast_variance(model: Model, _: Patch) -> None:
    """E[x²] - E[x]², the default of Flax's LayerNorm (``use_fast_variance=True``).

    The same function, but ill conditioned: the error is rounding times (mean / std)². For tokens
    about zero that is nothing, and the row in ``HARMLESS`` says so. At a mean of 500 it shows in
    float64, at a mean of 30 in float32: ``test_fast_variance_in_float32``.
    """
    rewrite_layer_norm(model, lambda x, mean: x.square().mean(-1, keepdim=True) - mean.square())


def unbiased_variance(model: Model, _: Patch) -> None:
    """``x.var()`` or ``x.std()``, which in PyTorch divide by n - 1; hand ports of LayerNorm."""
    rewrite_layer_norm(model, lambda x, _: x.var(-1, keepdim=True))


def norm_without_bias(model: Model, _: Patch) -> None:
    """LayerNorm with a scale only; the flax port, row 4."""
    for norm in modules(model, nn.LayerNorm):
        nn.init.zeros_(norm.bias)


def final_norm_missing(model: Model, _: Patch) -> None:
    """No LayerNorm behind the blocks; the flax port, row 6."""
    model.norm = nn.Identity()


def final_norm_after_pooling(model: Model, _: Patch) -> None:
    """Norm of the mean in place of the mean of norms: timm's ``fc_norm``; the flax port, row 7."""
    model.config = model.config.replace(final_norm="pooled")


# --- faults: MLP, LayerScale, residuals, dropout --------------------------------------------------


def gelu_tanh(model: Model, _: Patch) -> None:
    """``jax.nn.gelu`` and ``keras.ops.gelu`` approximate by default; the flax port, row 5."""
    for mlp in modules(model, Mlp):
        mlp.activation = ACTIVATIONS["gelu_tanh"]


def quick_gelu(model: Model, _: Patch) -> None:
    """x·sigmoid(1.702 x), of OpenAI's CLIP and of HF's CvT, taken for GELU."""
    for mlp in modules(model, Mlp):
        mlp.activation = lambda x: x * torch.sigmoid(1.702 * x)


def layer_scale_skipped(model: Model, _: Patch) -> None:
    """Checkpoint with LayerScale (``gamma``) read with strict=False into a model without it."""
    for block in modules(model, Block):
        block.layer_scale1, block.layer_scale2 = nn.Identity(), nn.Identity()


def residual_from_norm(model: Model, _: Patch) -> None:
    """norm(x) + attn(norm(x)): Megatron's ``apply_residual_connection_post_layernorm``."""

    def forward(block: Any, x: Tensor) -> Tensor:
        x = block.norm1(x)
        x = x + block.attn(x)
        x = block.norm2(x)
        return x + block.mlp(x)

    rewrite(modules(model, Block), forward)


def dropout_left_on(model: Model, _: Patch) -> None:
    """Dropout at evaluation, hard-wired as in the flax port's ``deterministic=False``, row 9."""
    torch.manual_seed(0)

    def forward(dropout: nn.Dropout, x: Tensor) -> Tensor:
        return F.dropout(x, dropout.p, training=True)

    rewrite(modules(model, nn.Dropout), forward)


# --- faults: attention ----------------------------------------------------------------------------


def q_and_v_swapped(model: Model, _: Patch) -> None:
    """The product read as v, k, q; Keras calls attention with (query, value, key)."""
    rewrite_attention(model, split=lambda attn, qkv: split_by_kind(attn, qkv)[::-1])


def q_and_k_swapped(model: Model, _: Patch) -> None:
    """Weights fused in the order k, q, v, which is T2T-ViT's in the performer, not in blocks."""
    for attn in modules(model, Attention):
        for parameter in attn.qkv.parameters():
            q, k, v = parameter.data.chunk(3)
            parameter.data = torch.cat([k, q, v])


def qkv_split_by_head(model: Model, _: Patch) -> None:
    """Columns read as (heads, 3, head_dim), the order of GPT-NeoX and BLOOM, for (3, heads, …)."""

    def split(attn: Any, qkv: Tensor) -> tuple[Tensor, ...]:
        return qkv.unflatten(-1, (attn.num_heads, 3, -1)).permute(3, 0, 2, 1, 4).unbind(0)

    rewrite_attention(model, split=split)


def heads_merged_inside_out(model: Model, _: Patch) -> None:
    """Output flattened as (head_dim, heads): einops' "(d h)"; Flax's (H, hd, D) kernel misread."""
    rewrite_attention(model, merge=lambda x: x.permute(0, 2, 3, 1).flatten(2))


def heads_not_merged(model: Model, _: Patch) -> None:
    """(batch, heads, tokens, head_dim) reshaped without the transpose; hand ports."""
    rewrite_attention(model, merge=lambda x: x.reshape(x.shape[0], x.shape[2], -1))


def softmax_in_float32(model: Model, _: Patch) -> None:
    """``jax.nn.dot_product_attention`` casts the logits to float32, in float64 too."""
    rewrite_attention(model, softmax=lambda x: softmax_over_keys(x.to(torch.float32)).to(x.dtype))


def softmax_over_queries(model: Model, _: Patch) -> None:
    """Softmax over the other axis, as square and as positive as the right one; hand ports."""
    rewrite_attention(model, softmax=lambda logits: torch.softmax(logits, dim=-2))


def scale_missing(model: Model, _: Patch) -> None:
    """No 1/√head_dim: the default of ``keras.layers.Attention``, ``use_scale=False``."""
    for attn in modules(model, Attention):
        attn.scale = 1.0


def scale_twice(model: Model, _: Patch) -> None:
    """Queries scaled by hand and given to an attention that scales them itself."""
    for attn in modules(model, Attention):
        attn.scale = attn.scale**2


def scale_by_embed_dim(model: Model, _: Patch) -> None:
    """embed_dim^-0.5: what T2T-ViT's factories set with ``pretrained=True``; not the weights'."""
    for attn in modules(model, Attention):
        attn.scale = model.config.embed_dim**-0.5


def qkv_bias_dropped(model: Model, _: Patch) -> None:
    """timm's weights in a model whose ``qkv_bias`` is False, as in T2T-ViT and vit-pytorch."""
    for attn in modules(model, Attention):
        attn.qkv.bias = None


# --- faults: weights ------------------------------------------------------------------------------


def square_kernel_untransposed(model: Model, _: Patch) -> None:
    """A Flax or Keras (in, out) kernel copied as it is: no shape protests where in = out."""
    for attn in modules(model, Attention):
        attn.proj.weight.data = attn.proj.weight.data.T.contiguous()


def weights_through_bfloat16(model: Model, _: Patch) -> None:
    """Weights from a file in half precision, as big_vision has some, taken for the originals."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).to(torch.float64)


# --- faults: tokens, positions, pooling -----------------------------------------------------------


def positions_off_by_one(model: Model, _: Patch) -> None:
    """The table starts at the patches and the class token gets what is left over; hand ports."""
    model.pos_embed.data = model.pos_embed.data.roll(1, dims=1)


# --- harmless rewrites ----------------------------------------------------------------------------


def attention_written_out(model: Model, _: Patch) -> None:
    """The scaffold of the faults in attention, with nothing exchanged."""
    rewrite_attention(model)


def scale_on_queries(model: Model, _: Patch) -> None:
    """The scale on q before the product, as in vit_jax and T2T-ViT's mixers."""

    def split(attn: Any, qkv: Tensor) -> tuple[Tensor, ...]:
        q, k, v = split_by_kind(attn, qkv)
        return q * attn.head_scale, k, v

    for attn in modules(model, Attention):
        attn.head_scale, attn.scale = attn.scale, 1.0
    rewrite_attention(model, split=split)


def softmax_written_out(model: Model, _: Patch) -> None:
    """Exponentials over their sum, without the largest logit taken off first."""
    rewrite_attention(
        model, softmax=lambda logits: logits.exp() / logits.exp().sum(-1, keepdim=True)
    )


def gelu_by_erf(model: Model, _: Patch) -> None:
    """x/2 · (1 + erf(x/√2)), the definition."""
    for mlp in modules(model, Mlp):
        mlp.activation = lambda x: x / 2 * (1 + torch.erf(x / math.sqrt(2)))


def two_pass_variance(model: Model, _: Patch) -> None:
    """The scaffold of the faults in LayerNorm, with E[(x - mean)²]."""
    rewrite_layer_norm(model, lambda x, mean: (x - mean).square().mean(-1, keepdim=True))


# --- faults that only a gradient shows ------------------------------------------------------------


def statistics_detached(model: Model, _: Patch) -> None:
    """LayerNorm whose mean and variance are constants, as those of a BatchNorm at evaluation."""

    def forward(norm: Any, x: Tensor) -> Tensor:
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
        normed = (x - mean.detach()) / torch.sqrt(variance.detach() + norm.eps)
        return normed * norm.weight + norm.bias

    rewrite(modules(model, nn.LayerNorm), forward)


def class_token_fixed(model: Model, _: Patch) -> None:
    """A class token that gets no gradient: a buffer or ``nnx.Variable`` in place of a parameter."""
    model.cls_token.register_hook(torch.zeros_like)


def loss_averaged(model: Model, _: Patch) -> None:
    """Mean over the batch for the sum: the default of most losses; gradients a batch too small."""

    def scale(_: nn.Module, args: object, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient / len(gradient))

    model.register_forward_hook(scale)
