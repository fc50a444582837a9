"""Google's ViT in NumPy and float64, over the arrays of its npz files: an independent oracle.

The original code (google-research/vision_transformer ``models_vit.py``, google-research/big_vision
``models/vit.py``, both Apache-2.0) is on no package index. This is written from a description of
what it computes and of its keys, not from the models or the tables of isovit. It reads the arrays
by the names and in the shapes that the files have, so it keeps what is odd about them: kernels with
an axis for the heads, q scaled before the product, GELU by tanh, submodules that are numbered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

Array = np.ndarray
Arrays = Mapping[str, Array]

EPS = 1e-6  # flax's default


@dataclass(frozen=True)
class Names:
    """How a library numbers the submodules of a block, and where it adds the positions.

    Attributes:
        positions: key of the table.
        attention: of a block.
        norm2: the LayerNorm before the MLP.
        mlp: of a block.
        positions_first: whether they are added before the class token is put in front.
    """

    positions: str
    attention: str
    norm2: str
    mlp: str
    positions_first: bool


VIT_JAX = Names(
    positions="Transformer/posembed_input/pos_embedding",
    attention="MultiHeadDotProductAttention_1",
    norm2="LayerNorm_2",
    mlp="MlpBlock_3",
    positions_first=False,
)
BIG_VISION = Names(
    positions="pos_embedding",
    attention="MultiHeadDotProductAttention_0",
    norm2="LayerNorm_1",
    mlp="MlpBlock_0",
    positions_first=True,
)


@dataclass(frozen=True)
class Sizes:
    """Arguments of the original's constructor, as far as shapes depend on them.

    Attributes:
        patches: height and width of a patch.
        grid: rows and columns of patches.
        channels: of the image.
        hidden_size: width of the tokens.
        num_layers: blocks.
        num_heads: of the attention.
        mlp_dim: hidden width of the MLP.
        classifier: ``token``, or ``gap`` for the mean, which goes without a class token.
        representation_size: width of the layer before the head; None for no such.
        num_classes: width of the head; 0 for no head.
    """

    patches: tuple[int, int]
    grid: tuple[int, int]
    channels: int
    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    classifier: str = "token"
    representation_size: int | None = None
    num_classes: int = 0


def below(params: Arrays, prefix: str) -> dict[str, Array]:
    """The arrays of a submodule, under the names that it gives them."""
    start = f"{prefix}/"
    return {name[len(start) :]: a for name, a in params.items() if name.startswith(start)}


def dense(params: Arrays, x: Array) -> Array:
    """``flax.linen.Dense``."""
    return x @ params["kernel"] + params["bias"]


def layer_norm(params: Arrays, x: Array) -> Array:
    """``flax.linen.LayerNorm``."""
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    return centred / np.sqrt(variance + EPS) * params["scale"] + params["bias"]


def gelu(x: Array) -> Array:
    """``flax.linen.gelu``, which approximates unless told otherwise."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def embed(params: Arrays, images: Array) -> Array:
    """A convolution whose stride is its kernel, without padding: one product for each patch."""
    kernel, bias = params["embedding/kernel"], params["embedding/bias"]
    height, width = kernel.shape[:2]
    tokens = [
        np.tensordot(images[:, top : top + height, left : left + width], kernel, axes=3) + bias
        for top in range(0, images.shape[1] - height + 1, height)
        for left in range(0, images.shape[2] - width + 1, width)
    ]
    return np.stack(tokens, axis=1)


def attend(params: Arrays, x: Array) -> Array:
    """``flax.linen.MultiHeadDotProductAttention`` of x with itself."""

    def project(part: str) -> Array:
        kernel, bias = params[f"{part}/kernel"], params[f"{part}/bias"]
        return np.einsum("btd,dhe->bthe", x, kernel) + bias

    query, key, value = project("query"), project("key"), project("value")
    query = query / math.sqrt(query.shape[-1])
    scores = np.einsum("bqhe,bkhe->bhqk", query, key)
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = np.einsum("bhqk,bkhe->bqhe", powers / powers.sum(axis=-1, keepdims=True), value)
    return np.einsum("bqhe,hed->bqd", mixed, params["out/kernel"]) + params["out/bias"]


def block(names: Names, params: Arrays, x: Array) -> Array:
    """Pre-norm block."""
    attention, mlp = below(params, names.attention), below(params, names.mlp)
    x = x + attend(attention, layer_norm(below(params, "LayerNorm_0"), x))
    y = dense(below(mlp, "Dense_0"), layer_norm(below(params, names.norm2), x))
    return x + dense(below(mlp, "Dense_1"), gelu(y))


def logits(names: Names, arrays: Arrays, images: Array) -> Array:
    """The original's answer to (batch, height, width, channels) images, in float64."""
    params = {name: array.astype(np.float64) for name, array in arrays.items()}
    x = embed(params, images.astype(np.float64))
    positions, token = params[names.positions], params.get("cls")
    if names.positions_first:
        x = x + positions
    if token is not None:
        x = np.concatenate([np.repeat(token, len(x), axis=0), x], axis=1)
    if not names.positions_first:
        x = x + positions
    i = 0
    while f"Transformer/encoderblock_{i}/LayerNorm_0/scale" in params:
        x = block(names, below(params, f"Transformer/encoderblock_{i}"), x)
        i += 1
    x = layer_norm(below(params, "Transformer/encoder_norm"), x)
    x = x.mean(axis=1) if token is None else x[:, 0]
    if "pre_logits/kernel" in params:
        x = np.tanh(dense(below(params, "pre_logits"), x))
    return dense(below(params, "head"), x) if "head/kernel" in params else x


