"""Are the fusions of a program of XLA named after what they do?"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "operators.py"
PROGRAM = """HloModule jit_step, is_scheduled=true

%fused_computation.1 (param_0: f32[8,197,64], param_1: f32[8,64,197]) -> f32[8,197,64] {
  %param_0 = f32[8,197,64]{2,1,0} parameter(0)
  %dot.3 = f32[8,197,197]{2,1,0} dot(%param_0, %param_1), lhs_batch_dims={0}
  %exponential.1 = f32[8,197,197]{2,1,0} exponential(%dot.3)
  ROOT %reduce.2 = f32[8,197]{1,0} reduce(%exponential.1, %zero), to_apply=%add
}

ENTRY %main.9 (x: f32[8,197,64]) -> (f32[8,197], f32[8,197,64]) {
  %x = f32[8,197,64]{2,1,0} parameter(0)
  %ynn_fusion.1 = f32[8,197]{1,0} fusion(%x, %x), kind=kCustom, calls=%fused_computation.1
  %copy.4 = f32[8,197,64]{1,2,0} copy(%x)
  ROOT %tuple.1 = (f32[8,197]{1,0}, f32[8,197,64]{1,2,0}) tuple(%ynn_fusion.1, %copy.4)
}
"""


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def test_a_fusion_is_named_after_what_is_costly_in_it(script: dict[str, Any]) -> None:
    operations = script["operations_of"](PROGRAM)
    assert operations["ynn_fusion.1"] == "dot+reduce+exponential"
    assert operations["copy.4"] == "copy"
    assert operations["tuple.1"] == "tuple"


def test_the_program_of_this_version_of_xla_is_understood(script: dict[str, Any]) -> None:
    jax = pytest.importorskip("jax")
    x = jax.numpy.ones((64, 64))
    compiled = jax.jit(lambda x: jax.numpy.exp(x @ x - 1.0).sum(0)).lower(x).compile()
    named = set(script["operations_of"](compiled.as_text()).values())
    assert any("dot" in name for name in named), named
    assert any("exponential" in name for name in named), named
