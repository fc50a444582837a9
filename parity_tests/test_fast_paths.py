"""Is what is done for speed still the same function? Each path is taken, and a broken one seen."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import pytest

from isovit.backends import get_backend
from isovit.backends.protocol import Gradients
from parity_tests.agreement import assert_agree, assert_traces_agree
from parity_tests.examples import EXAMPLES
from parity_tests.oracles import arrays
from parity_tests.strategies import Case
from parity_tests.subject import Subject

WITH_ATTENTION = ("vit_timm", "vit_distilled", "t2t_transformer", "t2t_full")


def gradients(found: Gradients) -> dict[str, np.ndarray]:
    return {**found.weights, "images": found.images}


def reference(case: Case) -> dict[str, np.ndarray]:
    return arrays.reference(case.config, case.weights, case.images)


# Attention, a few rows at a time


@pytest.fixture
def rows(backend: Subject, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Four rows at a time; collects the shapes of the scores."""
    layers = backend.module("layers")
    if backend.name in ("torch", "keras:torch"):
        pytest.skip("torch has an operator of its own for it; see below")
    seen: list[tuple[int, ...]] = []
    whole = layers.softmax_product

    def watched(scores: Any, v: Any, *dropout: Any) -> Any:
        seen.append(tuple(scores.shape))
        return whole(scores, v, *dropout)

    monkeypatch.setattr(layers, "softmax_product", watched)
    monkeypatch.setattr(layers, "ROWS", 4)
    return seen


@pytest.mark.parametrize("example", WITH_ATTENTION)
def test_attention_in_rows_is_attention(
    backend: Subject, rows: list[tuple[int, ...]], example: str
) -> None:
    case = EXAMPLES[example]
    assert_traces_agree(backend.trace(case), reference(case))
    assert rows
    assert all(shape[-2] <= 4 for shape in rows), rows


@pytest.mark.parametrize("example", ["vit_timm", "t2t_transformer"])
def test_attention_in_rows_has_the_same_gradients(
    backend: Subject, rows: list[tuple[int, ...]], example: str
) -> None:
    case = EXAMPLES[example]
    wanted = Subject("torch", get_backend("torch")).gradients(case)
    assert_agree(gradients(backend.gradients(case)), gradients(wanted), "gradient")
    assert all(shape[-2] <= 4 for shape in rows), rows


