"""What a model looks at: the maps are the model's own weights, and the picture shows them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import isovit
from isovit.look import attention, families, picture
from isovit.look.attention import Attention, Maps, Run, among, attention_maps, rollout
from isovit.look.families import token_learner
from isovit.parity.budgets import LIMITS
from isovit.parity.compare import error
from isovit.spec.families import FAMILIES
from parity_tests.examples import EXAMPLES
from parity_tests.oracles.arrays import ACTIVATIONS, reference
from parity_tests.oracles.importing import import_oracle
from parity_tests.strategies import Case
from tests.outcome import Outcome

Array = np.ndarray
LIMIT = LIMITS["float64"]["activation"]
PHOTOGRAPH = Path(__file__).parents[1] / "examples" / "chelsea.png"


@cache
def outputs(name: str) -> dict[str, Array]:
    """What the modules of an example put out, by the NumPy oracle."""
    case = Case(EXAMPLES[name].config)
    return reference(case.config, case.weights, case.images)


def maps_of(name: str) -> Maps:
    case = Case(EXAMPLES[name].config)
    return attention_maps(case.config, case.weights, outputs(name))


def product(found: Attention) -> Array:
    """weights·v of every token, (batch, tokens, heads · width), as the module orders them."""
    y = np.swapaxes(found.weights @ found.values, 2, 3)
    y = y.reshape(*y.shape[:3], -1)  # (batch, groups, queries, heads * width)
    whole = np.zeros((len(y), found.tokens, y.shape[-1]))
    for group, queries in enumerate(found.queries):
        real = queries != attention.PADDING
        whole[:, queries[real]] = y[:, group, real]
    return whole[:, found.order]


def parted(name: str) -> float:
    """How far weights·v is, at worst, from what the model makes of it; both behind the product."""
    run = Run(EXAMPLES[name].config, Case(EXAMPLES[name].config).weights, outputs(name))
    errors: list[float] = []
    for path, found in maps_of(name).items():
        module, x = path.removesuffix(".regions"), product(found)
        if run.config.family == "levit":
            x = ACTIVATIONS[run.config.attn_activation](x)
        proj = (
            f"{module}.proj.linear" if f"{module}.proj.linear" in run.outputs else f"{module}.proj"
        )
        if f"{proj}.kernel" in run.weights:
            x = x @ run.weight(f"{proj}.kernel") + run.weights.get(f"{proj}.bias", 0.0)
        wanted = run.output(proj if proj in run.outputs else module)
        if path != module:  # what the regional tokens are in the norm behind their attention
            before = run.output(_before(path))[:, :, 0] + x
            x, wanted = _normed(run, path, before), run.output(_block(path) + ".norm1")[:, :, 0]
        errors.append(error(x, wanted.reshape(x.shape)))
    return max(errors)


def _block(path: str) -> str:
    return path.removesuffix(".attn.regions")


def _before(path: str) -> str:
    stage, _, index = _block(path).rpartition(".")
    return f"{stage}.{int(index) - 1}"


def _normed(run: Run, path: str, x: Array) -> Array:
    x = x - x.mean(axis=-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + run.config.norm_eps)
    norm = _block(path) + ".norm1"
    return x * run.weight(f"{norm}.scale") + run.weight(f"{norm}.bias")


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_maps_make_of_the_values_what_the_model_does(name: str) -> None:
    assert parted(name) <= LIMIT


def _unscaled(q: Array, k: Array, scale: float, bias: Any = 0.0) -> Array:
    return SOFTMAX(q, k, 1.1 * scale, bias)


def _unbiased(q: Array, k: Array, scale: float, bias: Any = 0.0) -> Array:
    return SOFTMAX(q, k, scale)


def _heads_within(x: Array, parts: int, num_heads: int) -> tuple[Array, ...]:
    x = x.reshape(*x.shape[:-1], num_heads, -1, parts)
    return tuple(np.swapaxes(np.moveaxis(x, -1, 0), -3, -2))


def _moved_on(grid: attention.Grid, window: attention.Grid) -> Array:
    return np.roll(WINDOWS(grid, window), 1)


def _next_token(run: Run, path: str) -> Array:
    return np.roll(MAPS(run, path), 1, axis=1)


def _copies_behind_all(run: Run, path: str) -> Array:
    """q, k and v that are made, then the copies of all three."""
    return np.concatenate([run.output(f"{path}.qkv"), run.output(f"{path}.cheap")], axis=-1)


def _inverse(_run: Run, a: Array) -> Array:
    return np.linalg.pinv(a)


SOFTMAX, WINDOWS, MAPS = attention.softmax, attention.windows, token_learner._maps
FAULTS: list[tuple[str, Callable[..., Any], str, str]] = [
    ("softmax", _unscaled, "vit", "vit_timm"),
    ("softmax", _unbiased, "levit", "levit"),
    ("softmax", _unbiased, "regionvit", "regionvit_official"),
    ("split_heads", _heads_within, "vit", "vit_timm"),
    ("split_heads", _heads_within, "nest", "nest_official"),
    ("windows", _moved_on, "twins_svt", "twins_svt_timm"),
    ("_maps", _next_token, "token_learner", "token_learner_v11"),
    ("_maps", _next_token, "token_learner", "token_learner_fuser_v1"),
    ("_qkv", _copies_behind_all, "t2t_vit_designs", "t2t_ghost"),
    ("softmax", _unscaled, "efficient_vit", "efficient_nystrom"),
    ("_pseudo_inverse", _inverse, "efficient_vit", "efficient_nystrom_batch"),
]


@pytest.mark.parametrize(("function", "fault", "family", "name"), FAULTS)
def test_a_fault_in_the_maps_is_caught(
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    fault: Callable[..., Any],
    family: str,
    name: str,
) -> None:
    module = f"isovit.look.families.{family}" if family != "vit" else "isovit.look.attention"
    monkeypatch.setattr(f"{module}.{function}", fault)
    assert parted(name) > LIMIT


def test_windows_are_cut_row_by_row_and_so_are_their_tokens() -> None:
    assert attention.windows((2, 6), (2, 3)).tolist() == [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]
    assert attention.windows((4, 2), (2, 1)).tolist() == [[0, 2], [1, 3], [4, 6], [5, 7]]


def test_every_family_can_be_looked_into() -> None:
    shown = {EXAMPLES[name].config.family for name in EXAMPLES if maps_of(name)}
    assert shown == set(FAMILIES)
    assert families.__doc__


@pytest.mark.oracles
def test_the_maps_are_those_that_the_recorder_of_vit_pytorch_has(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    torch = import_oracle("torch", pytestconfig)
    recorder = import_oracle("vit_pytorch.recorder", pytestconfig)
    model = (
        import_oracle("vit_pytorch", pytestconfig)
        .ViT(
            image_size=32,
            patch_size=8,
            num_classes=3,
            dim=25,
            depth=2,
            heads=3,
            mlp_dim=20,
            dim_head=5,
        )
        .eval()
    )
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    loaded = isovit.load(tmp_path / "vit.pth", changes={"num_heads": 3})
    ours = isovit.build(loaded.config, "torch", loaded.weights, dtype="float64")
    images = np.random.default_rng(0).standard_normal((2, 32, 32, 3))
    _, recorded = recorder.Recorder(model.double())(torch.tensor(images).permute(0, 3, 1, 2))
    found = np.stack([map_.weights[:, 0] for map_ in isovit.attention(ours, images).values()], 1)
    assert error(found, recorded.numpy()) <= LIMIT


# Rollout and what is seen


def _attention(weights: list[list[float]], prefix: int, columns: int, cls: bool) -> Attention:
    array = np.array(weights)[None, None]
    return among("attn", array, array, prefix=prefix, grid=(1, columns), cls=cls)


def test_rollout_by_hand() -> None:
    first = _attention([[0.5, 0.5], [0.0, 1.0]], 0, 2, cls=False)
    second = _attention([[0.0, 1.0], [1.0, 0.0]], 0, 2, cls=False)
    # ½I + ½A: [[¾, ¼], [0, 1]] and [[½, ½], [½, ½]]; their product has rows of [3/8, 5/8].
    assert rollout([first, second]) == pytest.approx(np.array([[[0.375, 0.625]]]))
    # The other way round: rows of [½·¾ + ¼·½, …] = [½, ½] and [½, ½].
    assert rollout([second, first]) == pytest.approx(np.array([[[0.5, 0.5]]]))


def test_rollout_of_a_class_token_leaves_itself_out() -> None:
    found = _attention([[0.2, 0.2, 0.6], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], 1, 2, cls=True)
    assert rollout([found]) == pytest.approx(np.array([[[0.25, 0.75]]]))


def test_rollout_does_not_count_weights_below_zero_nor_tokens_that_do_not_look() -> None:
    found = _attention([[-0.5, 0.5], [0.5, 0.5]], 0, 2, cls=False)
    assert rollout([found]) == pytest.approx(np.array([[[0.375, 0.625]]]))
    blind = replace(found, queries=found.queries[:, 1:], weights=found.weights[..., 1:, :])
    assert rollout([blind]) == pytest.approx(np.array([[[0.625, 0.375]]]))


def test_what_a_class_token_sees_is_its_row() -> None:
    found = _attention([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]], 1, 2, cls=True)
    assert found.seen() == pytest.approx(np.array([[[[0.3, 0.5]]]]))


def test_what_is_seen_without_one_is_the_mean_of_those_who_see_it() -> None:
    weights = np.array([[[[1.0, 0.0], [0.5, 0.5]]], [[[0.0, 1.0], [0.0, 1.0]]]])[None]
    numbers = np.array([[0, 1], [2, attention.PADDING]])
    found = replace(
        _attention([[1.0]], 0, 1, cls=False),
        weights=weights, queries=numbers, keys=numbers, grid=(1, 3), key_grid=(1, 3),
    )  # fmt: skip
    assert found.seen() == pytest.approx(np.array([[[[0.75, 0.25, 0.0]]]]))


@pytest.mark.parametrize("name", [name for name in EXAMPLES if "cvt" in name or "twins" in name])
def test_keys_that_summarise_have_shares_of_tokens(name: str) -> None:
    for found in maps_of(name).values():
        if found.spread is not None:
            assert found.spread.shape == (found.key_tokens, found.tokens)
            assert found.spread.sum(axis=1) == pytest.approx(1)


# The picture


@pytest.mark.parametrize("name", EXAMPLES)
def test_features_lie_as_the_image_does(name: str) -> None:
    maps = maps_of(name)
    laid = picture.features(outputs(name), maps)
    assert laid
    for path, grid in laid.items():
        assert grid.shape[1:3] == maps[f"{path}.attn"].grid
        found, wanted = grid, outputs(name)[path]
        assert np.isin(found, wanted).all()


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name.startswith("nest")])
def test_features_of_blocks_lie_as_those_of_the_level_around_them(name: str) -> None:
    laid = picture.features(outputs(name), maps_of(name))
    for i, level in enumerate(EXAMPLES[name].config.levels):
        last = f"levels.{i}.blocks.{len(level.layers) - 1}"
        assert np.array_equal(laid[last], outputs(name)[f"levels.{i}"])


def test_features_of_windows_go_back_to_their_places() -> None:
    numbers = np.array([[0, 1, 4, 5], [2, 3, 6, 7]])
    found = replace(_attention([[1.0]], 0, 1, cls=False), grid=(2, 4), order=numbers.reshape(-1))
    laid = picture.features({"b": np.arange(8.0).reshape(1, 8, 1)}, {"b.attn": found})
    assert laid["b"][0, ..., 0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_more_attention_is_brighter() -> None:
    grey = Image.new("RGB", (8, 4), (128, 128, 128))
    over = np.asarray(picture.over(grey, np.array([[0.1, 0.9]])), int)
    assert over[:, -1].sum() > over[:, 0].sum()
    assert picture.grey(np.array([[3.0, 1.0]]), (2, 1)).tobytes() == bytes([255] * 3 + [0] * 3)
    assert picture.grey(np.ones((1, 2)), (2, 1)).tobytes() == bytes(6)


def test_the_photograph_is_what_the_model_sees() -> None:
    config = EXAMPLES["vit_timm"].config
    mean, std = np.array(config.preprocess.mean), np.array(config.preprocess.std)
    pixels = np.arange(6).reshape(1, 2, 3) * 40
    seen = picture.photograph(config, ((pixels / 255 - mean) / std).astype(np.float32))
    assert np.asarray(seen).tolist() == pixels.tolist()


# The command

SMALL = ("vit_ti16", "--set", "image_size=32", "depth=2", "num_classes=3")


def test_the_command_draws_and_keeps_the_maps(run: Callable[..., Outcome], tmp_path: Path) -> None:
    out, arrays = tmp_path / "seen.png", tmp_path / "seen.npz"
    name, *options = SMALL
    said = run("look", name, PHOTOGRAPH, "--out", out, "--block", "0", "--arrays", arrays, *options)
    assert said.code == 0, said.err
    assert "heads of blocks.0.attn, 2 blocks" in said.out
    with Image.open(out) as drawn, np.load(arrays) as kept:
        assert drawn.mode == "RGB"
        assert kept["blocks.1.attn"].shape == (3, 2, 2)
        assert kept["rollout"].sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("--out", "seen.jpg"), "wanted --out FILE.png, got seen.jpg"),
        (("--out", "{}/no/seen.png"), "there is no folder"),
        (("--out", "{}/seen.png", "--block", "2"), "--block 2: the model has 2, of 0 to 1"),
        (("--out", "{}/seen.png", "--backend", "onnx"), "onnx has no modules to look into"),
        (("--out", "{}/seen.png", "--backend", "mxnet"), "mxnet"),
        (("--out", "{}/seen.png", "--set", "in_channels=2"), "in_channels=2"),
    ],
)
def test_wrong_words_give_one_line_and_no_picture(
    run: Callable[..., Outcome], tmp_path: Path, words: tuple[str, ...], wanted: str
) -> None:
    name, *options = SMALL
    filled = [word.format(tmp_path) for word in words]
    said = run("look", name, PHOTOGRAPH, *options, *filled)
    assert said.code == 2
    assert wanted in said.err
    assert said.err.count("\n") <= 2
    assert not list(tmp_path.iterdir())


def test_what_has_no_softmax_says_so(run: Callable[..., Outcome], tmp_path: Path) -> None:
    bare = ("vit_ti16", "--set", "image_size=32", "depth=0")
    said = run("look", bare[0], PHOTOGRAPH, "--out", tmp_path / "seen.png", *bare[1:])
    assert (said.code, "has no attention to show" in said.err) == (2, True)
