"""One set of weights in PyTorch and in Flax: how far apart are the logits of a photograph?

In one process for brevity. ``isovit.parity`` gives each backend a process of its own, and compares
activations and gradients as well.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import torch

import isovit
from isovit.parity.compare import error
from isovit.preprocess import load_images

PHOTOGRAPH = Path(__file__).with_name("chelsea.png")


def main() -> None:
    """Compare the logits in float32 and in float64."""
    config = isovit.config("t2t_vit_7")
    weights = isovit.init(config, seed=0)
    images = load_images(config, [PHOTOGRAPH])  # (batch, height, width, channels) in both
    torch.set_float32_matmul_precision("highest")  # TF32 is no float32
    jax.config.update("jax_default_matmul_precision", "highest")
    for dtype in ("float32", "float64"):
        in_torch = isovit.build(config, "torch", weights, dtype=dtype, device="cpu")
        in_flax = isovit.build(config, "flax", weights, dtype=dtype, device="cpu")
        with torch.inference_mode():
            a = in_torch(torch.tensor(images, dtype=getattr(torch, dtype))).numpy()
        b = jax.device_get(in_flax(jnp.asarray(images, dtype)))
        print(
            f"{dtype}: torch {a[0, :3]}, flax {b[0, :3]}, max|Δ|/max|reference| {error(a, b):.1e}"
        )
        assert error(a, b) < {"float32": 5e-6, "float64": 1e-12}[dtype]


if __name__ == "__main__":
    main()
