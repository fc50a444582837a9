"""Faults of ports of NesT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from isovit.backends.torch.families import nest
from isovit.backends.torch.layers import ACTIVATIONS, Mlp
from isovit.spec.families.nest import VIT_PYTORCH, Level, NesTConfig
from parity_tests.controls.blocks import (
    gelu_by_erf,
    loss_averaged,
    norm_eps_of_flax,
    norm_eps_of_torch,
    norm_in_float32,
    statistics_detached,
    two_pass_variance,
)
from parity_tests.controls.faults import Fault, GradientFault, Model, Patch, modules, rewrite

NEST = NesTConfig(
    image_size=(8, 12), patch_size=(2, 2), embed_dims=(12, 18), depths=(1, 1), num_heads=(3, 3),
    mlp_ratio=2, num_classes=5,
)  # fmt: skip

CASES: dict[str, Any] = {
    "nest": NEST,
    "nest_symmetric": NEST.replace(pool_padding="both"),
    "nest_pytorch": NEST.replace(**VIT_PYTORCH),
}


# --- scaffolds: a forward with one exchangeable part ----------------------------------------------


def split_by_kind(attn: Any, qkv: Tensor) -> tuple[Tensor, ...]:
    """The sound split: first q, k, v, then the heads; each (..., tokens, heads, head_dim)."""
    return qkv.unflatten(-1, (3, attn.num_heads, -1)).unbind(-3)


def merge_by_head(x: Tensor) -> Tensor:
    """The sound merge of (..., tokens, heads, head_dim): a head's numbers stay together."""
    return x.flatten(-2)


def rewrite_attention(
    model: Model,
    *,
    split: Callable[[Any, Tensor], tuple[Tensor, ...]] = split_by_kind,
    merge: Callable[[Tensor], Tensor] = merge_by_head,
    whole: bool = False,
) -> None:
    """Give all attention modules a forward, by einsum, with one part exchanged.

    Args:
        model: to change.
        split: the product for q, k and v into these.
        merge: the heads into one.
        whole: whether the image is taken for a single block.
    """

    def forward(attn: Any, x: Tensor) -> Tensor:
        blocks = 1 if whole else attn.blocks
        q, k, v = split(attn, attn.qkv(x).unflatten(1, (blocks, -1)))
        weights = (torch.einsum("...qhd,...khd->...hqk", q, k) * attn.scale).softmax(dim=-1)
        y = torch.einsum("...hqk,...khd->...qhd", weights, v)
        return attn.proj(merge(y).flatten(1, 2))

    rewrite(modules(model, nest.BlockAttention), forward)


