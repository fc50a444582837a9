"""The official TokenLearner in NumPy and float64, over its Flax parameters: an independent oracle.

The official code (google-research/scenic ``projects/token_learner``, Apache-2.0) is on no package
index. This is written from a description of what it computes and of its names, not from the models
or the tables of isovit. Embedding and blocks are those of big_vision's ViT, whose submodules are
numbered alike; the learned tokens are weighted sums, place after place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from parity_tests.oracles.google import (
    BIG_VISION,
    PARTS,
    Array,
    below,
    block,
    dense,
    embed,
    gelu,
    layer_norm,
)

Arrays = Mapping[str, Array]
BOTTLENECK = 64  # of every ``token_masking``, whatever else is asked for


@dataclass(frozen=True)
class Sizes:
    """Arguments of the original's constructor, as far as shapes depend on them.

    Attributes:
        patches: height and width of a patch.
        grid: rows and columns of patches; v1 takes a square one alone.
        channels: of the image.
        hidden_size: width of the tokens.
        num_layers: blocks.
        num_heads: of the attention.
        mlp_dim: hidden width of the MLP.
        num_tokens: learned ones.
        tokenlearner_loc: index of the block before which they are learned.
        use_tokenfuse: whether they are fused again.
        use_v11: which of the two modules learns them.
        num_classes: width of the head.
    """

    patches: tuple[int, int]
    grid: tuple[int, int]
    channels: int
    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    num_tokens: int
    tokenlearner_loc: int
    use_tokenfuse: bool
    use_v11: bool
    num_classes: int

    @property
    def learner(self) -> str:
        """Class name of the module that learns tokens, with which its parameters are named."""
        return "TokenLearnerModuleV11" if self.use_v11 else "TokenLearnerModule"

    @property
    def learns(self) -> range:
        """Indices of the blocks before which tokens are learned."""
        end = self.num_layers if self.use_tokenfuse else self.tokenlearner_loc + 1
        return range(self.tokenlearner_loc, end)


def logits(sizes: Sizes, arrays: Arrays, images: Array) -> Array:
    """The original's answer to (batch, height, width, channels) images, in float64."""
    params = {name: array.astype(np.float64) for name, array in arrays.items()}
    encoder = below(params, "Transformer")
    x = embed(params, images.astype(np.float64)) + encoder["posembed_input/pos_embedding"]
    for i in range(sizes.num_layers):
        residual = x
        if i in sizes.learns:
            j = i - sizes.tokenlearner_loc
            learn: Callable[[Arrays, Array], Array] = learn_v11 if sizes.use_v11 else learn_v1
            x = learn(below(encoder, f"{sizes.learner}_{j}"), x)
        x = block(BIG_VISION, below(encoder, f"encoderblock_{i}"), x)
        if i in sizes.learns and sizes.use_tokenfuse:
            j = i - sizes.tokenlearner_loc
            x = residual + fuse(below(encoder, f"TokenFuser_{j}"), x, residual)
    x = layer_norm(below(encoder, "encoder_norm"), x).mean(axis=1)
    return dense(below(params, "output_projection"), x)


def learn_v1(params: Arrays, x: Array) -> Array:
    """Maps by four convolutions and a sigmoid; sums of the tokens as they came."""
    batch, places, _ = x.shape
    side = math.isqrt(places)
    image = layer_norm(below(params, "LayerNorm_0"), x).reshape(batch, side, side, -1)
    for i in range(4):
        image = same_conv(params[f"Conv_{i}/kernel"], image)
        image = gelu(image) if i < 3 else image
    return weighted(sigmoid(image.reshape(batch, places, -1)), x)


def learn_v11(params: Arrays, x: Array) -> Array:
    """Maps by an MLP and a softmax over the places; sums of the tokens as they came."""
    scores = mlp(below(params, "token_masking"), layer_norm(below(params, "LayerNorm_0"), x))
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weighted(powers / powers.sum(axis=1, keepdims=True), x)


def fuse(params: Arrays, tokens: Array, grid: Array) -> Array:
    """Tokens that are mixed among themselves, then for each place the sum that it asks for."""
    tokens = layer_norm(below(params, "fuser_mix_norm1"), tokens)
    kernel, bias = params["Dense_0/kernel"], params["Dense_0/bias"]
    mixed = np.einsum("btd,tu->bud", tokens, kernel) + bias[None, :, None]
    mixed = layer_norm(below(params, "fuser_mix_norm2"), mixed)
    normed = layer_norm(below(params, "LayerNorm_0"), grid)
    shares = sigmoid(mlp(below(params, "token_masking"), normed))
    return np.einsum("bpt,btd->bpd", shares, mixed)


