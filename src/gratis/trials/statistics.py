"""Medians with spread, and paired bootstrap intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

RESAMPLES = 2000
CONFIDENCE = 0.95


def summary(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, lowest and highest."""
    return statistics.median(values), min(values), max(values)


def paired_interval(
    after: Sequence[float],
    before: Sequence[float],
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the mean of `after - before` over the same items.

    None with fewer than two items, or where a value is not finite. Items are resampled as if independent: where
    neighbours resemble one another the interval is too narrow.
    """
    import numpy as np

    if len(after) != len(before) or len(after) < 2:
        return None
    differences = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    if not np.isfinite(differences).all():
        return None
    generator = np.random.default_rng(seed)
    count = len(differences)
    means = np.empty(resamples)
    step = max(1, 1_000_000 // count)
    for first in range(0, resamples, step):
        last = min(resamples, first + step)
        means[first:last] = differences[generator.integers(0, count, (last - first, count))].mean(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def is_mean_of(value: float, items: Sequence[float]) -> bool:
    """Whether a metric is the mean of its items, so that an interval of the items' mean is one of the metric.

    Two percent are allowed for items that stand for slightly different amounts of data.
    """
    return bool(items) and math.isclose(value, math.fsum(items) / len(items), rel_tol=0.02, abs_tol=1e-9)


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Centred moving average, its window cut off at both ends; the same length as `values`."""
    if window <= 1:
        return list(values)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    half = window // 2
    smoothed = []
    for index in range(len(values)):
        low, high = max(0, index - half), min(len(values), index + half + 1)
        smoothed.append((sums[high] - sums[low]) / (high - low))
    return smoothed
