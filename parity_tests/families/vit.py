"""Small configs of ViT."""

from __future__ import annotations

from hypothesis import strategies as st

from isovit.spec.families.vit import ViTConfig
from parity_tests.strategies import transformer_fields


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
        **draw(transformer_fields()),
    )
