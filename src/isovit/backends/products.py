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
    pixels = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # (1, dim, tokens, 1)
    # Its strides say channels last: a compiled graph forgets those of the pixels, and transposes.
    kernel = weight[:, None, None, :].permute(0, 3, 1, 2)  # (dim_out, dim, 1, 1)
    y = F.conv2d(pixels, kernel, bias)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


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


ROWS = 1024
"""Queries whose weights are in memory at a time, where attention is multiplied here."""

WEIGHTS = 2**23
"""At most so many weights, 32 MiB."""

LONG = range(512, WEIGHTS // 512 + 1)
"""Numbers of tokens of which it is, for 512 queries and more: products of fewer rows are slow."""


def attention(
    q: Float[Tensor, "*batch queries dim"],
    k: Float[Tensor, "*batch tokens dim"],
    v: Float[Tensor, "*batch tokens dim"],
    scale: float,
    dropout_rate: float = 0.0,
) -> Float[Tensor, "*batch queries dim"]:
    """softmax(q·kᵀ · scale)·v, with dropout of the weights; arXiv:1706.03762, eq. 1.

    By torch's operator, which has a few rows of weights in memory at a time and multiplies by MKL.
    Where that is slow, long sequences are multiplied by ``linear``, the rows of one head after
    another; not for a gradient, which would keep all weights.
    """
    if dropout_rate > 0.0 or not _by_rows(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_rate, scale=scale)
    y = q.new_empty(*q.shape[:-1], v.shape[-1])
    count = min(ROWS, WEIGHTS // k.shape[-2])
    for head in product(*map(range, q.shape[:-2])):
        values = v[head].mT.contiguous()  # (dim, tokens)
        for start in range(0, q.shape[-2], count):
            rows = (*head, slice(start, start + count))
            scores = linear(q[rows] * scale, k[head], None)
            y[rows] = linear(torch.softmax(scores, dim=-1), values, None)
            del scores  # else there are two, with those of the next rows
    return y


def _by_rows(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether attention is faster by ``linear``; never in a graph, which would have each image."""
    tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    if tracing or torch.compiler.is_compiling():
        return False
    long = k.shape[-2] in LONG and q.shape[-2] >= LONG.start
    return long and convolves(q) and not any(x.requires_grad for x in (q, k, v))


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
