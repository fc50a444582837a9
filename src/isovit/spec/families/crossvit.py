"""CrossViT: two branches of tokens, of small and of large patches, that exchange class tokens.

Source: Chen et al. 2021, "CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image
Classification", arXiv:2103.14899, section 3 and table 1; the official code (IBM/CrossViT,
Apache-2.0) and timm's ``crossvit.py`` (Apache-2.0), which computes the same; vit-pytorch's
``cross_vit.py`` (MIT) for the other form.

In the official form each branch sees the image at a size of its own, resized by the model itself.
Everything that comes in twos has the branch of small patches first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from isovit.spec.blocks import BlockConfig, block
from isovit.spec.config import (
    Activation,
    Config,
    Epsilon,
    InitScheme,
    NonNegative,
    Pair,
    PositionTable,
    Positive,
    Preprocess,
    Rate,
    require,
)
from isovit.spec.families.vit import ViTConfig, patch_embed
from isovit.spec.param import (
    Param,
    ParamTree,
    Role,
    conv,
    dense,
    layer_norm,
    repeat,
)
from isovit.spec.published import Published
from isovit.spec.scheme import Scheme

Scale = Annotated[float, msgspec.Meta(gt=0.0)]
Both = tuple[Positive, Positive]
"""A number of each branch."""


class StemConv(NamedTuple):
    """A convolution of a stem: its size, its stride and the zeros around the image."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]


# Per side of a patch, the three convolutions that take its place; ``PatchEmbed`` of timm.
STEMS: dict[int, tuple[StemConv, StemConv, StemConv]] = {
    12: (
        StemConv((7, 7), (4, 4), (3, 3)),
        StemConv((3, 3), (3, 3), (0, 0)),
        StemConv((3, 3), (1, 1), (1, 1)),
    ),
    16: (
        StemConv((7, 7), (4, 4), (3, 3)),
        StemConv((3, 3), (2, 2), (1, 1)),
        StemConv((3, 3), (2, 2), (1, 1)),
    ),
}


@dataclass(frozen=True)
class Branch:
    """Numbers of one branch, resolved from the config.

    Attributes:
        source_size: height and width of the model's input.
        image_size: height and width of the image that the branch sees.
        scaling: how the one becomes the other: not at all, by bicubic interpolation, or as a crop.
        patch_size: side of a patch.
        in_channels: channels of the image.
        dim: width of the tokens.
    """

    source_size: tuple[int, int]
    image_size: tuple[int, int]
    scaling: Literal["none", "bicubic", "crop"]
    patch_size: int
    in_channels: int
    dim: int

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def tokens(self) -> int:
        """Number of tokens: the class token and the patches."""
        return 1 + math.prod(self.grid)

    @property
    def corner(self) -> tuple[int, int]:
        """Row and column where a centred crop starts; halves are rounded to even, as in timm."""
        (height, width), (rows, columns) = self.source_size, self.image_size
        return round((height - rows) / 2), round((width - columns) / 2)

    @property
    def stem_dims(self) -> tuple[int, int, int]:
        """Widths behind the convolutions of a stem."""
        return self.dim // 4, self.dim // 2, self.dim


@dataclass(frozen=True)
class Fusion:
    """Numbers of the cross-attention by which a class token reads the other branch's patches.

    Attributes:
        dim: width of the class token's own branch.
        other_dim: width of the other branch, at which it attends.
        tokens: that it attends to: itself and the other branch's patches.
        num_heads: attention heads.
        head_dim: width of a head.
        drop_path_rate: probability that a sample skips the attention.
    """

    dim: int
    other_dim: int
    tokens: int
    num_heads: int
    head_dim: int
    drop_path_rate: float

    @property
    def inner_dim(self) -> int:
        """Width of q, of k and of v: all heads side by side."""
        return self.num_heads * self.head_dim


class Stage(NamedTuple):
    """Numbers of one stage: the blocks of each branch, and the fusion into each."""

    blocks: tuple[tuple[BlockConfig, ...], tuple[BlockConfig, ...]]
    fusions: tuple[Fusion, Fusion]


