"""What machine this is, as data that goes with every figure."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("isovit", "numpy", "torch", "jax", "jaxlib", "flax", "optax", "keras", "tensorflow",
            "tensorflow-cpu", "onnx", "onnxruntime", "timm", "vit-pytorch")  # fmt: skip


def facts() -> dict[str, Any]:
    """Processor, cores, clock, memory, accelerators, system and Python."""
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "processor": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "clock_mhz": round(float(_cpuinfo("cpu MHz") or 0)) or None,
        "memory_bytes": _memory(),
        "accelerators": _accelerators(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def versions() -> dict[str, str]:
    """Of every installed package that can have a part in a figure."""
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _cpuinfo(key: str) -> str | None:
    """The first value of a key in /proc/cpuinfo; None elsewhere than on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _accelerators() -> list[str]:
    """Names of NVIDIA devices, as their driver tells them."""
    command = ["nvidia-smi", "--query-gpu=name,clocks.max.sm", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.strip().splitlines()
