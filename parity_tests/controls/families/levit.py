"""Faults of ports of LeViT.

"vit-pytorch" marks a convention of its ``levit.py`` brought to official weights, or the other way
round; "hand port" a slip of the pen that belongs to no one framework.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isovit.backends.torch.families import levit
from isovit.backends.torch.layers import BatchNorm
from isovit.spec.families.levit import VIT_PYTORCH, LeViTConfig
from parity_tests.controls.faults import Fault, GradientFault, Model, Patch, modules, rewrite

# A first grid of 4 x 6 tokens, a second of 2 x 3; heads of one width for k and for v.
OFFICIAL = LeViTConfig(
    image_size=(16, 24), stem_dims=(8,), embed_dims=(12, 16), depths=(1, 1), num_heads=(2, 3),
    key_dim=4, value_dim=4, down_heads=(3,), down_value_dim=4, num_classes=5,
)  # fmt: skip

CASES: dict[str, Any] = {
    "levit": OFFICIAL,
    "levit_square": OFFICIAL.replace(image_size=(16, 16)),
    "levit_pytorch": OFFICIAL.replace(
        **{**VIT_PYTORCH, "stem_dims": (8,)}, dist_head=False, image_size=(16, 24)
    ),
}

ATTN = "stages.0.blocks.0.attn"
DOWN = "stages.1.downsample.attn"


# --- scaffolds: a forward with one exchangeable part ---------------------------------------------


def by_head(attn: Any, y: Tensor, parts: int) -> tuple[Tensor, ...]:
    """The sound split of a product: first the heads, then the parts of each."""
    return y.unflatten(-1, (attn.numbers.num_heads, -1)).chunk(parts, dim=-1)


def second_tokens(attn: Any, x: Tensor) -> Tensor:
    """The sound queries: every second row and column."""
    return levit.subsample(x, attn.numbers)


def scaled_then_biased(attn: Any, products: Tensor, bias: Tensor) -> Tensor:
    """The sound scores."""
    return products * attn.scale + bias * attn.bias_factor


def rewrite_attention(
    model: Model,
    *,
    split: Callable[[Any, Tensor, int], tuple[Tensor, ...]] = by_head,
    queries: Callable[[Any, Tensor], Tensor] = second_tokens,
    biases: Callable[..., Tensor] = levit.offset_biases,
    scores: Callable[[Any, Tensor, Tensor], Tensor] = scaled_then_biased,
    activation: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Give all attentions a forward with one part exchanged."""

    def forward(attn: Any, x: Tensor) -> Tensor:
        if attn.numbers.stride == 1:
            q, k, v = split(attn, attn.qkv(x), 3)
        else:
            (k, v), (q,) = split(attn, attn.kv(x), 2), split(attn, attn.q(queries(attn, x)), 1)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        bias = biases(attn.attention_biases, attn.numbers)
        y = torch.softmax(scores(attn, q @ k.mT, bias), dim=-1) @ v
        y = (activation or attn.activation)(y.transpose(1, 2).flatten(2))
        return attn.proj(y)

    rewrite(modules(model, levit.Attention), forward)


def rewrite_blocks(model: Model, shrinking: Callable[[Any, Tensor], Tensor]) -> None:
    """Give all blocks that shrink the grid another first half, of (block, tokens)."""

    def forward(block: Any, x: Tensor) -> Tensor:
        x = shrinking(block, x) if block.shrinks else x + block.attn(x)
        return x + block.mlp(x)

    rewrite(modules(model, levit.Block), forward)


def rewrite_model(model: Model, logits: Callable[[Any, Tensor], Tensor]) -> None:
    """Give a model other logits of (model, tokens of the last stage)."""

    def forward(model: Any, images: Tensor) -> Tensor:
        x = model.stem(images)
        for stage in model.stages:
            x = stage(x)
        return logits(model, x)

    rewrite([model], forward)


