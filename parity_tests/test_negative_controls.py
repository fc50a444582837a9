"""Negative controls: faults that ports really have, planted one at a time, must be caught.

A parity check that passes proves nothing unless it can fail. Here a sound PyTorch model and a copy
with one planted fault go through the harness's own comparison. Of every fault is asked:

* the output keeps its shape and stays finite, so that nothing but the measure can tell;
* the error of the output is beyond the limit;
* the trace names the module that a reader would want to look at first, or none where all modules
  are right and only what the model makes of them is wrong.

Against crying wolf, ``HARMLESS`` holds rewrites that are the same mathematics with other rounding,
among them the scaffolds into which faults are planted: all of them must pass.

Numbers of the flax port in docstrings are rows of the list of how conceptofmind's ``t2t.py``
departs from vit-pytorch's; "hand port" marks a slip of the pen that belongs to no one framework.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the faults are planted into the PyTorch models")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isovit.backends.torch import runtime
from isovit.backends.torch.families import t2t_vit, vit
from isovit.backends.torch.layers import ACTIVATIONS, Attention, Block, Mlp
from isovit.errors import InputError
from isovit.parity import worker
from isovit.parity.budgets import LIMITS
from isovit.parity.compare import error
from isovit.parity.harness import BackendError, _compare
from isovit.parity.job import Job, Settings, draw_inputs
from isovit.parity.report import ParityReport
from isovit.spec.families.t2t_vit import YITU, SoftSplit, T2TViTConfig
from isovit.spec.families.vit import ViTConfig
from isovit.spec.initialize import init, probe
from parity_tests.controls.faults import (
    Fault,
    GradientFault,
    Model,
    Patch,
    Plant,
    modules,
    rewrite,
)

Results = Mapping[str, np.ndarray]

PAIR = ("sound", "other")
MIN_FAULTS = 24

VIT = ViTConfig(
    image_size=(8, 12), patch_size=(4, 4), embed_dim=18, depth=2, num_heads=3, mlp_dim=30,
    num_classes=5,
)  # fmt: skip
T2T = T2TViTConfig(
    image_size=(20, 28), embed_dim=18, depth=2, num_heads=3, mlp_dim=30, num_classes=5,
    token_dim=10, token_mlp_dim=14, performer_features=6, **YITU,
)  # fmt: skip
TWO_SPLITS = (SoftSplit(3, 2, 1), SoftSplit(3, 2, 1))

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
    "performer": T2T,
    "performer_square": T2T.replace(image_size=(20, 20)),
    # The first patch, 2 channels of 3 x 3, is as wide as a token: x fits where v belongs.
    "performer_thin": T2T.replace(in_channels=2, t2t_layers=TWO_SPLITS, token_dim=18),
    "transformer": T2T.replace(token_mixer="transformer"),
    "full": T2T.replace(token_mixer="full", t2t_layers=TWO_SPLITS, pos_embed="learned"),
}


@cache
def weights(case: str) -> dict[str, np.ndarray]:
    """Probe weights: ordinary ones, but for the case that moves all tokens to a mean of 500."""
    drawn = probe(CASES[case], seed=0)
    return drawn | {"pos_embed": drawn["pos_embed"] + 500} if case == "vit_offset" else drawn


def build(case: str) -> Model:
    """A sound model."""
    return runtime.build(CASES[case], weights(case), dtype="float64")


def run(model: Model, *, gradients: bool = False) -> dict[str, np.ndarray]:
    """The arrays that a backend's process hands to the harness."""
    images, cotangent = draw_inputs(model.config, batch=2, seed=0)
    activations = runtime.trace(model, images)
    results = {"output": activations.pop("")}
    results |= {f"activation/{path}": array for path, array in activations.items()}
    if gradients:
        grads = runtime.gradients(model, images, cotangent)
        results["gradient/images"] = grads.images
        results |= {f"gradient/{path}": array for path, array in grads.weights.items()}
    return results


