"""The only place for tolerances, each with its derivation.

The measure is max|Δ| / max|reference|, see ``compare``. A limit says how far rounding alone can
part two right implementations; whatever lies beyond it is a wrong line somewhere.

float64. The unit of rounding is 1.1e-16. Measured floor over all backends, depth 2 to 24: 4e-15
for outputs, 8e-15 for gradients. The limits leave a factor of a hundred for configs that amplify
rounding. The faults that ports really have lie far above: an epsilon of 1e-6 for 1e-5 shows at
1e-5, a float32 inside LayerNorm at 1e-7, a float32 softmax at 2e-8, a performer's epsilon at 3e-9.

float32. The unit of rounding is 6.0e-8; floor 1.5e-6 for outputs, 3.3e-6 for gradients.

bfloat16. The unit of rounding is 3.9e-3. Frameworks round at different places (inside softmax and
LayerNorm, before and after a bias), so this is a budget for accuracy, not a proof: floor 2.8e-2.
Gradients have no limit: that of a bias is a sum over thousands of tokens which mostly cancel, and
two right backends part by 0.3 to 0.6 of it.
"""

from __future__ import annotations

from typing import Literal

Kind = Literal["output", "activation", "gradient"]

PRECISION: dict[str, float] = {"float32": 5e-6, "bfloat16": 5e-2}
"""Accuracy of an output against the same backend's own float64: half of what parts two backends
comes from each, so the limits between backends hold all the more for one. Measured: float32 at
most 6e-7, bfloat16 at most 2.8e-2, over all backends and the examples of the parity suite."""

LIMITS: dict[str, dict[Kind, float]] = {
    "float64": {"output": 1e-12, "activation": 1e-12, "gradient": 1e-11},
    "float32": {"output": 5e-6, "activation": 5e-6, "gradient": 1e-5},
    "bfloat16": {"output": 5e-2, "activation": 5e-2},
}
