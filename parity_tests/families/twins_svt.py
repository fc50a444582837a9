"""Small configs of Twins-SVT."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from isovit.spec.config import Preprocess
from isovit.spec.families.twins_svt import TwinsSVTConfig
from parity_tests.strategies import EPSILONS, MAX_WIDTH, MIN_WIDTH

SMALL: dict[str, Any] = dict(
    image_size=(24, 20), embed_dims=(9, 14), depths=(3, 2), num_heads=(3, 2), mlp_dims=(11, 17),
    patch_sizes=(2, 2), window_sizes=(5, 2), reductions=(3, 1), peg_after=(1, 1), num_classes=5,
)  # fmt: skip

EXAMPLES = {
    "twins_svt_timm": TwinsSVTConfig(**SMALL),
    "twins_svt_pytorch": TwinsSVTConfig(
        **{**SMALL, "window_sizes": (5, 0), "peg_after": (2, 1)}, patch_embed="norm_linear_norm",
        reduce="conv", head_dim=4, qkv_bias=False, peg_kernel_size=5, norm_eps=1e-5,
        final_norm="none",
    ),
    "twins_svt_one_key": TwinsSVTConfig(
        **{**SMALL, "window_sizes": (5, 0), "reductions": (3, 5)}, final_norm="none",
    ),
    "twins_svt_tokens": TwinsSVTConfig(
        **{**SMALL, "num_classes": 0, "window_sizes": (0, 3), "depths": (1, 1)}, pool="none",
        activation="gelu_tanh",
    ),
}  # fmt: skip
"""Every module and option between them; windows that tile the grid and windows that do not."""

RATES = {
    "twins_svt_timm": [
        "embed_dropout_rate",
        "dropout_rate",
        "local_attn_dropout_rate",
        "global_attn_dropout_rate",
        "head_dropout_rate",
        "drop_path_rate",
    ],
}
"""The fields that make an example stochastic."""

SHARDED = TwinsSVTConfig(
    image_size=(24, 20), embed_dims=(8, 16), depths=(2, 2), num_heads=(2, 4), mlp_dims=(16, 24),
    patch_sizes=(2, 2), window_sizes=(5, 2), reductions=(3, 1), peg_after=(1, 1), num_classes=5,
)  # fmt: skip
"""Of widths, heads and hidden layers that two devices can divide."""


@st.composite
def configs(draw: st.DrawFn) -> TwinsSVTConfig:
    """Both forms and all between: one stage or two, any windows, squares that need not tile.

    Windows of two tokens a side at least: a softmax over one key is 1 whatever q and k are.
    """
    stages = [draw(_stages()) for _ in range(draw(st.integers(1, 2)))]
    height, width = draw(st.tuples(st.integers(2, 5), st.integers(3, 6)))  # of the last grid
    patch_sizes = [draw(st.integers(2, 3)), draw(st.integers(1, 2))][: len(stages)]
    reductions: list[int] = []
    for patch_size in reversed(patch_sizes):
        reductions.insert(0, draw(_reductions((height, width))))
        height, width = height * patch_size, width * patch_size
    in_channels, pool = draw(st.integers(2, 4)), draw(st.sampled_from(["mean", "none"]))
    head_dim = draw(st.none() | st.integers(2, 6))
    return TwinsSVTConfig(
        image_size=(height, width),
        in_channels=in_channels,
        preprocess=Preprocess(mean=(0.5,) * in_channels, std=(0.5,) * in_channels),
        num_classes=draw(st.integers(0, 7)) if pool == "mean" else 0,
        **{name: tuple(stage[name] for stage in stages) for name in stages[0]},
        head_dim=head_dim,
        patch_sizes=tuple(patch_sizes),
        patch_embed=draw(st.sampled_from(["conv_norm", "norm_linear_norm"])),
        reductions=tuple(reductions),
        reduce=draw(st.sampled_from(["conv_norm_linear", "conv"])),
        qkv_bias=draw(st.booleans()),
        peg_kernel_size=draw(st.sampled_from([3, 1, 5])),
        activation=draw(st.sampled_from(["gelu", "gelu_tanh"])),
        norm_eps=draw(EPSILONS),
        embed_norm_eps=draw(EPSILONS),
        reduce_norm_eps=draw(EPSILONS),
        final_norm=draw(st.sampled_from(["none", "tokens"])),
        pool=pool,
    )


@st.composite
def _stages(draw: st.DrawFn) -> dict[str, int]:
    """What a stage has of its own, whatever its grid; heads fill its width."""
    num_heads, depth = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    dim = draw(st.integers(-(-MIN_WIDTH // num_heads), MAX_WIDTH // num_heads)) * num_heads
    return {
        "embed_dims": dim,
        "depths": depth,
        "num_heads": num_heads,
        "mlp_dims": draw(st.integers(4, MAX_WIDTH)),
        "window_sizes": draw(st.sampled_from([0, 2, 3, 5])),
        "peg_after": draw(st.integers(1, depth)),
    }


def _reductions(grid: tuple[int, int]) -> st.SearchStrategy[int]:
    """Sides of a square that fits a grid; one that is alone there is one key."""
    return st.integers(1, min(grid))
