"""Configs: strict in, exact out, and every refusal says which field, which value and which rule."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isovit.errors import InputError
from isovit.spec.config import (
    Config,
    ConfigError,
    Preprocess,
    config_from_dict,
    config_from_file,
    json_schema,
    parse_assignments,
)
from isovit.spec.families import FAMILIES, config, config_class, variant_name, variants
from isovit.spec.families.t2t_vit import SoftSplit, T2TViTConfig
from isovit.spec.families.t2t_vit_designs import T2TViTDesignsConfig
from isovit.spec.families.vit import ViTConfig
from tests.small import CONFIGS

CONFIG_STRATEGY = st.one_of(
    *(import_module(f"parity_tests.families.{family}").configs() for family in FAMILIES)
)


@given(CONFIG_STRATEGY)
def test_plain_data_json_and_toml_give_the_config_back(
    tmp_path_factory: pytest.TempPathFactory, drawn: Config
) -> None:
    folder = tmp_path_factory.mktemp("config")
    (folder / "a.json").write_text(drawn.to_json(), encoding="utf-8")
    (folder / "a.toml").write_text(drawn.to_toml(), encoding="utf-8")
    assert config_from_dict(drawn.to_dict()) == drawn
    assert config_from_file(folder / "a.json") == drawn
    assert config_from_file(folder / "a.toml") == drawn


@pytest.mark.parametrize("name", variants())
def test_every_variant_survives_toml_and_is_recognised_with_other_classes(
    name: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.toml"
    path.write_text(config(name, num_classes=7).to_toml(), encoding="utf-8")
    # The two have the same numbers: 14_resnext differs from 14 in its heads alone.
    assert variant_name(config_from_file(path)) == name


@pytest.mark.parametrize(
    ("name", "changes", "found"),
    [
        ("deit_b16", {"preprocess.crop_fraction": 1.0}, "vit_b16"),  # the first of that function
        ("deit_b16_distilled", {"preprocess.crop_fraction": 1.0}, "deit_b16_distilled"),
        ("deit_b16_distilled", {"dist_head": False, "num_classes": 0}, None),
        ("vit_b16", {"num_classes": 0}, "vit_b16"),
        ("vit_b16", {"pre_logits_dim": 768}, None),
        ("vit_b16", {"in_channels": 1}, None),
    ],
)
def test_a_variant_is_recognised_by_what_makes_it_another_model(
    name: str, changes: dict[str, Any], found: str | None
) -> None:
    assert variant_name(config(name, **changes)) == found


@pytest.mark.parametrize("family", FAMILIES)
def test_json_schema_knows_every_field_and_refuses_others(family: str) -> None:
    schema = json_schema(config_class(family))
    definition = schema["$defs"][config_class(family).__name__]
    assert definition["properties"].keys() == CONFIGS[family].to_dict().keys()
    assert definition["additionalProperties"] is False
    assert definition["properties"]["family"] == {"enum": [family]}
    classes = definition["properties"]["num_classes"]
    assert (classes["type"], classes["minimum"]) == ("integer", 0)


def test_json_schema_takes_any_family_where_a_config_does() -> None:
    schema = json_schema(config_class("distill"))
    assert schema["$defs"]["DistillConfig"]["properties"]["student"]["$ref"] == "#/$defs/Config"
    refs = [option["$ref"] for option in schema["$defs"]["Config"]["anyOf"]]
    assert refs == [f"#/$defs/{name}Config" for name in FAMILIES.values()]
    assert {ref.rpartition("/")[2] for ref in refs} <= schema["$defs"].keys()
    assert schema["$defs"]["ViTConfig"] == json_schema(ViTConfig)["$defs"]["ViTConfig"]


def test_json_schema_says_the_values_of_a_choice() -> None:
    properties = json_schema(ViTConfig)["$defs"]["ViTConfig"]["properties"]
    assert properties["depth"] == {"type": "integer", "minimum": 0, "default": 12}
    assert properties["pool"]["enum"] == ["cls", "mean", "mean_patches", "none"]


@pytest.mark.parametrize("family", FAMILIES)
def test_json_that_the_schema_allows_decodes_to_the_same_config(family: str) -> None:
    """Whoever reads the JSON by its type alone, as the schema promises, gets the same config."""
    text = CONFIGS[family].to_json()
    assert msgspec.json.decode(text, type=config_class(family)) == CONFIGS[family]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("a.toml", 'variant = "vit_s16"\nnum_classes = 10\n[preprocess]\ncrop_fraction = 1.0\n'),
        (
            "a.json",
            '{"variant": "vit_s16", "num_classes": 10, "preprocess": {"crop_fraction": 1.0}}',
        ),
    ],
)
def test_file_with_a_variant_changes_only_what_it_says(
    tmp_path: Path, file: str, text: str
) -> None:
    (tmp_path / file).write_text(text, encoding="utf-8")
    wanted = config("vit_s16", num_classes=10, **{"preprocess.crop_fraction": 1.0})
    assert config_from_file(tmp_path / file) == wanted
    assert wanted.preprocess.mean == config("vit_s16").preprocess.mean


def test_one_number_stands_for_a_pair_and_lists_for_tuples() -> None:
    wanted = ViTConfig(image_size=(32, 32), patch_size=(8, 8))
    assert ViTConfig(image_size=32, patch_size=8) == wanted
    assert ViTConfig(image_size=[32, 32], patch_size=[8, 8]) == wanted
    layers = T2TViTConfig(t2t_layers=[[7, 4, 2], (3, 2, 1)]).t2t_layers
    assert layers == (SoftSplit(7, 4, 2), SoftSplit(3, 2, 1))
    assert layers[0].kernel == 7


@pytest.mark.parametrize(
    "size", ["7", "10", "12", "14", "19", "24", "t_14", "t_19", "t_24", "14_wide", "14_resnext"]
)
def test_older_names_are_aliases(size: str) -> None:
    assert config(f"T2t_vit_{size}") is config(f"t2t_vit_{size}")


def test_a_config_is_frozen_and_hashable() -> None:
    with pytest.raises(AttributeError):
        config("vit_s16").depth = 3
    assert len({config("vit_s16"), config("vit_s16").replace(), config("vit_s32")}) == 2


def test_replace_reaches_nested_fields_by_dots_and_leaves_the_rest() -> None:
    changed = config("vit_s16").replace(depth=3, **{"preprocess.interpolation": "bilinear"})
    assert (changed.depth, changed.preprocess.interpolation) == (3, "bilinear")
    restored = changed.replace(depth=12, **{"preprocess.interpolation": "bicubic"})
    assert restored == config("vit_s16")


def test_other_channels_get_plain_statistics_unless_some_are_given() -> None:
    grey = config("t2t_vit_14", in_channels=1)
    assert (grey.preprocess.mean, grey.preprocess.std) == ((0.5,), (0.5,))
    assert grey.preprocess.crop_fraction == config("t2t_vit_14").preprocess.crop_fraction
    given = config("t2t_vit_14", in_channels=1, **{"preprocess.mean": [0.1], "preprocess.std": [2]})
    assert (given.preprocess.mean, given.preprocess.std) == ((0.1,), (2.0,))


def test_assignments_are_json_or_else_plain_strings() -> None:
    words = ["depth=2", "image_size=[32,64]", "pool=mean", "head_dim=null", "a.b=x=y"]
    assert parse_assignments(words) == {
        "depth": 2,
        "image_size": [32, 64],
        "pool": "mean",
        "head_dim": None,
        "a.b": "x=y",
    }


VIT_REFUSALS: list[tuple[dict[str, Any], str]] = [
    # misspelt and unknown fields
    ({"embed_dims": 3}, "config: embed_dims: no such field of vit; did you mean embed_dim?"),
    ({"zzz": 3}, "config: zzz: no such field of vit; fields: activation, "),
    ({"preprocess.meen": [1]}, "meen: no such field of preprocess; did you mean mean?"),
    ({"depth.x": 3}, "depth.x: depth has no fields of its own"),
    # types
    ({"depth": "two"}, "depth='two': wanted int, got str"),
    ({"depth": 2.5}, "depth=2.5: wanted int, got float"),
    ({"depth": True}, "depth=True: wanted int, got bool"),
    ({"qkv_bias": 1}, "qkv_bias=1: wanted bool, got int"),
    ({"head_dim": "null"}, "head_dim='null': wanted int | null, got str"),
    ({"preprocess": 3}, "preprocess=3: wanted a table of fields"),
    ({"image_size": [1, 2, 3]}, "image_size=[1, 2, 3]: wanted array of length 2, got 3"),
    ({"in_channels": [3]}, "in_channels=[3]: wanted int, got array"),
    # ranges
    ({"depth": -1}, "depth=-1: wanted int >= 0"),
    ({"num_heads": 0}, "num_heads=0: wanted int >= 1"),
    ({"in_channels": 0}, "in_channels=0: wanted int >= 1"),
    ({"image_size": 0}, "image_size[0]="),
    ({"norm_eps": 0.0}, "norm_eps=0.0: wanted float > 0.0"),
    ({"norm_eps": float("nan")}, "norm_eps=nan: wanted float > 0.0"),
    ({"dropout_rate": 1.0}, "dropout_rate=1.0: wanted float < 1.0"),
    ({"preprocess.crop_fraction": 1.5}, "preprocess.crop_fraction="),
    ({"preprocess.std": [0.5, 0.5, 0.0]}, "preprocess.std[2]="),
    # choices
    ({"activation": "relu"}, "activation='relu': wanted one of gelu, gelu_tanh"),
    ({"pool": "max"}, "pool='max': wanted one of cls, mean, mean_patches, none"),
    # rules between fields
    (
        {"image_size": 225},
        "image_size=(225, 225): height 225 must be divisible by the height of patch_size=(16, 16)",
    ),
    (
        {"image_size": [224, 10]},
        "image_size=(224, 10): width 10 must be divisible by the width of patch_size=(16, 16)",
    ),
    (
        {"num_heads": 5},
        "embed_dim=384: must be divisible by num_heads=5, unless head_dim is given",
    ),
    (
        {"attn_proj": False, "head_dim": 3},
        "attn_proj=False: num_heads * head_dim = 18 needs a projection to embed_dim=384",
    ),
    ({"class_token": False}, "pool='cls': needs class_token=true"),
    ({"pool": "none"}, "pool='none': every token comes out: needs num_classes=0"),
    (
        {"pool": "none", "num_classes": 0, "final_norm": "pooled"},
        "pool='none': every token comes out: needs num_classes=0 and final_norm other than pooled",
    ),
    (
        {"dist_token": True, "class_token": False, "pool": "mean"},
        "dist_token=True: stands behind the class token: needs class_token=true",
    ),
    *(
        (
            {"dist_token": True, "dist_head": True, **changes},
            "dist_head=True: needs dist_token=true, num_classes > 0, pool=cls and "
            "final_norm=tokens",
        )
        for changes in (
            {"dist_token": False},
            {"num_classes": 0},
            {"pool": "mean"},
            {"final_norm": "none"},
            {"final_norm": "pooled"},
        )
    ),
    *(
        (
            {"pre_logits_dim": 5, **changes},
            "pre_logits_dim=5: needs one pooled vector: pool other than none, and dist_head=false",
        )
        for changes in (
            {"pool": "none", "num_classes": 0},
            {"dist_token": True, "dist_head": True},
        )
    ),
    ({"pre_logits_dim": 0}, "pre_logits_dim=0: wanted int >= 1"),
    (
        {"preprocess.mean": [0.5]},
        "preprocess.mean=(0.5,): needs one number for each of in_channels=3",
    ),
]

T2T_REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"t2t_layers": 3}, "t2t_layers=3: wanted array, got int"),
    ({"t2t_layers": []}, "t2t_layers=(): needs one or more"),
    ({"t2t_layers": [[3, 2]]}, "t2t_layers[0]=[3, 2]: wanted array of length 3, got 2"),
    ({"t2t_layers": [[3, 0, 1]]}, "t2t_layers[0][1]="),
    (
        {"t2t_layers": [[7, 4, 2], [3, 2, 2]]},
        "t2t_layers[1].padding=2: must be less than half of kernel=3, or a patch holds no pixel",
    ),
    (
        {"image_size": 2},
        "t2t_layers[0]=(7, 4, 2): no patch fits: image_size=(2, 2) leaves a grid of 0 x 0",
    ),
    (
        {"performer_features": 65},
        "performer_features=65: orthogonal features number at most token_dim=64",
    ),
    (
        {"token_mixer": "convolution"},
        "token_mixer='convolution': wanted one of performer, transformer, full",
    ),
]

TWINS_REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"embed_dims": []}, "embed_dims=(): needs one stage or more"),
    (
        {"depths": [2, 2]},
        "depths=(2, 2): needs one number for each of the 4 stages of embed_dims",
    ),
    ({"peg_kernel_size": 4}, "peg_kernel_size=4: must be odd: the grid stays as it is"),
    ({"peg_after": [1, 3, 1, 1]}, "peg_after[1]=3: must be at most depths[1]=2"),
    ({"pool": "none"}, "pool='none': every token comes out: needs num_classes=0"),
    (
        {"num_heads": [3, 4, 8, 16]},
        "embed_dims[0]=64: must be divisible by num_heads[0]=3, unless head_dim is given",
    ),
    (
        {"image_size": [224, 220]},
        "patch_sizes[1]=2: must divide its input, which image_size=(224, 220) leaves 56 x 55",
    ),
    (
        {"reductions": [8, 4, 2, 8]},
        "reductions[3]=8: must fit the grid, which image_size=(224, 224) leaves 7 x 7",
    ),
]


CAIT_REFUSALS: list[tuple[dict[str, Any], str]] = [
    (
        {"image_size": 225},
        "image_size=(225, 225): height 225 must be divisible by the height of patch_size=(16, 16)",
    ),
    (
        {"num_heads": 5},
        "embed_dim=384: must be divisible by num_heads=5, unless head_dim is given",
    ),
    ({"pool": "none"}, "pool='none': every token comes out: needs num_classes=0"),
    (
        {"cls_depth": 0},
        "cls_depth=0: pool=cls needs one or more: without, the class token never sees the patches",
    ),
    ({"cls_norm": "patches"}, "cls_norm='patches': wanted one of tokens, cls"),
    ({"cls_mlp_dim": 0}, "cls_mlp_dim=0: wanted int >= 1"),
]

DEEPVIT_REFUSALS: list[tuple[dict[str, Any], str]] = [
    (
        {"image_size": (224, 200)},
        "image_size=(224, 200): width 200 must be divisible by the width of patch_size=(16, 16)",
    ),
    (
        {"patch_size": 7},
        "patch_size=(7, 7): must be even: the first of patch_embed=convs has a stride of 2",
    ),
    ({"re_attention_depth": -1}, "re_attention_depth=-1: wanted int >= 0"),
    (
        {"re_attention_norm": "none"},
        "re_attention_norm='none': wanted one of batch_norm, layer_norm",
    ),
    ({"branch_scale": 0.0}, "branch_scale=0.0: wanted float > 0.0"),
]


CROSSVIT_REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"embed_dim": [192]}, "embed_dim=[192]: wanted array of length 2, got 1"),
    ({"branch_depth": [1, -1]}, "branch_depth[1]=-1: wanted int >= 0"),
    ({"image_scale": [1.0, 0.0]}, "image_scale[1]=0.0: wanted float > 0.0"),
    (
        {"image_scale": [1.0, 0.5]},
        "image_scale[1]=0.5: makes the height of image_size=(240, 240) 120, which must be "
        "divisible by patch_size[1]=16",
    ),
    (
        {"image_scale": [0.001, 1.0]},
        "image_scale[0]=0.001: makes the height of image_size=(240, 240) 0, which must be "
        "divisible by patch_size[0]=12",
    ),
    (
        {"patch_embed": "conv_stem", "patch_size": [12, 8]},
        "patch_size[1]=8: patch_embed=conv_stem is for patches of 12 or 16",
    ),
    (
        {"patch_embed": "conv_stem", "embed_dim": [3, 384], "num_heads": [3, 3]},
        "embed_dim[0]=3: patch_embed=conv_stem starts at a quarter of it: needs 4 or more",
    ),
    (
        {"num_heads": [5, 6]},
        "embed_dim[0]=192: must be divisible by num_heads[0]=5, unless head_dim is given",
    ),
    (
        {"cross_num_heads": 7},
        "embed_dim[0]=192: must be divisible by the 7 heads of the fusion, unless cross_head_dim "
        "is given",
    ),
    ({"cross_depth": 2}, "cross_depth=2: fusion=projected replaces the class token: needs "),
]


NEST_REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"embed_dims": []}, "embed_dims=(): needs one level or more"),
    ({"depths": [2, 2]}, "depths=(2, 2): needs one number for each of the 3 levels of embed_dims"),
    ({"num_heads": [3]}, "num_heads=(3,): needs one number for each of the 3 levels of embed_dims"),
    ({"depths": [2, -1, 8]}, "depths[1]=-1: wanted int >= 0"),
    (
        {"num_heads": [3, 5, 12]},
        "embed_dims[1]=192: must be divisible by num_heads[1]=5, unless head_dim is given",
    ),
    (
        {"image_size": [224, 220]},
        "image_size=(224, 220): width 220 must be divisible by 16: the width of patch_size=(4, 4) "
        "times the 4 blocks of the first level",
    ),
    ({"pool_padding": "same"}, "pool_padding='same': wanted one of end, both"),
]


LEVIT_REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"embed_dims": []}, "embed_dims=(): needs one stage or more"),
    ({"depths": [2, 3]}, "depths=(2, 3): needs 3 items: embed_dims=(128, 256, 384) has 3 stages"),
    ({"num_heads": [4]}, "num_heads=(4,): needs 3 items"),
    ({"down_heads": [8, 16, 24]}, "down_heads=(8, 16, 24): needs 2 items"),
    ({"depths": [2, -1, 4]}, "depths[1]=-1: wanted int >= 0"),
    ({"num_classes": 0}, "dist_head=True: needs num_classes > 0"),
    ({"attn_activation": "swish"}, "attn_activation='swish': wanted one of hardswish, gelu"),
]


CVT_REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"embed_dims": []}, "embed_dims=(): needs one stage or more"),
    ({"depths": [1, 2]}, "depths=(1, 2): needs one number for each of the 3 stages of embed_dims"),
    ({"depths": [1, 0, 2]}, "depths[1]=0: wanted int >= 1"),
    ({"num_heads": [1, 3, 5]}, "embed_dims[2]=384: must be divisible by num_heads[2]=5"),
    ({"qkv_kernel_sizes": [3, 2, 3]}, "qkv_kernel_sizes[1]=2: must be odd"),
    (
        {"patch_paddings": [2, 3, 1]},
        "patch_paddings[1]=3: must be less than patch_sizes[1]=3, or a patch holds no token",
    ),
    (
        {"image_size": 8, "patch_paddings": [2, 0, 0]},
        "patch_sizes[1]=3: must fit its input, which image_size=(8, 8) leaves 2 x 2",
    ),
    ({"class_token": False}, "pool='cls': needs class_token=true"),
    ({"pool": "mean"}, "pool='mean': needs class_token=false"),
    ({"pool": "none"}, "pool='none': every token comes out: needs num_classes=0"),
    ({"activation": "swish"}, "activation='swish': wanted one of gelu, gelu_tanh, quick_gelu"),
]


REGIONVIT_REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"embed_dims": []}, "embed_dims=(): needs one stage or more"),
    (
        {"depths": [2, 2]},
        "depths=(2, 2): needs one number for each of the 4 stages of embed_dims",
    ),
    (
        {"num_heads": [3, 4, 8, 16]},
        "embed_dims[0]=64: must be divisible by num_heads[0]=3, unless head_dim is given",
    ),
    (
        {"embed_dims": [64, 128, 192, 512], "num_heads": [1, 1, 1, 1]},
        "embed_dims[2]=192: must be a multiple of embed_dims[1], unless downsample=conv",
    ),
    ({"stem_dims": [16]}, "stem_dims=(16,): needs two widths or none"),
    ({"patch_size": 2}, "patch_size=2: must be 4, unless stem_dims is empty"),
    (
        {"patch_size": 1, "stem_dims": []},
        "patch_size=1: must be 2 or more: the convolution of one pixel would lose a row and a",
    ),
    (
        {"image_size": [224, 220]},
        "image_size=(224, 220): width 220 must be divisible by 28: patch_size=4 times window_size",
    ),
    (
        {"image_size": [84, 224]},
        "image_size=(84, 224): stage 1 has 11 rows of local tokens, which must be divisible by its",
    ),
    ({"peg": "all"}, "peg='all': wanted one of none, both, local"),
]


SE_REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"design": "resnext"}, "design='resnext': wanted one of se, ghost, dense"),
    ({"se_dim": 0}, "se_dim=0: wanted int >= 1"),
    ({"dense_depths": [14]}, "dense_depths=(14,): needs design=dense"),
    ({"num_heads": 5}, "embed_dim=384: must be divisible by num_heads=5"),
]


GHOST_REFUSALS: list[tuple[dict[str, Any], str]] = [
    (
        {"num_heads": 5, "head_dim": 7},
        "num_heads=5: half of q is a copy: needs an even number of channels in all heads, not 35",
    ),
    (
        {"mlp_dim": 1000},
        "mlp_dim=1000: must be a multiple of embed_dim=384: a part and its copies",
    ),
]


DENSE_REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"depth": 18}, "dense_depths=(3, 6, 6, 4): must sum to depth=18"),
    ({"dense_depths": [3, 0, 16]}, "dense_depths[1]=0: wanted int >= 1"),
    (
        {"dense_drop_path_steps": 2},
        "dense_drop_path_steps=2: must be a step for each of the 4 stages but the first",
    ),
    (
        {"dense_growth": 60},
        "num_heads=8: must divide the width of every block, of which one is 188, unless head_dim",
    ),
    (
        {"head_dim": 16, "attn_proj": False},
        "attn_proj=False: heads of head_dim=16 fill no other width than that of one block",
    ),
    (
        {"dense_growth": 1, "mlp_dim": 1, "head_dim": 4},
        "mlp_dim=1: leaves no hidden layer in a block of width 65",
    ),
]


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        *(("vit_s16", *row) for row in VIT_REFUSALS),
        *(("t2t_vit_14", *row) for row in T2T_REFUSALS),
        *(("cait_s24", *row) for row in CAIT_REFUSALS),
        *(("twins_svt_s", *row) for row in TWINS_REFUSALS),
        *(("crossvit_15", *row) for row in CROSSVIT_REFUSALS),
        *(("nest_t", *row) for row in NEST_REFUSALS),
        *(("deepvit_s", *row) for row in DEEPVIT_REFUSALS),
        *(("levit_128s", *row) for row in LEVIT_REFUSALS),
        *(("cvt_13", *row) for row in CVT_REFUSALS),
        *(("regionvit_ti", *row) for row in REGIONVIT_REFUSALS),
        *(("t2t_vit_14_se", *row) for row in SE_REFUSALS),
        *(("t2t_vit_16_ghost", *row) for row in GHOST_REFUSALS),
        *(("t2t_vit_dense", *row) for row in DENSE_REFUSALS),
    ],
)
def test_a_refusal_names_the_field_the_value_and_the_rule(
    model: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        config(model, **changes)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_blocks_of_the_dense_t2t_vit_are_those_of_the_official_code() -> None:
    """Stochastic depth is the i-th of twelve rates in all blocks of stage i, there as here."""
    dense = config("t2t_vit_dense", drop_path_rate=0.11)
    assert isinstance(dense, T2TViTDesignsConfig)
    widths = [128 + 64 * i for i in range(3)]
    widths += [160 + 64 * i for i in range(6)]
    widths += [272 + 64 * i for i in range(6)]
    widths += [328 + 64 * i for i in range(4)]
    assert [block.dim for block in dense.blocks] == widths
    assert [block.head_dim for block in dense.blocks] == [width // 8 for width in widths]
    assert [block.mlp_dim for block in dense.blocks] == [2 * width for width in widths]
    assert all(block.attn_scale == block.head_dim**-0.5 for block in dense.blocks)
    rates = [0.0] * 3 + [0.01] * 6 + [0.02] * 6 + [0.03] * 4
    assert [block.drop_path_rate for block in dense.blocks] == pytest.approx(rates)
    assert [i for i, layer in enumerate(dense.layers) if layer not in dense.blocks] == [3, 10, 17]
    assert dense.feature_dim == 584


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 0}, "image_size[0]=0: wanted int >= 1"),
        ({"preprocess.crop_fraction": 1.5}, "preprocess.crop_fraction=1.5: wanted float <= 1.0"),
        ({"preprocess.std": [0.5, 0.5, 0.0]}, "preprocess.std[2]=0.0: wanted float > 0.0"),
        (
            {"preprocess.interpolation": "nearest"},
            "preprocess.interpolation='nearest': wanted one of bilinear, bicubic",
        ),
        (
            {"preprocess.aspect": "stretch"},
            "preprocess.aspect='stretch': wanted one of keep, squash",
        ),
    ],
)
def test_a_nested_refusal_shows_the_nested_value(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config("vit_s16", **changes)
    assert str(caught.value) == message


def test_a_preprocess_object_is_checked_like_plain_data() -> None:
    with pytest.raises(ConfigError, match=r"crop_fraction.*wanted float <= 1.0"):
        ViTConfig(preprocess=Preprocess(crop_fraction=4.0))


@pytest.mark.parametrize("field", ["norm_eps", "layer_scale_init", "attn_scale"])
def test_a_number_that_json_cannot_hold_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}=inf"):
        config("vit_s16", **{field: float("inf")})


def test_the_family_of_a_variant_cannot_be_changed() -> None:
    with pytest.raises(ConfigError, match="family='t2t_vit': "):
        config("vit_s16", family="t2t_vit")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"family": "resnet"}', "family='resnet': must be one of vit, t2t_vit"),
        ("{}", "family=None: must be one of vit, t2t_vit"),
        ('{"family": ["vit"]}', r"family=\['vit'\]: must be one of vit, t2t_vit"),
        ('{"family": "vit", "depht": 2}', "depht: no such field of vit; did you mean depth?"),
        ('{"variant": "vit_s16", "depht": 2}', "depht: no such field of vit; did you mean depth?"),
        ('{"variant": "vit_s61"}', "no model named 'vit_s61'; did you mean vit_s16"),
        ('{"variant": "vit_s16", "family": "t2t_vit"}', "the model's family is vit"),
        ("[1, 2]", "wanted a table of fields, got list"),
        ('{"family": ', "wanted a config as JSON or TOML, but"),
    ],
)
def test_a_bad_config_file_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        config_from_file(path)
    assert "\n" not in str(caught.value)


def test_a_config_file_that_is_absent_binary_or_bad_toml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*absent\.toml: No such file"):
        config_from_file(tmp_path / "absent.toml")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "bad.toml").write_text("depth = = 2", encoding="utf-8")
    for name in ("binary.json", "bad.toml"):
        with pytest.raises(InputError, match="wanted a config as JSON or TOML"):
            config_from_file(tmp_path / name)


@pytest.mark.parametrize("word", ["depth", "=3"])
def test_an_assignment_without_a_field_or_value_is_refused(word: str) -> None:
    with pytest.raises(InputError, match=f"--set {word}: wanted FIELD=VALUE"):
        parse_assignments([word])
