"""RegionViT: attention from regions to the tokens inside them.

Source: Chen, Panda & Fan 2022, "RegionViT: Regional-to-Local Attention for Vision Transformers",
arXiv:2106.02689, section 3; the official code (IBM/RegionViT, ``regionvit/regionvit.py`` and
``regionvit/attention/``, Apache-2.0) for what the paper leaves open; vit-pytorch's ``regionvit.py``
(MIT) for the other form. The positions that a convolution gives: Chu et al. 2021, arXiv:2102.10882.

An image becomes two grids of tokens: local ones, each a few pixels wide, and regional ones, each of
a square of pixels that is a window of local tokens. A block lets the regional tokens attend to each
other and then, in every window by itself, the regional token and the local ones to all of these.
The same weights serve both. From stage to stage a convolution halves both grids. Only the regional
tokens reach the head.

The official code puts masked tokens into a window that lacks some; here a window is as large as
the grids leave it, as in vit-pytorch, and the biases of farther offsets stay unused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from isovit.spec.config import (
    Activation,
    Config,
    Epsilon,
    Positive,
    Rate,
    Stages,
    require,
    require_stages,
)
from isovit.spec.param import (
    Param,
    ParamTree,
    Role,
    Shape,
    conv,
    dense,
    depthwise_conv,
    layer_norm,
    repeat,
)
from isovit.spec.published import Published
from isovit.spec.scheme import Scheme

Grid = tuple[int, int]
"""Rows and columns."""

STEM_PATCH = 4
"""Pixels from one local token to the next behind the three convolutions: two of stride 2."""


@dataclass(frozen=True)
class StageConfig:
    """Numbers of one stage, resolved from the config.

    Attributes:
        in_dim: width of the tokens of the stage before; None for the first.
        grid: rows and columns of local tokens.
        region_grid: rows and columns of regional tokens, and of windows.
        dim: width of the tokens.
        num_heads: attention heads.
        head_dim: width of a head; heads need not fill ``dim``.
        mlp_dim: hidden width of the MLPs.
        has_peg: whether there is a positional encoding.
        drop_path_rates: of each block.
    """

    in_dim: int | None
    grid: Grid
    region_grid: Grid
    dim: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    has_peg: bool
    drop_path_rates: tuple[float, ...]

    @property
    def regions(self) -> int:
        """Number of regional tokens."""
        return math.prod(self.region_grid)

    @property
    def window(self) -> tuple[int, int]:
        """Rows and columns of local tokens in a window."""
        return self.grid[0] // self.region_grid[0], self.grid[1] // self.region_grid[1]

    @property
    def tokens(self) -> int:
        """Number of tokens that attend to each other: the regional one and those of its window."""
        return 1 + math.prod(self.window)

    @property
    def inner_dim(self) -> int:
        """Width of q, of k and of v: all heads side by side."""
        return self.num_heads * self.head_dim


class RegionViTConfig(Config, frozen=True, kw_only=True, tag="regionvit"):
    """Config of a RegionViT; what has a number for each stage is a tuple of as many.

    Attributes:
        patch_size: side of what a local token stands for, in pixels.
        window_size: side of a window in the first stage, in local tokens, and of the largest
            window for which there are biases; a regional token stands for ``patch_size *
            window_size`` pixels a side.
        stem_dims: widths of the first two of three convolutions that make the local tokens, with
            LayerNorm and activation between; empty for a single one, whose kernel is two patches
            wide.
        embed_dims: width of the tokens.
        depths: number of blocks.
        num_heads: attention heads.
        head_dim: width of a head, of every stage; None for embed_dims / num_heads.
        qkv_bias: whether the product for q, k and v has a bias.
        attn_scale: factor on q·k, of every stage; None for 1/√head_dim.
        region_norm: whether regional tokens have a LayerNorm of their own where they attend to
            each other (official); else the windows' serves both (vit-pytorch).
        rel_pos: whether each ``block`` has a table of biases (official), or each ``stage``
            (vit-pytorch).
        mlp_dims: hidden width of the MLPs.
        downsample: what halves both grids between two stages: ``norm_conv``, LayerNorm, activation
            and a convolution with a group for each channel that comes in (official); or ``conv``,
            a convolution of all channels (vit-pytorch).
        peg: a convolution of each channel by itself, added to the tokens: of ``both`` kinds behind
            the first block of every stage, without bias (official); of the ``local`` ones before
            the blocks of every stage but the first, with bias (vit-pytorch); or ``none``.
        activation: of stem, downsampling and MLPs.
        norm_eps: epsilon inside the root of the LayerNorms of blocks and head.
        embed_norm_eps: of those in stem and downsampling.
        final_norm: LayerNorm over the regional ``tokens`` before they are averaged, or over the
            ``pooled`` vector.
        embed_dropout_rate: on the local tokens before the first stage.
        attn_dropout_rate: on the attention weights.
        proj_dropout_rate: after the attention's projection.
        hidden_dropout_rate: after the MLP's activation.
        mlp_dropout_rate: after the MLP's second product, where vit-pytorch has none.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 over all blocks.
            Each window skips a branch by itself.
        init_scheme: whose initialisation ``init`` follows.
    """

    patch_size: Positive = 4
    window_size: Positive = 7
    stem_dims: tuple[Positive, ...] = (16, 32)
    embed_dims: Stages = (64, 128, 256, 512)
    depths: Stages = (2, 2, 8, 2)
    num_heads: Stages = (2, 4, 8, 16)
    head_dim: Positive | None = None
    qkv_bias: bool = True
    attn_scale: Epsilon | None = None
    region_norm: bool = True
    rel_pos: Literal["block", "stage"] = "block"
    mlp_dims: Stages = (256, 512, 1024, 2048)
    downsample: Literal["norm_conv", "conv"] = "norm_conv"
    peg: Literal["none", "both", "local"] = "none"
    activation: Activation = "gelu"
    norm_eps: Epsilon = 1e-6
    embed_norm_eps: Epsilon = 1e-5
    final_norm: Literal["tokens", "pooled"] = "tokens"
    embed_dropout_rate: Rate = 0.0
    attn_dropout_rate: Rate = 0.0
    proj_dropout_rate: Rate = 0.0
    hidden_dropout_rate: Rate = 0.0
    mlp_dropout_rate: Rate = 0.0
    drop_path_rate: Rate = 0.0
    init_scheme: Literal["timm", "vit_pytorch"] = "timm"

    def check(self) -> None:
        """Check that stages have all their numbers and fit together, and that regions tile."""
        super().check()
        require_stages(self, ("depths", "mlp_dims"))
        for i, dim in enumerate(self.embed_dims):
            require(
                i == 0 or self.downsample == "conv" or dim % self.embed_dims[i - 1] == 0,
                f"embed_dims[{i}]",
                dim,
                f"must be a multiple of embed_dims[{i - 1}], unless downsample=conv",
            )
        self._check_stem()
        self._check_grids()

    def _check_stem(self) -> None:
        """Check that what makes the local tokens leaves as many as there should be."""
        require(
            len(self.stem_dims) in (0, 2), "stem_dims", self.stem_dims, "needs two widths or none"
        )
        if self.stem_dims:
            rule = f"must be {STEM_PATCH}, unless stem_dims is empty"
            require(self.patch_size == STEM_PATCH, "patch_size", self.patch_size, rule)
        rule = "must be 2 or more: the convolution of one pixel would lose a row and a column"
        require(self.patch_size > 1, "patch_size", self.patch_size, rule)

    def _check_grids(self) -> None:
        """Check that regions tile the image, and windows the local tokens of every stage."""
        side = self.patch_size * self.window_size
        for axis, size in zip(("height", "width"), self.image_size, strict=True):
            require(
                size % side == 0,
                "image_size",
                self.image_size,
                f"{axis} {size} must be divisible by {side}: patch_size={self.patch_size} times "
                f"window_size={self.window_size}",
            )
        for i, grids in enumerate(self.grids):
            for axis, local, regional in zip(("rows", "columns"), *grids, strict=True):
                require(
                    local % regional == 0,
                    "image_size",
                    self.image_size,
                    f"stage {i} has {local} {axis} of local tokens, which must be divisible by "
                    f"its {regional} of regional ones",
                )

    @property
    def region_size(self) -> int:
        """Side of what a regional token stands for, in pixels."""
        return self.patch_size * self.window_size

    @property
    def region_dim(self) -> int:
        """Numbers in the flattened pixels of a region."""
        return self.region_size**2 * self.in_channels

    @property
    def offsets(self) -> int:
        """Number of offsets between two tokens of the largest window: entries of a bias table."""
        return (2 * self.window_size - 1) ** 2

    @property
    def feature_dim(self) -> int:
        """Width of the features, which the head gets."""
        return self.embed_dims[-1]

    @property
    def grids(self) -> tuple[tuple[Grid, Grid], ...]:
        """Rows and columns of the local and of the regional tokens, of each stage."""
        sides = (self.patch_size, self.region_size)
        first, regional = ((self.image_size[0] // n, self.image_size[1] // n) for n in sides)
        grids = [(first, regional)]
        for _ in self.embed_dims[1:]:
            local, regional = grids[-1]
            grids.append((_halved(local), _halved(regional)))
        return tuple(grids)

    @property
    def stages(self) -> tuple[StageConfig, ...]:
        """The numbers of each stage; stochastic depth grows linearly from 0 to its full rate."""
        last = max(sum(self.depths) - 1, 1)
        rates = iter([self.drop_path_rate * i / last for i in range(sum(self.depths))])
        return tuple(
            StageConfig(
                in_dim=self.embed_dims[i - 1] if i > 0 else None,
                grid=grid,
                region_grid=region_grid,
                dim=self.embed_dims[i],
                num_heads=self.num_heads[i],
                head_dim=self.head_dim or self.embed_dims[i] // self.num_heads[i],
                mlp_dim=self.mlp_dims[i],
                has_peg=self.peg == "both" or (self.peg == "local" and i > 0),
                drop_path_rates=tuple(next(rates) for _ in range(self.depths[i])),
            )
            for i, (grid, region_grid) in enumerate(self.grids)
        )


def _halved(grid: Grid) -> Grid:
    """Half the rows and columns, the odd one kept: as a 3 x 3 convolution of stride 2 leaves."""
    return -(-grid[0] // 2), -(-grid[1] // 2)


def param_tree(config: RegionViTConfig) -> ParamTree:
    """The modules of a RegionViT with their parameters, output shapes and multiply-adds."""
    scheme, dim = Scheme(config.init_scheme), config.feature_dim
    lead = () if config.final_norm == "pooled" else (config.stages[-1].regions,)
    children = [
        _local_embed(config, scheme),
        _region_embed(config, scheme),
        repeat("stages", len(config.stages), lambda i: _stage(config, i, scheme)),
        layer_norm("norm", lead, dim),
    ]
    if config.num_classes:
        kernel, bias = scheme.head_kernel(dim, config.num_classes), scheme.dense_bias(dim)
        children.append(dense("head", (), dim, config.num_classes, kernel, bias))
    return ParamTree("", children=tuple(children), output=(config.num_classes or dim,))


def _local_embed(config: RegionViTConfig, scheme: Scheme) -> ParamTree:
    """The local tokens: one convolution, or three."""
    grid, dim, channels = config.stages[0].grid, config.embed_dims[0], config.in_channels
    if not config.stem_dims:
        side = 2 * config.patch_size
        children = [_conv("proj", grid, side, channels, dim, scheme)]
    else:
        half, (first, second) = (2 * grid[0], 2 * grid[1]), config.stem_dims
        children = [
            _conv("conv1", half, 3, channels, first, scheme),
            layer_norm("norm1", half, first),
            _conv("conv2", grid, 3, first, second, scheme),
            layer_norm("norm2", grid, second),
            _conv("conv3", grid, 3, second, dim, scheme),
        ]
    return ParamTree("local_embed", children=tuple(children), output=(*grid, dim))


def _region_embed(config: RegionViTConfig, scheme: Scheme) -> ParamTree:
    """The regional tokens: a product over all pixels of a region.

    In either original it is a convolution, and drawn as one.
    """
    grid, dim, width = config.stages[0].region_grid, config.embed_dims[0], config.region_dim
    kernel, bias = scheme.conv_kernel(width), scheme.conv_bias(width)
    proj = dense("proj", grid, width, dim, kernel, bias)
    return ParamTree("region_embed", children=(proj,), output=(*grid, dim))


def _conv(
    name: str, grid: Shape, side: int, in_dim: int, dim: int, scheme: Scheme, groups: int = 1
) -> ParamTree:
    """A convolution with bias, of a square kernel."""
    fan_in = side**2 * in_dim // groups
    inits = scheme.conv_kernel(fan_in), scheme.conv_bias(fan_in)
    return conv(name, grid, (side, side), in_dim, dim, *inits, groups=groups)


def _stage(config: RegionViTConfig, i: int, scheme: Scheme) -> ParamTree:
    stage = config.stages[i]
    params = (_rel_pos(config, stage, scheme),) if config.rel_pos == "stage" else ()
    count = len(stage.drop_path_rates)
    blocks = repeat("blocks", count, lambda _: _block(config, stage, scheme))
    children = [blocks]
    if stage.has_peg:
        # The list appears twice, on both sides of what runs in its middle.
        before = int(config.peg == "both")
        children = [
            replace(blocks, children=blocks.children[:before]),
            _peg(config, stage, scheme),
            replace(blocks, children=blocks.children[before:]),
        ]
    if i > 0:
        children.insert(0, _downsample(config, config.stages[i - 1], stage, scheme))
    return ParamTree("stage", params, tuple(children))


def _rel_pos(config: RegionViTConfig, stage: StageConfig, scheme: Scheme) -> Param:
    shape = (stage.num_heads, config.offsets)
    return Param("rel_pos", shape, Role.OWN, scheme.positions())


def _downsample(
    config: RegionViTConfig, before: StageConfig, stage: StageConfig, scheme: Scheme
) -> ParamTree:
    groups = before.dim if config.downsample == "norm_conv" else 1
    product = _conv("conv", stage.grid, 3, before.dim, stage.dim, scheme, groups)
    children = [_runs_over(product, stage.region_grid)]
    if config.downsample == "norm_conv":
        children.insert(0, layer_norm("norm", before.grid, before.dim))
    return ParamTree("downsample", children=tuple(children), output=(*stage.grid, stage.dim))


def _peg(config: RegionViTConfig, stage: StageConfig, scheme: Scheme) -> ParamTree:
    both, dim = config.peg == "both", stage.dim
    bias = None if both else scheme.conv_bias(9)
    proj = depthwise_conv("proj", stage.grid, (3, 3), dim, scheme.conv_kernel(9), bias)
    proj = _runs_over(proj, stage.region_grid) if both else proj
    return ParamTree("peg", children=(proj,), output=(*stage.grid, dim))


def _block(config: RegionViTConfig, stage: StageConfig, scheme: Scheme) -> ParamTree:
    params = (_rel_pos(config, stage, scheme),) if config.rel_pos == "block" else ()
    lead, dim = (stage.regions, stage.tokens), stage.dim
    children = [
        layer_norm("norm1", lead, dim),
        _attention(config, stage, scheme),
        layer_norm("norm2", lead, dim),
        _mlp(stage, scheme),
    ]
    if config.region_norm:
        children.insert(0, layer_norm("region_norm", (1, stage.regions), dim))
    return ParamTree("block", params, tuple(children), output=(*lead, dim))


def _attention(config: RegionViTConfig, stage: StageConfig, scheme: Scheme) -> ParamTree:
    regions, tokens, dim, inner = stage.regions, stage.tokens, stage.dim, stage.inner_dim
    kernel = scheme.dense_kernel(dim, inner)
    bias = scheme.dense_bias(dim) if config.qkv_bias else None
    qkv = dense("qkv", (regions, tokens), dim, 3 * inner, kernel, bias)
    kernel, bias = scheme.dense_kernel(inner, dim), scheme.dense_bias(inner)
    proj = dense("proj", (regions, tokens), inner, dim, kernel, bias)
    children = tuple(_runs_over(node, (regions,)) for node in (qkv, proj))
    # q·k and weights·v: among the regional tokens, and in every window
    macs = 2 * (regions**2 + regions * tokens**2) * inner
    return ParamTree("attn", children=children, output=(regions, tokens, dim), own_macs=macs)


def _mlp(stage: StageConfig, scheme: Scheme) -> ParamTree:
    lead, dim, hidden = (stage.regions, stage.tokens), stage.dim, stage.mlp_dim
    kernel, bias = scheme.dense_kernel(dim, hidden), scheme.dense_bias(dim)
    fc1 = dense("fc1", lead, dim, hidden, kernel, bias)
    kernel, bias = scheme.dense_kernel(hidden, dim), scheme.dense_bias(hidden)
    fc2 = dense("fc2", lead, hidden, dim, kernel, bias)
    return ParamTree("mlp", children=(fc1, fc2), output=(*lead, dim))


def _runs_over(node: ParamTree, grid: Shape) -> ParamTree:
    """A product that runs over another grid beside its own; the output stays that of its own."""
    kernel = math.prod(node.params[0].shape)
    return replace(node, own_macs=node.own_macs + math.prod(grid) * kernel)


# ``regionvit/regionvit.py`` of the official code; MLPs are four times as wide as their tokens. The
# crop is that of the official evaluation, 224 of 256 pixels.
SIZES: dict[str, dict[str, Any]] = {
    "ti": dict(embed_dims=(64, 128, 256, 512), num_heads=(2, 4, 8, 16), depths=(2, 2, 8, 2)),
    "s": dict(embed_dims=(96, 192, 384, 768), num_heads=(3, 6, 12, 24), depths=(2, 2, 8, 2)),
    "m": dict(embed_dims=(96, 192, 384, 768), num_heads=(3, 6, 12, 24), depths=(2, 2, 14, 2)),
    "b": dict(embed_dims=(128, 256, 512, 1024), num_heads=(4, 8, 16, 32), depths=(2, 2, 14, 2)),
}
STEMS: dict[str, tuple[int, ...]] = {"ti": (16, 32), "s": (24, 48), "m": (), "b": ()}


def _official(size: str) -> RegionViTConfig:
    mlp_dims = tuple(4 * dim for dim in SIZES[size]["embed_dims"])
    return RegionViTConfig(stem_dims=STEMS[size], mlp_dims=mlp_dims, **SIZES[size])


# What vit-pytorch's model has of its own, whatever its arguments.
VIT_PYTORCH: dict[str, Any] = dict(
    patch_size=4,
    num_heads=(4, 4, 4, 4),
    head_dim=32,
    qkv_bias=False,
    region_norm=False,
    rel_pos="stage",
    downsample="conv",
    norm_eps=1e-5,
    final_norm="pooled",
    init_scheme="vit_pytorch",
)

VARIANTS: dict[str, RegionViTConfig] = {
    **{f"regionvit_{size}": _official(size) for size in SIZES},
    # The example model of vit-pytorch's README.
    "regionvit_pytorch": RegionViTConfig(
        stem_dims=(),
        embed_dims=(64, 128, 256, 512),
        depths=(2, 2, 8, 2),
        mlp_dims=(256, 512, 1024, 2048),
        **VIT_PYTORCH,
    ),
}

IBM_PAGE = "README of IBM/RegionViT, after Chen et al. 2022, arXiv:2106.02689"

PUBLISHED: dict[str, Published] = {
    "regionvit_ti": Published(IBM_PAGE, 80.4, gmacs="2.4"),
    "regionvit_s": Published(IBM_PAGE, 82.6, gmacs="5.3"),
    "regionvit_m": Published(IBM_PAGE, 83.1, gmacs="7.4"),
    "regionvit_b": Published(IBM_PAGE, 83.2, gmacs="13.0"),
}

ALIASES = {
    "regionvit_tiny_224": "regionvit_ti",
    "regionvit_small_224": "regionvit_s",
    "regionvit_medium_224": "regionvit_m",
    "regionvit_base_224": "regionvit_b",
}
"""The names of the official code."""
