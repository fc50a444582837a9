"""T2T-ViT: Tokens-to-Token ViT.

Source: Yuan et al. 2021, "Tokens-to-Token ViT", arXiv:2101.11986, section 3; the official code
(yitu-opensource/T2T-ViT, Clear BSD) for what the paper leaves open; vit-pytorch's ``t2t.py`` (MIT)
for the form without width reduction.

The stem alternates *soft splits* (overlapping patches, each flattened into a token) with *token
mixers* (a small attention over those tokens, after which they form an image again). A soft split
flattens a patch in the order (channel, height, width), as ``torch.nn.Unfold`` does: every published
checkpoint has its weights in that order, so no conversion ever permutes them.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

from isovit.spec.blocks import (
    BlockConfig,
    TransformerConfig,
    backbone,
    block,
    head,
    mlp,
    output_shape,
)
from isovit.spec.config import Epsilon, NonNegative, Positive, Preprocess, Rate, require
from isovit.spec.param import Init, Param, ParamTree, Role, dense, layer_norm, repeat
from isovit.spec.published import Published
from isovit.spec.scheme import Scheme


class SoftSplit(NamedTuple):
    """Overlapping square patches: their side, their distance and the zeros around the image."""

    kernel: Positive
    stride: Positive
    padding: NonNegative

    def output(self, size: int) -> int:
        """Number of patches along an axis of ``size`` pixels."""
        return (size + 2 * self.padding - self.kernel) // self.stride + 1


class Stage(NamedTuple):
    """What a soft split gives: its geometry, the grid of tokens and their width."""

    split: SoftSplit
    grid: tuple[int, int]
    dim: int

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return math.prod(self.grid)


class T2TViTConfig(TransformerConfig, frozen=True, kw_only=True, tag="t2t_vit"):
    """Config of a T2T-ViT; fields of the backbone as in ``TransformerConfig``.

    Attributes:
        t2t_layers: the soft splits, each (kernel, stride, padding); a token mixer follows each
            but the last, a product to ``embed_dim`` follows the last.
        token_mixer: ``performer`` or ``transformer`` (official: width falls to ``token_dim``, the
            residual is v), or ``full`` (vit-pytorch: a block of one head at full width, then a
            LayerNorm).
        token_dim: width of q, k, v and of the output of a performer or transformer mixer.
        token_mlp_dim: hidden width of that mixer's MLP.
        token_scale: factor on q·k of the transformer mixer: 1/√ of the mixer's ``input_dim``
            (official) or of ``token_dim``.
        token_dropout_rate: inside the mixers; independent of ``dropout_rate``.
        performer_features: number of random features.
        performer_eps: added to the denominator of the performer's attention.
        performer_upcast: whether its features and sums are computed in at least float32, as in
            the official code; makes a difference in bfloat16 only.
        pos_embed: the fixed 1-D ``sinusoidal`` table over all tokens, or a ``learned`` one.
    """

    t2t_layers: tuple[SoftSplit, ...] = (SoftSplit(7, 4, 2), SoftSplit(3, 2, 1), SoftSplit(3, 2, 1))
    token_mixer: Literal["performer", "transformer", "full"] = "performer"
    token_dim: Positive = 64
    token_mlp_dim: Positive = 64
    token_scale: Literal["input_dim", "token_dim"] = "input_dim"
    token_dropout_rate: Rate = 0.0
    performer_features: Positive = 32
    performer_eps: Epsilon = 1e-8
    performer_upcast: bool = False
    pos_embed: Literal["sinusoidal", "learned"] = "sinusoidal"

    def check(self) -> None:
        """Check that every soft split fits, and the rules of the backbone."""
        super().check()
        require(len(self.t2t_layers) > 0, "t2t_layers", self.t2t_layers, "needs one or more")
        require(
            self.token_mixer != "performer" or self.performer_features <= self.token_dim,
            "performer_features",
            self.performer_features,
            f"orthogonal features number at most token_dim={self.token_dim}",
        )
        height, width = self.image_size
        for i, split in enumerate(self.t2t_layers):
            require(
                2 * split.padding < split.kernel,
                f"t2t_layers[{i}].padding",
                split.padding,
                f"must be less than half of kernel={split.kernel}, or a patch holds no pixel",
            )
            height, width = split.output(height), split.output(width)
            require(
                height >= 1 and width >= 1,
                f"t2t_layers[{i}]",
                tuple(split),
                f"no patch fits: image_size={self.image_size} leaves a grid of {height} x {width}",
            )

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Grid and width of the tokens behind each soft split."""
        stages: list[Stage] = []
        (height, width), channels = self.image_size, self.in_channels
        for split in self.t2t_layers:
            height, width = split.output(height), split.output(width)
            dim = channels * split.kernel**2
            stages.append(Stage(split, (height, width), dim))
            channels = dim if self.token_mixer == "full" else self.token_dim
        return tuple(stages)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens in the backbone."""
        return self.stages[-1].grid

    @property
    def tokens(self) -> int:
        """Number of tokens in the blocks, the class token included."""
        return self.prefix_tokens + self.stages[-1].tokens

    def full_mixer(self, dim: int) -> BlockConfig:
        """The numbers of a full-width mixer: a block of one head as wide as its tokens."""
        return BlockConfig(
            dim=dim,
            num_heads=1,
            head_dim=dim,
            qkv_bias=False,
            attn_proj=False,
            attn_scale=dim**-0.5,
            mlp_dim=dim,
            activation=self.activation,
            norm_eps=self.norm_eps,
            layer_scale_init=None,
            dropout_rate=self.token_dropout_rate,
            attn_dropout_rate=self.token_dropout_rate,
            drop_path_rate=0.0,
        )


def param_tree(config: T2TViTConfig, tokens: int | None = None) -> ParamTree:
    """The modules of a T2T-ViT with their parameters, output shapes and multiply-adds.

    Args:
        config: of the model.
        tokens: how many go through the blocks; None for those of the image.
    """
    scheme, tokens = Scheme(config.init_scheme), tokens or config.tokens
    return ParamTree(
        name="",
        params=tokens_and_positions(config, scheme),
        children=(
            tokens_to_token(config, scheme),
            *backbone(config, tokens, scheme),
            *head("head", config, scheme),
        ),
        output=output_shape(config, tokens),
    )


def tokens_and_positions(config: T2TViTConfig, scheme: Scheme) -> tuple[Param, ...]:
    """The model's own parameters: the class token, where there is one, and the positions."""
    dim, tokens, sinusoidal = config.embed_dim, config.tokens, config.pos_embed == "sinusoidal"
    init = Init("sinusoid", 10000.0) if sinusoidal else scheme.positions()
    positions = Param("pos_embed", (1, tokens, dim), Role.OWN, init, trainable=not sinusoidal)
    if not config.class_token:
        return (positions,)
    return Param("cls_token", (1, 1, dim), Role.OWN, scheme.class_token()), positions


