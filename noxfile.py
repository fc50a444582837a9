"""Every task of the project; ``nox --list`` names them, CI runs ``nox`` alone."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["lint", "types", "tests", "parity", "parity_keras", "proof"]
nox.options.error_on_external_run = True

PROJECT = nox.project.load_toml("pyproject.toml")
ENGINES = ["tensorflow", "jax", "torch"]
ALL_BACKENDS = ["torch", "flax", *(f"keras:{engine}" for engine in ENGINES)]
GROUPS = ("test", "oracles", "lint", "types")


def environment(session: nox.Session) -> Path:
    """The one environment that all sessions share, brought up to date; gives its programs' folder.

    Three frameworks take three gigabytes: an environment for each session would take twenty.
    """
    folder = Path(".nox/isovit").absolute()
    programs = folder / ("Scripts" if sys.platform == "win32" else "bin")
    wanted = hashlib.sha256()
    for name in ("pyproject.toml", "constraints.txt"):
        wanted.update(Path(name).read_bytes())
    stamp = folder / "installed"
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted.hexdigest():
        session.run(sys.executable, "-m", "venv", "--clear", str(folder), external=True)
        packages = [p for group in GROUPS for p in nox.project.dependency_groups(PROJECT, group)]
        command = ["-m", "pip", "install", "--quiet", "-c", "constraints.txt", "-e", ".[all]"]
        session.run(str(programs / "python"), *command, *packages, external=True)
        stamp.write_text(wanted.hexdigest(), encoding="utf-8")
    return programs


def run(session: nox.Session, program: str, *arguments: str, **settings: str) -> None:
    """Run a program of the shared environment."""
    path = environment(session) / program
    session.run(str(path), *arguments, env={"JAX_PLATFORMS": "cpu", **settings}, external=True)


COMPILED = {"flax": "quick", "keras:jax": "quick"}
"""Fewer examples for those that compile each of them; ``nightly`` is for every backend."""


def parity_tests(session: nox.Session, backend: str, *arguments: str, profile: str = "") -> None:
    """Run the parity suite for one backend, in a process of its own."""
    options = ["--backend", backend, "--require", *arguments, *session.posargs]
    usual = profile or COMPILED.get(backend, "ci")
    chosen = os.environ.get("HYPOTHESIS_PROFILE", usual)
    run(session, "pytest", "parity_tests", *options, HYPOTHESIS_PROFILE=chosen)


@nox.session(python=False)
def demo(session: nox.Session) -> None:
    """The main job: one photograph through T2T-ViT-14 in every framework, and the proof."""
    run(session, "python", "examples/demo.py", *session.posargs)


@nox.session(python=False)
def quick(session: nox.Session) -> None:
    """A useful subset in under three minutes: lint, unit tests, two backends on few examples."""
    lint(session)
    run(session, "pytest", "tests", "-m", "not slow", *session.posargs)
    parity_tests(session, "torch", "-m", "not slow and not oracles", profile="quick")
    # JAX compiles each example: the outputs alone.
    parity_tests(session, "flax", "-k", "test_forward or test_structure", profile="quick")


@nox.session(python=False)
def tests(session: nox.Session) -> None:
    """Unit tests, conversions and the command line."""
    run(session, "pytest", "tests", *session.posargs)


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
def proof(session: nox.Session) -> None:
    """The published models in float64 through all backends, gradients included."""
    for model in session.posargs or ["t2t_vit_7"]:
        backends = ["--backends", ",".join(ALL_BACKENDS)]
        run(session, "isovit", "parity", model, "--gradients", "--trace", *backends)


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
