"""What hypothesis draws: configs of a family, and the case around one.

Every strategy draws valid values only, simplest first, so that a failure shrinks to depth 0, one
head and no options, and what is left names the culprit.

Widths start at ``MIN_WIDTH``. LayerNorm maps a vector of two numbers to ±1 whatever they are: its
gradient is zero but for rounding, and a zero has no relative error. The closer to that, the more
rounding is amplified.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

import numpy as np
from hypothesis import strategies as st

from isovit.parity.job import Inputs, draw_inputs
from isovit.spec.config import Preprocess
from isovit.spec.families import home
from isovit.spec.initialize import probe

MIN_WIDTH, MAX_WIDTH = 6, 24
EPSILONS = st.sampled_from([1e-5, 1e-6, 1e-3])


@dataclass(frozen=True)
class Case:
    """A config with what its weights and inputs are drawn from.

    Attributes:
        config: of any family.
        batch: number of images.
        seed: of the weights, the images and the cotangent.
    """

    config: Any
    batch: int = 2
    seed: int = 0

    @cached_property
    def weights(self) -> dict[str, np.ndarray]:
        """Canonical weights under which every parameter shows."""
        return probe(self.config, self.seed)

    @property
    def inputs(self) -> Inputs:
        """Images, cotangent, and what an objective takes beside."""
        return draw_inputs(self.config, self.batch, self.seed)

    @property
    def images(self) -> np.ndarray:
        """(batch, height, width, channels) float32."""
        return self.inputs.images

    @property
    def cotangent(self) -> np.ndarray:
        """Weights of the outputs in the scalar loss."""
        return self.inputs.cotangent

    @property
    def others(self) -> Mapping[str, np.ndarray]:
        """What an objective takes beside the images."""
        return self.inputs.others


def cases(family: str) -> st.SearchStrategy[Case]:
    """Cases of a family or an objective."""
    configs = import_module(f"parity_tests.{home(family)}").configs()
    return st.builds(Case, configs, st.integers(1, 3), st.integers(0, 999))


@st.composite
def transformer_fields(draw: st.DrawFn) -> dict[str, Any]:
    """The fields that every config with the shared backbone has, but for image and patches."""
    in_channels = draw(st.integers(1, 4))
    return {
        "in_channels": in_channels,
        "preprocess": Preprocess(mean=(0.5,) * in_channels, std=(0.5,) * in_channels),
        "depth": draw(st.integers(0, 2)),
        **draw(_attention_fields()),
        "mlp_dim": draw(st.integers(4, MAX_WIDTH)),
        "activation": draw(st.sampled_from(["gelu", "gelu_tanh"])),
        "norm_eps": draw(EPSILONS),
        "layer_scale_init": draw(st.sampled_from([None, 0.1])),
        **draw(_output_fields()),
    }


@st.composite
def _attention_fields(draw: st.DrawFn) -> dict[str, Any]:
    """Width and heads; heads that fill the width may go without a projection."""
    num_heads = draw(st.integers(1, 3))
    head_dim = draw(st.none() | st.integers(1, 8))
    if head_dim is None:
        widths = range(MIN_WIDTH, MAX_WIDTH + 1)
        embed_dim = draw(st.sampled_from([n for n in widths if n % num_heads == 0]))
        attn_proj = draw(st.sampled_from([True, False]))
    else:
        embed_dim = draw(st.integers(MIN_WIDTH, MAX_WIDTH))
        attn_proj = True
    return {
        "num_heads": num_heads,
        "head_dim": head_dim,
        "embed_dim": embed_dim,
        "attn_proj": attn_proj,
        "qkv_bias": draw(st.booleans()),
        "attn_scale": draw(st.sampled_from([None, 0.3])),
    }


@st.composite
def _output_fields(draw: st.DrawFn) -> dict[str, Any]:
    """Class token, pooling, final norm and head, in every combination that can be."""
    pool = draw(st.sampled_from(["mean", "cls", "mean_patches", "none"]))
    pooled = pool != "none"
    return {
        "pool": pool,
        "class_token": pool == "cls" or draw(st.booleans()),
        "final_norm": draw(st.sampled_from(["none", "tokens", *["pooled"] * pooled])),
        "num_classes": draw(st.integers(0, 7)) if pooled else 0,
    }
