"""Every rename table over every config: what it can hold comes back bit for bit, the rest is told.

Whether the library of a format reads what is written here is asked in ``parity_tests``.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isovit.errors import InputError
from isovit.spec.config import Config
from isovit.spec.families import config as variant
from isovit.spec.families import cvt, levit, param_tree, twins_svt
from isovit.spec.families.cvt import CvTConfig
from isovit.spec.families.deepvit import DeepViTConfig
from isovit.spec.families.levit import LeViTConfig
from isovit.spec.initialize import probe
from isovit.weight_convert.checkpoint import Checkpoint
from isovit.weight_convert.formats import FORMATS, rename_table
from isovit.weight_convert.store import inspect, load, save
from parity_tests.families.t2t_vit_designs import EXAMPLES as DESIGNS
from parity_tests.oracles.fitting import FOREIGN, drawn, fitting
from tests.small import CONFIGS, T2T, VIT

FEW = settings(max_examples=10)
dtypes = st.sampled_from([np.float32, np.float64, ml_dtypes.bfloat16])
tables = pytest.mark.parametrize(("family", "name"), FOREIGN, ids=map("-".join, FOREIGN))


def misfits(name: str, config: Config) -> list[str]:
    """What a format says against a config."""
    family = import_module(f"isovit.weight_convert.families.{config.family}")
    return list(family.MISFITS[name](config))


def weights(config: Config, dtype: Any) -> dict[str, np.ndarray]:
    return {path: array.astype(dtype) for path, array in probe(config).items()}


def assert_same(found: Any, wanted: dict[str, np.ndarray]) -> None:
    assert list(found) == list(wanted)
    for path, array in wanted.items():
        assert found[path].dtype == array.dtype, path
        assert found[path].tobytes() == array.tobytes(), path


def assert_comes_back(name: str, subject: Checkpoint, suffix: str) -> None:
    """Write to a file and read from it, with what the file says of itself and no more."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"model{suffix}"
        save(subject, path, name)
        found, about = load(path), inspect(path)
    assert found.config == subject.config
    assert (found.source.format, about.format, about.problems) == (name, name, ())
    assert_same(found.weights, subject.weights)


@tables
@FEW
@given(data=st.data(), dtype=dtypes)
def test_what_a_format_holds_comes_back_bit_for_bit(
    family: str, name: str, data: st.DataObject, dtype: Any
) -> None:
    config = data.draw(fitting(family, name))
    assert misfits(name, config) == []
    params, wanted = param_tree(config).parameters(), weights(config, dtype)
    table, layout = rename_table(name, config), FORMATS[name].layout
    written = table.write(params, wanted, layout)
    # Were two parameters written under one name, numbers would be missing.
    kept = [array.size for key, array in written.items() if not table.drops_key(key)]
    assert sum(kept) == sum(array.size for array in wanted.values())
    assert {key: array.shape for key, array in written.items()} == written.shapes
    assert_same(table.read(params, dict(written), layout), wanted)
    suffix = data.draw(st.sampled_from(FORMATS[name].suffixes))
    assert_comes_back(name, Checkpoint(config, wanted), suffix)


@tables
@FEW
@given(data=st.data())
def test_any_config_comes_back_or_is_refused(family: str, name: str, data: st.DataObject) -> None:
    config = data.draw(drawn(family))
    refused = ""
    try:
        assert_comes_back(name, Checkpoint(config, probe(config)), FORMATS[name].suffixes[0])
    except InputError as error:
        refused = str(error)
    assert not refused or re.match(refusal(name), refused)
    assert refused or not misfits(name, config)


def refusal(name: str, reason: str = "") -> str:
    """How a config is refused: by the format, or by its table, which has no row for a parameter."""
    return f"(format {name} cannot hold this model: it has|the format has no place for) .*{reason}"


