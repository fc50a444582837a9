"""The pre-norm transformer that families share: its fields, its blocks' numbers, its param tree.

The backends' ``layers.py`` hold the same classes over the same ``BlockConfig``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from isovit.spec.config import (
    Activation,
    Config,
    Epsilon,
    FinalNorm,
    InitScheme,
    NonNegative,
    Pool,
    PositionTable,
    Positive,
    Rate,
    require,
)
from isovit.spec.param import Init, Param, ParamTree, Role, dense, layer_norm, repeat
from isovit.spec.scheme import Scheme


@dataclass(frozen=True)
class BlockConfig:
    """Numbers of one block, resolved from a family's config.

    Attributes:
        dim: width of the tokens.
        num_heads: attention heads.
        head_dim: width of a head; heads need not fill ``dim``.
        qkv_bias: whether the product for q, k and v has a bias.
        attn_proj: whether a product with bias follows the attention.
        attn_scale: factor on q·k.
        mlp_dim: hidden width of the MLP.
        activation: of the MLP.
        norm_eps: epsilon inside the root of every LayerNorm.
        layer_scale_init: start of the learned factor on each branch; None for no such.
        dropout_rate: after the attention's projection and after both products of the MLP.
        attn_dropout_rate: on the attention weights.
        drop_path_rate: probability that a sample skips a branch.
    """

    dim: int
    num_heads: int
    head_dim: int
    qkv_bias: bool
    attn_proj: bool
    attn_scale: float
    mlp_dim: int
    activation: Activation | Literal["quick_gelu"]
    norm_eps: float
    layer_scale_init: float | None
    dropout_rate: float
    attn_dropout_rate: float
    drop_path_rate: float

    @property
    def inner_dim(self) -> int:
        """Width of q, of k and of v: all heads side by side."""
        return self.num_heads * self.head_dim


class TransformerConfig(Config, frozen=True, kw_only=True):
    """What the config of every family with this backbone has.

    Attributes:
        embed_dim: width of the tokens.
        depth: number of blocks.
        num_heads: attention heads.
        head_dim: width of a head; None for embed_dim / num_heads.
        qkv_bias: whether the product for q, k and v has a bias.
        attn_proj: whether a product with bias follows the attention (vit-pytorch leaves it out
            for one head as wide as the tokens).
        attn_scale: factor on q·k; None for 1/√head_dim.
        mlp_dim: hidden width of the MLP.
        activation: of the MLP; ``gelu`` is exact, ``gelu_tanh`` the approximation.
        norm_eps: epsilon of every LayerNorm.
        layer_scale_init: start of a learned factor per channel on each branch; None for no such.
        class_token: whether a learned token is put first.
        final_norm: LayerNorm over the ``tokens`` before pooling, over the ``pooled`` vector, or
            ``none``.
        pool: the class token (``cls``), the mean over all tokens (``mean``) or over the patches
            alone (``mean_patches``), or ``none``, in which case every token comes out.
        embed_dropout_rate: on the tokens before the first block.
        dropout_rate: after the attention's projection and both products of the MLP.
        attn_dropout_rate: on the attention weights.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0.
        init_scheme: whose initialisation ``init`` follows.
    """

    embed_dim: Positive = 768
    depth: NonNegative = 12
    num_heads: Positive = 12
    head_dim: Positive | None = None
    qkv_bias: bool = True
    attn_proj: bool = True
    attn_scale: Epsilon | None = None
    mlp_dim: Positive = 3072
    activation: Activation = "gelu"
    norm_eps: Epsilon = 1e-6
    layer_scale_init: float | None = None
    class_token: bool = True
    final_norm: FinalNorm = "tokens"
    pool: Pool = "cls"
    embed_dropout_rate: Rate = 0.0
    dropout_rate: Rate = 0.0
    attn_dropout_rate: Rate = 0.0
    drop_path_rate: Rate = 0.0
    init_scheme: InitScheme = "timm"

    def check(self) -> None:
        """Check that heads fit the width, and that pooling, norm and head go together."""
        super().check()
        require(
            self.head_dim is not None or self.embed_dim % self.num_heads == 0,
            "embed_dim",
            self.embed_dim,
            f"must be divisible by num_heads={self.num_heads}, unless head_dim is given",
        )
        inner_dim = self.block.inner_dim
        require(
            self.attn_proj or inner_dim == self.embed_dim,
            "attn_proj",
            self.attn_proj,
            f"num_heads * head_dim = {inner_dim} needs a projection to embed_dim={self.embed_dim}",
        )
        require(self.pool != "cls" or self.class_token, "pool", self.pool, "needs class_token=true")
        require(
            self.pool != "none" or (self.num_classes == 0 and self.final_norm != "pooled"),
            "pool",
            self.pool,
            "every token comes out: needs num_classes=0 and final_norm other than pooled",
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens in the blocks; each family has its own."""
        raise NotImplementedError

    @property
    def prefix_tokens(self) -> int:
        """Number of tokens before the patches."""
        return int(self.class_token)

    @property
    def position_tables(self) -> Mapping[str, PositionTable]:
        """See ``Config.position_tables``."""
        return {"pos_embed": PositionTable(self.grid, self.prefix_tokens)}

    @property
    def feature_dim(self) -> int:
        """Width of the features, which the head gets."""
        return self.embed_dim

    @property
    def block(self) -> BlockConfig:
        """The numbers of a block, without stochastic depth."""
        head_dim = self.head_dim or self.embed_dim // self.num_heads
        return BlockConfig(
            dim=self.embed_dim,
            num_heads=self.num_heads,
            head_dim=head_dim,
            qkv_bias=self.qkv_bias,
            attn_proj=self.attn_proj,
            attn_scale=self.attn_scale or head_dim**-0.5,
            mlp_dim=self.mlp_dim,
            activation=self.activation,
            norm_eps=self.norm_eps,
            layer_scale_init=self.layer_scale_init,
            dropout_rate=self.dropout_rate,
            attn_dropout_rate=self.attn_dropout_rate,
            drop_path_rate=0.0,
        )

    @property
    def blocks(self) -> tuple[BlockConfig, ...]:
        """The numbers of each block; stochastic depth grows linearly from 0 to its full rate."""
        last = max(self.depth - 1, 1)
        rates = (self.drop_path_rate * i / last for i in range(self.depth))
        return tuple(replace(self.block, drop_path_rate=rate) for rate in rates)