def rewrite_stem(model: Model, activation: Callable[[int, Tensor], Tensor]) -> None:
    """Give the stem another activation of (number of the convolution before, its output)."""

    def forward(stem: Any, images: Tensor) -> Tensor:
        x = images
        for i, conv in enumerate(stem.convs):
            x = activation(i, conv(x))
        return x.flatten(1, 2)

    rewrite(modules(model, levit.Stem), forward)


# --- faults: attention ---------------------------------------------------------------------------


def split_by_kind(model: Model, _: Patch) -> None:
    """All q, then all k, then all v, as in ViT; here each head has its own side by side."""

    def split(attn: Any, y: Tensor, parts: int) -> tuple[Tensor, ...]:
        heads = attn.numbers.num_heads
        return tuple(z.unflatten(-1, (heads, -1)) for z in y.chunk(parts, dim=-1))

    rewrite_attention(model, split=split)


def key_before_query(model: Model, _: Patch) -> None:
    """k, q, v: the order of T2T's performer; scores are transposed, biases are not."""

    def split(attn: Any, y: Tensor, parts: int) -> tuple[Tensor, ...]:
        first, *rest = by_head(attn, y, parts)
        return (rest[0], first, rest[1]) if parts == 3 else (first, *rest)

    rewrite_attention(model, split=split)


def bias_over_scale(model: Model, _: Patch) -> None:
    """vit-pytorch divides the biases by the scale; the official code does not."""
    rewrite_attention(model, scores=lambda attn, y, bias: y * attn.scale + bias / attn.scale)


def bias_not_over_scale(model: Model, _: Patch) -> None:
    """The official biases with vit-pytorch's weights."""
    rewrite_attention(model, scores=lambda attn, y, bias: y * attn.scale + bias)


def bias_inside_the_scale(model: Model, _: Patch) -> None:
    """(q·k + bias) · scale, as where one call takes the scale and the bias."""
    rewrite_attention(model, scores=lambda attn, y, bias: (y + bias) * attn.scale)


def offsets_by_columns_first(model: Model, _: Patch) -> None:
    """|columns| · side + |rows|: x before y, which only a table that is not symmetric shows."""

    def biases(table: Tensor, numbers: Any) -> Tensor:
        turned = table.unflatten(1, numbers.grid).transpose(1, 2).flatten(1)
        return levit.offset_biases(turned, numbers)

    rewrite_attention(model, biases=biases)


