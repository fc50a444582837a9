"""LeViT: a vision transformer in a convolutional network's clothing.

Source: Graham et al. 2021, "LeViT: a Vision Transformer in ConvNet's Clothing for Faster
Inference", arXiv:2104.01136, section 4; the official code (facebookresearch/LeViT, Apache-2.0) for
what the paper leaves open; vit-pytorch's ``levit.py`` (MIT) for the form with fewer BatchNorms.

Tokens lie on a grid that shrinks from stage to stage. There is no class token and no table of
positions: every attention learns a bias for each offset (|rows|, |columns|) between two tokens.
Instead of LayerNorm a BatchNorm follows each product, so that at inference it can be folded into
it: ``fuse`` does that.

The columns of a product for q, k and v are those of the first head, first its q, then its k, then
its v; then those of the second head; and so on. Published checkpoints have them in that order;
vit-pytorch's three products are brought to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from isovit.spec.config import Config, Epsilon, NonNegative, Positive, Preprocess, Rate, require
from isovit.spec.param import (
    ONES,
    ZEROS,
    Init,
    Param,
    ParamTree,
    Role,
    batch_norm,
    conv,
    dense,
    repeat,
)
from isovit.spec.published import Published
from isovit.spec.scheme import TRUNC_NORMAL

Grid = tuple[int, int]


@dataclass(frozen=True)
class AttentionConfig:
    """Numbers of one attention, resolved from a config.

    Attributes:
        dim: width of the tokens that come in.
        out_dim: width of those that go out.
        grid: rows and columns of the tokens that come in, which are the keys.
        stride: 1, or 2 if only every second row and column asks, and goes out.
        num_heads: attention heads.
        key_dim: width of a head's q and k.
        value_dim: width of a head's v.
        dropout_rate: behind the projection.
        attn_dropout_rate: on the attention weights.
    """

    dim: int
    out_dim: int
    grid: Grid
    stride: int
    num_heads: int
    key_dim: int
    value_dim: int
    dropout_rate: float
    attn_dropout_rate: float

    @property
    def out_grid(self) -> Grid:
        """Rows and columns of the tokens that go out."""
        rows, columns = self.grid
        return -(-rows // self.stride), -(-columns // self.stride)

    @property
    def tokens(self) -> int:
        """Number of tokens that come in."""
        return math.prod(self.grid)

    @property
    def out_tokens(self) -> int:
        """Number of tokens that go out."""
        return math.prod(self.out_grid)

    @property
    def inner_dim(self) -> int:
        """Width of v: all heads side by side."""
        return self.num_heads * self.value_dim


@dataclass(frozen=True)
class StageConfig:
    """Numbers of one stage: blocks on one grid, behind what shrinks the grid before.

    Attributes:
        downsample: the attention that shrinks the grid; None in the first stage.
        down_hidden: hidden width of the MLP behind it.
        attention: the attention of each block.
        hidden: hidden width of each block's MLP.
        depth: number of blocks.
    """

    downsample: AttentionConfig | None
    down_hidden: int
    attention: AttentionConfig
    hidden: int
    depth: int


class LeViTConfig(Config, frozen=True, kw_only=True, tag="levit"):
    """Config of a LeViT; a tuple has an item for each stage.

    Attributes:
        stem: ``conv_norm``, convolutions with BatchNorm and Hardswish between each and the next
            (official), or ``conv``, convolutions with bias and nothing between (vit-pytorch).
        stem_dims: widths of the convolutions before the last, whose width is the first stage's.
            Each has a kernel of 3, a stride of 2 and a zero on every side.
        embed_dims: width of the tokens.
        depths: number of blocks.
        num_heads: attention heads of the blocks.
        key_dim: width of a head's q and k, everywhere.
        value_dim: width of a head's v, in the blocks.
        down_heads: heads of the attention that leads into each stage but the first.
        down_value_dim: width of a head's v there.
        mlp_ratio: hidden width of a block's MLP in multiples of the token's width.
        down_mlp_ratio: the same of the MLP behind an attention that shrinks the grid.
        attn_activation: between attention and projection; in the MLPs it is Hardswish.
        attn_bias_over_scale: whether the biases are divided by the scale of q·k, 1/√key_dim, before
            they are added to the scaled product (vit-pytorch).
        attn_proj_bias: whether the projection has a bias before its BatchNorm (vit-pytorch).
        mlp_norm: whether the products of the MLPs have a BatchNorm, or else a bias (vit-pytorch).
        head_norm: whether a BatchNorm precedes each head's product.
        dist_head: whether there is a second head, for a teacher; the logits are then the mean of
            both heads', in training too (``forward_heads`` gives them apart).
        fused: whether every BatchNorm is folded into the product beside it, which then has a bias.
        batch_norm_eps: epsilon of every BatchNorm.
        batch_norm_momentum: weight of a new batch in the running statistics.
        dropout_rate: behind the attention's projection, and behind the activation and the last
            product of the MLPs; none in the block that shrinks the grid.
        attn_dropout_rate: on the attention weights; none where the grid shrinks.
        drop_path_rate: stochastic depth, the same in every branch beside a residual.
        init_scheme: whose initialisation ``init`` follows.
    """

    stem: Literal["conv_norm", "conv"] = "conv_norm"
    stem_dims: tuple[Positive, ...] = (16, 32, 64)
    embed_dims: tuple[Positive, ...] = (128, 256, 384)
    depths: tuple[NonNegative, ...] = (2, 3, 4)
    num_heads: tuple[Positive, ...] = (4, 6, 8)
    key_dim: Positive = 16
    value_dim: Positive = 32
    down_heads: tuple[Positive, ...] = (8, 16)
    down_value_dim: Positive = 64
    mlp_ratio: Positive = 2
    down_mlp_ratio: Positive = 2
    attn_activation: Literal["hardswish", "gelu"] = "hardswish"
    attn_bias_over_scale: bool = False
    attn_proj_bias: bool = False
    mlp_norm: bool = True
    head_norm: bool = True
    dist_head: bool = True
    fused: bool = False
    batch_norm_eps: Epsilon = 1e-5
    batch_norm_momentum: Rate = 0.1
    dropout_rate: Rate = 0.0
    attn_dropout_rate: Rate = 0.0
    drop_path_rate: Rate = 0.0
    init_scheme: Literal["levit", "vit_pytorch"] = "levit"

    def check(self) -> None:
        """Check that every stage has its numbers, and that two heads have classes."""
        super().check()
        stages = len(self.embed_dims)
        require(stages > 0, "embed_dims", self.embed_dims, "needs one stage or more")
        wanted = {"depths": stages, "num_heads": stages, "down_heads": stages - 1}
        for name, count in wanted.items():
            value = getattr(self, name)
            rule = f"needs {count} items: embed_dims={self.embed_dims} has {stages} stages"
            require(len(value) == count, name, value, rule)
        require(
            not self.dist_head or self.num_classes > 0,
            "dist_head",
            self.dist_head,
            "needs num_classes > 0",
        )

    @property
    def stem_grids(self) -> tuple[Grid, ...]:
        """Rows and columns behind each convolution of the stem."""
        grids: list[Grid] = []
        rows, columns = self.image_size
        for _ in range(len(self.stem_dims) + 1):
            rows, columns = -(-rows // 2), -(-columns // 2)
            grids.append((rows, columns))
        return tuple(grids)

    @property
    def stages(self) -> tuple[StageConfig, ...]:
        """The numbers of each stage."""
        stages: list[StageConfig] = []
        grid = self.stem_grids[-1]
        for i, dim in enumerate(self.embed_dims):
            downsample = None
            if i > 0:
                downsample = AttentionConfig(
                    dim=self.embed_dims[i - 1],
                    out_dim=dim,
                    grid=grid,
                    stride=2,
                    num_heads=self.down_heads[i - 1],
                    key_dim=self.key_dim,
                    value_dim=self.down_value_dim,
                    dropout_rate=0.0,
                    attn_dropout_rate=0.0,
                )
                grid = downsample.out_grid
            attention = AttentionConfig(
                dim=dim,
                out_dim=dim,
                grid=grid,
                stride=1,
                num_heads=self.num_heads[i],
                key_dim=self.key_dim,
                value_dim=self.value_dim,
                dropout_rate=self.dropout_rate,
                attn_dropout_rate=self.attn_dropout_rate,
            )
            stages.append(
                StageConfig(
                    downsample=downsample,
                    down_hidden=dim * self.down_mlp_ratio,
                    attention=attention,
                    hidden=dim * self.mlp_ratio,
                    depth=self.depths[i],
                )
            )
        return tuple(stages)

    @property
    def feature_dim(self) -> int:
        """Width of the features, which the heads get."""
        return self.embed_dims[-1]


def param_tree(config: LeViTConfig) -> ParamTree:
    """The modules of a LeViT with their parameters, output shapes and multiply-adds."""
    stages = config.stages
    heads = ("head", "head_dist") if config.dist_head else ("head",) * (config.num_classes > 0)
    return ParamTree(
        name="",
        children=(
            _stem(config),
            repeat("stages", len(stages), lambda i: _stage(config, stages[i])),
            *(_head(config, name) for name in heads),
        ),
        output=(config.num_classes or config.feature_dim,),
    )


def _stem(config: LeViTConfig) -> ParamTree:
    dims, grids = (config.in_channels, *config.stem_dims, config.embed_dims[0]), config.stem_grids

    def make(i: int) -> ParamTree:
        fan_in = 9 * dims[i]
        normed = config.stem == "conv_norm" and not config.fused
        bias = None if normed else _torch_default(fan_in)
        kernel = _torch_default(fan_in)
        product = conv("conv", grids[i], (3, 3), dims[i], dims[i + 1], kernel, bias)
        if not normed:
            return product
        norm = batch_norm("norm", grids[i], dims[i + 1])
        return ParamTree("", children=(product, norm), output=product.output)

    convs = repeat("convs", len(grids), make)
    return ParamTree("stem", children=(convs,), output=(math.prod(grids[-1]), dims[-1]))


def _stage(config: LeViTConfig, stage: StageConfig) -> ParamTree:
    attention = stage.attention
    output = (attention.tokens, attention.dim)
    children = [repeat("blocks", stage.depth, lambda _: _block(config, attention, stage.hidden))]
    if stage.downsample is not None:
        children.insert(0, _block(config, stage.downsample, stage.down_hidden))
        children[0] = children[0].renamed("downsample")
    return ParamTree("stage", children=tuple(children), output=output)


BRANCH_GAIN = 0.5
"""Of probe weights beside a residual: no norm keeps the tokens small before the next attention."""


def _block(config: LeViTConfig, attention: AttentionConfig, hidden: int) -> ParamTree:
    children = (_attention(config, attention), _mlp(config, attention, hidden))
    return ParamTree("block", children=children, output=(attention.out_tokens, attention.out_dim))


def _attention(config: LeViTConfig, numbers: AttentionConfig) -> ParamTree:
    dim, heads, inner_dim = numbers.dim, numbers.num_heads, numbers.inner_dim
    q_dim, kv_dim = heads * numbers.key_dim, heads * numbers.key_dim + inner_dim
    lead, out_lead = (numbers.tokens,), (numbers.out_tokens,)
    if numbers.stride == 1:
        products = [_linear_norm(config, "qkv", lead, dim, q_dim + kv_dim)]
    else:
        products = [
            _linear_norm(config, "kv", lead, dim, kv_dim),
            _linear_norm(config, "q", out_lead, dim, q_dim),
        ]
    # A branch beside a residual starts as zero; in vit-pytorch the shrinking attention does too.
    zero = numbers.stride == 1 or config.init_scheme == "vit_pytorch"
    proj = _linear_norm(
        config,
        "proj",
        out_lead,
        inner_dim,
        numbers.out_dim,
        bias=config.attn_proj_bias,
        scale=ZEROS if zero else ONES,
        probe_gain=BRANCH_GAIN if numbers.stride == 1 else 1.0,
    )
    init = Init("normal", 1.0) if config.init_scheme == "vit_pytorch" else ZEROS
    # Of offsets that count much alike, tokens grow alike from stage to stage, until nothing but
    # rounding is left of what the queries change.
    gain = 1.0 if config.attn_bias_over_scale else 4.0
    biases = Param("attention_biases", (heads, numbers.tokens), Role.OWN, init, probe_gain=gain)
    return ParamTree(
        "attn",
        (biases,),
        (*products, proj),
        output=(numbers.out_tokens, numbers.out_dim),
        own_macs=numbers.out_tokens * numbers.tokens * (q_dim + inner_dim),  # q·k and weights·v
    )


def _mlp(config: LeViTConfig, attention: AttentionConfig, hidden: int) -> ParamTree:
    lead, dim = (attention.out_tokens,), attention.out_dim
    if config.mlp_norm:
        fc1 = _linear_norm(config, "fc1", lead, dim, hidden)
        fc2 = _linear_norm(config, "fc2", lead, hidden, dim, scale=ZEROS, probe_gain=BRANCH_GAIN)
    else:
        fc1 = dense("fc1", lead, dim, hidden, _torch_default(dim), _torch_default(dim))
        inits = (_torch_default(hidden), _torch_default(hidden))
        fc2 = dense("fc2", lead, hidden, dim, *inits, probe_gain=BRANCH_GAIN)
    return ParamTree("mlp", children=(fc1, fc2), output=(*lead, dim))


def _linear_norm(
    config: LeViTConfig,
    name: str,
    lead: tuple[int, ...],
    in_dim: int,
    out_dim: int,
    bias: bool = False,
    scale: Init = ONES,
    probe_gain: float = 1.0,
) -> ParamTree:
    """A product, then BatchNorm; fused, one product with bias."""
    init = _torch_default(in_dim)
    if config.fused:
        return dense(name, lead, in_dim, out_dim, init, init, probe_gain)
    linear = dense("linear", lead, in_dim, out_dim, init, init if bias else None, probe_gain)
    children = (linear, batch_norm("norm", lead, out_dim, scale))
    return ParamTree(name, children=children, output=(*lead, out_dim))


def _head(config: LeViTConfig, name: str) -> ParamTree:
    dim, classes = config.feature_dim, config.num_classes
    torch = config.init_scheme == "vit_pytorch"
    kernel, bias = (_torch_default(dim),) * 2 if torch else (TRUNC_NORMAL, ZEROS)
    if config.fused or not config.head_norm:
        return dense(name, (), dim, classes, kernel, bias)
    children = (batch_norm("norm", (), dim), dense("linear", (), dim, classes, kernel, bias))
    return ParamTree(name, children=children, output=(classes,))


def _torch_default(fan_in: int) -> Init:
    return Init("uniform", 1 / math.sqrt(fan_in))


def fuse(
    config: LeViTConfig, weights: Mapping[str, np.ndarray]
) -> tuple[LeViTConfig, dict[str, np.ndarray]]:
    """Fold every BatchNorm into the product beside it; evaluation stays the same function.

    A norm is y·s + t with s = scale / √(var + ε) and t = bias − mean · s. Behind a product it
    multiplies the columns of the kernel by s, and before one its rows.

    Args:
        config: of the weights; one that is fused is given back as it is.
        weights: canonical.

    Returns:
        The config with ``fused=True``, and its weights in float64, so that nothing is rounded.

    Source: Graham et al. 2021, arXiv:2104.01136, section 4.2, "Normalization layers".
    """
    wide = {path: array.astype(np.float64) for path, array in weights.items()}
    if config.fused:
        return config, wide
    for path, product, norm_first in _normed(param_tree(config)):
        norm = {leaf: wide.pop(f"{path}.norm.{leaf}") for leaf in ("scale", "bias", "mean", "var")}
        s = norm["scale"] / np.sqrt(norm["var"] + config.batch_norm_eps)
        t = norm["bias"] - norm["mean"] * s
        kernel = wide.pop(f"{path}.{product}.kernel")
        bias = wide.pop(f"{path}.{product}.bias", 0.0)
        if norm_first:
            kernel, bias = s[:, None] * kernel, t @ kernel + bias
        else:
            kernel, bias = kernel * s, bias * s + t
        wide |= {f"{path}.kernel": kernel, f"{path}.bias": bias}
    fused = config.replace(fused=True)
    return fused, {path: wide[path] for path in param_tree(fused).parameters()}


def _normed(tree: ParamTree) -> Iterator[tuple[str, str, bool]]:
    """Each module of a product and a BatchNorm: path, name of the product, if the norm is first."""
    for path, node in tree.walk():
        names = [child.name for child in node.children]
        if "norm" in names:
            (product,) = (name for name in names if name != "norm")
            yield path, product, names[0] == "norm"


# Graham et al. 2021, table 1, and ``levit.py`` of the official code.
SIZES: dict[str, dict[str, Any]] = {
    "128s": dict(embed_dims=(128, 256, 384), depths=(2, 3, 4), num_heads=(4, 6, 8), key_dim=16),
    "128": dict(embed_dims=(128, 256, 384), depths=(4, 4, 4), num_heads=(4, 8, 12), key_dim=16),
    "192": dict(embed_dims=(192, 288, 384), depths=(4, 4, 4), num_heads=(3, 5, 6), key_dim=32),
    "256": dict(embed_dims=(256, 384, 512), depths=(4, 4, 4), num_heads=(4, 6, 8), key_dim=32),
    "384": dict(embed_dims=(384, 512, 768), depths=(4, 4, 4), num_heads=(6, 9, 12), key_dim=32),
}

# What sets vit-pytorch's form apart.
VIT_PYTORCH: dict[str, Any] = dict(
    stem="conv",
    stem_dims=(32, 64, 128),
    attn_activation="gelu",
    attn_bias_over_scale=True,
    attn_proj_bias=True,
    mlp_norm=False,
    head_norm=False,
    init_scheme="vit_pytorch",
)


def _official(size: str) -> LeViTConfig:
    """Values are twice as wide as keys, and four times where the grid shrinks."""
    numbers = SIZES[size]
    first, *_ = dims = numbers["embed_dims"]
    return LeViTConfig(
        stem_dims=(first // 8, first // 4, first // 2),
        value_dim=2 * numbers["key_dim"],
        down_heads=tuple(dim // numbers["key_dim"] for dim in dims[:-1]),
        down_value_dim=4 * numbers["key_dim"],
        preprocess=Preprocess(),
        **numbers,
    )


VARIANTS: dict[str, LeViTConfig] = {
    **{f"levit_{size}": _official(size) for size in SIZES},
    # The example model of vit-pytorch's README.
    "levit_pytorch": LeViTConfig(
        embed_dims=(256, 384, 512),
        depths=(4, 4, 4),
        num_heads=(4, 6, 8),
        key_dim=32,
        value_dim=64,
        down_heads=(8, 12),
        down_value_dim=64,
        dist_head=False,
        **VIT_PYTORCH,
    ),
}

LEVIT_PAGE = "README of facebookresearch/LeViT"
WITH_SOFTMAX = "its count has a multiply-add for each attention weight's softmax too"

PUBLISHED: dict[str, Published] = {
    "levit_128s": Published(LEVIT_PAGE, 76.6, gmacs="0.305"),
    "levit_128": Published(LEVIT_PAGE, 78.6, gmacs="0.406", gmacs_note=WITH_SOFTMAX),
    "levit_192": Published(LEVIT_PAGE, 80.0, gmacs="0.658", gmacs_note=WITH_SOFTMAX),
    "levit_256": Published(
        LEVIT_PAGE, 81.6, gmacs="1.120", gmacs_note="counted as its neighbours, it would be 1.128"
    ),
    "levit_384": Published(LEVIT_PAGE, 82.6, gmacs="2.353", gmacs_note=WITH_SOFTMAX),
}

ALIASES = {f"LeViT_{size.upper()}": f"levit_{size}" for size in SIZES}
"""Names of the official code."""
