"""Rename tables: each row kind, index arithmetic, and strictness on both sides."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isovit.backends.torch.layout import LAYOUT as TORCH
from isovit.errors import FitError, InputError
from isovit.spec.families import FAMILIES, param_tree
from isovit.spec.initialize import probe
from isovit.spec.layout import CANONICAL
from isovit.spec.param import ZEROS, Param, Role
from isovit.weight_convert.formats import FORMATS, rename_table
from isovit.weight_convert.rename import (
    RenameTable,
    convolve,
    drop,
    fuse,
    interleave,
    parameter,
    pixelwise,
    rename,
    reorder,
    repeated,
    squeeze,
)
from tests.small import CONFIGS, T2T, VIT

Arrays = dict[str, np.ndarray]


def dense(path: str, in_dim: int, out_dim: int) -> dict[str, Param]:
    """A dense layer with kernel and bias."""
    return {
        f"{path}.kernel": Param("kernel", (in_dim, out_dim), Role.DENSE_KERNEL, ZEROS),
        f"{path}.bias": Param("bias", (out_dim,), Role.BIAS, ZEROS),
    }


def own(path: str, *shape: int) -> dict[str, Param]:
    """A parameter of the model's own."""
    return {path: Param(path.rpartition(".")[2], shape, Role.OWN, ZEROS)}


def numbered(params: dict[str, Param]) -> Arrays:
    """Weights in which no number occurs twice."""
    counts = iter(range(10_000))
    return {
        path: np.array([next(counts) for _ in range(int(np.prod(param.shape)))], np.float32)
        .reshape(param.shape)
        for path, param in params.items()
    }  # fmt: skip


def assert_round_trip(table: RenameTable, params: dict[str, Param], weights: Arrays) -> Arrays:
    """Write, read back, compare; gives what was written."""
    foreign = dict(table.write(params, weights, TORCH))
    back = table.read(params, foreign, TORCH)
    assert list(back) == list(params)
    for name in weights:
        np.testing.assert_array_equal(back[name], weights[name])
    return foreign


def test_a_row_renames_a_module_with_all_its_leaves() -> None:
    params = {**dense("blocks.0.mlp.fc1", 2, 3), **dense("blocks.1.mlp.fc1", 2, 3)}
    weights = numbered(params)
    table = RenameTable(rename("layer.{i}.linear", "blocks.{i}.mlp.fc1"))
    foreign = assert_round_trip(table, params, weights)
    assert list(foreign) == [
        "layer.0.linear.weight",
        "layer.0.linear.bias",
        "layer.1.linear.weight",
        "layer.1.linear.bias",
    ]
    np.testing.assert_array_equal(
        foreign["layer.1.linear.weight"], weights["blocks.1.mlp.fc1.kernel"].T
    )


@pytest.mark.parametrize(
    ("pattern", "index", "wanted"),
    [
        ("a.{j}", 2, "a.2"),
        ("a.{j+1}", 2, "a.3"),
        ("a{4j+3}.b", 0, "a3.b"),
        ("a{4j+3}.b", 12, "a51.b"),
        ("a.{12}", 5, "a.12"),
    ],
)
def test_an_index_is_computed_from_the_index_of_the_target(
    pattern: str, index: int, wanted: str
) -> None:
    params = own(f"mixers.{index}.gamma", 3)
    table = RenameTable(rename(pattern, "mixers.{j}.gamma"))
    assert list(assert_round_trip(table, params, numbered(params))) == [wanted]


@given(st.integers(1, 9), st.integers(0, 9), st.integers(0, 120), st.integers(0, 120))
def test_index_arithmetic_holds_for_two_indices(a: int, b: int, i: int, j: int) -> None:
    params = own(f"x.{i}.y.{j}.gamma", 1)
    table = RenameTable(rename(f"s{{{a}i+{b}}}.t{{j}}", "x.{i}.y.{j}.gamma"))
    assert list(table.write(params, numbered(params), TORCH)) == [f"s{a * i + b}.t{j}"]


def test_a_dot_in_a_pattern_is_a_dot_and_an_index_is_a_number() -> None:
    table = RenameTable(rename("a.{i}", "x.{i}.gamma"))
    for path in ("x_0_gamma", "x.b.gamma", "x.0.0.gamma"):
        with pytest.raises(InputError, match="the format has no place for"):
            table.write(own(path, 1), numbered(own(path, 1)), TORCH)


