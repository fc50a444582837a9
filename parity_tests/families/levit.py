"""Small configs of LeViT.

No attention has a grid of a single token: the softmax over one key is 1 whatever the scores, so
that biases and queries have gradients of exactly zero, which have no relative error.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from isovit.spec.config import Preprocess
from isovit.spec.families.levit import VIT_PYTORCH, LeViTConfig
from parity_tests.strategies import EPSILONS, MAX_WIDTH, MIN_WIDTH

SMALL: dict[str, Any] = dict(
    image_size=(20, 11), stem_dims=(6,), embed_dims=(10, 7), depths=(1, 1), num_heads=(2, 3),
    key_dim=4, value_dim=5, down_heads=(3,), down_value_dim=6, down_mlp_ratio=1, num_classes=5,
)  # fmt: skip

EXAMPLES = {
    "levit": LeViTConfig(**SMALL),
    "levit_pytorch": LeViTConfig(**{**SMALL, **VIT_PYTORCH, "stem_dims": (6,)}, dist_head=False),
    "levit_fused": LeViTConfig(**SMALL, fused=True),
    "levit_features": LeViTConfig(
        **{**SMALL, "num_classes": 0, "depths": (0, 1)}, dist_head=False, mlp_norm=False
    ),
}  # fmt: skip
"""Every module and option between them."""

RATES = {
    "levit_fused": ["dropout_rate", "attn_dropout_rate", "drop_path_rate"],
}
"""The fields that make an example stochastic; without BatchNorm, as training moves statistics."""

SHARDED = LeViTConfig(
    image_size=(20, 11), stem_dims=(6,), embed_dims=(8, 12), depths=(1, 1), num_heads=(2, 4),
    key_dim=4, value_dim=6, down_heads=(2,), down_value_dim=6, num_classes=5, fused=True,
)  # fmt: skip
"""Of widths, heads and hidden layers that two devices can divide; its products have no norm."""


HEAD_DIMS = st.integers(3, 6)
"""The gradients of queries and biases are sums of differences between tokens: where a head has one
number of each, nothing but rounding may be left of them."""


@st.composite
def configs(draw: st.DrawFn) -> LeViTConfig:
    """Both forms and all between, fused or not, with one stage or two on any grid.

    The last stage has three tokens at least. Of fewer, and where attention has shrunk them twice,
    tokens may come to be so alike that the gradients of queries and biases are lost in rounding.
    """
    in_channels, num_classes = draw(st.integers(1, 4)), draw(st.integers(0, 7))
    stages = draw(st.integers(1, 2))
    stem_dims = draw(st.lists(st.integers(3, 9), max_size=2))
    unit = 2 ** (len(stem_dims) + stages)
    height, width = draw(st.integers(1, 12)), draw(st.integers(2 * unit + 1, 3 * unit))
    per_stage = st.integers(MIN_WIDTH, MAX_WIDTH // 2), st.integers(0, 1), st.integers(1, 3)
    embed_dims, depths, num_heads = (
        draw(st.lists(items, min_size=stages, max_size=stages)) for items in per_stage
    )
    return LeViTConfig(
        image_size=draw(st.permutations([height, width])),
        in_channels=in_channels,
        num_classes=num_classes,
        preprocess=Preprocess(mean=(0.5,) * in_channels, std=(0.5,) * in_channels),
        stem=draw(st.sampled_from(["conv_norm", "conv"])),
        stem_dims=tuple(stem_dims),
        embed_dims=tuple(embed_dims),
        depths=tuple(depths),
        num_heads=tuple(num_heads),
        key_dim=draw(HEAD_DIMS),
        value_dim=draw(HEAD_DIMS),
        down_heads=tuple(draw(st.integers(1, 3)) for _ in range(stages - 1)),
        down_value_dim=draw(HEAD_DIMS),
        mlp_ratio=draw(st.integers(1, 3)),
        down_mlp_ratio=draw(st.integers(1, 3)),
        attn_activation=draw(st.sampled_from(["hardswish", "gelu"])),
        batch_norm_eps=draw(EPSILONS),
        dist_head=num_classes > 0 and draw(st.booleans()),
        **{name: draw(st.booleans()) for name in FLAGS},
    )


FLAGS = ("attn_bias_over_scale", "attn_proj_bias", "mlp_norm", "head_norm", "fused")