def pool_by_slices(x: Tensor, padding: tuple[int, int], beside: float) -> Tensor:
    """Max pooling as the largest of nine shifted images, with any number beside the image."""
    x = F.pad(x, (0, 0, *padding, *padding), value=beside)
    rows, columns = ((n - 3) // 2 * 2 + 1 for n in x.shape[1:3])
    shifted = [x[:, i : i + rows : 2, j : j + columns : 2] for i in range(3) for j in range(3)]
    return torch.stack(shifted).amax(dim=0)


def rewrite_positions(model: Model, positions: Callable[[Any], Tensor]) -> None:
    """Give all levels other positions of (level), that go onto (batch, blocks, tokens, dim)."""

    def forward(module: Any, x: Tensor) -> Tensor:
        x = nest.to_blocks(module.pool(x), module.level)
        x = (x + positions(module)).flatten(1, 2)
        for block in module.blocks:
            x = block(x)
        return nest.to_image(x, module.level)

    rewrite(modules(model, nest.NesTLevel), forward)


# --- faults: pooling ------------------------------------------------------------------------------


def pool_padded_on_both_sides(_: Model, patch: Patch) -> None:
    """The published weights, made with SAME, in a port with ``padding=1``: timm's own first one."""
    sound = nest.max_pool
    patch.setattr(nest, "max_pool", lambda x, _: sound(x, (1, 1)))


def pool_padded_at_the_end(_: Model, patch: Patch) -> None:
    """vit-pytorch's weights in a port to JAX or Keras with ``padding="SAME"``."""
    sound = nest.max_pool
    patch.setattr(nest, "max_pool", lambda x, _: sound(x, (0, 1)))


def pool_padded_with_zeros(_: Model, patch: Patch) -> None:
    """An explicit ``pad`` before the pooling, whose default is 0: right as long as all is > 0."""
    patch.setattr(nest, "max_pool", lambda x, padding: pool_by_slices(x, padding, beside=0.0))


# --- faults: attention ----------------------------------------------------------------------------


def heads_interleaved(model: Model, _: Patch) -> None:
    """timm's merge, (head_dim, heads), over weights of the official code, (heads, head_dim)."""
    rewrite_attention(model, merge=lambda x: x.mT.flatten(-2))


def keys_and_values_by_head(model: Model, _: Patch) -> None:
    """The official ``kv`` is (heads, 2 * head_dim): read so where it is (2, heads, head_dim)."""

    def split(attn: Any, qkv: Tensor) -> tuple[Tensor, ...]:
        q, kv = qkv.tensor_split([qkv.shape[-1] // 3], dim=-1)
        k, v = kv.unflatten(-1, (attn.num_heads, 2, -1)).unbind(-2)
        return q.unflatten(-1, (attn.num_heads, -1)), k, v

    rewrite_attention(model, split=split)


def attention_over_the_image(model: Model, _: Patch) -> None:
    """A plain ViT block in place of the local one; the last level, of one block, is right."""
    rewrite_attention(model, whole=True)


def scale_of_the_width(model: Model, _: Patch) -> None:
    """1/√dim, as in T2T-ViT's and CvT's official code, for 1/√head_dim."""
    for attn in modules(model, nest.BlockAttention):
        attn.scale = attn.qkv.in_features**-0.5


# --- faults: blocks, positions, norms, MLP --------------------------------------------------------


def blocks_without_transpose(_: Model, patch: Patch) -> None:
    """The image reshaped to (blocks, tokens) as it lies in memory: a block is a strip of rows."""

    def to_blocks(x: Tensor, level: Level) -> Tensor:
        return x.flatten(1, 2).unflatten(1, (level.blocks, -1))

    patch.setattr(nest, "to_blocks", to_blocks)
    patch.setattr(nest, "to_image", lambda x, level: x.unflatten(1, level.grid))


def blocks_by_column(_: Model, patch: Patch) -> None:
    """Blocks counted column by column, as in ``(b2 b1)`` for ``(b1 b2)``, both ways."""
    to_blocks, to_image = nest.to_blocks, nest.to_image

    def turned(x: Tensor, rows: int) -> Tensor:
        return x.unflatten(1, (rows, -1)).transpose(1, 2).flatten(1, 2)

    def back(x: Tensor, level: Level) -> Tensor:
        return to_image(turned(x.unflatten(1, (level.blocks, -1)), level.block_grid[1])
                        .flatten(1, 2), level)  # fmt: skip

    patch.setattr(
        nest, "to_blocks", lambda x, level: turned(to_blocks(x, level), level.block_grid[0])
    )
    patch.setattr(nest, "to_image", back)


def image_without_transpose(_: Model, patch: Patch) -> None:
    """Tokens of blocks reshaped to an image as they lie in memory; right where a block is all."""
    patch.setattr(nest, "to_image", lambda x, level: x.unflatten(1, level.grid))


def positions_in_the_first_level_alone(model: Model, _: Patch) -> None:
    """One table behind the patch embedding, as in Swin's and Twins's ports."""
    rewrite_positions(model, lambda m: m.pos_embed * (m.level.input_dim is None))


def block_positions_by_column(model: Model, _: Patch) -> None:
    """vit-pytorch's numbers laid over a block column by column.

    Every LayerNorm takes them away again: first to show are the tokens behind a whole layer.
    """

    def positions(module: Any) -> Tensor:
        height, width = module.level.block_size
        return module.pos_embed.unflatten(0, (width, height)).T.flatten()[:, None]

    rewrite_positions(model, positions)


def aggregation_without_norm(model: Model, _: Patch) -> None:
    """Convolution and pooling with no LayerNorm between; hand port."""
    for pool in modules(model, nest.ConvPool):
        rewrite([pool.norm], lambda norm, x: x)


def norm_after_pooling(model: Model, _: Patch) -> None:
    """Norm of the mean in place of the mean of norms, as ViTs without a class token have it."""

    def forward(model: Any, images: Tensor) -> Tensor:
        x = model.patch_embed(images)
        for level in model.levels:
            x = level(x)
        mean = x.mean(dim=(1, 2), keepdim=True)
        return model.head(model.norm(mean.expand_as(x))[:, 0, 0])

    rewrite([model], forward)


def gelu_exact(model: Model, _: Patch) -> None:
    """``nn.GELU`` of PyTorch for ``nn.gelu`` of Flax: what timm computes from these weights."""
    for mlp in modules(model, Mlp):
        mlp.activation = ACTIVATIONS["gelu"]


# --- harmless rewrites ----------------------------------------------------------------------------


def attention_by_einsum(model: Model, _: Patch) -> None:
    """The scaffold of the faults in attention, with nothing exchanged."""
    rewrite_attention(model)


def positions_written_out(model: Model, _: Patch) -> None:
    """The scaffold of the faults in positions, with nothing exchanged."""
    rewrite_positions(
        model, lambda m: m.pos_embed if m.pos_embed.ndim > 1 else m.pos_embed[:, None]
    )


def pool_of_slices(_: Model, patch: Patch) -> None:
    """The scaffold of the faults in the pooling, with nothing exchanged."""
    patch.setattr(
        nest, "max_pool", lambda x, padding: pool_by_slices(x, padding, beside=-torch.inf)
    )


def blocks_of_slices(_: Model, patch: Patch) -> None:
    """Blocks cut out one by one, and put together again side by side."""

    def to_blocks(x: Tensor, level: Level) -> Tensor:
        rows = [
            row.chunk(level.block_grid[1], dim=2) for row in x.chunk(level.block_grid[0], dim=1)
        ]
        return torch.stack([block.flatten(1, 2) for row in rows for block in row], dim=1)

    def to_image(x: Tensor, level: Level) -> Tensor:
        blocks = [block.unflatten(1, level.block_size) for block in x.chunk(level.blocks, dim=1)]
        across = level.block_grid[1]
        rows = [torch.cat(blocks[i : i + across], dim=2) for i in range(0, level.blocks, across)]
        return torch.cat(rows, dim=1)

    patch.setattr(nest, "to_blocks", to_blocks)
    patch.setattr(nest, "to_image", to_image)


# --- faults that only a gradient shows ------------------------------------------------------------


def positions_fixed(model: Model, _: Patch) -> None:
    """Positions kept as a buffer, as fixed ones would be: no gradient."""
    rewrite_positions(model, lambda m: m.pos_embed.detach())


def pool_with_the_gradient_of_a_mean(_: Model, patch: Patch) -> None:
    """A straight-through estimate left from an experiment: the largest, but nine equal shares."""
    sound = nest.max_pool

    def max_pool(x: Tensor, padding: tuple[int, int]) -> Tensor:
        wide = F.pad(x, (0, 0, *padding, *padding)).permute(0, 3, 1, 2)
        mean = F.avg_pool2d(wide, 3, 2).permute(0, 2, 3, 1)
        return mean + (sound(x, padding) - mean).detach()

    patch.setattr(nest, "max_pool", max_pool)


# --- tables ---------------------------------------------------------------------------------------


FIRST, SECOND = "levels.0.blocks.0", "levels.1.blocks.0"
CONV = "levels.1.pool.conv.kernel"

FAULTS = (
    Fault(pool_padded_on_both_sides, "nest", "levels.1.pool"),
    Fault(pool_padded_at_the_end, "nest_pytorch", "levels.1.pool"),
    Fault(pool_padded_with_zeros, "nest", "levels.1.pool"),
    Fault(pool_padded_with_zeros, "nest_symmetric", "levels.1.pool"),
    Fault(heads_interleaved, "nest", f"{FIRST}.attn.proj"),
    Fault(keys_and_values_by_head, "nest", f"{FIRST}.attn.proj"),
    Fault(attention_over_the_image, "nest", f"{FIRST}.attn.proj"),
    Fault(scale_of_the_width, "nest", f"{FIRST}.attn.proj"),
    Fault(blocks_without_transpose, "nest", f"{FIRST}.norm1"),
    Fault(blocks_by_column, "nest", f"{FIRST}.norm1"),
    Fault(image_without_transpose, "nest", "levels.0"),
    Fault(positions_in_the_first_level_alone, "nest", f"{SECOND}.norm1"),
    Fault(block_positions_by_column, "nest_pytorch", FIRST),
    Fault(aggregation_without_norm, "nest", "levels.1.pool.norm"),
    Fault(norm_after_pooling, "nest", "norm"),
    Fault(gelu_exact, "nest", f"{FIRST}.mlp.fc2"),
    Fault(norm_eps_of_torch, "nest", f"{FIRST}.norm1"),
    Fault(norm_eps_of_flax, "nest_pytorch", "patch_embed.norm1"),
    Fault(norm_in_float32, "nest", f"{FIRST}.norm1"),
)


HARMLESS = (
    Fault(attention_by_einsum, "nest"),
    Fault(attention_by_einsum, "nest_pytorch"),
    Fault(positions_written_out, "nest"),
    Fault(positions_written_out, "nest_pytorch"),
    Fault(pool_of_slices, "nest"),
    Fault(pool_of_slices, "nest_symmetric"),
    Fault(blocks_of_slices, "nest"),
    Fault(gelu_by_erf, "nest_pytorch"),
    Fault(two_pass_variance, "nest"),
)


GRADIENT_FAULTS = (
    GradientFault(positions_fixed, "nest", "levels.0.pos_embed", f"{FIRST}.norm1.scale"),
    GradientFault(pool_with_the_gradient_of_a_mean, "nest", CONV, f"{SECOND}.norm1.scale"),
    GradientFault(statistics_detached, "nest", CONV, "norm.scale"),
    GradientFault(loss_averaged, "nest", "images", None),
)
