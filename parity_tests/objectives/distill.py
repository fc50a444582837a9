"""Small configs of distillation."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from hypothesis import strategies as st

from isovit.spec.families.t2t_vit import T2TViTConfig
from isovit.spec.families.vit import ViTConfig
from isovit.spec.objectives.distill import STUDENTS, DistillConfig
from parity_tests.families import efficient_vit, t2t_vit, vit

EXAMPLES = {
    "distill_deit": DistillConfig(
        student=ViTConfig(**vit.SMALL, dist_token=True, dist_head=True),
        token="own", hard=True,
    ),
    "distill_pytorch": DistillConfig(
        student=ViTConfig(
            **vit.SMALL, patch_embed="norm_linear_norm", qkv_bias=False, norm_eps=1e-5,
        ),
        dist_norm=True, alpha=0.3, temperature=3.0,
    ),
    "distill_t2t": DistillConfig(
        student=T2TViTConfig(**t2t_vit.SMALL, pool="mean_patches", final_norm="pooled"),
        temperature=0.7, reduction="numel",
    ),
    "distill_nystrom": DistillConfig(  # whose landmarks, one token more, want other zeros
        student=efficient_vit.EXAMPLES["efficient_nystrom"].replace(pool="mean"), hard=True
    ),
}  # fmt: skip
"""Both forms, and students of other families."""


@st.composite
def configs(draw: st.DrawFn) -> DistillConfig:
    """Both forms and all between, with a student of every family."""
    token, family = draw(st.sampled_from(["appended", "own"])), draw(st.sampled_from(STUDENTS))
    own = token == "own"
    module = vit if own else import_module(f"parity_tests.families.{family}")
    student = draw(module.configs())
    changes: dict[str, Any] = {"num_classes": draw(st.integers(2, 7))}
    if student.pool == "none":
        changes |= {"pool": "mean"}
    if isinstance(student, ViTConfig):
        changes |= {"dist_token": own, "dist_head": own}
    if own:
        changes |= dict(class_token=True, pool="cls", final_norm="tokens", pre_logits_dim=None)
    return DistillConfig(
        student=student.replace(**changes),
        token=token,
        dist_norm=not own and draw(st.booleans()),
        alpha=draw(st.sampled_from([0.5, 0.1, 0.9])),
        hard=draw(st.booleans()),
        temperature=draw(st.sampled_from([1.0, 3.0, 0.5])),
        reduction=draw(st.sampled_from(["batchmean", "numel"])),
    )
