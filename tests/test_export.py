"""Exported files: each form and route, what is refused, and the backend that runs ONNX."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import isovit
from isovit.backends import get_backend
from isovit.errors import InputError
from isovit.export import exporter
from isovit.export.exporter import export
from isovit.export.forms import ROUTES, Route, Target, target
from isovit.parity.compare import error
from isovit.parity.job import draw_inputs
from isovit.spec.config import Config, config_from_dict
from isovit.spec.initialize import probe
from isovit.weight_convert.checkpoint import Checkpoint
from isovit.weight_convert.store import load, save
from tests import exporting
from tests.exporting import CASES, FORMS, JAX2ONNX, cases, exercise, refusal
from tests.small import CONFIGS, SMALL

pytestmark = pytest.mark.slow

CHELSEA = Path(__file__).parents[1] / "examples" / "chelsea.png"
REPOSITORY = Path(__file__).parents[1]
LIMIT = 5e-6
HERE = ("torch", "flax", "keras:torch")
"""Backends of this process; tests/conftest.py sets the engine."""

needs_torch = pytest.mark.skipif(not find_spec("torch"), reason="torch is not installed")
needs_jax2onnx = pytest.mark.skipif(
    not find_spec("jax2onnx"), reason="jax2onnx has an environment of its own: nox -s export_jax"
)

Errors = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Errors]:
    """What ``exercise`` and ``refusal`` give on an engine of Keras, in a process for each."""
    found: dict[tuple[str, ...], Errors] = {}

    def run(backend: str, *forms: str) -> Errors:
        if (backend, *forms) not in found:
            folder = tmp_path_factory.mktemp("engine")
            settings = {"PYTHONPATH": str(REPOSITORY), "TF_CPP_MIN_LOG_LEVEL": "3"}
            command = [sys.executable, "-m", "tests.exporting", backend, str(folder), *forms]
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, env=os.environ | settings
            )
            assert done.returncode == 0, done.stderr
            found[backend, *forms] = msgspec.json.decode(done.stdout.splitlines()[-1])
        return found[backend, *forms]

    return run


# Every form, from every backend


def pairs(backends: tuple[str, ...]) -> list[tuple[str, str]]:
    return [(backend, form) for backend in backends for form in FORMS[backend]]


def slow_but_first(rows: list[tuple[str, ...]]) -> list[Any]:
    """The first case of torch runs always, the others with the slow tests."""
    quick = [row for row in rows if row[0] == "torch" and row[-1] == "timm"]
    return [row if row in quick else pytest.param(*row, marks=pytest.mark.slow) for row in rows]


@needs_torch
@pytest.mark.parametrize(
    ("backend", "form", "case"),
    slow_but_first([(*pair, case) for pair in pairs(HERE) for case in cases(*pair)]),
)
def test_an_exported_file_computes_what_the_model_does(
    backend: str, form: str, case: str, tmp_path: Path
) -> None:
    assert max(exercise(backend, form, case, tmp_path)) <= LIMIT


@pytest.mark.slow
@needs_torch
@pytest.mark.parametrize(("backend", "form"), pairs(HERE))
def test_an_export_with_other_weights_is_refused_and_not_kept(
    backend: str, form: str, tmp_path: Path
) -> None:
    said = refusal(backend, form, tmp_path)
    assert "is not the model, nothing is kept: error " in said
    assert said.endswith("; left 0")


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("tensorflow"), reason="tensorflow is not installed")
@pytest.mark.parametrize(("backend", "form"), pairs(("keras:tensorflow", "keras:jax")))
def test_exports_of_another_engine_of_keras(backend: str, form: str, engine) -> None:
    found = engine(backend, form)[form]
    assert found.pop("refused").endswith("; left 0")
    assert found.keys() == set(cases(backend, form))
    assert max(max(errors) for errors in found.values()) <= LIMIT


@pytest.mark.slow
@pytest.mark.jax2onnx
@needs_jax2onnx
@pytest.mark.parametrize("backend", JAX2ONNX)
def test_onnx_from_jax(backend: str, engine) -> None:
    found = engine(backend, "onnx")["onnx"]
    assert found.pop("refused").endswith("; left 0")
    assert found.keys() == set(cases(backend, "onnx"))
    assert max(max(errors) for errors in found.values()) <= LIMIT


@pytest.mark.jax2onnx
@needs_jax2onnx
@pytest.mark.parametrize(("case", "attentions"), [("timm", 1), ("transformer", 2)])
def test_attention_from_jax_is_fused_on_demand(case: str, attentions: int, tmp_path: Path) -> None:
    import onnx

    config, path = CASES[case], tmp_path / "a.onnx"
    export(Checkpoint(config, probe(config)), target(path, "flax", fused_attention=True))
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert (kinds.count("Attention"), kinds.count("Softmax")) == (attentions, 0)


@pytest.mark.jax2onnx
@needs_jax2onnx
@pytest.mark.parametrize("family", CONFIGS)
def test_the_orbax_that_jax2onnx_wants_writes_and_reads_isovits_folders(
    family: str, tmp_path: Path
) -> None:
    config = CONFIGS[family]
    save(Checkpoint(config, probe(config)), tmp_path / "folder")
    found = load(tmp_path / "folder")
    assert found.config == config
    assert all(np.array_equal(found.weights[name], w) for name, w in probe(config).items())


# What a file says and how it is made


def session(path: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def exported(path: Path, case: str = "timm", **options: Any) -> Path:
    config = CASES[case]
    export(Checkpoint(config, probe(config)), target(path, "torch", **options))
    return path


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("onnx") / "a.onnx")


@needs_torch
def test_an_onnx_file_tells_its_config_its_layout_and_its_names(onnx_file: Path) -> None:
    import onnx

    found = session(onnx_file)
    said = found.get_modelmeta().custom_metadata_map
    header = msgspec.json.decode(said["isovit"])
    assert header["format"] == "onnx"
    assert config_from_dict(header["config"]) == CASES["timm"]
    assert said["layout"] == "NHWC"
    (images,), (logits,) = found.get_inputs(), found.get_outputs()
    assert (images.name, images.shape) == ("images", ["batch", 16, 24, 3])
    assert (logits.name, logits.shape) == ("logits", ["batch", 5])
    model = onnx.load(onnx_file)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 20)]
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


@needs_torch
def test_pt2_tells_its_config(tmp_path: Path) -> None:
    import torch

    files = {"isovit.json": ""}
    torch.export.load(exported(tmp_path / "a.pt2"), extra_files=files)
    assert config_from_dict(msgspec.json.decode(files["isovit.json"])["config"]) == CASES["timm"]


@needs_torch
@pytest.mark.parametrize(
    ("case", "attentions"), [("timm", 1), pytest.param("transformer", 2, marks=pytest.mark.slow)]
)
def test_attention_is_fused_on_demand(case: str, attentions: int, tmp_path: Path) -> None:
    import onnx

    path = exported(tmp_path / "a.onnx", case, fused_attention=True)
    model = onnx.load(path)
    kinds = [node.op_type for node in model.graph.node]
    assert model.opset_import[0].version == 23
    assert (kinds.count("Attention"), kinds.count("Softmax")) == (attentions, 0)


@needs_torch
def test_a_model_without_attention_is_refused_where_it_should_be_fused(run, tmp_path: Path) -> None:
    words = ("t2t_vit_7", tmp_path / "a.onnx", "--backend", "torch", "--fused-attention")
    small = ("image_size=16", "depth=0", "embed_dim=12", "num_classes=5")
    outcome = run("export", *words, *[w for s in small for w in ("--set", s)])
    assert (outcome.code, outcome.err.splitlines()[-1]) == (
        2, "isovit: the model has no softmax attention to fuse",
    )  # fmt: skip
    assert not list(tmp_path.iterdir())


@needs_torch
@pytest.mark.parametrize("name", ["a.onnx", "a.pt2"])
def test_the_number_of_images_can_be_fixed(name: str, tmp_path: Path) -> None:
    path = exported(tmp_path / name, batch=3)
    images = draw_inputs(CASES["timm"], 3, seed=0)[0]
    assert exporting.OPEN[path.suffix[1:]](path)(images).shape == (3, 5)
    if name == "a.onnx":
        runtime = onnx_runtime()
        with pytest.raises(InputError, match="exported for batches of 3, got 2 images"):
            runtime.forward(runtime.load(path), images[:2])


@needs_torch
def test_weights_of_two_gigabytes_lie_beside_and_move_along(
    onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from isovit.backends.onnx import graph

    monkeypatch.setattr(graph, "ONE_FILE_BYTES", 1000)
    (tmp_path / "there").mkdir()
    exported(tmp_path / "a.onnx")
    assert {p.name for p in tmp_path.iterdir()} == {"a.onnx", "a.onnx.data", "there"}
    for name in ("a.onnx", "a.onnx.data"):
        shutil.move(tmp_path / name, tmp_path / "there" / name)
    runtime, images = onnx_runtime(), draw_inputs(CASES["timm"], 2, seed=0)[0]
    found = runtime.forward(runtime.load(tmp_path / "there" / "a.onnx"), images)
    assert np.array_equal(found, runtime.forward(runtime.load(onnx_file), images))


@needs_torch
def test_a_file_that_was_there_stays_when_the_check_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run
) -> None:
    monkeypatch.setattr(exporter, "LIMIT", -1.0)
    (tmp_path / "a.pt2").write_text("before", encoding="utf-8")
    outcome = run("export", "vit_s16", tmp_path / "a.pt2", "--backend", "torch", *SMALL)
    assert outcome.code == 1
    assert "isovit: a.pt2 is not the model, nothing is kept: error " in outcome.err
    assert (tmp_path / "a.pt2").read_text(encoding="utf-8") == "before"
    assert len(list(tmp_path.iterdir())) == 1


@needs_torch
def test_an_exporter_that_fails_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run
) -> None:
    import isovit.export.torch as module

    def fail(_: object, path: Path, __: Target) -> None:
        path.write_text("half", encoding="utf-8")
        raise RuntimeError("no such operator\nand a page of explanations")

    monkeypatch.setattr(module, "write_onnx", fail)
    outcome = run("export", "vit_s16", tmp_path / "a.onnx", "--backend", "torch", *SMALL)
    assert outcome.code == 1
    assert outcome.err.splitlines()[-1] == (
        "isovit: onnx from torch failed, nothing is kept: no such operator"
    )
    assert not list(tmp_path.iterdir())


@needs_torch
def test_export_tells_what_it_wrote(run, tmp_path: Path) -> None:
    words = ("export", "vit_s16", tmp_path / "a.pt2", "--backend", "torch", "--seed", "3")
    outcome = run(*words, *SMALL)
    steps = [f"export: {step} ({i}/3)" for i, step in enumerate(("built", "written", "checked"), 1)]
    assert (outcome.code, outcome.err.splitlines()) == (0, steps)
    assert outcome.out.startswith(f"wrote {tmp_path / 'a.pt2'}: pt2, from torch, any images, 0.1 M")
    assert "(limit 5e-06)" in outcome.out


WRONG = {
    "a.tflite --backend torch": "nothing is exported to .tflite; wanted one of .onnx, .pt2",
    "a.onnx --backend mxnet": "no backend named 'mxnet'",
    "a.onnx --backend onnx": "onnx has no onnx export: onnx is from torch, flax, keras:tensor",
    "a.pt2 --backend flax": "flax has no pt2 export: pt2 is from torch",
    "a.stablehlo --backend torch": "stablehlo is from flax",
    "a --backend torch": "saved_model is from keras:tensorflow, keras:jax",
    "a --backend keras:torch": "keras-team/keras/pull/20685",
    "a.onnx --backend torch --opset 12": "opset 12: the exporter of torch writes 18 to 24",
    "a.onnx --backend torch --opset 20 --fused-attention": "--fused-attention needs opset 23",
    "a.onnx --backend keras:tensorflow --fused-attention": "opset 23 for --fused-attention: the ex",
    "a.pt2 --backend torch --fused-attention": "--fused-attention is for ONNX; a.pt2 asks for pt2",
    "a.stablehlo --backend flax --opset 20": "--opset is for ONNX",
    "a.onnx --backend torch --batch 0": "Invalid value for '--batch'",
    "absent/a.onnx --backend torch": "cannot write absent/a.onnx: there is no folder absent",
    "full --backend keras:tensorflow": "a folder with other things is in its place",
    "full.onnx --backend torch": "cannot write full.onnx: a folder is in its place",
}


@needs_torch
@pytest.mark.parametrize("words", WRONG)
def test_wrong_input_is_one_line_and_leaves_nothing(
    words: str, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("full", "full.onnx"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thing").touch()
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    outcome = run("export", "vit_s61", *words.split())  # refused before the model is looked for
    assert outcome.code == 2
    assert WRONG[words] in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_model_too_large_for_a_form_is_refused() -> None:
    found = Target(Path("a.stablehlo"), "flax", "stablehlo")
    with pytest.raises(InputError, match="stablehlo from flax holds less than 2,147,483,648 bytes"):
        found.check_size(isovit.config("vit_h14"))
    found.check_size(isovit.config("vit_l16"))


def test_what_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isovit.backends.find_spec", lambda name: name != "jax2onnx" or None)
    with pytest.raises(InputError, match=r'needs jax2onnx, .* pip install "isovit\[onnx-jax\]"'):
        target("a.onnx", "flax")


def test_every_backend_has_a_form_or_a_reason() -> None:
    backends = {"torch", "flax", "keras:tensorflow", "keras:jax", "keras:torch"}
    assert ROUTES["onnx"].keys() == backends
    assert all(isinstance(route, Route) for route in ROUTES["onnx"].values())
    assert set().union(*(ROUTES[form] for form in ROUTES if form != "onnx")) == backends


# The backend


def onnx_runtime() -> Any:
    from isovit.backends.onnx import runtime

    return runtime


@pytest.fixture(scope="module")
def built() -> Any:
    config: Config = CASES["timm"]
    return get_backend("onnx").build(config, probe(config))


@needs_torch
def test_the_onnx_backend_computes_what_torch_does(built) -> None:
    config = CASES["timm"]
    images = draw_inputs(config, 4, seed=0)[0]
    torch = get_backend("torch")
    wanted = torch.forward(torch.build(config, probe(config)), images)
    assert error(built(images), wanted) <= LIMIT
    runtime = get_backend("onnx")
    (way,) = runtime.WAYS
    step = runtime.inference(built, runtime.put(built, images), way)
    assert error(np.asarray(step()), wanted) <= LIMIT
    with pytest.raises(InputError, match=r"shape \(4, 24, 16, 3\); the model wants"):
        built(images.transpose(0, 2, 1, 3))


@needs_torch
@pytest.mark.parametrize(
    ("call", "said"),
    {
        "read": "gives no weights back",
        "write": "takes no other weights",
        "trace": "has no activations",
        "gradients": "has no gradients",
        "training": "does not train",
    }.items(),
)
def test_the_onnx_backend_refuses_what_it_has_not(call: str, said: str, built) -> None:
    runtime, rest = get_backend("onnx"), {"read": 0, "write": 1, "trace": 1, "gradients": 2}
    with pytest.raises(InputError, match=f"backend onnx {said}"):
        getattr(runtime, call)(built, *[None] * rest.get(call, 3))
    if call == "read":
        with pytest.raises(InputError, match="gives no weights back"):
            isovit.read(built)


@needs_torch
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_the_onnx_backend_is_float32(dtype: str, run) -> None:
    words = ("--backend", "onnx", "--images", CHELSEA, "--dtype", dtype)
    outcome = run("run", "vit_s16", *words, *SMALL)
    assert outcome.code == 2
    assert f"backend onnx is float32 inference and has no {dtype}: " in outcome.err
    with pytest.raises(InputError, match=f"has no {dtype}"):
        isovit.build(CASES["timm"], "onnx", dtype=dtype)


@needs_torch
@pytest.mark.parametrize("device", ["tpu", "cuda:x", "cpu:1"])
def test_the_onnx_backend_refuses_a_device_that_is_not_there(device: str) -> None:
    with pytest.raises(InputError, match=f"device {device}: onnxruntime finds no such device"):
        isovit.build(CASES["timm"], "onnx", device=device)


@needs_torch
@pytest.mark.parametrize(
    ("options", "lacks"),
    [
        ((), "float64"),
        (("--dtype", "float32", "--gradients"), "gradients"),
        (("--dtype", "float32", "--trace"), "activations"),
    ],
)
def test_parity_says_that_onnx_is_float32_inference(options, lacks: str, run) -> None:
    outcome = run("parity", "vit_s16", "--backends", "torch,onnx", *options, *SMALL)
    assert outcome.code == 2
    assert f"backend onnx is float32 inference and has no {lacks}: " in outcome.err
    assert len(outcome.err.splitlines()) == 1


@pytest.mark.slow
@needs_torch
def test_parity_takes_onnx_in_float32(run) -> None:
    words = ("--backends", "torch,onnx", "--dtype", "float32")
    outcome = run("parity", "vit_s16", *words, *SMALL)
    assert outcome.code == 0
    assert "equal: torch, onnx are one function in float32" in outcome.out


@needs_torch
def test_run_takes_a_model_by_name_or_an_exported_file(
    run, onnx_file: Path, tmp_path: Path
) -> None:
    named = run("run", "vit_s16", "--backend", "onnx", "--images", CHELSEA, "--top", "2", *SMALL)
    assert named.code == 0
    assert len(named.out.splitlines()) == 3
    output = ("--images", CHELSEA, "--output", tmp_path / "y.npy")
    assert run("run", onnx_file, "--backend", "onnx", *output).code == 0
    from isovit.preprocess import load_images

    wanted = onnx_runtime().load(onnx_file)(load_images(CASES["timm"], [CHELSEA]))
    assert np.array_equal(np.load(tmp_path / "y.npy"), wanted)


def test_an_exported_file_runs_without_any_framework(onnx_file: Path) -> None:
    program = (
        "import sys; from isovit.cli import main\n"
        f"try: main(['run', r'{onnx_file}', '--backend', 'onnx', '--images', r'{CHELSEA}'])\n"
        "finally: print(sorted({'torch', 'jax', 'keras', 'onnx', 'tensorflow'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


@needs_torch
@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("a.onnx", "--backend torch", "is an exported model: it runs by --backend onnx, not --b"),
        ("a.onnx", "--backend onnx --set depth=2", "it runs by --backend onnx, not --set"),
        ("absent.onnx", "--backend onnx", "cannot read absent.onnx: no such file"),
        ("text.onnx", "--backend onnx", "text.onnx: wanted an ONNX model, but: "),
        ("cut.onnx", "--backend onnx", "cut.onnx: wanted an ONNX model, but: "),
        ("foreign.onnx", "--backend onnx", "foreign.onnx: says no config; wanted a file of iso"),
    ],
)
def test_a_wrong_onnx_file_is_one_line(
    name: str, words: str, said: str, run, onnx_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx

    monkeypatch.chdir(onnx_file.parent)
    content = onnx_file.read_bytes()
    Path("text.onnx").write_text("no model", encoding="utf-8")
    Path("cut.onnx").write_bytes(content[: len(content) // 2])
    model = onnx.load_from_string(content)
    del model.metadata_props[:]
    onnx.save(model, "foreign.onnx")
    outcome = run("run", name, *words.split(), "--images", str(CHELSEA))
    assert outcome.code == 2
    assert said in outcome.err
    assert len(outcome.err.splitlines()) == 1
