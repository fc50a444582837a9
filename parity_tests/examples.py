"""A few fixed cases between them with every module and option, for tests that need no search."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from isovit.spec.families.t2t_vit import SoftSplit, T2TViTConfig
from isovit.spec.families.vit import ViTConfig
from parity_tests.strategies import Case
from parity_tests.subject import Subject

VIT: dict[str, Any] = dict(
    image_size=(12, 8), patch_size=(3, 4), embed_dim=21, depth=2, num_heads=3, mlp_dim=17,
    num_classes=5,
)  # fmt: skip
T2T: dict[str, Any] = dict(
    image_size=(15, 18), t2t_layers=(SoftSplit(5, 3, 2), SoftSplit(3, 2, 1), SoftSplit(3, 1, 0)),
    token_dim=10, token_mlp_dim=13, performer_features=4, embed_dim=15, depth=1, num_heads=3,
    mlp_dim=22, num_classes=5,
)  # fmt: skip

EXAMPLES: dict[str, Case] = {
    "vit_timm": Case(ViTConfig(**VIT, layer_scale_init=0.1)),
    "vit_pytorch": Case(
        ViTConfig(
            **{**VIT, "num_classes": 0}, patch_embed="norm_linear_norm", pos_embed_tokens="patches",
            head_dim=5, qkv_bias=False, norm_eps=1e-5, activation="gelu_tanh", pool="none",
        )
    ),
    "vit_without_class_token": Case(
        ViTConfig(**VIT, class_token=False, attn_proj=False, final_norm="pooled", pool="mean")
    ),
    "vit_distilled": Case(ViTConfig(**VIT, dist_token=True, dist_head=True)),
    "vit_pre_logits": Case(
        ViTConfig(**VIT, dist_token=True, pool="mean_patches", pre_logits_dim=11)
    ),
    "t2t_performer": Case(T2TViTConfig(**T2T, token_mixer="performer")),
    "t2t_transformer": Case(
        T2TViTConfig(**T2T, token_mixer="transformer", pos_embed="learned", pool="mean_patches")
    ),
    "t2t_full": Case(
        T2TViTConfig(
            **{**T2T, "t2t_layers": (SoftSplit(3, 2, 1), SoftSplit(3, 2, 1), SoftSplit(2, 1, 0))},
            token_mixer="full", pos_embed="learned", final_norm="none",
        )
    ),
}  # fmt: skip


@cache
def traced(backend: Subject, example: str, dtype: str) -> dict[str, np.ndarray]:
    """Every activation of an example, computed once for all tests."""
    return backend.trace(EXAMPLES[example], dtype)
