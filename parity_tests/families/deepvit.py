"""Small configs of DeepViT.

LayerNorm over the heads wants as many heads as any other LayerNorm wants numbers: over one or two
its output hardly depends on what comes in.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from isovit.spec.families.deepvit import DeepViTConfig
from parity_tests.strategies import EPSILONS, MAX_WIDTH, MIN_WIDTH, transformer_fields

SMALL: dict[str, Any] = dict(
    image_size=(12, 8), patch_size=(6, 4), embed_dim=21, depth=2, num_heads=3, mlp_dim=17,
    num_classes=5,
)  # fmt: skip

EXAMPLES = {
    "deepvit_batch_norm": DeepViTConfig(**SMALL, layer_scale_init=0.1, batch_norm_eps=1e-3),
    "deepvit_convs": DeepViTConfig(
        **SMALL, patch_embed="convs", stem_dim=7, re_attention_depth=1, re_attention_scale=0.4,
        branch_scale=0.5, batch_norm_momentum=0.2,
    ),
    "deepvit_layer_norm": DeepViTConfig(
        **{**SMALL, "num_heads": 7}, patch_embed="norm_linear_norm", head_dim=5, qkv_bias=False,
        norm_eps=1e-5, re_attention_bias=False, re_attention_norm="layer_norm",
        final_norm="pooled", pool="mean",
    ),
    "deepvit_without_projection": DeepViTConfig(
        **{**SMALL, "num_classes": 0, "num_heads": 7}, re_attention_norm="layer_norm",
        attn_proj=False, class_token=False, final_norm="none", pool="none",
    ),
}  # fmt: skip
"""Every module and option between them."""

RATES = {
    "deepvit_batch_norm": ["dropout_rate", "attn_dropout_rate"],
    "deepvit_convs": ["embed_dropout_rate"],
    "deepvit_layer_norm": ["dropout_rate", "attn_dropout_rate", "drop_path_rate"],
}
"""The fields that make an example stochastic."""

SHARDED = DeepViTConfig(
    image_size=(12, 8), patch_size=(6, 4), embed_dim=16, depth=1, num_heads=4, mlp_dim=24,
    num_classes=5, re_attention_bias=False,
)  # fmt: skip
"""Of a width, heads and hidden layer that two devices can divide.

In training a bias before a BatchNorm has no gradient but rounding.
"""


@st.composite
def configs(draw: st.DrawFn) -> DeepViTConfig:
    """Both forms and all between: any patch, any grid, one token included."""
    patch_embed = draw(st.sampled_from(["conv", "norm_linear_norm", "convs"]))
    sides = st.sampled_from([4, 6] if patch_embed == "convs" else [3, 4, 5, 6])
    patch_size = draw(st.tuples(sides, sides))
    rows, columns = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    norm = draw(st.sampled_from(["batch_norm", "layer_norm"]))
    fields = draw(transformer_fields())
    return DeepViTConfig(
        patch_size=patch_size,
        image_size=(rows * patch_size[0], columns * patch_size[1]),
        patch_embed=patch_embed,
        stem_dim=draw(st.integers(4, 9)),
        re_attention_depth=draw(st.none() | st.integers(0, 1)),
        re_attention_bias=draw(st.booleans()),
        re_attention_norm=norm,
        re_attention_scale=draw(st.sampled_from([1.0, 0.4])),
        branch_scale=draw(st.sampled_from([1.0, 0.5])),
        batch_norm_eps=draw(EPSILONS),
        **fields | (draw(_many_heads()) if norm == "layer_norm" else {}),
    )


@st.composite
def _many_heads(draw: st.DrawFn) -> dict[str, Any]:
    """Heads over which there can be a LayerNorm, narrow ones."""
    num_heads = draw(st.integers(MIN_WIDTH, MIN_WIDTH + 2))
    head_dim = draw(st.integers(1, 3))
    fills = draw(st.booleans())
    return {
        "num_heads": num_heads,
        "head_dim": head_dim,
        "embed_dim": num_heads * head_dim if fills else draw(st.integers(MIN_WIDTH, MAX_WIDTH)),
        "attn_proj": not fills or draw(st.booleans()),
    }
