"""Faults that ports of Twins-SVT really have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from isovit.backends.torch.families import twins_svt
from isovit.spec.families.twins_svt import TwinsSVTConfig
from parity_tests.controls.faults import (
    Fault,
    GradientFault,
    Model,
    Patch,
    modules,
    rewrite,
)

TWINS = TwinsSVTConfig(
    image_size=(24, 20), embed_dims=(8, 12), depths=(3, 2), num_heads=(2, 3), mlp_dims=(14, 18),
    patch_sizes=(2, 2), window_sizes=(5, 4), reductions=(3, 1), peg_after=(1, 1), num_classes=5,
)  # fmt: skip

CASES: dict[str, Any] = {
    "twins": TWINS,  # whose windows do not tile the grids of 12 x 10 and 6 x 5
    "twins_tiled": TWINS.replace(image_size=(24, 16), window_sizes=(4, 2)),
    "twins_pytorch": TWINS.replace(
        patch_embed="norm_linear_norm", reduce="conv", head_dim=5, qkv_bias=False, norm_eps=1e-5,
        peg_after=(2, 1), final_norm="none",
    ),
}  # fmt: skip

BLOCK = "stages.0.blocks.0"  # the first with windows
NEXT = "stages.0.blocks.1"  # the first with summaries


# --- scaffolds: a forward with one exchangeable part ---------------------------------------------

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def softmax_over_window(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    """The sound attention; also gets 1 where a token is real, and 0 where it is padding."""
    return torch.softmax(q @ k.mT, dim=-1) @ v


def rewrite_local_attention(
    model: Model,
    *,
    before: Callable[[Any], int] = lambda _: 0,
    filling: Callable[[Any], Tensor | float] = lambda _: 0.0,
    attend: Attend = softmax_over_window,
    scale: Callable[[Any], float] = lambda attn: attn.scale,
) -> None:
    """Give all attentions within windows a forward with one part exchanged.

    Args:
        model: to change.
        before: of the rows and columns that are added, how many stand first.
        filling: what stands in them, of each attention.
        attend: of q, k, v and of what is real.
        scale: factor on q·k, of each attention.
    """

    def forward(attn: Any, x: Tensor) -> Tensor:
        (rows, columns), (down, right), size = attn.grid, attn.padded_grid, attn.window_size
        top, left = min(before(attn), down - rows), min(before(attn), right - columns)
        inside = (slice(None), slice(top, top + rows), slice(left, left + columns))
        real = torch.zeros(len(x), down, right, 1, dtype=x.dtype)
        real[inside] = 1.0
        padded = (1 - real) * filling(attn)
        padded = padded.expand(-1, -1, -1, x.shape[-1]).clone()
        padded[inside] = x.unflatten(1, attn.grid)
        qkv = twins_svt.to_windows(attn.qkv(padded), size)
        q, k, v = twins_svt.split_heads(qkv, 3, attn.num_heads)
        y = attend(q * scale(attn), k, v, twins_svt.to_windows(real, size)[:, None])
        y = twins_svt.from_windows(y.transpose(1, 2).flatten(2), size, attn.padded_grid)
        return attn.proj(y[inside].flatten(1, 2))

    rewrite(modules(model, twins_svt.LocalAttention), forward)


def key_then_value(attn: Any, kv: Tensor) -> tuple[Tensor, ...]:
    """The sound split: first k and v, then the heads."""
    return twins_svt.split_heads(kv, 2, attn.num_heads)


def squares(attn: Any, image: Tensor) -> Tensor:
    """The sound summary, before the product to k and v."""
    return attn.norm(attn.reduce(image))


def rewrite_global_attention(
    model: Model,
    *,
    summary: Callable[[Any, Tensor], Tensor] = squares,
    split: Callable[[Any, Tensor], tuple[Tensor, ...]] = key_then_value,
) -> None:
    """Give all attentions to summaries a forward with one part exchanged."""

    def forward(attn: Any, x: Tensor) -> Tensor:
        q = attn.q(x).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
        kv = attn.kv(summary(attn, x.unflatten(1, attn.grid)))
        k, v = split(attn, kv.flatten(1, 2))
        y = torch.softmax(q @ k.mT * attn.scale, dim=-1) @ v
        return attn.proj(y.transpose(1, 2).flatten(2))

    rewrite(modules(model, twins_svt.GlobalAttention), forward)


def rewrite_positions(
    model: Model,
    *,
    convolved: Callable[[Any, Tensor], Tensor] = lambda peg, x: peg.proj(x),
    residual: Callable[[Tensor], Tensor | float] = lambda x: x,
) -> None:
    """Give all positional encodings a forward with one part exchanged."""

    def forward(peg: Any, x: Tensor) -> Tensor:
        return residual(x) + convolved(peg, x.unflatten(1, peg.grid)).flatten(1, 2)

    rewrite(modules(model, twins_svt.PEG), forward)


def rewrite_patches(model: Model, order: tuple[int, ...]) -> None:
    """Give vit-pytorch's patch embeddings patches whose axes have another order.

    Args:
        model: to change.
        order: of the axes (batch, rows, columns, height, width, channels) of the patches.
    """

    def forward(embed: Any, x: Tensor) -> Tensor:
        patches = x.unfold(1, embed.side, embed.side).unfold(2, embed.side, embed.side)
        patches = patches.permute(0, 1, 2, 4, 5, 3)  # from (..., channels, height, width)
        tokens = patches.permute(order).flatten(3).flatten(1, 2)
        return embed.norm2(embed.proj(embed.norm1(tokens)))

    rewrite(modules(model, twins_svt.NormLinearNormPatchEmbed), forward)


# --- faults: norms -------------------------------------------------------------------------------


def embed_norm_eps_of_blocks(model: Model, _: Patch) -> None:
    """One epsilon for the whole model: the patch embeddings have 1e-5, the blocks 1e-6."""
    for embed in modules(model, twins_svt.ConvNormPatchEmbed):
        embed.norm.eps = 1e-6


def reduce_norm_eps_of_blocks(model: Model, _: Patch) -> None:
    """The same with the norm of the summaries, which is built without the model's own."""
    for attn in modules(model, twins_svt.GlobalAttention):
        attn.norm.eps = 1e-6


