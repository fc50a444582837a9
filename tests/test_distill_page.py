"""What the page of distillation says is so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from isovit.spec.families import param_tree
from isovit.spec.objectives.distill import VARIANTS, DistillConfig

PAGE = Path(__file__).parents[1] / "docs/objectives/distill.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_the_page_names_every_variant_with_its_parameters() -> None:
    rows = dict(re.findall(r"^\| `(distill_\w+)` \|.* ([\d,]+) \|$", TEXT, re.MULTILINE))
    counts = {name: f"{param_tree(config).count():,}" for name, config in VARIANTS.items()}
    assert rows == counts


def test_the_page_names_every_field_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| `?(.*?)`? \| .* \|$", TEXT, re.MULTILINE))
    found = {name: rows[name].strip('"') for name in DistillConfig.__struct_fields__}
    config = DistillConfig()
    fields = {name: str(getattr(config, name)) for name in found}
    assert found == fields | {"student": "a ViT", "dist_norm": "false", "hard": "false"}


@pytest.mark.slow
def test_parity_takes_a_distillation() -> None:
    sizes = {"embed_dim": 12, "depth": 1, "num_heads": 3, "mlp_dim": 20, "num_classes": 5}
    changes = {f"student.{name}": size for name, size in sizes.items()}
    words = [word for name, size in changes.items() for word in ("--set", f"{name}={size}")]
    command = [sys.executable, "-m", "isovit", "parity", "distill_deit_ti16", *words]
    small = ["--set", "student.image_size=32", "--backends", "torch,flax", "--gradients"]
    done = subprocess.run([*command, *small], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "equal: torch, flax are one function in float64" in done.stdout
