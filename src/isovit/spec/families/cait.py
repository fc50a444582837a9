"""CaiT: Class-Attention in Image Transformers.

Source: Touvron et al. 2021, "Going deeper with Image Transformers", arXiv:2103.17239; the official
code (facebookresearch/deit ``cait_models.py``, Apache-2.0), which timm has too; vit-pytorch's
``cait.py`` (MIT) for the other form. Heads that talk: Shazeer et al. 2020, arXiv:2003.02436.

The patches go through ``blocks`` among themselves, without a class token. Then the class token
alone goes through ``cls_blocks``, where it looks at the patches, which no longer change. In the
attention of the patches, heads talk: before the softmax and behind it, a product over the heads
mixes them, for each query and key by itself. Every branch has a LayerScale.

vit-pytorch differs in more than its dialect of ViT: its heads talk in the class blocks as well, and
without bias; a class block normalises the class token alone, and not the patches that it looks at;
dropout falls on the attention weights before they are mixed. Its ``layer_dropout``, which leaves
out whole layers at evaluation too, is no field: such a model is no function of its input.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from isovit.spec.blocks import BlockConfig, block, layer_scale, mlp
from isovit.spec.config import (
    Activation,
    Config,
    Epsilon,
    InitScheme,
    NonNegative,
    Pair,
    Pool,
    PositionTable,
    Positive,
    Preprocess,
    Rate,
    require,
)
from isovit.spec.families.vit import ViTConfig, patch_embed
from isovit.spec.param import Init, Param, ParamTree, Role, dense, layer_norm, repeat
from isovit.spec.published import Published
from isovit.spec.scheme import Scheme


class CaiTConfig(Config, frozen=True, kw_only=True, tag="cait"):
    """Config of a CaiT.

    Attributes:
        patch_size: height and width of a patch, in pixels.
        patch_embed: ``conv`` or ``norm_linear_norm``, as in ``ViTConfig``.
        embed_dim: width of the tokens.
        depth: number of blocks over the patches.
        cls_depth: number of blocks over the class token.
        num_heads: attention heads.
        head_dim: width of a head; None for embed_dim / num_heads.
        qkv_bias: whether the products for q, k and v have a bias.
        talking_heads_bias: whether the products over the heads have one; before the softmax it
            never trains.
        cls_talking_heads: whether heads talk in the class blocks too.
        cls_norm: what the first LayerNorm of a class block is over: the class token and the
            patches it looks at (``tokens``), or the class token alone (``cls``).
        mlp_dim: hidden width of the MLP.
        cls_mlp_dim: the same in the class blocks; None for as wide.
        activation: of the MLP; ``gelu`` is exact, ``gelu_tanh`` the approximation.
        norm_eps: epsilon of every LayerNorm.
        layer_scale_init: start of the learned factor per channel on each branch; None for 0.1 in
            the first 18 blocks, 1e-5 in those up to the 24th and 1e-6 beyond, patches and class
            token counted apart (vit-pytorch).
        pool: behind the final norm, the class token (``cls``), the mean over all tokens (``mean``)
            or over the patches alone (``mean_patches``), or ``none``: every token comes out.
        embed_dropout_rate: on the patches before the first block.
        dropout_rate: after the attention's projection and both products of the MLP.
        attn_dropout_rate: on the attention weights.
        mixed_dropout: whether these are mixed before they are dropped (official) or afterwards.
        cls_dropout_rate: as ``dropout_rate``, in the class blocks; official models have none.
        cls_attn_dropout_rate: as ``attn_dropout_rate``, likewise.
        drop_path_rate: stochastic depth, the same in each block over the patches; none in those
            over the class token.
        init_scheme: whose initialisation ``init`` follows; CaiT's own is that of ``yitu``.
    """

    patch_size: Pair = (16, 16)
    patch_embed: Literal["conv", "norm_linear_norm"] = "conv"
    embed_dim: Positive = 768
    depth: NonNegative = 12
    cls_depth: NonNegative = 2
    num_heads: Positive = 12
    head_dim: Positive | None = None
    qkv_bias: bool = True
    talking_heads_bias: bool = True
    cls_talking_heads: bool = False
    cls_norm: Literal["tokens", "cls"] = "tokens"
    mlp_dim: Positive = 3072
    cls_mlp_dim: Positive | None = None
    activation: Activation = "gelu"
    norm_eps: Epsilon = 1e-6
    layer_scale_init: float | None = None
    pool: Pool = "cls"
    embed_dropout_rate: Rate = 0.0
    dropout_rate: Rate = 0.0
    attn_dropout_rate: Rate = 0.0
    mixed_dropout: bool = True
    cls_dropout_rate: Rate = 0.0
    cls_attn_dropout_rate: Rate = 0.0
    drop_path_rate: Rate = 0.0
    init_scheme: InitScheme = "yitu"

    def check(self) -> None:
        """Check that patches tile the image, heads fit the width, and the head has one vector."""
        super().check()
        self.stem.check()
        require(
            self.head_dim is not None or self.embed_dim % self.num_heads == 0,
            "embed_dim",
            self.embed_dim,
            f"must be divisible by num_heads={self.num_heads}, unless head_dim is given",
        )
        require(
            self.pool != "none" or self.num_classes == 0,
            "pool",
            self.pool,
            "every token comes out: needs num_classes=0",
        )
        require(
            self.pool != "cls" or self.cls_depth > 0,
            "cls_depth",
            self.cls_depth,
            "pool=cls needs one or more: without, the class token never sees the patches",
        )

    @property
    def stem(self) -> ViTConfig:
        """The ViT whose patch embedding this is."""
        return ViTConfig(
            image_size=self.image_size,
            in_channels=self.in_channels,
            preprocess=self.preprocess,
            patch_size=self.patch_size,
            patch_embed=self.patch_embed,
            embed_dim=self.embed_dim,
            num_heads=1,  # it has no blocks
            norm_eps=self.norm_eps,
        )

    @property
    def patches(self) -> int:
        """Number of patches."""
        return self.stem.patches

    @property
    def tokens(self) -> int:
        """Number of tokens behind the class blocks: the class token and the patches."""
        return 1 + self.patches

    @property
    def head_width(self) -> int:
        """Width of a head, given or not."""
        return self.head_dim or self.embed_dim // self.num_heads

    @property
    def inner_dim(self) -> int:
        """Width of q, of k and of v: all heads side by side."""
        return self.num_heads * self.head_width

    @property
    def attn_scale(self) -> float:
        """Factor on q·k: 1/√ of a head's width."""
        return self.head_width**-0.5

    @property
    def cls_mlp_width(self) -> int:
        """Hidden width of the MLP in the class blocks."""
        return self.cls_mlp_dim or self.mlp_dim

    @property
    def position_tables(self) -> Mapping[str, PositionTable]:
        """See ``Config.position_tables``."""
        return {"pos_embed": PositionTable(self.stem.grid)}

    def layer_scale_start(self, index: int) -> float:
        """Start of the LayerScales of a block, counted from 0."""
        if self.layer_scale_init is not None:
            return self.layer_scale_init
        return 0.1 if index < 18 else 1e-5 if index < 24 else 1e-6

    @property
    def blocks(self) -> tuple[BlockConfig, ...]:
        """The numbers of each block over the patches."""
        return tuple(
            BlockConfig(
                dim=self.embed_dim,
                num_heads=self.num_heads,
                head_dim=self.head_width,
                qkv_bias=self.qkv_bias,
                attn_proj=True,
                attn_scale=self.attn_scale,
                mlp_dim=self.mlp_dim,
                activation=self.activation,
                norm_eps=self.norm_eps,
                layer_scale_init=self.layer_scale_start(i),
                dropout_rate=self.dropout_rate,
                attn_dropout_rate=self.attn_dropout_rate,
                drop_path_rate=self.drop_path_rate,
            )
            for i in range(self.depth)
        )


