"""Small configs of T2T-ViT."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from isovit.spec.families.t2t_vit import SoftSplit, T2TViTConfig
from parity_tests.strategies import MAX_WIDTH, MIN_WIDTH, transformer_fields

MAX_IMAGE = 20

SMALL: dict[str, Any] = dict(
    image_size=(15, 18), t2t_layers=(SoftSplit(5, 3, 2), SoftSplit(3, 2, 1), SoftSplit(3, 1, 0)),
    token_dim=10, token_mlp_dim=13, performer_features=4, embed_dim=15, depth=1, num_heads=3,
    mlp_dim=22, num_classes=5,
)  # fmt: skip

EXAMPLES = {
    "t2t_performer": T2TViTConfig(**SMALL, token_mixer="performer"),
    "t2t_transformer": T2TViTConfig(
        **SMALL, token_mixer="transformer", pos_embed="learned", pool="mean_patches"
    ),
    "t2t_full": T2TViTConfig(
        **{**SMALL, "t2t_layers": (SoftSplit(3, 2, 1), SoftSplit(3, 2, 1), SoftSplit(2, 1, 0))},
        token_mixer="full", pos_embed="learned", final_norm="none",
    ),
}  # fmt: skip
"""Every module and option between them."""

RATES = {
    "t2t_performer": ["token_dropout_rate", "embed_dropout_rate"],
    "t2t_transformer": ["token_dropout_rate"],
    "t2t_full": ["token_dropout_rate"],
}
"""The fields that make an example stochastic."""

SHARDED = T2TViTConfig(
    image_size=(15, 18), t2t_layers=(SoftSplit(5, 3, 2), SoftSplit(3, 2, 1)), token_dim=10,
    token_mlp_dim=13, performer_features=4, embed_dim=16, depth=1, num_heads=4, mlp_dim=24,
    num_classes=5,
)  # fmt: skip
"""Of a width, heads and hidden layer that two devices can divide."""


@st.composite
def configs(draw: st.DrawFn) -> T2TViTConfig:
    """Each mixer, each soft split with a geometry of its own, grids down to one token."""
    token_mixer = draw(st.sampled_from(["transformer", "performer", "full"]))
    image_size = draw(st.tuples(st.integers(3, MAX_IMAGE), st.integers(3, MAX_IMAGE)))
    token_dim = draw(st.integers(MIN_WIDTH, MAX_WIDTH))
    return T2TViTConfig(
        image_size=image_size,
        # The width of a full mixer grows with the square of every kernel before it.
        t2t_layers=draw(_soft_splits(image_size, max_kernel=3 if token_mixer == "full" else 5)),
        token_mixer=token_mixer,
        token_dim=token_dim,
        token_mlp_dim=draw(st.integers(4, MAX_WIDTH)),
        token_scale=draw(st.sampled_from(["input_dim", "token_dim"])),
        performer_features=draw(st.integers(2, token_dim)),
        performer_upcast=draw(st.booleans()),
        pos_embed=draw(st.sampled_from(["sinusoidal", "learned"])),
        **draw(transformer_fields()),
    )


@st.composite
def _soft_splits(
    draw: st.DrawFn, image_size: tuple[int, int], max_kernel: int
) -> tuple[SoftSplit, ...]:
    """One to three soft splits, each of which fits the grid that the one before leaves.

    The first starts at a kernel of 3: its patches have nine numbers or more.
    """
    splits: list[SoftSplit] = []
    size = min(image_size)
    for i in range(draw(st.integers(1, 3))):
        kernel, padding = draw(
            st.sampled_from(
                [
                    (kernel, padding)
                    for kernel in range(2 if i else 3, max_kernel + 1)
                    for padding in range((kernel + 1) // 2)
                    if size + 2 * padding >= kernel
                ]
            )
        )
        splits.append(SoftSplit(kernel, draw(st.integers(1, kernel)), padding))
        size = splits[-1].output(size)
    return tuple(splits)
