"""The command line in process: every verb's happy path, and every wrong input in one line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import isovit
import isovit.backends
from isovit.cli import spread
from isovit.parity import harness
from isovit.spec.families import objectives, variants
from isovit.spec.initialize import init, probe
from isovit.weight_convert.checkpoint import Checkpoint
from isovit.weight_convert.store import load, save
from tests.outcome import Outcome
from tests.small import SMALL, VIT

CHELSEA = Path(__file__).parents[1] / "examples" / "chelsea.png"
FILES = ("good.safetensors", "good.pth", "good.npz", "good.weights.h5")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of right and wrong files."""
    folder = tmp_path_factory.mktemp("files")
    for name in (*FILES, "folder"):
        save(Checkpoint(VIT, probe(VIT)), folder / name)
    for name in FILES:
        content, suffix = (folder / name).read_bytes(), name.removeprefix("good")
        (folder / f"cut{suffix}").write_bytes(content[: len(content) // 2])
        (folder / f"text{suffix}").write_text("these are no weights\n", encoding="utf-8")
        (folder / f"empty{suffix}").write_bytes(b"")
    (folder / "empty_folder").mkdir()
    (folder / "file").write_text("", encoding="utf-8")
    (folder / "bad.toml").write_text("depth = = 2", encoding="utf-8")
    (folder / "notes.png").write_text("no image", encoding="utf-8")
    images = np.zeros((2, 16, 24, 3), np.float32)
    arrays = {
        "images": images,
        "turned": images.transpose(0, 2, 1, 3),
        "single": images[0],
        "none": images[:0],
        "bytes": images.astype(np.uint8),
        "objects": np.array([{}], dtype=object),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    (folder / "text.npy").write_text("no array", encoding="utf-8")
    (folder / "cut.npy").write_bytes((folder / "images.npy").read_bytes()[:300])
    np.savez(folder / "archive", images=images)
    (folder / "archive.npz").rename(folder / "archive.npy")
    return folder


@pytest.fixture
def here(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of files as the current one, so that commands read as people type them."""
    monkeypatch.chdir(made)
    return made


# Every verb


def test_list_tells_every_variant_as_json_or_as_a_table(run) -> None:
    outcome = run("list", "--json")
    rows = msgspec.json.decode(outcome.out)
    assert (outcome.code, outcome.err) == (0, "")
    assert [row["name"] for row in rows] == [*variants(), *objectives()]
    by_name = {row["name"]: row for row in rows}
    assert by_name["t2t_vit_14"]["parameters"] == 21_545_550
    of_family = msgspec.json.decode(run("list", "--family", "vit", "--json").out)
    assert of_family == [row for row in rows if row["family"] == "vit"]
    table = run("list").out
    assert "t2t_vit_14 t2t_vit 224x224 21,545,550 4.78 G" in " ".join(table.split())


def test_show_tells_the_whole_spec_as_json(run) -> None:
    found = msgspec.json.decode(run("show", "t2t_vit_14", "--json", "--set", "depth=1").out)
    assert found["config"]["depth"] == 1
    assert found["config"]["preprocess"]["crop_fraction"] == 0.9
    assert found["parameters"] > found["trainable_parameters"]
    assert found["activations"]["tokens_to_token"] == [196, 384]
    assert {"path": "head.bias", "shape": [1000], "role": "bias", "init": "constant",
            "trainable": True} in found["tree"]  # fmt: skip


def test_show_tells_numbers_and_tree_as_text(run) -> None:
    text = run("show", "t2t_vit_14", "--tree").out
    assert "parameters     21,545,550, of which 79,744 do not train" in text
    assert "multiply-adds  4.78 G an image" in text
    assert "blocks.13.mlp.fc2" in text
    assert "32x64  fixed" in text


def test_show_writes_a_toml_that_it_reads_back(run, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(run("show", "vit_s16", *SMALL, "--toml").out, encoding="utf-8")
    assert isovit.config_from_file(tmp_path / "a.toml") == isovit.config(
        "vit_s16", image_size=(16, 24), patch_size=(8, 6), embed_dim=12, depth=2, num_heads=3,
        mlp_dim=20, num_classes=5,
    )  # fmt: skip
    again = run("show", tmp_path / "a.toml", "--json", "--set", "depth=1")
    assert msgspec.json.decode(again.out)["config"]["depth"] == 1


def test_show_tells_the_json_schema(run) -> None:
    assert "T2TViTConfig" in msgspec.json.decode(run("show", "t2t_vit_7", "--schema").out)["$defs"]


def test_init_writes_the_weights_of_its_seed(run, tmp_path: Path) -> None:
    target = tmp_path / "a.safetensors"
    outcome = run("init", "vit_s16", target, "--seed", "3", *SMALL)
    assert outcome == (0, f"wrote {target}: vit_s16, seed 3\n", "")
    found = load(target)
    wanted = init(found.config, 3)
    assert all(np.array_equal(found.weights[name], wanted[name]) for name in wanted)
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("file", [*FILES, "folder"])
def test_inspect_tells_what_a_file_holds(file: str, run, here: Path) -> None:
    outcome = run("inspect", file, "--json")
    found = msgspec.json.decode(outcome.out)
    assert (outcome.code, outcome.err) == (0, "")
    assert found["config"] == msgspec.json.decode(VIT.to_json())
    assert (found["variant"], found["problems"]) == (None, [])
    assert "family    vit" in run("inspect", file).out


def test_inspect_tells_what_does_not_fit_a_model_and_exits_with_1(run, here: Path) -> None:
    words = ("inspect", "good.npz", "--model", "vit_s16", *SMALL, "--set", "num_classes=6")
    outcome = run(*words)
    assert outcome.code == 1
    assert "problem   misshaped head.bias: wanted (6,), got (5,)" in outcome.out
    assert len(msgspec.json.decode(run(*words, "--json").out)["problems"]) == 2


def test_convert_goes_through_every_native_format_and_back(run, here: Path, tmp_path: Path) -> None:
    names = ("a.pth", "a.npz", "a.weights.h5", "folder", "t.safetensors", "a.safetensors")
    source: Path = here / "good.safetensors"
    for name in names:
        target = tmp_path / name
        extra = ["--to", "torch"] if name == "t.safetensors" else []
        outcome = run("convert", source, target, *extra)
        assert (outcome.code, outcome.err) == (0, "")
        assert outcome.out.startswith(f"wrote {target}: vit, ")
        source = target
    wanted, found = probe(VIT), load(source)
    assert found.config == VIT
    assert all(found.weights[name].tobytes() == wanted[name].tobytes() for name in wanted)


def test_convert_takes_a_model_where_the_file_says_none(run, tmp_path: Path) -> None:
    import torch

    state = isovit.build(VIT, "torch", probe(VIT)).state_dict()
    torch.save(state, tmp_path / "bare.pth")
    refused = run("convert", tmp_path / "bare.pth", tmp_path / "a.npz")
    assert refused.code == 2
    assert "; give --" in refused.err
    words = ("--from", "torch", "--model", "vit_s16", *SMALL)
    assert run("convert", tmp_path / "bare.pth", tmp_path / "a.npz", *words).code == 0
    assert load(tmp_path / "a.npz").config.depth == 2


def test_convert_gives_another_head_and_another_size_and_says_so(
    run, here: Path, tmp_path: Path
) -> None:
    target = tmp_path / "a.safetensors"
    options = ("--num-classes", "3", "--image-size", "32x48", "--resize", "torch_bicubic")
    outcome = run("convert", "good.npz", target, *options)
    assert outcome == (
        0,
        f"wrote {target}: vit, flax to isovit\n",
        "isovit: note: the head of 5 classes is replaced by a new one of 3, seed 0\n"
        "isovit: note: positions are resized from 2x4 to 4x8 patches by torch_bicubic\n",
    )
    config = msgspec.json.decode(run("inspect", target, "--json").out)["config"]
    assert (config["image_size"], config["num_classes"]) == ([32, 48], 3)


def test_convert_tells_what_the_library_of_the_target_computes_otherwise(
    run, here: Path, tmp_path: Path
) -> None:
    outcome = run("convert", "good.npz", tmp_path / "a.npz", "--to", "google")
    assert outcome.code == 0
    assert "note: google computes with activation=gelu_tanh of its own; these" in outcome.err


@pytest.mark.parametrize("backend", ["torch", "flax"])
def test_run_writes_the_logits_of_an_array(backend: str, run, here: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(0).standard_normal((2, 16, 24, 3), np.float32)
    np.save(tmp_path / "x.npy", images)
    words = ("--backend", backend, "--input", tmp_path / "x.npy", "--output", tmp_path / "y.npy")
    outcome = run("run", "good.pth", *words)
    assert outcome == (0, f"wrote {tmp_path / 'y.npy'}: float32 2x5\n", "")
    runtime = isovit.backends.get_backend(backend)
    wanted = runtime.forward(runtime.build(VIT, probe(VIT)), images)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), wanted)


@pytest.mark.parametrize("backend", ["torch", "flax"])
def test_run_ranks_the_classes_of_photographs(backend: str, run, here: Path) -> None:
    words = ("--images", CHELSEA, CHELSEA, "--top", "2", "--backend", backend)
    outcome = run("run", "good.safetensors", *words)
    head, *rows = outcome.out.splitlines()
    assert (outcome.code, outcome.err) == (0, "")
    assert head.split() == ["image", "rank", "class", "logit", "probability"]
    assert [row.split()[0] for row in rows] == ["chelsea.png", "2", "chelsea.png", "2"]
    assert rows[:2] == rows[2:]


def test_run_draws_the_weights_of_a_seed_for_a_model_by_name(run, here: Path, tmp_path) -> None:
    for seed in ("0", "1"):
        output = ("--seed", seed, "--output", tmp_path / f"{seed}.npy")
        words = ("--backend", "torch", "--input", "images.npy", *output, *SMALL)
        assert run("run", "vit_s16", *words).code == 0
    assert not np.array_equal(np.load(tmp_path / "0.npy"), np.load(tmp_path / "1.npy"))


def test_parity_proves_two_backends_equal_and_writes_a_report(run, here: Path, tmp_path) -> None:
    options = ("--gradients", "--trace", "--json", "--report", tmp_path / "report.html")
    outcome = run("parity", "good.npz", "--backends", "torch,flax", *options)
    found = msgspec.json.decode(outcome.out)
    assert outcome.code == 0
    assert sorted(outcome.err.splitlines()) == ["parity: flax (2/2)", "parity: torch (1/2)"] or (
        sorted(outcome.err.splitlines()) == ["parity: flax (1/2)", "parity: torch (2/2)"]
    )
    assert (found["equal"], found["dtype"]) == (True, "float64")
    assert found["config"] == msgspec.json.decode(VIT.to_json())
    kinds = [row["kind"] for row in found["differences"]]
    assert kinds.count("output") == 1
    assert kinds.count("gradient") == len(probe(VIT)) + 1
    assert {"blocks.1.attn.qkv", "norm"} <= {row["path"] for row in found["differences"]}
    assert "are one function in float64" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]


@pytest.fixture
def faulty_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second backend's outputs part from the first's at blocks.1."""

    def results(job: Any, names: list[str], progress: Any) -> dict[str, dict[str, np.ndarray]]:
        right = {
            "output": np.ones((2, 5)),
            "activation/blocks.0": np.ones((2, 7, 12)),
            "activation/blocks.1": np.ones((2, 7, 12)),
            "seconds": np.float64(1),
        }
        wrong = {**right, "activation/blocks.1": np.full((2, 7, 12), 1 + 1e-9)}
        return {names[0]: dict(right), names[1]: dict(wrong)}

    monkeypatch.setattr(harness, "_run_all", results)


def test_parity_exits_with_1_and_names_the_first_module_that_differs(
    run, here: Path, faulty_backend: None
) -> None:
    outcome = run("parity", "good.npz", "--backends", "torch,flax", "--trace")
    assert outcome.code == 1
    assert "NOT equal: torch and flax part first at blocks.1 (error 1.0e-09)" in outcome.out
    assert "beyond" in outcome.out
    found = run("parity", "good.npz", "--backends", "torch,flax", "--trace", "--json")
    assert found.code == 1
    assert msgspec.json.decode(found.out)["equal"] is False


def test_parity_exits_with_1_where_a_backend_fails(
    run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise harness.BackendError("backend torch failed: Killed")

    monkeypatch.setattr(harness, "_run_all", fail)
    outcome = run("parity", "good.npz", "--backends", "torch,flax")
    assert outcome == (1, "", "isovit: backend torch failed: Killed\n")


def test_options_that_take_several_values_may_be_given_once() -> None:
    words = ["run", "m", "--images", "a", "b", "--top", "2", "--set", "x=1", "y=2", "z"]
    assert " ".join(spread(words)) == ("run m --images a --images b --top 2 --set x=1 --set y=2 z")


def test_without_a_verb_the_help_is_shown(run) -> None:
    outcome = run("--help")
    assert outcome.code == 0
    verbs = ("list", "show", "init", "inspect", "convert", "run", "parity", "bench", "choose")
    assert all(f" {verb} " in outcome.out for verb in verbs)


# Wrong inputs

WRONG = {
    # the command itself
    "shew vit_s16": "No such command 'shew'",
    "show": "Missing argument",
    "show vit_s16 --colour": "No such option: --colour",
    "run good.npz --input images.npy": "Missing option '--backend'",
    "run good.npz --backend torch": "wanted either --images FILE… or --input X.npy",
    "run good.npz --backend torch --top 0 --input images.npy": "Invalid value for '--top'",
    "init vit_s16 out.safetensors --seed -1": "Invalid value for '--seed'",
    # models and fields
    "show vit_s61": "no model named 'vit_s61'; did you mean vit_s16",
    "show vit_s16 --set depht=2": "depht: no such field of vit; did you mean depth?",
    "show vit_s16 --set depth": "--set depth: wanted FIELD=VALUE",
    "show vit_s16 --set depth=two": "depth='two': wanted int, got str",
    "show absent.json": "cannot read absent.json: No such file or directory",
    "show bad.toml": "bad.toml: wanted a config as JSON or TOML",
    "list --family resnet": "no family named 'resnet'; wanted one of vit, t2t_vit",
    "parity vit_s61": "no model named 'vit_s61'",
    # checkpoints
    "inspect absent.safetensors": "cannot read absent.safetensors: no such file",
    "inspect images.npy": "no format has the suffix .npy; wanted one of .weights.h5, ",
    "inspect file": "file: a file without a suffix; wanted .weights.h5, ",
    "inspect empty_folder": "empty_folder: says no model; give --model",
    "convert good.npz out.safetensors --model vit_ti16": "the weights do not fit the config",
    "convert good.npz out.safetensors --set num_classes=6": "misshaped head.kernel",
    "convert good.npz out.safetensors --from timm": "the weights do not fit the config",
    "convert good.npz out.safetensors --from tim": "no format named 'tim'; wanted one of isovit",
    "convert good.npz out.safetensors --image-size big": "--image-size 'big': wanted pixels",
    "convert good.npz out.safetensors --image-size 32x0": "--image-size '32x0': wanted pixels",
    "convert good.npz out.safetensors --image-size 30": "must be divisible by the height",
    "convert good.npz out.safetensors --num-classes -1": "Invalid value for '--num-classes'",
    "convert good.npz out.safetensors --resize cubic": "resize='cubic': wanted torch_bicubic",
    "convert good.npz out.npz --to yitu": "out.npz: format yitu is written to .pth",
    "convert good.npz out.pth --to yitu": "format yitu has no family vit; wanted",
    "convert good.npz out.pth --to vit_pytorch": "cannot hold this model: it has qkv_bias=true",
    **{
        f"{verb} {kind}{suffix}{rest}": f"{kind}{suffix}: wanted "
        for verb, rest in (("inspect", ""), ("convert", " out.safetensors"))
        for kind in ("cut", "text", "empty")
        for suffix in (name.removeprefix("good") for name in FILES)
    },
    # targets
    "convert good.npz absent/out.npz": "cannot write absent/out.npz: there is no folder absent",
    "convert good.npz file/out.npz": "cannot write file/out.npz: there is no folder file",
    "convert good.npz file": "cannot write file: a file is in its place",
    "convert good.npz out.bin": "format torch is written to .pth or .pt",
    "convert good.npz out.npz --to torch": "format torch is written to .pth or .pt",
    "convert good.npz out.npz --to onnx": "no format named 'onnx'",
    "init vit_s16 out.npz": "format isovit is written to .safetensors",
    "run good.npz --backend torch --input images.npy --output absent/y.npy": "cannot write absent/",
    # backends
    "run good.npz --backend jax --input images.npy": "no backend named 'jax'; wanted one of torch",
    "run good.npz --backend keras:mxnet --input images.npy": "no Keras engine named 'mxnet'",
    "run good.npz --backend torch --engine jax --input images.npy": "no backend named 'torch:jax'",
    "run good.npz --backend torch --dtype float16 --input images.npy": "no dtype named 'float16'",
    "run good.npz --backend torch --device cuda --input images.npy": "torch finds no such device",
    "run good.npz --backend flax --device tpu --input images.npy": "jax finds no such device",
    "run good.npz --backend keras --device cuda --input images.npy": "torch finds no such device",
    "parity good.npz --backends torch": "wanted two or more different backends, got torch",
    "parity good.npz --backends torch,torch": "wanted two or more different backends",
    "parity good.npz --backends torch,jax": "no backend named 'jax'",
    "parity good.npz --backends torch,flax --dtype half": "no dtype named 'half'",
    "parity good.npz --backends torch,flax --dtype bfloat16 --gradients": "gradients have no limit",
    # images
    "run good.npz --backend torch --input turned.npy": "the images have the shape (2, 24, 16, 3);",
    "run good.npz --backend torch --input single.npy": "the images have the shape (16, 24, 3);",
    "run good.npz --backend torch --input none.npy": "the batch is empty; wanted one image or more",
    "run good.npz --backend torch --input bytes.npy": "the images are uint8; wanted normalised",
    "run good.npz --backend torch --input objects.npy": "objects.npy: wanted a .npy file of number",
    "run good.npz --backend torch --input text.npy": "text.npy: wanted a .npy file of numbers",
    "run good.npz --backend torch --input cut.npy": "cut.npy: wanted a .npy file of numbers",
    "run good.npz --backend torch --input archive.npy": "wanted one array in a .npy file",
    "run good.npz --backend torch --input absent.npy": "cannot read absent.npy: No such file",
    "run good.npz --backend torch --images notes.png": "cannot read notes.png as an image",
    "parity good.npz --backends torch,flax --images notes.png": "cannot read notes.png as an image",
}  # fmt: skip


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file with its bytes, every folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def assert_refused(outcome: Outcome, message: str) -> None:
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.startswith("isovit: ")
    assert message in outcome.err
    assert 1 <= len(outcome.err.splitlines()) <= 2
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize("command", WRONG)
def test_wrong_input_is_one_line_and_leaves_nothing_behind(command: str, run, here: Path) -> None:
    before = contents(here)
    assert_refused(run(*command.split()), WRONG[command])
    assert contents(here) == before


DEVICES = ["nonsense", "tpu", "meta", "mps"]


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_that_torch_does_not_have_is_refused(device: str, run, here: Path) -> None:
    words = ("--backend", "torch", "--device", device, "--input", "images.npy")
    assert_refused(run("run", "good.npz", *words), f"device {device}: ")


@pytest.mark.parametrize(
    "command",
    [
        "convert good.npz mine",
        "run good.npz --backend torch --input images.npy --output mine",
        "convert good.npz .",
    ],
)
def test_a_folder_of_other_files_is_never_replaced(
    command: str, run, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("good.npz", "images.npy"):
        shutil.copy(made / name, tmp_path / name)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("three years", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    assert_refused(run(*command.split()), "cannot write ")
    assert contents(tmp_path) == before


def lose_everything(folder: Path) -> None:
    for name in ("d", "ocdbt.process_0"):
        shutil.rmtree(folder / name)
    (folder / "manifest.ocdbt").unlink()


def lose_the_arrays(folder: Path) -> None:
    shutil.rmtree(folder / "d")


def cut_the_arrays(folder: Path) -> None:
    for file in folder.glob("d/*"):
        os.truncate(file, 100)


def lose_the_list(folder: Path) -> None:
    (folder / "_METADATA").unlink()


def garble_the_list(folder: Path) -> None:
    (folder / "_METADATA").write_text('{"tree_metadata": [1, 2]}', encoding="utf-8")


@pytest.mark.parametrize(
    "harm", [lose_everything, lose_the_arrays, cut_the_arrays, lose_the_list, garble_the_list]
)
def test_a_broken_orbax_folder_gets_one_line(harm, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "folder", tmp_path / "cut")
    harm(tmp_path / "cut")
    command = [sys.executable, "-m", "isovit", "inspect", str(tmp_path / "cut")]
    # A process of its own: orbax's threads may complain when the command is over.
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"isovit: \S+/cut: wanted an orbax folder, but: .{1,800}\n", done.stderr)


@pytest.mark.parametrize(
    ("command", "module", "extra"),
    [
        ("run good.npz --backend flax --input images.npy", "flax", "flax"),
        ("run good.npz --backend torch --input images.npy", "torch", "torch"),
        ("run good.npz --backend keras:tensorflow --input images.npy", "tensorflow", "keras-tf"),
        ("run good.npz --backend keras --input images.npy", "keras", "keras"),
        ("inspect good.pth", "torch", "torch"),
        ("inspect good.weights.h5", "keras", "keras"),
        ("inspect folder", "flax", "flax"),
        ("convert good.npz out.weights.h5", "keras", "keras"),
        ("convert good.npz out.pth", "torch", "torch"),
        ("parity good.npz --backends torch,flax", "flax", "flax"),
    ],
)
def test_a_missing_framework_names_the_extra_that_installs_it(
    command: str, module: str, extra: str, run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = isovit.backends.find_spec
    monkeypatch.setattr(
        isovit.backends, "find_spec", lambda name: None if name == module else find_spec(name)
    )
    monkeypatch.delitem(sys.modules, module, raising=False)
    before = contents(here)
    outcome = run(*command.split())
    assert_refused(outcome, f"needs {module}, which is not installed: pip install")
    assert f'"isovit[{extra}]"' in outcome.err
    assert contents(here) == before


@pytest.mark.parametrize(
    "command",
    [
        "init vit_s16 out.safetensors",
        "convert good.npz out.pth",
        "run good.npz --backend torch --input images.npy --output y.npy",
    ],
)
def test_a_folder_that_may_not_be_written_is_named(
    command: str, run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    words = [*command.split(), *(SMALL if command.startswith("init") else [])]
    assert_refused(run(*words), f"cannot write {words[2] if 'run' not in words else 'y.npy'}: ")


def test_a_keras_engine_cannot_change_within_a_process(run, here: Path) -> None:
    isovit.backends.get_backend("keras")
    outcome = run("run", "good.npz", "--backend", "keras:jax", "--input", "images.npy")
    assert_refused(outcome, "Keras already runs on torch in this process and cannot change to jax")


def test_a_reader_that_goes_away_gets_no_complaint() -> None:
    """As in ``isovit list | head -0``."""
    program = (
        "import os; from isovit.cli import main\n"
        "read, write = os.pipe(); os.close(read); os.dup2(write, 1)\n"
        "main(['list', '--json'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode in (0, 1)  # 1 where typer sees it first
    assert done.stderr == b""