class CrossViTConfig(Config, frozen=True, kw_only=True, tag="crossvit"):
    """Config of a CrossViT.

    Attributes:
        image_scale: size of the image that each branch sees, as a factor on ``image_size``; a
            product that is no integer is rounded down, as in timm.
        scaling: how a branch gets an image of another size: ``bicubic`` interpolation (a = -0.75,
            half-pixel centres, not antialiased), or ``crop``, its centre, where that is large
            enough.
        patch_size: side of a patch of each branch, in pixels.
        patch_embed: ``conv``, a convolution of stride ``patch_size``; ``conv_stem``, three
            convolutions with ReLU between (the models marked †), for patches of 12 and 16; or
            ``norm_linear_norm``, which normalises each flattened patch, order (height, width,
            channel), before and after the product.
        depth: number of stages, each of blocks in both branches and fusions between them.
        branch_depth: blocks of each branch in a stage.
        embed_dim: width of the tokens of each branch.
        num_heads: attention heads of each branch.
        head_dim: width of a head of each branch; None for embed_dim / num_heads.
        qkv_bias: whether q, k and v have a bias, in blocks and fusions.
        mlp_dim: hidden width of the MLP of each branch.
        stage_norm: whether a LayerNorm over all tokens ends the blocks of each stage.
        fusion: how a class token reads the other branch. ``projected`` (official): it goes to the
            other width by LayerNorm, activation, dense, attends there, and comes back likewise, in
            place of what it was. ``residual`` (vit-pytorch): what attention gives comes back by a
            dense layer and is added to it; nothing but the class token is normalised, and branches
            of one width have no dense layers.
        cross_depth: how often a class token attends in one stage.
        cross_num_heads: heads of the fusions; None for those of the branch attended to.
        cross_head_dim: width of such a head; None for the width attended at / its heads.
        activation: of the MLPs and of projected fusions.
        norm_eps: epsilon inside the root of every LayerNorm.
        pool: the class token of each branch (``cls``), or the mean over its patches
            (``mean_patches``).
        logits: the ``mean`` or the ``sum`` of both heads' logits.
        embed_dropout_rate: on the tokens before the first stage.
        dropout_rate: after every attention's projection and both products of the MLPs.
        attn_dropout_rate: on the attention weights.
        head_dropout_rate: on the features before the heads.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 over the deeper
            branch. A fusion has the rate of the last block of its stage.
        init_scheme: whose initialisation ``init`` follows; that of the official code is ``yitu``.
    """

    image_size: Pair = (240, 240)
    image_scale: tuple[Scale, Scale] = (1.0, 224 / 240)
    scaling: Literal["bicubic", "crop"] = "bicubic"
    patch_size: Both = (12, 16)
    patch_embed: Literal["conv", "conv_stem", "norm_linear_norm"] = "conv"
    depth: NonNegative = 3
    branch_depth: tuple[NonNegative, NonNegative] = (1, 4)
    embed_dim: Both = (192, 384)
    num_heads: Both = (6, 6)
    head_dim: Both | None = None
    qkv_bias: bool = True
    mlp_dim: Both = (768, 1536)
    stage_norm: bool = False
    fusion: Literal["projected", "residual"] = "projected"
    cross_depth: Positive = 1
    cross_num_heads: Positive | None = None
    cross_head_dim: Positive | None = None
    activation: Activation = "gelu"
    norm_eps: Epsilon = 1e-6
    pool: Literal["cls", "mean_patches"] = "cls"
    logits: Literal["mean", "sum"] = "mean"
    embed_dropout_rate: Rate = 0.0
    dropout_rate: Rate = 0.0
    attn_dropout_rate: Rate = 0.0
    head_dropout_rate: Rate = 0.0
    drop_path_rate: Rate = 0.0
    init_scheme: InitScheme = "yitu"

    def check(self) -> None:
        """Check that patches tile the images, that heads fit the widths, and the fusion."""
        super().check()
        for b, branch in enumerate(self.branches):
            for axis, size in zip(("height", "width"), branch.image_size, strict=True):
                require(
                    size > 0 and size % branch.patch_size == 0,
                    f"image_scale[{b}]",
                    self.image_scale[b],
                    f"makes the {axis} of image_size={self.image_size} {size}, which must be "
                    f"divisible by patch_size[{b}]={branch.patch_size}",
                )
            require(
                self.patch_embed != "conv_stem" or branch.patch_size in STEMS,
                f"patch_size[{b}]",
                branch.patch_size,
                f"patch_embed=conv_stem is for patches of {' or '.join(map(str, STEMS))}",
            )
            require(
                self.patch_embed != "conv_stem" or branch.dim >= 4,
                f"embed_dim[{b}]",
                branch.dim,
                "patch_embed=conv_stem starts at a quarter of it: needs 4 or more",
            )
            require(
                self.head_dim is not None or branch.dim % self.num_heads[b] == 0,
                f"embed_dim[{b}]",
                branch.dim,
                f"must be divisible by num_heads[{b}]={self.num_heads[b]}, unless head_dim is "
                "given",
            )
            num_heads = self.cross_num_heads or self.num_heads[b]
            require(
                self.cross_head_dim is not None or branch.dim % num_heads == 0,
                f"embed_dim[{b}]",
                branch.dim,
                f"must be divisible by the {num_heads} heads of the fusion, unless cross_head_dim "
                "is given",
            )
        require(
            self.fusion != "projected" or self.cross_depth == 1,
            "cross_depth",
            self.cross_depth,
            "fusion=projected replaces the class token: needs cross_depth=1",
        )

    @property
    def branches(self) -> tuple[Branch, Branch]:
        """The numbers of each branch."""
        return self._branch(0), self._branch(1)

    def stem(self, branch: Branch) -> ViTConfig:
        """The patch embedding of a branch, where it is that of a ViT, as the config of one."""
        return ViTConfig(
            image_size=branch.image_size,
            in_channels=self.in_channels,
            preprocess=self.preprocess,
            patch_size=(branch.patch_size, branch.patch_size),
            patch_embed="conv" if self.patch_embed == "conv" else "norm_linear_norm",
            embed_dim=branch.dim,
            num_heads=1,  # it has no blocks
            norm_eps=self.norm_eps,
        )

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The numbers of each stage."""
        longest = max(self.branch_depth)
        last = max(self.depth * longest - 1, 1)
        rates = [self.drop_path_rate * i / last for i in range(self.depth * longest)]
        return tuple(self._stage(rates[s * longest : (s + 1) * longest]) for s in range(self.depth))

    @property
    def position_tables(self) -> Mapping[str, PositionTable]:
        """See ``Config.position_tables``."""
        return {
            f"embeds.{b}.pos_embed": PositionTable(branch.grid, prefix=1)
            for b, branch in enumerate(self.branches)
        }

    def _branch(self, b: int) -> Branch:
        height, width = (int(side * self.image_scale[b]) for side in self.image_size)
        inside = height <= self.image_size[0] and width <= self.image_size[1]
        scaling = "crop" if self.scaling == "crop" and inside else "bicubic"
        return Branch(
            source_size=self.image_size,
            image_size=(height, width),
            scaling="none" if (height, width) == self.image_size else scaling,
            patch_size=self.patch_size[b],
            in_channels=self.in_channels,
            dim=self.embed_dim[b],
        )

    def _stage(self, rates: list[float]) -> Stage:
        small, large = (
            tuple(replace(self._block(b), drop_path_rate=rate) for rate in rates[:depth])
            for b, depth in enumerate(self.branch_depth)
        )
        rate = rates[-1] if rates else self.drop_path_rate
        return Stage((small, large), (self._fusion(0, rate), self._fusion(1, rate)))

    def _block(self, b: int) -> BlockConfig:
        """The numbers of a block of a branch, without stochastic depth."""
        head_dim = self.head_dim[b] if self.head_dim else self.embed_dim[b] // self.num_heads[b]
        return BlockConfig(
            dim=self.embed_dim[b],
            num_heads=self.num_heads[b],
            head_dim=head_dim,
            qkv_bias=self.qkv_bias,
            attn_proj=True,
            attn_scale=head_dim**-0.5,
            mlp_dim=self.mlp_dim[b],
            activation=self.activation,
            norm_eps=self.norm_eps,
            layer_scale_init=None,
            dropout_rate=self.dropout_rate,
            attn_dropout_rate=self.attn_dropout_rate,
            drop_path_rate=0.0,
        )

    def _fusion(self, b: int, rate: float) -> Fusion:
        other = self._branch(1 - b)
        num_heads = self.cross_num_heads or self.num_heads[1 - b]
        return Fusion(
            dim=self.embed_dim[b],
            other_dim=other.dim,
            tokens=other.tokens,
            num_heads=num_heads,
            head_dim=self.cross_head_dim or other.dim // num_heads,
            drop_path_rate=rate,
        )


def param_tree(config: CrossViTConfig) -> ParamTree:
    """The modules of a CrossViT with their parameters, output shapes and multiply-adds."""
    scheme, branches, stages = Scheme(config.init_scheme), config.branches, config.stages
    classes = config.num_classes
    return ParamTree(
        name="",
        children=(
            repeat("embeds", 2, lambda b: _embed(config, branches[b], scheme)),
            repeat("stages", config.depth, lambda s: _stage(config, stages[s], scheme)),
            repeat("norm", 2, lambda b: layer_norm("", (branches[b].tokens,), branches[b].dim)),
            repeat("head", 2 if classes else 0, lambda b: _head(branches[b].dim, classes, scheme)),
        ),
        output=(classes or sum(config.embed_dim),),
    )


def _embed(config: CrossViTConfig, branch: Branch, scheme: Scheme) -> ParamTree:
    embed = (
        _conv_stem(branch, scheme)
        if config.patch_embed == "conv_stem"
        else patch_embed(config.stem(branch), scheme)
    )
    params = (
        Param("cls_token", (1, 1, branch.dim), Role.OWN, scheme.class_token()),
        Param("pos_embed", (1, branch.tokens, branch.dim), Role.OWN, scheme.positions()),
    )
    resize = (_resize(branch),) if branch.scaling == "bicubic" else ()  # a crop computes nothing
    children = (*resize, embed)
    return ParamTree("embed", params, children, output=(branch.tokens, branch.dim))


def _resize(branch: Branch) -> ParamTree:
    (height, width), (rows, columns) = branch.source_size, branch.image_size
    output = (rows, columns, branch.in_channels)
    macs = rows * width * (height + columns) * branch.in_channels  # by rows, then by columns
    return ParamTree("resize", output=output, own_macs=macs)


def _conv_stem(branch: Branch, scheme: Scheme) -> ParamTree:
    children: list[ParamTree] = []
    (rows, columns), in_dim = branch.image_size, branch.in_channels
    for i, (shape, dim) in enumerate(zip(STEMS[branch.patch_size], branch.stem_dims, strict=True)):
        rows, columns = rows // shape.stride[0], columns // shape.stride[1]
        fan_in = math.prod(shape.kernel_size) * in_dim
        kernel, bias = scheme.conv_kernel(fan_in), scheme.conv_bias(fan_in)
        grid = (rows, columns)
        children.append(conv(f"conv{i + 1}", grid, shape.kernel_size, in_dim, dim, kernel, bias))
        in_dim = dim
    return ParamTree("patch_embed", children=tuple(children), output=(rows * columns, in_dim))


def _stage(config: CrossViTConfig, stage: Stage, scheme: Scheme) -> ParamTree:
    make = {"projected": _projected_fusion, "residual": _residual_fusion}[config.fusion]
    branches = config.branches
    encoders = repeat(
        "encoders", 2, lambda b: _encoder(config, branches[b], stage.blocks[b], scheme)
    )
    fusions = repeat("fusions", 2, lambda b: make(config, stage.fusions[b], scheme))
    return ParamTree("stage", children=(encoders, fusions))


def _encoder(
    config: CrossViTConfig, branch: Branch, numbers: tuple[BlockConfig, ...], scheme: Scheme
) -> ParamTree:
    tokens, dim = branch.tokens, branch.dim
    blocks = repeat("blocks", len(numbers), lambda i: block(numbers[i], tokens, scheme))
    norm = (layer_norm("norm", (tokens,), dim),) if config.stage_norm else ()
    return ParamTree("encoder", children=(blocks, *norm), output=(tokens, dim))


def _projected_fusion(config: CrossViTConfig, fusion: Fusion, scheme: Scheme) -> ParamTree:
    dim, other_dim = fusion.dim, fusion.other_dim
    children = (
        layer_norm("norm_in", (1,), dim),
        _token_dense("proj_in", dim, other_dim, scheme),
        layer_norm("norm", (fusion.tokens,), other_dim),
        _cross_attention(config, fusion, scheme),
        layer_norm("norm_out", (1,), other_dim),
        _token_dense("proj_out", other_dim, dim, scheme),
    )
    return ParamTree("fusion", children=children, output=(1, dim))


def _residual_fusion(config: CrossViTConfig, fusion: Fusion, scheme: Scheme) -> ParamTree:
    layers = repeat("layers", config.cross_depth, lambda i: _cross_layer(config, fusion, scheme))
    return ParamTree("fusion", children=(layers,), output=(1, fusion.dim))


def _cross_layer(config: CrossViTConfig, fusion: Fusion, scheme: Scheme) -> ParamTree:
    dim, other_dim = fusion.dim, fusion.other_dim
    children = [layer_norm("norm", (1,), other_dim), _cross_attention(config, fusion, scheme)]
    if dim != other_dim:
        children.insert(0, _token_dense("proj_in", dim, other_dim, scheme))
        children.append(_token_dense("proj_out", other_dim, dim, scheme))
    return ParamTree("layer", children=tuple(children), output=(1, dim))


def _cross_attention(config: CrossViTConfig, fusion: Fusion, scheme: Scheme) -> ParamTree:
    """Attention of the class token alone, over itself and the other branch's patches."""
    tokens, dim, inner = fusion.tokens, fusion.other_dim, fusion.inner_dim
    kernel, bias = scheme.dense_kernel(dim, inner), scheme.dense_bias(dim)
    qkv_bias = bias if config.qkv_bias else None
    children = (
        dense("q", (1,), dim, inner, kernel, qkv_bias),
        dense("kv", (tokens,), dim, 2 * inner, kernel, qkv_bias),
        _token_dense("proj", inner, dim, scheme),
    )
    products = 2 * tokens * inner  # q·k and weights·v
    return ParamTree("attn", children=children, output=(1, dim), own_macs=products)


