"""Small configs of MAE."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from isovit.spec.families.vit import ViTConfig
from isovit.spec.objectives.mae import MAEConfig
from parity_tests.families.vit import SMALL
from parity_tests.strategies import EPSILONS, MAX_WIDTH, MIN_WIDTH

ENCODER: dict[str, Any] = {**SMALL, "num_classes": 0, "embed_dim": 24}
DECODER: dict[str, Any] = dict(
    decoder_dim=20, decoder_depth=1, decoder_num_heads=2, decoder_mlp_dim=19
)

EXAMPLES = {
    "mae_official": MAEConfig(
        encoder=ViTConfig(**ENCODER, pos_embed="sincos"), mask_ratio=0.6, **DECODER
    ),
    "mae_pytorch": MAEConfig(
        encoder=ViTConfig(
            **ENCODER, patch_embed="norm_linear_norm", qkv_bias=False, class_token=False,
            pool="mean", norm_eps=1e-5,
        ),
        mask_rounds_down="hidden",
        normalized_pixels=False,
        **{**DECODER, "decoder_dim": 24, "decoder_head_dim": 7},
        decoder_embed=False,
    ),
}  # fmt: skip
"""Both forms."""


@st.composite
def encoders(draw: st.DrawFn, *, min_patches: int = 2) -> ViTConfig:
    """ViTs that can learn from patches, over any grid of so many; of both dialects."""
    patch_size = draw(st.tuples(st.integers(3, 5), st.integers(2, 5)))
    rows = draw(st.integers(1, 3))
    columns = draw(st.integers(-(-min_patches // rows), 4))
    sincos, heads = draw(st.booleans()), draw(st.integers(1, 3))
    widths = [n for n in range(MIN_WIDTH, MAX_WIDTH + 1) if n % (4 if sincos else 1) == 0]
    return ViTConfig(
        image_size=(rows * patch_size[0], columns * patch_size[1]),
        patch_size=patch_size,
        num_classes=0,
        patch_embed=draw(st.sampled_from(["conv", "norm_linear_norm"])),
        pos_embed="sincos" if sincos else "learned",
        pos_embed_tokens=draw(st.sampled_from(["all", "patches"])),
        embed_dim=draw(st.sampled_from(widths)),
        depth=draw(st.integers(0, 2)),
        num_heads=heads,
        head_dim=draw(st.integers(2, 8)),
        qkv_bias=draw(st.booleans()),
        mlp_dim=draw(st.integers(4, MAX_WIDTH)),
        activation=draw(st.sampled_from(["gelu", "gelu_tanh"])),
        norm_eps=draw(EPSILONS),
        class_token=(class_token := draw(st.booleans())),
        pool="cls" if class_token else "mean",
        final_norm=draw(st.sampled_from(["tokens", "none"])),
    )


@st.composite
def configs(draw: st.DrawFn) -> MAEConfig:
    """Both forms and all between; one patch or more shown, and one or more hidden."""
    encoder = draw(encoders())
    fixed = encoder.pos_embed == "sincos"
    widths = [n for n in range(MIN_WIDTH, MAX_WIDTH + 1) if n % (4 if fixed else 1) == 0]
    same, rounded = draw(st.booleans()), draw(st.sampled_from(["kept", "hidden"]))
    fraction = (draw(st.integers(1, encoder.patches - 1)) + 0.3) / encoder.patches
    return MAEConfig(
        encoder=encoder,
        mask_ratio=fraction if rounded == "hidden" else 1 - fraction,
        mask_rounds_down=rounded,
        decoder_embed=not same,
        decoder_dim=encoder.embed_dim if same else draw(st.sampled_from(widths)),
        decoder_depth=draw(st.integers(0, 2)),
        decoder_num_heads=draw(st.integers(1, 3)),
        decoder_head_dim=draw(st.integers(2, 8)),
        decoder_mlp_dim=draw(st.integers(4, MAX_WIDTH)),
        normalized_pixels=draw(st.booleans()),
    )
