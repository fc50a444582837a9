"""Layouts: names and axes of a backend, there and back, and what does not fit, all at once."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isovit.backends import BACKENDS
from isovit.errors import FitError
from isovit.spec.families import param_tree
from isovit.spec.initialize import probe
from isovit.spec.layout import (
    CANONICAL,
    Layout,
    check_weights,
    from_native,
    native_path,
    permutation,
    to_native,
)
from isovit.spec.param import Param, Role
from tests.small import CONFIGS, VIT

LAYOUTS: dict[str, Layout] = {
    name: import_module(f"isovit.backends.{name}.layout").LAYOUT for name in BACKENDS
}
PARAMS = param_tree(VIT).parameters()
WEIGHTS = probe(VIT)


@pytest.mark.parametrize("backend", LAYOUTS)
@pytest.mark.parametrize("family", CONFIGS)
def test_a_layout_and_its_inverse_give_the_weights_back(backend: str, family: str) -> None:
    params, weights = param_tree(CONFIGS[family]).parameters(), probe(CONFIGS[family])
    native = to_native(params, weights, LAYOUTS[backend])
    assert len(native) == len(weights)
    back = from_native(params, native, LAYOUTS[backend])
    assert list(back) == list(weights)
    for name in weights:
        np.testing.assert_array_equal(back[name], weights[name])


@pytest.mark.parametrize("backend", LAYOUTS)
def test_a_layout_covers_every_role_with_the_canonical_axes_in_some_order(backend: str) -> None:
    layout = LAYOUTS[backend]
    assert layout.keys() == set(Role) == CANONICAL.keys()
    for role, leaf in layout.items():
        assert sorted(leaf.axes.split()) == sorted(CANONICAL[role].axes.split())
        assert bool(leaf.name) == (role is not Role.OWN)


def test_torch_keeps_outputs_first_and_names_its_leaves_weight_and_bias() -> None:
    native = to_native(PARAMS, WEIGHTS, LAYOUTS["torch"])
    dense, conv = WEIGHTS["blocks.0.mlp.fc1.kernel"], WEIGHTS["patch_embed.proj.kernel"]
    np.testing.assert_array_equal(native["blocks.0.mlp.fc1.weight"], dense.T)
    found = native["patch_embed.proj.weight"]
    assert found.shape == (12, 3, 8, 6)
    assert found[4, 2, 1, 5] == conv[1, 5, 2, 4]
    np.testing.assert_array_equal(native["norm.weight"], WEIGHTS["norm.scale"])


def test_keras_calls_scale_and_bias_of_a_norm_gamma_and_beta() -> None:
    native = to_native(PARAMS, WEIGHTS, LAYOUTS["keras"])
    np.testing.assert_array_equal(native["norm.gamma"], WEIGHTS["norm.scale"])
    np.testing.assert_array_equal(native["norm.beta"], WEIGHTS["norm.bias"])
    np.testing.assert_array_equal(native["head.bias"], WEIGHTS["head.bias"])


def test_flax_is_canonical() -> None:
    native = to_native(PARAMS, WEIGHTS, LAYOUTS["flax"])
    assert native.keys() == WEIGHTS.keys()
    assert all(np.array_equal(native[name], WEIGHTS[name]) for name in WEIGHTS)


@given(st.permutations("abcde"), st.permutations("abcde"))
def test_permutations_are_each_others_inverse(first: list[str], second: list[str]) -> None:
    source, target = " ".join(first), " ".join(second)
    sizes = {letter: size for size, letter in enumerate("abcde", start=1)}
    array = np.zeros([sizes[letter] for letter in first])
    there = array.transpose(permutation(source, target, 5))
    assert there.shape == tuple(sizes[letter] for letter in second)
    assert there.transpose(permutation(target, source, 5)).shape == array.shape


def test_a_role_without_letters_keeps_its_axes() -> None:
    assert permutation("", "", 3) == (0, 1, 2)


def test_only_the_leaf_of_a_path_changes() -> None:
    param = PARAMS["blocks.1.norm2.scale"]
    assert native_path("blocks.1.norm2.scale", param, LAYOUTS["torch"]) == "blocks.1.norm2.weight"
    assert native_path("cls_token", PARAMS["cls_token"], LAYOUTS["torch"]) == "cls_token"


def faulty(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One array missing, one unexpected, one misshaped."""
    weights = {name: array for name, array in weights.items() if name != "cls_token"}
    weights["extra"] = np.zeros((2, 3), np.float32)
    weights["head.bias"] = np.zeros(4, np.float32)
    return weights


PROBLEMS = (
    "missing cls_token (1, 1, 12)",
    "unexpected extra (2, 3)",
    "misshaped head.bias: wanted (5,), got (4,)",
)


@pytest.mark.parametrize("backend", LAYOUTS)
def test_one_error_lists_all_that_does_not_fit(backend: str) -> None:
    layout = LAYOUTS[backend]
    with pytest.raises(FitError) as canonical:
        check_weights(PARAMS, faulty(WEIGHTS))
    with pytest.raises(FitError) as forth:
        to_native(PARAMS, faulty(WEIGHTS), layout)
    with pytest.raises(FitError) as back:
        from_native(PARAMS, faulty(to_native(PARAMS, WEIGHTS, layout)), layout)
    for caught in (canonical, forth, back):
        assert caught.value.problems == PROBLEMS
        assert str(caught.value).endswith("; ".join(PROBLEMS))


def test_a_long_list_of_problems_is_cut_in_the_message_alone() -> None:
    with pytest.raises(FitError) as caught:
        check_weights(PARAMS, {})
    assert len(caught.value.problems) == len(PARAMS)
    assert str(caught.value).count("missing") == FitError.SHOWN
    assert str(caught.value).endswith(f"and {len(PARAMS) - FitError.SHOWN} more")


def test_a_square_kernel_is_transposed_though_its_shape_would_fit() -> None:
    params = {"fc.kernel": Param("kernel", (2, 2), Role.DENSE_KERNEL, PARAMS["norm.scale"].init)}
    kernel = np.array([[1, 2], [3, 4]], np.float32)
    native = to_native(params, {"fc.kernel": kernel}, LAYOUTS["torch"])
    np.testing.assert_array_equal(native["fc.weight"], [[1, 3], [2, 4]])
