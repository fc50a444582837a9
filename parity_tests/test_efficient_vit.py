"""A transformer of one's own in an efficient ViT, and what its own mixers are said to be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import isovit
from isovit.parity.budgets import LIMITS
from isovit.parity.compare import error
from isovit.spec.families import efficient_vit
from isovit.spec.families.efficient_vit import EfficientViTConfig
from isovit.spec.families.vit import ViTConfig
from parity_tests.agreement import assert_outputs_agree
from parity_tests.examples import EXAMPLES
from parity_tests.strategies import Case
from parity_tests.subject import Subject

LIMIT = LIMITS["float64"]["output"]
NYSTROM = EXAMPLES["efficient_nystrom"].config


# A transformer of one's own: tokens mix by a product over them, as in an MLP-Mixer


def own_transformer(backend: Subject, config: EfficientViTConfig) -> Any:
    """As a user of each framework would write it; Keras's has no ``build`` of its own."""
    tokens = config.tokens
    if backend.framework == "torch":
        import torch

        torch.manual_seed(0)

        class TorchMixer(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.over_tokens = torch.nn.Linear(tokens, tokens)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x + self.over_tokens(x.mT).mT

        return TorchMixer()
    if backend.framework == "flax":
        from flax import nnx

        class FlaxMixer(nnx.Module):
            def __init__(self) -> None:
                self.over_tokens = nnx.Linear(tokens, tokens, rngs=nnx.Rngs(0))

            def __call__(self, x: Any) -> Any:
                return x + self.over_tokens(x.mT).mT

        return FlaxMixer()
    import keras

    keras.utils.set_random_seed(0)

    class KerasMixer(keras.layers.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.over_tokens = keras.layers.Dense(tokens, name="over_tokens")

        def call(self, x: Any) -> Any:
            return x + keras.ops.swapaxes(self.over_tokens(keras.ops.swapaxes(x, 1, 2)), 1, 2)

    return KerasMixer()


def new_model(backend: Subject, config: EfficientViTConfig, transformer: Any = None) -> Any:
    """A model by its class, as a user makes it who hands in a transformer."""
    cls = backend.module("families.efficient_vit").EfficientViT
    if backend.framework == "flax":
        from flax import nnx

        return cls(config, transformer, rngs=nnx.Rngs(0))
    model = cls(config, transformer)
    if backend.framework == "keras":
        model.build((None, *config.image_size, config.in_channels))
    return model


def trained(backend: Subject, model: Any, images: np.ndarray, labels: np.ndarray) -> list[float]:
    """Losses of a few steps of gradient descent, by the framework's own means."""
    if backend.framework == "torch":
        import torch

        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = (model(torch.tensor(images)) - torch.tensor(labels)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses
    if backend.framework == "flax":
        import optax
        from flax import nnx

        optimizer = nnx.Optimizer(model, optax.sgd(0.05), wrt=nnx.Param)

        @nnx.jit
        def step(model: Any, optimizer: Any) -> Any:
            loss, gradients = nnx.value_and_grad(
                lambda model: ((model(images) - labels) ** 2).mean()
            )(model)
            optimizer.update(model, gradients)
            return loss

        return [float(step(model, optimizer)) for _ in range(5)]
    import keras

    model.compile(optimizer=keras.optimizers.SGD(0.05), loss="mse")
    return [float(model.train_on_batch(images, labels)) for _ in range(5)]


def own_kernel(backend: Subject, model: Any) -> np.ndarray:
    """The kernel of the user's own layer."""
    layer = model.transformer.over_tokens
    kernel = layer.weight if backend.framework == "torch" else layer.kernel
    if backend.framework == "keras":
        return np.array(backend.array(kernel.value))
    return np.array(kernel.detach() if backend.framework == "torch" else kernel[...])


def test_a_transformer_of_ones_own_trains(backend: Subject) -> None:
    images, config = Case(NYSTROM).images, NYSTROM.replace(pool="mean")
    labels = np.random.default_rng(0).standard_normal((2, NYSTROM.num_classes)).astype(np.float32)
    model = new_model(backend, config, own_transformer(backend, config))
    before = own_kernel(backend, model)
    losses = trained(backend, model, images, labels)
    assert losses[-1] < losses[0]
    assert (own_kernel(backend, model) != before).all()


def test_the_built_in_transformer_handed_in_is_the_same_model(backend: Subject) -> None:
    cls, own = backend.module("families.efficient_vit").Transformer, {}
    if backend.framework == "flax":
        import jax.numpy as jnp
        from flax import nnx

        own = dict(dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    elif backend.framework == "keras":
        own = dict(name="transformer")
    case = Case(NYSTROM)
    model = new_model(backend, NYSTROM, cls(NYSTROM, **own))
    backend.runtime.write(model, case.weights)
    wanted = backend.forward(case, "float32")
    assert_outputs_agree(backend.runtime.forward(model, case.images), wanted, "float32")


def test_a_keras_file_has_a_transformer_that_was_handed_in(
    backend: Subject, tmp_path: Path
) -> None:
    if backend.framework != "keras":
        pytest.skip("concerns Keras only")
    import keras

    images = Case(NYSTROM).images
    dim = NYSTROM.embed_dim
    layers = [keras.layers.LayerNormalization(), keras.layers.Dense(dim, activation="tanh")]
    model = new_model(backend, NYSTROM, keras.Sequential(layers))
    model.save(tmp_path / "own.keras")
    again = keras.saving.load_model(tmp_path / "own.keras")
    assert again.config == model.config
    np.testing.assert_array_equal(backend.array(again(images)), backend.array(model(images)))


def test_the_lines_on_the_page_run(backend: Subject) -> None:
    pages = [
        block.replace("\n    ", "\n")
        for block in (efficient_vit.__doc__ or "").split("\n\n")
        if f"backends.{backend.framework}." in block
    ]
    (lines,) = pages
    config = EfficientViTConfig(image_size=8, patch_size=4, embed_dim=384, num_classes=3)
    names: dict[str, Any] = {"config": config}
    if backend.framework == "flax":
        from flax import nnx

        names |= {"nnx": nnx, "rngs": nnx.Rngs(0)}
    else:
        names[backend.framework] = __import__(backend.framework)
    exec(lines.strip(), names)
    images = np.zeros((2, 8, 8, 3), np.float32)
    if backend.framework == "torch":
        images = names["torch"].tensor(images)
    assert tuple(names["model"](images).shape) == (2, 3)


# What the mixers are said to be


def test_the_multiply_adds_on_the_page_are_those_of_the_variants() -> None:
    mixers = ("full", "nystrom", "performer", "linear")
    for size, said in (
        (224, "4.57, 4.65, 4.45 and 4.34 G"),
        (896, "158.15, 71.05, 71.23 and 69.36 G"),
    ):
        variants = [isovit.config(f"efficient_vit_{mixer}", image_size=size) for mixer in mixers]
        found = [f"{isovit.param_tree(v).multiply_adds() / 1e9:.2f}" for v in variants]
        assert f"{', '.join(found[:-1])} and {found[-1]} G" == said
        assert said in " ".join((efficient_vit.__doc__ or "").split())


def test_full_is_the_vit_with_the_same_stem(backend: Subject) -> None:
    config = EXAMPLES["efficient_full"].config
    case = Case(config.replace(transformer_norm=False))
    fields = {name: getattr(case.config, name) for name in ViTConfig.__struct_fields__ if hasattr(
        case.config, name)} | {"patch_embed": "norm_linear_norm"}  # fmt: skip
    weights = {path.removeprefix("transformer."): w for path, w in case.weights.items()}
    other = backend.runtime.build(ViTConfig(**fields), weights, dtype="float64", device="cpu")
    assert_outputs_agree(backend.forward(case), backend.runtime.forward(other, case.images))


@pytest.mark.parametrize("norm", ["matrix", "batch"])
def test_an_image_hangs_on_those_beside_it_by_the_norm_of_the_batch_alone(
    backend: Subject, norm: str
) -> None:
    case = Case(NYSTROM.replace(pinv_norm=norm), batch=3)
    model, images = backend.build(case), case.images
    together = backend.runtime.forward(model, images)
    alone = np.concatenate([backend.runtime.forward(model, image[None]) for image in images])
    assert (error(together, alone) > 1e-4) == (norm == "batch")
    assert (error(together, alone) <= LIMIT) == (norm == "matrix")


def softmax(scores: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


@pytest.mark.parametrize("norm", ["matrix", "batch"])
def test_the_steps_lead_to_the_pseudo_inverse(backend: Subject, norm: str) -> None:
    """Of softmaxes that are well conditioned, and then of ones that have no inverse at all."""
    pseudo_inverse = backend.module("families.efficient_vit").pseudo_inverse
    scores = np.random.default_rng(0).standard_normal((2, 3, 5, 5))
    a = softmax(scores + 4 * np.eye(5))
    found = backend.array(pseudo_inverse(backend.tensor(a), 12, norm))
    assert error(found, np.linalg.inv(a)) <= LIMIT
    a[..., 1, :] = a[..., 0, :]
    found = backend.array(pseudo_inverse(backend.tensor(a), 20, norm))
    assert error(found, np.linalg.pinv(a)) <= 1e-9
    few = backend.array(pseudo_inverse(backend.tensor(a), 3, norm))
    assert error(few, np.linalg.pinv(a)) > 1e-3


def test_as_many_landmarks_as_tokens_is_attention_to_all(backend: Subject) -> None:
    """softmax · softmax⁺ · softmax of one matrix is that matrix."""
    changes = dict(num_landmarks=NYSTROM.tokens, pinv_iterations=40, residual_kernel=None)
    nystrom = Case(NYSTROM.replace(**changes))
    weights = nystrom.weights
    full = backend.runtime.build(NYSTROM.replace(mixer="full"), weights, dtype="float64")
    wanted = backend.runtime.forward(full, nystrom.images)
    assert error(backend.forward(nystrom), wanted) <= 1e-6
    fewer = Case(NYSTROM.replace(**changes | {"pinv_iterations": 2}))
    assert error(backend.forward(fewer), wanted) > 1e-3


def test_more_features_come_nearer_to_the_softmax(backend: Subject) -> None:
    """The estimate has no bias: a hundred times as many features err a tenth as much, or so."""
    rng = np.random.default_rng(0)
    # Of small q and k: the variance of the estimate grows with the exponential of their squares.
    q, k, v = (rng.standard_normal((2, 3, NYSTROM.tokens, 5)) / 2 for _ in range(3))
    wanted = softmax(q @ np.swapaxes(k, -2, -1) / np.sqrt(5)) @ v

    def parted(features: int) -> float:
        case = Case(NYSTROM.replace(mixer="performer", performer_features=features, depth=1))
        layer = backend.build(case).transformer.blocks[0].attn
        found = backend.array(layer.mix(*map(backend.tensor, (q, k, v))))
        return float(np.sqrt(((found - wanted) ** 2).mean() / (wanted**2).mean()))

    few, many = parted(20), parted(2000)
    assert many < few / 5
    assert many < 0.05


MATRICES: dict[str, Callable[[np.ndarray], bool]] = {
    "linear": lambda weights: bool((weights >= 0).all()),
    "performer": lambda weights: bool((weights >= 0).all()),
}


@pytest.mark.parametrize("mixer", MATRICES)
def test_weights_of_tokens_are_shares(backend: Subject, mixer: str) -> None:
    """With v all ones every token gets one, so that what it gets is a mean of values."""
    mixers = backend.module("families.efficient_vit").MIXERS
    config = NYSTROM.replace(mixer=mixer, performer_eps=1e-300)
    case = Case(config)
    layer = backend.build(case).transformer.blocks[0].attn
    assert type(layer) is mixers[mixer]
    rng = np.random.default_rng(0)
    q, k = (backend.tensor(rng.standard_normal((2, 3, config.tokens, 5))) for _ in range(2))
    eye = np.broadcast_to(np.eye(config.tokens), (2, 3, config.tokens, config.tokens))
    weights = backend.array(layer.mix(q, k, backend.tensor(eye)))
    assert MATRICES[mixer](weights)
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=LIMIT)