def _token_dense(name: str, in_dim: int, out_dim: int, scheme: Scheme) -> ParamTree:
    kernel, bias = scheme.dense_kernel(in_dim, out_dim), scheme.dense_bias(in_dim)
    return dense(name, (1,), in_dim, out_dim, kernel, bias)


def _head(dim: int, classes: int, scheme: Scheme) -> ParamTree:
    return dense("", (), dim, classes, scheme.head_kernel(dim, classes), scheme.dense_bias(dim))


# Chen et al. 2021, table 1: widths of the branches, blocks of the large one in each of 3 stages,
# heads, and the MLP's hidden width as a multiple of the width.
SIZES: dict[str, tuple[tuple[int, int], int, int, int]] = {
    "tiny": ((96, 192), 4, 3, 4),
    "small": ((192, 384), 4, 6, 4),
    "base": ((384, 768), 4, 12, 4),
    "9": ((128, 256), 3, 4, 3),
    "15": ((192, 384), 5, 6, 3),
    "18": ((224, 448), 6, 7, 3),
}


def _official(size: str, **changes: Any) -> CrossViTConfig:
    (small, large), depth, heads, ratio = SIZES[size]
    return CrossViTConfig(
        branch_depth=(1, depth),
        embed_dim=(small, large),
        num_heads=(heads, heads),
        mlp_dim=(ratio * small, ratio * large),
        **changes,
    )