def weighted(maps: Array, x: Array) -> Array:
    """(batch, tokens, dim): sums of (batch, places, dim) by (batch, places, tokens) maps."""
    return sum(maps[:, place, :, None] * x[:, place, None] for place in range(x.shape[1]))


def same_conv(kernel: Array, x: Array) -> Array:
    """A convolution of stride 1 with as many zeros around as keep the size; no bias."""
    height, width, _, out_dim = kernel.shape
    padded = np.pad(x, ((0, 0), (height // 2,) * 2, (width // 2,) * 2, (0, 0)))
    y = np.zeros((*x.shape[:3], out_dim))
    for i, j in np.ndindex(height, width):
        y += padded[:, i : i + x.shape[1], j : j + x.shape[2]] @ kernel[i, j]
    return y


def mlp(params: Arrays, x: Array) -> Array:
    """Two products with a GELU between."""
    return dense(below(params, "Dense_1"), gelu(dense(below(params, "Dense_0"), x)))


def sigmoid(x: Array) -> Array:
    """The logistic function."""
    return 1 / (1 + np.exp(-x))


# What the files hold


def shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Every key of a file with the shape that it has there."""
    dim, tokens = sizes.hidden_size, sizes.num_tokens
    found: dict[str, tuple[int, ...]] = {
        "embedding/kernel": (*sizes.patches, sizes.channels, dim),
        "embedding/bias": (dim,),
        "Transformer/posembed_input/pos_embedding": (1, math.prod(sizes.grid), dim),
        **of_norm("Transformer/encoder_norm", dim),
        **of_dense("output_projection", dim, sizes.num_classes),
    }
    for i in range(sizes.num_layers):
        found |= of_block(f"Transformer/encoderblock_{i}", sizes)
    for j in range(len(sizes.learns)):
        path = f"Transformer/{sizes.learner}_{j}"
        found |= of_norm(f"{path}/LayerNorm_0", dim)
        if sizes.use_v11:
            found |= of_mlp(f"{path}/token_masking", dim, BOTTLENECK, tokens)
        else:
            widths = [dim, tokens, tokens, tokens]
            found |= {f"{path}/Conv_{i}/kernel": (3, 3, n, tokens) for i, n in enumerate(widths)}
        if sizes.use_tokenfuse:
            path = f"Transformer/TokenFuser_{j}"
            for norm in ("fuser_mix_norm1", "fuser_mix_norm2", "LayerNorm_0"):
                found |= of_norm(f"{path}/{norm}", dim)
            found |= of_dense(f"{path}/Dense_0", tokens, tokens)
            found |= of_mlp(f"{path}/token_masking", dim, BOTTLENECK, tokens)
    return found


def of_block(path: str, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Of a transformer block."""
    dim, heads = sizes.hidden_size, sizes.num_heads
    found = of_norm(f"{path}/LayerNorm_0", dim) | of_norm(f"{path}/LayerNorm_1", dim)
    found |= of_mlp(f"{path}/MlpBlock_0", dim, sizes.mlp_dim, dim)
    attention = f"{path}/{BIG_VISION.attention}"
    for part in ("query", "key", "value"):
        found[f"{attention}/{part}/kernel"] = (dim, heads, dim // heads)
        found[f"{attention}/{part}/bias"] = (heads, dim // heads)
    found[f"{attention}/out/kernel"] = (heads, dim // heads, dim)
    found[f"{attention}/out/bias"] = (dim,)
    return found


def of_norm(path: str, dim: int) -> dict[str, tuple[int, ...]]:
    """Of a LayerNorm."""
    return {f"{path}/scale": (dim,), f"{path}/bias": (dim,)}


def of_dense(path: str, in_dim: int, out_dim: int) -> dict[str, tuple[int, ...]]:
    """Of a product with bias."""
    return {f"{path}/kernel": (in_dim, out_dim), f"{path}/bias": (out_dim,)}


def of_mlp(path: str, in_dim: int, hidden: int, out_dim: int) -> dict[str, tuple[int, ...]]:
    """Of two products."""
    first = of_dense(f"{path}/Dense_0", in_dim, hidden)
    return first | of_dense(f"{path}/Dense_1", hidden, out_dim)


def random_arrays(sizes: Sizes, seed: int = 0) -> dict[str, Array]:
    """Arrays under which every parameter shows, float32."""
    rng = np.random.default_rng(seed)
    arrays: dict[str, Array] = {}
    for name, shape in shapes(sizes).items():
        fan_in = math.prod(shape[:-2] if name.endswith(PARTS) else shape[:-1])
        std = fan_in**-0.5 if name.endswith("kernel") else 0.2
        noise = std * rng.standard_normal(shape)
        arrays[name] = (float(name.endswith("scale")) + noise).astype(np.float32)
    return arrays