def tokens_to_token(config: T2TViTConfig, scheme: Scheme) -> ParamTree:
    """The stem: a token mixer between each soft split and the next, then a product."""
    make = {
        "performer": _token_performer,
        "transformer": _token_transformer,
        "full": _full_mixer,
    }[config.token_mixer]
    *mixed, last = config.stages
    mixers = repeat("mixers", len(mixed), lambda i: make(config, mixed[i], scheme))
    kernel = scheme.dense_kernel(last.dim, config.embed_dim)
    bias = scheme.dense_bias(last.dim)
    project = dense("project", (last.tokens,), last.dim, config.embed_dim, kernel, bias)
    output = (last.tokens, config.embed_dim)
    return ParamTree("tokens_to_token", children=(mixers, project), output=output)


def _token_performer(config: T2TViTConfig, stage: Stage, scheme: Scheme) -> ParamTree:
    tokens, lead, dim = stage.tokens, (stage.tokens,), config.token_dim
    features = config.performer_features
    kernel, bias = scheme.dense_kernel(stage.dim, 3 * dim), scheme.dense_bias(stage.dim)
    # The features are exponentials of k and q: unit variance in 64 dimensions would span e^±30.
    kqv = dense("kqv", lead, stage.dim, 3 * dim, kernel, bias, probe_gain=0.25)
    init = Init("orthogonal_rows", math.sqrt(features))
    random_features = Param("random_features", (features, dim), Role.OWN, init, trainable=False)
    children = (
        layer_norm("norm1", lead, stage.dim),
        kqv,
        dense("proj", lead, dim, dim, scheme.dense_kernel(dim, dim), scheme.dense_bias(dim)),
        layer_norm("norm2", lead, dim),
        mlp("mlp", tokens, dim, config.token_mlp_dim, scheme),
    )
    # φ(k) and φ(q); Σ φ(k)⊗v and its product with φ(q); the denominator
    macs = 4 * tokens * features * dim + tokens * features
    return ParamTree("performer", (random_features,), children, (tokens, dim), macs)


