"""CvT: convolutions that embed the tokens, and that project them to queries, keys and values.

Source: Wu et al. 2021, "CvT: Introducing Convolutions to Vision Transformers", arXiv:2103.15808,
section 3; the official code (microsoft/CvT, ``lib/models/cls_cvt.py`` at commit 56984ed, MIT) and
transformers' ``modeling_cvt.py`` (Apache-2.0), which has its weights, for what the paper leaves
open; vit-pytorch's ``cvt.py`` (MIT) for the other form.

A stage embeds overlapping patches and then runs pre-norm blocks over a grid that stays as it is.
Before the product to q, k or v, each channel is convolved by itself and normed over the batch; for
k and v with a stride, so that there are fewer keys than queries (*squeezed*, section 3.2). Nothing
else tells a token where it is. Only the last stage may have a class token, which is not convolved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from isovit.spec.blocks import BlockConfig, block
from isovit.spec.config import (
    Config,
    Epsilon,
    NonNegative,
    Positive,
    Preprocess,
    Rate,
    Stages,
    require,
    require_stages,
)
from isovit.spec.param import (
    Param,
    ParamTree,
    Role,
    batch_norm,
    conv,
    dense,
    depthwise_conv,
    layer_norm,
    repeat,
)
from isovit.spec.published import Published
from isovit.spec.scheme import TRUNC_NORMAL, Scheme


@dataclass(frozen=True)
class StageConfig:
    """Numbers of one stage, resolved from the config.

    Attributes:
        in_grid: height and width of its input.
        in_dim: channels of its input.
        patch_size: side of a patch of that input.
        patch_stride: distance of two patches.
        patch_padding: zeros around the input.
        grid: rows and columns of its tokens.
        class_token: whether another token stands before them.
        dim: width of the tokens.
        kernel_size: side of the convolutions in the attention.
        kv_stride: stride of those of k and v.
        blocks: the numbers of each block.
    """

    in_grid: tuple[int, int]
    in_dim: int
    patch_size: int
    patch_stride: int
    patch_padding: int
    grid: tuple[int, int]
    class_token: bool
    dim: int
    kernel_size: int
    kv_stride: int
    blocks: tuple[BlockConfig, ...]

    @property
    def kv_grid(self) -> tuple[int, int]:
        """Rows and columns of keys and values."""
        rows, columns = (-(-size // self.kv_stride) for size in self.grid)
        return rows, columns

    @property
    def tokens(self) -> int:
        """Number of tokens, the class token included."""
        return math.prod(self.grid) + self.class_token

    @property
    def kv_tokens(self) -> int:
        """Number of keys, that of the class token included."""
        return math.prod(self.kv_grid) + self.class_token


class CvTConfig(Config, frozen=True, kw_only=True, tag="cvt"):
    """Config of a CvT; what has a number for each stage is a tuple of as many.

    Attributes:
        embed_dims: width of the tokens.
        depths: number of blocks.
        num_heads: attention heads.
        head_dim: width of a head, of every stage; None for embed_dims / num_heads.
        attn_scale: factor on q·k: 1/√ of ``embed_dims`` (official) or of a head's width, ``head``
            (vit-pytorch).
        mlp_dims: hidden width of the MLPs.
        patch_sizes: side of the convolution that embeds the patches: in pixels in the first stage,
            in tokens of the stage before it in the others.
        patch_strides: its stride.
        patch_paddings: zeros around its input.
        qkv_kernel_sizes: side of the convolutions in the attention; as many zeros are around their
            input as leave a grid as it is without a stride.
        kv_strides: stride of those of k and v; 1 for as many keys as queries.
        kv_convs: ``two``, one for k and one for v (official); or ``one`` for both (vit-pytorch).
        qkv_bias: whether the products for q, k and v have a bias.
        activation: of the MLPs; ``quick_gelu`` is x·σ(1.702 x), with which the official code runs
            weights that transformers runs with ``gelu``.
        norm_eps: epsilon of every LayerNorm.
        batch_norm_eps: epsilon of every BatchNorm.
        batch_norm_momentum: weight of a new batch in the running statistics.
        class_token: whether the last stage has one.
        final_norm: LayerNorm over the ``tokens`` before pooling, or ``none``.
        pool: the class token (``cls``); the ``mean`` over all tokens, of which none is then a class
            token; or ``none``, in which case every token comes out.
        embed_dropout_rate: on the tokens of every stage before its first block.
        dropout_rate: after the attention's projection and both products of the MLP.
        attn_dropout_rate: on the attention weights.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 over the last
            stage, and the stages before it have none.
        init_scheme: whose initialisation ``init`` follows; ``timm`` for the official one, whose
            class token is drawn as its kernels are.
    """

    embed_dims: Stages = (64, 192, 384)
    depths: Stages = (1, 2, 10)
    num_heads: Stages = (1, 3, 6)
    head_dim: Positive | None = None
    attn_scale: Literal["embed_dims", "head"] = "embed_dims"
    mlp_dims: Stages = (256, 768, 1536)
    patch_sizes: Stages = (7, 3, 3)
    patch_strides: Stages = (4, 2, 2)
    patch_paddings: tuple[NonNegative, ...] = (2, 1, 1)
    qkv_kernel_sizes: Stages = (3, 3, 3)
    kv_strides: Stages = (2, 2, 2)
    kv_convs: Literal["two", "one"] = "two"
    qkv_bias: bool = True
    activation: Literal["gelu", "gelu_tanh", "quick_gelu"] = "quick_gelu"
    norm_eps: Epsilon = 1e-5
    batch_norm_eps: Epsilon = 1e-5
    batch_norm_momentum: Rate = 0.1
    class_token: bool = True
    final_norm: Literal["tokens", "none"] = "tokens"
    pool: Literal["cls", "mean", "none"] = "cls"
    embed_dropout_rate: Rate = 0.0
    dropout_rate: Rate = 0.0
    attn_dropout_rate: Rate = 0.0
    drop_path_rate: Rate = 0.0
    init_scheme: Literal["timm", "vit_pytorch"] = "timm"

    def check(self) -> None:
        """Check that stages fit together and each fits its input, and the rules of the head."""
        super().check()
        require_stages(self, PER_STAGE)
        require(self.pool != "cls" or self.class_token, "pool", self.pool, "needs class_token=true")
        require(
            self.pool != "mean" or not self.class_token,
            "pool",
            self.pool,
            "needs class_token=false",
        )
        require(
            self.pool != "none" or self.num_classes == 0,
            "pool",
            self.pool,
            "every token comes out: needs num_classes=0",
        )
        size = self.image_size
        for i in range(len(self.embed_dims)):
            size = self._check_stage(i, size)

    def _check_stage(self, i: int, size: tuple[int, int]) -> tuple[int, int]:
        """Check a stage whose input has this height and width; gives its grid."""
        kernel = self.qkv_kernel_sizes[i]
        require(
            kernel % 2 == 1,
            f"qkv_kernel_sizes[{i}]",
            kernel,
            "must be odd: q has the grid of the tokens",
        )
        patch, padding = self.patch_sizes[i], self.patch_paddings[i]
        require(
            padding < patch,
            f"patch_paddings[{i}]",
            padding,
            f"must be less than patch_sizes[{i}]={patch}, or a patch holds no token",
        )
        height, width = size
        require(
            patch <= min(size) + 2 * padding,
            f"patch_sizes[{i}]",
            patch,
            f"must fit its input, which image_size={self.image_size} leaves {height} x {width}",
        )
        return self._grid(i, size)

    def _grid(self, i: int, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tokens of a stage whose input has this height and width."""
        beside = 2 * self.patch_paddings[i] - self.patch_sizes[i]
        rows, columns = ((side + beside) // self.patch_strides[i] + 1 for side in size)
        return rows, columns

    @property
    def stages(self) -> tuple[StageConfig, ...]:
        """The numbers of each stage; stochastic depth grows linearly over the last."""
        stages: list[StageConfig] = []
        grid, channels = self.image_size, self.in_channels
        for i, dim in enumerate(self.embed_dims):
            in_grid, grid = grid, self._grid(i, grid)
            is_last = i == len(self.embed_dims) - 1
            rate, steps = self.drop_path_rate * is_last, max(self.depths[i] - 1, 1)
            stages.append(
                StageConfig(
                    in_grid=in_grid,
                    in_dim=channels,
                    patch_size=self.patch_sizes[i],
                    patch_stride=self.patch_strides[i],
                    patch_padding=self.patch_paddings[i],
                    grid=grid,
                    class_token=self.class_token and is_last,
                    dim=dim,
                    kernel_size=self.qkv_kernel_sizes[i],
                    kv_stride=self.kv_strides[i],
                    blocks=tuple(self._block(i, rate * j / steps) for j in range(self.depths[i])),
                )
            )
            channels = dim
        return tuple(stages)

    def _block(self, i: int, drop_path_rate: float) -> BlockConfig:
        """The numbers of a block of stage i."""
        dim, heads = self.embed_dims[i], self.num_heads[i]
        head_dim = self.head_dim or dim // heads
        return BlockConfig(
            dim=dim,
            num_heads=heads,
            head_dim=head_dim,
            qkv_bias=self.qkv_bias,
            attn_proj=True,
            attn_scale=(dim if self.attn_scale == "embed_dims" else head_dim) ** -0.5,
            mlp_dim=self.mlp_dims[i],
            activation=self.activation,
            norm_eps=self.norm_eps,
            layer_scale_init=None,
            dropout_rate=self.dropout_rate,
            attn_dropout_rate=self.attn_dropout_rate,
            drop_path_rate=drop_path_rate,
        )

    @property
    def feature_dim(self) -> int:
        """Width of the features, which the head gets."""
        return self.embed_dims[-1]


PER_STAGE = (
    "depths",
    "mlp_dims",
    "patch_sizes",
    "patch_strides",
    "patch_paddings",
    "qkv_kernel_sizes",
    "kv_strides",
)
"""Fields of as many numbers as ``embed_dims`` and ``num_heads``."""


def param_tree(config: CvTConfig) -> ParamTree:
    """The modules of a CvT with their parameters, output shapes and multiply-adds."""
    scheme, stages, dim = Scheme(config.init_scheme), config.stages, config.feature_dim
    lead = (stages[-1].tokens,)
    children = [repeat("stages", len(stages), lambda i: _stage(config, stages[i], scheme))]
    if config.final_norm == "tokens":
        children.append(layer_norm("norm", lead, dim))
    if config.num_classes:
        kernel, bias = scheme.head_kernel(dim, config.num_classes), scheme.dense_bias(dim)
        children.append(dense("head", (), dim, config.num_classes, kernel, bias))
    width = config.num_classes or dim
    output = (*lead, width) if config.pool == "none" else (width,)
    return ParamTree("", children=tuple(children), output=output)


def _stage(config: CvTConfig, stage: StageConfig, scheme: Scheme) -> ParamTree:
    params = (Param("cls_token", (1, 1, stage.dim), Role.OWN, TRUNC_NORMAL),)
    children = (
        _conv_embed(stage, scheme),
        repeat("blocks", len(stage.blocks), lambda i: _block(config, stage, i, scheme)),
    )
    output = (stage.tokens, stage.dim)
    return ParamTree("stage", params if stage.class_token else (), children, output)


def _conv_embed(stage: StageConfig, scheme: Scheme) -> ParamTree:
    side, fan_in = (stage.patch_size, stage.patch_size), stage.patch_size**2 * stage.in_dim
    kernel, bias = scheme.conv_kernel(fan_in), scheme.conv_bias(fan_in)
    children = (
        conv("proj", stage.grid, side, stage.in_dim, stage.dim, kernel, bias),
        layer_norm("norm", (math.prod(stage.grid),), stage.dim),
    )
    output = (math.prod(stage.grid), stage.dim)
    return ParamTree("patch_embed", children=children, output=output)


def _block(config: CvTConfig, stage: StageConfig, i: int, scheme: Scheme) -> ParamTree:
    numbers = stage.blocks[i]
    attn = _attention(config, stage, numbers.inner_dim, scheme)
    return block(numbers, stage.tokens, scheme, attn)


def _attention(config: CvTConfig, stage: StageConfig, inner: int, scheme: Scheme) -> ParamTree:
    dim, tokens = stage.dim, stage.tokens
    q = _conv_projection("q", config, stage, stage.grid, inner, scheme)
    if config.kv_convs == "one":
        kv = (_conv_projection("kv", config, stage, stage.kv_grid, 2 * inner, scheme),)
    else:
        k = _conv_projection("k", config, stage, stage.kv_grid, inner, scheme)
        kv = (
            _of_keys(k, stage),
            _conv_projection("v", config, stage, stage.kv_grid, inner, scheme),
        )
    kernel, bias = scheme.dense_kernel(inner, dim), scheme.dense_bias(inner)
    proj = dense("proj", (tokens,), inner, dim, kernel, bias)
    macs = 2 * tokens * stage.kv_tokens * inner  # q·k and weights·v
    return ParamTree("attn", children=(q, *kv, proj), output=(tokens, dim), own_macs=macs)


def _conv_projection(
    name: str,
    config: CvTConfig,
    stage: StageConfig,
    grid: tuple[int, int],
    width: int,
    scheme: Scheme,
) -> ParamTree:
    dim, size = stage.dim, stage.kernel_size
    lead = (math.prod(grid) + stage.class_token,)
    kernel, bias = scheme.dense_kernel(dim, width), scheme.dense_bias(dim)
    children = (
        depthwise_conv("conv", grid, (size, size), dim, scheme.conv_kernel(size**2), None),
        batch_norm("norm", grid, dim),
        dense("proj", lead, dim, width, kernel, bias if config.qkv_bias else None),
    )
    return ParamTree(name, children=children, output=(*lead, width))


def _of_keys(projection: ParamTree, stage: StageConfig) -> ParamTree:
    """The projection of k, some of whose biases never train.

    A softmax does not see what all of its keys have in common. The gradient of such a bias is zero
    but for rounding, by which an optimiser would move it.
    """
    conv, norm, proj = projection.children
    # The class token has a key too, in which the bias of the norm is not.
    norm = norm if stage.class_token else _with_fixed_bias(norm)
    return replace(projection, children=(conv, norm, _with_fixed_bias(proj)))


def _with_fixed_bias(module: ParamTree) -> ParamTree:
    params = (
        replace(param, trainable=False) if param.name == "bias" else param
        for param in module.params
    )
    return replace(module, params=tuple(params))


# Wu et al. 2021, table 2; MLPs are four times as wide as their tokens.
SIZES: dict[str, dict[str, Any]] = {
    "13": dict(embed_dims=(64, 192, 384), depths=(1, 2, 10), num_heads=(1, 3, 6)),
    "21": dict(embed_dims=(64, 192, 384), depths=(1, 4, 16), num_heads=(1, 3, 6)),
    "w24": dict(embed_dims=(192, 768, 1024), depths=(2, 2, 20), num_heads=(3, 12, 16)),
}


def _official(size: str, **fields: Any) -> CvTConfig:
    mlp_dims = tuple(4 * dim for dim in SIZES[size]["embed_dims"])
    return CvTConfig(mlp_dims=mlp_dims, **SIZES[size], **fields)


# What the models for larger images see of a photograph, by transformers' ConvNextImageProcessor,
# with which it has the weights: all of it, squashed.
LARGE: dict[str, Any] = dict(
    image_size=(384, 384), preprocess=Preprocess(aspect="squash", crop_fraction=1.0)
)

# What vit-pytorch's CvT has of its own, whatever its arguments.
VIT_PYTORCH: dict[str, Any] = dict(
    head_dim=64,
    attn_scale="head",
    kv_convs="one",
    qkv_bias=False,
    activation="gelu",
    class_token=False,
    final_norm="none",
    pool="mean",
    init_scheme="vit_pytorch",
)

VARIANTS: dict[str, CvTConfig] = {
    "cvt_13": _official("13"),
    "cvt_21": _official("21"),
    "cvt_13_384": _official("13", **LARGE),
    "cvt_21_384": _official("21", **LARGE),
    "cvt_w24_384": _official("w24", **LARGE),
    # The example model of vit-pytorch's README.
    "cvt_pytorch": CvTConfig(patch_paddings=(3, 1, 1), **VIT_PYTORCH),
}

PAGE = "README of microsoft/CvT, after Wu et al. 2021, arXiv:2103.15808, table 3"
PAGE_22K = f"{PAGE}; first trained on ImageNet-22k"

PUBLISHED: dict[str, Published] = {
    "cvt_13": Published(PAGE, 81.6, gmacs="4.5", gmacs_note="4.57 by torch's count too"),
    "cvt_21": Published(PAGE, 82.5, gmacs="7.1", gmacs_note="7.18 by torch's count too"),
    "cvt_13_384": Published(PAGE, 83.0, 384, gmacs="16.3"),
    "cvt_21_384": Published(PAGE, 83.3, 384, gmacs="24.9", gmacs_note="24.85 by torch's count too"),
    "cvt_w24_384": Published(
        PAGE_22K, 87.6, 384, gmacs="193.2", gmacs_note="194.2 by torch's count too"
    ),
}

ALIASES = {
    "cvt-13": "cvt_13",
    "cvt-21": "cvt_21",
    "cvt-13-384": "cvt_13_384",
    "cvt-13-384-22k": "cvt_13_384",
    "cvt-21-384": "cvt_21_384",
    "cvt-21-384-22k": "cvt_21_384",
    "cvt-w24-384-22k": "cvt_w24_384",
}
"""The names of Microsoft's checkpoints in transformers."""