@cache
def run_sound(case: str, gradients: bool = False) -> dict[str, np.ndarray]:
    """The arrays of a sound model."""
    return run(build(case), gradients=gradients)


def with_fault(case: str, plant: Plant, *, gradients: bool = False) -> dict[str, np.ndarray]:
    """The arrays of a model with a fault; the fault is gone on return."""
    model = build(case)
    with pytest.MonkeyPatch.context() as patch:
        plant(model, patch)
        return run(model, gradients=gradients)


def report(case: str, sound: Results, other: Results) -> ParityReport:
    """What the harness says of two sets of arrays."""
    results = {"sound": dict(sound), "other": dict(other)}
    return ParityReport(
        config=CASES[case],
        backends=PAIR,
        dtype="float64",
        limits=LIMITS["float64"],
        differences=tuple(_compare(results)),
        seconds={},
    )


# --- scaffolds: a forward with one exchangeable part ---------------------------------------------


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
        x = model.norm(model.forward_tokens(images))[:, 0]
        return model.head(features(model, x))

    rewrite([model], forward)


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


# --- faults: norms -------------------------------------------------------------------------------


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


def mixer_norm_missing(model: Model, _: Patch) -> None:
    """No LayerNorm at the end of a full-width token mixer; the flax port, row 6."""
    for mixer in modules(model, t2t_vit.FullMixer):
        mixer.norm = nn.Identity()


# --- faults: MLP, LayerScale, residuals, dropout -------------------------------------------------


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


# --- faults: attention ---------------------------------------------------------------------------


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


# --- faults: weights -----------------------------------------------------------------------------


def square_kernel_untransposed(model: Model, _: Patch) -> None:
    """A Flax or Keras (in, out) kernel copied as it is: no shape protests where in = out."""
    for attn in modules(model, Attention):
        attn.proj.weight.data = attn.proj.weight.data.T.contiguous()


def conv_kernel_reversed(model: Model, _: Patch) -> None:
    """``kernel.T`` of (h, w, in, out) is (out, in, w, h): height and width are exchanged."""
    model.patch_embed.proj.weight.data = model.patch_embed.proj.weight.data.mT.contiguous()


