"""The pre-norm transformer block and what families share around it, in Keras.

Source: Vaswani et al. 2017, arXiv:1706.03762; Dosovitskiy et al. 2021, arXiv:2010.11929, eq. 1-4.

Every layer carries the name of its attribute, and an item of a list ``name_index``, so that the
path of a parameter follows from its canonical path on every engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import keras
import numpy as np
from jaxtyping import Float
from keras import ops

from isovit.backends import exporting
from isovit.backends.keras.idle import Dropout, Identity, Idle
from isovit.backends.keras.initializers import glorot
from isovit.spec.blocks import BlockConfig, TransformerConfig
from isovit.spec.config import config_from_dict

Tensor = Any  # of whichever engine runs
Shape = tuple[int | None, ...]
DType = str | keras.DTypePolicy | None


def gelu(x: Tensor) -> Tensor:
    """x·Φ(x), exact. Keras's own loses half of float64 on TensorFlow, and goes by erfc on JAX."""
    if keras.backend.backend() == "torch":  # which has an operator for all of it
        return ops.gelu(x, approximate=False)
    return 0.5 * x * (1.0 + ops.erf(x * 0.7071067811865476))


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation; Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2."""
    if keras.backend.backend() == "torch":
        return ops.gelu(x, approximate=True)
    return 0.5 * x * (1.0 + ops.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))


def quick_gelu(x: Tensor) -> Tensor:
    """x·σ(1.702 x); Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2."""
    return x * ops.sigmoid(1.702 * x)


def hardswish(x: Tensor) -> Tensor:
    """x·relu6(x + 3) / 6; Howard et al. 2019, arXiv:1905.02244, section 5.2."""
    return x * ops.relu6(x + 3.0) / 6.0


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "hardswish": hardswish,
}


class Linear(keras.layers.Dense):
    """x·W + b as a product of two matrices, whatever axes x has before its last.

    XLA on a CPU multiplies a (batch, tokens, dim) array image by image, which can take half as long
    again; on torch, Keras's own adds b in a step of its own, and multiplies by a library that is
    slow on some processors. Measured in docs/decisions/fast-paths.md.
    """

    def __init__(self, units: int, *, use_bias: bool, name: str, dtype: DType = None) -> None:
        super().__init__(
            units, use_bias=use_bias, kernel_initializer=glorot(), name=name, dtype=dtype
        )

    def build(self, input_shape: Shape) -> None:
        super().build(input_shape)
        if keras.backend.backend() == "torch":  # whose products read Wᵀ, row by row
            variable: Any = self.kernel
            variable.value.data = variable.value.data.t().contiguous().t()

    def call(
        self, inputs: Float[Tensor, "... dim"], training: bool | None = None
    ) -> Float[Tensor, "... dim_out"]:
        if keras.backend.backend() == "torch":
            from isovit.backends import products

            weight: Tensor = ops.transpose(self.kernel)
            bias: Tensor = None if self.bias is None else ops.convert_to_tensor(self.bias)
            return products.linear(inputs, weight, bias)
        y = super().call(ops.reshape(inputs, (-1, inputs.shape[-1])), training=training)
        return ops.reshape(y, (-1, *inputs.shape[1:-1], self.units))


class Conv(keras.layers.Conv2D):
    """A convolution with any zeros around the image, where Keras has none or as many as fit."""

    def __init__(
        self,
        dim: int,
        *,
        kernel_size: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        use_bias: bool,
        groups: int = 1,
        name: str,
        dtype: DType = None,
    ) -> None:
        super().__init__(
            dim,
            kernel_size=kernel_size,
            strides=stride,
            padding="valid",
            data_format="channels_last",
            groups=groups,
            use_bias=use_bias,
            kernel_initializer=glorot(),
            name=name,
            dtype=dtype,
        )
        self.zeros = padding

    def compute_output_shape(self, input_shape: Shape) -> Any:
        return super().compute_output_shape(padded_shape(input_shape, self.zeros))

    def convolution_op(self, inputs: Tensor, kernel: Tensor) -> Tensor:
        """Groups of one channel, which TensorFlow gives to XLA, as operators that ONNX has."""
        stride, across = self.strides
        alone = self.groups == inputs.shape[-1] > 1 and stride == across
        if not (exporting.get() and alone):
            return super().convolution_op(inputs, kernel)
        kernel = ops.reshape(kernel, (*self.kernel_size, self.groups, -1))
        return ops.depthwise_conv(inputs, kernel, strides=stride, padding="valid")

    def call(
        self, inputs: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch rows columns dim_out"]:
        return super().call(pad(inputs, self.zeros))


class DepthwiseConv(keras.layers.DepthwiseConv2D):
    """A convolution of each channel by itself, with any zeros around the image."""

    def __init__(
        self,
        *,
        kernel_size: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        use_bias: bool,
        name: str,
        dtype: DType = None,
    ) -> None:
        super().__init__(
            kernel_size=kernel_size,
            strides=stride,
            padding="valid",
            data_format="channels_last",
            use_bias=use_bias,
            depthwise_initializer=glorot(),
            name=name,
            dtype=dtype,
        )
        self.zeros = padding

    def compute_output_shape(self, input_shape: Shape) -> Any:
        return super().compute_output_shape(padded_shape(input_shape, self.zeros))

    def call(
        self, inputs: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch rows columns dim"]:
        return super().call(pad(inputs, self.zeros))


def padded_shape(shape: Shape, padding: tuple[int, int]) -> Shape:
    """Of what ``pad`` returns; ``build`` asks whether a kernel fits it."""
    batch, *size, dim = shape
    height, width = (n and n + 2 * zeros for n, zeros in zip(size, padding, strict=True))
    return batch, height, width, dim


def pad(x: Float[Tensor, "batch height width dim"], padding: tuple[int, int]) -> Tensor:
    """Zeros above and below, and left and right, of an image."""
    (rows, columns) = padding
    return ops.pad(x, ((0, 0), (rows, rows), (columns, columns), (0, 0))) if any(padding) else x


class BatchNorm(keras.layers.BatchNormalization):
    """BatchNorm over the last axis; Ioffe & Szegedy 2015, arXiv:1502.03167, algorithm 1.

    ``momentum`` is the weight of a new batch in the running statistics, and the running variance is
    that of a sample, n / (n − 1) times the one that normalises the batch: as in PyTorch, where
    Keras has them the other way round.
    """

    def __init__(self, *, epsilon: float, momentum: float, name: str, dtype: DType = None) -> None:
        super().__init__(
            axis=-1,
            momentum=1.0 - momentum,
            epsilon=epsilon,
            center=True,
            scale=True,
            name=name,
            dtype=dtype,
        )

    def call(
        self, inputs: Float[Tensor, "... dim"], training: bool | None = None, mask: Any = None
    ) -> Float[Tensor, "... dim"]:
        variance = self.moving_variance
        assert variance is not None
        kept = ops.convert_to_tensor(variance) * self.momentum
        y = super().call(inputs, training=training, mask=mask)
        if training and self.trainable:
            samples = ops.cast(ops.size(inputs) // inputs.shape[-1], variance.dtype)
            variance.assign(kept + (variance - kept) * samples / (samples - 1))
        return y


def resample(
    x: Float[Tensor, "batch height width dim"], rows: np.ndarray, columns: np.ndarray
) -> Float[Tensor, "batch rows columns dim"]:
    """R X Cᵀ: along each axis of a map a matrix; see ``isovit.spec.resample``."""
    x = ops.einsum("rh,bhwd->brwd", ops.convert_to_tensor(rows, dtype=x.dtype), x)
    return ops.einsum("sw,brwd->brsd", ops.convert_to_tensor(columns, dtype=x.dtype), x)


def split_heads(
    x: Float[Tensor, "batch tokens width"], parts: int, num_heads: int
) -> tuple[Float[Tensor, "batch heads tokens head_dim"], ...]:
    """Products side by side, each with its heads side by side, as one array each."""
    _, tokens, width = x.shape
    x = ops.reshape(x, (-1, tokens, parts, num_heads, width // (parts * num_heads)))
    x = ops.transpose(x, (2, 0, 3, 1, 4))
    return tuple(x[i] for i in range(parts))


ROWS = 512
"""Tokens whose attention weights are in memory at a time, where there are more tokens."""


def attention(
    q: Float[Tensor, "batch heads queries dim"],
    k: Float[Tensor, "batch heads tokens dim"],
    v: Float[Tensor, "batch heads tokens dim"],
    scale: float,
    dropout: Dropout,
    training: bool | None,
) -> Float[Tensor, "batch heads queries dim"]:
    """softmax(q·kᵀ · scale)·v, with dropout of the weights; arXiv:1706.03762, eq. 1."""
    drops = training and dropout.rate > 0
    if exporting.get():
        weights = ops.softmax(ops.matmul(q * scale, ops.swapaxes(k, -2, -1)), axis=-1)
        return ops.matmul(dropout(weights, training=training), v)
    if keras.backend.backend() == "torch" and not drops:  # which has an operator for all of it
        from isovit.backends import products

        return products.attention(q, k, v, scale)
    q, queries = q * scale, q.shape[-2]
    if queries <= ROWS or drops:
        scores = ops.matmul(q, ops.swapaxes(k, -2, -1))
        return softmax_product(scores, v, lambda weights: dropout(weights, training=training))

    # A few rows of weights at a time: they are never whole in memory.
    def of_image(qkv: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        q, k, v = qkv  # (queries, dim) and twice (tokens, dim)
        k = ops.transpose(k)
        rows = [q[i : i + ROWS] for i in range(0, queries, ROWS)]
        return ops.concatenate([softmax_product(ops.matmul(q, k), v) for q in rows], axis=0)

    qkv = tuple(ops.reshape(x, (-1, *x.shape[-2:])) for x in (q, k, v))
    over_images = ops.vectorized_map if _has_accelerator() else ops.map
    return ops.reshape(over_images(of_image, qkv), (-1, *q.shape[1:-1], v.shape[-1]))


def softmax_product(
    scores: Tensor, v: Tensor, dropout: Callable[[Tensor], Tensor] = lambda weights: weights
) -> Tensor:
    """softmax(scores)·v; the weights are divided by their sums behind the product, at v's size."""
    weights = ops.exp(scores - ops.stop_gradient(ops.max(scores, axis=-1, keepdims=True)))
    return ops.matmul(dropout(weights), v) / ops.sum(weights, axis=-1, keepdims=True)