def test_fuse_puts_foreign_modules_side_by_side_along_the_output() -> None:
    params = dense("blocks.4.attn.qkv", 2, 9)
    weights = numbered(params)
    table = RenameTable(fuse("layer.{i}.{query|key|value}", "blocks.{i}.attn.qkv"))
    foreign = assert_round_trip(table, params, weights)
    assert foreign.keys() == {
        f"layer.4.{name}.{leaf}"
        for name in ("query", "key", "value")
        for leaf in ("weight", "bias")
    }
    kernel, bias = weights["blocks.4.attn.qkv.kernel"], weights["blocks.4.attn.qkv.bias"]
    np.testing.assert_array_equal(foreign["layer.4.key.weight"], kernel[:, 3:6].T)
    np.testing.assert_array_equal(foreign["layer.4.value.bias"], bias[6:])


def test_fused_modules_may_have_shares_of_the_output() -> None:
    params = dense("blocks.4.attn.qkv", 2, 9)
    weights = numbered(params)
    table = RenameTable(fuse("layer.{i}.{to_q|to_kv}", "blocks.{i}.attn.qkv", shares=(1, 2)))
    foreign = assert_round_trip(table, params, weights)
    kernel, bias = weights["blocks.4.attn.qkv.kernel"], weights["blocks.4.attn.qkv.bias"]
    np.testing.assert_array_equal(foreign["layer.4.to_q.weight"], kernel[:, :3].T)
    np.testing.assert_array_equal(foreign["layer.4.to_kv.weight"], kernel[:, 3:].T)
    np.testing.assert_array_equal(foreign["layer.4.to_kv.bias"], bias[3:])
    wrong = {**foreign, "layer.4.to_kv.bias": bias[:3]}
    with pytest.raises(FitError, match=r"misshaped layer\.4\.to_kv\.bias: wanted \(6,\)"):
        table.read(params, wrong, TORCH)


def test_fused_modules_may_lie_side_by_side_within_each_head() -> None:
    """Two heads, each with one number of q and two of v."""
    params = dense("qv", 2, 6)
    weights = numbered(params)
    table = RenameTable(fuse("to_{q|v}", "qv", shares=(1, 2), by_head=2))
    foreign = assert_round_trip(table, params, weights)
    kernel, bias = weights["qv.kernel"], weights["qv.bias"]
    np.testing.assert_array_equal(foreign["to_q.weight"], kernel[:, [0, 3]].T)
    np.testing.assert_array_equal(foreign["to_v.weight"], kernel[:, [1, 2, 4, 5]].T)
    np.testing.assert_array_equal(foreign["to_v.bias"], bias[[1, 2, 4, 5]])


def test_interleave_puts_the_heads_of_an_input_together() -> None:
    params = dense("proj", 6, 2)
    weights = numbered(params)
    foreign = assert_round_trip(RenameTable(interleave("to", "proj", heads=3)), params, weights)
    # Their columns: the first number of each of three heads, then the second.
    wanted = weights["proj.kernel"].T[:, [0, 2, 4, 1, 3, 5]]
    np.testing.assert_array_equal(foreign["to.weight"], wanted)
    np.testing.assert_array_equal(foreign["to.bias"], weights["proj.bias"])


def test_pixelwise_modules_have_the_axes_of_an_image() -> None:
    norm = (("scale", Role.NORM_SCALE), ("bias", Role.NORM_BIAS))
    params = {
        **dense("fc1", 2, 3),
        **{f"norm.{leaf}": Param(leaf, (2,), role, ZEROS) for leaf, role in norm},
    }
    weights = numbered(params)
    table = RenameTable(pixelwise(rename("net.1", "fc1")), pixelwise(rename("net.0", "norm")))
    foreign = assert_round_trip(table, params, weights)
    assert {name: array.shape for name, array in foreign.items()} == {
        "net.1.weight": (3, 2, 1, 1),
        "net.1.bias": (3,),
        "net.0.g": (1, 2, 1, 1),
        "net.0.b": (1, 2, 1, 1),
    }
    np.testing.assert_array_equal(foreign["net.1.weight"][..., 0, 0], weights["fc1.kernel"].T)
    np.testing.assert_array_equal(foreign["net.0.g"].ravel(), weights["norm.scale"])
    flat = {name: array.ravel() for name, array in foreign.items()}
    with pytest.raises(FitError, match=r"misshaped net\.0\.g: wanted \(1, 2, 1, 1\), got \(2,\)"):
        table.read(params, flat, TORCH)


