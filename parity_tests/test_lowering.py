"""Every model lowers for TPU and CUDA, which need not be here: the right program, in its dtype.

That it lowers is no proof that it compiles there; docs/devices.md says what is proven.
"""

from __future__ import annotations

import pytest

from isovit.spec.config import Config
from isovit.spec.families import FAMILIES, family_module, variants
from parity_tests.examples import EXAMPLES, NIGHTLY, require_first
from parity_tests.lowering import NAMES, PLATFORMS, Plant, faults, lower, trace
from parity_tests.subject import Subject

ON_JAX = {"flax", "keras:jax"}


@pytest.fixture(autouse=True)
def on_jax(backend: Subject) -> None:
    if backend.name not in ON_JAX:
        pytest.skip("concerns JAX only")


def products(config: Config) -> int:
    """Products of the blocks alone: four dense layers, or three, and two of attention in each."""
    depth = sum(config.depths) if hasattr(config, "depths") else config.depth
    return depth * (6 if getattr(config, "attn_proj", True) else 5)


def shallow(config: Config) -> Config:
    """The same model with two blocks, or with two at every stage."""
    if hasattr(config, "depths"):
        return config.replace(depths=[min(depth, 2) for depth in config.depths])
    fields = {"depth": 2, "learner_loc": 1, "dense_depths": (1, 1)}  # counted in blocks
    return config.replace(**{name: n for name, n in fields.items() if getattr(config, name, ())})


def upcast(config: Config) -> bool:
    return getattr(config, "performer_upcast", False)


def all_faults(backend: Subject, config: Config, dtype: str, mode: str) -> dict[str, list[str]]:
    traced = trace(backend.name, config, dtype, mode)
    wanted = products(config) * (3 if mode == "train" else 1)
    found = {
        platform: faults(lower(traced, platform), dtype, wanted, upcast=upcast(config))
        for platform in PLATFORMS
    }
    return {platform: lines for platform, lines in found.items() if lines}


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("name", EXAMPLES)
def test_every_form_lowers(backend: Subject, name: str, dtype: str) -> None:
    assert not all_faults(backend, EXAMPLES[name].config, dtype, "infer")


TRAINED = [name for name, case in EXAMPLES.items() if case.config.num_classes]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("name", TRAINED)
def test_a_training_step_of_every_form_lowers(backend: Subject, name: str, dtype: str) -> None:
    if dtype == "float32":
        require_first(backend, name)
    assert not all_faults(backend, EXAMPLES[name].config, dtype, "train")


FIRST = {next(iter(family_module(family).VARIANTS)) for family in FAMILIES}
"""Of Keras, which takes twice as long as Flax for the same program, a model of each family."""


@pytest.mark.slow
@pytest.mark.parametrize("name", variants())
def test_every_published_model_lowers(backend: Subject, name: str) -> None:
    """At its own widths, with few of its blocks: the others are the same."""
    if backend.name == "keras:jax" and name not in FIRST and not NIGHTLY:
        pytest.skip(
            "a model of each family is lowered: HYPOTHESIS_PROFILE=nightly lowers the others"
        )
    assert not all_faults(backend, shallow(variants()[name]), "bfloat16", "infer")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_h14", "t2t_vit_24"])
def test_the_largest_lower_whole(backend: Subject, name: str) -> None:
    assert not all_faults(backend, variants()[name], "bfloat16", "infer")


# Planted faults


def on_the_host(x):
    import jax

    return jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def by_a_library(x):
    import jax

    return jax.ffi.ffi_call("a_library", jax.ShapeDtypeStruct(x.shape, x.dtype))(x)


def widened(x):
    wide = x.astype("float32")
    return (wide @ wide.T).astype(x.dtype)


def narrowed(x):
    narrow = x.astype("bfloat16")
    return (narrow @ narrow.T).astype(x.dtype)


FAULTS: dict[str, tuple[Plant, str, str]] = {
    "a call of a library": (by_a_library, "float32", "calls a_library"),
    "float32 inside a bfloat16 model": (widened, "bfloat16", "not in bfloat16"),
    "bfloat16 inside a float32 model": (narrowed, "float32", "not in float32"),
}


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(backend: Subject, fault: str, platform: str) -> None:
    config = EXAMPLES["vit_timm"].config
    plant, dtype, wanted = FAULTS[fault]
    found = faults(lower(trace(backend.name, config, dtype, "infer", plant), platform), dtype, 1)
    assert len(found) == 1
    assert wanted in found[0]


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_callback_to_the_host_does_not_lower(backend: Subject, platform: str) -> None:
    config = EXAMPLES["vit_timm"].config
    traced = trace(backend.name, config, "float32", "infer", on_the_host)
    with pytest.raises(ValueError, match=f"different from the lowering platform {platform}"):
        lower(traced, platform)


def test_rounded_products_are_caught(backend: Subject) -> None:
    import jax

    config = EXAMPLES["t2t_performer"].config
    with jax.default_matmul_precision("default"):
        text = lower(trace(backend.name, config, "float32", "infer"), "tpu")
    assert all("rounded before" in line for line in faults(text, "float32", 1))
    assert len(faults(text, "float32", 1)) > products(config)


def test_what_a_platform_lacks_does_not_lower(backend: Subject) -> None:
    """An operation with a rule for the CPU alone fails when it is lowered, not when it runs."""
    from jax.extend.core import Primitive
    from jax.interpreters import mlir

    odd = Primitive("odd")
    odd.def_abstract_eval(lambda x: x)
    mlir.register_lowering(odd, lambda context, x: [x], platform="cpu")
    traced = trace(backend.name, EXAMPLES["vit_timm"].config, "float32", "infer", odd.bind)
    assert lower(traced, "cpu")
    for platform in PLATFORMS:
        with pytest.raises(NotImplementedError, match=f"odd.*not found for platform {platform}"):
            lower(traced, platform)


def test_too_few_products_are_caught(backend: Subject) -> None:
    config = EXAMPLES["vit_timm"].config
    text = lower(trace(backend.name, config, "float32", "infer"), "tpu")
    assert not faults(text, "float32", products(config))
    assert faults(text, "float32", 10 * products(config))
