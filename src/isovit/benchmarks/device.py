"""What machine this is, as data that goes with every figure."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

CPUINFO = Path("/proc/cpuinfo")
VECTORS = {"avx512f": "AVX-512", "avx2": "AVX2"}
"""Flags of a processor to the vectors that it multiplies, widest first."""

GOOGLE = "0x1ae0"
TPU_CHIPS = {
    "0x0027": "v3",
    "0x005e": "v4",
    "0x0062": "v5p",
    "0x0063": "v5e",
    "0x006f": "v6e",
    "0x0076": "7x",
}
"""PCI device to the generation of a TPU; as JAX's ``hardware_utils`` has them."""


def facts() -> dict[str, Any]:
    """Processor, cores, clock, memory, accelerators, system and Python."""
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "processor": _processor(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "clock_mhz": round(float(_cpuinfo("cpu MHz") or 0)) or None,
        "memory_bytes": _memory(),
        "accelerators": _accelerators(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def _processor() -> str:
    """Its name, and what tells generations apart where a virtual machine says the maker alone."""
    name = _cpuinfo("model name")
    if name is None:
        return platform.processor() or platform.machine()
    family, model = _cpuinfo("cpu family"), _cpuinfo("model")
    told = [f"family {family}", f"model {model}"] if family and model else []
    flags = (_cpuinfo("flags") or "").split()
    told += [width for flag, width in VECTORS.items() if flag in flags][:1]
    return f"{name} ({', '.join(told)})" if told else name


def _cpuinfo(key: str) -> str | None:
    """The first value of a key in /proc/cpuinfo; None elsewhere than on Linux."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in pairs if name.strip() == key), None)


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _accelerators() -> list[str]:
    """Names of NVIDIA devices with their highest clocks, as their driver tells them; and TPUs."""
    command = ["nvidia-smi", "--query-gpu=name,clocks.max.sm", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        found = done.stdout.strip().splitlines()
    except (OSError, subprocess.SubprocessError):
        found = []
    return found + tpus(Path("/sys/bus/pci/devices"))


def tpus(folder: Path) -> list[str]:
    """A name for each chip of a TPU on the PCI bus; records have the name that JAX gives it.

    Args:
        folder: of the bus, ``/sys/bus/pci/devices`` on Linux.
    """
    found: list[str] = []
    for device in sorted(folder.glob("*/device")):
        vendor = device.with_name("vendor")
        ids = [file.read_text(encoding="utf-8").strip() for file in (vendor, device)]
        if ids[0] == GOOGLE and ids[1] in TPU_CHIPS:
            found.append(f"TPU {TPU_CHIPS[ids[1]]}")
    return found