def test_a_parameter_has_axes_of_its_own() -> None:
    """Also where its module has other leaves, which the rows of modules name."""
    params = {**dense("attn.mix", 3, 3), **own("scale.gamma", 4), **own("biases", 2, 5)}
    weights = numbered(params)
    table = RenameTable(
        parameter("mix_heads", "attn.mix.kernel", axes="i o"),
        rename("mix", "attn.mix"),
        parameter("scale", "scale.gamma", axes="1 1 a"),
        parameter("offsets", "biases", axes="b a"),
    )
    foreign = assert_round_trip(table, params, weights)
    assert list(foreign) == ["mix_heads", "mix.bias", "scale", "offsets"]
    np.testing.assert_array_equal(foreign["mix_heads"], weights["attn.mix.kernel"])
    np.testing.assert_array_equal(foreign["scale"], weights["scale.gamma"][None, None])
    np.testing.assert_array_equal(foreign["offsets"], weights["biases"].T)
    with pytest.raises(FitError, match=r"misshaped scale: wanted \(1, 1, 4\), got \(4,\)"):
        table.read(params, {**foreign, "scale": weights["scale.gamma"]}, TORCH)


def test_a_dense_layer_over_pixels_may_be_a_convolution_there() -> None:
    params = dense("proj", 2 * 3 * 4, 5)
    weights = numbered(params)
    foreign = assert_round_trip(RenameTable(convolve("conv", "proj", (2, 3, 4))), params, weights)
    np.testing.assert_array_equal(
        foreign["conv.weight"], weights["proj.kernel"].T.reshape(5, 2, 3, 4)
    )
    np.testing.assert_array_equal(foreign["conv.bias"], weights["proj.bias"])


def test_a_parameter_may_lie_in_another_order() -> None:
    params = own("biases", 2, 3)
    weights = numbered(params)
    for row, turned in (
        (rename("table", "biases"), False),
        (parameter("table", "biases", "b a"), True),
    ):
        foreign = assert_round_trip(RenameTable(reorder(row, lambda: [1, 2, 0])), params, weights)
        found = foreign["table"].T if turned else foreign["table"]
        np.testing.assert_array_equal(found[:, [1, 2, 0]], weights["biases"])


def test_keys_that_repeat_others_are_read_past_and_written() -> None:
    params = {**own("a.gamma", 2), **own("b.gamma", 3)}
    weights = numbered(params)
    table = RenameTable(
        rename("a", "a.gamma"),
        rename("b", "b.gamma"),
        repeated(r"again\..*", "the same", {"again.a": "a"}),
    )
    foreign = assert_round_trip(table, params, weights)
    assert list(foreign) == ["a", "b", "again.a"]
    np.testing.assert_array_equal(foreign["again.a"], weights["a.gamma"])
    del foreign["again.a"]  # as where a file has no array twice
    assert table.read(params, foreign, TORCH).keys() == params.keys()


def test_fuse_misses_each_part_by_name_and_checks_the_shape_of_each() -> None:
    params = dense("qkv", 2, 6)
    table = RenameTable(fuse("{q|k|v}", "qkv"))
    foreign = dict(table.write(params, numbered(params), TORCH))
    del foreign["k.weight"]
    foreign["v.bias"] = np.zeros(3, np.float32)
    with pytest.raises(FitError) as caught:
        table.read(params, foreign, TORCH)
    assert caught.value.problems == (
        "missing k.weight",
        "misshaped v.bias: wanted (2,), got (3,)",
    )


@pytest.mark.parametrize("shape", [(5, 4), (1, 5, 4), (1, 1, 5, 4)])
def test_squeeze_reads_either_form(shape: tuple[int, ...]) -> None:
    params = own("pos_embed", 1, 5, 4)
    weights = numbered(params)
    table = RenameTable(squeeze("pos_embedding", "pos_embed"))
    found = table.read(params, {"pos_embedding": weights["pos_embed"].reshape(shape)}, TORCH)
    np.testing.assert_array_equal(found["pos_embed"], weights["pos_embed"])


@pytest.mark.parametrize("shape", [(1, 4), (1, 1, 4)])
def test_squeeze_reads_a_class_token_and_writes_two_axes(shape: tuple[int, ...]) -> None:
    params = own("cls_token", 1, 1, 4)
    weights = numbered(params)
    table = RenameTable(squeeze("token", "cls_token"))
    assert assert_round_trip(table, params, weights)["token"].shape == (1, 4)
    found = table.read(params, {"token": weights["cls_token"].reshape(shape)}, TORCH)
    np.testing.assert_array_equal(found["cls_token"], weights["cls_token"])


def test_squeeze_still_refuses_another_shape() -> None:
    table = RenameTable(squeeze("pos_embedding", "pos_embed"))
    for shape in ((4, 5), (1, 20), (2, 5, 4), (20,)):
        with pytest.raises(FitError, match="misshaped pos_embedding"):
            table.read(own("pos_embed", 1, 5, 4), {"pos_embedding": np.zeros(shape)}, TORCH)


