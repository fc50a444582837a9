"""Timing a step: warm up, repeat until the median is known well enough, say how well."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

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
    """Median with its 95% confidence interval, from order statistics alone.

    The number of times below the median is binomial, so that the k-th smallest and the k-th largest
    enclose it with the probability that follows; nothing is assumed of how times are distributed.
    """
    ordered, n = sorted(times_ms), len(times_ms)
    k = max(0, math.floor(n / 2 - 1.96 * math.sqrt(n) / 2))
    return Timing(
        median_ms=statistics.median(ordered),
        low_ms=ordered[k],
        high_ms=ordered[n - 1 - k],
        repeats=n,
    )