def param_tree(config: CaiTConfig) -> ParamTree:
    """The modules of a CaiT with their parameters, output shapes and multiply-adds."""
    scheme, dim, tokens = Scheme(config.init_scheme), config.embed_dim, config.tokens
    numbers, attn = config.blocks, _attention(config, scheme)
    head = dense(
        "head",
        (),
        dim,
        config.num_classes,
        scheme.head_kernel(dim, config.num_classes),
        scheme.dense_bias(dim),
    )
    width = config.num_classes or dim
    return ParamTree(
        name="",
        params=(
            Param("cls_token", (1, 1, dim), Role.OWN, scheme.class_token()),
            Param("pos_embed", (1, config.patches, dim), Role.OWN, scheme.positions()),
        ),
        children=(
            patch_embed(config.stem, scheme),
            repeat(
                "blocks", config.depth, lambda i: block(numbers[i], config.patches, scheme, attn)
            ),
            repeat("cls_blocks", config.cls_depth, lambda i: _cls_block(config, i, scheme)),
            layer_norm("norm", (tokens,), dim),
            *((head,) if config.num_classes else ()),
        ),
        output=(tokens, width) if config.pool == "none" else (width,),
    )


def _cls_block(config: CaiTConfig, index: int, scheme: Scheme) -> ParamTree:
    """Pre-norm block over the class token, whose attention is over the patches too."""
    dim, gamma = config.embed_dim, config.layer_scale_start(index)
    normed = config.tokens if config.cls_norm == "tokens" else 1
    children = (
        layer_norm("norm1", (normed,), dim),
        _cls_attention(config, scheme),
        layer_scale("layer_scale1", 1, dim, gamma),
        layer_norm("norm2", (1,), dim),
        mlp("mlp", 1, dim, config.cls_mlp_width, scheme),
        layer_scale("layer_scale2", 1, dim, gamma),
    )
    return ParamTree("cls_block", children=children, output=(1, dim))


