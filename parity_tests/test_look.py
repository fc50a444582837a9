"""Every backend looks at the same places: equal maps, and an equal picture."""

from __future__ import annotations

import numpy as np
import pytest

import isovit
from isovit.look.attention import attention_maps
from isovit.look.picture import draw, features, photograph
from isovit.spec.config import Config
from isovit.spec.families import FAMILIES
from parity_tests.agreement import assert_agree
from parity_tests.examples import EXAMPLES
from parity_tests.oracles.arrays import reference
from parity_tests.strategies import Case
from parity_tests.subject import Subject

FIRST = {config.family: config for config in reversed([case.config for case in EXAMPLES.values()])}


def picture(config: Config, weights: dict, outputs: dict, images: np.ndarray) -> bytes:
    maps = attention_maps(config, weights, outputs)
    seen = photograph(config, images[0])
    return draw(seen, maps, features(outputs, maps), at=list(maps)[-1]).tobytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_maps_and_picture_are_those_of_the_reference(backend: Subject, family: str) -> None:
    case = Case(FIRST[family])
    config, weights, images = case.config, case.weights, case.images
    model = backend.build(case, "float64")
    found, put_out = isovit.attention(model, images), isovit.activations(model, images)
    exact = reference(config, weights, images)
    wanted = attention_maps(config, weights, exact)
    assert list(found) == list(wanted)
    assert_agree(
        {path: map_.weights for path, map_ in found.items()},
        {path: map_.weights for path, map_ in wanted.items()},
        "activation",
    )
    assert picture(config, weights, put_out, images) == picture(config, weights, exact, images)
