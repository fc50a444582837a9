"""Records as ``isovit bench`` makes them, of figures that a test chooses."""

from __future__ import annotations

from typing import Any

from isovit.benchmarks.device import facts
from isovit.benchmarks.records import Case, Product, Record, Result, Run, Timing


def record(backend: str, ms: float, batch: int = 1, spread: float = 0.01, **case: Any) -> Record:
    timing = Timing(median_ms=ms, low_ms=ms * (1 - spread), high_ms=ms * (1 + spread), repeats=9)
    result = Result(step=timing, build_s=1, first_call_s=2, transfer_ms=0.1, device_bytes=None,
                    host_bytes=int(ms * 1e6), operations=int(2e9), weight_bytes=10)  # fmt: skip
    subject = {"model": "m", "way": "eager", "backend": backend, "batch": batch} | case
    precision = "float32, float32_matmul_precision=highest"
    return Record(case=Case(**subject), result=result, precision=precision)


def a_run(*records: Record) -> Run:
    products = [Product(library="a", gflops=200.0), Product(library="b", gflops=400.0)]
    return Run(command="isovit bench m", started="2026", device=facts(), products=products,
               records=list(records))  # fmt: skip
