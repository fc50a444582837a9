"""The house in order: one file per family everywhere, the same classes in all three backends."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import isovit
from isovit.backends import BACKENDS, INFERENCE
from isovit.spec.families import FAMILIES, class_name, config_class, family_module, home
from isovit.spec.objectives import OBJECTIVES

PACKAGE = Path(isovit.__file__).parent
REPOSITORY = PACKAGE.parents[1]
FRAMEWORKS = {"torch", "jax", "jaxlib", "flax", "keras", "tensorflow", "orbax", "h5py"}

# What a framework forces on a class, and what only one backend's layers.py needs:
# Flax's kind of variable for fixed parameters and the type of its keywords, Keras's LayerNorm.
METHODS = {
    "__init__", "forward", "__call__", "call", "build", "compute_output_shape", "get_config",
    "from_config", "convolution_op",
}  # fmt: skip
HELPERS = {"Fixed", "Kinds", "SpecModel"}  # what only one framework needs


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def outline(path: Path) -> list[str]:
    """Classes with their own methods, in order of appearance."""
    return [
        f"{node.name}: {' '.join(methods(node))}"
        for node in tree(path).body
        if isinstance(node, ast.ClassDef) and node.name not in HELPERS
    ]


def methods(node: ast.ClassDef) -> list[str]:
    names = [item.name for item in node.body if isinstance(item, ast.FunctionDef)]
    return [name for name in names if name not in METHODS]


def functions(path: Path) -> list[str]:
    return [node.name for node in tree(path).body if isinstance(node, ast.FunctionDef)]


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere."""
    names: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names}


def model_file(backend: str, family: str) -> Path:
    return PACKAGE / "backends" / backend / f"{home(family).replace('.', '/')}.py"


def files_of(family: str, text: str) -> set[Path]:
    """The files of a family that a text names as ``path/families/X.py``, braces expanded."""
    found: set[Path] = set()
    for name in re.findall(r"`(\S+/families)/X\.py`", text.replace("\n", " ")):
        before, _, rest = name.partition("{")
        inside, _, after = rest.partition("}")
        for choice in inside.split(","):
            inner = before + choice + after
            root = REPOSITORY if inner.startswith("parity_tests") else PACKAGE
            found.add(root / inner / f"{family}.py")
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_the_files_that_contributing_lists_and_one_line(family: str) -> None:
    named = files_of(family, (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    roots = (PACKAGE, REPOSITORY / "parity_tests")
    assert named == {file for root in roots for file in root.rglob(f"families/{family}.py")}
    assert len(named) == 9
    lines = [
        line
        for line in (PACKAGE / "spec/families/__init__.py").read_text(encoding="utf-8").splitlines()
        if line.strip().startswith(f'"{family}":')
    ]
    assert lines == [f'    "{family}": "{FAMILIES[family]}",']


def test_no_folder_of_families_has_a_file_of_none() -> None:
    for root in (PACKAGE, REPOSITORY / "parity_tests"):
        files = {path.stem for path in root.rglob("families/*.py")}
        assert files - {"__init__"} == FAMILIES.keys()


def test_the_list_of_backends_is_the_list_of_folders() -> None:
    folders = {path.parent.name for path in (PACKAGE / "backends").glob("*/__init__.py")}
    assert folders == BACKENDS.keys() | INFERENCE.keys()


@pytest.mark.parametrize("family", [*FAMILIES, *OBJECTIVES])
def test_a_family_has_config_variants_aliases_and_param_tree(family: str) -> None:
    module, cls = family_module(family), config_class(family)
    assert cls.__name__ == f"{class_name(family)}Config"
    assert cls().family == family
    assert callable(module.param_tree)
    assert all(type(variant) is cls for variant in module.VARIANTS.values())
    assert set(module.ALIASES.values()) <= module.VARIANTS.keys()
    assert not module.ALIASES.keys() & module.VARIANTS.keys()


@pytest.mark.parametrize("family", [*FAMILIES, *OBJECTIVES])
def test_the_backends_have_the_same_classes_in_the_same_order(family: str) -> None:
    outlines = {name: outline(model_file(name, family)) for name in BACKENDS}
    assert outlines["torch"][-1].startswith(class_name(family)), "the model comes last"
    assert outlines["flax"] == outlines["torch"]
    assert outlines["keras"] == outlines["torch"]


@pytest.mark.parametrize("family", [*FAMILIES, *OBJECTIVES])
def test_the_backends_have_the_same_functions_in_the_same_order(family: str) -> None:
    first, *others = (functions(model_file(name, family)) for name in BACKENDS)
    assert others == [first, first]


def test_the_shared_layers_are_the_same_classes_in_the_same_order() -> None:
    outlines = {name: outline(PACKAGE / "backends" / name / "layers.py") for name in BACKENDS}
    assert len(outlines["torch"]) >= 5
    assert outlines["flax"] == outlines["torch"]
    assert outlines["keras"] == outlines["torch"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("file", ["__init__.py", "layout.py", "families/__init__.py"])
def test_no_framework_is_imported_by(backend: str, file: str) -> None:
    assert not imported(PACKAGE / "backends" / backend / file) & FRAMEWORKS


@pytest.mark.parametrize("backend", INFERENCE)
def test_an_inference_backend_has_no_models(backend: str) -> None:
    folder = PACKAGE / "backends" / backend
    assert not (folder / "families").exists()
    for file in ("__init__.py", "layout.py"):
        assert not imported(folder / file) & (FRAMEWORKS | {"onnx", "onnxruntime"})


def test_the_check_of_imports_sees_a_framework_in_a_model_file() -> None:
    assert imported(PACKAGE / "backends/keras/families/vit.py") & FRAMEWORKS == {"keras"}


def test_the_outline_sees_a_class_of_another_name(tmp_path: Path) -> None:
    text = (PACKAGE / "backends/torch/families/vit.py").read_text(encoding="utf-8")
    renamed = text.replace("class ConvPatchEmbed", "class PatchEmbed")
    (tmp_path / "vit.py").write_text(renamed, encoding="utf-8")
    assert outline(tmp_path / "vit.py") != outline(PACKAGE / "backends/torch/families/vit.py")
