"""Devices: what a process is told of them, and the one line about one that is not there."""

from __future__ import annotations

import code
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from isovit.backends import get_backend
from isovit.backends.devices import worker_environment
from isovit.benchmarks import device as machine
from isovit.benchmarks import driver, worker
from isovit.benchmarks.device import tpus
from isovit.benchmarks.records import Case
from isovit.errors import InputError
from isovit.spec.initialize import init
from isovit.weight_convert.checkpoint import Checkpoint
from isovit.weight_convert.store import file_bytes, save
from tests.outcome import Outcome
from tests.small import CONFIGS, SETTINGS, SMALL, VIT

Run = Callable[..., Outcome]


def assert_one_line(outcome: Outcome, *parts: str) -> None:
    assert (outcome.code, outcome.out) == (2, "")
    assert len(outcome.err.splitlines()) == 1
    assert outcome.err.startswith("isovit: device ")
    for part in (*parts, "use --device cpu"):
        assert part in outcome.err


# The environment of a worker


def test_a_worker_for_the_cpu_sees_no_accelerator() -> None:
    found = worker_environment("cpu", {"JAX_PLATFORMS": "tpu", "HOME": "/home"})
    assert found["JAX_PLATFORMS"] == "cpu"
    assert found["CUDA_VISIBLE_DEVICES"] == "-1"
    assert found["HOME"] == "/home"


@pytest.mark.parametrize(("device", "platforms"), [("cuda:1", "cuda,cpu"), ("tpu", "tpu,cpu")])
def test_a_worker_for_an_accelerator_gets_it_and_takes_memory_as_needed(
    device: str, platforms: str
) -> None:
    found = worker_environment(device, {"JAX_PLATFORMS": "cpu"})
    assert found["JAX_PLATFORMS"] == platforms
    assert found["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert found["TF_FORCE_GPU_ALLOW_GROWTH"] == "true"
    assert found["NVIDIA_TF32_OVERRIDE"] == "0"
    assert ("CUDA_VISIBLE_DEVICES" in found) == (device == "tpu")


def test_where_the_framework_chooses_nothing_is_hidden() -> None:
    found = worker_environment(None, {"JAX_PLATFORMS": "cpu"})
    assert found["JAX_PLATFORMS"] == "cpu"
    assert "CUDA_VISIBLE_DEVICES" not in found


def test_a_worker_takes_no_module_from_the_folder_where_it_stands(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("")
    environment = worker_environment("cpu", os.environ)

    def found(environment: dict[str, str]) -> Path:
        command = [sys.executable, "-c", "import code; print(code.__file__)"]
        text = subprocess.check_output(command, cwd=tmp_path, env=environment, text=True)
        return Path(text.strip())

    assert found(environment) == Path(code.__file__)
    environment.pop("PYTHONSAFEPATH")
    assert found(environment) == tmp_path / "code.py"  # so that the first line can fail


# A device that is not there


@pytest.mark.parametrize(
    ("backend", "device", "parts"),
    [
        ("torch", "cuda", ["torch finds no such device here (cpu only)", "CUDA build of torch"]),
        ("flax", "tpu", ["jax finds no such device here", "JAX_PLATFORMS=cpu hides", "jax[tpu]"]),
        ("flax", "cuda", ["jax finds no such device here", "jax[cuda13]"]),
        ("flax", "cpu:99", ["jax finds no such device here"]),
        ("keras:torch", "cuda", ["torch finds no such device here (cpu only)"]),
        ("keras:torch", "tpu", ["torch finds no such device here", "flax or keras:jax"]),
        ("onnx", "cuda", ["onnxruntime finds no such device here", "onnxruntime-gpu"]),
    ],
)
def test_run_names_what_was_wanted_what_is_there_and_what_to_do(
    backend: str, device: str, parts: list[str], run: Run, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    save(Checkpoint(VIT, init(VIT)), tmp_path / "a.safetensors")
    images = tmp_path / "x.npy"
    import numpy as np

    np.save(images, np.zeros((1, 16, 24, 3), np.float32))
    words = ("--backend", backend, "--device", device, "--input", images)
    assert_one_line(run("run", tmp_path / "a.safetensors", *words), f"device {device}: ", *parts)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["bench", "choose"])
@pytest.mark.parametrize(
    ("device", "backends", "parts"),
    [
        ("cuda", "torch", ["torch finds no such device here (cpu only)"]),
        ("tpu", "flax", ["jax finds no such device here (", "jax[tpu]"]),
        ("cuda", "torch,flax", ["torch finds no such", "; jax finds no such", "docs/devices.md"]),
    ],
)
def test_bench_and_choose_ask_for_the_device_before_they_measure(
    command: str, device: str, backends: str, parts: list[str], run: Run, tmp_path: Path
) -> None:
    kept = ("--out" if command == "bench" else "--results", tmp_path / "a.json")
    words = ("--backends", backends, "--device", device, *kept)
    assert_one_line(run(command, "vit_s16", *SMALL, *words), f"device {device}: ", *parts)
    assert not (tmp_path / "a.json").exists()


def test_a_backend_that_reaches_no_tpu_is_told_which_do() -> None:
    with pytest.raises(InputError, match="onnx cannot run there; wanted one of torch, flax, keras"):
        driver.plan(["vit_s16"], backends=["onnx"], device="tpu")


def test_one_backend_without_the_device_is_noted_and_the_others_are_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    absent = {"torch": "device tpu: torch needs torchax", "flax": "", "keras:jax": ""}
    monkeypatch.setattr(driver, "_absence", lambda name, device: absent[name])
    notes: list[str] = []
    cases = driver.plan(
        ["vit_s16"], backends=["torch", "flax", "keras:jax"], device="tpu", note=notes.append
    )
    assert [(case.backend, case.way) for case in cases] == [("flax", "jit"), ("keras:jax", "jit")]
    assert notes == [absent["torch"]]


def test_torch_goes_to_a_tpu_by_torchax_and_elsewhere_only_if_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(driver, "_absence", lambda name, device: "")
    monkeypatch.setattr(driver, "require_module", lambda *words: None)

    def ways(**options: object) -> list[str]:
        return [case.way for case in driver.plan(["vit_s16"], backends=["torch"], **options)]  # type: ignore[arg-type]

    assert ways(device="tpu") == ["torchax"]
    assert ways(device="cpu") == ["eager", "compile"]
    assert ways(device="cuda") == ["eager", "compile"]
    assert ways(device="cpu", ways=["torchax"]) == ["torchax"]
    with pytest.raises(InputError, match="no way named torchax; wanted one of compile, eager"):
        ways(device="cuda", ways=["torchax"])


@pytest.mark.skipif(find_spec("torchax") is not None, reason="torchax is installed")
def test_torchax_that_is_not_installed_is_named() -> None:
    with pytest.raises(InputError, match=r"pip install \"isovit\[torchax\]\""):
        driver.plan(["vit_s16"], backends=["torch"], ways=["torchax"])
    with pytest.raises(InputError, match="device tpu: torch needs torchax"):
        get_backend("torch").require_device("tpu")


def test_the_products_of_a_device_are_those_of_libraries_that_have_it() -> None:
    usable = {
        device: {name for name in driver.LIBRARIES if driver._multiplies(name, device)}
        for device in ("cpu", "cuda", "tpu")
    }
    assert usable["cpu"] == driver.LIBRARIES.keys()
    assert usable["cuda"] == {"torch", "jax", "tensorflow"}
    assert usable["tpu"] == {"jax"}


def test_a_product_on_a_device_that_is_not_there_is_refused_not_taken_elsewhere() -> None:
    with pytest.raises(InputError, match="device tpu: jax finds no such device"):
        worker.product("jax", "tpu", 0.1)


# Facts


def test_the_chips_of_a_tpu_are_found_on_the_bus(tmp_path: Path) -> None:
    for slot, vendor, device in (
        ("0", "0x1ae0", "0x0063"),
        ("1", "0x1ae0", "0x0063"),
        ("2", "0x1ae0", "0x0042"),  # a network card of the same maker
        ("3", "0x8086", "0x0063"),
    ):
        (tmp_path / slot).mkdir()
        (tmp_path / slot / "vendor").write_text(f"{vendor}\n", encoding="utf-8")
        (tmp_path / slot / "device").write_text(f"{device}\n", encoding="utf-8")
    assert tpus(tmp_path) == ["TPU v5e", "TPU v5e"]
    assert tpus(tmp_path / "absent") == []


CPU = "model\t\t: 17\nmodel name\t: AMD EPYC\ncpu family\t: 25\nflags\t\t: fpu avx2 avx512f\n"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (CPU, "AMD EPYC (family 25, model 17, AVX-512)"),
        (CPU.replace(" avx512f", ""), "AMD EPYC (family 25, model 17, AVX2)"),
        ("model name\t: BCM2835\n\nmodel name\t: other\n", "BCM2835"),
    ],
)
def test_generations_of_a_processor_have_different_names(
    text: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(text, encoding="utf-8")
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    assert machine.facts()["processor"] == name
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "absent")
    assert machine.facts()["processor"] == (platform.processor() or platform.machine())


