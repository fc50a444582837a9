"""Attention of RegionViT: among the regional tokens, and of each with its window."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from isovit.look.attention import Array, Attention, Run, among, softmax, split_heads, windows
from isovit.spec.families.regionvit import StageConfig


def attentions(run: Run) -> Iterator[Attention]:
    """Two for each block, whose one module runs twice: ``PATH.regions`` and ``PATH``.

    Of a module that runs twice a trace keeps the second output, so that of the regional tokens is
    computed again.
    """
    for s, stage in enumerate(run.config.stages):
        for i in range(len(stage.drop_path_rates)):
            path = f"stages.{s}.blocks.{i}"
            before = f"stages.{s}.blocks.{i - 1}" if i else None
            scale = run.config.attn_scale or stage.head_dim**-0.5
            if before is not None and not (i == 1 and _moves_between(run, stage)):
                yield _regions(run, path, run.output(before)[:, :, 0], stage, scale)
            yield _windows(run, f"{path}.attn", stage, scale, _bias(run, path, s, stage))


def _moves_between(run: Run, stage: StageConfig) -> bool:
    """Whether positions are added behind the first block."""
    return stage.has_peg and run.config.peg == "both"


def _regions(run: Run, path: str, x: Array, stage: StageConfig, scale: float) -> Attention:
    norm = f"{path}.region_norm" if run.config.region_norm else f"{path}.norm1"
    x = x - x.mean(axis=-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + run.config.norm_eps)
    x = x * run.weight(f"{norm}.scale") + run.weight(f"{norm}.bias")
    qkv = x @ run.weight(f"{path}.attn.qkv.kernel")
    if run.config.qkv_bias:
        qkv = qkv + run.weight(f"{path}.attn.qkv.bias")
    q, k, v = split_heads(qkv, 3, stage.num_heads)
    return among(
        f"{path}.attn.regions", softmax(q, k, scale), v, prefix=0, grid=stage.region_grid, cls=False
    )


def _windows(
    run: Run, path: str, stage: StageConfig, scale: float, bias: Array | float
) -> Attention:
    q, k, v = split_heads(run.output(f"{path}.qkv"), 3, stage.num_heads)
    places = stage.regions + windows(stage.grid, stage.window)
    numbers = np.concatenate([np.arange(stage.regions)[:, None], places], axis=1)
    weights = softmax(q, k, scale, bias)
    found = among(path, weights, v, prefix=stage.regions, grid=stage.grid, cls=False)
    return replace(
        found, weights=weights, values=v, queries=numbers, keys=numbers, order=numbers.reshape(-1)
    )


def _bias(run: Run, path: str, s: int, stage: StageConfig) -> Array | float:
    """(heads, tokens, tokens): that of the offset between two; the regional token has none."""
    if run.config.rel_pos == "none":
        return 0.0
    owner = path if run.config.rel_pos == "block" else f"stages.{s}"
    table, size = run.weight(f"{owner}.rel_pos"), run.config.window_size
    places = np.indices(stage.window).reshape(2, -1)
    rows, columns = places[:, None, :] - places[:, :, None] + size - 1  # (queries, keys)
    bias = table[:, rows * (2 * size - 1) + columns]
    return np.pad(bias, ((0, 0), (1, 0), (1, 0)))