CROSSVIT = CONFIGS["crossvit"]
POOLED, TOKENS = dict(pool="mean_patches"), dict(pos_embed_tokens="patches")
DENSE: dict[str, Any] = dict(
    patch_embed="norm_linear_norm", qkv_bias=False, norm_eps=1e-5, head_dim=5
)
FULL: dict[str, Any] = dict(
    image_size=14, t2t_layers=((3, 2, 1), (3, 1, 0)), token_mixer="full", pos_embed="learned",
    head_dim=5,
)  # fmt: skip
OFFICIAL: dict[str, Any] = dict(
    image_size=32, t2t_layers=((7, 4, 2), (3, 2, 1), (3, 2, 1)), token_mlp_dim=6
)
OFFICIAL_DESIGNS = OFFICIAL | dict(token_dim=64, token_mlp_dim=64, performer_features=32)
DISTILLED = dict(dist_token=True, dist_head=True)
TWINS = CONFIGS["twins_svt"]
TWINS_PYTORCH: dict[str, Any] = dict(
    **twins_svt.VIT_PYTORCH, image_size=24, embed_dims=(9, 12, 12, 6), mlp_dims=(36, 48, 48, 24),
    depths=(2, 4, 2, 2), num_heads=(8, 8, 8, 8), patch_sizes=(2, 1, 1, 1), reductions=(3, 2, 1, 1),
    window_sizes=(3, 4, 6, 0), peg_after=(2, 2, 2, 1),
)  # fmt: skip
MIXED = DeepViTConfig(
    image_size=(16, 16), patch_size=(8, 8), embed_dim=12, depth=2, num_heads=3, mlp_dim=20,
    num_classes=5,
)  # fmt: skip
PLUGGED: dict[str, Any] = dict(
    image_size=(12, 20), patch_size=(4, 4), head_dim=5, qkv_bias=False, norm_eps=1e-5,
    final_norm="pooled",
)  # fmt: skip
PLUGGED_REFUSED = [
    (dict(patch_size=(4, 5)), "not square"),
    (dict(qkv_bias=True), "qkv_bias"),
    (dict(attn_scale=0.3), "attn_scale"),
    (dict(layer_scale_init=0.1), "layer_scale"),
    (dict(class_token=False, pool="mean"), "class_token"),
    (dict(final_norm="tokens"), "final_norm=tokens"),
    (dict(final_norm="none"), "final_norm=none"),
    (dict(pool="mean_patches"), "pool=mean_patches"),
    (dict(num_classes=0), "num_classes"),
]
UNBIASED: dict[str, Any] = dict(re_attention_norm="layer_norm", re_attention_bias=False)
LEVIT = LeViTConfig(
    image_size=32, stem_dims=(1, 2, 4), embed_dims=(8, 10), depths=(1, 1), num_heads=(1, 2),
    key_dim=4, value_dim=8, down_heads=(2,), down_value_dim=16, num_classes=5,
)  # fmt: skip
LEVIT_REFUSED: list[tuple[dict[str, Any], str]] = [
    (dict(fused=True), "fused"),
    (dict(batch_norm_eps=1e-3), "batch_norm_eps"),
    (dict(stem="conv"), "stem"),
    (dict(stem_dims=(2, 2, 4)), "stem_dims"),
    (dict(attn_activation="gelu"), "attn_activation"),
    (dict(attn_bias_over_scale=True), "attn_bias_over_scale"),
    (dict(attn_proj_bias=True), "attn_proj_bias"),
    (dict(mlp_norm=False), "mlp_norm"),
    (dict(head_norm=False), "head_norm"),
    (dict(value_dim=6), "value_dim"),
    (dict(down_heads=(1,)), "down_heads"),
    (dict(down_value_dim=6), "down_value_dim"),
    (dict(down_mlp_ratio=1), "down_mlp_ratio"),
    (dict(image_size=40), "16 divides not"),
]
CVT = CvTConfig(
    image_size=(40, 48), embed_dims=(6, 8, 12), depths=(1, 2, 3), num_heads=(1, 2, 3),
    mlp_dims=(12, 24, 12), num_classes=5,
)  # fmt: skip
CVT_REFUSED: list[tuple[dict[str, Any], str]] = [
    (dict(head_dim=3), "fill embed_dims"),
    (dict(attn_scale="head"), "attn_scale"),
    (dict(kv_convs="one"), "kv_convs"),
    (dict(batch_norm_eps=1e-3), "batch_norm_eps"),
    (dict(final_norm="none"), "final_norm"),
    (dict(pool="none", num_classes=0), "pool"),
]
REGIONVIT = CONFIGS["regionvit"]
REGIONVIT_PYTORCH = variant(
    "regionvit_pytorch", image_size=16, window_size=2, embed_dims=(6, 6, 12, 12),
    mlp_dims=(24, 24, 48, 48), depths=(1, 1, 2, 1), num_classes=5,
)  # fmt: skip