def reduce_norm_missing(model: Model, _: Patch) -> None:
    """Keys and values straight from the convolution, as vit-pytorch has them."""
    norms = [attn.norm for attn in modules(model, twins_svt.GlobalAttention)]
    rewrite(norms, lambda norm, x: x)


# --- faults: windows -----------------------------------------------------------------------------


def padding_masked(model: Model, _: Patch) -> None:
    """Zeros beyond the edge masked out, as Swin does: the weights were trained to see them."""

    def attend(q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        scores = (q @ k.mT).masked_fill(real.mT == 0, -torch.inf)
        weights = torch.softmax(scores, dim=-1).nan_to_num()  # of a window with nothing real
        return weights @ v

    rewrite_local_attention(model, attend=attend)


def padding_before_norm(model: Model, _: Patch) -> None:
    """The image padded before the norm: what stands beyond the edge is then the norm's bias."""
    for block in modules(model, twins_svt.Block):
        block.attn.bias_of_norm = block.norm1.bias
    rewrite_local_attention(model, filling=lambda attn: attn.bias_of_norm)


def padding_on_both_sides(model: Model, _: Patch) -> None:
    """Padding as "SAME" has it: half of it above and left, where here all is below and right."""
    rewrite_local_attention(model, before=lambda _: 1)


def windows_dilated(_: Model, patch: Patch) -> None:
    """Every n-th token for n neighbours: (size, n) for (n, size) when the axis is split."""

    def to_windows(x: Tensor, size: int) -> Tensor:
        x = x.unflatten(2, (size, -1)).unflatten(1, (size, -1))
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3, 4).flatten(0, 2)

    def from_windows(x: Tensor, size: int, grid: tuple[int, int]) -> Tensor:
        rows, columns = grid
        x = x.unflatten(1, (size, size)).unflatten(0, (-1, rows // size, columns // size))
        return x.permute(0, 3, 1, 4, 2, 5).flatten(3, 4).flatten(1, 2)

    patch.setattr(twins_svt, "to_windows", to_windows)
    patch.setattr(twins_svt, "from_windows", from_windows)


def windows_not_put_back(_: Model, patch: Patch) -> None:
    """Windows taken for rows when they become an image again: the transpose is missing."""

    def from_windows(x: Tensor, size: int, grid: tuple[int, int]) -> Tensor:
        return x.reshape(-1, *grid, x.shape[-1])

    patch.setattr(twins_svt, "from_windows", from_windows)


def scale_of_width(model: Model, _: Patch) -> None:
    """1/√ of all heads' width for that of one head."""
    rewrite_local_attention(model, scale=lambda attn: attn.proj.in_features**-0.5)


# --- faults: summaries ---------------------------------------------------------------------------


def squares_averaged(model: Model, _: Patch) -> None:
    """Average pooling for the convolution, as PVT's second version has it."""

    def forward(reduce: Any, x: Tensor) -> Tensor:
        pooled = F.avg_pool2d(x.permute(0, 3, 1, 2), reduce.kernel_size)
        return pooled.permute(0, 2, 3, 1)

    reduces = [attn.reduce for attn in modules(model, twins_svt.GlobalAttention)]
    rewrite([r for r in reduces if isinstance(r, twins_svt.Conv)], forward)


def values_for_keys(model: Model, _: Patch) -> None:
    """The halves of kv in the other order."""
    rewrite_global_attention(model, split=lambda attn, kv: key_then_value(attn, kv)[::-1])


def heads_before_keys(model: Model, _: Patch) -> None:
    """kv split as (heads, 2, head_dim) for (2, heads, head_dim)."""

    def split(attn: Any, kv: Tensor) -> tuple[Tensor, ...]:
        return kv.unflatten(-1, (attn.num_heads, 2, -1)).permute(3, 0, 2, 1, 4).unbind(0)

    rewrite_global_attention(model, split=split)


# --- faults: patches and positions ---------------------------------------------------------------


def patches_by_pixel(model: Model, _: Patch) -> None:
    """vit-pytorch's patches in the order of its ViT, (height, width, channel)."""
    rewrite_patches(model, (0, 1, 2, 3, 4, 5))


def positions_without_residual(model: Model, _: Patch) -> None:
    """The convolution alone, as the projections of CvT have it."""
    rewrite_positions(model, residual=lambda x: 0.0)


def positions_of_the_edge(model: Model, _: Patch) -> None:
    """The edge repeated for zeros around the image: then nothing tells a token where it is."""

    def forward(conv: Any, x: Tensor) -> Tensor:
        x = F.pad(x.permute(0, 3, 1, 2), 4 * conv.padding[:1], mode="replicate")
        y = F.conv2d(x, conv.weight, conv.bias, groups=conv.groups)
        return y.permute(0, 2, 3, 1)

    rewrite([peg.proj for peg in modules(model, twins_svt.PEG)], forward)


def positions_before_blocks(model: Model, _: Patch) -> None:
    """The positions on the embedded patches, before all blocks."""

    def forward(stage: Any, x: Tensor) -> Tensor:
        x = stage.peg(stage.patch_embed(x))
        for block in stage.blocks:
            x = block(x)
        return x.unflatten(1, stage.grid)

    rewrite(modules(model, twins_svt.Stage), forward)


def positions_behind_blocks(model: Model, _: Patch) -> None:
    """The positions at the end of every stage."""
    for stage in modules(model, twins_svt.Stage):
        stage.peg_after = len(stage.blocks)


FAULTS = (
    Fault(embed_norm_eps_of_blocks, "twins", "stages.0.patch_embed.norm"),
    Fault(reduce_norm_eps_of_blocks, "twins", f"{NEXT}.attn.norm"),
    Fault(reduce_norm_missing, "twins", f"{NEXT}.attn.norm"),
    Fault(padding_masked, "twins", f"{BLOCK}.attn.proj"),
    Fault(padding_masked, "twins_pytorch", f"{BLOCK}.attn.proj"),
    Fault(padding_before_norm, "twins", f"{BLOCK}.attn.qkv"),
    Fault(padding_on_both_sides, "twins", f"{BLOCK}.attn.qkv"),
    Fault(windows_dilated, "twins_tiled", f"{BLOCK}.attn.proj"),
    Fault(windows_not_put_back, "twins", f"{BLOCK}.attn.proj"),
    Fault(windows_not_put_back, "twins_tiled", f"{BLOCK}.attn.proj"),
    Fault(scale_of_width, "twins", f"{BLOCK}.attn.proj"),
    Fault(squares_averaged, "twins", f"{NEXT}.attn.reduce"),
    Fault(values_for_keys, "twins", f"{NEXT}.attn.proj"),
    Fault(values_for_keys, "twins_pytorch", f"{NEXT}.attn.proj"),
    Fault(heads_before_keys, "twins", f"{NEXT}.attn.proj"),
    Fault(patches_by_pixel, "twins_pytorch", "stages.0.patch_embed.norm1"),
    Fault(positions_without_residual, "twins", "stages.0.peg"),
    Fault(positions_of_the_edge, "twins", "stages.0.peg.proj"),
    Fault(positions_before_blocks, "twins", f"{BLOCK}.norm1"),
    Fault(positions_behind_blocks, "twins", "stages.0.peg.proj"),
)


# --- rewrites that are the same mathematics ------------------------------------------------------


def twins_written_out(model: Model, _: Patch) -> None:
    """The scaffolds of the faults in attentions and positions, with nothing exchanged."""
    rewrite_local_attention(model)
    rewrite_global_attention(model)
    rewrite_positions(model)


def patches_by_channel(model: Model, _: Patch) -> None:
    """The scaffold of the fault in vit-pytorch's patches, in their own order."""
    rewrite_patches(model, (0, 1, 2, 5, 3, 4))


def windows_by_columns(_: Model, patch: Patch) -> None:
    """A window's tokens by columns, and back: attention does not see their order."""
    to_windows, from_windows = twins_svt.to_windows, twins_svt.from_windows

    def turned(x: Tensor, size: int) -> Tensor:
        return x.unflatten(1, (size, size)).transpose(1, 2).flatten(1, 2)

    patch.setattr(twins_svt, "to_windows", lambda x, size: turned(to_windows(x, size), size))
    patch.setattr(
        twins_svt,
        "from_windows",
        lambda x, size, grid: from_windows(turned(x, size), size, grid),
    )


def squares_as_products(model: Model, _: Patch) -> None:
    """The convolution of each square as a product with its flattened tokens."""

    def forward(conv: Any, x: Tensor) -> Tensor:
        (side, _), (rows, columns) = conv.kernel_size, x.shape[1:3]
        x = x[:, : rows // side * side, : columns // side * side]
        tokens = x.unfold(1, side, side).unfold(2, side, side).flatten(3)
        return tokens @ conv.weight.flatten(1).T + (0.0 if conv.bias is None else conv.bias)

    attns = modules(model, twins_svt.GlobalAttention)
    convs = [conv for attn in attns for conv in (attn.reduce, attn.kv)]
    rewrite([conv for conv in convs if isinstance(conv, twins_svt.Conv)], forward)


HARMLESS = (
    Fault(twins_written_out, "twins"),
    Fault(twins_written_out, "twins_tiled"),
    Fault(twins_written_out, "twins_pytorch"),
    Fault(patches_by_channel, "twins_pytorch"),
    Fault(windows_by_columns, "twins"),
    Fault(squares_as_products, "twins"),
    Fault(squares_as_products, "twins_pytorch"),
)


# --- faults that only a gradient shows -----------------------------------------------------------


def summaries_detached(model: Model, _: Patch) -> None:
    """No gradient through the summaries, as through the memory of a recurrent transformer."""
    rewrite_global_attention(model, summary=lambda attn, image: squares(attn, image.detach()))


def positions_detached(model: Model, _: Patch) -> None:
    """Positions taken for a constant table, which here they are not."""
    rewrite_positions(model, convolved=lambda peg, x: peg.proj(x.detach()))


LAST = "stages.1.blocks.1"

GRADIENT_FAULTS = (
    GradientFault(summaries_detached, "twins", f"{LAST}.norm1.scale", f"{LAST}.attn.kv.kernel"),
    GradientFault(
        positions_detached, "twins", "stages.1.blocks.0.mlp.fc2.kernel", "stages.1.peg.proj.kernel"
    ),
)
