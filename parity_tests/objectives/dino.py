"""Small configs of DINO."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from hypothesis import strategies as st

from isovit.errors import InputError
from isovit.spec.config import Config
from isovit.spec.families import FAMILIES
from isovit.spec.families.vit import ViTConfig
from isovit.spec.objectives.dino import DINOConfig
from parity_tests.families import vit
from parity_tests.families.vit import SMALL
from parity_tests.strategies import MAX_WIDTH, MIN_WIDTH

NET: dict[str, Any] = {**SMALL, "num_classes": 0}
HEAD: dict[str, Any] = dict(head_hidden_dim=13, bottleneck_dim=9, out_dim=11)

EXAMPLES = {
    "dino_official": DINOConfig(
        net=ViTConfig(**NET, drop_path_rate=0.1), views=3, student_temp=0.3, teacher_temp=0.2,
        last_gain_trains=True, **HEAD,
    ),
    "dino_pytorch": DINOConfig(
        net=ViTConfig(
            **NET, patch_embed="norm_linear_norm", qkv_bias=False, head_dim=5, norm_eps=1e-5
        ),
        head_last_activation=True,
        normalize_eps=1e-6,
        last_layer="dense",
        student_temp=0.9,
        teacher_temp=0.3,
        **{**HEAD, "head_hidden_dim": 9},
    ),
    "dino_local": DINOConfig(
        net=ViTConfig(**NET, dist_token=True), local_views=2, local_image_size=(6, 12),
        student_temp=0.4, teacher_temp=0.2, **HEAD,
    ),
    "dino_local_patches": DINOConfig(
        net=ViTConfig(
            **NET, patch_embed="norm_linear_norm", pos_embed_tokens="patches", pool="mean_patches",
            final_norm="pooled",
        ),
        views=1, teacher_views=2, local_views=2, local_image_size=(12, 4), student_temp=0.5,
        teacher_temp=0.3, last_layer="dense", **HEAD,
    ),
}  # fmt: skip
"""Both forms, the lengths of the one train, so that they show; and local views on another grid."""


def headless(config: Config) -> Config | None:
    """The same model without its head, if it then returns one vector; else None."""
    try:
        net = config.replace(num_classes=0)
        DINOConfig(net=net, **HEAD)
    except InputError:
        return None
    return net


NETS: tuple[Config, ...] = tuple(
    net
    for family in FAMILIES
    for config in import_module(f"parity_tests.families.{family}").EXAMPLES.values()
    if (net := headless(config)) is not None
)
"""Small models of every family."""


@st.composite
def local_fields(draw: st.DrawFn, net: Config) -> dict[str, Any]:
    """Local views of any number of patches, that of the net among them; of a ViT alone."""
    if not isinstance(net, ViTConfig):
        return {}
    height, width = net.patch_size
    size = (height * draw(st.integers(1, 4)), width * draw(st.integers(1, 4)))
    return {"local_views": draw(st.integers(0, 2)), "local_image_size": size}


@st.composite
def configs(draw: st.DrawFn) -> DINOConfig:
    """Any model that returns one vector, any head, any number of views."""
    drawn = vit.configs().map(headless).filter(lambda net: net is not None)
    weight_norm, views = draw(st.booleans()), draw(st.integers(1, 3))
    net = draw(drawn | st.sampled_from(NETS))
    return DINOConfig(
        net=net,
        **draw(local_fields(net)),
        views=views,
        teacher_views=draw(st.integers(2 if views == 1 else 1, 2)),
        head_layers=draw(st.integers(1, 3)),
        head_hidden_dim=draw(st.integers(MIN_WIDTH, MAX_WIDTH)),
        bottleneck_dim=draw(st.integers(MIN_WIDTH, MAX_WIDTH)),
        head_last_activation=draw(st.booleans()),
        activation=draw(st.sampled_from(["gelu", "gelu_tanh"])),
        normalize_eps=draw(st.sampled_from([1e-12, 1e-6])),
        last_layer="weight_norm" if weight_norm else "dense",
        last_gain_trains=weight_norm and draw(st.booleans()),
        out_dim=draw(st.integers(MIN_WIDTH, MAX_WIDTH)),
        student_temp=draw(st.sampled_from([1.0, 0.5])),
        teacher_temp=draw(st.sampled_from([0.7, 0.3])),
    )
