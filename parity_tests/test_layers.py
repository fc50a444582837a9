"""Does each module, alone, compute what NumPy loops compute?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isovit.errors import InputError
from isovit.spec.families.t2t_vit import SoftSplit
from parity_tests.agreement import assert_agree, assert_traces_agree
from parity_tests.examples import ALL, EXAMPLES, traced
from parity_tests.oracles import arrays
from parity_tests.oracles.families.t2t_vit import soft_split
from parity_tests.subject import Subject


@st.composite
def images_and_splits(draw: st.DrawFn) -> tuple[np.ndarray, SoftSplit]:
    """Images in which every number is another, and a soft split that fits them."""
    kernel = draw(st.integers(1, 5))
    padding = draw(st.integers(0, (kernel - 1) // 2))
    smallest = kernel - 2 * padding
    rows, columns = draw(st.tuples(*2 * [st.integers(smallest, smallest + 7)]))
    batch, dim = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    counting = np.arange(1.0, batch * rows * columns * dim + 1).reshape(batch, rows, columns, dim)
    return counting, SoftSplit(kernel, draw(st.integers(1, kernel + 1)), padding)


@given(drawn=images_and_splits())
def test_soft_split_moves_numbers_as_the_loop_does(
    backend: Subject, drawn: tuple[np.ndarray, SoftSplit]
) -> None:
    images, split = drawn
    found = backend.module("families.t2t_vit").soft_split(backend.tensor(images), split)
    wanted = np.stack([soft_split(image, split) for image in images])
    np.testing.assert_array_equal(backend.array(found), wanted)


@pytest.mark.parametrize("example", ALL)
def test_every_module_is_the_numpy_one(backend: Subject, example: str) -> None:
    case = ALL[example]
    wanted = arrays.reference(case.config, case.weights, case.images, case.others)
    assert_traces_agree(traced(backend, example, "float64"), wanted)


@pytest.mark.parametrize("activation", arrays.ACTIVATIONS)
def test_activation_from_far_left_to_far_right(backend: Subject, activation: str) -> None:
    x = np.linspace(-6.0, 6.0, 4801)  # beyond, the left tail is less than rounding of the peak
    found = backend.module("layers").ACTIVATIONS[activation](backend.tensor(x))
    wanted = arrays.ACTIVATIONS[activation](x)
    assert_agree({"": backend.array(found)}, {"": wanted}, "activation")


@pytest.mark.parametrize("example", ["vit_distilled", "levit"])
def test_two_heads_come_apart(backend: Subject, example: str) -> None:
    case = EXAMPLES[example]
    wanted = arrays.reference(case.config, case.weights, case.images)
    found = backend.build(case).forward_heads(backend.tensor(case.images))
    for path, logits in zip(("head", "head_dist"), found, strict=True):
        assert_agree({path: backend.array(logits)}, {path: wanted[path]}, "output")


@pytest.mark.parametrize("example", ["vit_timm", "levit_features"])
def test_a_model_with_one_head_says_so(backend: Subject, example: str) -> None:
    case = EXAMPLES[example]
    with pytest.raises(InputError, match="dist_head=False: the model has one head"):
        backend.build(case).forward_heads(backend.tensor(case.images))


@pytest.mark.parametrize("shape", [(300, 500), (3, 3, 20, 40), (5, 5, 600, 1)])
def test_kernels_of_keras_begin_as_its_own_do(backend: Subject, shape: tuple[int, ...]) -> None:
    if backend.framework != "keras":
        pytest.skip("concerns Keras only")
    import keras

    initializers = backend.module("initializers")

    def drawn(initializer: Any) -> np.ndarray:
        return backend.array(initializer(shape, dtype="float32"))

    keras.utils.set_random_seed(0)
    found, another = drawn(initializers.glorot()), drawn(initializers.glorot())
    wanted = drawn(keras.initializers.GlorotUniform())
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    assert not np.array_equal(found, another)
    for moment in (np.std, np.max, lambda array: -np.min(array)):
        np.testing.assert_allclose(moment(found), moment(wanted), rtol=0.02)
    assert abs(found.mean()) < 0.05 * found.max()
    keras.utils.set_random_seed(0)
    np.testing.assert_array_equal(drawn(initializers.glorot()), found)
