"""Which software takes part."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("isovit", "numpy", "torch", "torchax", "jax", "jaxlib", "libtpu", "flax", "optax",
            "keras", "tensorflow", "tensorflow-cpu", "onnx", "onnxruntime", "timm",
            "vit-pytorch")  # fmt: skip


def versions() -> dict[str, str]:
    """Of every installed package that can have a part in a result."""
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
