"""Small configs of CaiT."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from isovit.spec.config import Preprocess
from isovit.spec.families.cait import CaiTConfig
from parity_tests.strategies import EPSILONS, MAX_WIDTH, MIN_WIDTH

SMALL: dict[str, Any] = dict(
    image_size=(12, 8), patch_size=(3, 4), embed_dim=21, depth=2, cls_depth=2, num_heads=3,
    mlp_dim=17, num_classes=5,
)  # fmt: skip

EXAMPLES = {
    "cait_official": CaiTConfig(**SMALL),
    "cait_pytorch": CaiTConfig(
        **SMALL, patch_embed="norm_linear_norm", head_dim=5, qkv_bias=False,
        talking_heads_bias=False, cls_talking_heads=True, cls_norm="cls", norm_eps=1e-5,
        layer_scale_init=None, mixed_dropout=False,
    ),
    "cait_mean": CaiTConfig(
        **SMALL, cls_talking_heads=True, cls_mlp_dim=11, activation="gelu_tanh", pool="mean"
    ),
    "cait_tokens": CaiTConfig(**{**SMALL, "num_classes": 0}, cls_norm="cls", pool="none"),
}  # fmt: skip
"""Every module and option between them."""

RATES = {
    "cait_official": [
        "embed_dropout_rate", "dropout_rate", "attn_dropout_rate", "cls_dropout_rate",
        "cls_attn_dropout_rate", "drop_path_rate",
    ],
    "cait_pytorch": ["attn_dropout_rate", "cls_attn_dropout_rate"],
}  # fmt: skip
"""The fields that make an example stochastic."""

SHARDED = CaiTConfig(
    image_size=(12, 8), patch_size=(3, 4), embed_dim=16, depth=1, cls_depth=1, num_heads=4,
    mlp_dim=24, num_classes=5,
)  # fmt: skip
"""Of a width, heads and hidden layer that two devices can divide."""


@st.composite
def configs(draw: st.DrawFn) -> CaiTConfig:
    """Both forms and all between.

    There are two patches at least: the softmax over one is constant, and no gradient reaches what
    is before it. Where the mean is over the patches alone there are no class blocks, of which it
    would see nothing.
    """
    patch_size = draw(st.tuples(st.integers(3, 6), st.integers(2, 6)))  # 6 numbers at least
    rows, columns = draw(st.tuples(st.integers(1, 4), st.integers(2, 4)))
    in_channels = draw(st.integers(1, 4))
    pool = draw(st.sampled_from(["cls", "mean", "mean_patches", "none"]))
    return CaiTConfig(
        image_size=(rows * patch_size[0], columns * patch_size[1]),
        in_channels=in_channels,
        preprocess=Preprocess(mean=(0.5,) * in_channels, std=(0.5,) * in_channels),
        num_classes=0 if pool == "none" else draw(st.integers(0, 7)),
        patch_size=patch_size,
        patch_embed=draw(st.sampled_from(["conv", "norm_linear_norm"])),
        depth=draw(st.integers(0, 2)),
        cls_depth=0 if pool == "mean_patches" else draw(st.integers(int(pool == "cls"), 2)),
        **draw(_attention_fields()),
        mlp_dim=draw(st.integers(4, MAX_WIDTH)),
        cls_mlp_dim=draw(st.none() | st.integers(4, MAX_WIDTH)),
        activation=draw(st.sampled_from(["gelu", "gelu_tanh"])),
        norm_eps=draw(EPSILONS),
        pool=pool,
    )


@st.composite
def _attention_fields(draw: st.DrawFn) -> dict[str, Any]:
    """Width and heads, and how they talk."""
    num_heads = draw(st.integers(1, 3))
    head_dim = draw(st.none() | st.integers(1, 8))
    step = num_heads if head_dim is None else 1
    return {
        "num_heads": num_heads,
        "head_dim": head_dim,
        "embed_dim": step * draw(st.integers(-(-MIN_WIDTH // step), MAX_WIDTH // step)),
        "qkv_bias": draw(st.booleans()),
        "talking_heads_bias": draw(st.booleans()),
        "cls_talking_heads": draw(st.booleans()),
        "cls_norm": draw(st.sampled_from(["tokens", "cls"])),
    }
