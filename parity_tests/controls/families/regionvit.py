"""Faults of ports of RegionViT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isovit.backends.torch.families import regionvit
from isovit.spec.families.regionvit import RegionViTConfig
from isovit.weight_convert.families.regionvit import ibm_order
from parity_tests.controls.blocks import loss_averaged, two_pass_variance
from parity_tests.controls.faults import Fault, GradientFault, Model, Patch, modules, rewrite

OFFICIAL = RegionViTConfig(
    image_size=(18, 36), patch_size=3, window_size=3, stem_dims=(), embed_dims=(8, 16),
    depths=(2, 2), num_heads=(2, 4), mlp_dims=(14, 18), peg="both", num_classes=5,
)  # fmt: skip

CASES: dict[str, Any] = {
    "regionvit": OFFICIAL,  # regions of 2 x 4 and 1 x 2, and windows of 3 x 3
    "regionvit_stem": OFFICIAL.replace(image_size=(24, 48), patch_size=4, stem_dims=(6, 7)),
    "regionvit_pytorch": OFFICIAL.replace(
        head_dim=5, qkv_bias=False, region_norm=False, rel_pos="stage", downsample="conv",
        peg="local", norm_eps=1e-5, final_norm="pooled",
    ),
}  # fmt: skip

FIRST = "stages.0.blocks.0"


# --- scaffolds: a forward with one exchangeable part ----------------------------------------------


def updated(regions: Tensor, y: Tensor) -> Tensor:
    """The sound regional tokens behind their attention, whose result is y."""
    return regions + y


def rewrite_blocks(
    model: Model,
    *,
    residual: Callable[[Tensor, Tensor], Tensor] = updated,
    shown: Callable[[Tensor, Tensor], Tensor] = lambda before, after: after,
    bias: Callable[[Tensor], Tensor] = lambda bias: bias,
) -> None:
    """Give all blocks a forward with one part exchanged.

    Args:
        model: to change.
        residual: of the regional tokens before their attention, and of what it gives.
        shown: to the windows, of the regional tokens before their attention and after.
        bias: of the sound bias.
    """

    def forward(block: Any, x: Tensor, shared: Tensor | None = None) -> Tensor:
        if block.rel_pos is not None:
            shared = regionvit.window_bias(block.rel_pos, block.window, block.window_size)
        norm = block.norm1 if block.region_norm is None else block.region_norm
        before = x[:, None, :, 0]
        after = residual(before, block.attn(norm(before)))
        x = torch.cat([shown(before, after).transpose(1, 2), x[:, :, 1:]], dim=2)
        x = x + block.attn(block.norm1(x), bias(shared))
        return x + block.mlp(block.norm2(x))

    rewrite(modules(model, regionvit.Block), forward)


def split_by_kind(attn: Any, qkv: Tensor) -> tuple[Tensor, ...]:
    """The sound split: first q, k, v, then the heads; (batch, groups, heads, tokens, head_dim)."""
    return qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(3, 0, 1, 4, 2, 5).unbind(0)


def rewrite_attention(
    model: Model,
    *,
    split: Callable[[Any, Tensor], tuple[Tensor, ...]] = split_by_kind,
    scores: Callable[[Any, Tensor, Tensor | float], Tensor] = lambda attn, qk, bias: (
        qk * attn.scale + bias
    ),
) -> None:
    """Give all attentions a forward with one part exchanged.

    Args:
        model: to change.
        split: of qkv.
        scores: of q·k and the bias, which is 0 for regional tokens.
    """

    def forward(attn: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = split(attn, attn.qkv(x))
        weights = torch.softmax(scores(attn, q @ k.mT, 0.0 if bias is None else bias), dim=-1)
        return attn.proj((weights @ v).transpose(2, 3).flatten(3))

    rewrite(modules(model, regionvit.Attention), forward)


def rewrite_bias(
    patch: Patch,
    *,
    table: Callable[[Tensor], Tensor] = lambda table: table,
    around: tuple[int, int, int, int] = (1, 0, 1, 0),
) -> None:
    """Exchange a part of how the biases of a window are made.

    Args:
        patch: to put it in place by.
        table: of the table of (heads, rows, columns) between two tokens.
        around: zeros on the sides of the biases of local tokens, as ``torch.nn.functional.pad``
            takes them.
    """

    def window_bias(biases: Tensor, window: tuple[int, int], size: int) -> Tensor:
        between = table(biases.unflatten(1, (2 * size - 1, 2 * size - 1)))
        tokens = [(i, j) for i in range(window[0]) for j in range(window[1])]
        rows = [
            torch.stack([between[:, m - i + size - 1, n - j + size - 1] for m, n in tokens], dim=1)
            for i, j in tokens
        ]
        return F.pad(torch.stack(rows, dim=1), around)

    patch.setattr(regionvit, "window_bias", window_bias)


def rewrite_windows(patch: Patch, order: tuple[int, ...], *, by_row: bool = True) -> None:
    """Exchange the order in which local tokens, or regional ones, lie.

    Args:
        patch: to put it in place by.
        order: of the axes (rows, place, columns, place) that a grid of local tokens is read as,
            where the sound one is (0, 2, 1, 3): window by window.
        by_row: whether regional tokens lie row by row.
    """

    def to_windows(regions: Tensor, x: Tensor) -> Tensor:
        (rows, columns), (height, width) = regions.shape[1:3], x.shape[1:3]
        sizes = (rows, height // rows, columns, width // columns)
        if order == DILATED:
            sizes = (sizes[1], sizes[0], sizes[3], sizes[2])
        x = x.reshape(len(x), *sizes, -1).permute(0, *(1 + axis for axis in order), 5)
        x = x.reshape(len(x), rows * columns, -1, x.shape[-1])
        regions = regions if by_row else regions.transpose(1, 2)
        return torch.cat([regions.flatten(1, 2)[:, :, None], x], dim=2)

    patch.setattr(regionvit, "to_windows", to_windows)


WHOLE, DILATED = (0, 2, 1, 3), (1, 3, 0, 2)


def rewrite_regions(model: Model, order: tuple[int, ...]) -> None:
    """Flatten the pixels of regions in another order of (channels, height, width)."""

    def forward(embed: Any, images: Tensor) -> Tensor:
        pixels = images.unfold(1, embed.side, embed.side).unfold(2, embed.side, embed.side)
        return embed.proj(pixels.permute(0, 1, 2, *(3 + axis for axis in order)).flatten(3))

    rewrite([model.region_embed], forward)


def rewrite_peg(
    model: Model, positions: Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]
) -> None:
    """Give stages with positions for both kinds of tokens other positions behind the first block.

    Args:
        model: to change.
        positions: of the module that makes them, the regional and the local tokens.
    """

    def forward(stage: Any, regions: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = regionvit.to_windows(stage.downsample(regions), stage.downsample(x))
        for i, block in enumerate(stage.blocks):
            tokens = block(tokens)
            if i == 0:
                grids = regionvit.from_windows(tokens, stage.stage)
                tokens = regionvit.to_windows(*positions(stage.peg, *grids))
        return regionvit.from_windows(tokens, stage.stage)

    rewrite(modules(model, regionvit.Stage), forward)


# --- faults: the table of biases ------------------------------------------------------------------


def bias_table_as_it_lies(model: Model, _: Patch) -> None:
    """The official table taken for one that begins with the farthest offset: it wraps around."""
    for block in modules(model, regionvit.Block):
        order = list(ibm_order(block.window_size))
        block.rel_pos.data = block.rel_pos.data[:, torch.tensor(order).argsort()]


def bias_from_key_to_query(_: Model, patch: Patch) -> None:
    """Offsets the other way round, as vit-pytorch and Swin have them."""
    rewrite_bias(patch, table=lambda table: table.flip(1, 2))


def bias_by_columns(_: Model, patch: Patch) -> None:
    """Rows and columns exchanged in the table: in vit-pytorch's, rows are the faster axis."""
    rewrite_bias(patch, table=lambda table: table.mT)


