"""Do foreign checkpoints mean here what they mean where they come from?

A small random model of the original code is saved as its own users save it. ``isovit.load`` must
find format and config, told only what no file tells, and every backend's float64 logits must be
the original's. Then isovit saves: the original must load that strictly and give the very same
logits. The originals and what they mean are drawn in ``oracles.pairs``.

With ISOVIT_FORMAT_ERRORS in the environment, every comparison adds a line of JSON to the file that
it names.
"""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import isovit
from isovit.backends import get_backend
from isovit.parity.compare import error
from isovit.parity.job import draw_inputs
from isovit.spec.config import Preprocess
from isovit.spec.families import FAMILIES
from isovit.spec.families.cait import CaiTConfig
from isovit.spec.families.token_learner import TokenLearnerConfig
from isovit.spec.families.vit import ViTConfig
from isovit.spec.initialize import probe
from isovit.weight_convert.formats import FORMATS
from parity_tests.agreement import assert_outputs_agree
from parity_tests.oracles import fitting, google, pairs, scenic
from parity_tests.oracles.families.token_learner import scenic_models, scenic_sizes
from parity_tests.oracles.families.vit import google_sizes
from parity_tests.oracles.importing import import_oracle
from parity_tests.oracles.originals import Original
from parity_tests.oracles.pairs import Pair
from parity_tests.subject import Subject

pytestmark = pytest.mark.oracles

