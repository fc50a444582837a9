"""What is timed is the model: a step of inference is its forward pass, one of training learns."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from isovit.benchmarks.driver import FORWARD_ONLY
from isovit.errors import InputError
from isovit.parity.budgets import LIMITS
from isovit.parity.compare import error
from parity_tests.examples import EXAMPLES
from parity_tests.subject import Subject

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]


def ways(backend: Subject, name: str) -> list[str]:
    """The ways that can be tried here.

    torch.compile needs a C++ compiler, and a minute a model; torchax a process without it, so that
    ``test_torchax`` has it.
    """
    compiler = (shutil.which("g++") or shutil.which("clang++")) and name == "vit_timm"
    absent = {"torchax"} if compiler else {"torchax", "compile"}
    return [way for way in backend.runtime.WAYS if way not in absent]


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    shifted = logits - logits.max(-1, keepdims=True)
    picked = shifted[np.arange(len(labels)), labels]
    return float((np.log(np.exp(shifted).sum(-1)) - picked).mean())


@pytest.mark.parametrize("name", ["vit_timm", "t2t_performer"])
def test_every_way_computes_the_forward_pass(name: str, backend: Subject) -> None:
    case, runtime = EXAMPLES[name], backend.runtime
    for way in ways(backend, name):
        model = runtime.build(case.config, case.weights, dtype="float32", device="cpu")
        step = runtime.inference(model, runtime.put(model, case.images), way)
        wanted = runtime.forward(model, case.images)
        assert error(wanted, backend.array(step())) < LIMITS["float32"]["output"], way
        assert np.array_equal(backend.array(step()), backend.array(step())), way


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_recorded_graph_is_the_model_with_the_weights_it_has(name: str, backend: Subject) -> None:
    if backend.name != "keras:torch":
        pytest.skip("concerns Keras on torch only")
    case, runtime = EXAMPLES[name], backend.runtime
    model = runtime.build(case.config, case.weights, dtype="float64", device="cpu")
    step = runtime.inference(model, runtime.put(model, case.images), "graph")
    wanted = runtime.forward(model, case.images)
    assert np.array_equal(backend.array(step()), wanted)
    path = next(iter(case.weights))  # a weight that the graph has to read at every call
    runtime.write(model, {**case.weights, path: case.weights[path] + 0.5})
    changed = backend.array(step())
    assert not np.array_equal(changed, wanted)
    assert np.array_equal(changed, runtime.forward(model, case.images))


@pytest.mark.parametrize("name", ["vit_timm", "t2t_performer"])
def test_every_way_trains(name: str, backend: Subject) -> None:
    case, runtime = EXAMPLES[name], backend.runtime
    labels = np.arange(len(case.images)) % case.config.num_classes
    for way in ways(backend, name):
        model = runtime.build(case.config, case.weights, dtype="float32", device="cpu")
        if (backend.name, way) in FORWARD_ONLY:
            with pytest.raises(InputError, match="keras:torch trains by eager, not by graph"):
                runtime.training(model, case.images, labels, way)
            continue
        first = cross_entropy(runtime.forward(model, case.images), labels)
        images, targets = runtime.put(model, case.images), runtime.put(model, labels)
        step = runtime.training(model, images, targets, way)
        losses = [float(backend.array(step())) for _ in range(5)]
        assert losses[0] == pytest.approx(first, rel=1e-4), way
        assert losses[4] < losses[0], way
