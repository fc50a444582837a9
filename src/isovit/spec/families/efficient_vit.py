"""Efficient ViT: a ViT in which another transformer can stand.

Source: vit-pytorch's ``efficient.py`` (MIT): vit-pytorch's stem, a transformer that is handed in,
and a head behind a LayerNorm. Four ways for its tokens to mix are built in, so that they can be
measured against each other; all but the first take time linear in the number of tokens:

* ``full``: the softmax over all tokens, of a ViT;
* ``nystrom``: softmax over a few landmarks, the means of neighbouring tokens, and the
  pseudo-inverse of their own (Xiong et al. 2021, "Nyströmformer: A Nyström-Based Algorithm for
  Approximating Self-Attention", arXiv:2102.03902, section 3.2; nystrom-attention 0.0.14, MIT,
  which vit-pytorch's README plugs in);
* ``performer``: positive random features whose products are, in expectation, those of the softmax
  (Choromanski et al. 2021, "Rethinking Attention with Performers", arXiv:2009.14794, eq. 4, 5, 7);
* ``linear``: softmax of q over the width of a head, of k over the tokens (Shen et al. 2021,
  "Efficient Attention: Attention with Linear Complexities", arXiv:1812.01243, section 3.2). Of the
  linear attentions it is the one whose weights sum to 1 by construction, without a denominator that
  can vanish, and it was made for images.

The variants of the four differ in their mixer alone. At 224 pixels, 196 tokens, it decides little:
4.57, 4.65, 4.45 and 4.34 G multiply-adds; at 896 pixels they are 158.15, 71.05, 71.23 and 69.36 G.

A transformer of one's own takes their place: any module that maps (batch, tokens, embed_dim) to
the same. What the config says of blocks and mixers then concerns nothing:

    from isovit.backends.torch.families.efficient_vit import EfficientViT
    mixer = torch.nn.TransformerEncoderLayer(384, nhead=6, batch_first=True)
    model = EfficientViT(config, transformer=mixer)

    from isovit.backends.flax.families.efficient_vit import EfficientViT
    mixer = nnx.Sequential(nnx.LayerNorm(384, rngs=rngs), nnx.Linear(384, 384, rngs=rngs))
    model = EfficientViT(config, transformer=mixer, rngs=rngs)

    from isovit.backends.keras.families.efficient_vit import EfficientViT
    mixer = keras.Sequential([keras.layers.LayerNormalization(), keras.layers.Dense(384)])
    model = EfficientViT(config, transformer=mixer)

Such a model trains, and its framework saves it; `isovit.save` and `isovit parity` know the four.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

from isovit.spec.blocks import TransformerConfig, attention, block, head, output_shape
from isovit.spec.config import Epsilon, Pair, Positive, require
from isovit.spec.families.vit import ViTConfig, patch_embed
from isovit.spec.param import (
    Init,
    Param,
    ParamTree,
    Role,
    depthwise_conv,
    layer_norm,
    repeat,
)
from isovit.spec.published import Published
from isovit.spec.scheme import Scheme


class EfficientViTConfig(TransformerConfig, frozen=True, kw_only=True, tag="efficient_vit"):
    """Config of an efficient ViT; fields of the transformer as in ``TransformerConfig``.

    Attributes:
        patch_size: height and width of a patch, in pixels.
        mixer: how tokens mix in a block: ``full``, ``nystrom``, ``performer`` or ``linear``.
        transformer_norm: whether the transformer ends with a LayerNorm of its own over the tokens,
            as vit-pytorch's does, whatever ``final_norm`` puts behind it.
        num_landmarks: landmarks of ``nystrom``, each the mean of equally many tokens. Where they do
            not divide the tokens, zeros for q, k and v are put before these, and count as tokens.
        pinv_iterations: steps of ``nystrom`` towards the pseudo-inverse.
        pinv_norm: what these steps start from, divided by a norm: ``matrix``, each by its own; or
            ``batch``, all by the largest over all heads and all images (nystrom-attention), so that
            what comes of an image depends on those beside it.
        residual_kernel: tokens that ``nystrom``'s convolution of v spans, an odd number; each head
            has one kernel. None for no such convolution.
        performer_features: random features of ``performer``, which the heads of a block share. Each
            is normal; as many at a time as a head is wide are orthogonal.
        performer_stabilized: whether ``performer`` takes the largest exponent off all others: of
            a query over its features, and over all keys of a head.
        performer_eps: what ``performer`` adds to its denominator.
    """

    patch_size: Pair = (16, 16)
    mixer: Literal["full", "nystrom", "performer", "linear"] = "full"
    transformer_norm: bool = False
    num_landmarks: Positive = 64
    pinv_iterations: Positive = 6
    pinv_norm: Literal["matrix", "batch"] = "matrix"
    residual_kernel: Positive | None = 33
    performer_features: Positive = 64
    performer_stabilized: bool = True
    performer_eps: Epsilon = 1e-8

    def check(self) -> None:
        """Check that patches tile the image, the rules of the backbone, and those of the mixer."""
        super().check()
        self.stem.check()
        require(
            self.residual_kernel is None or self.residual_kernel % 2 == 1,
            "residual_kernel",
            self.residual_kernel,
            "must be odd, to have as many tokens before as behind",
        )
        require(
            self.attn_dropout_rate == 0.0 or self.mixer == "full",
            "attn_dropout_rate",
            self.attn_dropout_rate,
            f"mixer={self.mixer} has no attention weights to drop",
        )
        require(
            self.attn_scale is None or self.mixer != "linear",
            "attn_scale",
            self.attn_scale,
            "mixer=linear has no product q·k to scale",
        )

    @property
    def stem(self) -> ViTConfig:
        """The ViT whose patch embedding this is."""
        return ViTConfig(
            image_size=self.image_size,
            in_channels=self.in_channels,
            preprocess=self.preprocess,
            patch_size=self.patch_size,
            patch_embed="norm_linear_norm",
            embed_dim=self.embed_dim,
            norm_eps=self.norm_eps,
            num_heads=1,  # it has no blocks
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.stem.grid

    @property
    def tokens(self) -> int:
        """Number of tokens in the blocks, the class token included."""
        return self.prefix_tokens + math.prod(self.grid)

    @property
    def padding(self) -> int:
        """How many zeros the landmarks want before the tokens."""
        return -self.tokens % self.num_landmarks


def param_tree(config: EfficientViTConfig, tokens: int | None = None) -> ParamTree:
    """The modules of an efficient ViT with their parameters, output shapes and multiply-adds.

    Args:
        config: of the model.
        tokens: how many go through the transformer; None for those of the image.
    """
    scheme, dim, tokens = Scheme(config.init_scheme), config.embed_dim, tokens or config.tokens
    params = [Param("pos_embed", (1, config.tokens, dim), Role.OWN, scheme.positions())]
    if config.class_token:
        params.insert(0, Param("cls_token", (1, 1, dim), Role.OWN, scheme.class_token()))
    lead = () if config.final_norm == "pooled" else (tokens,)
    norm = () if config.final_norm == "none" else (layer_norm("norm", lead, dim),)
    return ParamTree(
        name="",
        params=tuple(params),
        children=(
            patch_embed(config.stem, scheme),
            _transformer(config, tokens, scheme),
            *norm,
            *head("head", config, scheme),
        ),
        output=output_shape(config, tokens),
    )


def _transformer(config: EfficientViTConfig, tokens: int, scheme: Scheme) -> ParamTree:
    numbers = config.blocks
    attn = MIXERS[config.mixer](config, tokens, scheme)
    children = [repeat("blocks", config.depth, lambda i: block(numbers[i], tokens, scheme, attn))]
    if config.transformer_norm:
        children.append(layer_norm("norm", (tokens,), config.embed_dim))
    return ParamTree("transformer", children=tuple(children), output=(tokens, config.embed_dim))


def _full(config: EfficientViTConfig, tokens: int, scheme: Scheme) -> ParamTree:
    return attention("attn", config.block, tokens, scheme)


def _nystrom(config: EfficientViTConfig, tokens: int, scheme: Scheme) -> ParamTree:
    landmarks, inner = config.num_landmarks, config.block.inner_dim
    heads, head_dim, padded = config.num_heads, config.block.head_dim, tokens + -tokens % landmarks
    qkv, *proj = (full := _full(config, tokens, scheme)).children
    children = [qkv]
    if config.residual_kernel is not None:
        size, kernel = (config.residual_kernel, 1), scheme.conv_kernel(config.residual_kernel)
        grid = (tokens, head_dim)
        children.append(depthwise_conv("residual_conv", grid, size, heads, kernel, None))
    # Three products of q and k, three back to v; four for each step of the pseudo-inverse.
    macs = 2 * (tokens + landmarks + padded) * landmarks * inner
    macs += 4 * config.pinv_iterations * heads * landmarks**3
    return replace(full, children=(*children, *proj), own_macs=macs)


def _performer(config: EfficientViTConfig, tokens: int, scheme: Scheme) -> ParamTree:
    heads, features = config.num_heads, config.performer_features
    init = Init("orthogonal_normal", 1.0)
    shape = (features, config.block.head_dim)
    random_features = Param("random_features", shape, Role.OWN, init, trainable=False)
    # φ(k) and φ(q); Σ φ(k)⊗v and its product with φ(q); the denominator
    macs = 4 * tokens * features * config.block.inner_dim + tokens * features * heads
    return replace(_full(config, tokens, scheme), params=(random_features,), own_macs=macs)


def _linear(config: EfficientViTConfig, tokens: int, scheme: Scheme) -> ParamTree:
    # Σ k⊗v and its product with q
    macs = 2 * tokens * config.block.head_dim * config.block.inner_dim
    return replace(_full(config, tokens, scheme), own_macs=macs)


MIXERS = {"full": _full, "nystrom": _nystrom, "performer": _performer, "linear": _linear}

# The sizes of ViT-S/16. Without a class token the 196 tokens are 49 landmarks of 4, with no zeros.
SMALL: dict[str, Any] = dict(
    embed_dim=384,
    depth=12,
    num_heads=6,
    mlp_dim=1536,
    class_token=False,
    pool="mean",
    final_norm="pooled",
    num_landmarks=49,
)

VARIANTS: dict[str, EfficientViTConfig] = {
    **{
        f"efficient_vit_{mixer}": EfficientViTConfig(mixer=mixer, **SMALL)
        for mixer in ("full", "nystrom", "performer", "linear")
    },
    # The example model of vit-pytorch's README, with the transformer of nystrom-attention.
    "efficient_vit_nystrom_pytorch": EfficientViTConfig(
        image_size=(2048, 2048),
        patch_size=(32, 32),
        mixer="nystrom",
        num_landmarks=256,
        pinv_norm="batch",
        embed_dim=512,
        depth=12,
        num_heads=8,
        head_dim=64,
        mlp_dim=2048,
        qkv_bias=False,
        norm_eps=1e-5,
        final_norm="pooled",
        init_scheme="vit_pytorch",
    ),
}

PUBLISHED: dict[str, Published] = {}
"""Nobody has published weights of these."""

ALIASES: dict[str, str] = {}
