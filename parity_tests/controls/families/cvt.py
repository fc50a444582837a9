"""Faults that ports of CvT really have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from isovit.backends.torch.families import cvt
from isovit.backends.torch.layers import ACTIVATIONS, BatchNorm, DepthwiseConv, Mlp
from isovit.spec.families.cvt import VIT_PYTORCH, CvTConfig
from parity_tests.controls.faults import (
    Fault,
    GradientFault,
    Model,
    Patch,
    modules,
    rewrite,
)

CVT = CvTConfig(
    image_size=(21, 18), embed_dims=(8, 12), depths=(1, 2), num_heads=(2, 3), mlp_dims=(14, 18),
    patch_sizes=(5, 3), patch_strides=(3, 2), patch_paddings=(1, 1), qkv_kernel_sizes=(3, 3),
    kv_strides=(2, 2), num_classes=5,
)  # fmt: skip

CASES: dict[str, Any] = {
    "cvt": CVT,  # of grids 7 x 6 and 4 x 3
    "cvt_mean": CVT.replace(class_token=False, pool="mean"),
    "cvt_pytorch": CVT.replace(**{**VIT_PYTORCH, "head_dim": 5}),
}

BLOCK = "stages.0.blocks.0"
NEXT = "stages.1.blocks.0"  # the first with a class token
LAST = "stages.1.blocks.1"


# --- scaffolds: a forward with one exchangeable part ---------------------------------------------


def image_of(projection: Any, x: Tensor) -> Tensor:
    """The sound image: all tokens but the class token, row by row."""
    return x[:, int(projection.class_token) :].unflatten(1, projection.grid)


def class_token_first(projection: Any, x: Tensor, y: Tensor) -> Tensor:
    """The sound tokens: the class token as it came in, before what was convolved."""
    return torch.cat([x[:, : int(projection.class_token)], y], dim=1)


def rewrite_projections(
    model: Model,
    *,
    image: Callable[[Any, Tensor], Tensor] = image_of,
    tokens: Callable[[Any, Tensor, Tensor], Tensor] = class_token_first,
) -> None:
    """Give all convolutional projections a forward with one part exchanged.

    Args:
        model: to change.
        image: what is convolved, of a projection and its tokens.
        tokens: what is multiplied, of a projection, its tokens and those that were convolved.
    """

    def forward(projection: Any, x: Tensor) -> Tensor:
        y = projection.norm(projection.conv(image(projection, x))).flatten(1, 2)
        return projection.proj(tokens(projection, x, y))

    rewrite(modules(model, cvt.ConvProjection), forward)


def keys_and_values(attn: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The sound k and v, each (batch, heads, keys, head_dim)."""
    if attn.one_conv:
        k, v = cvt.split_heads(attn.kv(x), 2, attn.num_heads)
        return k, v
    (k,) = cvt.split_heads(attn.k(x), 1, attn.num_heads)
    (v,) = cvt.split_heads(attn.v(x), 1, attn.num_heads)
    return k, v


def rewrite_attention(
    model: Model,
    *,
    kv: Callable[[Any, Tensor], tuple[Tensor, Tensor]] = keys_and_values,
    scale: Callable[[Any], float] = lambda attn: attn.scale,
) -> None:
    """Give all attentions a forward with one part exchanged."""

    def forward(attn: Any, x: Tensor) -> Tensor:
        (q,) = cvt.split_heads(attn.q(x), 1, attn.num_heads)
        k, v = kv(attn, x)
        y = torch.softmax(q @ k.mT * scale(attn), dim=-1) @ v
        return attn.proj(y.transpose(1, 2).flatten(2))

    rewrite(modules(model, cvt.Attention), forward)


def rewrite_convolutions(model: Model, pad: Callable[[Any, Tensor], Tensor]) -> None:
    """Give all convolutions of the projections another padding of (batch, dim, rows, columns)."""

    def forward(conv: Any, x: Tensor) -> Tensor:
        x = pad(conv, x.permute(0, 3, 1, 2))
        y = F.conv2d(x, conv.weight, stride=conv.stride, groups=conv.groups)
        return y.permute(0, 2, 3, 1)

    rewrite(modules(model, DepthwiseConv), forward)


def zeros_around(conv: Any, x: Tensor) -> Tensor:
    """The sound padding: equally many zeros on all sides."""
    return F.pad(x, 4 * conv.padding[:1])


# --- faults: attention ---------------------------------------------------------------------------


