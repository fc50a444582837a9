"""Small configs of NesT."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from isovit.spec.config import Preprocess
from isovit.spec.families.nest import VIT_PYTORCH, NesTConfig
from parity_tests.strategies import EPSILONS, MAX_WIDTH, MIN_WIDTH

SMALL = NesTConfig(
    image_size=(12, 24), patch_size=(3, 4), embed_dims=(9, 14), depths=(2, 1), num_heads=(3, 2),
    mlp_ratio=2, num_classes=5,
)  # fmt: skip

EXAMPLES = {
    "nest_official": SMALL,
    "nest_symmetric": SMALL.replace(
        num_classes=0, pool_padding="both", activation="gelu", qkv_bias=False
    ),
    "nest_pytorch": SMALL.replace(**VIT_PYTORCH, head_dim=4),
    "nest_one_level": SMALL.replace(
        embed_dims=(9,), depths=(1,), num_heads=(3,), pos_embed="block"
    ),
}
"""Every module and option between them."""

RATES = {
    "nest_official": [
        "dropout_rate", "attn_dropout_rate", "head_dropout_rate", "drop_path_rate",
    ],
    "nest_pytorch": ["dropout_rate", "attn_dropout_rate"],
}  # fmt: skip
"""The fields that make an example stochastic."""

SHARDED = NesTConfig(
    image_size=(12, 16), patch_size=(3, 4), embed_dims=(8, 16), depths=(1, 1), num_heads=(2, 4),
    mlp_ratio=2, num_classes=5,
)  # fmt: skip
"""Of widths, heads and hidden layers that two devices can divide."""


@st.composite
def configs(draw: st.DrawFn) -> NesTConfig:
    """Both forms and all between: one to three levels, any block, widths that need not grow.

    Patches and blocks need not be square, and a block may be one token.
    """
    levels = draw(st.integers(1, 3))
    patch_size = draw(st.tuples(st.integers(3, 4), st.integers(2, 4)))  # 6 numbers at least
    block_size = draw(st.tuples(st.integers(1, 2), st.integers(1, 3)))
    height, width = (p * b * 2 ** (levels - 1) for p, b in zip(patch_size, block_size, strict=True))
    in_channels = draw(st.integers(1, 3))
    return NesTConfig(
        image_size=(height, width),
        in_channels=in_channels,
        preprocess=Preprocess(mean=(0.5,) * in_channels, std=(0.5,) * in_channels),
        num_classes=draw(st.integers(0, 7)),
        patch_size=patch_size,
        patch_embed=draw(st.sampled_from(["conv", "norm_linear_norm"])),
        depths=tuple(draw(st.integers(0, 2)) for _ in range(levels)),
        **draw(_widths(levels)),
        mlp_ratio=draw(st.integers(1, 3)),
        qkv_bias=draw(st.booleans()),
        pos_embed=draw(st.sampled_from(["image", "block"])),
        pool_padding=draw(st.sampled_from(["end", "both"])),
        activation=draw(st.sampled_from(["gelu", "gelu_tanh"])),
        norm_eps=draw(EPSILONS),
    )


@st.composite
def _widths(draw: st.DrawFn, levels: int) -> dict[str, Any]:
    """Widths and heads of each level; heads of a width of their own need not fill the level's."""
    head_dim = draw(st.none() | st.integers(1, 8))
    num_heads = tuple(draw(st.integers(1, 3)) for _ in range(levels))
    widths = range(MIN_WIDTH, MAX_WIDTH + 1)
    embed_dims = tuple(
        draw(st.sampled_from([n for n in widths if head_dim or n % heads == 0]))
        for heads in num_heads
    )
    return dict(embed_dims=embed_dims, num_heads=num_heads, head_dim=head_dim)