@pytest.mark.parametrize("family", CONFIGS)
def test_the_size_of_a_file_is_that_of_the_file(family: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(CONFIGS[family], init(CONFIGS[family]))
    save(checkpoint, tmp_path / "a.safetensors")
    assert file_bytes(checkpoint) == (tmp_path / "a.safetensors").stat().st_size


@pytest.mark.parametrize("mode", ["infer", "train"])
@pytest.mark.parametrize(
    ("backend", "way", "switch"), [("torch", "eager", "highest"), ("flax", "jit", "highest")]
)
def test_a_record_says_all_of_how_it_was_made(
    backend: str, way: str, switch: str, mode: str
) -> None:
    changes = {key: json.loads(value) for key, value in (s.split("=") for s in SETTINGS)}
    case = Case(model="vit_s16", changes=changes, backend=backend, way=way, mode=mode)  # type: ignore[arg-type]
    record = worker.record(case, 0.05)
    assert record.error is None
    assert record.result is not None
    result = record.result
    assert record.device == "cpu"
    assert record.precision.startswith("float32; ")
    assert record.precision.endswith(f"={switch}")
    assert record.versions["isovit"]
    assert result.transfer_ms > 0
    assert result.compile_s is not None
    assert 0 <= result.compile_s <= result.first_call_s
    assert result.file_bytes is not None
    assert result.weight_bytes < result.file_bytes < result.weight_bytes + 20_000
    assert result.device_bytes is None
