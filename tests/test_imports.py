"""What a fresh process loads: the spec and the quick verbs start without any framework."""

from __future__ import annotations

import subprocess
import sys

import pytest

FRAMEWORKS = {"torch", "jax", "jaxlib", "flax", "keras", "tensorflow", "onnx", "onnxruntime"}
HEAVY = {"scipy", "PIL", "h5py", "orbax", "safetensors", "ml_dtypes", "matplotlib", "pandas"}

QUICK = {
    "import isovit": "import isovit",
    "every public name": "import isovit; [getattr(isovit, name) for name in isovit.__all__]",
    "isovit.config": "import isovit; isovit.config('t2t_vit_14', num_classes=10)",
    "isovit.init": "import isovit; isovit.init(isovit.config('vit_ti16', depth=1))",
    "isovit.param_tree": "import isovit; isovit.param_tree(isovit.config('t2t_vit_14')).count()",
    "isovit --help": "from isovit.cli import main; main(['--help'])",
    "isovit list": "from isovit.cli import main; main(['list'])",
    "isovit show": "from isovit.cli import main; main(['show', 't2t_vit_14', '--tree'])",
    "isovit show --json": "from isovit.cli import main; main(['show', 't2t_vit_14', '--json'])",
}
LOADING_WEIGHTS = {"every public name"}  # conversion needs ml_dtypes


def loaded_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has after running some code."""
    tell = "lambda: print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    program = f"import atexit, sys; atexit.register({tell}); {code}"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("name", QUICK)
def test_no_framework_is_loaded_by(name: str) -> None:
    assert not loaded_by(QUICK[name]) & FRAMEWORKS


@pytest.mark.parametrize("name", [name for name in QUICK if name not in LOADING_WEIGHTS])
def test_no_heavy_module_is_loaded_by(name: str) -> None:
    assert not loaded_by(QUICK[name]) & HEAVY


def test_the_check_sees_a_framework_where_one_is_loaded() -> None:
    code = "import isovit.backends as b; b.get_backend('torch')"
    assert loaded_by(code) & FRAMEWORKS == {"torch"}


def test_the_check_sees_a_heavy_module_where_one_is_loaded() -> None:
    assert loaded_by("import isovit.preprocess") & HEAVY == {"PIL"}


def test_importing_a_backends_table_of_axes_loads_no_framework() -> None:
    names = ("torch", "flax", "keras", "onnx")
    code = "; ".join(f"import isovit.backends.{name}.layout" for name in names)
    assert not loaded_by(code) & FRAMEWORKS


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    import isovit

    with pytest.raises(AttributeError, match="has no attribute 'convert'"):
        isovit.convert  # noqa: B018
    assert set(isovit.__all__) == set(dir(isovit))
