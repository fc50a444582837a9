"""Small configs of CrossViT."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from isovit.spec.config import Preprocess
from isovit.spec.families.crossvit import STEMS, CrossViTConfig
from parity_tests.strategies import EPSILONS, MAX_WIDTH, MIN_WIDTH

SMALL: dict[str, Any] = dict(
    image_size=(12, 18), image_scale=(1.0, 2 / 3), patch_size=(6, 4), depth=1, branch_depth=(1, 2),
    embed_dim=(9, 14), num_heads=(3, 2), mlp_dim=(11, 16), num_classes=5,
)  # fmt: skip

DAGGER: dict[str, Any] = dict(
    image_size=(24, 36), image_scale=(1.0, 4 / 3), patch_size=(12, 16), patch_embed="conv_stem"
)

EXAMPLES = {
    "crossvit": CrossViTConfig(**{**SMALL, "depth": 2}),
    "crossvit_dagger": CrossViTConfig(
        **{**SMALL, **DAGGER, "num_classes": 0}, qkv_bias=False, pool="mean_patches"
    ),
    "crossvit_pytorch": CrossViTConfig(
        **{**SMALL, "image_scale": (1.0, 1.0), "patch_size": (3, 6)},
        patch_embed="norm_linear_norm", head_dim=(4, 5), qkv_bias=False, stage_norm=True,
        fusion="residual", cross_depth=2, cross_num_heads=2, cross_head_dim=3, norm_eps=1e-5,
        logits="sum",
    ),
    "crossvit_cropped": CrossViTConfig(
        **{**SMALL, "image_size": (15, 20), "image_scale": (1.0, 0.6), "patch_size": (5, 3)},
        scaling="crop", activation="gelu_tanh",
    ),
    "crossvit_of_one_width": CrossViTConfig(
        **{**SMALL, "embed_dim": (12, 12), "branch_depth": (0, 1)}, fusion="residual"
    ),
}  # fmt: skip
"""Every module and option between them."""

RATES = {
    "crossvit": [
        "embed_dropout_rate", "dropout_rate", "attn_dropout_rate", "head_dropout_rate",
        "drop_path_rate",
    ],
    "crossvit_pytorch": ["dropout_rate", "attn_dropout_rate", "drop_path_rate"],
}  # fmt: skip
"""The fields that make an example stochastic."""

SHARDED = CrossViTConfig(
    image_size=(12, 18), image_scale=(1.0, 2 / 3), patch_size=(6, 4), depth=1, branch_depth=(1, 1),
    embed_dim=(8, 16), num_heads=(2, 4), mlp_dim=(12, 24), num_classes=5,
)  # fmt: skip
"""Of widths, heads and hidden layers that two devices can divide."""

Size = tuple[int, int]


def tilings(size: Size, sides: tuple[int, ...]) -> list[tuple[int, float]]:
    """Sides of patches, and factors on an image of some size, that go together.

    The image that is left has one to three rows and columns of patches; where it can, it is the
    image itself, and such pairs come first.
    """
    height, width = size
    found = [
        (side, rows * side / height)
        for side in sides
        for rows in range(1, 4)
        if _tiles(int(height * (rows * side / height)), side)
        and _tiles(int(width * (rows * side / height)), side)
    ]
    return sorted(found, key=lambda pair: abs(pair[1] - 1.0))


def _tiles(length: int, side: int) -> bool:
    return length % side == 0 and 1 <= length // side <= 3


PATCHES = (3, 4, 5)
IMAGES = [
    (height, width)
    for height in range(4, 19)
    for width in range(4, 19)
    if len(tilings((height, width), PATCHES)) > 1
]
"""Sizes for small patches, of which some leave one axis with another number of them."""
STEM_IMAGES = [(12, 12), (16, 16), (24, 12), (12, 36), (24, 24), (32, 32), (20, 20)]
"""Sizes for the patches of stems."""
STEM_WIDTH = 8
"""A stem starts at a quarter. Of a convolution to one channel, Keras on torch has no gradient in
float64: PyTorch 2.13 refuses the strides of the transposed kernel."""


@st.composite
def configs(draw: st.DrawFn) -> CrossViTConfig:
    """Both dialects and all between: branches of any widths, each of a size of its own."""
    patch_embed = draw(st.sampled_from(["conv", "norm_linear_norm", "conv_stem"]))
    stem = patch_embed == "conv_stem"
    image_size = draw(st.sampled_from(STEM_IMAGES if stem else IMAGES))
    fitting = st.sampled_from(tilings(image_size, tuple(STEMS) if stem else PATCHES))
    (small_patch, small_scale), (large_patch, large_scale) = draw(fitting), draw(fitting)
    in_channels = draw(st.integers(1, 3))
    return CrossViTConfig(
        image_size=image_size,
        image_scale=(small_scale, large_scale),
        scaling=draw(st.sampled_from(["bicubic", "crop"])),
        patch_size=(small_patch, large_patch),
        patch_embed=patch_embed,
        in_channels=in_channels,
        preprocess=Preprocess(mean=(0.5,) * in_channels, std=(0.5,) * in_channels),
        num_classes=draw(st.integers(0, 5)),
        depth=draw(st.integers(0, 2)),
        branch_depth=draw(st.tuples(st.integers(0, 2), st.integers(0, 2))),
        qkv_bias=draw(st.booleans()),
        mlp_dim=draw(st.tuples(*2 * [st.integers(4, MAX_WIDTH)])),
        stage_norm=draw(st.booleans()),
        activation=draw(st.sampled_from(["gelu", "gelu_tanh"])),
        norm_eps=draw(EPSILONS),
        pool=draw(st.sampled_from(["cls", "mean_patches"])),
        logits=draw(st.sampled_from(["mean", "sum"])),
        **draw(_attention_fields(STEM_WIDTH if stem else MIN_WIDTH)),
    )


@st.composite
def _attention_fields(draw: st.DrawFn, least: int) -> dict[str, Any]:
    """Widths, heads and fusion; heads that need not fill a width have a width of their own."""
    num_heads = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    cross_num_heads = draw(st.none() | st.integers(1, 3))
    head_dim = draw(st.none() | st.tuples(st.integers(1, 6), st.integers(1, 6)))
    cross_head_dim = draw(st.none() | st.integers(1, 6))
    units = [
        (n if head_dim is None else 1, cross_num_heads or n if cross_head_dim is None else 1)
        for n in num_heads
    ]
    small, large = (
        draw(st.sampled_from([n for n in range(least, MAX_WIDTH) if not n % a and not n % b]))
        for a, b in units
    )
    fusion = draw(st.sampled_from(["projected", "residual"]))
    same = cross_head_dim is not None and head_dim is not None and draw(st.booleans())
    return {
        "num_heads": num_heads,
        "head_dim": head_dim,
        "embed_dim": (small, small if same else large),
        "fusion": fusion,
        "cross_depth": 1 if fusion == "projected" else draw(st.integers(1, 2)),
        "cross_num_heads": cross_num_heads,
        "cross_head_dim": cross_head_dim,
    }