def _has_accelerator() -> bool:
    return any(not name.startswith("cpu") for name in keras.distribution.list_devices())


def layer_norm(eps: float, *, name: str, dtype: DType) -> keras.layers.LayerNormalization:
    """LayerNorm over the last axis, with scale and bias."""
    return keras.layers.LayerNormalization(
        axis=-1, epsilon=eps, center=True, scale=True, name=name, dtype=dtype
    )


def constant(value: np.ndarray) -> Callable[..., Tensor]:
    """Initialiser of a table that does not train."""
    return lambda shape, dtype=None: ops.convert_to_tensor(value, dtype=dtype)


class DropPath(Idle):
    """Stochastic depth: a sample skips the branch with probability ``rate``; arXiv:1603.09382."""

    def __init__(self, rate: float, *, name: str, dtype: DType = None) -> None:
        super().__init__(name=name, dtype=dtype)
        self.rate = rate
        self.dropout = Dropout(
            rate, noise_shape=(None, 1, 1), name="dropout", dtype=self.dtype_policy
        )
        self.built = True  # else Keras runs a model through symbols before each step of training

    def call(
        self, x: Float[Tensor, "batch tokens dim"], training: bool | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        return self.dropout(x, training=training)


class LayerScale(keras.layers.Layer):
    """A learned factor per channel; Touvron et al. 2021, arXiv:2103.17239, section 2."""

    def __init__(self, init: float, *, name: str, dtype: DType = None) -> None:
        super().__init__(name=name, dtype=dtype)
        self.init = init

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        initializer = keras.initializers.Constant(self.init)
        self.gamma = self.add_weight(
            shape=(input_shape[-1],), initializer=initializer, name="gamma"
        )

    def call(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        return x * self.gamma


class Attention(keras.layers.Layer):
    """Multi-head self-attention, softmax(q·kᵀ · scale)·v; arXiv:1706.03762, eq. 1."""

    def __init__(self, config: BlockConfig, *, name: str, dtype: DType = None) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype = self.dtype_policy
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.scale = config.attn_scale
        self.qkv = Linear(3 * config.inner_dim, use_bias=config.qkv_bias, name="qkv", dtype=dtype)
        self.attn_dropout = Dropout(config.attn_dropout_rate, name="attn_dropout", dtype=dtype)
        self.proj = (
            Linear(config.dim, use_bias=True, name="proj", dtype=dtype)
            if config.attn_proj
            else None
        )
        self.proj_dropout = Dropout(
            config.dropout_rate if config.attn_proj else 0.0, name="proj_dropout", dtype=dtype
        )

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.qkv.build(input_shape)
        if self.proj is not None:
            self.proj.build((*input_shape[:-1], self.num_heads * self.head_dim))

    def call(
        self, x: Float[Tensor, "batch tokens dim"], training: bool | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        tokens = x.shape[1]
        # each (batch, heads, tokens, head_dim)
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        x = attention(q, k, v, self.scale, self.attn_dropout, training)
        x = ops.swapaxes(x, 1, 2)  # (batch, tokens, heads, head_dim)
        x = ops.reshape(x, (-1, tokens, self.num_heads * self.head_dim))
        if self.proj is not None:
            x = self.proj(x)
        return self.proj_dropout(x, training=training)


class Mlp(keras.layers.Layer):
    """Dense, activation, dense; arXiv:1706.03762, eq. 2."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        activation: str,
        dropout_rate: float,
        *,
        name: str,
        dtype: DType = None,
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype = self.dtype_policy
        self.hidden_dim = hidden_dim
        self.fc1 = Linear(hidden_dim, use_bias=True, name="fc1", dtype=dtype)
        self.activation = ACTIVATIONS[activation]
        self.dropout1 = Dropout(dropout_rate, name="dropout1", dtype=dtype)
        self.fc2 = Linear(dim, use_bias=True, name="fc2", dtype=dtype)
        self.dropout2 = Dropout(dropout_rate, name="dropout2", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.fc1.build(input_shape)
        self.fc2.build((*input_shape[:-1], self.hidden_dim))

    def call(
        self, x: Float[Tensor, "batch tokens dim"], training: bool | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        x = self.dropout1(self.activation(self.fc1(x)), training=training)
        return self.dropout2(self.fc2(x), training=training)


class Block(keras.layers.Layer):
    """Pre-norm block; arXiv:2010.11929, eq. 2 and 3, with stochastic depth and LayerScale.

    ``attn``, a layer of that name, maps (batch, tokens, dim) to the same; None for attention over
    all tokens. So does ``mlp``; None for one product, the activation, another product.
    """

    def __init__(
        self,
        config: BlockConfig,
        attn: keras.layers.Layer | None = None,
        mlp: keras.layers.Layer | None = None,
        *,
        name: str,
        dtype: DType = None,
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        dtype = self.dtype_policy
        eps, scale, rate = config.norm_eps, config.layer_scale_init, config.drop_path_rate
        self.norm1 = layer_norm(eps, name="norm1", dtype=dtype)
        self.attn = Attention(config, name="attn", dtype=dtype) if attn is None else attn
        self.layer_scale1 = (
            Identity(name="layer_scale1", dtype=dtype)
            if scale is None
            else LayerScale(scale, name="layer_scale1", dtype=dtype)
        )
        self.drop_path1 = DropPath(rate, name="drop_path1", dtype=dtype)
        self.norm2 = layer_norm(eps, name="norm2", dtype=dtype)
        self.mlp = (
            Mlp(
                config.dim,
                config.mlp_dim,
                config.activation,
                config.dropout_rate,
                name="mlp",
                dtype=dtype,
            )
            if mlp is None
            else mlp
        )
        self.layer_scale2 = (
            Identity(name="layer_scale2", dtype=dtype)
            if scale is None
            else LayerScale(scale, name="layer_scale2", dtype=dtype)
        )
        self.drop_path2 = DropPath(rate, name="drop_path2", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        for layer in (
            self.norm1,
            self.attn,
            self.layer_scale1,
            self.norm2,
            self.mlp,
            self.layer_scale2,
        ):
            layer.build(input_shape)

    def call(
        self, x: Float[Tensor, "batch tokens dim"], training: bool | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        y = self.layer_scale1(self.attn(self.norm1(x), training=training))
        x = x + self.drop_path1(y, training=training)
        y = self.layer_scale2(self.mlp(self.norm2(x), training=training))
        x = x + self.drop_path2(y, training=training)
        return x


def pool(x: Float[Tensor, "batch tokens dim"], config: TransformerConfig) -> Tensor:
    """Tokens to features: (batch, dim), or every token where ``config.pool`` is ``none``."""
    match config.pool:
        case "cls":
            return x[:, 0]
        case "mean":
            return ops.mean(x, axis=1)
        case "mean_patches":
            return ops.mean(x[:, config.prefix_tokens :], axis=1)
        case "none":
            return x


class SpecModel(keras.Model):
    """What the models of all families share: a config that goes with them into ``.keras`` files."""

    def __init__(self, config: Any, *, name: str, dtype: DType) -> None:
        super().__init__(name=name, dtype=dtype)
        self.config = config

    def checked(self, images: Tensor) -> Tensor:
        """The images, if their shape is the config's; in the dtype of the computation."""
        self.config.check_images(tuple(images.shape))
        return ops.cast(images, self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        """What ``from_config`` needs, ``trainable`` included."""
        return {**super().get_config(), "config": self.config.to_dict()}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Self:
        """The model of ``get_config``."""
        spec = config_from_dict(config["config"])
        model = cls(spec, name=config["name"], dtype=config["dtype"])  # type: ignore[call-arg]
        model.trainable = config["trainable"]
        return model
