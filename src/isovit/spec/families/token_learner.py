"""TokenLearner: a ViT that learns, in the middle, which few tokens to go on with.

Source: Ryoo et al. 2021, "TokenLearner: What Can 8 Learned Tokens Do for Images and Videos?",
arXiv:2106.11297; the official code (google-research/scenic ``projects/token_learner/model.py``,
Apache-2.0) for what the paper leaves open; the example "Learning to tokenize in Vision
Transformers" of keras.io (Apache-2.0) for its own form.

Before block ``learner_loc`` a TokenLearner looks at the grid of tokens, makes a map of weights over
it for each token to be learned, and gives the weighted sums of the tokens: the blocks that follow
have a handful of tokens for hundreds. Each difference between the forms is a field:

* *v1* (official, of the paper): maps by four convolutions, behind a sigmoid; sums over the grid;
* *v1.1* (official, newer): maps by an MLP on each token, behind a softmax over the grid;
* the Keras example: v1 with means for sums, in a small ViT whose heads are as wide as its tokens
  and whose MLP has a GELU behind both products;
* with *TokenFuser* (official): every block from ``learner_loc`` on learns tokens of its own, runs
  on them, and a fuser brings them back onto the grid.

In all of them the maps are made of normalised tokens, but weigh the tokens as they came in. Videos,
and pooling by maximum or sum in front of the head, which the official code has too, are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from isovit.spec.blocks import BlockConfig, block
from isovit.spec.config import (
    Activation,
    Config,
    Epsilon,
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
from isovit.spec.scheme import Scheme

CONVS, CONV_KERNEL = 4, 3
"""Convolutions of a TokenLearner, and the side of their kernels."""


class TokenLearnerConfig(Config, frozen=True, kw_only=True, tag="token_learner"):
    """Config of a ViT with TokenLearner.

    Attributes:
        patch_size: height and width of a patch, in pixels.
        embed_dim: width of the tokens.
        depth: number of blocks.
        num_heads: attention heads.
        head_dim: width of a head; None for embed_dim / num_heads. The Keras example's are as wide
            as the tokens: what it calls ``key_dim`` is the width of one head.
        mlp_dim: hidden width of the MLP.
        mlp_output_activation: whether the activation stands behind the second product of the MLP,
            too (Keras example).
        activation: of the MLP and of the maps; ``gelu`` is exact, ``gelu_tanh`` the approximation
            (``flax.linen.gelu`` and ``keras.ops.gelu``, which both originals have).
        norm_eps: epsilon of every LayerNorm.
        learner: how maps are made: ``mlp``, a hidden layer on each token, then softmax over the
            grid (v1.1); ``conv``, four convolutions, then sigmoid (v1, Keras example); or ``none``,
            in which case there is no TokenLearner.
        learner_loc: how many blocks come before it.
        learned_tokens: number of tokens that it gives.
        learner_pool: what becomes of the tokens that the maps of ``conv`` weighted: their ``sum``
            (v1) or ``mean`` (Keras example). Those of ``mlp`` are always summed: they sum to 1.
        bottleneck_dim: hidden width of the maps of ``mlp``, and of the fuser's.
        fuser: whether every block from ``learner_loc`` on has a TokenLearner before it and a
            TokenFuser behind it, which leads back to the grid.
        embed_dropout_rate: on the tokens before the first block.
        proj_dropout_rate: after the attention's projection; the Keras example has none there.
        dropout_rate: after both products of the MLP, after both of the maps of ``mlp`` and of the
            fuser, and on what the fuser gives.
        attn_dropout_rate: on the attention weights.
        init_scheme: whose initialisation ``init`` follows: ``vit_jax``, which is scenic's, or
            ``keras``, the defaults of Keras's layers.
    """

    patch_size: Pair = (16, 16)
    embed_dim: Positive = 768
    depth: NonNegative = 12
    num_heads: Positive = 12
    head_dim: Positive | None = None
    mlp_dim: Positive = 3072
    mlp_output_activation: bool = False
    activation: Activation = "gelu_tanh"
    norm_eps: Epsilon = 1e-6
    learner: Literal["mlp", "conv", "none"] = "mlp"
    learner_loc: NonNegative = 9
    learned_tokens: Positive = 16
    learner_pool: Literal["sum", "mean"] = "sum"
    bottleneck_dim: Positive = 64
    fuser: bool = False
    embed_dropout_rate: Rate = 0.0
    proj_dropout_rate: Rate = 0.0
    dropout_rate: Rate = 0.0
    attn_dropout_rate: Rate = 0.0
    init_scheme: Literal["vit_jax", "keras"] = "vit_jax"

    def check(self) -> None:
        """Check that patches tile the image, heads fit, and the learner has its place."""
        super().check()
        self.stem.check()
        require(
            self.head_dim is not None or self.embed_dim % self.num_heads == 0,
            "embed_dim",
            self.embed_dim,
            f"must be divisible by num_heads={self.num_heads}, unless head_dim is given",
        )
        require(
            self.learner == "none" or self.learner_loc <= self.depth,
            "learner_loc",
            self.learner_loc,
            f"must be at most depth={self.depth}",
        )
        require(
            self.learner_pool == "sum" or self.learner == "conv",
            "learner_pool",
            self.learner_pool,
            "needs learner=conv",
        )
        require(
            not self.fuser or (self.learner != "none" and self.learner_loc < self.depth),
            "fuser",
            self.fuser,
            f"needs a learner, and learner_loc less than depth={self.depth}",
        )

    @property
    def stem(self) -> ViTConfig:
        """The ViT whose patch embedding this is."""
        return ViTConfig(
            image_size=self.image_size,
            in_channels=self.in_channels,
            preprocess=self.preprocess,
            patch_size=self.patch_size,
            patch_embed="conv",
            embed_dim=self.embed_dim,
            num_heads=1,  # it has no blocks
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.stem.grid

    @property
    def patches(self) -> int:
        """Number of patches."""
        return math.prod(self.grid)

    @property
    def feature_dim(self) -> int:
        """Width of the features, which the head gets."""
        return self.embed_dim

    @property
    def position_tables(self) -> Mapping[str, PositionTable]:
        """See ``Config.position_tables``."""
        return {"pos_embed": PositionTable(self.grid)}

    @property
    def num_learners(self) -> int:
        """How many TokenLearners there are: none, one, or with a fuser one for each last block."""
        if self.learner == "none":
            return 0
        return self.num_fusers or 1

    @property
    def num_fusers(self) -> int:
        """How many TokenFusers there are."""
        return self.depth - self.learner_loc if self.fuser else 0

    @property
    def tokens(self) -> int:
        """Number of tokens behind the last block."""
        return self.patches if self.learner == "none" or self.fuser else self.learned_tokens

    @property
    def block(self) -> BlockConfig:
        """The numbers of a block."""
        head_dim = self.head_dim or self.embed_dim // self.num_heads
        return BlockConfig(
            dim=self.embed_dim,
            num_heads=self.num_heads,
            head_dim=head_dim,
            qkv_bias=True,
            attn_proj=True,
            attn_scale=head_dim**-0.5,
            mlp_dim=self.mlp_dim,
            activation=self.activation,
            norm_eps=self.norm_eps,
            layer_scale_init=None,
            dropout_rate=self.proj_dropout_rate,
            attn_dropout_rate=self.attn_dropout_rate,
            drop_path_rate=0.0,
        )


def param_tree(config: TokenLearnerConfig) -> ParamTree:
    """The modules of a TokenLearner with their parameters, output shapes and multiply-adds."""
    scheme, dim, classes = Scheme("vit_jax"), config.embed_dim, config.num_classes
    children = [
        patch_embed(config.stem, scheme),
        *_blocks(config, scheme),
        layer_norm("norm", (config.tokens,), dim),
    ]
    if classes:
        kernel, bias = scheme.head_kernel(dim, classes), scheme.dense_bias(dim)
        children.append(dense("head", (), dim, classes, kernel, bias))
    positions = Param("pos_embed", (1, config.patches, dim), Role.OWN, scheme.positions())
    tree = ParamTree("", (positions,), tuple(children), (classes or dim,))
    return _drawn_as_in_keras(tree) if config.init_scheme == "keras" else tree


def _blocks(config: TokenLearnerConfig, scheme: Scheme) -> list[ParamTree]:
    """Items of the lists ``blocks``, ``learners`` and ``fusers`` in the order in which they run.

    A list comes up again with what runs later.
    """
    parts: list[ParamTree] = []

    def run(name: str, index: int, tree: ParamTree) -> None:
        before = parts.pop().children if parts and parts[-1].name == name else ()
        parts.append(ParamTree(name, children=(*before, tree.renamed(str(index)))))

    tokens = config.patches
    for i in range(config.depth + 1):
        learns = i - config.learner_loc
        if 0 <= learns < config.num_learners:
            run("learners", learns, _learner(config, scheme))
            tokens = config.learned_tokens
        if i < config.depth:
            run("blocks", i, block(config.block, tokens, scheme))
        if 0 <= learns < config.num_fusers:
            run("fusers", learns, _fuser(config, scheme))
            tokens = config.patches
    return parts


def _learner(config: TokenLearnerConfig, scheme: Scheme) -> ParamTree:
    """The grid of tokens to the learned ones.

    The last bias of the maps of ``mlp`` moves all places alike, which the softmax does not see. (In
    the official code it trains where dropout, which falls between, has a rate.)
    """
    dim, tokens, patches = config.embed_dim, config.learned_tokens, config.patches
    if config.learner == "conv":
        maps = repeat("convs", CONVS, lambda i: _conv(config, i, scheme))
    else:
        maps = _token_mask(config, scheme, bias_trains=False)
    children = (layer_norm("norm", (patches,), dim), maps)
    return ParamTree(
        "learner", children=children, output=(tokens, dim), own_macs=tokens * patches * dim
    )


def _conv(config: TokenLearnerConfig, index: int, scheme: Scheme) -> ParamTree:
    in_dim = config.learned_tokens if index else config.embed_dim
    kernel = scheme.conv_kernel(CONV_KERNEL**2 * in_dim)
    size = (CONV_KERNEL, CONV_KERNEL)
    return conv("conv", config.grid, size, in_dim, config.learned_tokens, kernel, bias=None)


def _token_mask(config: TokenLearnerConfig, scheme: Scheme, *, bias_trains: bool) -> ParamTree:
    """A number for each learned token at each place of the grid."""
    dim, hidden, tokens = config.embed_dim, config.bottleneck_dim, config.learned_tokens
    lead = (config.patches,)
    kernels = scheme.dense_kernel(dim, hidden), scheme.dense_kernel(hidden, tokens)
    fc1 = dense("fc1", lead, dim, hidden, kernels[0], scheme.mlp_bias(dim))
    fc2 = dense("fc2", lead, hidden, tokens, kernels[1], scheme.mlp_bias(hidden))
    fc2 = fc2 if bias_trains else _bias_fixed(fc2)
    return ParamTree("mask", children=(fc1, fc2), output=(*lead, tokens))


def _bias_fixed(tree: ParamTree) -> ParamTree:
    """A product whose bias does not train."""
    params = (replace(p, trainable=p.role is not Role.BIAS) for p in tree.params)
    return replace(tree, params=tuple(params))


def _fuser(config: TokenLearnerConfig, scheme: Scheme) -> ParamTree:
    """The learned tokens and the grid to the grid; the mixture of tokens starts as zero.

    Its bias moves all channels of a token alike, which the norm behind it takes away again.
    """
    dim, tokens, patches = config.embed_dim, config.learned_tokens, config.patches
    mix = dense("mix", (dim,), tokens, tokens, ZEROS, scheme.dense_bias(tokens))
    children = (
        layer_norm("norm1", (tokens,), dim),
        _bias_fixed(mix),
        layer_norm("norm2", (tokens,), dim),
        layer_norm("norm", (patches,), dim),
        _token_mask(config, scheme, bias_trains=True),
    )
    return ParamTree(
        "fuser", children=children, output=(patches, dim), own_macs=patches * tokens * dim
    )


def _drawn_as_in_keras(tree: ParamTree) -> ParamTree:
    """The same modules with the defaults of Keras: Glorot's uniform kernels, biases of zero."""
    params = tuple(replace(param, init=_keras_init(param, tree.name)) for param in tree.params)
    children = tuple(_drawn_as_in_keras(child) for child in tree.children)
    return replace(tree, params=params, children=children)