def attention(name: str, config: BlockConfig, tokens: int, scheme: Scheme) -> ParamTree:
    """Multi-head self-attention over ``tokens`` tokens."""
    dim, inner = config.dim, config.inner_dim
    kernel = scheme.dense_kernel(dim, inner)
    bias = scheme.dense_bias(dim) if config.qkv_bias else None
    children = [dense("qkv", (tokens,), dim, 3 * inner, kernel, bias)]
    if config.attn_proj:
        kernel, bias = scheme.dense_kernel(inner, dim), scheme.dense_bias(inner)
        children.append(dense("proj", (tokens,), inner, dim, kernel, bias))
    out_dim = dim if config.attn_proj else inner
    products = 2 * tokens * tokens * inner  # q·k and weights·v
    return ParamTree(name, children=tuple(children), output=(tokens, out_dim), own_macs=products)


def mlp(name: str, tokens: int, dim: int, hidden: int, scheme: Scheme) -> ParamTree:
    """Dense, activation, dense."""
    fc1 = dense(
        "fc1", (tokens,), dim, hidden, scheme.dense_kernel(dim, hidden), scheme.mlp_bias(dim)
    )
    fc2 = dense(
        "fc2", (tokens,), hidden, dim, scheme.dense_kernel(hidden, dim), scheme.mlp_bias(hidden)
    )
    return ParamTree(name, children=(fc1, fc2), output=(tokens, dim))


def layer_scale(name: str, tokens: int, dim: int, value: float) -> ParamTree:
    """A learned factor per channel."""
    gamma = Param("gamma", (dim,), Role.OWN, Init("constant", value))
    return ParamTree(name, (gamma,), output=(tokens, dim))


def block_mlp(config: BlockConfig, tokens: int, scheme: Scheme) -> ParamTree:
    """The MLP of a block."""
    return mlp("mlp", tokens, config.dim, config.mlp_dim, scheme)


def block(
    config: BlockConfig,
    tokens: int,
    scheme: Scheme,
    attn: ParamTree | None = None,
    mlp: ParamTree | None = None,
) -> ParamTree:
    """Pre-norm block: x + attn(norm1(x)), then x + mlp(norm2(x)).

    ``attn`` is named so; None for attention over all tokens. So is ``mlp``; None for one product,
    the activation, another product.
    """
    dim = config.dim
    scale = [] if config.layer_scale_init is None else [config.layer_scale_init]
    children = [
        layer_norm("norm1", (tokens,), dim),
        attention("attn", config, tokens, scheme) if attn is None else attn,
        *(layer_scale("layer_scale1", tokens, dim, value) for value in scale),
        layer_norm("norm2", (tokens,), dim),
        block_mlp(config, tokens, scheme) if mlp is None else mlp,
        *(layer_scale("layer_scale2", tokens, dim, value) for value in scale),
    ]
    return ParamTree("block", children=tuple(children), output=(tokens, dim))


def backbone(config: TransformerConfig, tokens: int, scheme: Scheme) -> tuple[ParamTree, ...]:
    """The modules behind the embedding: blocks, and the final norm where the config wants one."""
    numbers = config.blocks
    blocks = repeat("blocks", config.depth, lambda i: block(numbers[i], tokens, scheme))
    if config.final_norm == "none":
        return (blocks,)
    lead = () if config.final_norm == "pooled" else (tokens,)
    return blocks, layer_norm("norm", lead, config.embed_dim)


def head(name: str, config: TransformerConfig, scheme: Scheme) -> tuple[ParamTree, ...]:
    """A classifier over the features; none where the config has no classes."""
    if not config.num_classes:
        return ()
    dim, classes = config.feature_dim, config.num_classes
    kernel, bias = scheme.head_kernel(dim, classes), scheme.dense_bias(dim)
    return (dense(name, (), dim, classes, kernel, bias),)


def output_shape(config: TransformerConfig, tokens: int) -> tuple[int, ...]:
    """What the model returns for one image: logits, or features where there is no head."""
    width = config.num_classes or config.feature_dim
    return (tokens, width) if config.pool == "none" else (width,)
