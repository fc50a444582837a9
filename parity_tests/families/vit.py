"""Small configs of ViT."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from isovit.spec.families.vit import ViTConfig
from parity_tests.strategies import MAX_WIDTH, transformer_fields


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
