"""Small configs of SimMIM."""

from __future__ import annotations

from hypothesis import strategies as st

from isovit.spec.families.vit import ViTConfig
from isovit.spec.objectives.simmim import SimMIMConfig
from parity_tests.objectives.mae import ENCODER, encoders

EXAMPLES = {
    "simmim_official": SimMIMConfig(
        encoder=ViTConfig(**{**ENCODER, "image_size": (12, 16)}, layer_scale_init=0.1)
    ),
    "simmim_pytorch": SimMIMConfig(
        encoder=ViTConfig(
            **ENCODER, patch_embed="norm_linear_norm", qkv_bias=False, class_token=False,
            pool="mean", norm_eps=1e-5,
        ),
        mask_ratio=0.5,
        mask_rounds="down",
        mask_unit=(1, 1),
        divided_by_hidden=True,
    ),
}  # fmt: skip
"""Both forms."""


@st.composite
def configs(draw: st.DrawFn) -> SimMIMConfig:
    """Both forms and all between; one unit or more shown, and one or more hidden."""
    encoder = draw(encoders())
    rows, columns = encoder.grid
    fitting = [
        (height, width)
        for height in range(1, rows + 1)
        for width in range(1, columns + 1)
        if rows % height == 0 and columns % width == 0 and (height, width) != encoder.grid
    ]
    mask_unit, rounds = draw(st.sampled_from(fitting)), draw(st.sampled_from(["up", "down"]))
    units = encoder.patches // (mask_unit[0] * mask_unit[1])
    shift = -0.3 if rounds == "up" else 0.3
    return SimMIMConfig(
        encoder=encoder,
        mask_ratio=(draw(st.integers(1, units - 1)) + shift) / units,
        mask_rounds=rounds,
        mask_unit=mask_unit,
        divided_by_hidden=draw(st.booleans()),
    )
