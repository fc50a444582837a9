"""Small configs of ViT."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from isovit.spec.families.vit import ViTConfig
from parity_tests.strategies import MAX_WIDTH, transformer_fields

SMALL: dict[str, Any] = dict(
    image_size=(12, 8), patch_size=(3, 4), embed_dim=21, depth=2, num_heads=3, mlp_dim=17,
    num_classes=5,
)  # fmt: skip

EXAMPLES = {
    "vit_timm": ViTConfig(**SMALL, layer_scale_init=0.1),
    "vit_pytorch": ViTConfig(
        **{**SMALL, "num_classes": 0}, patch_embed="norm_linear_norm", pos_embed_tokens="patches",
        head_dim=5, qkv_bias=False, norm_eps=1e-5, activation="gelu_tanh", pool="none",
    ),
    "vit_without_class_token": ViTConfig(
        **SMALL, class_token=False, attn_proj=False, final_norm="pooled", pool="mean"
    ),
    "vit_distilled": ViTConfig(**SMALL, dist_token=True, dist_head=True),
    "vit_pre_logits": ViTConfig(
        **SMALL, dist_token=True, pool="mean_patches", pre_logits_dim=11
    ),
}  # fmt: skip
"""Every module and option between them."""

RATES = {
    "vit_timm": ["embed_dropout_rate", "dropout_rate", "attn_dropout_rate", "drop_path_rate"],
}
"""The fields that make an example stochastic."""

SHARDED = ViTConfig(
    image_size=(12, 8), patch_size=(3, 4), embed_dim=16, depth=1, num_heads=4, mlp_dim=24,
    num_classes=5,
)  # fmt: skip
"""Of a width, heads and hidden layer that two devices can divide."""


@st.composite
def configs(draw: st.DrawFn) -> ViTConfig:
    """Both dialects and all between: any patch, any grid, one token included."""
    patch_size = draw(st.tuples(st.integers(3, 6), st.integers(2, 6)))  # 6 numbers at least
    rows, columns = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    return ViTConfig(
        patch_size=patch_size,
        image_size=(rows * patch_size[0], columns * patch_size[1]),
        patch_embed=draw(st.sampled_from(["conv", "norm_linear_norm"])),
        pos_embed_tokens=draw(st.sampled_from(["all", "patches"])),
        **draw(_token_and_head_fields()),
    )


@st.composite
def _token_and_head_fields(draw: st.DrawFn) -> dict[str, Any]:
    """The fields of the backbone, with distillation token, second head and hidden layer."""
    fields = draw(transformer_fields())
    if draw(st.sampled_from([False, False, True])):  # by chance all that it needs seldom meets
        needed = {"class_token": True, "pool": "cls", "final_norm": "tokens"}
        classes = draw(st.integers(1, 7))
        return {**fields, **needed, "num_classes": classes, "dist_token": True, "dist_head": True}
    pre_logits_dim = draw(st.none() | st.integers(4, MAX_WIDTH))
    return {
        **fields,
        "dist_token": fields["class_token"] and draw(st.booleans()),
        "pre_logits_dim": None if fields["pool"] == "none" else pre_logits_dim,
    }