def offsets_of_the_shrunken_grid(model: Model, _: Patch) -> None:
    """|i_q − j_k| where queries are counted on their own grid: i_q must be twice that."""

    def biases(table: Tensor, numbers: Any) -> Tensor:
        rows, columns = (torch.arange(n) for n in numbers.grid)
        apart = [(n[: -(-len(n) // numbers.stride), None] - n).abs() for n in (rows, columns)]
        found = table.unflatten(1, numbers.grid)[:, apart[0]][..., apart[1]]
        return found.transpose(2, 3).flatten(3).flatten(1, 2)

    rewrite_attention(model, biases=biases)


def queries_from_the_second_token(model: Model, _: Patch) -> None:
    """Rows and columns 1, 3 …: what a stride with a wrong padding takes."""

    def queries(attn: Any, x: Tensor) -> Tensor:
        return x.unflatten(1, attn.numbers.grid)[:, 1::2, 1::2].flatten(1, 2)

    rewrite_attention(model, queries=queries)


def queries_averaged(model: Model, _: Patch) -> None:
    """Means over 2 x 2 tokens for every second one: the pooling of other networks."""

    def queries(attn: Any, x: Tensor) -> Tensor:
        x = x.unflatten(1, attn.numbers.grid).permute(0, 3, 1, 2)
        return F.avg_pool2d(x, 2).flatten(2).mT

    rewrite_attention(model, queries=queries)


def gelu_before_the_projection(model: Model, _: Patch) -> None:
    """vit-pytorch has GELU there; the official code has Hardswish."""
    rewrite_attention(model, activation=F.gelu)


def hardswish_before_the_projection(model: Model, _: Patch) -> None:
    """The official Hardswish with vit-pytorch's weights."""
    rewrite_attention(model, activation=F.hardswish)


def swish_before_the_projection(model: Model, _: Patch) -> None:
    """x·σ(x), of which Hardswish is the approximation."""
    rewrite_attention(model, activation=F.silu)


# --- faults: the rest ----------------------------------------------------------------------------


def norm_eps_of_keras(model: Model, _: Patch) -> None:
    """The default of ``keras.layers.BatchNormalization``, 1e-3."""
    for norm in modules(model, BatchNorm):
        norm.eps = 1e-3


def norm_of_the_batch(model: Model, _: Patch) -> None:
    """A model that was left in training mode: statistics of the batch for the running ones."""

    def forward(norm: Any, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y = F.batch_norm(flat, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)
        return y.reshape(x.shape)

    rewrite(modules(model, BatchNorm), forward)


def residual_where_the_grid_shrinks(model: Model, _: Patch) -> None:
    """A residual around the shrinking attention, its width made to fit by zeros; hand port."""

    def shrinking(block: Any, x: Tensor) -> Tensor:
        y = block.attn(x)
        kept = levit.subsample(x, block.attn.numbers)
        return y + F.pad(kept, (0, y.shape[-1] - kept.shape[-1]))

    rewrite_blocks(model, shrinking)


def activation_behind_the_stem(model: Model, _: Patch) -> None:
    """Hardswish behind the last convolution too: as in most networks."""
    rewrite_stem(model, lambda i, x: F.hardswish(x))


def stem_without_activations(model: Model, _: Patch) -> None:
    """vit-pytorch's stem has none."""
    rewrite_stem(model, lambda i, x: x)


def stem_with_activations(model: Model, _: Patch) -> None:
    """The official Hardswish in vit-pytorch's stem."""
    rewrite_stem(model, lambda i, x: F.hardswish(x) if i == 0 else x)


def same_padding(model: Model, _: Patch) -> None:
    """Zeros below and right alone: "same" of TensorFlow and JAX at an even size."""

    def forward(conv: Any, x: Tensor) -> Tensor:
        x = F.pad(x.permute(0, 3, 1, 2), (0, 1, 0, 1))
        return F.conv2d(x, conv.weight, conv.bias, stride=2).permute(0, 2, 3, 1)

    rewrite(modules(model, nn.Conv2d), forward)


def head_of_the_teacher_left_out(model: Model, _: Patch) -> None:
    """The classifier alone, as for a model without distillation."""
    rewrite_model(model, lambda model, x: (model.head(x.mean(1)), model.head_dist(x.mean(1)))[0])


def heads_added(model: Model, _: Patch) -> None:
    """The sum of both heads for their mean; the first in the ranking stays the same."""
    rewrite_model(model, lambda model, x: model.head(x.mean(1)) + model.head_dist(x.mean(1)))


FAULTS = (
    # fault, model, first module that is wrong
    Fault(split_by_kind, "levit", ATTN + ".proj.linear"),
    Fault(key_before_query, "levit", ATTN + ".proj.linear"),
    Fault(bias_over_scale, "levit", ATTN + ".proj.linear"),
    Fault(bias_not_over_scale, "levit_pytorch", ATTN + ".proj.linear"),
    Fault(bias_inside_the_scale, "levit", ATTN + ".proj.linear"),
    Fault(offsets_by_columns_first, "levit_square", ATTN + ".proj.linear"),
    Fault(offsets_of_the_shrunken_grid, "levit", DOWN + ".proj.linear"),
    Fault(queries_from_the_second_token, "levit", DOWN + ".q.linear"),
    Fault(queries_averaged, "levit_square", DOWN + ".q.linear"),
    Fault(gelu_before_the_projection, "levit", ATTN + ".proj.linear"),
    Fault(hardswish_before_the_projection, "levit_pytorch", ATTN + ".proj.linear"),
    Fault(swish_before_the_projection, "levit", ATTN + ".proj.linear"),
    Fault(norm_eps_of_keras, "levit", "stem.convs.0.norm"),
    Fault(norm_of_the_batch, "levit", "stem.convs.0.norm"),
    Fault(residual_where_the_grid_shrinks, "levit", "stages.1.downsample.mlp.fc1.linear"),
    Fault(activation_behind_the_stem, "levit", "stem"),
    Fault(stem_without_activations, "levit", "stem.convs.1.conv"),
    Fault(stem_with_activations, "levit_pytorch", "stem.convs.1"),
    Fault(same_padding, "levit", "stem.convs.0.conv"),
    Fault(head_of_the_teacher_left_out, "levit"),
    Fault(heads_added, "levit"),
)


# --- the same function, otherwise written --------------------------------------------------------


def attention_written_out(model: Model, _: Patch) -> None:
    """The scaffold with nothing exchanged."""
    rewrite_attention(model)


def blocks_written_out(model: Model, _: Patch) -> None:
    """The scaffold with nothing exchanged."""
    rewrite_blocks(model, lambda block, x: block.attn(x))


def stem_written_out(model: Model, _: Patch) -> None:
    """The scaffold with nothing exchanged."""
    rewrite_stem(model, lambda i, x: F.hardswish(x) if i == 0 else x)


def model_written_out(model: Model, _: Patch) -> None:
    """Half of the logits of each head."""

    def logits(model: Any, x: Tensor) -> Tensor:
        x = x.mean(1)
        return model.head(x) / 2 + model.head_dist(x) / 2

    rewrite_model(model, logits)


def biases_by_a_flat_index(model: Model, _: Patch) -> None:
    """One number for each offset, |rows| · columns + |columns|: the index of the official code."""

    def biases(table: Tensor, numbers: Any) -> Tensor:
        points = [(i, j) for i in range(numbers.grid[0]) for j in range(numbers.grid[1])]
        asking = [(i, j) for i, j in points if i % numbers.stride == j % numbers.stride == 0]
        index = [[abs(i - m) * numbers.grid[1] + abs(j - n) for m, n in points] for i, j in asking]
        return table[:, torch.tensor(index)]

    rewrite_attention(model, biases=biases)


def hardswish_by_relu6(model: Model, _: Patch) -> None:
    """x·relu6(x + 3) / 6, as JAX and Keras compute it."""
    rewrite_attention(model, activation=lambda x: x * F.relu6(x + 3) / 6)


HARMLESS = (
    Fault(attention_written_out, "levit"),
    Fault(attention_written_out, "levit_square"),
    Fault(attention_written_out, "levit_pytorch"),
    Fault(blocks_written_out, "levit"),
    Fault(stem_written_out, "levit"),
    Fault(model_written_out, "levit"),
    Fault(biases_by_a_flat_index, "levit"),
    Fault(hardswish_by_relu6, "levit"),
)


# --- faults that only a gradient shows -----------------------------------------------------------


def biases_kept(model: Model, _: Patch) -> None:
    """Biases looked up once for all images, as official code does at evaluation: no gradient."""
    rewrite_attention(model, biases=lambda table, n: levit.offset_biases(table.detach(), n))


def teacher_detached(model: Model, _: Patch) -> None:
    """A detach meant for the teacher's logits, set on the features of the student's head."""

    def logits(model: Any, x: Tensor) -> Tensor:
        x = x.mean(1)
        return (model.head(x) + model.head_dist(x.detach())) / 2

    rewrite_model(model, logits)


GRADIENT_FAULTS = (
    # fault, model, a gradient that is wrong, one that is right
    GradientFault(biases_kept, "levit", f"{ATTN}.attention_biases", f"{ATTN}.qkv.linear.kernel"),
    GradientFault(teacher_detached, "levit", "stem.convs.0.conv.kernel", "head.linear.kernel"),
)
