"""Products of matrices in torch: of the torch models, and of Keras's on that engine."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


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
    if not _convolves(x):
        return F.linear(x, weight, bias)
    pixels = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # (1, dim, tokens, 1)
    y = F.conv2d(pixels, weight[:, :, None, None], bias)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


def _convolves(x: Tensor) -> bool:
    """Whether a product with x is faster as a convolution; never in a graph that is exported."""
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
