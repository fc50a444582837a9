"""Small configs of TokenLearner."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from isovit.spec.config import Preprocess
from isovit.spec.families.token_learner import TokenLearnerConfig
from parity_tests.strategies import EPSILONS, MAX_WIDTH, MIN_WIDTH

SMALL = TokenLearnerConfig(
    image_size=(12, 16), patch_size=(3, 4), embed_dim=15, depth=2, num_heads=3, mlp_dim=17,
    learner_loc=1, learned_tokens=4, bottleneck_dim=7, num_classes=5,
)  # fmt: skip

EXAMPLES = {
    "token_learner_v11": SMALL,
    "token_learner_v1": SMALL.replace(learner="conv", num_classes=0),
    "token_learner_fuser": SMALL.replace(fuser=True, depth=3, activation="gelu"),
    "token_learner_fuser_v1": SMALL.replace(fuser=True, learner="conv", learned_tokens=5),
    "token_learner_keras": SMALL.replace(
        learner="conv", learner_pool="mean", learner_loc=2, head_dim=6, mlp_output_activation=True
    ),
    "token_learner_none": SMALL.replace(learner="none"),
}
"""Every module and option between them."""

RATES = {
    "token_learner_v11": [
        "embed_dropout_rate", "proj_dropout_rate", "dropout_rate", "attn_dropout_rate",
    ],
    "token_learner_fuser": ["dropout_rate"],
    "token_learner_keras": ["proj_dropout_rate", "dropout_rate"],
}  # fmt: skip
"""The fields that make an example stochastic."""

SHARDED = TokenLearnerConfig(
    image_size=(12, 16), patch_size=(3, 4), embed_dim=16, depth=2, num_heads=4, mlp_dim=24,
    learner_loc=1, learned_tokens=4, bottleneck_dim=8, fuser=True, num_classes=5,
)  # fmt: skip
"""Of widths, heads, tokens and hidden layers that two devices can divide."""


@st.composite
def configs(draw: st.DrawFn) -> TokenLearnerConfig:
    """All forms and all between: any grid of two places or more, the learner before any block.

    Of one place a learned token is a multiple, which the norm behind the last block takes away.
    """
    patch_size = draw(st.tuples(st.integers(3, 5), st.integers(2, 5)))  # 6 numbers at least
    rows, columns = draw(st.tuples(st.integers(1, 4), st.integers(2, 4)))
    in_channels, depth = draw(st.integers(1, 3)), draw(st.integers(0, 3))
    return TokenLearnerConfig(
        image_size=(rows * patch_size[0], columns * patch_size[1]),
        patch_size=patch_size,
        in_channels=in_channels,
        preprocess=Preprocess(mean=(0.5,) * in_channels, std=(0.5,) * in_channels),
        num_classes=draw(st.integers(0, 7)),
        depth=depth,
        **draw(_widths()),
        mlp_dim=draw(st.integers(4, MAX_WIDTH)),
        mlp_output_activation=draw(st.booleans()),
        activation=draw(st.sampled_from(["gelu_tanh", "gelu"])),
        norm_eps=draw(EPSILONS),
        **draw(_learner_fields(depth)),
    )


@st.composite
def _widths(draw: st.DrawFn) -> dict[str, Any]:
    """Width and heads; heads of a width of their own need not fill it."""
    num_heads, head_dim = draw(st.integers(1, 3)), draw(st.none() | st.integers(1, 8))
    widths = range(MIN_WIDTH, MAX_WIDTH + 1)
    dim = draw(st.sampled_from([n for n in widths if head_dim or n % num_heads == 0]))
    return dict(num_heads=num_heads, head_dim=head_dim, embed_dim=dim)


@st.composite
def _learner_fields(draw: st.DrawFn, depth: int) -> dict[str, Any]:
    """Which learner, where, and whether a fuser follows.

    A fuser normalises a mixture of one token, whatever the factor: its gradient is rounding.
    """
    learner, loc = draw(st.sampled_from(["none", "conv", "mlp"])), draw(st.integers(0, depth))
    fuser = learner != "none" and loc < depth and draw(st.booleans())
    return dict(
        learner=learner,
        learner_loc=loc,
        learned_tokens=draw(st.integers(2 if fuser else 1, 5)),
        learner_pool=draw(st.sampled_from(["sum", *["mean"] * (learner == "conv")])),
        bottleneck_dim=draw(st.integers(4, MAX_WIDTH)),
        fuser=fuser,
    )
