"""Native formats: every pair both ways, bit for bit, readable by each framework's own tools."""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Callable, Iterable, Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import isovit
from isovit.errors import FitError, InputError
from isovit.spec.config import Config
from isovit.spec.initialize import probe
from isovit.weight_convert.checkpoint import Checkpoint
from isovit.weight_convert.files import FOLDER_MARK
from isovit.weight_convert.formats import HEADER_KEY
from isovit.weight_convert.store import inspect, load, save
from parity_tests.examples import NIGHTLY
from tests.small import CONFIGS, T2T, VIT

# File name and format of each native form; None for what the name implies.
NATIVE: dict[str, tuple[str, str | None]] = {
    "isovit": ("model.safetensors", None),
    "torch": ("model.pth", None),
    "torch safetensors": ("torch.safetensors", "torch"),
    "flax": ("model.npz", None),
    "orbax": ("folder", None),
    "keras": ("model.weights.h5", None),
    "whole keras": ("model.keras", None),
}


FORMAT_NAMES = {"torch safetensors": "torch", "orbax": "flax", "whole keras": "keras"}


def checkpoint(config: Config, dtype: Any = np.float32) -> Checkpoint:
    weights = {name: array.astype(dtype) for name, array in probe(config).items()}
    return Checkpoint(config, weights)


def write(subject: Checkpoint, folder: Path, form: str) -> Path:
    name, format = NATIVE[form]
    save(subject, folder / name, format)
    return folder / name


def assert_same(found: Checkpoint, wanted: Checkpoint) -> None:
    assert found.config == wanted.config
    assert list(found.weights) == list(wanted.weights)
    for name, array in wanted.weights.items():
        assert found.weights[name].dtype == array.dtype, name
        assert found.weights[name].tobytes() == array.tobytes(), name


class Written(dict[tuple[str, str], Path]):
    """Files by family and native form, float32, each written when it is first asked for."""

    def __init__(self, new_folder: Callable[[str], Path]) -> None:
        super().__init__()
        self.new_folder = new_folder

    def __missing__(self, key: tuple[str, str]) -> Path:
        family, form = key
        self[key] = write(checkpoint(CONFIGS[family]), self.new_folder(family), form)
        return self[key]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(tmp_path_factory.mktemp)


ROUND = dict(zip(NATIVE, [*NATIVE][1:] + [*NATIVE][:1], strict=True))
FIRST = ("vit", "t2t_vit")
"""Of the other families each form is a source once and a target once; all pairs when nightly."""

OTHERS = [family for family in CONFIGS if family not in FIRST]
families = pytest.mark.parametrize(
    "family", [*FIRST, *(pytest.param(family, marks=pytest.mark.slow) for family in OTHERS)]
)
PAIRS = [
    *((family, *pair) for family in FIRST for pair in permutations(NATIVE, 2)),
    *(
        pytest.param(family, *pair, marks=pytest.mark.slow)
        for family in OTHERS
        for pair in (permutations(NATIVE, 2) if NIGHTLY else ROUND.items())
    ),
]


@pytest.mark.parametrize(("family", "source", "target"), PAIRS)
def test_a_conversion_keeps_every_bit_and_the_config(
    family: str, source: str, target: str, written: dict, tmp_path: Path
) -> None:
    read = load(written[family, source])
    assert_same(read, checkpoint(CONFIGS[family]))
    assert_same(load(write(read, tmp_path, target)), checkpoint(CONFIGS[family]))


@pytest.mark.parametrize("form", NATIVE)
def test_float64_stays_float64(form: str, tmp_path: Path) -> None:
    weights = {name: array / 3 for name, array in checkpoint(T2T, np.float64).weights.items()}
    subject = Checkpoint(T2T, weights)
    assert_same(load(write(subject, tmp_path, form)), subject)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("form", NATIVE)
def test_half_precision_is_kept_or_refused(form: str, dtype: Any, tmp_path: Path) -> None:
    subject = checkpoint(VIT, dtype)
    name = np.dtype(dtype).name
    if "keras" in form:
        with pytest.raises(InputError, match=f"Keras has float32 or float64, not {name}"):
            write(subject, tmp_path, form)
        assert not list(tmp_path.iterdir())
        return
    assert_same(load(write(subject, tmp_path, form)), subject)


@pytest.mark.parametrize("form", NATIVE)
@families
def test_a_file_says_what_it_holds(family: str, form: str, written: dict) -> None:
    found = inspect(written[family, form])
    subject = checkpoint(CONFIGS[family])
    assert found.format == FORMAT_NAMES.get(form, form)
    assert (found.config, found.variant, found.problems) == (subject.config, None, ())
    assert (found.tensors, found.dtypes) == (len(subject.weights), ("float32",))
    assert found.parameters == sum(array.size for array in subject.weights.values())
    assert load(written[family, form]).source.path == str(written[family, form])


