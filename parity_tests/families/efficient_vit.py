"""Small configs of efficient ViT."""

from __future__ import annotations

from hypothesis import strategies as st

from isovit.spec.families.efficient_vit import EfficientViTConfig
from parity_tests.strategies import transformer_fields

SMALL = EfficientViTConfig(
    image_size=(9, 20), patch_size=(3, 4), embed_dim=15, depth=2, num_heads=3, mlp_dim=22,
    mixer="nystrom", num_landmarks=5, residual_kernel=3, performer_features=7, num_classes=6,
)  # fmt: skip
"""Of 16 tokens, which 5 landmarks do not divide."""

EXAMPLES = {
    "efficient_nystrom": SMALL,
    "efficient_nystrom_batch": SMALL.replace(
        pinv_norm="batch", num_landmarks=3, class_token=False, pool="mean", final_norm="pooled",
        residual_kernel=None, qkv_bias=False,
    ),
    "efficient_performer": SMALL.replace(mixer="performer", depth=1, transformer_norm=True),
    "efficient_linear": SMALL.replace(mixer="linear", depth=1, num_classes=0),
    "efficient_full": SMALL.replace(mixer="full", depth=1, transformer_norm=True),
}  # fmt: skip
"""Every mixer, and every module and option between them."""

RATES = {
    "efficient_nystrom": ["embed_dropout_rate", "dropout_rate"],
    "efficient_performer": ["dropout_rate"],
    "efficient_linear": ["dropout_rate"],
    "efficient_full": ["attn_dropout_rate"],
}
"""The fields that make an example stochastic."""

SHARDED = EfficientViTConfig(
    image_size=(9, 20), patch_size=(3, 4), embed_dim=16, depth=1, num_heads=4, mlp_dim=24,
    mixer="nystrom", num_landmarks=5, pinv_norm="batch", residual_kernel=3, num_classes=5,
)  # fmt: skip
"""Of a width, heads and hidden layer that two devices can divide."""


@st.composite
def configs(draw: st.DrawFn) -> EfficientViTConfig:
    """Every mixer; any grid, one token included; landmarks that do and do not divide the tokens."""
    patch_size = draw(st.tuples(st.integers(3, 5), st.integers(2, 5)))  # 6 numbers at least
    rows, columns = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    mixer = draw(st.sampled_from(["full", "linear", "performer", "nystrom"]))
    fields = draw(transformer_fields())
    if mixer == "linear":
        fields["attn_scale"] = None
    return EfficientViTConfig(
        image_size=(rows * patch_size[0], columns * patch_size[1]),
        patch_size=patch_size,
        mixer=mixer,
        transformer_norm=draw(st.booleans()),
        num_landmarks=draw(st.integers(1, 5)),
        pinv_iterations=draw(st.integers(1, 6)),
        pinv_norm=draw(st.sampled_from(["matrix", "batch"])),
        residual_kernel=draw(st.sampled_from([None, 1, 3, 5, 33])),
        performer_features=draw(st.integers(1, 12)),
        performer_stabilized=draw(st.booleans()),
        **fields,
    )