# A config that each format holds, and one change after another under which it does not.
REFUSED: dict[str, tuple[Config, list[tuple[dict[str, Any], str]]]] = {
    "timm": (
        VIT,
        [
            (dict(attn_scale=0.3), "attn_scale"),
            (dict(head_dim=5), "heads that do not fill embed_dim"),
            (dict(attn_proj=False), "attn_proj"),
            (dict(patch_embed="norm_linear_norm"), "patch_embed"),
            (dict(final_norm="none"), "final_norm=none"),
            (dict(pool="mean"), "pool=mean over class token"),
            (dict(pre_logits_dim=7), "pre_logits"),
            (dict(dist_token=True), "dist_token"),
            (DISTILLED | TOKENS, "pos_embed_tokens"),
        ],
    ),
    "deit": (
        VIT,
        [
            (dict(layer_scale_init=0.1), "layer_scale"),
            (TOKENS, "pos_embed_tokens"),
            (dict(class_token=False, **POOLED), "class_token"),
            (dict(dist_token=True), "dist_token"),
        ],
    ),
    "mae": (VIT, [(dict(layer_scale_init=0.1), "layer_scale"), (DISTILLED, "dist_token")]),
    "dino": (VIT, [(dict(layer_scale_init=0.1), "layer_scale"), (DISTILLED, "dist_token")]),
    "hf": (
        VIT,
        [
            (dict(class_token=False, **POOLED), "class_token=false"),
            (POOLED, "pool=mean_patches"),
            (dict(final_norm="pooled"), "final_norm=pooled"),
            (TOKENS, "pos_embed_tokens"),
            (dict(layer_scale_init=0.1), "layer_scale"),
            (dict(pre_logits_dim=7), "pre_logits"),
            (dict(patch_embed="norm_linear_norm"), "patch_embed"),
        ],
    ),
    "google": (
        VIT,
        [
            (dict(qkv_bias=False), "qkv_bias=false"),
            (POOLED, "pool=mean_patches"),
            (TOKENS, "pos_embed_tokens"),
            (dict(final_norm="pooled"), "final_norm=pooled"),
            (dict(layer_scale_init=0.1), "layer_scale"),
            (dict(dist_token=True), "dist_token"),
            (dict(patch_embed="norm_linear_norm"), "patch_embed"),
        ],
    ),
    "big_vision": (
        VIT.replace(**TOKENS),
        [
            (dict(qkv_bias=False), "qkv_bias=false"),
            (POOLED, "pool=mean_patches"),
            (dict(pos_embed_tokens="all"), "position for the class token"),
            (dict(layer_scale_init=0.1), "layer_scale"),
        ],
    ),
    "scenic": (
        CONFIGS["token_learner"].replace(bottleneck_dim=64),
        [
            (dict(head_dim=6), "fill embed_dim"),
            (dict(mlp_output_activation=True), "mlp_output_activation"),
            (dict(learner="none"), "learner=none"),
            (dict(learner_loc=2), "behind the last block"),
            (dict(learner="conv", learner_pool="mean"), "learner_pool=mean"),
            (dict(learner="conv", image_size=(12, 20)), "not square"),
            (dict(bottleneck_dim=7), "bottleneck_dim"),
            (dict(num_classes=0), "num_classes=0"),
        ],
    ),
    "vit_pytorch": (
        VIT.replace(**DENSE),
        [
            (dict(patch_embed="conv"), "patch_embed"),
            (dict(qkv_bias=True), "qkv_bias"),
            (TOKENS, "pos_embed_tokens"),
            (POOLED, "pool=mean_patches"),
            (dict(pool="mean"), "class token"),
            (dict(final_norm="pooled"), "final_norm"),
            (dict(num_heads=1, head_dim=12), "attn_proj"),
            (dict(head_dim=None, attn_proj=False), "attn_proj"),
            (dict(layer_scale_init=0.1), "layer_scale"),
            (dict(dist_token=True), "dist_token"),
            (dict(pre_logits_dim=7), "pre_logits"),
        ],
    ),
    "vit_pytorch of T2T-ViT": (
        T2T.replace(**FULL),
        [
            (dict(token_mixer="performer"), "token_mixer"),
            (dict(image_size=(14, 15)), "not square"),
            (dict(t2t_layers=((3, 2, 0), (3, 1, 0))), "padding"),
            (dict(class_token=False, pool="mean"), "class_token"),
            (dict(final_norm="pooled"), "final_norm"),
            (dict(num_classes=0), "num_classes"),
            (dict(layer_scale_init=0.1), "layer_scale"),
            (dict(qkv_bias=True), "qkv_bias"),
        ],
    ),
    "timm of Twins-SVT": (
        TWINS,
        [
            (dict(head_dim=3), "fill embed_dims"),
            (dict(patch_embed="norm_linear_norm"), "patch_embed"),
            (dict(image_size=(24, 18), patch_sizes=(2, 3)), "patch_sizes"),
            (dict(window_sizes=(5, 1)), "windows of one token"),
            (dict(reduce="conv"), "reduce"),
            (dict(qkv_bias=False), "qkv_bias"),
            (dict(peg_after=(2, 1)), "peg_after"),
            (dict(peg_kernel_size=5), "peg_kernel_size"),
            (dict(embed_norm_eps=1e-6), "embed_norm_eps"),
            (dict(final_norm="none"), "final_norm"),
        ],
    ),
    "vit_pytorch of Twins-SVT": (
        TWINS.replace(**TWINS_PYTORCH),
        [
            (dict(in_channels=1), "in_channels"),
            (dict(head_dim=32), "heads"),
            (dict(mlp_dims=(36, 48, 48, 30)), "mlp_dims"),
            (dict(patch_embed="conv_norm"), "patch_embed"),
            (dict(window_sizes=(3, 4, 6, 3)), "window_sizes"),
            (dict(window_sizes=(5, 4, 6, 0)), "tile"),
            (dict(peg_after=(1, 2, 2, 1)), "peg_after"),
            (dict(depths=(3, 4, 2, 2)), "pair"),
            (dict(reduce="conv_norm_linear"), "reduce"),
            (dict(qkv_bias=True), "qkv_bias"),
            (dict(embed_norm_eps=1e-6), "embed_norm_eps"),
            (dict(final_norm="tokens"), "final_norm"),
            (dict(num_classes=0), "num_classes"),
        ],
    ),
    "microsoft": (CVT, [*CVT_REFUSED, (dict(num_classes=0), "num_classes")]),
    "hf of CvT": (
        CVT.replace(activation="gelu"),
        [
            *CVT_REFUSED,
            (dict(activation="quick_gelu"), "activation"),
            (dict(norm_eps=1e-6), "norm_eps"),
            (dict(class_token=False, pool="mean"), "class_token"),
            (dict(depths=(1, 2, 2)), "fewer blocks"),
        ],
    ),
    "vit_pytorch of CvT": (
        CVT.replace(**cvt.VIT_PYTORCH, patch_paddings=(3, 1, 1)),
        [
            (
                dict(
                    embed_dims=(6,),
                    depths=(1,),
                    num_heads=(1,),
                    mlp_dims=(12,),
                    patch_sizes=(7,),
                    patch_strides=(4,),
                    patch_paddings=(3,),
                    qkv_kernel_sizes=(3,),
                    kv_strides=(2,),
                ),
                "number of stages",
            ),
            (dict(head_dim=32), "heads"),
            (dict(mlp_dims=(12, 24, 13)), "mlp_dims"),
            (dict(patch_paddings=(2, 1, 1)), "patch_paddings"),
            (dict(attn_scale="embed_dims"), "attn_scale"),
            (dict(kv_convs="two"), "kv_convs"),
            (dict(qkv_bias=True), "qkv_bias"),
            (dict(class_token=True, pool="cls"), "class_token"),
            (dict(final_norm="tokens"), "final_norm"),
            (dict(pool="none", num_classes=0), "pool"),
            (dict(batch_norm_eps=1e-3), "batch_norm_eps"),
            (dict(num_classes=0), "num_classes"),
        ],
    ),
    "yitu": (
        T2T.replace(**OFFICIAL),
        [
            (dict(t2t_layers=((3, 2, 1),)), "t2t_layers"),
            (dict(image_size=40), "multiple of 16"),
            (dict(token_mlp_dim=7), "token_mlp_dim"),
            (dict(performer_features=2), "performer_features"),
            (dict(performer_eps=1e-6), "performer_eps"),
            (dict(token_mixer="transformer", token_scale="token_dim"), "token_scale"),
            (dict(head_dim=5), "fill embed_dim"),
            (dict(layer_scale_init=0.1), "layer_scale"),
            (dict(pool="mean"), "pool"),
        ],
    ),
    "yitu of SE": (
        DESIGNS["t2t_se"].replace(**OFFICIAL_DESIGNS, embed_dim=18, se_dim=1),
        [
            (dict(se_dim=2), "se_dim other than 1/16"),
            (dict(token_dim=10, token_mlp_dim=10, performer_features=5), "token_dim other than"),
            (dict(depth=0), "depth=0"),
            (dict(image_size=40), "multiple of 16"),
        ],
    ),
    "yitu of ghosts": (
        DESIGNS["t2t_ghost"].replace(**OFFICIAL_DESIGNS),
        [(dict(mlp_dim=36), "mlp_dim other than 3"), (dict(layer_scale_init=0.1), "layer_scale")],
    ),
    "yitu of dense blocks": (
        DESIGNS["t2t_dense"].replace(**OFFICIAL_DESIGNS, final_norm="tokens"),
        [
            (dict(head_dim=4), "head_dim"),
            (dict(dense_depths=[], depth=0), "depth=0"),
            (dict(final_norm="pooled"), "final_norm"),
        ],
    ),
    "timm of CrossViT": (
        CROSSVIT,
        [
            (dict(patch_embed="norm_linear_norm"), "patch_embed"),
            (dict(fusion="residual"), "fusion"),
            (dict(stage_norm=True), "stage_norm"),
            (dict(logits="sum"), "logits"),
            (dict(head_dim=(3, 5)), "heads that do not fill"),
            (dict(cross_head_dim=5), "heads that do not fill"),
            (dict(cross_num_heads=1), "cross_num_heads"),
            (dict(branch_depth=(0, 1)), "branch_depth"),
            (dict(branch_depth=(2, 1)), "branch_depth"),
        ],
    ),
    "ibm": (
        CROSSVIT.replace(image_size=12),
        [
            (dict(image_size=(12, 18)), "not square"),
            (dict(scaling="crop"), "scaling=crop"),
            (dict(pool="mean_patches"), "pool"),
            (dict(num_classes=0), "num_classes=0"),
            (dict(logits="sum"), "logits"),
        ],
    ),
    "vit_pytorch of CrossViT": (
        CROSSVIT.replace(
            **{**DENSE, "head_dim": (5, 4)},
            image_size=12,
            image_scale=(1.0, 1.0),
            stage_norm=True,
            fusion="residual",
            cross_num_heads=2,
            cross_head_dim=3,
            logits="sum",
        ),
        [
            (dict(image_size=(12, 24)), "not square"),
            (dict(image_scale=(1.0, 2 / 3)), "image_scale"),
            (dict(patch_embed="conv"), "patch_embed"),
            (dict(fusion="projected"), "fusion"),
            (dict(stage_norm=False), "stage_norm"),
            (dict(qkv_bias=True), "qkv_bias"),
            (dict(cross_num_heads=1, cross_head_dim=None), "other heads for each branch"),
            (POOLED, "pool=mean_patches"),
            (dict(logits="mean"), "logits"),
            (dict(num_classes=0), "num_classes"),
        ],
    ),
    "dvit": (
        MIXED.replace(patch_embed="convs"),
        [
            (dict(class_token=False, pool="mean"), "class_token"),
            (dict(attn_proj=False), "attn_proj"),
            (dict(layer_scale_init=0.1), "layer_scale"),
            (dict(patch_embed="norm_linear_norm"), "patch_embed=norm_linear_norm"),
            (dict(stem_dim=7), "stem_dim other than 64"),
            (dict(patch_size=(8, 4)), "not square"),
            (dict(head_dim=5), "fill embed_dim"),
            (dict(re_attention_norm="layer_norm"), "re_attention_norm"),
            (dict(re_attention_bias=False), "re_attention_bias"),
            (dict(re_attention_scale=0.3), "re_attention_scale"),
            (dict(final_norm="none"), "final_norm"),
            (dict(pool="mean"), "pool"),
        ],
    ),
    "vit_pytorch of DeepViT": (
        MIXED.replace(**DENSE, **UNBIASED, final_norm="pooled"),
        [
            (dict(class_token=False, pool="mean"), "class_token"),
            (dict(head_dim=None, attn_proj=False), "attn_proj"),
            (dict(layer_scale_init=0.1), "layer_scale"),
            (dict(attn_scale=0.3), "attn_scale"),
            (dict(patch_embed="conv"), "patch_embed=conv"),
            (dict(patch_size=(8, 4)), "patches that are not square"),
            (dict(image_size=(16, 24)), "an image that is not square"),
            (dict(qkv_bias=True), "qkv_bias"),
            (dict(re_attention_depth=1), "do not re-attend"),
            (dict(re_attention_norm="batch_norm"), "re_attention_norm"),
            (dict(re_attention_bias=True), "re_attention_bias"),
            (dict(re_attention_scale=0.3), "re_attention_scale"),
            (dict(branch_scale=0.5), "branch_scale"),
            (dict(final_norm="tokens"), "final_norm"),
            (dict(pool="mean_patches"), "pool=mean_patches"),
            (dict(num_classes=0), "num_classes"),
        ],
    ),
    "vit_pytorch of efficient ViT": (
        CONFIGS["efficient_vit"].replace(**PLUGGED, mixer="full", transformer_norm=True),
        [
            *PLUGGED_REFUSED,
            (dict(transformer_norm=False), "transformer_norm=false"),
            (dict(head_dim=None, attn_proj=False), "attn_proj=false"),
            (dict(num_heads=1, head_dim=15), "attn_proj=true"),
            (dict(mixer="linear"), "mixer=linear"),
        ],
    ),
    "vit_pytorch of efficient ViT with a Nystromformer": (
        CONFIGS["efficient_vit"].replace(**PLUGGED, pinv_norm="batch", mlp_dim=60),
        [
            *PLUGGED_REFUSED,
            (dict(transformer_norm=True), "transformer_norm=true"),
            (dict(head_dim=None, attn_proj=False), "attn_proj=false"),
            (dict(mlp_dim=30), "mlp_dim"),
            (dict(pinv_norm="matrix"), "pinv_norm=matrix"),
        ],
    ),
    "timm of LeViT": (LEVIT, LEVIT_REFUSED),
    "levit": (
        LEVIT,
        [
            *LEVIT_REFUSED,
            (dict(image_size=(32, 48)), "not square"),
            (dict(in_channels=4), "in_channels"),
        ],
    ),
    "vit_pytorch of LeViT": (
        LEVIT.replace(**levit.VIT_PYTORCH, down_value_dim=8),
        [
            (dict(fused=True), "fused"),
            (dict(batch_norm_eps=1e-3), "batch_norm_eps"),
            (dict(stem="conv_norm"), "stem"),
            (dict(stem_dims=(32, 64)), "stem_dims"),
            (dict(attn_activation="hardswish"), "attn_activation"),
            (dict(attn_bias_over_scale=False), "attn_bias_over_scale"),
            (dict(attn_proj_bias=False), "attn_proj_bias"),
            (dict(mlp_norm=True), "mlp_norm"),
            (dict(head_norm=True), "head_norm"),
            (dict(num_classes=0, dist_head=False), "num_classes"),
            (dict(down_heads=(1,)), "down_heads"),
            (dict(down_value_dim=16), "down_value_dim"),
            (dict(down_mlp_ratio=1), "down_mlp_ratio"),
            (dict(in_channels=4), "in_channels"),
            (dict(image_size=(32, 48)), "not square"),
            (dict(image_size=40), "16 divides not"),
        ],
    ),
    "ibm of RegionViT": (
        REGIONVIT.replace(stem_dims=()),
        [
            (dict(image_size=8), "smaller than window_size"),
            (dict(head_dim=5), "fill embed_dims"),
            (dict(stem_dims=(6, 7)), "stem_dims"),
            (dict(region_norm=False), "region_norm"),
            (dict(rel_pos="stage"), "rel_pos"),
            (dict(downsample="conv"), "downsample"),
            (dict(peg="local"), "peg"),
            (dict(embed_norm_eps=1e-6), "embed_norm_eps"),
            (dict(final_norm="pooled"), "final_norm"),
        ],
    ),
    "vit_pytorch of RegionViT": (
        REGIONVIT_PYTORCH,
        [
            (
                dict(embed_dims=(6, 6), mlp_dims=(24, 24), depths=(1, 1), num_heads=(4, 4)),
                "stages",
            ),
            (dict(in_channels=1), "in_channels"),
            (dict(patch_size=2), "patch_size"),
            (dict(stem_dims=(6, 7)), "stem_dims"),
            (dict(head_dim=5), "heads"),
            (dict(mlp_dims=(24, 24, 48, 40)), "mlp_dims"),
            (dict(qkv_bias=True), "qkv_bias"),
            (dict(attn_scale=0.3), "attn_scale"),
            (dict(region_norm=True), "region_norm"),
            (dict(rel_pos="block"), "rel_pos"),
            (dict(downsample="norm_conv"), "downsample"),
            (dict(peg="both"), "peg"),
            (dict(embed_norm_eps=1e-6), "embed_norm_eps"),
            (dict(final_norm="tokens"), "final_norm"),
            (dict(num_classes=0), "num_classes"),
        ],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_format_cannot_hold_is_refused_by_name(case: str, tmp_path: Path) -> None:
    name, (config, changes) = case.partition(" ")[0], REFUSED[case]
    suffix = FORMATS[name].suffixes[0]
    assert_comes_back(name, Checkpoint(config, probe(config)), suffix)
    for change, reason in changes:
        other = config.replace(**change)
        with pytest.raises(InputError, match=refusal(name, reason)):
            save(Checkpoint(other, probe(other)), tmp_path / f"model{suffix}", name)
    assert not list(tmp_path.iterdir())
