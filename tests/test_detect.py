"""Foreign checkpoints without a config: format and config from names and shapes alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import isovit
from isovit.backends.torch.layout import LAYOUT
from isovit.spec.initialize import probe
from isovit.weight_convert.formats import rename_table
from isovit.weight_convert.store import inspect, load

T2T = dict(image_size=32, depth=1, embed_dim=24, num_heads=3, mlp_dim=20, num_classes=5)
VIT = dict(T2T, patch_size=8)
FREE: dict[str, Any] = dict(
    qkv_bias=False, norm_eps=1e-5, head_dim=8, init_scheme="vit_pytorch", image_size=64
)

CASES = {
    "timm": ("timm", isovit.config("vit_s16", **VIT)),
    "timm pooled": (
        "timm",
        isovit.config("vit_s16", **VIT, pool="mean_patches", final_norm="pooled"),
    ),
    "vit_pytorch": (
        "vit_pytorch",
        isovit.config("vit_s16", **{**VIT, **FREE}, patch_embed="norm_linear_norm"),
    ),
    "yitu performer": ("yitu", isovit.config("t2t_vit_14", **T2T)),
    "yitu transformer": ("yitu", isovit.config("t2t_vit_t_14", **T2T)),
    "vit_pytorch of T2T-ViT": ("vit_pytorch", isovit.config("t2t_vit_pytorch", **{**T2T, **FREE})),
}


@pytest.fixture(params=CASES)
def foreign(request: pytest.FixtureRequest, tmp_path: Path):
    name, config = CASES[request.param]
    weights = probe(config)
    table = rename_table(name, config)
    arrays = table.write(isovit.param_tree(config).parameters(), weights, LAYOUT)
    path = tmp_path / "model.safetensors"
    save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, path)
    return path, name, config, weights


def test_format_config_and_weights_are_found(foreign) -> None:
    path, name, config, weights = foreign
    found = load(path, changes={"num_heads": 3})
    assert found.source.format == name
    same = found.config.replace(preprocess=config.to_dict()["preprocess"])
    assert isovit.param_tree(same) == isovit.param_tree(config)
    assert (same.block, same.pool, same.grid) == (config.block, config.pool, config.grid)
    assert all(np.array_equal(found.weights[path], weights[path]) for path in weights)
    assert inspect(path, changes={"num_heads": 3}).format == name


def test_heads_that_no_shape_tells_are_asked_for(foreign) -> None:
    with pytest.raises(isovit.InputError, match=r"num_heads cannot be read.*--set num_heads=1\|"):
        load(foreign[0])


def test_names_of_no_format_are_refused(tmp_path: Path) -> None:
    save_file({"weight": np.zeros((2, 2), np.float32)}, tmp_path / "odd.safetensors")
    with pytest.raises(isovit.InputError, match="names of no format that isovit knows"):
        load(tmp_path / "odd.safetensors")