def bias_of_the_last_token(_: Model, patch: Patch) -> None:
    """The regional token taken for the last: it is the first."""
    rewrite_bias(patch, around=(0, 1, 0, 1))


def bias_scaled(model: Model, _: Patch) -> None:
    """The scale on q·k and bias alike, as a mask is added before it in some attentions."""
    rewrite_attention(model, scores=lambda attn, qk, bias: (qk + bias) * attn.scale)


# --- faults: attention ----------------------------------------------------------------------------


def scale_of_width(model: Model, _: Patch) -> None:
    """1/√ of all heads' width for that of one head; the official code once had it wrong."""
    for attn in modules(model, regionvit.Attention):
        attn.scale = attn.proj.in_features**-0.5


def heads_before_kinds(model: Model, _: Patch) -> None:
    """qkv split as (heads, 3, head_dim) for (3, heads, head_dim)."""

    def split(attn: Any, qkv: Tensor) -> tuple[Tensor, ...]:
        return qkv.unflatten(-1, (attn.num_heads, 3, -1)).permute(4, 0, 1, 3, 2, 5).unbind(0)

    rewrite_attention(model, split=split)


def regions_shown_before(model: Model, _: Patch) -> None:
    """Windows with the regional tokens as they came: those that attended are lost."""
    rewrite_blocks(model, shown=lambda before, after: before)


