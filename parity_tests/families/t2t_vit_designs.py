"""Small configs of T2T-ViT with designs of convolutional networks."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import strategies as st

from isovit.spec.families.t2t_vit import SoftSplit
from isovit.spec.families.t2t_vit_designs import T2TViTDesignsConfig
from parity_tests.families import t2t_vit
from parity_tests.strategies import MAX_WIDTH, MIN_WIDTH

SMALL: dict[str, Any] = dict(
    image_size=(15, 18), t2t_layers=(SoftSplit(5, 3, 2), SoftSplit(3, 2, 1)), token_dim=10,
    token_mlp_dim=13, performer_features=4, depth=1, num_heads=3, num_classes=5,
)  # fmt: skip

EXAMPLES = {
    "t2t_se": T2TViTDesignsConfig(**SMALL, design="se", embed_dim=15, mlp_dim=22, se_dim=7),
    # Of three heads the one in the middle is half made, half copied.
    "t2t_ghost": T2TViTDesignsConfig(**SMALL, design="ghost", embed_dim=18, mlp_dim=54),
    "t2t_dense": T2TViTDesignsConfig(
        **{**SMALL, "depth": 3}, design="dense", embed_dim=12, mlp_dim=20, dense_depths=(2, 1),
        dense_growth=9, dense_drop_path_steps=1, qkv_bias=False, final_norm="pooled",
    ),
    "t2t_ghost_alone": T2TViTDesignsConfig(
        **{**SMALL, "num_classes": 0}, design="ghost", embed_dim=15, head_dim=4, mlp_dim=15,
        token_mixer="transformer", layer_scale_init=0.1, pool="none",
    ),
}  # fmt: skip
"""Every module and option between them."""

RATES = {
    "t2t_se": ["token_dropout_rate", "embed_dropout_rate", "dropout_rate", "attn_dropout_rate"],
    "t2t_ghost": ["dropout_rate", "attn_dropout_rate"],
    "t2t_dense": ["drop_path_rate"],
}
"""The fields that make an example stochastic."""

SHARDED = T2TViTDesignsConfig(
    image_size=(15, 18), t2t_layers=(SoftSplit(5, 3, 2), SoftSplit(3, 2, 1)), token_dim=10,
    token_mlp_dim=13, performer_features=4, embed_dim=16, depth=1, num_heads=4, mlp_dim=48,
    num_classes=5, design="ghost",
)  # fmt: skip
"""Of a width, heads and hidden layer that two devices can divide."""


@st.composite
def configs(draw: st.DrawFn) -> T2TViTDesignsConfig:
    """Every config of T2T-ViT with each design, brought to widths that it can have."""
    design = draw(st.sampled_from(["se", "ghost", "dense"]))
    fields = msgspec.structs.asdict(draw(t2t_vit.configs()))
    change = {"se": _se, "ghost": _ghost, "dense": _dense}[design]
    return T2TViTDesignsConfig(**fields | draw(change(fields)), design=design)


@st.composite
def _se(draw: st.DrawFn, _: dict[str, Any]) -> dict[str, Any]:
    return dict(se_dim=draw(st.integers(1, MAX_WIDTH)))


@st.composite
def _ghost(draw: st.DrawFn, fields: dict[str, Any]) -> dict[str, Any]:
    """Heads of an even number of channels in all, and a hidden layer with up to two copies."""
    dim, head_dim = fields["embed_dim"], fields["head_dim"]
    if head_dim is None:
        dim *= 1 + dim % 2
    else:
        head_dim *= 1 + fields["num_heads"] * head_dim % 2
    return dict(embed_dim=dim, head_dim=head_dim, mlp_dim=draw(st.integers(1, 3)) * dim)


@st.composite
def _dense(draw: st.DrawFn, fields: dict[str, Any]) -> dict[str, Any]:
    """Up to three stages; where heads fill the width, they fill it in every block."""
    depths = draw(st.sampled_from([(), (1,), (2,), (1, 1), (2, 1), (1, 1, 1)]))
    halvings = max(len(depths) - 1, 0)
    unit = 1 if fields["head_dim"] else fields["num_heads"] * 2**halvings
    least = -(-MIN_WIDTH // unit)
    return dict(
        depth=sum(depths),
        dense_depths=depths,
        embed_dim=unit * draw(st.integers(least, max(least, MAX_WIDTH // unit))),
        dense_growth=unit * draw(st.integers(least, max(least, MAX_WIDTH // unit))),
    )
