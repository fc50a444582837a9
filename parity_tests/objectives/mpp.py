"""Small configs of masked patch prediction."""

from __future__ import annotations

from hypothesis import strategies as st

from isovit.spec.families.vit import ViTConfig
from isovit.spec.objectives.mpp import MPPConfig
from parity_tests.objectives.mae import ENCODER, encoders

EXAMPLES = {
    "mpp_conv": MPPConfig(
        encoder=ViTConfig(**ENCODER), output_channel_bits=2, mask_prob=0.6, random_patch_prob=0.3
    ),
    "mpp_pytorch": MPPConfig(
        encoder=ViTConfig(
            **ENCODER, patch_embed="norm_linear_norm", qkv_bias=False, norm_eps=1e-5, head_dim=5
        ),
        normalized_images=False,
        mask_prob=0.5,
        random_patch_prob=0.3,
    ),
}
"""Both stems, with images of both kinds."""


@st.composite
def configs(draw: st.DrawFn) -> MPPConfig:
    """One patch masked or more, and of these any part exchanged and replaced."""
    encoder = draw(encoders(min_patches=1))
    return MPPConfig(
        encoder=encoder,
        output_channel_bits=draw(st.integers(1, 2)),
        max_pixel_val=draw(st.sampled_from([1.0, 0.7])),
        normalized_images=draw(st.booleans()),
        mask_prob=(draw(st.integers(1, encoder.patches)) - 0.3) / encoder.patches,
        replace_prob=(replace_prob := draw(st.sampled_from([0.0, 0.5, 1.0]))),
        random_patch_prob=draw(st.sampled_from([0.0, 0.3, 0.5])) * (replace_prob < 1),
    )