# What the files hold


def shapes(names: Names, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Every key of a file with the shape that it has there."""
    dim, hidden, heads = sizes.hidden_size, sizes.mlp_dim, sizes.num_heads
    token, width = sizes.classifier == "token", sizes.representation_size
    rows = math.prod(sizes.grid) + int(token and not names.positions_first)
    found: dict[str, tuple[int, ...]] = {
        "embedding/kernel": (*sizes.patches, sizes.channels, dim),
        "embedding/bias": (dim,),
        names.positions: (1, rows, dim),
        "Transformer/encoder_norm/scale": (dim,),
        "Transformer/encoder_norm/bias": (dim,),
    }
    if token:
        found["cls"] = (1, 1, dim)
    for i in range(sizes.num_layers):
        block = f"Transformer/encoderblock_{i}"
        for norm in ("LayerNorm_0", names.norm2):
            found |= {f"{block}/{norm}/scale": (dim,), f"{block}/{norm}/bias": (dim,)}
        for part in ("query", "key", "value"):
            found[f"{block}/{names.attention}/{part}/kernel"] = (dim, heads, dim // heads)
            found[f"{block}/{names.attention}/{part}/bias"] = (heads, dim // heads)
        found[f"{block}/{names.attention}/out/kernel"] = (heads, dim // heads, dim)
        found[f"{block}/{names.attention}/out/bias"] = (dim,)
        found[f"{block}/{names.mlp}/Dense_0/kernel"] = (dim, hidden)
        found[f"{block}/{names.mlp}/Dense_0/bias"] = (hidden,)
        found[f"{block}/{names.mlp}/Dense_1/kernel"] = (hidden, dim)
        found[f"{block}/{names.mlp}/Dense_1/bias"] = (dim,)
    if width:
        found |= {"pre_logits/kernel": (dim, width), "pre_logits/bias": (width,)}
    if sizes.num_classes:
        found |= {"head/kernel": (width or dim, sizes.num_classes)}
        found |= {"head/bias": (sizes.num_classes,)}
    return found


def random_arrays(names: Names, sizes: Sizes, seed: int = 0) -> dict[str, Array]:
    """Arrays under which every parameter shows, float32."""
    rng = np.random.default_rng(seed)
    arrays: dict[str, Array] = {}
    for name, shape in shapes(names, sizes).items():
        fan_in = math.prod(shape[:-2] if name.endswith(PARTS) else shape[:-1])
        std = fan_in**-0.5 if name.endswith("kernel") else 0.2
        noise = std * rng.standard_normal(shape)
        arrays[name] = (float(name.endswith("scale")) + noise).astype(np.float32)
    return arrays


PARTS = ("query/kernel", "key/kernel", "value/kernel")


# Forms in which the files come


def bare(arrays: Arrays) -> dict[str, Array]:
    """As the AugReg files are."""
    return dict(arrays)


def checkpointed(arrays: Arrays) -> dict[str, Array]:
    """As written in the middle of a training: beside moments and counts of the optimiser."""
    found: dict[str, Array] = {f"opt/target/{name}": array for name, array in arrays.items()}
    for name, array in arrays.items():
        found[f"opt/state/param_states/{name}/momentum"] = np.full_like(array, 3)
    return found | {"opt/state/step": np.array(7), "accum_train_time": np.array(1.5)}


def named_params(arrays: Arrays) -> dict[str, Array]:
    """As big_vision writes: parameters, maybe beside the state of the optimiser."""
    found: dict[str, Array] = {f"params/{name}": array for name, array in arrays.items()}
    return found | {"opt/0/count": np.array(7)}


def image_tower(arrays: Arrays) -> dict[str, Array]:
    """As one of two towers, beside a text tower that has a head and blocks of its own."""
    found: dict[str, Array] = {f"params/img/{name}": array for name, array in arrays.items()}
    text = {
        "head/kernel": np.ones((3, 3)),
        "Encoder_0/encoderblock_0/LayerNorm_0/scale": np.ones(3),
    }
    return found | {f"params/txt/{n}": a for n, a in text.items()} | {"params/t": np.ones(1)}


def scanned(arrays: Arrays) -> dict[str, Array]:
    """As big_vision writes with ``scan``: all blocks in one, along a leading axis of depth."""
    found = dict(arrays)
    for name in [name for name in arrays if name.startswith("Transformer/encoderblock_0/")]:
        rest, stack, i = name.partition("_0/")[2], [], 0
        while (block := f"Transformer/encoderblock_{i}/{rest}") in found:
            stack.append(found.pop(block))
            i += 1
        found[f"Transformer/encoderblock/{rest}"] = np.stack(stack)
    return found


FORMS: dict[str, Callable[[Arrays], dict[str, Array]]] = {
    function.__name__: function
    for function in (bare, checkpointed, named_params, image_tower, scanned)
}


def half(arrays: Arrays) -> dict[str, Array]:
    """In bfloat16, which NumPy writes as two bytes without a name."""
    return {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()}