def _attention(config: CaiTConfig, scheme: Scheme) -> ParamTree:
    dim, inner, tokens = config.embed_dim, config.inner_dim, config.patches
    children = (
        _product("qkv", tokens, dim, 3 * inner, config.qkv_bias, scheme),
        _talking_heads(config, tokens, tokens, scheme),
        _product("proj", tokens, inner, dim, True, scheme),
    )
    return ParamTree("attn", children=children, output=(tokens, dim))


def _cls_attention(config: CaiTConfig, scheme: Scheme) -> ParamTree:
    dim, inner, tokens = config.embed_dim, config.inner_dim, config.tokens
    talking = config.cls_talking_heads
    children = (
        _product("q", 1, dim, inner, config.qkv_bias, scheme),
        _product("kv", tokens, dim, 2 * inner, config.qkv_bias, scheme),
        *((_talking_heads(config, 1, tokens, scheme),) if talking else ()),
        _product("proj", 1, inner, dim, True, scheme),
    )
    macs = 0 if talking else 2 * tokens * inner  # q·k and weights·v
    return ParamTree("attn", children=children, output=(1, dim), own_macs=macs)


def _talking_heads(config: CaiTConfig, queries: int, keys: int, scheme: Scheme) -> ParamTree:
    heads, inner = config.num_heads, config.inner_dim
    children = (
        _mix_heads("proj_l", config, queries, keys, scheme, before_softmax=True),
        _mix_heads("proj_w", config, queries, keys, scheme, before_softmax=False),
    )
    output = (heads, queries, inner // heads)
    macs = 2 * queries * keys * inner  # q·k and weights·v
    return ParamTree("talking_heads", children=children, output=output, own_macs=macs)


def _mix_heads(
    name: str, config: CaiTConfig, queries: int, keys: int, scheme: Scheme, *, before_softmax: bool
) -> ParamTree:
    """A product over the heads, which come before queries and keys.

    A bias before the softmax shifts all logits of a query alike, which the softmax does not see:
    its gradient is zero but for rounding, by which an optimiser would move it. So it never trains.
    """
    heads = config.num_heads
    own = scheme.name == "vit_pytorch"
    kernel = Init("normal", 1.0) if own else scheme.dense_kernel(heads, heads)
    params = [Param("kernel", (heads, heads), Role.DENSE_KERNEL, kernel)]
    if config.talking_heads_bias:
        bias = scheme.dense_bias(heads)
        params.append(Param("bias", (heads,), Role.BIAS, bias, trainable=not before_softmax))
    output = (heads, queries, keys)
    return ParamTree(name, tuple(params), output=output, own_macs=math.prod(output) * heads)


def _product(
    name: str, tokens: int, in_dim: int, out_dim: int, bias: bool, scheme: Scheme
) -> ParamTree:
    kernel = scheme.dense_kernel(in_dim, out_dim)
    start = scheme.dense_bias(in_dim) if bias else None
    return dense(name, (tokens,), in_dim, out_dim, kernel, start)


# Touvron et al. 2021, section 5, and ``cait_models.py`` of the official code: a head is 48 wide,
# and two blocks are over the class token.
SIZES: dict[str, dict[str, Any]] = {
    "xxs24": dict(embed_dim=192, depth=24, num_heads=4, mlp_dim=768, layer_scale_init=1e-5),
    "xxs36": dict(embed_dim=192, depth=36, num_heads=4, mlp_dim=768, layer_scale_init=1e-5),
    "xs24": dict(embed_dim=288, depth=24, num_heads=6, mlp_dim=1152, layer_scale_init=1e-5),
    "s24": dict(embed_dim=384, depth=24, num_heads=8, mlp_dim=1536, layer_scale_init=1e-5),
    "s36": dict(embed_dim=384, depth=36, num_heads=8, mlp_dim=1536, layer_scale_init=1e-6),
    "m36": dict(embed_dim=768, depth=36, num_heads=16, mlp_dim=3072, layer_scale_init=1e-6),
    "m48": dict(embed_dim=768, depth=48, num_heads=16, mlp_dim=3072, layer_scale_init=1e-6),
}

# As timm evaluates them: nothing is cut off but what makes the image square (crop ratio 1).
WHOLE = Preprocess(crop_fraction=1.0)


def _official(size: str, image_size: int) -> CaiTConfig:
    return CaiTConfig(image_size=(image_size, image_size), preprocess=WHOLE, **SIZES[size])


VARIANTS: dict[str, CaiTConfig] = {
    "cait_xxs24": _official("xxs24", 224),
    "cait_xxs24_384": _official("xxs24", 384),
    "cait_xxs36": _official("xxs36", 224),
    "cait_xxs36_384": _official("xxs36", 384),
    "cait_xs24_384": _official("xs24", 384),
    "cait_s24": _official("s24", 224),
    "cait_s24_384": _official("s24", 384),
    "cait_s36_384": _official("s36", 384),
    "cait_m36_384": _official("m36", 384),
    "cait_m48_448": _official("m48", 448),
    # The example model of vit-pytorch's README.
    "cait_pytorch": CaiTConfig(
        image_size=(256, 256),
        patch_size=(32, 32),
        patch_embed="norm_linear_norm",
        embed_dim=1024,
        depth=12,
        num_heads=16,
        head_dim=64,
        qkv_bias=False,
        talking_heads_bias=False,
        cls_talking_heads=True,
        cls_norm="cls",
        mlp_dim=2048,
        norm_eps=1e-5,
        layer_scale_init=None,
        mixed_dropout=False,
        init_scheme="vit_pytorch",
    ),
}

DEIT_PAGE = "README_cait.md of facebookresearch/deit, after Touvron et al. 2021, arXiv:2103.17239"
MORE = "up to 0.8 % above its products; what else was counted is not said"

# Of weights trained by distillation, which are those that were released.
PUBLISHED: dict[str, Published] = {
    "cait_xs24_384": Published(DEIT_PAGE, 84.1, 384, gmacs="19.3", gmacs_note=MORE),
    "cait_s24": Published(DEIT_PAGE, 83.5, 224, gmacs="9.4", gmacs_note=MORE),
    "cait_s24_384": Published(DEIT_PAGE, 85.1, 384, gmacs="32.2", gmacs_note=MORE),
    "cait_s36_384": Published(DEIT_PAGE, 85.4, 384, gmacs="48.0", gmacs_note=MORE),
    "cait_m36_384": Published(DEIT_PAGE, 86.1, 384, gmacs="173.3", gmacs_note=MORE),
    "cait_m48_448": Published(DEIT_PAGE, 86.5, 448, gmacs="329.6", gmacs_note=MORE),
}

ALIASES = {f"cait_{size}_224": f"cait_{size}" for size in ("xxs24", "xxs36", "s24")}
"""The names of timm, where they are others."""
