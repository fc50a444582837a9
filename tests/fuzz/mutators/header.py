"""What can stand in isovit's own header: a config that cannot be, or none."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tests.fuzz.sample import Rng

HUGE = [10**6, 10**9, 2**31, 2**63 - 1, 2**64, 10**30]
ODD: list[Any] = [0, -1, 1.5, 1e308, True, None, "", "x", "12", [], [1], [1, 2, 3], {}, {"a": 1}]

SIZES = (
    "depth",
    "embed_dim",
    "num_heads",
    "head_dim",
    "mlp_dim",
    "num_classes",
    "in_channels",
    "image_size",
    "patch_size",
    "pre_logits_dim",
    "token_dim",
    "token_mlp_dim",
    "performer_features",
)


def config_of(said: dict[str, Any]) -> dict[str, Any]:
    config = said.get("config")
    return config if isinstance(config, dict) else {}


def a_huge_size(said: dict[str, Any], rng: Rng) -> None:
    """One size, or several that go together."""
    config = config_of(said)
    known = [name for name in SIZES if name in config] or ["depth"]
    value = rng.choice(HUGE)
    for name in rng.sample(known, min(len(known), rng.choice([1, 1, 2, 4]))):
        config[name] = [value, value] if name in ("image_size", "patch_size") else value


def a_huge_depth(said: dict[str, Any], rng: Rng) -> None:
    config_of(said)["depth"] = rng.choice([500, 10**4, *HUGE])


def a_huge_width(said: dict[str, Any], rng: Rng) -> None:
    width = rng.choice([2**20, 2**30, 2**40])
    config_of(said).update(embed_dim=width, num_heads=rng.choice([1, 2, width]), mlp_dim=4)


def a_huge_image(said: dict[str, Any], rng: Rng) -> None:
    side = rng.choice([48 * 10**5, 48 * 10**9, 48 * 10**18])
    config_of(said)["image_size"] = [side, side]


def many_channels(said: dict[str, Any], rng: Rng) -> None:
    channels = rng.choice([1, 2, 10**4])
    config_of(said)["in_channels"] = channels
    config_of(said)["preprocess"] = {"mean": [0.5] * channels, "std": [0.5] * channels}


def many_soft_splits(said: dict[str, Any], rng: Rng) -> None:
    split = rng.choice([[1, 1, 0], [3, 1, 1], [7, 1, 3]])
    config_of(said)["t2t_layers"] = [split] * rng.choice([20, 400, 10**5])
    config_of(said)["token_mixer"] = rng.choice(["performer", "transformer", "full"])


def an_odd_value(said: dict[str, Any], rng: Rng) -> None:
    config = config_of(said)
    config[rng.choice(list(config) or ["depth"])] = rng.choice([*ODD, *HUGE])


def an_odd_preprocess(said: dict[str, Any], rng: Rng) -> None:
    preprocess = config_of(said).get("preprocess")
    if isinstance(preprocess, dict):
        preprocess[rng.choice(list(preprocess))] = rng.choice([*ODD, [1e308] * 3, [0, 0, 0]])


def an_unknown_field(said: dict[str, Any], rng: Rng) -> None:
    name = rng.choice(["dpeth", "", "a\nb", "\x1b[31m", "x" * 10**5, "preprocess.mean", "ä"])
    config_of(said)[name] = 1


def a_missing_field(said: dict[str, Any], rng: Rng) -> None:
    config = config_of(said)
    del config[rng.choice(list(config))]


def another_family(said: dict[str, Any], rng: Rng) -> None:
    config_of(said)["family"] = rng.choice(["t2t_vit", "vit", "cait", "", "..", 1, None, ["vit"]])


def another_format(said: dict[str, Any], rng: Rng) -> None:
    formats = ["isovit", "torch", "flax", "keras", "timm", "yitu", "hf", "google", "vit_pytorch"]
    said["format"] = rng.choice([*formats, "onnx", "", "a\nb", "x" * 10**5])


def an_odd_header(said: dict[str, Any], rng: Rng) -> None:
    said[rng.choice(["format", "config"])] = rng.choice([*ODD, *HUGE])


def a_header_without(said: dict[str, Any], rng: Rng) -> None:
    del said[rng.choice(list(said))]


def a_deep_header(said: dict[str, Any], rng: Rng) -> None:
    deep: Any = 1
    for _ in range(rng.choice([50, 900])):
        deep = rng.choice([[deep], {"a": deep}])
    said[rng.choice(["config", "more"])] = deep


EDITS: list[Callable[[dict[str, Any], Rng], None]] = [
    a_huge_size,
    a_huge_size,
    a_huge_depth,
    a_huge_width,
    a_huge_image,
    many_channels,
    many_soft_splits,
    an_odd_value,
    an_odd_value,
    an_odd_preprocess,
    an_unknown_field,
    a_missing_field,
    another_family,
    another_format,
    an_odd_header,
    a_header_without,
    a_deep_header,
]

TEXTS = [
    "",
    "{",
    "null",
    "[]",
    '"a"',
    "NaN",
    "{" * 10**5,
    "[" * 10**6,
    "\0",
    "ä",
    '{"format":"vit"}',
]


def edited(text: str, rng: Rng) -> str:
    """A header with one thing wrong."""
    if rng.random() < 0.15:
        return rng.choice(TEXTS)
    said = json.loads(text)
    rng.choice(EDITS)(said, rng)
    return json.dumps(said)
