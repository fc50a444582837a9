"""The mini ViT of keras.io's TokenLearner example beside the same of Keras's own layers.

No package has the model, and its weights have no names that could be told, so that it is no format.
What Keras itself makes of the example's arguments is compared here: what is "same" padding, which
GELU ``ops.gelu`` is, how wide a head of ``key_dim`` is. Other backends agree with Keras's.
"""

from __future__ import annotations

import math

import pytest

from isovit.spec.families import config as variant
from isovit.spec.families import param_tree
from isovit.spec.families.token_learner import TokenLearnerConfig
from isovit.spec.initialize import init
from parity_tests.agreement import assert_outputs_agree
from parity_tests.oracles import scenic
from parity_tests.oracles.families.token_learner import scenic_sizes
from parity_tests.strategies import Case
from parity_tests.subject import Subject

FEW = 520
"""Numbers of the largest bias of the example, of 4 heads and 128; its kernels have more."""
MINI = [f"token_learner_mini{form}" for form in ("", "_4", "_8")]


def small(name: str) -> TokenLearnerConfig:
    """A variant with few numbers, over a grid that is not square."""
    config = variant(name)
    assert isinstance(config, TokenLearnerConfig)
    return config.replace(
        image_size=(18, 24), embed_dim=10, num_heads=2, head_dim=7, mlp_dim=13, num_classes=5
    )


def require_exact_keras(backend: Subject) -> None:
    """Skip where there is no Keras, or none whose float64 is one."""
    if backend.framework != "keras":
        pytest.skip("concerns Keras only")
    if backend.name == "keras:tensorflow":
        pytest.skip("the constants of ops.gelu pass through float32 on TensorFlow")


@pytest.mark.parametrize("name", MINI)
def test_the_mini_vit_is_that_of_stock_keras_layers(backend: Subject, name: str) -> None:
    require_exact_keras(backend)
    from parity_tests.oracles.keras_io import Mini

    case = Case(small(name))
    found = backend.forward(case)
    original = Mini(case.config, "float64")
    original.assign(case.weights)
    assert_outputs_agree(found, backend.array(original.logits(backend.tensor(case.images))))


@pytest.mark.parametrize(
    "change",
    [
        {"activation": "gelu"},
        {"norm_eps": 1e-3},
        {"learner_pool": "sum"},
        {"learner_loc": 2},
        {"mlp_output_activation": False},
    ],
    ids=str,
)
def test_a_config_that_is_not_the_examples_is_seen(backend: Subject, change: dict) -> None:
    require_exact_keras(backend)
    from parity_tests.oracles.keras_io import Mini

    case = Case(small("token_learner_mini_4"))
    other = Case(case.config.replace(**change))
    assert other.weights.keys() == case.weights.keys()
    found = backend.forward(other)
    original = Mini(case.config, "float64")
    original.assign(case.weights)
    with pytest.raises(AssertionError, match="output beyond 1e-12"):
        assert_outputs_agree(found, backend.array(original.logits(backend.tensor(case.images))))


@pytest.mark.parametrize("name", MINI)
def test_stock_keras_layers_have_as_many_parameters(backend: Subject, name: str) -> None:
    if backend.framework != "keras":
        pytest.skip("concerns Keras only")
    from parity_tests.oracles.keras_io import Mini

    config = variant(name)
    assert isinstance(config, TokenLearnerConfig)
    assert Mini(config, "float32").model.count_params() == param_tree(config).count()


def test_the_scheme_of_keras_draws_what_keras_draws(backend: Subject) -> None:
    """Uniform numbers up to a bound: the deviation of many of them tells it."""
    if backend.framework != "keras":
        pytest.skip("concerns Keras only")
    from parity_tests.oracles.keras_io import Mini

    config = variant("token_learner_mini_8")
    assert isinstance(config, TokenLearnerConfig)
    theirs, ours = Mini(config, "float32"), Mini(config, "float32")
    ours.assign(init(config))
    for path, layer in theirs.layers.items():
        for drawn, wanted in zip(ours.layers[path].weights, layer.weights, strict=True):
            found, kept = backend.array(drawn.value), backend.array(wanted.value)
            if math.prod(found.shape) < FEW:
                assert found.tolist() == kept.tolist(), wanted.path
            else:
                assert found.std() == pytest.approx(kept.std(), rel=0.1), wanted.path
                assert abs(found).max() == pytest.approx(abs(kept).max(), rel=0.1), wanted.path


@pytest.mark.parametrize("name", ["ti16", "s16", "b16", "l16", "b16_v1", "b16_fuser"])
def test_the_official_model_has_as_many_parameters(name: str) -> None:
    config = variant(f"token_learner_{name}")
    assert isinstance(config, TokenLearnerConfig)
    shapes = scenic.shapes(scenic_sizes(config)).values()
    assert sum(map(math.prod, shapes)) == param_tree(config).count()