def header(family: str, name: str) -> str:
    """What every file of isovit says of itself."""
    return f'{{"format":"{name}","config":{CONFIGS[family].to_json()}}}'


# What each framework's own tools see


@families
def test_torch_loads_the_pth_strictly_into_its_model(family: str, written: dict) -> None:
    import torch

    content = torch.load(written[family, "torch"], weights_only=True)
    assert content[HEADER_KEY] == header(family, "torch")
    model = isovit.build(CONFIGS[family], "torch")
    model.load_state_dict(content["state_dict"], strict=True)
    wanted = isovit.build(CONFIGS[family], "torch", probe(CONFIGS[family])).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())


@families
def test_safetensors_loads_strictly_into_the_torch_model(family: str, written: dict) -> None:
    import torch
    from safetensors.torch import load_file

    state = load_file(written[family, "torch safetensors"])
    model = isovit.build(CONFIGS[family], "torch")
    model.load_state_dict(state, strict=True)
    wanted = isovit.build(CONFIGS[family], "torch", probe(CONFIGS[family])).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())


@families
def test_numpy_reads_the_npz_as_flat_arrays_and_nothing_else(family: str, written: dict) -> None:
    path = written[family, "flax"]
    with np.load(path) as arrays:
        found = {name.replace("/", "."): arrays[name] for name in arrays.files}
    wanted = probe(CONFIGS[family])
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    with zipfile.ZipFile(path) as archive:
        assert archive.comment.decode() == header(family, "flax")


@families
def test_orbax_reads_the_folder_as_the_flax_models_state(family: str, written: dict) -> None:
    import orbax.checkpoint as ocp
    from flax import nnx

    path = written[family, "orbax"]
    model = isovit.build(CONFIGS[family], "flax")
    state = nnx.state(model, nnx.Not(nnx.RngState))
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(path.absolute(), nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, restored)
    nnx.update(model, state)
    found = isovit.backends.get_backend("flax").read(model)
    wanted = probe(CONFIGS[family])
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    assert (path / FOLDER_MARK).read_text(encoding="utf-8") == header(family, "flax")


@families
def test_keras_loads_the_h5_into_its_model(family: str, written: dict) -> None:
    model = isovit.build(CONFIGS[family], "keras")
    model.load_weights(written[family, "keras"])
    found = isovit.backends.get_backend("keras").read(model)
    wanted = probe(CONFIGS[family])
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


# Files from elsewhere


def state_dict(config: Config) -> dict[str, Any]:
    """A state dict that says nothing of isovit."""
    return isovit.build(config, "torch", probe(config)).state_dict()


@pytest.mark.parametrize("key", [None, "state_dict", "model"])
def test_a_state_dict_from_elsewhere_is_read_bare_or_wrapped(key: str, tmp_path: Path) -> None:
    import torch

    state = state_dict(VIT)
    torch.save({key: state, "epoch": 3} if key else state, tmp_path / "a.pth")
    with pytest.raises(InputError, match="; give --"):
        load(tmp_path / "a.pth")
    found = load(tmp_path / "a.pth", config=VIT)
    assert_same(found, checkpoint(VIT))
    assert found.source.format == "torch"


YITU = isovit.config(
    "t2t_vit_7", image_size=16, embed_dim=12, depth=1, num_heads=3, mlp_dim=20, num_classes=5
)


def test_the_format_of_a_state_dict_is_found_from_its_names(tmp_path: Path) -> None:
    for config, format in ((YITU, "yitu"), (VIT.replace(layer_scale_init=0.1), "timm")):
        path = tmp_path / f"{format}.safetensors"
        save(checkpoint(config), path, format)
        import safetensors.numpy as st

        st.save_file(st.load_file(path), tmp_path / "bare.safetensors")
        found = load(tmp_path / "bare.safetensors", config=config)
        assert found.source.format == format
        assert_same(found, checkpoint(config))


def test_a_state_dict_that_fits_nothing_is_refused_with_the_formats_that_were_tried(
    tmp_path: Path,
) -> None:
    import torch

    torch.save({"layer.weight": torch.zeros(2)}, tmp_path / "a.pth")
    with pytest.raises(InputError, match="fits the config in none of the formats isovit, torch"):
        load(tmp_path / "a.pth", config=VIT)
    with pytest.raises(FitError, match=r"missing patch_embed\.proj\.weight"):
        load(tmp_path / "a.pth", config=VIT, format="torch")