# What the models fine-tuned at the larger size have of their own.
LARGER: dict[str, Any] = dict(
    image_size=(408, 408),
    image_scale=(1.0, 384 / 408),
    preprocess=Preprocess(crop_fraction=1.0),
)

VARIANTS: dict[str, CrossViTConfig] = {
    **{f"crossvit_{size}": _official(size) for size in ("tiny", "small", "base")},
    "crossvit_9": _official("9"),
    "crossvit_9_dagger": _official("9", patch_embed="conv_stem"),
    "crossvit_15": _official("15"),
    "crossvit_15_dagger": _official("15", patch_embed="conv_stem"),
    "crossvit_15_dagger_408": _official("15", patch_embed="conv_stem", **LARGER),
    "crossvit_18": _official("18"),
    "crossvit_18_dagger": _official("18", patch_embed="conv_stem"),
    "crossvit_18_dagger_408": _official("18", patch_embed="conv_stem", **LARGER),
    # The example model of vit-pytorch's README.
    "crossvit_pytorch": CrossViTConfig(
        image_size=(256, 256),
        image_scale=(1.0, 1.0),
        patch_size=(16, 64),
        patch_embed="norm_linear_norm",
        depth=4,
        branch_depth=(2, 3),
        embed_dim=(192, 384),
        num_heads=(8, 8),
        head_dim=(64, 64),
        qkv_bias=False,
        mlp_dim=(2048, 2048),
        stage_norm=True,
        fusion="residual",
        cross_depth=2,
        cross_num_heads=8,
        cross_head_dim=64,
        norm_eps=1e-5,
        logits="sum",
        embed_dropout_rate=0.1,
        dropout_rate=0.1,
        attn_dropout_rate=0.1,
        init_scheme="vit_pytorch",
    ),
}

