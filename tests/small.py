"""Models small enough to build, write and run in milliseconds; no two of their sizes are equal."""

from __future__ import annotations

from isovit.spec.config import BaseConfig, Config
from isovit.spec.families import FAMILIES
from isovit.spec.families.t2t_vit import SoftSplit, T2TViTConfig
from isovit.spec.families.vit import ViTConfig
from isovit.spec.objectives import OBJECTIVES
from parity_tests.examples import examples_of

VIT = ViTConfig(
    image_size=(16, 24),
    patch_size=(8, 6),
    embed_dim=12,
    depth=2,
    num_heads=3,
    mlp_dim=20,
    num_classes=5,
)
T2T = T2TViTConfig(
    image_size=16,
    t2t_layers=(SoftSplit(5, 2, 2), SoftSplit(3, 2, 1)),
    token_dim=6,
    token_mlp_dim=7,
    performer_features=3,
    embed_dim=12,
    depth=1,
    num_heads=3,
    mlp_dim=20,
    qkv_bias=False,
    num_classes=5,
)
CONFIGS: dict[str, Config] = {"vit": VIT, "t2t_vit": T2T}
for _family in (family for family in FAMILIES if family not in CONFIGS):
    CONFIGS[_family] = next(iter(examples_of(_family).values()))

TRAINERS: dict[str, BaseConfig] = {
    name: config for objective in OBJECTIVES for name, config in examples_of(objective).items()
}
"""Those of the objectives."""

# The same ViT for the command line, from a published name.
SETTINGS = [
    "image_size=[16,24]",
    "patch_size=[8,6]",
    "embed_dim=12",
    "depth=2",
    "num_heads=3",
    "mlp_dim=20",
    "num_classes=5",
]
SMALL = [word for setting in SETTINGS for word in ("--set", setting)]
