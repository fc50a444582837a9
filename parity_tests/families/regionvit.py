"""Small configs of RegionViT."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import strategies as st

from isovit.spec.config import Preprocess
from isovit.spec.families.regionvit import RegionViTConfig
from parity_tests.strategies import EPSILONS, MAX_WIDTH, MIN_WIDTH

SMALL: dict[str, Any] = dict(
    image_size=(12, 24), patch_size=2, window_size=3, stem_dims=(), embed_dims=(9, 18),
    depths=(2, 1), num_heads=(3, 2), mlp_dims=(11, 17), num_classes=5,
)  # fmt: skip
STEM: dict[str, Any] = dict(image_size=(16, 32), patch_size=4, window_size=2, stem_dims=(6, 7))

EXAMPLES = {
    "regionvit_official": RegionViTConfig(**{**SMALL, **STEM}, peg="both"),
    "regionvit_pytorch": RegionViTConfig(
        **{**SMALL, "image_size": (6, 24), "depths": (1, 2)}, head_dim=4, qkv_bias=False,
        region_norm=False, rel_pos="stage", downsample="conv", peg="local", norm_eps=1e-5,
        final_norm="pooled",
    ),
    "regionvit_features": RegionViTConfig(
        **{**SMALL, "num_classes": 0}, attn_scale=0.3, rel_pos="stage", activation="gelu_tanh"
    ),
}  # fmt: skip
"""Every module and option between them; windows that are as large as they can be, and smaller."""

RATES = {
    "regionvit_official": [
        "embed_dropout_rate",
        "attn_dropout_rate",
        "proj_dropout_rate",
        "hidden_dropout_rate",
        "mlp_dropout_rate",
        "drop_path_rate",
    ],
}
"""The fields that make an example stochastic."""

SHARDED = RegionViTConfig(
    image_size=(12, 24), patch_size=2, window_size=3, stem_dims=(), embed_dims=(8, 16),
    depths=(2, 1), num_heads=(2, 4), mlp_dims=(16, 24), num_classes=5,
)  # fmt: skip
"""Of widths, heads and hidden layers that two devices can divide."""


LEAST = MIN_WIDTH + 2
"""Of one region, LayerNorm of a single vector decides over the whole output."""
widths = st.integers(LEAST, MAX_WIDTH)


@st.composite
def configs(draw: st.DrawFn) -> RegionViTConfig:
    """Both forms and all between: one stage to three, a power of two of regions along each side.

    Other numbers of regions leave the second stage windows that are not alike.
    """
    stages = draw(st.integers(1, 3))
    stem = draw(st.just(()) | st.tuples(widths, widths))
    patch_size = 4 if stem else draw(st.integers(2, 3))
    window_size = draw(st.integers(1, 3))
    regions = draw(st.tuples(*2 * [st.sampled_from([1, 2, 4][: 4 - stages])]))
    downsample = draw(st.sampled_from(["conv", "norm_conv"]))
    in_channels = draw(st.integers(1, 4))
    return RegionViTConfig(
        image_size=tuple(n * patch_size * window_size for n in regions),
        in_channels=in_channels,
        preprocess=Preprocess(mean=(0.5,) * in_channels, std=(0.5,) * in_channels),
        num_classes=draw(st.integers(0, 7)),
        patch_size=patch_size,
        window_size=window_size,
        stem_dims=stem,
        **draw(_widths(stages, grouped=downsample == "norm_conv")),
        depths=tuple(draw(st.integers(1, 2)) for _ in range(stages)),
        qkv_bias=draw(st.booleans()),
        attn_scale=draw(st.sampled_from([None, 0.3])),
        region_norm=draw(st.booleans()),
        rel_pos=draw(st.sampled_from(["stage", "block"])),
        mlp_dims=tuple(draw(widths) for _ in range(stages)),
        downsample=downsample,
        peg=draw(st.sampled_from(["none", "local", "both"])),
        activation=draw(st.sampled_from(["gelu", "gelu_tanh"])),
        norm_eps=draw(EPSILONS),
        embed_norm_eps=draw(EPSILONS),
        final_norm=draw(st.sampled_from(["tokens", "pooled"])),
    )


@st.composite
def _widths(draw: st.DrawFn, stages: int, *, grouped: bool) -> dict[str, Any]:
    """Widths and heads of each stage; a grouped convolution leaves a multiple of what comes in."""
    head_dim = draw(st.none() | st.integers(2, 6))
    num_heads = tuple(draw(st.integers(1, 3)) for _ in range(stages))
    embed_dims: list[int] = []
    for heads in num_heads:
        unit = 1 if head_dim else heads
        unit = math.lcm(unit, embed_dims[-1]) if grouped and embed_dims else unit
        least, most = -(-LEAST // unit), max(MAX_WIDTH // unit, 1)
        embed_dims.append(unit * draw(st.integers(least, most)))
    return dict(embed_dims=tuple(embed_dims), num_heads=num_heads, head_dim=head_dim)