def weights_through_bfloat16(model: Model, _: Patch) -> None:
    """Weights from a file in half precision, as big_vision has some, taken for the originals."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).to(torch.float64)


# --- faults: tokens, positions, pooling ----------------------------------------------------------


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


def positions_off_by_one(model: Model, _: Patch) -> None:
    """The table starts at the patches and the class token gets what is left over; hand ports."""
    model.pos_embed.data = model.pos_embed.data.roll(1, dims=1)


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


# --- faults: soft split of T2T-ViT ---------------------------------------------------------------


def soft_split_same(_: Model, patch: Patch) -> None:
    """Padding "SAME" puts the odd pixel behind: windows a pixel off; the flax port, row 1."""

    def same(split: SoftSplit) -> Callable[[Tensor], Tensor]:
        def pad(x: Tensor) -> Tensor:
            rows, columns = (
                (math.ceil(n / split.stride) - 1) * split.stride + split.kernel - n
                for n in x.shape[2:]
            )
            return F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))

        return pad

    patch.setattr(
        t2t_vit, "soft_split", lambda x, s: tokens_by_channel(unfold_by_slices(x, s, same(s)))
    )


def soft_split_channel_last(_: Model, patch: Patch) -> None:
    """Flattened as (kh, kw, c), as TensorFlow and Keras extract patches; the flax port, row 2."""

    def soft_split(x: Tensor, split: SoftSplit) -> Tensor:
        return unfold_by_slices(x, split, zeros_around(split)).flatten(1, 2).flatten(2)

    patch.setattr(t2t_vit, "soft_split", soft_split)


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
        return stem.project(t2t_vit.soft_split(x, stem.stages[-1].split))

    rewrite([model.tokens_to_token], forward)


# --- faults: token mixers of T2T-ViT -------------------------------------------------------------


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


STEM = "tokens_to_token."

FAULTS = (
    # fault, model, first module that is wrong
    Fault(norm_eps_of_torch, "vit", "blocks.0.norm1"),
    Fault(norm_eps_of_flax, "performer", STEM + "mixers.0.norm1"),
    Fault(norm_eps_of_flax, "transformer", STEM + "mixers.0.norm1"),
    Fault(norm_eps_of_flax, "vit_pytorch", "patch_embed.norm1"),
    Fault(norm_eps_of_transformers, "vit", "blocks.0.norm1"),
    Fault(norm_eps_of_keras, "vit", "blocks.0.norm1"),
    Fault(norm_in_float32, "vit", "blocks.0.norm1"),
    Fault(norm_in_float32, "performer", STEM + "mixers.0.norm1"),
    Fault(fast_variance, "vit_offset", "blocks.0.norm1"),
    Fault(unbiased_variance, "vit", "blocks.0.norm1"),
    Fault(norm_without_bias, "full", STEM + "mixers.0.block.norm1"),
    Fault(final_norm_missing, "vit", "norm"),
    Fault(final_norm_missing, "performer", "norm"),
    Fault(final_norm_after_pooling, "vit_mean", "norm"),
    Fault(mixer_norm_missing, "full", STEM + "mixers.0.norm"),
    Fault(gelu_tanh, "vit", "blocks.0.mlp.fc2"),
    Fault(gelu_tanh, "performer", STEM + "mixers.0.mlp.fc2"),
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
    Fault(scale_by_embed_dim, "performer", "blocks.0.attn.proj"),
    Fault(qkv_bias_dropped, "vit", "blocks.0.attn.qkv"),
    Fault(square_kernel_untransposed, "vit", "blocks.0.attn.proj"),
    Fault(conv_kernel_reversed, "vit", "patch_embed.proj"),
    Fault(weights_through_bfloat16, "vit", "patch_embed.proj"),
    Fault(patches_channel_first, "vit_pytorch", "patch_embed.norm1"),
    Fault(patches_column_major, "vit", "patch_embed"),
    Fault(class_token_last, "vit", "blocks.0.norm1"),
    Fault(positions_off_by_one, "vit", "blocks.0.norm1"),
    Fault(positions_off_by_one, "performer", "blocks.0.norm1"),
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
    Fault(sinusoid_in_halves, "performer", "blocks.0.norm1"),
    Fault(sinusoid_in_float32, "performer", "blocks.0.norm1"),
    Fault(soft_split_same, "performer", STEM + "mixers.0.norm1"),
    Fault(soft_split_channel_last, "performer", STEM + "mixers.0.norm1"),
    Fault(soft_split_edges_repeated, "performer", STEM + "mixers.0.norm1"),
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


# --- harmless rewrites ---------------------------------------------------------------------------


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


def soft_split_by_slices(_: Model, patch: Patch) -> None:
    """The scaffold of the faults in the soft split, with nothing exchanged."""

    def soft_split(x: Tensor, split: SoftSplit) -> Tensor:
        return tokens_by_channel(unfold_by_slices(x, split, zeros_around(split)))

    patch.setattr(t2t_vit, "soft_split", soft_split)


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


HARMLESS = (
    Fault(attention_written_out, "vit"),
    Fault(attention_written_out, "performer"),
    Fault(scale_on_queries, "vit"),
    Fault(softmax_written_out, "vit"),
    Fault(gelu_by_erf, "vit"),
    Fault(gelu_by_erf, "performer"),
    Fault(two_pass_variance, "vit"),
    Fault(two_pass_variance, "vit_offset"),
    Fault(two_pass_variance, "performer"),
    Fault(fast_variance, "vit"),
    Fault(convolution_as_product, "vit"),
    Fault(distilled_written_out, "vit_distilled"),
    Fault(pre_logits_written_out, "vit_pre_logits"),
    Fault(soft_split_by_slices, "performer"),
    Fault(mixers_written_out, "performer"),
    Fault(mixers_written_out, "performer_thin"),
    Fault(mixers_written_out, "transformer"),
    Fault(performer_root_moved, "performer"),
    Fault(random_features_reordered, "performer"),
)


# --- faults that only a gradient shows -----------------------------------------------------------


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


def dist_token_detached(model: Model, _: Patch) -> None:
    """A detach meant for the teacher's logits, set on the student's distillation token."""

    def logits(model: Any, x: Tensor) -> Tensor:
        return (model.head(x[:, 0]) + model.head_dist(x[:, 1].detach())) / 2

    rewrite_distilled(model, logits=logits)


def loss_averaged(model: Model, _: Patch) -> None:
    """Mean over the batch for the sum: the default of most losses; gradients a batch too small."""

    def scale(_: nn.Module, args: object, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient / len(gradient))

    model.register_forward_hook(scale)


BEHIND = STEM + "mixers.1.norm2.scale"

GRADIENT_FAULTS = (
    # fault, model, a gradient that is wrong, one that is right
    GradientFault(residual_detached, "performer", STEM + "mixers.1.kqv.kernel", BEHIND),
    GradientFault(residual_detached, "transformer", STEM + "mixers.1.attn.qkv.kernel", BEHIND),
    GradientFault(denominator_detached, "performer", STEM + "mixers.1.kqv.kernel", BEHIND),
    GradientFault(statistics_detached, "vit", "blocks.1.mlp.fc2.kernel", "norm.scale"),
    GradientFault(class_token_fixed, "vit", "cls_token", "pos_embed"),
    GradientFault(dist_token_detached, "vit_distilled", "norm.scale", "head_dist.kernel"),
    GradientFault(loss_averaged, "vit", "head.bias", None),
    GradientFault(loss_averaged, "performer", "images", None),
)


# --- tables of the other families ----------------------------------------------------------------

for _file in sorted(Path(__file__).parent.glob("controls/families/*.py")):
    _tables = import_module(f"parity_tests.controls.families.{_file.stem}")
    CASES |= _tables.CASES
    FAULTS += _tables.FAULTS
    HARMLESS += _tables.HARMLESS
    GRADIENT_FAULTS += _tables.GRADIENT_FAULTS


# --- tests ---------------------------------------------------------------------------------------

# Where float32 is not enough: these are smaller than what rounding does to a right model there.
HIDDEN_IN_FLOAT32 = (
    Fault(norm_eps_of_transformers, "vit"),
    Fault(softmax_in_float32, "vit"),
    Fault(norm_in_float32, "vit"),
    Fault(sinusoid_in_float32, "performer"),
    Fault(performer_eps_dropped, "performer"),
    Fault(performer_eps_in_features, "performer"),
    Fault(performer_root_missing, "performer"),
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Models this small spend more time on waking threads than on sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ids(table: tuple[Any, ...]) -> list[str]:
    """Test ids of a table."""
    return [row.id for row in table]


def test_tables_are_large_and_without_repeats() -> None:
    assert len({fault.plant for fault in FAULTS}) >= MIN_FAULTS
    for table in (FAULTS, HARMLESS, GRADIENT_FAULTS):
        assert len(set(ids(table))) == len(table)
    assert {fault.case for fault in (*FAULTS, *HARMLESS)} == set(CASES)
    assert all(fault.plant.__doc__ for fault in (*FAULTS, *HARMLESS, *GRADIENT_FAULTS))


@pytest.mark.parametrize("case", CASES)
def test_sound_model_passes(case: str) -> None:
    found = report(case, run_sound(case), run(build(case)))
    assert found.equal
    assert found.first_beyond(PAIR) is None


@pytest.mark.parametrize("fault", HARMLESS, ids=ids(HARMLESS))
def test_harmless_rewrite_passes(fault: Fault) -> None:
    found = report(fault.case, run_sound(fault.case), with_fault(fault.case, fault.plant))
    assert found.equal, found.verdict()


@pytest.mark.parametrize("fault", FAULTS, ids=ids(FAULTS))
def test_fault_is_caught(fault: Fault) -> None:
    sound, faulty = run_sound(fault.case), with_fault(fault.case, fault.plant)
    found = report(fault.case, sound, faulty)
    output = found.worst("output").error

    # Neither shape nor NaN gives the fault away.
    assert faulty["output"].shape == sound["output"].shape
    assert math.isfinite(output)

    assert output > LIMITS["float64"]["output"]
    assert not found.equal
    first = found.first_beyond(PAIR)
    assert (first.path if first else "") == fault.first


@pytest.mark.parametrize("fault", HIDDEN_IN_FLOAT32, ids=ids(HIDDEN_IN_FLOAT32))
def test_float32_would_hide_it(fault: Fault) -> None:
    sound, faulty = run_sound(fault.case), with_fault(fault.case, fault.plant)
    output = error(sound["output"], faulty["output"])
    assert LIMITS["float64"]["output"] < output < LIMITS["float32"]["output"]


def test_fast_variance_in_float32() -> None:
    """The accuracy of LayerNorm at mean 30, std 1: the formula of Flax overspends the budget.

    At mean 100 the two-pass formula would, too: float32 then holds the tokens to 4e-6 only.
    """
    tokens = 30 + torch.randn(64, 18, generator=torch.Generator().manual_seed(0))
    wide: Model = build("vit")
    narrow: Model = runtime.build(VIT, weights("vit"), dtype="float32")

    def accuracy() -> float:
        answer = wide.blocks[0].norm1(tokens.double())
        return error(narrow.blocks[0].norm1(tokens).detach().numpy(), answer.detach().numpy())

    limit = LIMITS["float32"]["activation"]
    assert accuracy() <= limit
    with pytest.MonkeyPatch.context() as patch:
        fast_variance(narrow, patch)
    assert accuracy() > limit


@pytest.mark.parametrize("fault", GRADIENT_FAULTS, ids=ids(GRADIENT_FAULTS))
def test_gradient_fault_is_caught(fault: GradientFault) -> None:
    sound = run_sound(fault.case, gradients=True)
    found = report(fault.case, sound, with_fault(fault.case, fault.plant, gradients=True))
    errors = {d.path: d.error for d in found.differences if d.kind == "gradient"}
    limits = LIMITS["float64"]

    # The forward pass cannot tell.
    assert found.worst("output").error <= limits["output"]
    assert found.worst("activation").error <= limits["activation"]

    assert math.isfinite(errors[fault.wrong])
    assert errors[fault.wrong] > limits["gradient"]
    assert not found.equal
    assert fault.right is None or errors[fault.right] <= limits["gradient"]


def test_fixed_parameter_that_trains_is_refused() -> None:
    """The sinusoid is saved with the weights, so a port easily hands it to the optimiser."""
    model = build("performer")
    model.pos_embed.requires_grad_(True)
    with pytest.raises(InputError, match=r"unexpected pos_embed \(1, 5, 18\)"):
        run(model, gradients=True)


def test_trainable_parameter_that_is_fixed_is_refused() -> None:
    model = build("vit")
    model.blocks[1].norm2.weight.requires_grad_(False)
    with pytest.raises(InputError, match=r"missing blocks\.1\.norm2\.weight \(18,\)"):
        run(model, gradients=True)


def test_process_of_a_backend_and_report_find_the_fault(monkeypatch: Patch) -> None:
    """What ``parity`` does with each backend, on a job with a fault in the second block only."""
    images, cotangent = draw_inputs(VIT, batch=2, seed=0)
    settings = Settings(trace=True, gradients=True)
    job = Job(VIT, weights("vit"), images, cotangent, settings)
    sound = worker.run(job, "torch")
    assert report("vit", sound, worker.run(job, "torch")).equal

    build_sound = runtime.build

    def build_faulty(*args: Any, **kwargs: Any) -> Model:
        model: Model = build_sound(*args, **kwargs)
        model.blocks[1].norm1.eps = 1e-5
        return model

    monkeypatch.setattr(runtime, "build", build_faulty)
    found = report("vit", sound, worker.run(job, "torch"))
    assert not found.equal
    first = found.first_beyond(PAIR)
    assert first is not None
    assert first.path == "blocks.1.norm1"
    (line,) = found.verdict()
    assert line.startswith("NOT equal: sound and other")
    assert "blocks.1.norm1" in line


@pytest.mark.parametrize("path", ["patch_embed.proj", "blocks.1.attn", "head"])
@pytest.mark.parametrize(("limits", "equal"), [(0.5, True), (2.0, False)])
def test_one_number_of_one_activation_decides(path: str, limits: float, equal: bool) -> None:
    """One number is off by half the limit, or by twice the limit."""
    sound = run_sound("vit")
    array = sound[f"activation/{path}"].copy()
    array.flat[array.size // 2] += limits * LIMITS["float64"]["activation"] * np.abs(array).max()
    found = report("vit", sound, {**sound, f"activation/{path}": array})
    assert found.equal is equal
    first = found.first_beyond(PAIR)
    assert (first.path if first else None) == (None if equal else path)
    assert found.verdict()[0].startswith("equal: " if equal else "NOT equal: ")


def test_verdict_names_the_backend_that_is_wrong() -> None:
    """Of three backends one is wrong: the two pairs that it is in, and no other, are named."""
    sound, faulty = run_sound("vit"), with_fault("vit", gelu_tanh)
    differences = _compare({"torch": dict(sound), "flax": dict(faulty), "keras": dict(sound)})
    found = ParityReport(
        config=VIT,
        backends=("torch", "flax", "keras"),
        dtype="float64",
        limits=LIMITS["float64"],
        differences=tuple(differences),
        seconds={},
    )
    assert not found.equal
    first, second = found.verdict()
    assert first.startswith("NOT equal: torch and flax")
    assert second.startswith("NOT equal: flax and keras")
    assert "blocks.0.mlp.fc2" in first
    assert "blocks.0.mlp.fc2" in second


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("both", [False, True])
def test_what_is_not_finite_is_never_equal(value: float, both: bool) -> None:
    """NaN compares as False with any limit, and two models that both overflow prove nothing."""
    good = run_sound("vit")["output"]
    bad = good.copy()
    bad[0, 0] = value
    assert error(bad, bad if both else good) == float("inf")


def test_shapes_that_broadcast_are_not_equal() -> None:
    """NumPy would subtract (2, 5) and (1, 2, 5), or a row and a matrix, without a word."""
    output = run_sound("vit")["output"]
    assert error(output, output[None]) == float("inf")
    assert error(output[:1], np.broadcast_to(output[:1], output.shape)) == float("inf")


def test_error_sees_one_number_among_many() -> None:
    """A mean over the tensor would divide the difference by its size; the largest one does not."""
    good = np.ones((100, 100))
    bad = good.copy()
    bad[3, 7] += 1e-9
    assert error(good, bad) == error(bad, good) > LIMITS["float64"]["output"]
    assert np.abs(good - bad).mean() < LIMITS["float64"]["output"]


def test_missing_activation_is_refused() -> None:
    sound = run_sound("vit")
    fewer = {key: array for key, array in sound.items() if key != "activation/blocks.0.mlp"}
    with pytest.raises(BackendError, match=r"activation/blocks\.0\.mlp"):
        report("vit", sound, fewer)
