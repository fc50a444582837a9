"""Configs that each foreign format can hold, and the arguments with which its library makes them.

The other way round than ``pairs``: hypothesis draws a config of isovit, the fields in which the
library has no choice are set, and every other field stays as it was drawn. What ``MISFITS`` should
have refused then shows: the library cannot load what was written, or computes something else.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from hypothesis import strategies as st

from isovit.spec.blocks import TransformerConfig
from isovit.spec.families import FAMILIES
from isovit.spec.families.t2t_vit import SoftSplit, T2TViTConfig
from isovit.spec.families.vit import ViTConfig
from parity_tests.oracles import google
from parity_tests.oracles.pairs import t2t_layers

FOREIGN = [
    (family, name)
    for family in FAMILIES
    for name in import_module(f"isovit.weight_convert.families.{family}").TABLES
]
"""Family and format of every rename table."""


def drawn(family: str) -> st.SearchStrategy[TransformerConfig]:
    """Any config of a family."""
    return import_module(f"parity_tests.families.{family}").configs()


@st.composite
def fitting(draw: st.DrawFn, family: str, name: str) -> TransformerConfig:
    """A config that a format can hold."""
    config = draw(drawn(family))
    return config.replace(**CHANGES[family, name](draw, config))


Fields = dict[str, Any]
PLAIN: Fields = dict(dist_token=False, dist_head=False, layer_scale_init=None, final_norm="tokens")


def filled(config: TransformerConfig) -> Fields:
    """Heads that fill the width, and a projection behind them."""
    dim = -(-config.embed_dim // config.num_heads) * config.num_heads
    return dict(embed_dim=dim, head_dim=None, attn_proj=True)


def projects(config: TransformerConfig) -> bool:
    """vit-pytorch leaves the projection out where one head is as wide as the tokens."""
    return not (config.num_heads == 1 and config.block.head_dim == config.embed_dim)


def timm(_: st.DrawFn, config: ViTConfig) -> Fields:
    """Where it has a distillation token, it has a head for it."""
    over_all = config.class_token and config.pool == "mean"
    changes: Fields = dict(
        **filled(config), attn_scale=None, patch_embed="conv", pre_logits_dim=None,
        dist_token=config.dist_head, pool="mean_patches" if over_all else config.pool,
        final_norm="tokens" if config.final_norm == "none" else config.final_norm,
    )  # fmt: skip
    return changes | (dict(pos_embed_tokens="all") if config.dist_head else {})


def deit(draw: st.DrawFn, config: ViTConfig) -> Fields:
    """An older timm, without its later options."""
    pool = "mean_patches" if config.pool == "mean" else config.pool
    plain: Fields = dict(class_token=True, pos_embed_tokens="all", layer_scale_init=None)
    return timm(draw, config) | plain | dict(pool=pool)


def mae(draw: st.DrawFn, config: ViTConfig) -> Fields:
    """As DeiT, but never distilled."""
    return deit(draw, config) | dict(dist_token=False, dist_head=False)


def hf(_: st.DrawFn, config: ViTConfig) -> Fields:
    """A class token, or all tokens where there is no head; DeiT has one head or two."""
    distilled: Fields = dict(dist_token=config.dist_token, dist_head=config.dist_head)
    return dict(
        **filled(config), **PLAIN | distilled, attn_scale=None, patch_embed="conv",
        class_token=True, pos_embed_tokens="all", pre_logits_dim=None,
        pool="none" if config.pool == "none" else "cls",
    )  # fmt: skip


def vit_jax(_: st.DrawFn, config: ViTConfig) -> Fields:
    """A class token, or the mean without one."""
    return dict(
        **filled(config), **PLAIN, attn_scale=None, patch_embed="conv", qkv_bias=True,
        pos_embed_tokens="all", pool="cls" if config.class_token else "mean_patches",
    )  # fmt: skip


def big_vision(draw: st.DrawFn, config: ViTConfig) -> Fields:
    """The same with positions of the patches alone."""
    tokens = "patches" if config.class_token else "all"
    return vit_jax(draw, config) | dict(pos_embed_tokens=tokens)


def vit_pytorch(_: st.DrawFn, config: ViTConfig) -> Fields:
    """A class token, or the mean without one; all tokens where there is no head."""
    pool = "cls" if config.class_token else "mean"
    return dict(
        **PLAIN, attn_scale=None, patch_embed="norm_linear_norm", qkv_bias=False,
        pos_embed_tokens="all", pre_logits_dim=None, attn_proj=projects(config),
        pool=pool if config.num_classes else "none",
    )  # fmt: skip


def vit_pytorch_t2t(draw: st.DrawFn, config: T2TViTConfig) -> Fields:
    """Square images, always a class token and a head."""
    side = config.image_size[0]
    layers = tuple(SoftSplit(k, s, s // 2) for k, s in draw(t2t_layers(side)))
    return dict(
        image_size=side, t2t_layers=layers, token_mixer="full", pool=draw(st.sampled_from(POOLS)),
        class_token=True, final_norm="tokens", num_classes=config.num_classes or 1,
        layer_scale_init=None, attn_scale=None, qkv_bias=False, attn_proj=projects(config),
    )  # fmt: skip


POOLS = ("cls", "mean")
OFFICIAL = ((7, 4, 2), (3, 2, 1), (3, 2, 1))


def yitu(draw: st.DrawFn, config: T2TViTConfig) -> Fields:
    """Square images that 16 divides, token modules whose widths follow from one number."""
    return dict(
        **filled(config), image_size=draw(st.sampled_from([16, 32])), t2t_layers=OFFICIAL,
        token_mixer=draw(st.sampled_from(["performer", "transformer"])), token_scale="input_dim",
        token_mlp_dim=config.token_dim, performer_features=config.token_dim // 2, pool="cls",
        class_token=True, final_norm="tokens", layer_scale_init=None, qkv_bias=False,
    )  # fmt: skip


CHANGES: dict[tuple[str, str], Callable[..., Fields]] = {
    ("vit", "timm"): timm,
    ("vit", "deit"): deit,
    ("vit", "mae"): mae,
    ("vit", "dino"): mae,
    ("vit", "hf"): hf,
    ("vit", "google"): vit_jax,
    ("vit", "big_vision"): big_vision,
    ("vit", "vit_pytorch"): vit_pytorch,
    ("t2t_vit", "yitu"): yitu,
    ("t2t_vit", "vit_pytorch"): vit_pytorch_t2t,
}
"""Fields in which the library of a format has no choice."""


# How each library is told to be what a config says


def timm_arguments(config: ViTConfig) -> Fields:
    """Of ``VisionTransformer``, or with a distillation token of ``VisionTransformerDistilled``."""
    common: Fields = dict(
        img_size=config.image_size, patch_size=config.patch_size, in_chans=config.in_channels,
        num_classes=config.num_classes, embed_dim=config.embed_dim, depth=config.depth,
        num_heads=config.num_heads, mlp_ratio=ratio(config), qkv_bias=config.qkv_bias,
        init_values=config.layer_scale_init,
    )  # fmt: skip
    if config.dist_token:
        return common
    return common | dict(
        class_token=config.class_token, no_embed_class=config.pos_embed_tokens == "patches",
        global_pool={"cls": "token", "none": ""}.get(config.pool, "avg"),
        fc_norm=config.final_norm == "pooled",
    )  # fmt: skip


def ratio(config: TransformerConfig) -> float:
    """Hidden width of the MLP as a multiple of the width, which the library cuts to an integer."""
    return (config.mlp_dim + 0.5) / config.embed_dim


def google_sizes(config: ViTConfig) -> google.Sizes:
    """Of vit_jax and of big_vision."""
    return google.Sizes(
        config.patch_size, config.grid, config.in_channels, config.embed_dim, config.depth,
        config.num_heads, config.mlp_dim, "token" if config.class_token else "gap",
        config.pre_logits_dim, config.num_classes,
    )  # fmt: skip


def vit_pytorch_arguments(config: ViTConfig) -> Fields:
    """Of ``ViT``."""
    return dict(
        image_size=config.image_size, patch_size=config.patch_size, channels=config.in_channels,
        num_classes=config.num_classes, dim=config.embed_dim, depth=config.depth,
        heads=config.num_heads, dim_head=config.block.head_dim, mlp_dim=config.mlp_dim,
        pool="cls" if config.class_token else "mean",
    )  # fmt: skip


def vit_pytorch_t2t_arguments(config: T2TViTConfig) -> Fields:
    """Of ``T2TViT``."""
    return dict(
        image_size=config.image_size[0], num_classes=config.num_classes, dim=config.embed_dim,
        depth=config.depth, heads=config.num_heads, mlp_dim=config.mlp_dim, pool=config.pool,
        channels=config.in_channels, dim_head=config.block.head_dim,
        t2t_layers=tuple((split.kernel, split.stride) for split in config.t2t_layers),
    )  # fmt: skip


def yitu_arguments(config: T2TViTConfig) -> Fields:
    """Of ``T2T_ViT``."""
    return dict(
        img_size=config.image_size[0], tokens_type=config.token_mixer, in_chans=config.in_channels,
        num_classes=config.num_classes, embed_dim=config.embed_dim, depth=config.depth,
        num_heads=config.num_heads, mlp_ratio=ratio(config), token_dim=config.token_dim,
        qk_scale=config.attn_scale,
    )  # fmt: skip