def regions_without_residual(model: Model, _: Patch) -> None:
    """The regional tokens replaced by what their attention gives."""
    rewrite_blocks(model, residual=lambda regions, y: y)


def region_norm_of_windows(model: Model, _: Patch) -> None:
    """One norm for both attentions, as vit-pytorch has it, where the official code has two."""
    for block in modules(model, regionvit.Block):
        block.region_norm.load_state_dict(block.norm1.state_dict())


# --- faults: grids --------------------------------------------------------------------------------


def windows_dilated(_: Model, patch: Patch) -> None:
    """Every n-th token for n neighbours: (size, n) for (n, size) when an axis is split."""
    rewrite_windows(patch, DILATED)


def regions_by_columns(_: Model, patch: Patch) -> None:
    """Regional tokens column by column beside windows row by row: each in another's window."""
    rewrite_windows(patch, WHOLE, by_row=False)


def pixels_by_place(model: Model, _: Patch) -> None:
    """Pixels of a region as (height, width, channel), the order of channels-last frameworks."""
    rewrite_regions(model, (1, 2, 0))


def embedding_same(model: Model, _: Patch) -> None:
    """Padding "SAME" has less before than behind, and in all less than the official one."""

    def forward(conv: Any, images: Tensor) -> Tensor:
        (kernel, _), (stride, _) = conv.kernel_size, conv.stride
        before, behind = (kernel - stride) // 2, (kernel - stride + 1) // 2
        x = F.pad(images.permute(0, 3, 1, 2), (before, behind, before, behind))
        return F.conv2d(x, conv.weight, conv.bias, stride).permute(0, 2, 3, 1)

    rewrite([model.local_embed.proj], forward)


def halving_same(model: Model, _: Patch) -> None:
    """Padding "SAME" of a stride of 2 has zeros behind alone, where the sides are even."""

    def forward(conv: Any, x: Tensor) -> Tensor:
        x = F.pad(x.permute(0, 3, 1, 2), (0, 1, 0, 1))
        if not x.shape[2] % 2:  # of an odd side, as of the regional tokens' single row, both
            x = F.pad(x, (0, 0, 1, 0))
        return F.conv2d(x, conv.weight, conv.bias, 2, groups=conv.groups).permute(0, 2, 3, 1)

    rewrite([halving.conv for halving in modules(model, regionvit.Downsample)], forward)


def halving_without_activation(model: Model, _: Patch) -> None:
    """The activation left out between norm and convolution, as between those of most models."""
    for halving in modules(model, regionvit.Downsample):
        halving.activation = nn.Identity()


def halving_norm_eps_of_blocks(model: Model, _: Patch) -> None:
    """One epsilon for the whole model: before the convolutions it is 1e-5, in the blocks 1e-6."""
    for halving in modules(model, regionvit.Downsample):
        halving.norm.eps = 1e-6


def stem_norm_eps_of_blocks(model: Model, _: Patch) -> None:
    """The same in the stem."""
    model.local_embed.norm1.eps = 1e-6


# --- faults: positions and pooling ----------------------------------------------------------------


def positions_of_local_tokens(model: Model, _: Patch) -> None:
    """Positions for the local tokens alone, as vit-pytorch has them."""
    rewrite_peg(model, lambda peg, regions, x: (regions, peg(x)))


def positions_without_residual(model: Model, _: Patch) -> None:
    """The convolution alone: the official module is one, and the sum stands elsewhere."""
    rewrite(modules(model, regionvit.PEG), lambda peg, x: peg.proj(x))


def local_tokens_pooled(model: Model, _: Patch) -> None:
    """The mean over the local tokens: the head is the regional ones'."""
    last = model.stages[-1]
    sound = last.forward
    last.forward = lambda regions, x: sound(regions, x)[::-1]


