"""T2T-ViT with designs of convolutional networks: SE, Ghost, Dense.

Source: Yuan et al. 2021, "Tokens-to-Token ViT", arXiv:2101.11986, section 3.2, where these are what
T2T-ViT is compared with; the official code (yitu-opensource/T2T-ViT ``models/t2t_vit_se.py``,
``t2t_vit_ghost.py`` and ``t2t_vit_dense.py``, Clear BSD) for what the paper leaves open.

The stem is T2T-ViT's. The backbone is one of three:

* *se*, after SENet (Hu et al. 2018, arXiv:1709.01507): behind the attention's projection each
  channel is weighed by a number between 0 and 1, which a small MLP makes of the mean over all
  tokens;
* *ghost*, after GhostNet (Han et al. 2020, arXiv:1911.11907): half of q, of k and of v, and two
  thirds of the MLP's hidden layer, are copies of the rest, each channel by a learned factor: in
  GhostNet a depthwise convolution, here of one token. The copies of the hidden layer go through
  the activation once more;
* *dense*, after DenseNet (Huang et al. 2017, arXiv:1608.06993): a block gives ``dense_growth`` new
  channels, which are put behind those that it got; between two stages a transition halves the
  width.

Section 3.2 has two more, of wide blocks and of many heads after ResNeXt. They change numbers only:
``t2t_vit_14_wide`` and ``t2t_vit_14_resnext`` of T2T-ViT.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, NamedTuple

from isovit.spec.blocks import BlockConfig, attention, block, head, output_shape
from isovit.spec.config import Positive, Stages, require
from isovit.spec.families.t2t_vit import (
    SIZES,
    YITU,
    T2TViTConfig,
    tokens_and_positions,
    tokens_to_token,
)
from isovit.spec.param import Param, ParamTree, Role, dense, layer_norm, repeat
from isovit.spec.published import Published
from isovit.spec.scheme import Scheme


class Halving(NamedTuple):
    """Numbers of a transition: the width of the tokens that come in."""

    dim: int

    @property
    def out_dim(self) -> int:
        """Width of those that go out."""
        return self.dim // 2


class T2TViTDesignsConfig(T2TViTConfig, frozen=True, kw_only=True, tag="t2t_vit_designs"):
    """Config of a T2T-ViT with a design of convolutional networks; other fields as in T2T-ViT.

    In the dense design ``embed_dim`` and ``mlp_dim`` are those of the first block: the hidden
    layers of the others are wider in proportion, and so are their heads, unless ``head_dim`` is
    given. In the ghost design ``mlp_dim`` is a multiple of ``embed_dim``; the first ``embed_dim``
    channels of the hidden layer are made, the others are copies of them.

    Attributes:
        design: ``se``, ``ghost`` or ``dense``; see above.
        se_dim: hidden width of the MLP that weighs the channels, in the design ``se``.
        dense_depths: number of blocks of each stage of the design ``dense``; their sum is
            ``depth``.
        dense_growth: how many channels each of its blocks adds.
        dense_drop_path_steps: stochastic depth of all blocks of stage i, from 0, is i of so many
            equal steps up to ``drop_path_rate``. The official code has 11, whatever its number of
            blocks: those between the twelve of a default that it makes no other use of.
    """

    design: Literal["se", "ghost", "dense"] = "se"
    se_dim: Positive = 24
    dense_depths: Stages = ()
    dense_growth: Positive = 64
    dense_drop_path_steps: Positive = 11

    def check(self) -> None:
        """Check what the design wants of the widths, and the rules of T2T-ViT."""
        super().check()
        if self.design == "ghost":
            self._check_ghost()
        if self.design == "dense":
            self._check_dense()
        require(
            self.design == "dense" or not self.dense_depths,
            "dense_depths",
            self.dense_depths,
            "needs design=dense",
        )

    def _check_ghost(self) -> None:
        inner_dim = self.block.inner_dim
        require(
            inner_dim % 2 == 0,
            "num_heads",
            self.num_heads,
            f"half of q is a copy: needs an even number of channels in all heads, not {inner_dim}",
        )
        require(
            self.mlp_dim % self.embed_dim == 0,
            "mlp_dim",
            self.mlp_dim,
            f"must be a multiple of embed_dim={self.embed_dim}: a part and its copies",
        )

    def _check_dense(self) -> None:
        require(
            sum(self.dense_depths) == self.depth,
            "dense_depths",
            self.dense_depths,
            f"must sum to depth={self.depth}",
        )
        require(
            len(self.dense_depths) <= self.dense_drop_path_steps + 1,
            "dense_drop_path_steps",
            self.dense_drop_path_steps,
            f"must be a step for each of the {len(self.dense_depths)} stages but the first",
        )
        require(
            self.attn_proj or self.head_dim is None,
            "attn_proj",
            self.attn_proj,
            f"heads of head_dim={self.head_dim} fill no other width than that of one block",
        )
        for numbers in self.blocks:
            require(
                self.head_dim is not None or numbers.dim % self.num_heads == 0,
                "num_heads",
                self.num_heads,
                f"must divide the width of every block, of which one is {numbers.dim}, "
                "unless head_dim is given",
            )
            require(
                numbers.mlp_dim > 0,
                "mlp_dim",
                self.mlp_dim,
                f"leaves no hidden layer in a block of width {numbers.dim}",
            )

    @property
    def layers(self) -> tuple[BlockConfig | Halving, ...]:
        """What follows the embedding, in order: blocks, and transitions between dense stages."""
        if self.design != "dense":
            return super().blocks
        layers: list[BlockConfig | Halving] = []
        dim = self.embed_dim
        for stage, depth in enumerate(self.dense_depths):
            if stage:
                halving = Halving(dim)
                layers.append(halving)
                dim = halving.out_dim
            for _ in range(depth):
                layers.append(self._dense_block(dim, stage))
                dim += self.dense_growth
        return tuple(layers)

    def _dense_block(self, dim: int, stage: int) -> BlockConfig:
        """The numbers of a block of a stage, for tokens of a width."""
        head_dim = self.head_dim or dim // self.num_heads
        return replace(
            self.block,
            dim=dim,
            head_dim=head_dim,
            attn_scale=self.attn_scale or head_dim**-0.5,
            mlp_dim=self.mlp_dim * dim // self.embed_dim,
            drop_path_rate=self.drop_path_rate * stage / self.dense_drop_path_steps,
        )

    @property
    def blocks(self) -> tuple[BlockConfig, ...]:
        """The numbers of each block."""
        return tuple(layer for layer in self.layers if isinstance(layer, BlockConfig))

    @property
    def feature_dim(self) -> int:
        """Width of the features: behind the last block."""
        grows = self.design == "dense" and self.depth > 0
        return self.blocks[-1].dim + self.dense_growth if grows else self.embed_dim


def param_tree(config: T2TViTDesignsConfig) -> ParamTree:
    """The modules of a T2T-ViT design with parameters, output shapes and multiply-adds."""
    scheme, tokens, layers = Scheme(config.init_scheme), config.tokens, config.layers
    children = [
        tokens_to_token(config, scheme),
        repeat("blocks", len(layers), lambda i: _layer(config, layers[i], scheme)),
    ]
    if config.final_norm != "none":
        lead = () if config.final_norm == "pooled" else (tokens,)
        children.append(layer_norm("norm", lead, config.feature_dim))
    return ParamTree(
        name="",
        params=tokens_and_positions(config, scheme),
        children=(*children, *head("head", config, scheme)),
        output=output_shape(config, tokens),
    )


def _layer(config: T2TViTDesignsConfig, layer: BlockConfig | Halving, scheme: Scheme) -> ParamTree:
    tokens = config.tokens
    if isinstance(layer, Halving):
        return _transition(layer, tokens, scheme)
    match config.design:
        case "se":
            return block(layer, tokens, scheme, attn=_se_attention(config, layer, scheme))
        case "ghost":
            attn, mlp = _ghost_attention(layer, tokens, scheme), _ghost_mlp(layer, tokens, scheme)
            return block(layer, tokens, scheme, attn=attn, mlp=mlp)
        case "dense":
            return _dense_block(config, layer, scheme)


def _se_attention(config: T2TViTDesignsConfig, numbers: BlockConfig, scheme: Scheme) -> ParamTree:
    """Attention, and the weights of its channels."""
    dim, hidden, tokens = numbers.dim, config.se_dim, config.tokens
    attn = attention("attn", numbers, tokens, scheme)
    weigh = (
        dense("fc1", (), dim, hidden, scheme.dense_kernel(dim, hidden), bias=None),
        dense("fc2", (), hidden, dim, scheme.dense_kernel(hidden, dim), bias=None),
    )
    se_layer = ParamTree("se_layer", children=weigh, output=(tokens, dim))
    return replace(attn, children=(*attn.children, se_layer), output=(tokens, dim))


def _ghost_attention(numbers: BlockConfig, tokens: int, scheme: Scheme) -> ParamTree:
    """Attention of which half the channels of q, of k and of v are copies."""
    dim, inner = numbers.dim, numbers.inner_dim
    made = 3 * (inner // 2)
    kernel = scheme.dense_kernel(dim, inner // 2)
    bias = scheme.dense_bias(dim) if numbers.qkv_bias else None
    children = [
        dense("qkv", (tokens,), dim, made, kernel, bias),
        _cheap("cheap", tokens, made, scheme),
    ]
    if numbers.attn_proj:
        kernel, bias = scheme.dense_kernel(inner, dim), scheme.dense_bias(inner)
        children.append(dense("proj", (tokens,), inner, dim, kernel, bias))
    products = 2 * tokens * tokens * inner  # q·k and weights·v
    return ParamTree("attn", children=tuple(children), output=(tokens, dim), own_macs=products)


def _ghost_mlp(numbers: BlockConfig, tokens: int, scheme: Scheme) -> ParamTree:
    """MLP of whose hidden layer the first ``dim`` channels are made, the others copied."""
    dim, hidden = numbers.dim, numbers.mlp_dim
    kernels = scheme.dense_kernel(dim, dim), scheme.dense_kernel(hidden, dim)
    children = (
        dense("fc1", (tokens,), dim, dim, kernels[0], scheme.mlp_bias(dim)),
        repeat("cheap", hidden // dim - 1, lambda _: _cheap("cheap", tokens, dim, scheme)),
        dense("fc2", (tokens,), hidden, dim, kernels[1], scheme.mlp_bias(hidden)),
    )
    return ParamTree("mlp", children=children, output=(tokens, dim))


def _cheap(name: str, tokens: int, dim: int, scheme: Scheme) -> ParamTree:
    """A factor per channel, drawn as the kernel of the convolution that it is in the original."""
    factor = Param("factor", (dim,), Role.OWN, scheme.conv_kernel(fan_in=1))
    return ParamTree(name, (factor,), output=(tokens, dim))


def _dense_block(config: T2TViTDesignsConfig, numbers: BlockConfig, scheme: Scheme) -> ParamTree:
    """A block, of whose output some channels are put behind its input."""
    tokens, dim, growth = config.tokens, numbers.dim, config.dense_growth
    kernel, bias = scheme.dense_kernel(dim, growth), scheme.dense_bias(dim)
    dense_linear = dense("dense_linear", (tokens,), dim, growth, kernel, bias)
    tree = block(numbers, tokens, scheme)
    return replace(tree, children=(*tree.children, dense_linear), output=(tokens, dim + growth))


def _transition(numbers: Halving, tokens: int, scheme: Scheme) -> ParamTree:
    """A product to half of the width."""
    dim, out_dim = numbers.dim, numbers.out_dim
    kernel, bias = scheme.dense_kernel(dim, out_dim), scheme.dense_bias(dim)
    linear = dense("linear", (tokens,), dim, out_dim, kernel, bias)
    return ParamTree("transition", children=(linear,), output=(tokens, out_dim))


def _variant(**fields: Any) -> T2TViTDesignsConfig:
    return T2TViTDesignsConfig(token_mixer="performer", token_dropout_rate=0.1, **YITU, **fields)


# The three files of the official code.
VARIANTS: dict[str, T2TViTDesignsConfig] = {
    "t2t_vit_14_se": _variant(**SIZES["14"], design="se"),
    "t2t_vit_16_ghost": _variant(**{**SIZES["14"], "depth": 16}, design="ghost"),
    "t2t_vit_dense": _variant(
        embed_dim=128,
        depth=19,
        num_heads=8,
        mlp_dim=256,
        design="dense",
        dense_depths=(3, 6, 6, 4),
    ),
}

PUBLISHED: dict[str, Published] = {}
"""The official code publishes neither weights nor accuracies of these."""

ALIASES = {"T2t_vit_14_se": "t2t_vit_14_se", "T2t_vit_16_ghost": "t2t_vit_16_ghost"}
"""Names of the tables of the official code."""