def test_dropped_keys_are_ignored_and_written_only_where_the_foreign_model_wants_them() -> None:
    params = own("gamma", 2)
    weights = numbered(params)
    table = RenameTable(
        rename("gamma", "gamma"),
        drop(r"layers\.\d+\.mask", "computed"),
        drop("cls_token", "empty: no class token", write=np.zeros((0, 3), np.float32)),
    )
    foreign = assert_round_trip(table, params, weights)
    assert foreign.keys() == {"gamma", "cls_token"}
    assert foreign["cls_token"].shape == (0, 3)
    foreign["layers.11.mask"] = np.zeros(1)
    assert table.read(params, foreign, TORCH).keys() == {"gamma"}
    foreign["layers.11.mask.more"] = np.zeros(1)
    with pytest.raises(FitError, match=r"unexpected layers\.11\.mask\.more"):
        table.read(params, foreign, TORCH)


def test_one_error_lists_every_missing_unexpected_and_misshaped_key() -> None:
    params = {**dense("fc1", 2, 3), **own("gamma", 2)}
    table = RenameTable(rename("one", "fc1"), rename("gamma", "gamma"))
    foreign = dict(table.write(params, numbered(params), TORCH))
    del foreign["one.bias"]
    foreign["one.weight"] = foreign["one.weight"].T
    foreign["two.weight"] = np.zeros((1, 2))
    with pytest.raises(FitError) as caught:
        table.read(params, foreign, TORCH)
    assert caught.value.problems == (
        "misshaped one.weight: wanted (3, 2), got (2, 3)",
        "missing one.bias",
        "unexpected two.weight (1, 2)",
    )


def test_a_parameter_without_a_row_is_refused_in_both_directions() -> None:
    params = {**own("gamma", 2), **own("beta", 2)}
    table = RenameTable(rename("gamma", "gamma"))
    with pytest.raises(InputError, match="the format has no place for beta"):
        table.write(params, numbered(params), TORCH)
    with pytest.raises(InputError, match="the format has no place for beta"):
        table.read(params, {"gamma": np.zeros(2)}, TORCH)


def test_a_row_serves_any_layout() -> None:
    params = dense("fc1", 2, 3)
    weights = numbered(params)
    foreign = RenameTable(rename("Dense_0", "fc1")).write(params, weights, CANONICAL)
    np.testing.assert_array_equal(foreign["Dense_0.kernel"], weights["fc1.kernel"])


FOREIGN = {
    "timm": (VIT, {}),
    "timm with layer scale and norm after pooling": (
        VIT,
        dict(layer_scale_init=0.1, pool="mean_patches", final_norm="pooled"),
    ),
    "vit_pytorch": (VIT, dict(patch_embed="norm_linear_norm", qkv_bias=False)),
    "vit_pytorch without class token": (
        VIT,
        dict(patch_embed="norm_linear_norm", qkv_bias=False, class_token=False, pool="mean"),
    ),
    "yitu": (T2T, {}),
    "yitu with transformers": (T2T, dict(token_mixer="transformer")),
    "vit_pytorch of T2T-ViT": (T2T, dict(token_mixer="full", pos_embed="learned")),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_every_foreign_table_gives_the_weights_back(case: str) -> None:
    config = FOREIGN[case][0].replace(**FOREIGN[case][1])
    table = rename_table(case.partition(" ")[0], config)
    assert_round_trip(table, param_tree(config).parameters(), probe(config))


def test_the_keys_of_the_official_t2t_vit_are_those_of_its_state_dict() -> None:
    table = rename_table("yitu", T2T)
    keys = table.write(param_tree(T2T).parameters(), probe(T2T), TORCH)
    assert {key for key in keys if key.startswith("tokens_to_token")} == {
        "tokens_to_token.attention1.w",
        *(
            f"tokens_to_token.attention1.{module}.{leaf}"
            for module in ("norm1", "kqv", "proj", "norm2", "mlp.0", "mlp.2")
            for leaf in ("weight", "bias")
        ),
        "tokens_to_token.project.weight",
        "tokens_to_token.project.bias",
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_format_of_another_family_is_refused(family: str) -> None:
    tables = import_module(f"isovit.weight_convert.families.{family}").TABLES
    format = next(name for name, row in FORMATS.items() if row.foreign and name not in tables)
    with pytest.raises(InputError, match=f"format {format} has no family {family}; wanted "):
        rename_table(format, CONFIGS[family])