# The search over configs is that of ``test_forward``; here it is over the rows of the tables.
EXAMPLES = settings.default.max_examples
FEWER = settings(max_examples=max(3, EXAMPLES // 4))
FEW = settings(max_examples=max(2, EXAMPLES // 10))  # for each of many parameters

State = dict[str, torch.Tensor]
Arrays = dict[str, np.ndarray]


def identified(path: Path, format: str, pair: Pair) -> isovit.Checkpoint:
    """A foreign file as isovit takes it, told only what nothing in the file tells."""
    found = isovit.load(path, **pair.given)
    assert found.source.format == format
    free = {name: getattr(pair.config, name) for name in ("preprocess", "init_scheme")}
    assert found.config.replace(**free) == pair.config
    return found


def agreeing(
    backend: Subject, found: isovit.Checkpoint, images: np.ndarray, wanted: np.ndarray
) -> isovit.Checkpoint:
    """Compare a backend with an original; gives what the backend's model holds."""
    model = backend.runtime.build(found.config, found.weights, dtype="float64", device="cpu")
    output = backend.runtime.forward(model, images)
    assert_outputs_agree(output, wanted)
    record(
        format=found.source.format,
        family=found.config.family,
        backend=backend.name,
        error=error(output, wanted),
    )
    return isovit.Checkpoint(found.config, backend.runtime.read(model))


def record(**row: Any) -> None:
    """Keep an error that was measured."""
    if path := os.environ.get("ISOVIT_FORMAT_ERRORS"):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


@contextmanager
def folder() -> Iterator[Path]:
    """A folder for one example: hypothesis calls a test many times within one ``tmp_path``."""
    with TemporaryDirectory() as path:
        yield Path(path)


def images_of(pair: Pair) -> np.ndarray:
    """Two images of the size that a config wants."""
    return draw_inputs(pair.config, batch=2, seed=0)[0]


def randomised(model: nn.Module) -> nn.Module:
    """The model with weights under which every parameter shows; fixed ones stay."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                noise = torch.randn(buffer.shape, generator=generator) / 5
                buffer.copy_(noise.exp() if name.endswith("var") else noise)
        for name, param in model.named_parameters():
            if param.requires_grad:
                noise = torch.randn(param.shape, generator=generator)
                matrix = param.ndim > 1 and "token" not in name.rpartition(".")[2]
                is_scale = param.ndim == 1 and name.endswith("weight")
                # The performer's features are exponentials of its k and q.
                width = param[0].numel() * (16 if "kqv" in name else 1) if matrix else 25
                param.copy_(float(is_scale) + noise / width**0.5)
    return model.eval()


def logits(model: nn.Module, images: np.ndarray, pool: str = "cls", **options: Any) -> np.ndarray:
    """The original's float64 answer to (batch, height, width, channels) images.

    Args:
        model: that is put into float64.
        images: as isovit takes them.
        pool: what becomes of the tokens of a model of transformers without a head: the first of
            them, their ``mean``, or all where it is ``none``.
        options: of the model's call.
    """
    with torch.inference_mode():
        output = model.double()(torch.tensor(images).double().permute(0, 3, 1, 2), **options)
    if isinstance(output, dict):
        tokens = output.get("last_hidden_state")
        output = output["logits"] if tokens is None else pooled(tokens, pool)
    return output.numpy()


def pooled(tokens: torch.Tensor, pool: str) -> torch.Tensor:
    """(batch, tokens, dim) as features."""
    return {"none": tokens, "mean": tokens.mean(1)}.get(pool, tokens[:, 0])


# State dicts


def assert_same(a: nn.Module, b: nn.Module) -> None:
    """The same weights, bit for bit; the outputs' last bit hangs on where weights lie in memory."""
    ours, theirs = a.state_dict(), b.state_dict()
    assert theirs.keys() - ours.keys() <= {"pooler.dense.weight", "pooler.dense.bias"}
    for name, tensor in ours.items():
        assert torch.equal(tensor.double(), theirs[name].double()), name


def check(backend: Subject, format: str, make: Callable[..., nn.Module], pair: Pair) -> None:
    """Compare an original with a backend, and the original with itself after a round trip."""
    torch.manual_seed(0)  # of what ``randomised`` leaves: the performer's features
    original, images = randomised(make(**pair.arguments)), images_of(pair)
    with folder() as path:
        save_file(original.state_dict(), path / "theirs.safetensors")
        found = identified(path / "theirs.safetensors", format, pair)
        wanted = logits(original, images)
        ours = agreeing(backend, found, images, wanted)
        isovit.save(ours, path / "ours.safetensors", format)
        again = make(**pair.arguments).eval()
        again.load_state_dict(load_file(path / "ours.safetensors"), strict=True)
    assert_same(again, original)
    assert_outputs_agree(logits(again, images), wanted)


ORIGINALS: dict[str, Original] = {
    f"{family}, {name}": original
    for family in FAMILIES
    for name, original in import_module(f"parity_tests.oracles.families.{family}").ORIGINALS.items()
}


@pytest.mark.parametrize("name", ORIGINALS)
@FEWER
@given(data=st.data())
def test_original(
    backend: Subject, name: str, data: st.DataObject, pytestconfig: pytest.Config
) -> None:
    original = ORIGINALS[name]
    make = original.make(import_oracle(original.module, pytestconfig))
    check(backend, original.format, make, data.draw(original.pairs()))


SMALL = dict(img_size=(12, 8), patch_size=4, embed_dim=15, depth=2, num_heads=3, num_classes=5)
SMALL_CONFIG = ViTConfig(
    image_size=(12, 8), patch_size=(4, 4), embed_dim=15, depth=2, num_heads=3, mlp_dim=60,
    num_classes=5,
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "differs"),
    [
        ("deit_tiny_patch16_224", {}),
        ("deit_tiny_distilled_patch16_224", {"dist_token": True, "dist_head": True}),
        ("deit3_small_patch16_224", {"pos_embed_tokens": "patches", "layer_scale_init": 1e-6}),
    ],
)
def test_timm_deit(
    backend: Subject, name: str, differs: dict[str, Any], pytestconfig: pytest.Config
) -> None:
    """DeiT by timm's own entry points, whose conventions are then timm's choice, not the test's."""
    library = import_oracle("timm", pytestconfig)
    config = SMALL_CONFIG.replace(**differs)
    pair = Pair({"model_name": name, **SMALL}, config, pairs.timm_untold(config))
    check(backend, "timm", library.create_model, pair)


def test_early_timm_vit(backend: Subject, pytestconfig: pytest.Config) -> None:
    """Early releases had a hidden layer before the head, which is read but no longer written."""
    library = import_oracle("timm.models.vision_transformer", pytestconfig)
    original = library.VisionTransformer(**SMALL)
    original.pre_logits = nn.Sequential()
    original.pre_logits.add_module("fc", nn.Linear(15, 7))
    original.pre_logits.add_module("act", nn.Tanh())
    original.head_drop = original.pre_logits  # a module at this place in the chain
    original.head = nn.Linear(7, 5)
    config = SMALL_CONFIG.replace(pre_logits_dim=7)
    pair, images = Pair({}, config, pairs.timm_untold(config)), images_of(Pair({}, config))
    state = {n: t for n, t in randomised(original).state_dict().items() if "head_drop" not in n}
    with folder() as path:
        save_file(state, path / "theirs.safetensors")
        ours = agreeing(
            backend, identified(path / "theirs.safetensors", "timm", pair), images,
            logits(original, images),
        )  # fmt: skip
        with pytest.raises(isovit.InputError, match="it has pre_logits_dim"):
            isovit.save(ours, path / "ours.safetensors", "timm")


# Files of training code whose models have timm's names


@dataclass(frozen=True)
class Form:
    """A file that original training code writes.

    Attributes:
        format: that it is of.
        content: of the file, around the state dict of a model of timm's.
        arguments: of that model beside those that all have.
        differs: fields in which its config differs from those of the others.
    """

    format: str
    content: Callable[[State], dict[str, Any]]
    arguments: dict[str, Any] = field(default_factory=dict)
    differs: dict[str, Any] = field(default_factory=dict)


def prefixed(prefix: str, state: State) -> State:
    """The names of a state dict behind a prefix."""
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def spoiled(state: State) -> State:
    """Other weights under the same names."""
    return {name: tensor + 1 for name, tensor in state.items()}


def dino_head() -> State:
    """The projection head of a training."""
    return {"mlp.0.weight": torch.ones(3, 15), "last_layer.weight_g": torch.ones(9, 1)}


def mae_decoder() -> State:
    """The decoder of the pre-training."""
    return {
        "mask_token": torch.ones(1, 1, 8),
        "decoder_pos_embed": torch.ones(1, 5, 8),
        "decoder_embed.weight": torch.ones(8, 15),
        "decoder_blocks.0.attn.qkv.weight": torch.ones(24, 8),
        "decoder_norm.weight": torch.ones(8),
        "decoder_pred.bias": torch.ones(48),
    }


def of_training(**entries: Any) -> dict[str, Any]:
    """What lies beside the weights while a training goes on."""
    return {**entries, "epoch": 3, "args": Namespace(lr=1e-3), "optimizer": {"state": {}}}


HEADLESS = dict(num_classes=0)  # in timm's words and in ours
TWO_HEADS = dict(dist_token=True, dist_head=True)

FORMS: dict[str, Form] = {
    "deit": Form("deit", lambda state: {"model": state}),
    "deit distilled": Form("deit", lambda state: {"model": state}, dict(distilled=True), TWO_HEADS),
    "deit in training": Form(
        "deit", lambda state: of_training(model=spoiled(state), model_ema=state)
    ),
    "mae": Form("mae", lambda state: {"model": state}, HEADLESS, HEADLESS),
    "mae with its decoder": Form(
        "mae", lambda state: of_training(model=state | mae_decoder()), HEADLESS, HEADLESS
    ),
    "mae fine-tuned": Form(
        "mae",
        lambda state: {"model": state},
        dict(global_pool="avg"),
        dict(pool="mean_patches", final_norm="pooled"),
    ),
    "dino": Form("dino", lambda state: state, HEADLESS, HEADLESS),
    "dino in training": Form(
        "dino",
        lambda state: of_training(
            student=prefixed("module.backbone.", spoiled(state))
            | prefixed("module.head.", dino_head()),
            teacher=prefixed("backbone.", state) | prefixed("head.", dino_head()),
            dino_loss={"center": torch.zeros(1, 9)},
        ),
        HEADLESS,
        HEADLESS,
    ),
    "dino in training, distributed": Form(
        "dino",
        lambda state: {
            "teacher": prefixed("module.backbone.", state) | prefixed("module.head.", dino_head())
        },
        HEADLESS,
        HEADLESS,
    ),
    "dino, the student alone": Form(
        "dino",
        lambda state: {"student": prefixed("module.backbone.", state)},
        HEADLESS,
        HEADLESS,
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_timm_names(backend: Subject, name: str, pytestconfig: pytest.Config) -> None:
    library = import_oracle("timm.models.deit", pytestconfig)
    form = FORMS[name]
    arguments = {**SMALL, "img_size": 8, **form.arguments}
    make = library.VisionTransformer
    if arguments.pop("distilled", False):
        make = library.VisionTransformerDistilled
    config = SMALL_CONFIG.replace(image_size=8, **form.differs)
    original, pair = randomised(make(**arguments)), Pair(arguments, config, ("num_heads",))
    images = images_of(pair)
    with folder() as path:
        torch.save(form.content(original.state_dict()), path / "theirs.pth")
        found = identified(path / "theirs.pth", form.format, pair)
        assert found.config.preprocess == Preprocess()  # ImageNet's statistics
        wanted = logits(original, images)
        ours = agreeing(backend, found, images, wanted)
        isovit.save(ours, path / "ours.pth", form.format)
        content = torch.load(path / "ours.pth", weights_only=True)
        again = make(**arguments).eval()
        again.load_state_dict(content[FORMATS[form.format].wrapper], strict=True)
    assert_same(again, original)
    assert_outputs_agree(logits(again, images), wanted)


CAIT_FORMS: dict[str, Callable[[State], dict[str, Any]]] = {
    "released": lambda state: {"model": prefixed("module.", state)},
    "in training": lambda state: of_training(model=spoiled(state), model_ema=state),
}


@pytest.mark.parametrize("name", CAIT_FORMS)
def test_forms_of_the_official_cait(
    backend: Subject, name: str, pytestconfig: pytest.Config
) -> None:
    """Its model is timm's, and so are the names."""
    make = import_oracle("timm.models.cait", pytestconfig).Cait
    arguments = {**SMALL, "depth_token_only": 2}
    config = CaiTConfig(
        image_size=(12, 8), patch_size=(4, 4), embed_dim=15, depth=2, num_heads=3, mlp_dim=60,
        num_classes=5,
    )  # fmt: skip
    original, pair = randomised(make(**arguments)), Pair(arguments, config, ("image_size",))
    images = images_of(pair)
    with folder() as path:
        torch.save(CAIT_FORMS[name](original.state_dict()), path / "theirs.pth")
        found = identified(path / "theirs.pth", "deit", pair)
        wanted = logits(original, images)
        ours = agreeing(backend, found, images, wanted)
        isovit.save(ours, path / "ours.pth", "deit")
        again = make(**arguments).eval()
        content = torch.load(path / "ours.pth", weights_only=True)
        again.load_state_dict(content["model"], strict=True)
    assert_same(again, original)
    assert_outputs_agree(logits(again, images), wanted)


# Folders of transformers

HF: dict[str, Callable[[], st.SearchStrategy[Pair]]] = {
    kind: drawn
    for family in FAMILIES
    for kind, drawn in getattr(
        import_module(f"parity_tests.oracles.families.{family}"), "HF", {}
    ).items()
}


def options_of(kind: str, config: Any) -> dict[str, Any]:
    """A family without a class token gives its mean.

    MAE shuffles the patches unless told their order; the class token sees them in any.
    """
    if "MAE" not in kind:
        return {"pool": getattr(config, "pool", "mean")}
    tokens = config.grid[0] * config.grid[1]
    return {"noise": torch.rand(2, tokens, generator=torch.Generator().manual_seed(0))}


def hf_arguments(kind: str) -> dict[str, Any]:
    """What ``from_pretrained`` has to be told; isovit keeps no pooler and masks nothing."""
    if kind in ("ViTModel", "DeiTModel"):
        return {"add_pooling_layer": False}
    return {"mask_ratio": 0.0} if "MAE" in kind else {}


@pytest.mark.parametrize("kind", HF)
@FEW
@given(data=st.data(), sharded=st.booleans())
def test_hf(
    backend: Subject, kind: str, data: st.DataObject, sharded: bool, pytestconfig: pytest.Config
) -> None:
    """Through folders. Attention is torch's own: ``eager`` takes its softmax in float32.

    ``gelu_new`` is ``gelu_pytorch_tanh`` with other rounding: the bits are compared under one name.
    """
    cls = getattr(import_oracle("transformers", pytestconfig), kind)
    pair = data.draw(HF[kind]())
    original = randomised(cls(cls.config_class(**pair.arguments)))
    images, options = images_of(pair), options_of(kind, pair.config)
    with folder() as path:
        original.save_pretrained(path / "theirs", max_shard_size=100 if sharded else "1GB")
        assert len(list((path / "theirs").glob("*.index.json"))) == int(sharded)
        found = identified(path / "theirs", "hf", pair)
        torch.save(original.state_dict(), path / "in_memory.pth")
        named = isovit.load(path / "in_memory.pth", **in_memory(pair).given)
        assert named.config == found.config.replace(preprocess=named.config.preprocess)
        wanted = logits(original, images, **options)
        ours = agreeing(backend, found, images, wanted)
        isovit.save(ours, path / "ours", "hf")
        named_otherwise = {n: v for n, v in pair.arguments.items() if n == "hidden_act"}
        arguments = {**hf_arguments(kind), **named_otherwise}
        again, info = cls.from_pretrained(path / "ours", output_loading_info=True, **arguments)
    assert all(np.array_equal(named.weights[name], found.weights[name]) for name in found.weights)
    assert not any(info.values()), info
    assert_same(again, original)
    assert_outputs_agree(logits(again.eval(), images, **options), wanted)


def in_memory(pair: Pair) -> Pair:
    """The same model without its ``config.json``, under the names that its modules have."""
    beside = ("num_heads", "norm_eps", "activation", "image_size")
    beside += ("patch_strides", "patch_paddings", "kv_strides")
    beside = tuple(name for name in beside if hasattr(pair.config, name))
    return Pair(pair.arguments, pair.config, (*beside, *(pair.untold or ())))


@pytest.mark.parametrize("kind", ["ViTMAEForPreTraining", "ViTForMaskedImageModeling"])
def test_hf_pre_training(backend: Subject, kind: str, pytestconfig: pytest.Config) -> None:
    """The encoder of a model that reconstructs images; decoder and mask token are left out."""
    cls = getattr(import_oracle("transformers", pytestconfig), kind)
    arguments = dict(
        image_size=8, patch_size=4, hidden_size=12, num_hidden_layers=1, num_attention_heads=3,
        intermediate_size=10, encoder_stride=4, mask_ratio=0.0, decoder_hidden_size=8,
        decoder_num_attention_heads=2, decoder_num_hidden_layers=1,
    )  # fmt: skip
    config = SMALL_CONFIG.replace(
        image_size=8, embed_dim=12, depth=1, mlp_dim=10, num_classes=0, norm_eps=1e-12
    )
    pair, original = Pair(arguments, config), randomised(cls(cls.config_class(**arguments)))
    images = images_of(pair)
    with folder() as path:
        original.save_pretrained(path / "theirs")
        found = identified(path / "theirs", "hf", pair)
    assert any("pre-training" in note for note in found.source.notes)
    agreeing(backend, found, images, logits(original.vit, images, **options_of(kind, config)))


# Google's files

NAMES = {"google": google.VIT_JAX, "big_vision": google.BIG_VISION}
PREFIXED = [google.bare, google.checkpointed, google.named_params, google.image_tower]


@pytest.mark.parametrize("format", NAMES)
@FEWER
@given(data=st.data())
def test_google(backend: Subject, format: str, data: st.DataObject) -> None:
    pair = data.draw(pairs.google_vits(NAMES[format]))
    prefixed = data.draw(st.sampled_from(PREFIXED))
    stacked = format == "big_vision" and data.draw(st.booleans())
    arrays = google.random_arrays(**pair.arguments)
    arrays = google.half(arrays) if data.draw(st.booleans()) else arrays
    images = images_of(pair)
    with folder() as path:
        np.savez(path / "theirs.npz", **prefixed(google.scanned(arrays) if stacked else arrays))
        found = identified(path / "theirs.npz", format, pair)
        agreeing(backend, found, images, google.logits(NAMES[format], arrays, images))
        isovit.save(found, path / "ours.npz", format)
        assert_same_arrays(arrays_of(path / "ours.npz"), arrays)


def arrays_of(path: Path) -> Arrays:
    """What is in an npz."""
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def assert_same_arrays(found: Arrays, wanted: Arrays) -> None:
    """The same arrays, bit for bit; NumPy writes bfloat16 as two bytes without a name."""
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].shape == array.shape, name
        assert found[name].dtype.itemsize == array.dtype.itemsize, name
        assert found[name].tobytes() == array.tobytes(), name


@FEWER
@given(data=st.data())
def test_scenic(backend: Subject, data: st.DataObject) -> None:
    pair, prefixed = data.draw(scenic_models()), data.draw(st.sampled_from(PREFIXED[:3]))
    arrays, images = scenic.random_arrays(**pair.arguments), images_of(pair)
    with folder() as path:
        np.savez(path / "theirs.npz", **prefixed(arrays))
        found = identified(path / "theirs.npz", "scenic", pair)
        agreeing(
            backend, found, images, scenic.logits(arrays=arrays, images=images, **pair.arguments)
        )
        isovit.save(found, path / "ours.npz", "scenic")
        assert_same_arrays(arrays_of(path / "ours.npz"), arrays)


# The other way round: whatever isovit agrees to write


@pytest.fixture(scope="session")
def exact_torch() -> Subject:
    """One backend, where the question is not about backends; the originals need torch anyway."""
    runtime = get_backend("torch")
    runtime.exact_arithmetic()
    return Subject("torch", runtime)


class Library:
    """Models of the original libraries for configs of isovit, from files that isovit wrote."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def model(self, format: str, config: Any) -> nn.Module:
        """A new model that should be what a config says."""
        fit = fitting.fit(config.family, format)
        assert fit.make is not None
        return fit.make(self.module(fit.module), config)

    def module(self, name: str) -> ModuleType:
        """A module of a library."""
        return import_oracle(name, self.config)

    def answer(self, format: str, config: Any, path: Path, images: np.ndarray) -> np.ndarray:
        """What the original makes of a file."""
        if format in NAMES:
            arrays, wanted = arrays_of(path), google.shapes(NAMES[format], google_sizes(config))
            assert {name: array.shape for name, array in arrays.items()} == wanted
            return google.logits(NAMES[format], arrays, images)
        if format == "scenic":
            arrays, sizes = arrays_of(path), scenic_sizes(config)
            assert {name: array.shape for name, array in arrays.items()} == scenic.shapes(sizes)
            return scenic.logits(sizes, arrays, images)
        if format == "hf":
            kind = json.loads((path / "config.json").read_text())["architectures"][0]
            cls = getattr(self.module("transformers"), kind)
            model, info = cls.from_pretrained(path, output_loading_info=True, **hf_arguments(kind))
            assert not any(info.values()), info
            return logits(model.eval(), images, pool=getattr(config, "pool", "mean"))
        model = self.model(format, config).eval()
        model.load_state_dict(load_file(path), strict=True)
        return logits(model, images)


@pytest.mark.parametrize(("family", "format"), fitting.FOREIGN, ids=map("-".join, fitting.FOREIGN))
@FEW
@given(data=st.data())
def test_what_a_format_can_hold_its_library_reads(
    exact_torch: Subject, family: str, format: str, data: st.DataObject, pytestconfig: pytest.Config
) -> None:
    """Strictly, and it computes what the config says."""
    config = data.draw(fitting.fitting(family, format))
    fixed = {name: value for name, value in FORMATS[format].fixed if hasattr(config, name)}
    config = config.replace(**fixed)
    subject = isovit.Checkpoint(config, probe(config))
    images = draw_inputs(config, batch=2, seed=0)[0]
    suffixes = {"hf": "", "google": ".npz", "big_vision": ".npz", "scenic": ".npz"}
    suffix = suffixes.get(format, ".safetensors")
    with folder() as path:
        assert isovit.save(subject, path / f"ours{suffix}", format) == ()
        wanted = Library(pytestconfig).answer(format, config, path / f"ours{suffix}", images)
        agreeing(exact_torch, isovit.load(path / f"ours{suffix}"), images, wanted)


# That the comparison can fail

GOOGLE = pairs.Pair(
    dict(
        names=google.VIT_JAX,
        sizes=google.Sizes((4, 4), (3, 2), 3, 15, 2, 3, 60, num_classes=5),
    ),
    SMALL_CONFIG.replace(activation="gelu_tanh"),
    ("image_size",),
)


def exact_gelu(x: np.ndarray) -> np.ndarray:
    """GELU by the error function, as timm and transformers compute google's weights."""
    return nn.functional.gelu(torch.tensor(x)).numpy()


def query_for_key(arrays: Arrays) -> Arrays:
    """Query and key under each other's name."""
    other = {"query": "key", "key": "query"}

    def source(name: str) -> str:
        return "/".join(other.get(part, part) for part in name.split("/"))

    return {name: arrays[source(name)] for name in arrays}


def heads_for_head_dim(arrays: Arrays) -> Arrays:
    """The numbers of q in the order (head_dim, heads), which has as many."""
    found = dict(arrays)
    for name, array in arrays.items():
        if name.endswith("query/kernel"):
            found[name] = np.ascontiguousarray(array.swapaxes(1, 2)).reshape(array.shape)
    return found


def positions_shifted(arrays: Arrays) -> Arrays:
    """The class token's position taken for the last one."""
    name = google.VIT_JAX.positions
    return dict(arrays) | {name: np.roll(arrays[name], -1, axis=1)}


FAULTS: dict[str, tuple[Callable[[Arrays], Arrays], dict[str, Any]]] = {
    "none": (dict, {}),
    "query for key": (query_for_key, {}),
    "heads for head_dim": (heads_for_head_dim, {}),
    "positions shifted": (positions_shifted, {}),
    "exact GELU": (dict, {"gelu": exact_gelu}),
    "epsilon of transformers": (dict, {"EPS": 1e-12}),
    "epsilon of torch": (dict, {"EPS": 1e-5}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_file_of_google_is_seen(
    exact_torch: Subject, fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    change, patches = FAULTS[fault]
    for name, value in patches.items():
        monkeypatch.setattr(google, name, value)
    arrays, images = google.random_arrays(**GOOGLE.arguments), images_of(GOOGLE)
    np.savez(tmp_path / "theirs.npz", **change(arrays))
    found = identified(tmp_path / "theirs.npz", "google", GOOGLE)
    wanted = google.logits(google.VIT_JAX, arrays, images)
    if fault == "none":
        agreeing(exact_torch, found, images, wanted)
        return
    with pytest.raises(AssertionError, match="output beyond 1e-12"):
        agreeing(exact_torch, found, images, wanted)


def maps_over_tokens(scores: np.ndarray) -> np.ndarray:
    """A softmax over the last axis in place of the logistic function."""
    powers = np.exp(scores)
    return powers / powers.sum(axis=-1, keepdims=True)


def columns_first(kernel: np.ndarray, x: np.ndarray) -> np.ndarray:
    """A convolution by a kernel whose height and width are exchanged."""
    return SAME_CONV(kernel.swapaxes(0, 1), x)


SAME_CONV = scenic.same_conv
SCENIC = TokenLearnerConfig(
    image_size=(9, 12), patch_size=(3, 4), embed_dim=15, depth=2, num_heads=3, mlp_dim=17,
    learner="conv", learner_loc=0, learned_tokens=4, fuser=True, num_classes=5,
)  # fmt: skip


@pytest.mark.parametrize(
    ("function", "fault"),
    [
        ("", None),
        ("gelu", exact_gelu),
        ("sigmoid", maps_over_tokens),
        ("same_conv", columns_first),
    ],
)
def test_another_function_than_scenics_is_seen(
    exact_torch: Subject,
    function: str,
    fault: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    if function:
        monkeypatch.setattr(scenic, function, fault)
    pair = Pair({"sizes": scenic_sizes(SCENIC)}, SCENIC)
    arrays, images = scenic.random_arrays(**pair.arguments), images_of(pair)
    np.savez(tmp_path / "theirs.npz", **arrays)
    found = identified(tmp_path / "theirs.npz", "scenic", pair)
    wanted = scenic.logits(arrays=arrays, images=images, **pair.arguments)
    if not function:
        agreeing(exact_torch, found, images, wanted)
        return
    with pytest.raises(AssertionError, match="output beyond 1e-12"):
        agreeing(exact_torch, found, images, wanted)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layer_norm_eps", 1e-6),
        ("hidden_act", "gelu_new"),
        ("num_attention_heads", 1),
    ],
)
def test_a_config_json_that_says_another_thing_is_seen(
    exact_torch: Subject, key: str, value: Any, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    library = import_oracle("transformers", pytestconfig)
    said = library.ViTConfig(
        image_size=8, patch_size=4, hidden_size=12, num_hidden_layers=1, num_attention_heads=3,
        intermediate_size=10,
    )  # fmt: skip
    original = randomised(library.ViTForImageClassification(said))
    original.save_pretrained(tmp_path)
    found = isovit.load(tmp_path)
    images = draw_inputs(found.config, batch=2, seed=0)[0]
    wanted = logits(original, images)
    agreeing(exact_torch, found, images, wanted)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, key: value}))
    with pytest.raises(AssertionError, match="output beyond 1e-12"):
        agreeing(exact_torch, isovit.load(tmp_path), images, wanted)


@pytest.mark.parametrize(
    "change",
    [{"norm_eps": 1e-5}, {"activation": "gelu_tanh"}, {"num_heads": 5}, {"dist_head": False}],
    ids=str,
)
def test_a_config_that_is_not_the_originals_is_seen(
    exact_torch: Subject, change: dict[str, Any], pytestconfig: pytest.Config
) -> None:
    library = import_oracle("timm.models.deit", pytestconfig)
    original = randomised(library.VisionTransformerDistilled(**SMALL))
    config = SMALL_CONFIG.replace(**TWO_HEADS)
    images = draw_inputs(config, batch=2, seed=0)[0]
    with folder() as path:
        save_file(original.state_dict(), path / "theirs.safetensors")
        found = isovit.load(path / "theirs.safetensors", config=config, format="timm")
    wanted = logits(original, images)
    agreeing(exact_torch, found, images, wanted)
    other = config.replace(**change)
    kept = {n: a for n, a in found.weights.items() if other.dist_head or "head_dist" not in n}
    with pytest.raises(AssertionError, match="output beyond 1e-12"):
        agreeing(exact_torch, isovit.Checkpoint(other, kept), images, wanted)
