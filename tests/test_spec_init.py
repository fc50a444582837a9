"""Seeded weights: the same bits everywhere, and the distributions that the schemes promise."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest

from isovit.spec.config import Config
from isovit.spec.families import param_tree
from isovit.spec.initialize import INITIALIZERS, init, normal_features, probe, sinusoidal_positions
from isovit.spec.param import Init, Param
from isovit.spec.scheme import Scheme
from tests.small import CONFIGS, T2T, VIT

Weights = dict[str, np.ndarray]


def digest(weights: Weights) -> str:
    """SHA-256 of names, shapes, dtypes and bytes."""
    total = hashlib.sha256()
    for name, array in weights.items():
        total.update(f"{name} {array.shape} {array.dtype.str} ".encode())
        total.update(array.tobytes())
    return total.hexdigest()


def drawn(kind: str, shape: tuple[int, ...], value: float, seed: int = 0) -> np.ndarray:
    return INITIALIZERS[kind](np.random.default_rng(seed), shape, Init(kind, value))


def parameters(config: Config) -> dict[str, Param]:
    return param_tree(config).parameters()


# These change only with the generator, that is, on purpose and with a line in the changelog:
# everyone's seeded weights change with them.
PINNED = {
    "vit init": (init, VIT, "2891e03b3e3764ceff88ba3e6de28f0f35b153e4e78ef6fe71417dc813605bd6"),
    "t2t_vit init": (init, T2T, "69a6adaf3824a64f73c9fe7d83c116a85fb1c780dfdb831cc23f801c471906f0"),
    "vit probe": (probe, VIT, "177111f40cb8e63aa3e8eea33d49615515c38618826e308cdc4264fede87178f"),
    "t2t_vit probe": (
        probe,
        T2T,
        "4434846f9eb7cd2abcf8d79ac32eccab84439c5221e45a95e5b6df0504aa7dff",
    ),
}


@pytest.mark.parametrize("name", PINNED)
def test_the_weights_of_seed_0_are_the_pinned_bits(name: str) -> None:
    draw, config, wanted = PINNED[name]
    assert digest(draw(config)) == wanted


@pytest.mark.parametrize("draw", [init, probe])
@pytest.mark.parametrize("family", CONFIGS)
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(draw, family: str) -> None:
    config = CONFIGS[family]
    first, second, other = draw(config, 7), draw(config, 7), draw(config, 8)
    assert digest(first) == digest(second)
    kinds = ("trunc_normal", "normal", "uniform")
    random = [name for name, param in parameters(config).items() if param.init.kind in kinds]
    assert len(random) >= 4
    for name in random:
        assert not np.array_equal(first[name], other[name]), name


@pytest.mark.parametrize("draw", [init, probe])
def test_a_parameter_depends_neither_on_the_others_nor_on_their_order(draw) -> None:
    shallow, deep = draw(VIT.replace(depth=1, num_classes=0)), draw(VIT)
    assert shallow.keys() < deep.keys()
    for name in shallow:
        np.testing.assert_array_equal(shallow[name], deep[name])


@pytest.mark.parametrize("draw", [init, probe])
@pytest.mark.parametrize("family", CONFIGS)
def test_weights_are_float32_in_the_order_and_shapes_of_the_tree(draw, family: str) -> None:
    config = CONFIGS[family]
    shapes = {name: param.shape for name, param in parameters(config).items()}
    weights = draw(config)
    assert list(weights) == list(shapes)
    assert {name: array.shape for name, array in weights.items()} == shapes
    assert {array.dtype for array in weights.values()} == {np.dtype(np.float32)}


def test_probe_weights_leave_fixed_parameters_alone_and_show_all_others() -> None:
    usual, probed = init(T2T, 3), probe(T2T, 3)
    fixed = {name for name, param in parameters(T2T).items() if not param.trainable}
    assert fixed == {"pos_embed", "tokens_to_token.mixers.0.random_features"}
    for name, array in probed.items():
        assert np.array_equal(array, usual[name]) == (name in fixed), name
        assert np.ptp(array) > 0, f"{name} is constant: a fault in it could hide"


def test_probe_kernels_keep_the_variance_of_their_input() -> None:
    weights = probe(VIT.replace(embed_dim=384, num_heads=6, mlp_dim=512))
    kernel = weights["blocks.0.mlp.fc1.kernel"]
    assert kernel.std() == pytest.approx(384**-0.5, rel=0.02)
    assert weights["blocks.0.norm1.scale"].mean() == pytest.approx(1, abs=0.05)
    assert weights["blocks.0.norm1.scale"].std() == pytest.approx(0.2, rel=0.15)


N = 200_000


def test_constants_are_constant() -> None:
    assert set(drawn("constant", (3, 5), 0.1).ravel()) == {np.float32(0.1)}


def test_normal_has_its_deviation() -> None:
    values = drawn("normal", (N,), 0.5)
    assert values.mean() == pytest.approx(0, abs=0.005)
    assert values.std() == pytest.approx(0.5, rel=0.01)
    assert np.abs(values).max() > 2  # beyond four deviations: not cut


def test_uniform_fills_its_bounds() -> None:
    values = drawn("uniform", (N,), 0.5)
    assert np.abs(values).max() <= 0.5
    assert values.std() == pytest.approx(1 / math.sqrt(12), rel=0.01)


def test_timms_truncation_is_at_two_in_absolute_units() -> None:
    """For the usual 0.02 that is 100 deviations: an uncut normal. For 1.0 it bites."""
    narrow, wide = drawn("trunc_normal", (N,), 0.02), drawn("trunc_normal", (N,), 1.0)
    assert narrow.std() == pytest.approx(0.02, rel=0.01)
    assert np.abs(narrow).max() > 4 * 0.02
    assert np.abs(wide).max() <= 2
    assert wide.std() == pytest.approx(0.8796, rel=0.01)


def test_lecun_normal_has_its_deviation_after_the_cut_at_two() -> None:
    values = drawn("lecun_normal", (N,), 0.1)
    assert values.std() == pytest.approx(0.1, rel=0.01)
    assert 0.22 < np.abs(values).max() <= 2 * 0.1 / 0.8796 + 1e-6


@pytest.mark.parametrize("shape", [(1, 5), (5, 5), (32, 64)])
def test_orthogonal_rows_times_their_transpose_are_m_times_the_identity(shape) -> None:
    """As in the official performer: w wᵀ = m I for m random features."""
    rows = shape[0]
    w = drawn("orthogonal_rows", shape, math.sqrt(rows)).astype(np.float64)
    np.testing.assert_allclose(w @ w.T, rows * np.eye(rows), atol=1e-6 * rows)


@pytest.mark.parametrize("shape", [(3, 8), (8, 8), (21, 8)])
def test_orthogonal_normal_rows_are_orthogonal_as_many_at_a_time_as_can_be(shape) -> None:
    rows, columns = shape
    w = drawn("orthogonal_normal", shape, 1.0).astype(np.float64)
    w /= np.linalg.norm(w, axis=1, keepdims=True)
    for first in range(0, rows, columns):
        block = w[first : first + columns]
        np.testing.assert_allclose(block @ block.T, np.eye(len(block)), atol=1e-6)


@pytest.mark.parametrize("make", [lambda: drawn("orthogonal_normal", (20_000, 4), 1.0),
                                  lambda: normal_features(20_000, 4)])  # fmt: skip
def test_each_of_them_is_normal(make) -> None:
    """Its squared length is that of four normal numbers: a mean of 4, a variance of 8."""
    w = make().astype(np.float64)
    squares = (w**2).sum(axis=1)
    assert w.std() == pytest.approx(1.0, rel=0.02)
    assert (w**4).mean() == pytest.approx(3.0, rel=0.05)
    assert squares.mean() == pytest.approx(4.0, rel=0.02)
    assert squares.var() == pytest.approx(8.0, rel=0.1)


def test_the_performers_features_are_such_rows() -> None:
    w = init(T2T)["tokens_to_token.mixers.0.random_features"].astype(np.float64)
    np.testing.assert_allclose(w @ w.T, 3 * np.eye(3), atol=1e-6)


@pytest.mark.parametrize(("tokens", "dim"), [(1, 1), (5, 6), (197, 7)])
def test_sinusoidal_positions_are_the_papers_formula(tokens: int, dim: int) -> None:
    wanted = [
        [
            (math.cos if j % 2 else math.sin)(position / 10000 ** (2 * (j // 2) / dim))
            for j in range(dim)
        ]
        for position in range(tokens)
    ]
    found = sinusoidal_positions(tokens, dim)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=0, atol=6e-8)  # half a unit in float32


def test_t2t_vit_has_the_class_token_at_position_0() -> None:
    positions = init(T2T)["pos_embed"]
    assert positions.shape == (1, T2T.tokens, 12)
    np.testing.assert_array_equal(positions[0, 0], [0, 1] * 6)


# What each scheme gives a dense kernel (3 to 9), its bias, an MLP's bias, the head's kernel, a
# patch convolution (fan-in 12), its bias, the class token, learned positions.
SCHEMES = {
    "timm": "trunc_normal 0.02, constant 0, constant 0, trunc_normal 0.02, uniform 0.289, "
    "uniform 0.289, normal 1e-06, trunc_normal 0.02",
    "yitu": "trunc_normal 0.02, constant 0, constant 0, trunc_normal 0.02, uniform 0.289, "
    "uniform 0.289, trunc_normal 0.02, trunc_normal 0.02",
    "vit_pytorch": "uniform 0.577, uniform 0.577, uniform 0.577, uniform 0.577, uniform 0.289, "
    "uniform 0.289, normal 1, normal 1",
    "vit_jax": "uniform 0.707, constant 0, normal 1e-06, constant 0, lecun_normal 0.289, "
    "constant 0, constant 0, normal 0.02",
}


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_gives_each_kind_of_parameter_its_initialiser(name) -> None:
    scheme = Scheme(name)
    inits = [
        scheme.dense_kernel(3, 9),
        scheme.dense_bias(3),
        scheme.mlp_bias(3),
        scheme.head_kernel(3, 9),
        scheme.conv_kernel(12),
        scheme.conv_bias(12),
        scheme.class_token(),
        scheme.positions(),
    ]
    assert ", ".join(f"{init.kind} {init.value:.3g}" for init in inits) == SCHEMES[name]


@pytest.mark.parametrize("name", SCHEMES)
def test_weights_have_the_moments_of_their_scheme(name) -> None:
    weights = init(VIT.replace(init_scheme=name, embed_dim=96, mlp_dim=400, image_size=[80, 96]))
    deviations = {
        "timm": (0.02, 0.0, 1e-6, 0.02),
        "yitu": (0.02, 0.0, 0.02, 0.02),
        "vit_pytorch": (96**-0.5 / 3**0.5, 96**-0.5 / 3**0.5, 1.0, 1.0),
        "vit_jax": ((2 / 496) ** 0.5, 1e-6, 0.0, 0.02),
    }[name]
    paths = ("blocks.0.mlp.fc1.kernel", "blocks.0.mlp.fc1.bias", "cls_token", "pos_embed")
    found = [float(weights[path].std()) for path in paths]
    assert found == pytest.approx(deviations, rel=0.25, abs=1e-9)
    assert found[0] == pytest.approx(deviations[0], rel=0.02)
    assert set(weights["norm.scale"]) == {1.0}
    assert set(weights["norm.bias"]) == {0.0}


DISTILLED = VIT.replace(dist_token=True, dist_head=True)
HIDDEN = VIT.replace(pre_logits_dim=20)


@pytest.mark.parametrize("name", SCHEMES)
def test_distillation_and_pre_logits_are_initialised_as_what_they_resemble(name) -> None:
    scheme, distilled = Scheme(name), parameters(DISTILLED.replace(init_scheme=name))
    for new, like in [
        ("dist_token", "cls_token"),
        ("head_dist.kernel", "head.kernel"),
        ("head_dist.bias", "head.bias"),
    ]:
        assert distilled[new].shape == distilled[like].shape
        assert distilled[new].init == distilled[like].init
    hidden = parameters(HIDDEN.replace(init_scheme=name))
    assert hidden["pre_logits.kernel"].init == scheme.dense_kernel(12, 20)
    assert hidden["pre_logits.bias"].init == scheme.dense_bias(12)
    assert hidden["head.kernel"].init == scheme.head_kernel(20, 5)


def test_probe_shows_distillation_and_pre_logits() -> None:
    weights = probe(DISTILLED) | {n: a for n, a in probe(HIDDEN).items() if "pre_logits" in n}
    new = {
        "dist_token",
        "head_dist.kernel",
        "head_dist.bias",
        "pre_logits.kernel",
        "pre_logits.bias",
    }
    assert weights.keys() - probe(VIT).keys() == new
    for name in new:
        assert np.ptp(weights[name]) > 0, f"{name} is constant: a fault in it could hide"
    assert not np.array_equal(weights["dist_token"], weights["cls_token"])
    assert not np.array_equal(weights["head_dist.kernel"], weights["head.kernel"])


@pytest.mark.parametrize("seed", [0, 2**70])
def test_any_seed_that_is_not_negative_will_do(seed: int) -> None:
    assert digest(init(VIT, seed)) == digest(init(VIT, seed))
