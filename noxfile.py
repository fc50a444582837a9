"""Every task of the project; ``nox --list`` names them, CI runs ``nox`` alone."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import NamedTuple

import nox

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["lint", "types", "tests", "parity", "parity_keras", "proof", "export_jax"]
nox.options.error_on_external_run = True

PROJECT = nox.project.load_toml("pyproject.toml")
ENGINES = ["tensorflow", "jax", "torch"]
ALL_BACKENDS = ["torch", "flax", *(f"keras:{engine}" for engine in ENGINES)]


class Environment(NamedTuple):
    """What is installed beside isovit: its extras, dependency groups, and constraints left out."""

    extras: str
    groups: tuple[str, ...]
    free: tuple[str, ...] = ()


SHARED = "isovit"
ENVIRONMENTS = {
    SHARED: Environment("all", ("test", "oracles", "lint", "types")),
    # jax2onnx holds orbax-checkpoint at an older release: docs/decisions/onnx-extras.md.
    "jax2onnx": Environment("flax,keras,onnx-jax", ("test",), free=("orbax-checkpoint",)),
    # torchax for this torch is a nightly release: docs/devices.md.
    "torchax": Environment("torchax", ("test",)),
}


def environment(session: nox.Session, name: str = SHARED) -> Path:
    """An environment, brought up to date; gives its programs' folder.

    Three frameworks take three gigabytes: an environment for each session would take twenty.
    """
    folder, content = Path(".nox", name).absolute(), ENVIRONMENTS[name]
    programs = folder / ("Scripts" if sys.platform == "win32" else "bin")
    wanted = hashlib.sha256()
    for file in ("pyproject.toml", "constraints.txt"):
        wanted.update(Path(file).read_bytes())
    stamp = folder / "installed"
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted.hexdigest():
        session.run(sys.executable, "-m", "venv", "--clear", str(folder), external=True)
        lines = Path("constraints.txt").read_text(encoding="utf-8").splitlines()
        pins = [line for line in lines if line.partition("==")[0] not in content.free]
        constraints = folder / "constraints.txt"
        constraints.write_text("\n".join(pins), encoding="utf-8")
        groups = [nox.project.dependency_groups(PROJECT, group) for group in content.groups]
        packages = [package for group in groups for package in group]
        command = ["-m", "pip", "install", "--quiet", "-c", str(constraints)]
        target = ["-e", f".[{content.extras}]"]
        session.run(str(programs / "python"), *command, *target, *packages, external=True)
        stamp.write_text(wanted.hexdigest(), encoding="utf-8")
    return programs


def run(
    session: nox.Session, program: str, *arguments: str, where: str = SHARED, **settings: str
) -> None:
    """Run a program of an environment."""
    path = environment(session, where) / program
    session.run(str(path), *arguments, env={"JAX_PLATFORMS": "cpu", **settings}, external=True)


IN_PARALLEL = ["-n", str(min(os.cpu_count() or 1, 4)), "--dist", "worksteal"]
"""Processes of pytest-xdist, each with one thread: of models so small, two take three times as much
of the processor's time as one.
"""


def pytest(session: nox.Session, *arguments: str, where: str = SHARED, **settings: str) -> None:
    """Run tests on all cores."""
    run(session, "pytest", *IN_PARALLEL, *arguments, where=where, OMP_NUM_THREADS="1", **settings)


COMPILED = ("flax", "keras:jax")
"""Backends that compile each example: they draw few, unless HYPOTHESIS_PROFILE says how many."""


def parity_tests(session: nox.Session, backend: str, *arguments: str, profile: str = "") -> None:
    """Run the parity suite for one backend, in a process of its own."""
    options = ["--backend", backend, "--require", *arguments, *session.posargs]
    usual = profile or ("quick" if backend in COMPILED else "ci")
    chosen = os.environ.get("HYPOTHESIS_PROFILE", usual)
    pytest(session, "parity_tests", *options, HYPOTHESIS_PROFILE=chosen)


@nox.session(python=False)
def demo(session: nox.Session) -> None:
    """The main job: one photograph through T2T-ViT-14 in every framework, and the proof."""
    run(session, "python", "examples/demo.py", *session.posargs)


@nox.session(python=False)
def quick(session: nox.Session) -> None:
    """A useful subset in under three minutes: lint, unit tests, two backends on few examples."""
    lint(session)
    pytest(session, "tests", "-m", "not slow", *session.posargs)
    parity_tests(session, "torch", "-m", "not slow and not oracles", profile="quick")
    # JAX compiles each example: the outputs alone.
    parity_tests(session, "flax", "-k", "test_forward", profile="quick")


@nox.session(python=False)
def tests(session: nox.Session) -> None:
    """Unit tests, conversions and the command line."""
    pytest(session, "tests", *session.posargs)


@nox.session(python=False)
@nox.parametrize("backend", ["torch", "flax"])
def parity(session: nox.Session, backend: str) -> None:
    """The parity suite for torch and for Flax."""
    parity_tests(session, backend)


@nox.session(python=False)
@nox.parametrize("engine", ENGINES)
def parity_keras(session: nox.Session, engine: str) -> None:
    """The parity suite for Keras on one engine."""
    parity_tests(session, f"keras:{engine}")


@nox.session(python=False)
def export_jax(session: nox.Session) -> None:
    """ONNX from Flax and from Keras on JAX, in an environment of its own."""
    run(session, "python", "-c", "import jax2onnx", where="jax2onnx")
    options = ["-m", "jax2onnx", *session.posargs]
    pytest(session, "tests/test_export.py", *options, where="jax2onnx")


@nox.session(python=False)
def torchax(session: nox.Session) -> None:
    """Torch by torchax, the way to a TPU, in an environment of its own; not part of CI."""
    run(session, "python", "-c", "import torchax", where="torchax")
    options = ["--backend", "torch", *session.posargs]
    run(session, "pytest", "parity_tests/test_torchax.py", *options, where="torchax")


@nox.session(python=False)
def proof(session: nox.Session) -> None:
    """The published models in float64 through all backends, gradients included."""
    for model in session.posargs or ["t2t_vit_7"]:
        backends = ["--backends", ",".join(ALL_BACKENDS)]
        run(session, "isovit", "parity", model, "--gradients", "--trace", *backends)


@nox.session(python=False)
def fuzz(session: nox.Session) -> None:
    """The nightly 20,000 broken checkpoints; ``tests`` runs the first 500 of them."""
    run(session, "python", "-m", "tests.fuzz", *(session.posargs or ["--cases", "20000"]))


@nox.session(python=False)
def lint(session: nox.Session) -> None:
    """Format, lint, spelling and the import fence."""
    run(session, "ruff", "format", "--check", ".")
    run(session, "ruff", "check", ".")
    run(session, "codespell")
    run(session, "lint-imports")


@nox.session(python=False)
def types(session: nox.Session) -> None:
    """Static types: strict for the spec and for conversion, standard elsewhere."""
    run(session, "pyright")