def scale_of_head(model: Model, _: Patch) -> None:
    """1/√ of a head's width, as the paper and all other models have it, for that of all heads."""
    rewrite_attention(model, scale=lambda attn: (attn.proj.in_features / attn.num_heads) ** -0.5)


def scale_of_width(model: Model, _: Patch) -> None:
    """The official scale, 1/√ of the width of the tokens, in vit-pytorch's model."""
    rewrite_attention(model, scale=lambda attn: attn.proj.out_features**-0.5)


def values_for_keys(model: Model, _: Patch) -> None:
    """The halves of kv in the other order."""

    def kv(attn: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        k, v = keys_and_values(attn, x)
        return v, k

    rewrite_attention(model, kv=kv)


def heads_before_keys(model: Model, _: Patch) -> None:
    """kv split as (heads, 2, head_dim) for (2, heads, head_dim)."""

    def kv(attn: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = attn.kv(x).unflatten(-1, (attn.num_heads, 2, -1))
        k, v = y.permute(3, 0, 2, 1, 4).unbind(0)
        return k, v

    rewrite_attention(model, kv=kv)


# --- faults: projections -------------------------------------------------------------------------


def one_conv_for_two(model: Model, _: Patch) -> None:
    """vit-pytorch's one convolution for k and v, with the official weights of k's."""
    for attn in modules(model, cvt.Attention):
        attn.v.conv.weight = attn.k.conv.weight


def keys_not_squeezed(model: Model, _: Patch) -> None:
    """No stride before k and v: as many keys as queries."""
    for conv in modules(model, DepthwiseConv):
        conv.stride = (1, 1)


def padding_same(model: Model, _: Patch) -> None:
    """Padding as "SAME" has it: at a stride of 2 and an even size, all of it at the end."""

    def pad(conv: Any, x: Tensor) -> Tensor:
        sides: list[int] = []
        for size, kernel, stride in zip(x.shape[2:], conv.kernel_size, conv.stride, strict=True):
            zeros = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            sides = [zeros // 2, zeros - zeros // 2, *sides]
        return F.pad(x, sides)

    rewrite_convolutions(model, pad)


def edge_repeated(model: Model, _: Patch) -> None:
    """The edge repeated for zeros around the image: then nothing tells a token where it is."""
    rewrite_convolutions(model, lambda conv, x: F.pad(x, 4 * conv.padding[:1], mode="replicate"))


def grid_transposed(model: Model, _: Patch) -> None:
    """Tokens laid out by columns, which at a square image nobody notices."""

    def image(projection: Any, x: Tensor) -> Tensor:
        rows, columns = projection.grid
        x = x[:, int(projection.class_token) :]
        return x.unflatten(1, (columns, rows)).transpose(1, 2)

    rewrite_projections(model, image=image)


def class_token_last(model: Model, _: Patch) -> None:
    """The class token put behind the others again, whence it came from before them."""

    def tokens(projection: Any, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([y, x[:, : int(projection.class_token)]], dim=1)

    rewrite_projections(model, tokens=tokens)


def class_token_averaged(model: Model, _: Patch) -> None:
    """The class token from the mean of what was convolved, as if it were part of the image."""

    def tokens(projection: Any, x: Tensor, y: Tensor) -> Tensor:
        mean = y.mean(dim=1, keepdim=True)[:, : int(projection.class_token)]
        return torch.cat([mean, y], dim=1)

    rewrite_projections(model, tokens=tokens)


def batch_norm_eps_of_keras(model: Model, _: Patch) -> None:
    """The default of ``keras.layers.BatchNormalization``, 1e-3."""
    for norm in modules(model, BatchNorm):
        norm.eps = 1e-3


def norm_of_the_batch(model: Model, _: Patch) -> None:
    """Statistics of the batch at hand: somebody forgot ``eval()``."""

    def forward(norm: Any, x: Tensor) -> Tensor:
        y = F.batch_norm(
            x.flatten(0, 2), None, None, norm.weight, norm.bias, training=True, eps=norm.eps
        )
        return y.unflatten(0, x.shape[:3])

    rewrite(modules(model, BatchNorm), forward)


# --- faults: the rest ----------------------------------------------------------------------------


def gelu_of_transformers(model: Model, _: Patch) -> None:
    """Exact GELU with the official weights, as transformers has them."""
    for mlp in modules(model, Mlp):
        mlp.activation = ACTIVATIONS["gelu"]


def patch_padding_of_vit_pytorch(model: Model, _: Patch) -> None:
    """Half of the kernel as padding of the first convolution, where the official one has less."""
    model.stages[0].patch_embed.proj.padding = (2, 2)


def pooled_before_norm(model: Model, _: Patch) -> None:
    """The mean of the tokens normed, for the mean of the normed tokens."""
    norm = model.norm
    rewrite([norm], lambda _, x: x)
    rewrite([model.head], lambda head, x: F.linear(
        F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps),
        head.weight, head.bias,
    ))  # fmt: skip


FAULTS = (
    Fault(scale_of_head, "cvt", f"{BLOCK}.attn.proj"),
    Fault(scale_of_width, "cvt_pytorch", f"{BLOCK}.attn.proj"),
    Fault(values_for_keys, "cvt", f"{BLOCK}.attn.proj"),
    Fault(values_for_keys, "cvt_pytorch", f"{BLOCK}.attn.proj"),
    Fault(heads_before_keys, "cvt_pytorch", f"{BLOCK}.attn.proj"),
    Fault(one_conv_for_two, "cvt", f"{BLOCK}.attn.v.conv"),
    Fault(keys_not_squeezed, "cvt", f"{BLOCK}.attn.k.conv"),
    Fault(padding_same, "cvt", f"{BLOCK}.attn.k.conv"),
    Fault(padding_same, "cvt_pytorch", f"{BLOCK}.attn.kv.conv"),
    Fault(edge_repeated, "cvt", f"{BLOCK}.attn.q.conv"),
    Fault(grid_transposed, "cvt", f"{BLOCK}.attn.q.conv"),
    Fault(class_token_last, "cvt", f"{NEXT}.attn.q.proj"),
    Fault(class_token_averaged, "cvt", f"{NEXT}.attn.q.proj"),
    Fault(batch_norm_eps_of_keras, "cvt", f"{BLOCK}.attn.q.norm"),
    Fault(norm_of_the_batch, "cvt", f"{BLOCK}.attn.q.norm"),
    Fault(gelu_of_transformers, "cvt", f"{BLOCK}.mlp.fc2"),
    Fault(patch_padding_of_vit_pytorch, "cvt", "stages.0.patch_embed.proj"),
    Fault(pooled_before_norm, "cvt_mean", "norm"),
)


# --- rewrites that are the same mathematics ------------------------------------------------------


def cvt_written_out(model: Model, _: Patch) -> None:
    """The scaffolds of the faults in attentions and projections, with nothing exchanged."""
    rewrite_attention(model)
    rewrite_projections(model)
    rewrite_convolutions(model, zeros_around)


def convolutions_as_products(model: Model, _: Patch) -> None:
    """The convolution of every channel as a product with its unfolded neighbours."""

    def forward(conv: Any, x: Tensor) -> Tensor:
        (side, _), (stride, _) = conv.kernel_size, conv.stride
        x = zeros_around(conv, x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        patches = x.unfold(1, side, stride).unfold(2, side, stride)  # (..., dim, side, side)
        return torch.einsum("brcdij,dij->brcd", patches, conv.weight[:, 0])

    rewrite(modules(model, DepthwiseConv), forward)


def keys_turned_round(model: Model, _: Patch) -> None:
    """Keys and values in the other order: attention does not see it."""

    def kv(attn: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        k, v = keys_and_values(attn, x)
        return k.flip(2), v.flip(2)

    rewrite_attention(model, kv=kv)


HARMLESS = (
    Fault(cvt_written_out, "cvt"),
    Fault(cvt_written_out, "cvt_mean"),
    Fault(cvt_written_out, "cvt_pytorch"),
    Fault(convolutions_as_products, "cvt"),
    Fault(convolutions_as_products, "cvt_pytorch"),
    Fault(keys_turned_round, "cvt"),
)


# --- faults that only a gradient shows -----------------------------------------------------------


def keys_detached(model: Model, _: Patch) -> None:
    """No gradient through keys and values, as through the memory of a recurrent transformer."""
    rewrite_attention(model, kv=lambda attn, x: keys_and_values(attn, x.detach()))


def class_token_detached(model: Model, _: Patch) -> None:
    """No gradient through the class token on its way round the convolutions."""

    def tokens(projection: Any, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([x[:, : int(projection.class_token)].detach(), y], dim=1)

    rewrite_projections(model, tokens=tokens)


GRADIENT_FAULTS = (
    GradientFault(keys_detached, "cvt", f"{LAST}.norm1.scale", f"{LAST}.attn.k.proj.kernel"),
    GradientFault(class_token_detached, "cvt", f"{LAST}.norm1.scale", f"{LAST}.attn.v.proj.kernel"),
)