def _token_transformer(config: T2TViTConfig, stage: Stage, scheme: Scheme) -> ParamTree:
    tokens, lead, dim = stage.tokens, (stage.tokens,), config.token_dim
    qkv = dense("qkv", lead, stage.dim, 3 * dim, scheme.dense_kernel(stage.dim, 3 * dim), None)
    proj = dense("proj", lead, dim, dim, scheme.dense_kernel(dim, dim), scheme.dense_bias(dim))
    macs = 2 * tokens * tokens * dim  # q·k and weights·v
    children = (
        layer_norm("norm1", lead, stage.dim),
        ParamTree("attn", children=(qkv, proj), output=(tokens, dim), own_macs=macs),
        layer_norm("norm2", lead, dim),
        mlp("mlp", tokens, dim, config.token_mlp_dim, scheme),
    )
    return ParamTree("transformer", children=children, output=(tokens, dim))


def _full_mixer(config: T2TViTConfig, stage: Stage, scheme: Scheme) -> ParamTree:
    children = (
        block(config.full_mixer(stage.dim), stage.tokens, scheme),
        layer_norm("norm", (stage.tokens,), stage.dim),
    )
    return ParamTree("full", children=children, output=(stage.tokens, stage.dim))


# The conventions of the official code beside its sizes; section 2a and 2b of its ``t2t_vit.py``.
YITU: dict[str, Any] = dict(
    qkv_bias=False,
    norm_eps=1e-5,
    performer_upcast=True,
    init_scheme="yitu",
    preprocess=Preprocess(crop_fraction=0.9),
)

# Yuan et al. 2021, table 1, and ``models/t2t_vit.py`` of the official code.
SIZES: dict[str, dict[str, Any]] = {
    "7": dict(embed_dim=256, depth=7, num_heads=4, mlp_dim=512),
    "10": dict(embed_dim=256, depth=10, num_heads=4, mlp_dim=512),
    "12": dict(embed_dim=256, depth=12, num_heads=4, mlp_dim=512),
    "14": dict(embed_dim=384, depth=14, num_heads=6, mlp_dim=1152),
    "19": dict(embed_dim=448, depth=19, num_heads=7, mlp_dim=1344),
    "24": dict(embed_dim=512, depth=24, num_heads=8, mlp_dim=1536),
    "14_resnext": dict(embed_dim=384, depth=14, num_heads=32, mlp_dim=1152),
    "14_wide": dict(embed_dim=768, depth=4, num_heads=12, mlp_dim=2304),
}


def _performer(size: str) -> T2TViTConfig:
    return T2TViTConfig(token_mixer="performer", token_dropout_rate=0.1, **YITU, **SIZES[size])


def _transformer(size: str) -> T2TViTConfig:
    return T2TViTConfig(token_mixer="transformer", **YITU, **SIZES[size])


VARIANTS: dict[str, T2TViTConfig] = {
    **{f"t2t_vit_{size}": _performer(size) for size in ("7", "10", "12", "14", "19", "24")},
    **{f"t2t_vit_t_{size}": _transformer(size) for size in ("14", "19", "24")},
    **{f"t2t_vit_{size}": _performer(size) for size in ("14_resnext", "14_wide")},
    # The example model of vit-pytorch's README.
    "t2t_vit_pytorch": T2TViTConfig(
        token_mixer="full",
        pos_embed="learned",
        embed_dim=512,
        depth=5,
        num_heads=8,
        head_dim=64,
        mlp_dim=512,
        qkv_bias=False,
        norm_eps=1e-5,
        init_scheme="vit_pytorch",
    ),
}

YITU_PAGE = "README of yitu-opensource/T2T-ViT, after Yuan et al. 2021, arXiv:2101.11986"

PUBLISHED: dict[str, Published] = {
    "t2t_vit_7": Published(YITU_PAGE, 71.7, gmacs="1.1"),
    "t2t_vit_10": Published(YITU_PAGE, 75.2, gmacs="1.5"),
    "t2t_vit_12": Published(YITU_PAGE, 76.5, gmacs="1.8"),
    "t2t_vit_14": Published(YITU_PAGE, 81.5, gmacs="4.8"),
    "t2t_vit_19": Published(YITU_PAGE, 81.9, gmacs="8.5"),
    "t2t_vit_24": Published(
        YITU_PAGE, 82.3, gmacs="13.8", gmacs_note="with t2t_vit_t_24 the same table implies 13.7"
    ),
    "t2t_vit_t_14": Published(YITU_PAGE, 81.7, gmacs="6.1"),
    "t2t_vit_t_19": Published(YITU_PAGE, 82.4, gmacs="9.8"),
    "t2t_vit_t_24": Published(YITU_PAGE, 82.6, gmacs="15.0"),
}

ALIASES = {
    name.replace("t2t_vit", "T2t_vit"): name for name in VARIANTS if name != "t2t_vit_pytorch"
}
"""Names of older documents and of the official command line's default."""
