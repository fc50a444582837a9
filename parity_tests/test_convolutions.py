"""Convolutions: strides, zeros around the image and groups mean the same in every framework."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isovit.spec.layout import permutation
from isovit.spec.param import Role
from parity_tests.agreement import assert_agree
from parity_tests.oracles.arrays import Reference
from parity_tests.subject import Subject

pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@pytest.fixture(autouse=True)
def float64(backend: Subject) -> None:
    """JAX and Keras are put into float64 by the first model of it that is built."""
    from parity_tests.examples import EXAMPLES

    backend.build(EXAMPLES["vit_timm"])


def layer_of(backend: Subject, depthwise: bool, dims: tuple[int, int], **numbers: Any) -> Any:
    """A backend's convolution, with a bias."""
    module = backend.module("layers")
    if backend.framework == "torch":
        if depthwise:
            return module.DepthwiseConv(dims[0], bias=True, **numbers).double()
        return module.Conv(*dims, bias=True, **numbers).double()
    kinds: dict[str, Any] = dict(use_bias=True, dtype="float64", **numbers)
    if backend.framework == "flax":
        from flax import nnx

        kinds |= dict(param_dtype="float64", rngs=nnx.Rngs(0))
        return module.DepthwiseConv(dims[0], **kinds) if depthwise else module.Conv(*dims, **kinds)
    if depthwise:
        return module.DepthwiseConv(name="conv", **kinds)
    return module.Conv(dims[1], name="conv", **kinds)


def output(
    backend: Subject, layer: Any, role: Role, kernel: np.ndarray, bias: np.ndarray, x: np.ndarray
) -> np.ndarray:
    """What the layer makes of an image with these canonical weights."""
    layout = backend.module("layout").LAYOUT
    axes = permutation("h w i o", layout[role].axes, 4)
    native = {"kernel": np.ascontiguousarray(kernel.transpose(axes)), "bias": bias}
    if backend.framework == "torch":
        layer.load_state_dict(
            {"weight": backend.tensor(native["kernel"]), "bias": backend.tensor(bias)}
        )
    elif backend.framework == "flax":
        for name, array in native.items():
            getattr(layer, name).set_value(backend.tensor(array))
    else:
        layer.build(x.shape)
        layer.kernel.assign(backend.tensor(native["kernel"]))
        layer.bias.assign(backend.tensor(bias))
    return backend.array(layer(backend.tensor(x)))


@given(
    kernel_size=pairs,
    stride=pairs,
    padding=st.tuples(st.integers(0, 1), st.integers(0, 1)),
    groups=st.sampled_from([1, 2, "depthwise"]),
    spare=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    seed=st.integers(0, 99),
)
def test_a_convolution_is_the_loop(
    backend: Subject,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    groups: Any,
    spare: tuple[int, int],
    seed: int,
) -> None:
    """Of images as small as a kernel and its zeros let them be, and larger by ``spare``."""
    depthwise = groups == "depthwise"
    in_dim, out_dim = (4, 4) if depthwise else (4, 6)
    stride = (stride[0], stride[0]) if depthwise else stride  # TensorFlow has no other
    parts = in_dim if depthwise else groups
    rng = np.random.default_rng(seed)
    least = (max(side - 2 * zeros, 1) for side, zeros in zip(kernel_size, padding, strict=True))
    rows, columns = (n + more for n, more in zip(least, spare, strict=True))
    x = rng.standard_normal((2, rows, columns, in_dim))
    kernel = rng.standard_normal((*kernel_size, in_dim // parts, out_dim))
    bias = rng.standard_normal(out_dim)
    numbers: dict[str, Any] = dict(kernel_size=kernel_size, stride=stride, padding=padding)
    if not depthwise:
        numbers["groups"] = groups
    layer = layer_of(backend, depthwise, (in_dim, out_dim), **numbers)
    role = Role.DEPTHWISE_KERNEL if depthwise else Role.CONV_KERNEL
    found = output(backend, layer, role, kernel, bias, x)
    loop = Reference(None, {"conv.kernel": kernel, "conv.bias": bias})
    wanted = loop.conv("conv", x, stride, padding, parts)
    assert_agree({"": found}, {"": wanted}, "output")
