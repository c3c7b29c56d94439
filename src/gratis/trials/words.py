"""Figures and verdicts as a person reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gratis.trials.trial import Comparison, MetricInfo, Summary, Trial

COUNTS = {"tokens", "calls", "cpu_seconds"}
"""What the table shows but no sentence tells."""

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
    elif unit == "s" and 0 < size < 0.1:
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
    """One metric beside another arm's in plain words, as plain when it got worse as when it got better."""
    value, baseline = number(comparison.value, metric.unit), number(comparison.baseline, metric.unit)
    head = f"{capitalised(metric.help)}: {value} against {baseline}"
    if comparison.verdict == "same":
        return f"{head}, the same."
    if metric.cost:
        return f"{head}, {_factor(comparison)}."
    size = number(abs(comparison.difference), metric.unit)
    if metric.fidelity:
        return f"{head}, {size} {'nearer' if comparison.verdict == 'better' else 'further off'}."
    gain = "; no gain here" if comparison.verdict == "worse" else ""
    if comparison.low is None or comparison.high is None:
        if comparison.verdict == "unclear":
            return f"{head}, not comparable."
        return f"{head}, {size} {comparison.verdict}{gain} (the task gives no items for an interval)."
    if comparison.verdict == "unclear":
        low, high = signed(comparison.low), signed(comparison.high, metric.unit)
        return f"{head}, no clear difference (95 % interval of the difference {low} to {high})."
    near, far = sorted((abs(comparison.low), abs(comparison.high)))
    return f"{head}, {size} {comparison.verdict} (95 % interval {number(near)} to {number(far)}){gain}."


def _factor(comparison: Comparison) -> str:
    ratio = comparison.ratio
    if comparison.verdict == "unclear":
        return "no clear difference"
    if ratio is None or not math.isfinite(ratio) or ratio <= 0:
        return signed(comparison.difference)
    return f"{number(1 / ratio)} times less" if ratio < 1 else f"{number(ratio)} times as much"


def verdicts(trial: Trial) -> list[tuple[str, list[tuple[str, str]]]]:
    """For every other arm, its label and what the method under trial is beside it: (verdict, sentence) per metric.

    Quality comes first, then costs; costs that are the same are left to the table.
    """
    label = trial.arms[-1].label
    told: list[tuple[str, list[tuple[str, str]]]] = []
    for other in trial.arms[:-1]:
        compared = trial.compare(label, other.label)
        metrics = sorted((m for m in trial.task.metrics if m.name not in COUNTS), key=lambda m: m.cost)
        shown = [(compared[m.name], m) for m in metrics if not (m.cost and compared[m.name].verdict == "same")]
        told.append((other.label, [(str(one.verdict), sentence(one, m)) for one, m in shown]))
    return told


def headline(trial: Trial, against: str) -> str:
    """The trial in a few words: the first two quality metrics (clear ones first), time and memory, beside an arm."""
    comparisons = trial.compare(trial.arms[-1].label, against)
    qualities = [m for m in trial.task.metrics if not m.cost][:2]
    parts = []
    for quality in sorted(qualities, key=lambda m: comparisons[m.name].verdict in {"unclear", "same"}):
        comparison = comparisons[quality.name]
        size = number(abs(comparison.difference), quality.unit)
        parts.append(
            {
                "better": f"{quality.title} {size} better",
                "worse": f"{quality.title} {size} {'off' if quality.fidelity else 'worse'}",
                "same": f"the same {quality.title}",
                "unclear": f"no clear difference in {quality.title}",
            }[comparison.verdict]
        )
    for name, words in (("seconds", "the time"), ("peak_memory", "the peak memory")):
        cost = comparisons.get(name)
        if cost is not None and cost.ratio is not None and math.isfinite(cost.ratio):
            parts.append(f"{cost.ratio:.2f} × {words}")
    return ", ".join(parts)


def spread(summary: Summary, unit: str) -> str:
    """Lowest and highest run, empty where they are the same."""
    return "" if summary.low == summary.high else f"{number(summary.low, unit)}–{number(summary.high, unit)}"


def reported(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a method or task says of the mechanism, as names and values to read."""
    return [
        (name.removesuffix("_bytes").replace("_", " "), number(float(value), "bytes"))
        if name.endswith("_bytes") and isinstance(value, (int, float))
        else (name.replace("_", " "), short(value))
        for name, value in report.items()
    ]


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
