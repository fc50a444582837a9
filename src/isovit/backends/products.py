"""Products of matrices, and attention, in torch: of its models, and of Keras's on that engine."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from isovit.spec.families.t2t_vit import SoftSplit


def linear(
    x: Float[Tensor, "... dim"],
    weight: Float[Tensor, "dim_out dim"],
    bias: Float[Tensor, " dim_out"] | None,
) -> Float[Tensor, "... dim_out"]:
    """x·Wᵀ + b.

    In float32, on a processor of AMD's, a product is written as the convolution of one pixel: torch
    multiplies by MKL, which is slow there, and convolves by oneDNN. Measured in
    docs/decisions/fast-paths.md.
    """
    if not convolves(x):
        return F.linear(x, weight, bias)
    y = _convolve(x.reshape(-1, x.shape[-1]), weight, bias)
    return y.reshape(*x.shape[:-1], -1)


def patch_linear(
    x: Float[Tensor, "batch rows columns dim"],
    weight: Float[Tensor, "dim_out patch"],
    bias: Float[Tensor, " dim_out"],
    split: SoftSplit,
) -> Float[Tensor, "batch tokens dim_out"]:
    """x·Wᵀ + b of every patch x, flattened as (channel, height, width), as a convolution.

    Then the patches are never written; measured in docs/decisions/fast-paths.md. For x that
    ``convolves``: elsewhere a convolution may round what a product does not, as on CUDA to TF32.
    """
    side, stride, padding = split
    kernel = weight.unflatten(1, (-1, side, side))  # (dim_out, dim, side, side)
    y = F.conv2d(x.permute(0, 3, 1, 2), kernel, bias, stride=stride, padding=padding)
    return y.flatten(2).mT  # (batch, tokens, dim_out)


def linear_of_heads(
    x: Float[Tensor, "tokens heads dim"], weight: Float[Tensor, "heads dim_out dim"]
) -> Float[Tensor, "tokens heads dim_out"]:
    """x·Wᵀ of each head, by its own W: the heads are the groups of a convolution."""
    y = _convolve(x.flatten(1), weight.flatten(0, 1), None, groups=x.shape[1])
    return y.unflatten(1, (x.shape[1], -1))


def _convolve(
    x: Float[Tensor, "tokens width"],
    weight: Float[Tensor, "dim_out dim"],
    bias: Float[Tensor, " dim_out"] | None,
    groups: int = 1,
) -> Float[Tensor, "tokens dim_out"]:
    """x·Wᵀ + b as a convolution of one pixel; with groups, of each part of x by its rows of W."""
    pixels = x[None, :, None, :].permute(0, 3, 1, 2)  # (1, width, tokens, 1)
    # Its strides say channels last: a compiled graph forgets those of the pixels, and transposes.
    kernel = weight[:, None, None, :].permute(0, 3, 1, 2)  # (dim_out, dim, 1, 1)
    y = F.conv2d(pixels, kernel, bias, groups=groups)
    return y.permute(0, 2, 3, 1).reshape(len(x), -1)


WEIGHTS = 2**22
"""So many weights of attention are in memory at a time, 16 MiB. What is larger than 32 is asked of
the system anew each time."""

ROWS = 384
"""At least so many rows of one head's weights, however long: of fewer a product is half as fast."""

SOFTMAX_ROWS = 64
"""A softmax is of so many rows at a time, and goes into their place: memory for that of a whole
piece would be new, and filled with zeros page by page."""

TOKENS = range(96, 2**14 + 1)
"""Numbers of tokens for which attention is multiplied here. Of fewer its products are too small,
and of more so many rows take too much memory."""


def attention(
    q: Float[Tensor, "*batch queries dim"],
    k: Float[Tensor, "*batch tokens dim"],
    v: Float[Tensor, "*batch tokens dim"],
    scale: float,
    dropout_rate: float = 0.0,
) -> Float[Tensor, "*batch queries dim"]:
    """softmax(q·kᵀ · scale)·v, with dropout of the weights; arXiv:1706.03762, eq. 1.

    By torch's operator, which has a few rows of weights in memory at a time and multiplies by MKL.
    Where that is slow, some heads after another are multiplied as convolutions, and of a long
    sequence some rows; not for a gradient, which would keep all weights.
    """
    if dropout_rate > 0.0 or not _by_heads(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_rate, scale=scale)
    images = max(1, WEIGHTS // (q[0].numel() // q.shape[-1] * k.shape[-2]))
    if len(q) <= images:
        return _attend(q, k, v, scale)
    y = q.new_empty(*q.shape[:-1], v.shape[-1])
    for image in range(0, len(q), images):
        some = slice(image, image + images)
        y[some] = _attend(q[some], k[some], v[some], scale)
    return y


def _attend(
    q: Float[Tensor, "*batch queries dim"],
    k: Float[Tensor, "*batch tokens dim"],
    v: Float[Tensor, "*batch tokens dim"],
    scale: float,
) -> Float[Tensor, "*batch queries dim"]:
    """Attention in some images, by as many heads at a time as can be, and else by rows of one."""
    queries = q.movedim(-2, 0).flatten(1, -2)  # (queries, heads, dim)
    keys = (k * scale).flatten(0, -3)  # (heads, tokens, dim)
    values = v.mT.flatten(0, -3).contiguous()  # (heads, dim, tokens), not copied for each piece
    y = queries.new_empty(*queries.shape[:2], v.shape[-1])
    heads = min(len(keys), max(1, WEIGHTS // (q.shape[-2] * k.shape[-2])))
    rows = max(ROWS, WEIGHTS // (heads * k.shape[-2]))
    for head, row in product(range(0, len(keys), heads), range(0, len(y), rows)):
        some, these = slice(head, head + heads), slice(row, row + rows)
        scores = linear_of_heads(queries[these, some], keys[some])  # (rows, heads, tokens)
        for few in scores.split(SOFTMAX_ROWS):
            few.copy_(torch.softmax(few, dim=-1))
        y[these, some] = linear_of_heads(scores, values[some])
        del scores  # else there are two, with those of the next piece
    return y.unflatten(1, q.shape[:-2]).movedim(0, -2)


def _by_heads(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether attention is faster as convolutions; never in a graph, which would have each image.

    With AVX2 alone they are no faster than MKL, which takes no more than that of AMD's processors.
    """
    tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    if tracing or torch.compiler.is_compiling():
        return False
    fits = k.shape[-2] in TOKENS and q.shape[-2] >= TOKENS.start
    here = fits and WIDE_VECTORS and convolves(q)
    return here and not any(x.requires_grad for x in (q, k, v))


def convolves(x: Tensor) -> bool:
    """Whether products with x are faster as convolutions; never in a graph that is exported."""
    here = MKL_IS_SLOW and x.device.type == "cpu" and x.dtype == torch.float32
    return here and not torch.compiler.is_exporting()


def _maker_is_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # another system than Linux
        return False


MKL_IS_SLOW = (
    torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available() and _maker_is_amd()
)
"""Whether torch has both libraries, on a processor for which MKL is not made."""

WIDE_VECTORS = torch.backends.cpu.get_cpu_capability() == "AVX512"
"""Whether the processor has AVX-512."""
