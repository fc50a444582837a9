"""NesT: Nested Hierarchical Transformer.

Source: Zhang et al. 2022, "Nested Hierarchical Transformer: Towards Accurate, Data-Efficient and
Interpretable Visual Understanding", arXiv:2105.12723, section 3; the official code
(google-research/nested-transformer, ``models/nest_net.py`` and ``libml/self_attention.py``,
Apache-2.0) and timm's ``nest.py`` (Apache-2.0) for what the paper leaves open; vit-pytorch's
``nest.py`` (MIT) for its own form.

The image of tokens is cut into equal blocks, and attention stays inside a block. From one level to
the next a convolution and a max pooling merge four blocks into one, so that a block always holds
as many tokens and the last level is a single block. The multi-query attention of the official CIFAR
models is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from isovit.spec.blocks import BlockConfig, attention, block
from isovit.spec.config import (
    Activation,
    Config,
    Epsilon,
    NonNegative,
    Pair,
    PositionTable,
    Positive,
    Rate,
    require,
    require_stages,
)
from isovit.spec.param import (
    ZEROS,
    Init,
    Param,
    ParamTree,
    Role,
    conv,
    dense,
    layer_norm,
    repeat,
)
from isovit.spec.published import Published
from isovit.spec.scheme import TRUNC_NORMAL, Scheme

POOL_KERNEL, POOL_STRIDE = 3, 2
"""Of the max pooling between two levels; the convolution before it has the same kernel."""


@dataclass(frozen=True)
class Level:
    """Numbers of one level of the hierarchy, resolved from a config.

    Attributes:
        grid: rows and columns of tokens.
        block_grid: rows and columns of blocks.
        block_size: rows and columns of tokens in a block.
        dim: width of the tokens.
        input_dim: width of the level before; None for the first, which no pooling precedes.
        per_channel: whether a position is a vector, one for each token; else it is a number, one
            for each token of a block.
        layers: the numbers of each transformer layer.
    """

    grid: tuple[int, int]
    block_grid: tuple[int, int]
    block_size: tuple[int, int]
    dim: int
    input_dim: int | None
    per_channel: bool
    layers: tuple[BlockConfig, ...]

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return math.prod(self.block_grid)

    @property
    def block_tokens(self) -> int:
        """Number of tokens in a block."""
        return math.prod(self.block_size)

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return math.prod(self.grid)

    @property
    def pos_embed_shape(self) -> tuple[int, ...]:
        """Of the learned positions, which are added to (batch, blocks, tokens, dim)."""
        if self.per_channel:
            return (1, self.blocks, self.block_tokens, self.dim)
        return (self.block_tokens,)

    @property
    def pos_embed_trains(self) -> bool:
        """Whether anything depends on the positions.

        A number that is the same for all channels is taken away again by every LayerNorm, and
        behind the last level, which is a single block, nothing but LayerNorms look at the tokens.
        """
        return self.per_channel or self.blocks > 1


class NesTConfig(Config, frozen=True, kw_only=True, tag="nest"):
    """Config of a NesT; what a tuple holds is told level by level, the finest first.

    Attributes:
        patch_size: height and width of a patch, in pixels.
        patch_embed: ``conv``, a convolution of stride ``patch_size`` (official); or
            ``norm_linear_norm``, which normalises each flattened patch, order (height, width,
            channel), before and after the product (vit-pytorch).
        embed_dims: width of the tokens.
        depths: number of transformer layers.
        num_heads: attention heads.
        head_dim: width of a head at every level; None for the width of the level over its heads.
        mlp_ratio: hidden width of the MLP as a multiple of the width.
        qkv_bias: whether the product for q, k and v has a bias.
        pos_embed: ``image``, a learned vector for each token of the level (official); or
            ``block``, a learned number for each token of a block, which all channels and all
            blocks share (vit-pytorch).
        pool_padding: where the max pooling adds a row and a column of -∞: at the ``end``, as SAME
            does at even sizes (official, and the models ``_jx`` of timm); or on ``both`` sides
            (timm's others, vit-pytorch).
        activation: of the MLP; ``gelu`` is exact (timm, vit-pytorch), ``gelu_tanh`` the
            approximation (official).
        norm_eps: epsilon of every LayerNorm.
        dropout_rate: after the attention's projection and both products of the MLP.
        attn_dropout_rate: on the attention weights.
        head_dropout_rate: on the features before the head.
        drop_path_rate: stochastic depth of the last layer; grows linearly from 0 over all levels.
        init_scheme: whose initialisation ``init`` follows.
    """

    patch_size: Pair = (4, 4)
    patch_embed: Literal["conv", "norm_linear_norm"] = "conv"
    embed_dims: tuple[Positive, ...] = (96, 192, 384)
    depths: tuple[NonNegative, ...] = (2, 2, 8)
    num_heads: tuple[Positive, ...] = (3, 6, 12)
    head_dim: Positive | None = None
    mlp_ratio: Positive = 4
    qkv_bias: bool = True
    pos_embed: Literal["image", "block"] = "image"
    pool_padding: Literal["end", "both"] = "end"
    activation: Activation = "gelu_tanh"
    norm_eps: Epsilon = 1e-6
    dropout_rate: Rate = 0.0
    attn_dropout_rate: Rate = 0.0
    head_dropout_rate: Rate = 0.0
    drop_path_rate: Rate = 0.0
    init_scheme: Literal["timm", "vit_pytorch"] = "timm"

    def check(self) -> None:
        """Check that levels have all their numbers, heads fit, and blocks tile the image."""
        super().check()
        require_stages(self, ("depths",), "level")
        sizes = zip(("height", "width"), self.image_size, self.patch_size, strict=True)
        blocks = 2 ** (len(self.embed_dims) - 1)
        for axis, size, patch in sizes:
            require(
                size % (patch * blocks) == 0,
                "image_size",
                self.image_size,
                f"{axis} {size} must be divisible by {patch * blocks}: the {axis} of "
                f"patch_size={self.patch_size} times the {blocks} blocks of the first level",
            )

    @property
    def patch_dim(self) -> int:
        """Numbers in a flattened patch."""
        return math.prod(self.patch_size) * self.in_channels

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens at the first level."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def feature_dim(self) -> int:
        """Width of the features, which the head gets."""
        return self.embed_dims[-1]

    @property
    def levels(self) -> tuple[Level, ...]:
        """The numbers of each level; every level has half the rows and columns of the one before.

        Stochastic depth grows linearly over the layers of all levels.
        """
        last = max(sum(self.depths) - 1, 1)
        rates = iter([self.drop_path_rate * i / last for i in range(sum(self.depths))])
        levels: list[Level] = []
        for i, (dim, depth) in enumerate(zip(self.embed_dims, self.depths, strict=True)):
            grid = (self.grid[0] // 2**i, self.grid[1] // 2**i)
            blocks = 2 ** (len(self.embed_dims) - 1 - i)
            layer = self._layer(dim, self.num_heads[i])
            levels.append(
                Level(
                    grid=grid,
                    block_grid=(blocks, blocks),
                    block_size=(grid[0] // blocks, grid[1] // blocks),
                    dim=dim,
                    input_dim=self.embed_dims[i - 1] if i else None,
                    per_channel=self.pos_embed == "image",
                    layers=tuple(replace(layer, drop_path_rate=next(rates)) for _ in range(depth)),
                )
            )
        return tuple(levels)

    @property
    def position_tables(self) -> Mapping[str, PositionTable]:
        """See ``Config.position_tables``."""
        return {
            f"levels.{i}.pos_embed": PositionTable(level.grid, windows=level.block_grid)
            if level.per_channel
            else PositionTable(level.block_size)
            for i, level in enumerate(self.levels)
        }

    def _layer(self, dim: int, num_heads: int) -> BlockConfig:
        head_dim = self.head_dim or dim // num_heads
        return BlockConfig(
            dim=dim,
            num_heads=num_heads,
            head_dim=head_dim,
            qkv_bias=self.qkv_bias,
            attn_proj=True,
            attn_scale=head_dim**-0.5,
            mlp_dim=dim * self.mlp_ratio,
            activation=self.activation,
            norm_eps=self.norm_eps,
            layer_scale_init=None,
            dropout_rate=self.dropout_rate,
            attn_dropout_rate=self.attn_dropout_rate,
            drop_path_rate=0.0,
        )


def param_tree(config: NesTConfig) -> ParamTree:
    """The modules of a NesT with their parameters, output shapes and multiply-adds."""
    scheme, levels, dim = Scheme(config.init_scheme), config.levels, config.feature_dim
    children = [
        _patch_embed(config, scheme),
        repeat("levels", len(levels), lambda i: _level(levels[i], scheme)),
        layer_norm("norm", levels[-1].grid, dim),
    ]
    if config.num_classes:
        kernel, bias = scheme.head_kernel(dim, config.num_classes), scheme.dense_bias(dim)
        children.append(dense("head", (), dim, config.num_classes, kernel, bias))
    return ParamTree("", children=tuple(children), output=(config.num_classes or dim,))


def _patch_embed(config: NesTConfig, scheme: Scheme) -> ParamTree:
    grid, dim, patch_dim = config.grid, config.embed_dims[0], config.patch_dim
    if config.patch_embed == "conv":
        kernel, bias = _conv_init(scheme, patch_dim)
        proj = conv("proj", grid, config.patch_size, config.in_channels, dim, kernel, bias)
        return ParamTree("patch_embed", children=(proj,), output=(*grid, dim))
    kernel, bias = scheme.dense_kernel(patch_dim, dim), scheme.dense_bias(patch_dim)
    children = (
        layer_norm("norm1", grid, patch_dim),
        dense("proj", grid, patch_dim, dim, kernel, bias),
        layer_norm("norm2", grid, dim),
    )
    return ParamTree("patch_embed", children=children, output=(*grid, dim))


def _level(level: Level, scheme: Scheme) -> ParamTree:
    shape, trains = level.pos_embed_shape, level.pos_embed_trains
    positions = Param("pos_embed", shape, Role.OWN, scheme.positions(), trainable=trains)
    children = [repeat("blocks", len(level.layers), lambda i: _layer(level, i, scheme))]
    if level.input_dim is not None:
        children.insert(0, _conv_pool(level, level.input_dim, scheme))
    return ParamTree("level", (positions,), tuple(children), (*level.grid, level.dim))


def _conv_pool(level: Level, input_dim: int, scheme: Scheme) -> ParamTree:
    rows, columns = level.grid
    grid = (POOL_STRIDE * rows, POOL_STRIDE * columns)
    kernel, bias = _conv_init(scheme, POOL_KERNEL**2 * input_dim)
    children = (
        conv("conv", grid, (POOL_KERNEL, POOL_KERNEL), input_dim, level.dim, kernel, bias),
        layer_norm("norm", grid, level.dim),
    )
    return ParamTree("pool", children=children, output=(rows, columns, level.dim))


def _layer(level: Level, index: int, scheme: Scheme) -> ParamTree:
    numbers, tokens = level.layers[index], level.tokens
    attn = attention("attn", numbers, tokens, scheme)
    attn = replace(attn, own_macs=attn.own_macs // level.blocks)  # a token sees those of its block
    return block(numbers, tokens, scheme, attn)


def _conv_init(scheme: Scheme, fan_in: int) -> tuple[Init, Init]:
    """Kernel and bias of a convolution, which timm's NesT draws as it does dense layers."""
    if scheme.name == "timm":
        return TRUNC_NORMAL, ZEROS
    return scheme.conv_kernel(fan_in), scheme.conv_bias(fan_in)


# ``models/nest_net.py`` of the official code: widths and heads double from level to level. Table A1
# of the paper is said to have errors (issue 2 of its repository), so the code decides.
SIZES: dict[str, dict[str, Any]] = {
    "t": dict(embed_dims=(96, 192, 384), depths=(2, 2, 8), num_heads=(3, 6, 12)),
    "s": dict(embed_dims=(96, 192, 384), depths=(2, 2, 20), num_heads=(3, 6, 12)),
    "b": dict(embed_dims=(128, 256, 512), depths=(2, 2, 20), num_heads=(4, 8, 16)),
}

# What vit-pytorch's NesT has of its own.
VIT_PYTORCH: dict[str, Any] = dict(
    patch_embed="norm_linear_norm",
    qkv_bias=False,
    pos_embed="block",
    pool_padding="both",
    activation="gelu",
    norm_eps=1e-5,
    init_scheme="vit_pytorch",
)

VARIANTS: dict[str, NesTConfig] = {
    **{f"nest_{size}": NesTConfig(**sizes) for size, sizes in SIZES.items()},
    # The example model of vit-pytorch's README.
    "nest_pytorch": NesTConfig(**SIZES["t"], **VIT_PYTORCH),
}

NEST_PAGE = (
    "README of google-research/nested-transformer, after Zhang et al. 2022, arXiv:2105.12723"
)

PUBLISHED: dict[str, Published] = {
    "nest_t": Published(NEST_PAGE, 81.5),
    "nest_s": Published(NEST_PAGE, 83.3),
    "nest_b": Published(NEST_PAGE, 83.8),
}

ALIASES = {
    "nest_tiny_jx": "nest_t",
    "nest_small_jx": "nest_s",
    "nest_base_jx": "nest_b",
    "nest_tiny_s196_224": "nest_t",
    "nest_small_s196_224": "nest_s",
    "nest_base_s196_224": "nest_b",
}
"""timm's names of the models with the published weights, and the names of the official code."""
