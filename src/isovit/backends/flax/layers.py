"""The pre-norm transformer block and what families share around it, in Flax.

Source: Vaswani et al. 2017, arXiv:1706.03762; Dosovitskiy et al. 2021, arXiv:2010.11929, eq. 1-4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from isovit.backends import exporting
from isovit.spec.blocks import BlockConfig, TransformerConfig


def gelu(x: Array) -> Array:
    """x·Φ(x), exact. JAX's own goes by erfc, which takes XLA on a CPU three times as long."""
    return 0.5 * x * (1.0 + jax.lax.erf(x * 0.7071067811865476))


def quick_gelu(x: Array) -> Array:
    """x·σ(1.702 x); Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": quick_gelu,
    "hardswish": jax.nn.hard_swish,
}

# Two-pass variance: the fast one, E[x²] − E[x]², cancels where the mean is large.
LayerNorm = partial(nnx.LayerNorm, use_fast_variance=False)


ROWS = 512
"""Tokens whose attention weights are in memory at a time, where there are more tokens."""


class Linear(nnx.Linear):
    """x·W + b as a product of two matrices, whatever axes x has before its last.

    XLA on a CPU multiplies a (batch, tokens, dim) array image by image, and sums the gradient of b
    over two axes slowly; measured in docs/decisions/fast-paths.md.
    """

    def __call__(
        self, inputs: Float[Array, "... dim"], out_sharding: Any = None
    ) -> Float[Array, "... dim_out"]:
        x = inputs.reshape(-1, inputs.shape[-1])
        # What jax2onnx puts in place of Flax's own call takes x alone.
        y = super().__call__(x) if out_sharding is None else super().__call__(x, out_sharding)
        return y.reshape(*inputs.shape[:-1], self.out_features)


class Conv(nnx.Conv):
    """A convolution with any zeros around the image."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        kernel_size: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        use_bias: bool,
        groups: int = 1,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(
            in_dim,
            out_dim,
            kernel_size=kernel_size,
            strides=stride,
            padding=tuple((zeros, zeros) for zeros in padding),  # a list could not be hashed
            feature_group_count=groups,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    # ``nnx.capture`` sees the calls that a class has itself, not those that it inherits; and
    # jax2onnx puts a function of x alone in place of Flax's.
    def __call__(
        self, inputs: Float[Array, "batch height width dim"], out_sharding: Any = None
    ) -> Float[Array, "batch rows columns dim_out"]:
        return super().__call__(*((inputs,) if out_sharding is None else (inputs, out_sharding)))


class DepthwiseConv(Conv):
    """A convolution of each channel by itself."""

    def __init__(
        self,
        dim: int,
        *,
        kernel_size: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        use_bias: bool,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(
            dim,
            dim,
            kernel_size=kernel_size,
            stride=stride,
            padding=padding,
            use_bias=use_bias,
            groups=dim,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(
        self, inputs: Float[Array, "batch height width dim"], out_sharding: Any = None
    ) -> Float[Array, "batch rows columns dim"]:
        return super().__call__(inputs, out_sharding)


class BatchNorm(nnx.BatchNorm):
    """BatchNorm over the last axis; Ioffe & Szegedy 2015, arXiv:1502.03167, algorithm 1.

    ``momentum`` is the weight of a new batch in the running statistics, and the running variance is
    that of a sample, n / (n − 1) times the one that normalises the batch: as in PyTorch, where
    Flax has them the other way round.
    """

    def __init__(
        self,
        dim: int,
        *,
        epsilon: float,
        momentum: float,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(
            dim,
            axis=-1,
            momentum=1.0 - momentum,
            epsilon=epsilon,
            use_fast_variance=False,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        # Flax makes them float32 whatever is asked for: as it should for less, but not for more.
        kind = jnp.promote_types(param_dtype, jnp.float32)
        for statistic in (self.mean, self.var):
            statistic.set_value(statistic[...].astype(kind))

    def __call__(
        self,
        x: Float[Array, "... dim"],
        use_running_average: bool | None = None,
        *,
        mask: Array | None = None,
    ) -> Float[Array, "... dim"]:
        if exporting.get():  # jax2onnx takes the second axis for the channels
            assert self.scale is not None
            assert self.bias is not None
            scale = self.scale[...] / jnp.sqrt(self.var[...] + self.epsilon)
            return (x - self.mean[...]) * scale + self.bias[...]
        kept = self.momentum * self.var[...]
        y = super().__call__(x, use_running_average, mask=mask)
        if not self.use_running_average:
            samples = math.prod(x.shape[:-1])
            self.var[...] = kept + (self.var[...] - kept) * samples / (samples - 1)
        return y


def resample(
    x: Float[Array, "batch height width dim"], rows: np.ndarray, columns: np.ndarray
) -> Float[Array, "batch rows columns dim"]:
    """R X Cᵀ: along each axis of a map a matrix; see ``isovit.spec.resample``."""
    x = jnp.einsum("rh,bhwd->brwd", jnp.asarray(rows, x.dtype), x)
    return jnp.einsum("sw,brwd->brsd", jnp.asarray(columns, x.dtype), x)


def split_heads(
    x: Float[Array, "batch tokens width"], parts: int, num_heads: int
) -> tuple[Float[Array, "batch heads tokens head_dim"], ...]:
    """Products side by side, each with its heads side by side, as one array each."""
    x = x.reshape(*x.shape[:2], parts, num_heads, -1)
    return tuple(x.transpose(2, 0, 3, 1, 4))


def attention(
    q: Float[Array, "*batch queries dim"],
    k: Float[Array, "*batch tokens dim"],
    v: Float[Array, "*batch tokens dim"],
    scale: float,
    dropout: nnx.Dropout,
) -> Float[Array, "*batch queries dim"]:
    """softmax(q·kᵀ · scale)·v, with dropout of the weights; arXiv:1706.03762, eq. 1."""
    q, drops = q * scale, dropout.rate > 0.0 and not dropout.deterministic
    if exporting.get():
        return dropout(jax.nn.softmax(q @ k.mT, axis=-1)) @ v
    if q.shape[-2] <= ROWS or drops:
        return softmax_product(q @ k.mT, v, dropout)

    # A few rows of weights at a time, and again for the gradient: they are never whole in memory.
    def of_image(qkv: tuple[Array, ...]) -> Array:
        q, k, v = qkv  # (queries, dim) and twice (tokens, dim)
        of_row = jax.checkpoint(lambda q: softmax_product(q[None] @ k.mT, v, identity)[0])
        return jax.lax.map(of_row, q, batch_size=ROWS)

    qkv = tuple(x.reshape(-1, *x.shape[-2:]) for x in (q, k, v))
    one_by_one = jax.default_backend() == "cpu"
    y = jax.lax.map(of_image, qkv) if one_by_one else jax.vmap(of_image)(qkv)
    return y.reshape(*q.shape[:-1], v.shape[-1])


def softmax_product(scores: Array, v: Array, dropout: Callable[[Array], Array]) -> Array:
    """softmax(scores)·v; the weights are divided by their sums behind the product, at v's size."""
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    return (dropout(weights) @ v) / weights.sum(-1, keepdims=True)


def identity(x: Array) -> Array:
    """What stands where a config leaves a module out; JAX's own identity cannot be pickled."""
    return x


class Kinds(TypedDict):
    """What every module passes on to its parts: dtypes of computation and parameters, and keys."""

    dtype: DTypeLike
    param_dtype: DTypeLike
    rngs: nnx.Rngs


class Fixed(nnx.Variable):
    """A parameter that is stored but never trained; ``nnx.Param`` filters leave it out."""


class DropPath(nnx.Module):
    """Stochastic depth: a sample skips the branch with probability ``rate``; arXiv:1603.09382."""

    def __init__(self, rate: float, *, rngs: nnx.Rngs) -> None:
        self.dropout = nnx.Dropout(rate, broadcast_dims=(1, 2), rngs=rngs)

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        return self.dropout(x)


class LayerScale(nnx.Module):
    """A learned factor per channel; Touvron et al. 2021, arXiv:2103.17239, section 2."""

    def __init__(self, dim: int, init: float, *, param_dtype: DTypeLike) -> None:
        self.gamma = nnx.Param(jnp.full((dim,), init, param_dtype))

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        return x * self.gamma[...].astype(x.dtype)


class Attention(nnx.Module):
    """Multi-head self-attention, softmax(q·kᵀ · scale)·v; arXiv:1706.03762, eq. 1."""

    def __init__(
        self, config: BlockConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        linear = partial(Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.num_heads = config.num_heads
        self.scale = config.attn_scale
        self.qkv = linear(config.dim, 3 * config.inner_dim, use_bias=config.qkv_bias)
        self.attn_dropout = nnx.Dropout(config.attn_dropout_rate, rngs=rngs)
        self.proj = (
            linear(config.inner_dim, config.dim, use_bias=True) if config.attn_proj else None
        )
        self.proj_dropout = nnx.Dropout(config.dropout_rate if config.attn_proj else 0.0, rngs=rngs)

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        batch, tokens, _ = x.shape
        # each (batch, heads, tokens, head_dim)
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        x = attention(q, k, v, self.scale, self.attn_dropout)
        x = x.swapaxes(1, 2).reshape(batch, tokens, -1)  # (batch, tokens, heads * head_dim)
        if self.proj is not None:
            x = self.proj(x)
        return self.proj_dropout(x)


class Mlp(nnx.Module):
    """Dense, activation, dense; arXiv:1706.03762, eq. 2."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        activation: str,
        dropout_rate: float,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        linear = partial(Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.fc1 = linear(dim, hidden_dim, use_bias=True)
        self.activation = ACTIVATIONS[activation]
        self.dropout1 = nnx.Dropout(dropout_rate, rngs=rngs)
        self.fc2 = linear(hidden_dim, dim, use_bias=True)
        self.dropout2 = nnx.Dropout(dropout_rate, rngs=rngs)

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        x = self.dropout1(self.activation(self.fc1(x)))
        return self.dropout2(self.fc2(x))


class Block(nnx.Module):
    """Pre-norm block; arXiv:2010.11929, eq. 2 and 3, with stochastic depth and LayerScale.

    ``attn`` maps (batch, tokens, dim) to the same; None for attention over all tokens. So does
    ``mlp``; None for one product, the activation, another product.
    """

    def __init__(
        self,
        config: BlockConfig,
        attn: nnx.Module | None = None,
        mlp: nnx.Module | None = None,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        dim, scale, rate = config.dim, config.layer_scale_init, config.drop_path_rate
        kinds = Kinds(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.norm1 = LayerNorm(dim, epsilon=config.norm_eps, **kinds)
        self.attn = Attention(config, **kinds) if attn is None else attn
        self.layer_scale1 = (
            identity if scale is None else LayerScale(dim, scale, param_dtype=param_dtype)
        )
        self.drop_path1 = DropPath(rate, rngs=rngs)
        self.norm2 = LayerNorm(dim, epsilon=config.norm_eps, **kinds)
        self.mlp = (
            Mlp(dim, config.mlp_dim, config.activation, config.dropout_rate, **kinds)
            if mlp is None
            else mlp
        )
        self.layer_scale2 = (
            identity if scale is None else LayerScale(dim, scale, param_dtype=param_dtype)
        )
        self.drop_path2 = DropPath(rate, rngs=rngs)

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        x = x + self.drop_path1(self.layer_scale1(self.attn(self.norm1(x))))
        x = x + self.drop_path2(self.layer_scale2(self.mlp(self.norm2(x))))
        return x


def pool(x: Float[Array, "batch tokens dim"], config: TransformerConfig) -> Array:
    """Tokens to features: (batch, dim), or every token where ``config.pool`` is ``none``."""
    match config.pool:
        case "cls":
            return x[:, 0]
        case "mean":
            return x.mean(axis=1)
        case "mean_patches":
            return x[:, config.prefix_tokens :].mean(axis=1)
        case "none":
            return x
