"""Timing a step: warm up, repeat until the median is known well enough, say how well."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from isovit.benchmarks.records import Timing

WARM_UP = 2
LEAST, MOST = 6, 500
"""Of six, the median lies between the least and the greatest with 1 − 2·2⁻⁶ = 97%; of five, 94%."""

WANTED_SPREAD = 0.03


def measure(
    step: Callable[[], object], limit_s: float, clock: Callable[[], float] = time.perf_counter
) -> Timing:
    """Time a step until the confidence interval of its median is narrow, or the time is up.

    Args:
        step: that returns when the device is done.
        limit_s: seconds to spend, warm-up included, which ends with them; six repeats are made in
            any case.
        clock: in seconds.

    Returns:
        Median and its interval, which may be wider than wanted if the time was up.
    """
    start = clock()
    for _ in range(WARM_UP):
        step()
        if clock() - start > limit_s:  # a step so long is warm
            break
    times: list[float] = []
    while len(times) < MOST:
        before = clock()
        step()
        times.append(1e3 * (clock() - before))
        if len(times) >= LEAST:
            timing = summary(times)
            if timing.spread <= WANTED_SPREAD or clock() - start > limit_s:
                return timing
    return summary(times)


def summary(times_ms: list[float]) -> Timing:
    """The median of times in ms, with its interval, as ``middle`` has them."""
    low, median, high = middle(times_ms)
    return Timing(median_ms=median, low_ms=low, high_ms=high, repeats=len(times_ms))


class Middle(NamedTuple):
    """A median between the ends of its interval."""

    low: float
    median: float
    high: float


def middle(values: Sequence[float]) -> Middle:
    """Median with its 95% confidence interval, from order statistics alone.

    The number of values below the median is binomial, so that the k-th smallest and the k-th
    largest enclose it with the probability that follows; nothing is assumed of how they are
    distributed.
    """
    ordered, n = sorted(values), len(values)
    k = max(0, math.floor(n / 2 - 1.96 * math.sqrt(n) / 2))
    return Middle(ordered[k], statistics.median(ordered), ordered[n - 1 - k])