def _keras_init(param: Param, module: str) -> Init:
    if param.role is Role.OWN:
        return Init("uniform", 0.05)  # positions, of ``keras.layers.Embedding``
    if param.role not in (Role.DENSE_KERNEL, Role.CONV_KERNEL):
        return ZEROS if param.role is Role.BIAS else param.init
    *area, fan_in, fan_out = param.shape
    fan_out //= 3 if module == "qkv" else 1  # three products, each drawn by itself
    return Init("uniform", math.sqrt(6 / (math.prod(area) * (fan_in + fan_out))))


# The table of ``configs/im1k_token_learner_config.py`` of the official code, and its switches.
SIZES: dict[str, dict[str, Any]] = {
    "ti": dict(embed_dim=192, depth=12, num_heads=3, mlp_dim=768),
    "s": dict(embed_dim=384, depth=12, num_heads=6, mlp_dim=1536),
    "b": dict(embed_dim=768, depth=12, num_heads=12, mlp_dim=3072),
    "l": dict(embed_dim=1024, depth=24, num_heads=16, mlp_dim=4096),
}

# The Keras example: pixels from 0 to 1, as the images of CIFAR-10 come, enlarged to 52 by 52. In
# evaluation it takes the upper left 48 by 48 of them, where ``Preprocess`` takes the centre.
MINI: dict[str, Any] = dict(
    image_size=(48, 48),
    num_classes=10,
    preprocess=Preprocess(
        aspect="squash",
        crop_fraction=48 / 52,
        interpolation="bilinear",
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    ),
    patch_size=(6, 6),
    embed_dim=128,
    depth=4,
    num_heads=4,
    head_dim=128,
    mlp_dim=256,
    mlp_output_activation=True,
    init_scheme="keras",
)


def _mini(learned_tokens: int) -> TokenLearnerConfig:
    return TokenLearnerConfig(
        **MINI, learner="conv", learner_loc=3, learned_tokens=learned_tokens, learner_pool="mean"
    )


VARIANTS: dict[str, TokenLearnerConfig] = {
    **{f"token_learner_{size}16": TokenLearnerConfig(**sizes) for size, sizes in SIZES.items()},
    "token_learner_b16_v1": TokenLearnerConfig(**SIZES["b"], learner="conv"),
    "token_learner_b16_fuser": TokenLearnerConfig(**SIZES["b"], fuser=True),
    "token_learner_mini": TokenLearnerConfig(**MINI, learner="none"),
    "token_learner_mini_4": _mini(4),
    "token_learner_mini_8": _mini(8),
}

PUBLISHED: dict[str, Published] = {}
"""The official code publishes no accuracy; the Keras example's are of CIFAR-10."""

ALIASES: dict[str, str] = {}
