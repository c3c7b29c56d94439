"""Figures and verdicts as a person reads them."""

from __future__ import annotations

import math
from typing import Any

from gratis.trials.trial import Comparison, MetricInfo, Trial

MARKS = {"better": "better", "worse": "worse", "same": "the same", "unclear": "no clear difference"}


def number(value: float | None, unit: str = "") -> str:
    """A figure with as many digits as a reader can use, and its unit (bytes and seconds in a readable multiple)."""
    if value is None:
        return "–"
    factor, unit = scale(abs(value), unit)
    value = value / factor
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    size = abs(value)
    if size and (size >= 1e7 or size < 5e-4):
        text = f"{value:.2e}"
    elif size >= 1000 or (value == int(value) and size >= 10):
        text = f"{value:,.0f}"
    elif size >= 100:
        text = f"{value:.0f}"
    elif size >= 10:
        text = f"{value:.1f}"
    elif size >= 1 or value == 0:
        text = f"{value:.2f}"
    else:
        text = f"{value:.3f}"
    return f"{text} {unit}".rstrip()


def scale(size: float, unit: str) -> tuple[float, str]:
    """What to divide values of about `size` by, and the unit that they then have."""
    steps: tuple[tuple[float, str], ...] = ()
    if unit == "bytes":
        steps = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    elif unit == "s":
        steps = ((60.0, "min"),) if size >= 600 else ()
        if 0 < size < 0.1:
            return (1e-3, "ms") if size >= 1e-4 else (1e-6, "µs")
    return next(((step, name) for step, name in steps if size >= step), (1.0, unit))


def signed(value: float, unit: str = "") -> str:
    """A difference, with its sign."""
    return ("+" if value > 0 else "") + number(value, unit)


def change(comparison: Comparison, metric: MetricInfo) -> str:
    """How far one arm is from another: a difference with its interval for quality, a factor for costs."""
    if metric.cost and comparison.ratio is not None and math.isfinite(comparison.ratio) and comparison.value >= 0:
        return f"× {number(comparison.ratio)}"
    text = signed(comparison.difference)
    if comparison.low is not None and comparison.high is not None:
        text += f" [{signed(comparison.low)}, {signed(comparison.high)}]"
    return text


def sentence(comparison: Comparison, metric: MetricInfo) -> str:
    """One metric of one arm beside another's in plain words, as plain when it got worse as when it got better."""
    value, baseline = number(comparison.value, metric.unit), number(comparison.baseline, metric.unit)
    head = f"{capitalised(metric.title)}: {value} with {comparison.arm}, {baseline} with {comparison.against}"
    if comparison.verdict == "same":
        return f"{head}: the same."
    size = number(abs(comparison.difference), metric.unit)
    if metric.cost:
        return f"{head}: {_factor(comparison)}."
    if comparison.low is None or comparison.high is None:
        ending = {"better": f"{size} better", "worse": f"{size} worse: no gain here"}.get(
            comparison.verdict, "not comparable"
        )
        return f"{head}: {ending} (no interval: the task gives no items for it)."
    near, far = sorted((abs(comparison.low), abs(comparison.high)))
    if comparison.verdict == "unclear":
        low, high = signed(comparison.low), signed(comparison.high, metric.unit)
        return f"{head}: no clear difference (95 % interval {low} to {high})."
    ending = f"{size} {comparison.verdict} (95 % interval {number(near)} to {number(far)})"
    return f"{head}: {ending}{': no gain here' if comparison.verdict == 'worse' else ''}."


def _factor(comparison: Comparison) -> str:
    ratio = comparison.ratio
    if comparison.verdict == "unclear" or ratio is None or not math.isfinite(ratio):
        return "no clear difference" if comparison.verdict == "unclear" else signed(comparison.difference)
    if ratio <= 0:
        return signed(comparison.difference)
    return f"{number(1 / ratio)} times less" if ratio < 1 else f"{number(ratio)} times as much"


def verdicts(trial: Trial) -> list[tuple[str, str]]:
    """(verdict, sentence) for the method under trial: quality against every other arm, then costs.

    Costs that no comparison distinguishes are left to the table.
    """
    label = trial.arms[-1].label
    others = [arm.label for arm in trial.arms[:-1]]
    told: list[tuple[str, str]] = []
    for cost in (False, True):
        for metric in trial.task.metrics:
            if metric.cost is not cost or metric.name in {"tokens", "calls", "cpu_seconds"}:
                continue
            for other in others:
                comparison = trial.compare(label, other)[metric.name]
                if cost and comparison.verdict == "same":
                    continue
                told.append((comparison.verdict, sentence(comparison, metric)))
    return told


def headline(trial: Trial) -> str:
    """The trial in one sentence: the first quality metric and the most changed cost, against the untouched subject."""
    label, untouched = trial.arms[-1].label, trial.arms[0].label
    comparisons = trial.compare(label, untouched)
    quality = next((m for m in trial.task.metrics if not m.cost), None)
    parts = []
    if quality is not None:
        comparison = comparisons[quality.name]
        size = number(abs(comparison.difference), quality.unit)
        parts.append(
            {
                "better": f"{quality.title} got better by {size}",
                "worse": f"{quality.title} got worse by {size}",
                "same": f"{quality.title} stayed the same",
                "unclear": f"{quality.title} did not change clearly",
            }[comparison.verdict]
        )
    for name, words in (("seconds", "time"), ("peak_memory", "peak memory")):
        cost = comparisons.get(name)
        if cost is not None and cost.ratio is not None and math.isfinite(cost.ratio) and cost.verdict != "same":
            parts.append(f"{words} × {number(cost.ratio)}")
    return f"{label} beside {untouched}: " + ", ".join(parts) + "."


def short(value: Any) -> str:
    """A plain value of a report in a few characters."""
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return number(value)
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "…"


def capitalised(text: str) -> str:
    """`text` with its first letter large."""
    return text[:1].upper() + text[1:]