def test_weights_of_another_config_are_refused(written: dict) -> None:
    with pytest.raises(FitError, match=r"misshaped head\.kernel: wanted \(12, 6\), got \(12, 5\)"):
        load(written["vit", "isovit"], config=VIT.replace(num_classes=6))
    with pytest.raises(FitError, match="unexpected head"):
        Checkpoint(VIT.replace(num_classes=0), probe(VIT))


class Trap:
    """Pickles as a call that creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_a_pth_that_wants_to_run_code_is_refused_and_runs_none(tmp_path: Path) -> None:
    import torch

    torch.save({"args": Trap(tmp_path / "run")}, tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"a\.pth: wanted a torch checkpoint, but .*mkdir"):
        load(tmp_path / "a.pth", config=VIT)
    assert not (tmp_path / "run").exists()
    torch.load(tmp_path / "a.pth", weights_only=False)
    assert (tmp_path / "run").exists(), "the trap is none"


def test_an_npz_of_python_objects_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=np.array([Trap(tmp_path / "run")]))
    with pytest.raises(InputError, match=r"a\.npz: wanted an npz file, but it cannot be read"):
        load(tmp_path / "a.npz", config=VIT)
    assert not (tmp_path / "run").exists()


# Writing, all or nothing


@pytest.fixture
def umask() -> Iterator[Any]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
@pytest.mark.parametrize("form", NATIVE)
def test_others_may_read_a_file_as_the_umask_says(
    form: str, mask: int, tmp_path: Path, umask: Any
) -> None:
    umask(mask)
    path = write(checkpoint(VIT), tmp_path, form)
    whole = 0o777 if path.is_dir() else 0o666
    assert stat.S_IMODE(path.stat().st_mode) == whole & ~mask


@pytest.mark.parametrize("form", NATIVE)
def test_a_file_or_folder_is_replaced_by_a_new_one(form: str, tmp_path: Path) -> None:
    write(checkpoint(VIT), tmp_path, form)
    path = write(checkpoint(T2T), tmp_path, form)
    assert_same(load(path), checkpoint(T2T))
    assert list(tmp_path.iterdir()) == [path]


def test_the_same_weights_make_the_same_file(tmp_path: Path) -> None:
    subject = checkpoint(VIT)
    assert len({write(subject, tmp_path, "isovit").read_bytes() for _ in range(20)}) == 1


# What writes those forms that no loop over the tensors writes.
WRITERS = {
    "torch": "torch.save",
    "orbax": "isovit.backends.flax.runtime.save_native",
    "keras": "isovit.backends.keras.runtime.save_native",
    "whole keras": "isovit.backends.keras.runtime.save_native",
}


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("form", NATIVE)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    form: str, fault: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(checkpoint(VIT), tmp_path, form)

    def half(*arguments: Any, **entries: Any) -> None:
        """Write a part of the file that the arguments name, then fail."""
        targets = [word for word in arguments if isinstance(word, Path)]
        assert targets, "the writer gets no path"
        targets[0].write_bytes(b"half")
        raise fault

    def five(names: Iterable[str]) -> Iterator[str]:
        """Let five tensors be written, then fail."""
        yield from list(names)[:5]
        raise fault

    if form in WRITERS:
        monkeypatch.setattr(WRITERS[form], half)
    expected = InputError if isinstance(fault, OSError) else type(fault)
    with pytest.raises(expected, match=r"No space left on device|^$"):
        save(checkpoint(T2T), path, NATIVE[form][1], iter if form in WRITERS else five)
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    assert_same(load(path), checkpoint(VIT))


def test_a_target_that_cannot_be_is_refused_before_any_work(tmp_path: Path) -> None:
    subject = checkpoint(VIT)
    (tmp_path / "taken.npz").mkdir()
    (tmp_path / "file").write_text("", encoding="utf-8")
    for name, format, message in [
        ("a.tar", None, r"no format has the suffix \.tar; wanted one of .*\.safetensors"),
        ("a.bin", None, r"format torch is written to \.pth or \.pt or \.safetensors"),
        ("a.npz", "torch", r"format torch is written to \.pth or \.pt or \.safetensors"),
        ("a.pth", "onnx", "no format named 'onnx'; wanted one of isovit, torch"),
        ("absent/a.npz", None, "there is no folder .*absent"),
        ("taken.npz", None, "a folder is in its place"),
        ("file", None, "a file is in its place"),
    ]:
        with pytest.raises(InputError, match=message):
            save(subject, tmp_path / name, format)
    assert {path.name for path in tmp_path.iterdir()} == {"taken.npz", "file"}


def test_a_format_without_a_place_for_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="format yitu has no family vit"):
        save(checkpoint(VIT), tmp_path / "a.pth", "yitu")
    with pytest.raises(InputError, match="format yitu cannot hold this model: it has t2t_layers"):
        save(checkpoint(T2T), tmp_path / "a.pth", "yitu")
    assert not list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())
