"""ViT in NumPy loops."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
from hypothesis import strategies as st

from isovit.spec.families.vit import ViTConfig
from parity_tests.oracles import google, pairs
from parity_tests.oracles.arrays import Array, TransformerReference
from parity_tests.oracles.fitting import Fields, Fit, filled, projects, ratio
from parity_tests.oracles.originals import Original


class Reference(TransformerReference):
    """ViT; one patch after another."""

    config: ViTConfig

    def output(self, images: Array) -> Array:
        """See ``Reference.output``."""
        return self.classify(self.encode(self.embed(images)))

    def embed(self, images: Array) -> Array:
        """Every token, with its position."""
        x = self.patch_embed(self.config, images)
        return self.positioned(x, positions_first=self.config.pos_embed_tokens == "patches")

    def patch_embed(self, config: ViTConfig, images: Array) -> Array:
        """Patches to tokens."""
        (height, width), (rows, columns) = config.patch_size, config.grid
        patches = [
            images[:, i * height : (i + 1) * height, j * width : (j + 1) * width]
            for i in range(rows)
            for j in range(columns)
        ]
        if config.patch_embed == "conv":
            kernel, bias = (self.weights[f"patch_embed.proj.{leaf}"] for leaf in ("kernel", "bias"))
            x = np.stack([np.einsum("bhwi,hwio->bo", p, kernel) + bias for p in patches], axis=1)
            self.keep("patch_embed.proj", x.reshape(len(x), rows, columns, -1))
        else:
            x = np.stack([patch.reshape(len(patch), -1) for patch in patches], axis=1)
            x = self.norm("patch_embed.norm1", x)
            x = self.norm("patch_embed.norm2", self.dense("patch_embed.proj", x))
        return self.keep("patch_embed", x)


ORIGINALS = {
    "vit_pytorch": Original("vit_pytorch", "vit_pytorch", lambda m: m.ViT, pairs.vit_pytorch_vits),
    "timm": Original(
        "timm", "timm.models.vision_transformer", lambda m: m.VisionTransformer, pairs.timm_vits
    ),
    "timm, distilled": Original(
        "timm",
        "timm.models.deit",
        lambda m: m.VisionTransformerDistilled,
        pairs.timm_distilled_vits,
    ),
}

HF = {
    kind: partial(pairs.hf_models, kind)
    for kind in (
        "ViTForImageClassification",
        "ViTModel",
        "DeiTForImageClassification",
        "DeiTForImageClassificationWithTeacher",
        "DeiTModel",
        "ViTMAEModel",
    )
}
"""Classes of transformers, and what to make of each."""


# What each format can hold

PLAIN: Fields = dict(dist_token=False, dist_head=False, layer_scale_init=None, final_norm="tokens")


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


def timm_model(deit: ModuleType, config: ViTConfig) -> Any:
    """With a distillation token, or without."""
    common: Fields = dict(
        img_size=config.image_size, patch_size=config.patch_size, in_chans=config.in_channels,
        num_classes=config.num_classes, embed_dim=config.embed_dim, depth=config.depth,
        num_heads=config.num_heads, mlp_ratio=ratio(config), qkv_bias=config.qkv_bias,
        init_values=config.layer_scale_init,
    )  # fmt: skip
    if config.dist_token:
        return deit.VisionTransformerDistilled(**common)
    return deit.VisionTransformer(
        **common,
        class_token=config.class_token, no_embed_class=config.pos_embed_tokens == "patches",
        global_pool={"cls": "token", "none": ""}.get(config.pool, "avg"),
        fc_norm=config.final_norm == "pooled",
    )  # fmt: skip


def google_sizes(config: ViTConfig) -> google.Sizes:
    """Of vit_jax and of big_vision."""
    return google.Sizes(
        config.patch_size, config.grid, config.in_channels, config.embed_dim, config.depth,
        config.num_heads, config.mlp_dim, "token" if config.class_token else "gap",
        config.pre_logits_dim, config.num_classes,
    )  # fmt: skip


def vit_pytorch_model(library: ModuleType, config: ViTConfig) -> Any:
    """Its sizes are the config's."""
    return library.ViT(
        image_size=config.image_size, patch_size=config.patch_size, channels=config.in_channels,
        num_classes=config.num_classes, dim=config.embed_dim, depth=config.depth,
        heads=config.num_heads, dim_head=config.block.head_dim, mlp_dim=config.mlp_dim,
        pool="cls" if config.class_token else "mean",
    )  # fmt: skip


FITS = {
    "timm": Fit(timm, "timm.models.deit", timm_model),
    "deit": Fit(deit, "timm.models.deit", timm_model),
    "mae": Fit(mae, "timm.models.deit", timm_model),
    "dino": Fit(mae, "timm.models.deit", timm_model),
    "hf": Fit(hf),
    "google": Fit(vit_jax),
    "big_vision": Fit(big_vision),
    "vit_pytorch": Fit(vit_pytorch, "vit_pytorch", vit_pytorch_model),
}

PARAMETERS = {
    "vit_ti16": (5_717_416, 5_717_416),
    "vit_s16": (22_050_664, 22_050_664),
    "vit_s32": (22_878_952, 22_878_952),
    "vit_b8": (86_576_872, 86_576_872),
    "vit_b16": (86_567_656, 86_567_656),
    "vit_b32": (88_224_232, 88_224_232),
    "vit_l16": (304_326_632, 304_326_632),
    "vit_l32": (306_535_400, 306_535_400),
    "vit_h14": (632_045_800, 632_045_800),
    "deit_ti16": (5_717_416, 5_717_416),
    "deit_s16": (22_050_664, 22_050_664),
    "deit_b16": (86_567_656, 86_567_656),
    "deit_ti16_distilled": (5_910_800, 5_910_800),
    "deit_s16_distilled": (22_436_432, 22_436_432),
    "deit_b16_distilled": (87_338_192, 87_338_192),
}
"""Total and trainable, counted in timm 1.0.31, each model instantiated."""