PAPER = "Chen et al. 2021, arXiv:2103.14899"
TABLE_2, TABLE_4 = f"{PAPER}, table 2", f"{PAPER}, table 4"
UNCOUNTED = "the paper does not count the resizing of the image"

PUBLISHED: dict[str, Published] = {
    "crossvit_tiny": Published(TABLE_2, 73.4, gmacs="1.6"),
    "crossvit_small": Published(TABLE_2, 81.0, gmacs="5.6", gmacs_note=UNCOUNTED),
    "crossvit_base": Published(TABLE_2, 82.2, gmacs="21.2", gmacs_note=UNCOUNTED),
    "crossvit_9": Published(TABLE_2, 73.9, gmacs="1.8", gmacs_note=UNCOUNTED),
    "crossvit_9_dagger": Published(TABLE_2, 77.1, gmacs="2.0", gmacs_note=UNCOUNTED),
    "crossvit_15": Published(TABLE_2, 81.5, gmacs="5.8", gmacs_note=UNCOUNTED),
    "crossvit_15_dagger": Published(TABLE_2, 82.3, gmacs="6.1", gmacs_note=UNCOUNTED),
    "crossvit_15_dagger_408": Published(TABLE_4, 83.5, 384, "21.4", UNCOUNTED),
    "crossvit_18": Published(TABLE_2, 82.5, gmacs="9.0", gmacs_note=UNCOUNTED),
    "crossvit_18_dagger": Published(TABLE_2, 82.8, gmacs="9.5"),
    "crossvit_18_dagger_408": Published(TABLE_4, 83.9, 384, "32.4", UNCOUNTED),
}
"""Of images of 224 or 384 pixels, which the official code enlarges for the small patches; timm
takes them at 240 or 408, as these configs do, and shrinks them for the large ones."""

ALIASES = {
    **{
        f"{name}_{size}": name
        for name, config in VARIANTS.items()
        if config.image_size == (240, 240)
        for size in (240, 224)
    },
    "crossvit_15_dagger_384": "crossvit_15_dagger_408",
    "crossvit_18_dagger_384": "crossvit_18_dagger_408",
}
"""The names of timm, after the input's size, and of the official code, after the large patches'."""