def test_rows_that_are_not_divided_are_seen(
    backend: Subject, rows: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = backend.module("layers")
    whole = layers.softmax_product
    doubled: Callable[..., Any] = lambda scores, v, *dropout: whole(scores * 1.01, v, *dropout)  # noqa: E731
    monkeypatch.setattr(layers, "softmax_product", doubled)
    case = EXAMPLES["t2t_transformer"]
    with pytest.raises(AssertionError, match="activation beyond 1e-12"):
        assert_traces_agree(backend.trace(case), reference(case))


# Products in torch, as convolutions


@pytest.fixture
def products(backend: Subject) -> Any:
    if backend.name not in ("torch", "keras:torch"):
        pytest.skip("concerns torch only")
    return import_module("isovit.backends.products")


@pytest.mark.parametrize("convolves", [True, False])
@pytest.mark.parametrize("example", EXAMPLES)
def test_a_product_is_the_same_by_both_libraries(
    backend: Subject,
    products: Any,
    example: str,
    convolves: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products, "MKL_IS_SLOW", convolves)
    convolved = count_convolutions(products, monkeypatch)
    case = EXAMPLES[example]
    assert_traces_agree(backend.trace(case, "float32"), reference(case), "float32")
    assert bool(convolved) == convolves
    model = backend.build(case, "float32")
    found = backend.runtime.gradients(model, case.images, case.cotangent)
    assert_agree(gradients(found), gradients(backend.gradients(case)), "gradient", "float32")


def test_a_convolution_without_its_bias_is_seen(
    backend: Subject, products: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "MKL_IS_SLOW", True)
    convolve = products.F.conv2d
    monkeypatch.setattr(products.F, "conv2d", lambda x, w, bias, **where: convolve(x, w, **where))
    case = EXAMPLES["t2t_performer"]
    with pytest.raises(AssertionError, match="activation beyond 5e-06"):
        assert_traces_agree(backend.trace(case, "float32"), reference(case), "float32")


def test_the_kernel_of_a_convolution_says_channels_last(
    backend: Subject, products: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else ``torch.compile``, which forgets the strides of the pixels, transposes each product."""
    monkeypatch.setattr(products, "MKL_IS_SLOW", True)
    convolve, strides = products.F.conv2d, []

    def watched(x: Any, kernel: Any, bias: Any, **where: int) -> Any:
        if "stride" not in where:  # a product, and not the last soft split
            strides.append((kernel.shape[1], kernel.stride()))
        return convolve(x, kernel, bias, **where)

    monkeypatch.setattr(products.F, "conv2d", watched)
    backend.trace(EXAMPLES["t2t_full"], "float32")
    assert strides
    assert all(stride == (dim, 1, dim, dim) for dim, stride in strides), strides


WITH_SOFT_SPLITS = ("t2t_performer", "t2t_transformer", "t2t_full")


@pytest.mark.parametrize("example", WITH_SOFT_SPLITS)
def test_the_last_soft_split_is_the_same_as_a_convolution(
    backend: Subject, products: Any, example: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = EXAMPLES[example]
    plain = gradients(backend.gradients(case))
    monkeypatch.setattr(products, "convolves", lambda _: True)  # float64 too
    patches = watched_patches(products, monkeypatch)
    assert_traces_agree(backend.trace(case), reference(case))
    assert patches
    assert_agree(gradients(backend.gradients(case)), plain, "gradient")


def test_a_convolution_with_rows_for_columns_is_seen(
    backend: Subject, products: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "convolves", lambda _: True)
    convolve = products.F.conv2d
    monkeypatch.setattr(
        products.F, "conv2d", lambda x, w, bias, **where: convolve(x, w.mT, bias, **where)
    )
    case = EXAMPLES["t2t_performer"]
    with pytest.raises(AssertionError, match="project"):
        assert_traces_agree(backend.trace(case), reference(case))


# Attention in torch, as convolutions


@pytest.fixture
def by_heads(products: Any, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Every sequence is multiplied so, in pieces of some rows; collects what was decided."""
    decided: list[bool] = []
    decide = products._by_heads

    def watched(*qkv: Any) -> bool:
        decided.append(decide(*qkv))
        return decided[-1]

    monkeypatch.setattr(products, "_by_heads", watched)
    monkeypatch.setattr(products, "convolves", lambda _: True)  # float64 too
    monkeypatch.setattr(products, "WIDE_VECTORS", True)
    monkeypatch.setattr(products, "TOKENS", range(2, 1000))
    monkeypatch.setattr(products, "WEIGHTS", 70)
    monkeypatch.setattr(products, "ROWS", 1)
    return decided


@pytest.mark.parametrize("most", [70, 10_000])
@pytest.mark.parametrize("example", WITH_ATTENTION)
def test_attention_by_heads_is_attention(
    backend: Subject,
    products: Any,
    by_heads: list[bool],
    example: str,
    most: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products, "WEIGHTS", most)
    case = EXAMPLES[example]
    assert_traces_agree(backend.trace(case), reference(case))
    assert by_heads
    assert all(by_heads)


def test_attention_for_a_gradient_keeps_no_weights(backend: Subject, by_heads: list[bool]) -> None:
    case = EXAMPLES["t2t_transformer"]
    wanted = Subject("torch", get_backend("torch")).gradients(case)
    assert_agree(gradients(backend.gradients(case)), gradients(wanted), "gradient")
    assert by_heads
    assert not any(by_heads)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_graph_of_attention_takes_any_number_of_images(
    products: Any, by_heads: list[bool]
) -> None:
    def attend(x: Any) -> Any:
        return products.attention(x, x, x, 0.5)

    images = products.torch.randn(3, 2, 9, 5)  # (batch, heads, tokens, dim)
    traced = products.torch.jit.trace(attend, images[:1])
    found, wanted = ({"y": y(images).numpy()} for y in (traced, attend))
    assert_agree(found, wanted, "activation", "float32")
    assert True in by_heads
    assert False in by_heads


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_attention_by_heads_can_be_mapped_and_has_tangents(
    products: Any, by_heads: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "WEIGHTS", 100_000)
    torch = products.torch
    x = torch.randn(3, 2, 150, 5, dtype=torch.float64)  # (batch, heads, tokens, dim)

    def attend(x: Any) -> Any:
        return products.attention(x, x, x, 0.5)

    def plain(x: Any) -> Any:
        return torch.softmax(0.5 * x @ x.mT, dim=-1) @ x

    mapped, wanted = ({"y": torch.func.vmap(f)(x).numpy()} for f in (attend, plain))
    assert_agree(mapped, wanted, "activation")
    tangents, wanted = ({"y": torch.func.jvp(f, (x,), (x,))[1].numpy()} for f in (attend, plain))
    assert_agree(tangents, wanted, "activation")
    assert by_heads
    assert all(by_heads)


def test_rows_of_attention_that_do_not_sum_to_one_are_seen(
    backend: Subject, products: Any, by_heads: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    softmax = products.torch.softmax
    monkeypatch.setattr(products.torch, "softmax", lambda x, dim: 1.01 * softmax(x, dim=dim))
    case = EXAMPLES["t2t_transformer"]
    with pytest.raises(AssertionError, match="activation beyond 1e-12"):
        assert_traces_agree(backend.trace(case), reference(case))
    assert all(by_heads)


def test_the_keys_of_another_head_are_seen(
    backend: Subject, products: Any, by_heads: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "WEIGHTS", 10_000)
    multiply = products.linear_of_heads
    monkeypatch.setattr(products, "linear_of_heads", lambda x, w: multiply(x, w.roll(1, dims=0)))
    case = EXAMPLES["vit_timm"]
    with pytest.raises(AssertionError, match="activation beyond 1e-12"):
        assert_traces_agree(backend.trace(case), reference(case))
    assert all(by_heads)


@pytest.mark.parametrize(("most", "rows"), [(1, 1), (8, 1), (8, 4), (60, 1), (60, 7), (200, 20)])
def test_attention_has_few_weights_in_memory_at_a_time(
    products: Any, by_heads: list[bool], most: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch, multiply, sizes = products.torch, products.linear_of_heads, []

    def watched(x: Any, weight: Any) -> Any:
        y = multiply(x, weight)
        sizes.extend([y.numel()] if y.shape[-1] == 9 else [])  # scores, one for each token
        return y

    q, k, v = torch.randn(3, 2, 3, 9, 5, dtype=torch.float64)  # (batch, heads, tokens, dim)
    wanted = torch.softmax(0.5 * q @ k.mT, dim=-1) @ v
    monkeypatch.setattr(products, "linear_of_heads", watched)
    monkeypatch.setattr(products, "WEIGHTS", most)
    monkeypatch.setattr(products, "ROWS", rows)
    found = products.attention(q, k, v, 0.5)
    assert_agree({"y": found.numpy()}, {"y": wanted.numpy()}, "activation")
    assert sum(sizes) == 2 * 3 * 9 * 9
    assert max(sizes) <= max(most, 9 * rows), "of so many rows at least"


# Keras on torch, where calls and layouts cost time


def test_keras_lays_a_kernel_as_its_product_reads_it(backend: Subject) -> None:
    if backend.name != "keras:torch":
        pytest.skip("concerns Keras on torch only")
    case = EXAMPLES["vit_timm"]
    model = backend.build(case)
    backend.runtime.write(model, case.weights)
    kernels = [v for v in model.trainable_variables if v.path.endswith("fc1/kernel")]
    assert len(kernels) == 2
    for kernel in kernels:
        assert kernel.value.t().is_contiguous()
        assert not kernel.value.is_contiguous()


def test_keras_calls_no_layer_that_does_nothing(
    backend: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not backend.name.startswith("keras"):
        pytest.skip("concerns Keras only")
    import keras

    called: list[str] = []
    call = keras.layers.Layer.__call__

    def watched(layer: Any, *args: Any, **kwargs: Any) -> Any:
        called.append(type(layer).__name__)
        return call(layer, *args, **kwargs)

    case = EXAMPLES["vit_timm"]
    model = backend.build(case)
    assert all(layer.built for layer in model._flatten_layers())  # else training builds each step
    monkeypatch.setattr(keras.layers.Layer, "__call__", watched)
    backend.runtime.forward(model, case.images)
    assert "Linear" in called
    assert not {"Dropout", "DropPath", "Identity"} & set(called)


def count_convolutions(products: Any, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Gets an item for every product that asks and is to be a convolution."""
    asked: list[bool] = []
    decide = products.convolves

    def watched(x: Any) -> bool:
        if chosen := decide(x):
            asked.append(chosen)
        return chosen

    monkeypatch.setattr(products, "convolves", watched)
    return asked


def watched_patches(products: Any, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Gets an item for every call of ``patch_linear``."""
    called: list[bool] = []
    compute = products.patch_linear

    def watched(*arguments: Any) -> Any:
        called.append(True)
        return compute(*arguments)

    monkeypatch.setattr(products, "patch_linear", watched)
    return called
