"""Is what a backend builds the model of the param tree? Names, shapes, flags, activations."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from isovit.errors import InputError
from isovit.spec.families import param_tree
from isovit.spec.initialize import probe
from isovit.spec.layout import native_path, to_native
from parity_tests.examples import ALL, require_first, traced
from parity_tests.subject import Subject


@pytest.mark.parametrize("example", ALL)
def test_framework_counts_the_same_parameters(backend: Subject, example: str) -> None:
    case, layout = ALL[example], backend.module("layout").LAYOUT
    tree = param_tree(case.config)
    params = tree.parameters()
    shapes = {name: a.shape for name, a in to_native(params, case.weights, layout).items()}

    found = backend.native(backend.build(case, "float32"))

    names = {path: native_path(path, param, layout) for path, param in params.items()}
    assert found == {
        backend.native_name(name): (shapes[name], params[path].trainable)
        for path, name in names.items()
    }
    assert sum(math.prod(shape) for shape, _ in found.values()) == tree.size()
    trained = sum(math.prod(shape) for shape, trains in found.values() if trains)
    assert trained == tree.count(trainable=True)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("example", ALL)
def test_weights_come_back_bit_for_bit(backend: Subject, example: str, dtype: str) -> None:
    case = ALL[example]
    model, others = backend.build(case, dtype), probe(case.config, seed=1)
    _assert_same(backend.runtime.read(model), case.weights, dtype)
    backend.runtime.write(model, others)
    _assert_same(backend.runtime.read(model), others, dtype)


@pytest.mark.parametrize("example", ALL)
def test_weights_that_do_not_fit_are_refused(backend: Subject, example: str) -> None:
    case = ALL[example]
    *kept, left_out = case.weights
    lacking = {path: case.weights[path] for path in kept}
    with pytest.raises(InputError, match=f"missing {re.escape(left_out)}"):
        backend.runtime.build(case.config, lacking, dtype="float32", device="cpu")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("example", ALL)
def test_every_module_returns_the_shape_of_the_spec(
    backend: Subject, example: str, dtype: str
) -> None:
    if dtype == "float32":
        require_first(backend, example)
    case, trace = ALL[example], traced(backend, example, dtype)
    wanted = param_tree(case.config).activations()
    assert {path: array.shape for path, array in trace.items()} == {
        path: (case.batch, *shape) for path, shape in wanted.items()
    }
    assert {array.dtype for array in trace.values()} == {np.dtype(dtype)}


def _assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], dtype: str) -> None:
    assert list(found) == list(wanted)
    for path in wanted:
        assert found[path].dtype == dtype
        np.testing.assert_array_equal(found[path], wanted[path], err_msg=path)