FAULTS = (
    Fault(bias_table_as_it_lies, "regionvit", f"{FIRST}.attn.proj"),
    Fault(bias_from_key_to_query, "regionvit", f"{FIRST}.attn.proj"),
    Fault(bias_from_key_to_query, "regionvit_pytorch", f"{FIRST}.attn.proj"),
    Fault(bias_by_columns, "regionvit", f"{FIRST}.attn.proj"),
    Fault(bias_by_columns, "regionvit_pytorch", f"{FIRST}.attn.proj"),
    Fault(bias_of_the_last_token, "regionvit", f"{FIRST}.attn.proj"),
    Fault(bias_scaled, "regionvit", f"{FIRST}.attn.proj"),
    Fault(scale_of_width, "regionvit", f"{FIRST}.norm1"),
    Fault(heads_before_kinds, "regionvit", f"{FIRST}.norm1"),
    Fault(regions_shown_before, "regionvit", f"{FIRST}.norm1"),
    Fault(regions_shown_before, "regionvit_pytorch", f"{FIRST}.norm1"),
    Fault(regions_without_residual, "regionvit", f"{FIRST}.norm1"),
    Fault(region_norm_of_windows, "regionvit", f"{FIRST}.region_norm"),
    Fault(windows_dilated, "regionvit", f"{FIRST}.norm1"),
    Fault(regions_by_columns, "regionvit", f"{FIRST}.region_norm"),
    Fault(pixels_by_place, "regionvit", "region_embed.proj"),
    Fault(embedding_same, "regionvit", "local_embed.proj"),
    Fault(halving_same, "regionvit", "stages.1.downsample.conv"),
    Fault(halving_same, "regionvit_pytorch", "stages.1.downsample.conv"),
    Fault(halving_without_activation, "regionvit", "stages.1.downsample.conv"),
    Fault(halving_norm_eps_of_blocks, "regionvit", "stages.1.downsample.norm"),
    Fault(stem_norm_eps_of_blocks, "regionvit_stem", "local_embed.norm1"),
    Fault(positions_of_local_tokens, "regionvit", "stages.0.blocks.1.region_norm"),
    Fault(positions_without_residual, "regionvit", "stages.0.peg"),
    Fault(positions_without_residual, "regionvit_pytorch", "stages.1.peg"),
    Fault(local_tokens_pooled, "regionvit_pytorch", "norm"),
)


# --- rewrites that are the same mathematics -------------------------------------------------------


def regionvit_written_out(model: Model, patch: Patch) -> None:
    """The scaffolds of the faults in blocks, attention, biases and windows: nothing exchanged."""
    rewrite_blocks(model)
    rewrite_attention(model)
    rewrite_bias(patch)
    rewrite_windows(patch, WHOLE)


def positions_written_out(model: Model, _: Patch) -> None:
    """The scaffold of the faults in the positions of both kinds of tokens."""
    rewrite_peg(model, lambda peg, regions, x: (peg(regions), peg(x)))


def pixels_unfolded(model: Model, _: Patch) -> None:
    """The scaffold of the fault in the order of pixels, in the sound one."""
    rewrite_regions(model, (0, 1, 2))


HARMLESS = (
    Fault(regionvit_written_out, "regionvit"),
    Fault(regionvit_written_out, "regionvit_pytorch"),
    Fault(positions_written_out, "regionvit"),
    Fault(pixels_unfolded, "regionvit"),
    Fault(two_pass_variance, "regionvit_stem"),
)


# --- faults that only a gradient shows ------------------------------------------------------------


def regions_detached(model: Model, _: Patch) -> None:
    """``stop_gradient`` on the regional tokens that the windows see, as if they were a memory."""
    rewrite_blocks(model, shown=lambda before, after: after.detach())


def bias_detached(model: Model, _: Patch) -> None:
    """A table of biases kept as a buffer: it is read right and never learns."""
    rewrite_blocks(model, bias=lambda bias: bias.detach())


GRADIENT_FAULTS = (
    # fault, model, a gradient that is wrong, one that is right
    GradientFault(regions_detached, "regionvit", "region_embed.proj.kernel", "head.kernel"),
    GradientFault(bias_detached, "regionvit", f"{FIRST}.rel_pos", f"{FIRST}.attn.qkv.kernel"),
    GradientFault(bias_detached, "regionvit_pytorch", "stages.0.rel_pos", "head.kernel"),
    GradientFault(loss_averaged, "regionvit", "head.bias", None),
)
