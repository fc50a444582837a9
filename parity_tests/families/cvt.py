"""Small configs of CvT."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from isovit.spec.config import Preprocess
from isovit.spec.families.cvt import CvTConfig
from parity_tests.strategies import EPSILONS, MAX_WIDTH, MIN_WIDTH

SMALL: dict[str, Any] = dict(
    image_size=(17, 14), embed_dims=(9, 14), depths=(1, 2), num_heads=(3, 2), mlp_dims=(11, 17),
    patch_sizes=(5, 3), patch_strides=(3, 2), patch_paddings=(1, 1), qkv_kernel_sizes=(3, 3),
    kv_strides=(2, 2), num_classes=5,
)  # fmt: skip

EXAMPLES = {
    "cvt_microsoft": CvTConfig(**SMALL),
    "cvt_pytorch": CvTConfig(
        **{**SMALL, "qkv_kernel_sizes": (5, 3), "kv_strides": (3, 1)}, head_dim=4,
        attn_scale="head", kv_convs="one", qkv_bias=False, activation="gelu", class_token=False,
        final_norm="none", pool="mean",
    ),
    "cvt_tokens": CvTConfig(
        **{**SMALL, "num_classes": 0}, activation="gelu_tanh", qkv_bias=False, pool="none",
        batch_norm_eps=1e-3, batch_norm_momentum=0.3,
    ),
    "cvt_mean": CvTConfig(**SMALL, class_token=False, pool="mean"),
}  # fmt: skip
"""Every module and option between them."""

RATES = {
    "cvt_microsoft": [
        "embed_dropout_rate",
        "dropout_rate",
        "attn_dropout_rate",
        "drop_path_rate",
    ],
}
"""The fields that make an example stochastic."""

SHARDED = CvTConfig(
    image_size=(17, 14), embed_dims=(8, 16), depths=(1, 1), num_heads=(2, 4), mlp_dims=(16, 24),
    patch_sizes=(5, 3), patch_strides=(3, 2), patch_paddings=(1, 1), qkv_kernel_sizes=(3, 3),
    kv_strides=(2, 2), num_classes=5,
)  # fmt: skip
"""Of widths, heads and hidden layers that two devices can divide."""


@st.composite
def configs(draw: st.DrawFn) -> CvTConfig:
    """Both forms and all between: one stage or two, patches that overlap or leave gaps."""
    stages = [draw(_stages()) for _ in range(draw(st.integers(1, 2)))]
    in_channels, pool = draw(st.integers(1, 4)), draw(st.sampled_from(["mean", "cls", "none"]))
    return CvTConfig(
        image_size=draw(_image_sizes(stages)),
        in_channels=in_channels,
        preprocess=Preprocess(mean=(0.5,) * in_channels, std=(0.5,) * in_channels),
        num_classes=0 if pool == "none" else draw(st.integers(0, 7)),
        **{name: tuple(stage[name] for stage in stages) for name in stages[0]},
        head_dim=draw(st.none() | st.integers(2, 6)),
        attn_scale=draw(st.sampled_from(["head", "embed_dims"])),
        kv_convs=draw(st.sampled_from(["one", "two"])),
        qkv_bias=draw(st.booleans()),
        activation=draw(st.sampled_from(["gelu", "gelu_tanh", "quick_gelu"])),
        norm_eps=draw(EPSILONS),
        batch_norm_eps=draw(EPSILONS),
        class_token=pool == "cls" or (pool == "none" and draw(st.booleans())),
        final_norm=draw(st.sampled_from(["none", "tokens"])),
        pool=pool,
    )


@st.composite
def _stages(draw: st.DrawFn) -> dict[str, int]:
    """What a stage has of its own, whatever its input; heads fill its width."""
    num_heads, patch_size = draw(st.integers(1, 3)), draw(st.integers(2, 4))
    dim = draw(st.integers(-(-MIN_WIDTH // num_heads), MAX_WIDTH // num_heads)) * num_heads
    return {
        "embed_dims": dim,
        "depths": draw(st.integers(1, 2)),
        "num_heads": num_heads,
        "mlp_dims": draw(st.integers(4, MAX_WIDTH)),
        "patch_sizes": patch_size,
        "patch_strides": draw(st.integers(1, 3)),
        "patch_paddings": draw(st.integers(0, patch_size - 1)),
        "qkv_kernel_sizes": draw(st.sampled_from([3, 1, 5])),
        "kv_strides": draw(st.integers(1, 3)),
    }


@st.composite
def _image_sizes(draw: st.DrawFn, stages: list[dict[str, int]]) -> tuple[int, int]:
    """Sizes that leave every stage two keys at least.

    A softmax over one key is 1 whatever q and k are: the gradients of both are then zero but for
    rounding.
    """
    rows, columns = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))  # of the last grid
    for stage in reversed(stages):
        columns = max(columns, stage["kv_strides"] + 1)
        beside = stage["patch_sizes"] - 2 * stage["patch_paddings"]
        rows = max((rows - 1) * stage["patch_strides"] + beside, 1)
        columns = max((columns - 1) * stage["patch_strides"] + beside, 1)
    return rows, columns
