"""Twins-SVT: windows and a summary of the whole image, in turn.

Source: Chu et al. 2021, "Twins: Revisiting the Design of Spatial Attention in Vision Transformers",
arXiv:2104.13840, section 3.2; the official code (Meituan-AutoML/Twins, Apache-2.0), as timm 1.0.31
has it in ``twins.py``, for what the paper leaves open; vit-pytorch's ``twins_svt.py`` (MIT) for the
other form. The positions come from a convolution: Chu et al. 2021, arXiv:2102.10882, section 4.

A stage embeds patches and then runs pre-norm blocks over a grid that stays as it is. Its even
blocks attend within windows (LSA in the paper), its odd ones (GSA) from every token to one summary
of each square of tokens. A stage without windows has the second kind alone: with four such stages
it is Twins-PCPVT, section 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from isovit.spec.blocks import BlockConfig, block
from isovit.spec.config import (
    Activation,
    Config,
    Epsilon,
    NonNegative,
    Positive,
    Rate,
    Stages,
    require,
    require_stages,
)
from isovit.spec.param import (
    ZEROS,
    Init,
    ParamTree,
    conv,
    dense,
    depthwise_conv,
    layer_norm,
)
from isovit.spec.published import Published
from isovit.spec.scheme import Scheme


@dataclass(frozen=True)
class StageConfig:
    """Numbers of one stage, resolved from the config.

    Attributes:
        in_dim: channels of its input.
        patch_size: side of a patch of that input.
        grid: rows and columns of its tokens.
        dim: width of the tokens.
        window_size: side of a window, in tokens; 0 for no windows.
        reduction: side of the square of tokens that one key and one value summarise.
        peg_after: number of blocks before the positional encoding.
        blocks: the numbers of each block.
    """

    in_dim: int
    patch_size: int
    grid: tuple[int, int]
    dim: int
    window_size: int
    reduction: int
    peg_after: int
    blocks: tuple[BlockConfig, ...]

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return math.prod(self.grid)

    @property
    def patch_dim(self) -> int:
        """Numbers in a flattened patch."""
        return self.patch_size**2 * self.in_dim

    @property
    def padded_grid(self) -> tuple[int, int]:
        """The grid with rows and columns of zeros behind it, so that windows tile it."""
        rows, columns = (size + -size % self.window_size for size in self.grid)
        return rows, columns

    @property
    def reduced_grid(self) -> tuple[int, int]:
        """Rows and columns of keys in the global attention; what is left over is not seen."""
        return self.grid[0] // self.reduction, self.grid[1] // self.reduction

    @property
    def has_one_key(self) -> bool:
        """Whether the global attention has one summary alone: its weight is 1, whatever q is."""
        return self.reduced_grid == (1, 1)

    def is_local(self, block: int) -> bool:
        """Whether a block attends within windows."""
        return _is_local(self.window_size, block)


def _is_local(window_size: int, block: int) -> bool:
    return window_size > 0 and block % 2 == 0


class TwinsSVTConfig(Config, frozen=True, kw_only=True, tag="twins_svt"):
    """Config of a Twins-SVT; what has a number for each stage is a tuple of as many.

    Attributes:
        embed_dims: width of the tokens.
        depths: number of blocks, of either kind.
        num_heads: attention heads.
        head_dim: width of a head, of every stage; None for embed_dims / num_heads.
        mlp_dims: hidden width of the MLPs.
        patch_sizes: side of a patch: pixels in the first stage, tokens of the stage before it in
            the others.
        patch_embed: ``conv_norm``, a convolution of stride ``patch_sizes``, then LayerNorm
            (official); or ``norm_linear_norm`` (vit-pytorch), which normalises each flattened
            patch, order (channel, height, width), before and after the product.
        window_sizes: side of a window, in tokens; 0 for a stage whose blocks are all global. Where
            windows do not tile the grid, zeros are put behind its rows and columns after the norm;
            they are attended to as tokens are (timm; vit-pytorch and the official classifier need
            windows that tile).
        reductions: side of the square of tokens that one key and one value of the global attention
            summarise. Rows and columns beyond the last whole square are not summarised.
        reduce: how: ``conv_norm_linear``, a convolution, LayerNorm and a product, of which a
            reduction of 1 leaves the product alone (official); or ``conv``, one convolution to key
            and value (vit-pytorch).
        qkv_bias: whether the products for q, k and v have a bias.
        peg_after: number of blocks before the positional encoding: the official code has it behind
            the first block, vit-pytorch behind the first pair of a local and a global one.
        peg_kernel_size: side of its depthwise convolution.
        activation: of the MLPs.
        norm_eps: epsilon inside the root of the LayerNorms of blocks and head.
        embed_norm_eps: of those in the patch embeddings.
        reduce_norm_eps: of those in the global attention.
        final_norm: LayerNorm over the ``tokens`` before pooling, or ``none``.
        pool: the ``mean`` over all tokens, or ``none``, in which case every token comes out.
        embed_dropout_rate: on the tokens of every patch embedding.
        dropout_rate: after the attention's projection and both products of the MLP.
        local_attn_dropout_rate: on the attention weights within windows.
        global_attn_dropout_rate: on those of the global attention.
        head_dropout_rate: on the pooled vector.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 over all blocks.
        init_scheme: whose initialisation ``init`` follows.
    """

    embed_dims: Stages = (64, 128, 256, 512)
    depths: Stages = (2, 2, 10, 4)
    num_heads: Stages = (2, 4, 8, 16)
    head_dim: Positive | None = None
    mlp_dims: Stages = (256, 512, 1024, 2048)
    patch_sizes: Stages = (4, 2, 2, 2)
    patch_embed: Literal["conv_norm", "norm_linear_norm"] = "conv_norm"
    window_sizes: tuple[NonNegative, ...] = (7, 7, 7, 7)
    reductions: Stages = (8, 4, 2, 1)
    reduce: Literal["conv_norm_linear", "conv"] = "conv_norm_linear"
    qkv_bias: bool = True
    peg_after: Stages = (1, 1, 1, 1)
    peg_kernel_size: Positive = 3
    activation: Activation = "gelu"
    norm_eps: Epsilon = 1e-6
    embed_norm_eps: Epsilon = 1e-5
    reduce_norm_eps: Epsilon = 1e-5
    final_norm: Literal["tokens", "none"] = "tokens"
    pool: Literal["mean", "none"] = "mean"
    embed_dropout_rate: Rate = 0.0
    dropout_rate: Rate = 0.0
    local_attn_dropout_rate: Rate = 0.0
    global_attn_dropout_rate: Rate = 0.0
    head_dropout_rate: Rate = 0.0
    drop_path_rate: Rate = 0.0
    init_scheme: Literal["timm", "vit_pytorch"] = "timm"

    def check(self) -> None:
        """Check that stages fit together and each fits its grid, and the rules of the head."""
        super().check()
        require_stages(self, PER_STAGE)
        require(
            self.peg_kernel_size % 2 == 1,
            "peg_kernel_size",
            self.peg_kernel_size,
            "must be odd: the grid stays as it is",
        )
        require(
            self.pool != "none" or self.num_classes == 0,
            "pool",
            self.pool,
            "every token comes out: needs num_classes=0",
        )
        height, width = self.image_size
        for i in range(len(self.embed_dims)):
            self._check_stage(i, (height, width))
            height, width = height // self.patch_sizes[i], width // self.patch_sizes[i]

    def _check_stage(self, i: int, size: tuple[int, int]) -> None:
        """Check a stage whose input has this height and width."""
        patch = self.patch_sizes[i]
        require(
            self.peg_after[i] <= self.depths[i],
            f"peg_after[{i}]",
            self.peg_after[i],
            f"must be at most depths[{i}]={self.depths[i]}",
        )
        require(
            all(side % patch == 0 for side in size),
            f"patch_sizes[{i}]",
            patch,
            f"must divide its input, which image_size={self.image_size} leaves {_times(size)}",
        )
        grid = (size[0] // patch, size[1] // patch)
        has_global = self.window_sizes[i] == 0 or self.depths[i] > 1
        require(
            not has_global or self.reductions[i] <= min(grid),
            f"reductions[{i}]",
            self.reductions[i],
            f"must fit the grid, which image_size={self.image_size} leaves {_times(grid)}",
        )

    @property
    def stages(self) -> tuple[StageConfig, ...]:
        """The numbers of each stage; stochastic depth grows linearly from 0 to its full rate."""
        stages: list[StageConfig] = []
        (rows, columns), channels = self.image_size, self.in_channels
        last = max(sum(self.depths) - 1, 1)
        rates = iter([self.drop_path_rate * i / last for i in range(sum(self.depths))])
        for i, dim in enumerate(self.embed_dims):
            rows, columns = rows // self.patch_sizes[i], columns // self.patch_sizes[i]
            stages.append(
                StageConfig(
                    in_dim=channels,
                    patch_size=self.patch_sizes[i],
                    grid=(rows, columns),
                    dim=dim,
                    window_size=self.window_sizes[i],
                    reduction=self.reductions[i],
                    peg_after=self.peg_after[i],
                    blocks=tuple(self._block(i, j, next(rates)) for j in range(self.depths[i])),
                )
            )
            channels = dim
        return tuple(stages)

    def _block(self, i: int, j: int, drop_path_rate: float) -> BlockConfig:
        """The numbers of block j of stage i."""
        dim, heads = self.embed_dims[i], self.num_heads[i]
        local, head_dim = _is_local(self.window_sizes[i], j), self.head_dim or dim // heads
        return BlockConfig(
            dim=dim,
            num_heads=heads,
            head_dim=head_dim,
            qkv_bias=self.qkv_bias,
            attn_proj=True,
            attn_scale=head_dim**-0.5,
            mlp_dim=self.mlp_dims[i],
            activation=self.activation,
            norm_eps=self.norm_eps,
            layer_scale_init=None,
            dropout_rate=self.dropout_rate,
            attn_dropout_rate=(
                self.local_attn_dropout_rate if local else self.global_attn_dropout_rate
            ),
            drop_path_rate=drop_path_rate,
        )


PER_STAGE = (
    "depths",
    "mlp_dims",
    "patch_sizes",
    "window_sizes",
    "reductions",
    "peg_after",
)
"""Fields of as many numbers as ``embed_dims`` and ``num_heads``."""


def _times(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))


def param_tree(config: TwinsSVTConfig) -> ParamTree:
    """The modules of a Twins-SVT with their parameters, output shapes and multiply-adds."""
    scheme, last = Scheme(config.init_scheme), config.stages[-1]
    stages = (
        _stage(config, stage, scheme).renamed(str(i)) for i, stage in enumerate(config.stages)
    )
    children = [ParamTree("stages", children=tuple(stages))]
    if config.final_norm == "tokens":
        children.append(layer_norm("norm", (last.tokens,), last.dim))
    if config.num_classes:
        kernel = scheme.head_kernel(last.dim, config.num_classes)
        bias = scheme.dense_bias(last.dim)
        children.append(dense("head", (), last.dim, config.num_classes, kernel, bias))
    width = config.num_classes or last.dim
    output = (last.tokens, width) if config.pool == "none" else (width,)
    return ParamTree("", children=tuple(children), output=output)


def _stage(config: TwinsSVTConfig, stage: StageConfig, scheme: Scheme) -> ParamTree:
    blocks = [_block(config, stage, i, scheme).renamed(str(i)) for i in range(len(stage.blocks))]
    size, dim = config.peg_kernel_size, stage.dim
    inits = _conv_inits(scheme, fan_in=size**2, fan_out=size**2)
    proj = depthwise_conv("proj", stage.grid, (size, size), dim, *inits)
    # The list appears twice, on both sides of what runs in its middle.
    children = (
        _patch_embed(config, stage, scheme),
        ParamTree("blocks", children=tuple(blocks[: stage.peg_after])),
        ParamTree("peg", children=(proj,), output=(stage.tokens, dim)),
        ParamTree("blocks", children=tuple(blocks[stage.peg_after :])),
    )
    return ParamTree("stage", children=children, output=(*stage.grid, dim))


def _patch_embed(config: TwinsSVTConfig, stage: StageConfig, scheme: Scheme) -> ParamTree:
    lead, side, dim, patch_dim = (stage.tokens,), stage.patch_size, stage.dim, stage.patch_dim
    if config.patch_embed == "conv_norm":
        inits = _conv_inits(scheme, fan_in=patch_dim, fan_out=side**2 * dim)
        proj = conv("proj", stage.grid, (side, side), stage.in_dim, dim, *inits)
        children = (proj, layer_norm("norm", lead, dim))
    else:
        kernel, bias = scheme.dense_kernel(patch_dim, dim), scheme.dense_bias(patch_dim)
        children = (
            layer_norm("norm1", lead, patch_dim),
            dense("proj", lead, patch_dim, dim, kernel, bias),
            layer_norm("norm2", lead, dim),
        )
    return ParamTree("patch_embed", children=children, output=(stage.tokens, dim))


def _block(config: TwinsSVTConfig, stage: StageConfig, i: int, scheme: Scheme) -> ParamTree:
    numbers = stage.blocks[i]
    attn = _local_attention if stage.is_local(i) else _global_attention
    return block(numbers, stage.tokens, scheme, attn(config, stage, numbers.inner_dim, scheme))


def _local_attention(
    config: TwinsSVTConfig, stage: StageConfig, inner: int, scheme: Scheme
) -> ParamTree:
    dim, padded = stage.dim, stage.padded_grid
    kernel, bias = scheme.dense_kernel(dim, inner), _qkv_bias(config, scheme.dense_bias(dim))
    qkv = dense("qkv", padded, dim, 3 * inner, kernel, bias)
    kernel, bias = scheme.dense_kernel(inner, dim), scheme.dense_bias(inner)
    proj = dense("proj", (stage.tokens,), inner, dim, kernel, bias)
    # q·k and weights·v: every token, the zeros too, with each of its window
    macs = 2 * math.prod(padded) * stage.window_size**2 * inner
    return ParamTree("attn", children=(qkv, proj), output=(stage.tokens, dim), own_macs=macs)


def _global_attention(
    config: TwinsSVTConfig, stage: StageConfig, inner: int, scheme: Scheme
) -> ParamTree:
    lead, dim = (stage.tokens,), stage.dim
    kernel, bias = scheme.dense_kernel(dim, inner), _qkv_bias(config, scheme.dense_bias(dim))
    q = dense("q", lead, dim, inner, kernel, bias)
    if stage.has_one_key:  # its gradient is zero but for rounding, by which it would be moved
        q = replace(q, params=tuple(replace(param, trainable=False) for param in q.params))
    kv = _keys_and_values(config, stage, 2 * inner, scheme)
    kernel, bias = scheme.dense_kernel(inner, dim), scheme.dense_bias(inner)
    proj = dense("proj", lead, inner, dim, kernel, bias)
    macs = 2 * stage.tokens * math.prod(stage.reduced_grid) * inner  # q·k and weights·v
    return ParamTree("attn", children=(q, *kv, proj), output=(stage.tokens, dim), own_macs=macs)


def _keys_and_values(
    config: TwinsSVTConfig, stage: StageConfig, width: int, scheme: Scheme
) -> tuple[ParamTree, ...]:
    grid, dim, side = stage.reduced_grid, stage.dim, stage.reduction
    fan_in = side**2 * dim
    if config.reduce == "conv":
        kernel, bias = _conv_inits(scheme, fan_in, fan_out=side**2 * width)
        return (conv("kv", grid, (side, side), dim, width, kernel, _qkv_bias(config, bias)),)
    kernel, bias = scheme.dense_kernel(dim, width), _qkv_bias(config, scheme.dense_bias(dim))
    kv = dense("kv", grid, dim, width, kernel, bias)
    if side == 1:
        return (kv,)
    inits = _conv_inits(scheme, fan_in, fan_out=fan_in)
    return conv("reduce", grid, (side, side), dim, dim, *inits), layer_norm("norm", grid, dim), kv


def _qkv_bias(config: TwinsSVTConfig, bias: Init) -> Init | None:
    return bias if config.qkv_bias else None


def _conv_inits(scheme: Scheme, fan_in: int, fan_out: int) -> tuple[Init, Init]:
    """Kernel and bias of a convolution; the official code draws by the fan out, as ResNets do."""
    if scheme.name == "timm":
        return Init("normal", math.sqrt(2 / fan_out)), ZEROS
    return scheme.conv_kernel(fan_in), scheme.conv_bias(fan_in)


# Chu et al. 2021, appendix, and ``gvt.py`` of the official code; MLPs are four times as wide as
# their tokens. The crop is that of the official evaluation, 224 of 256 pixels; timm has 0.9.
SIZES: dict[str, dict[str, Any]] = {
    "s": dict(embed_dims=(64, 128, 256, 512), num_heads=(2, 4, 8, 16), depths=(2, 2, 10, 4)),
    "b": dict(embed_dims=(96, 192, 384, 768), num_heads=(3, 6, 12, 24), depths=(2, 2, 18, 2)),
    "l": dict(embed_dims=(128, 256, 512, 1024), num_heads=(4, 8, 16, 32), depths=(2, 2, 18, 2)),
}


def _official(size: str) -> TwinsSVTConfig:
    mlp_dims = tuple(4 * dim for dim in SIZES[size]["embed_dims"])
    return TwinsSVTConfig(mlp_dims=mlp_dims, **SIZES[size])


# What vit-pytorch's model has of its own, whatever its arguments.
VIT_PYTORCH: dict[str, Any] = dict(
    head_dim=64,
    patch_embed="norm_linear_norm",
    reduce="conv",
    qkv_bias=False,
    norm_eps=1e-5,
    final_norm="none",
    init_scheme="vit_pytorch",
)

VARIANTS: dict[str, TwinsSVTConfig] = {
    **{f"twins_svt_{size}": _official(size) for size in SIZES},
    # The example model of vit-pytorch's README.
    "twins_svt_pytorch": TwinsSVTConfig(
        depths=(4, 4, 12, 5),
        num_heads=(8, 8, 8, 8),
        window_sizes=(7, 7, 7, 0),
        reductions=(7, 7, 7, 7),
        peg_after=(2, 2, 2, 1),
        **VIT_PYTORCH,
    ),
}

TWINS_PAGE = "README of Meituan-AutoML/Twins"
NO_ATTENTION = "without q·k and weights·v"

PUBLISHED: dict[str, Published] = {
    "twins_svt_s": Published(TWINS_PAGE, 81.7, gmacs="2.8", gmacs_note=NO_ATTENTION),
    "twins_svt_b": Published(TWINS_PAGE, 83.2, gmacs="8.3", gmacs_note=NO_ATTENTION),
    "twins_svt_l": Published(TWINS_PAGE, 83.7, gmacs="14.8", gmacs_note=NO_ATTENTION),
}

ALIASES = {
    "twins_svt_small": "twins_svt_s",
    "twins_svt_base": "twins_svt_b",
    "twins_svt_large": "twins_svt_l",
}
"""The names of timm."""
