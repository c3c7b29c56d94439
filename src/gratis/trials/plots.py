"""Plots of a trial as SVG: drawn by hand, so that text stays text, and colours follow the page's light or dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from gratis.trials import words
from gratis.trials.statistics import moving_average
from gratis.trials.trial import Arm, Comparison, MetricInfo, SeriesRecord

WIDE, NARROW = 960, 310
"""Widths in which every plot is drawn: the page shows the one that fits, with letters of the same size."""

SMOOTH_ABOVE = 80
"""Points above which a line is smoothed."""


@dataclass(frozen=True)
class Line:
    """One arm's values in a plot, and the colour class that it has on the whole page."""

    label: str
    colour: str
    series: SeriesRecord


@dataclass(frozen=True)
class Axis:
    """Ticks of an axis and the range that it spans, in the multiple that its unit is shown in."""

    low: float
    high: float
    ticks: tuple[float, ...]
    factor: float
    label: str

    def place(self, value: float, start: float, length: float) -> float:
        """Where `value` lies on a stretch that begins at `start`."""
        span = (self.high - self.low) or 1.0
        return start + (value - self.low) / span * length


def colours(arms: Sequence[Arm]) -> dict[str, str]:
    """A colour class per arm: neutral for the untouched subject, the accent for the method under trial."""
    found = {arms[0].label: "c0"}
    for number, arm in enumerate(arms[1:-1]):
        found[arm.label] = f"c{2 + number % 3}"
    found[arms[-1].label] = "c1"
    return found


def line_plot(lines: Sequence[Line], width: int) -> str:
    """Values along something, one line per arm, smoothed where there are many."""
    smoothed = [points(line.series) for line in lines]
    xs = [x for places in smoothed for x, _ in places]
    ys = [y for places in smoothed for _, y in places]
    marks = sorted({mark for line in lines for mark in line.series.marks if min(xs) <= mark[0] <= max(xs)})
    height = 300 if width == WIDE else 250
    left, right, top, bottom = 52, 12, 26 if marks else 12, 44
    horizontal = axis(xs, lines[0].series.x_label, 6 if width == WIDE else 4, tight=True)
    vertical = axis(ys, lines[0].series.y_label, 5)
    inner_width, inner_height = width - left - right, height - top - bottom

    def at(x: float, y: float) -> str:
        return (
            f"{horizontal.place(x, left, inner_width):.1f},{vertical.place(y, top + inner_height, -inner_height):.1f}"
        )

    parts = [_frame(horizontal, vertical, left, top, inner_width, inner_height)]
    for value, text in marks:
        x = horizontal.place(value, left, inner_width)
        anchor = "end" if x > left + inner_width / 2 else "start"
        shift = -5 if anchor == "end" else 5
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 8}" y2="{top + inner_height}"/>')
        parts.append(_text("note", x + shift, top - 10, text, anchor))
    for line, places in zip(lines, smoothed, strict=True):
        path = " ".join(at(x, y) for x, y in places)
        parts.append(
            f'<polyline class="line {line.colour}" points="{path}"><title>{escape(line.label)}</title></polyline>'
        )
        if len(places) <= 24:
            parts.extend(_dots(line.colour, [at(x, y) for x, y in places]))
    return _svg(width, height, f"{vertical.label} against {horizontal.label}", parts)


def cost_plot(metric: MetricInfo, arms: Sequence[Arm], colour: dict[str, str], width: int) -> str:
    """One bar per arm, with a whisker over the spread of its runs."""
    summaries = [arm.metrics[metric.name] for arm in arms]
    most = max((s.high for s in summaries if math.isfinite(s.high)), default=0.0)
    row, left, label_width = 42, 0, 108
    inner = width - left - label_width
    parts: list[str] = []
    for number, (arm, summary) in enumerate(zip(arms, summaries, strict=True)):
        top = number * row
        length = inner * summary.median / most if most > 0 and math.isfinite(summary.median) else 0.0
        length = max(length, 0.0)
        size = f'x="{left}" y="{top + 19}" width="{max(length, 1):.1f}" height="14" rx="3"'
        parts.append(_text("label", left, top + 13, arm.label))
        parts.append(f'<rect class="bar {colour[arm.label]}" {size}/>')
        end = length
        if summary.high > summary.low and most > 0:
            low, high = (left + inner * v / most for v in (summary.low, summary.high))
            ends = f"M{low:.1f},{top + 22}v8M{high:.1f},{top + 22}v8"
            parts.append(f'<path class="whisker" d="M{low:.1f},{top + 26}H{high:.1f}{ends}"/>')
            end = max(end, high)
        parts.append(_text("value", end + 8, top + 30, words.number(summary.median, metric.unit)))
    return _svg(width, row * len(arms), f"{metric.help} of each arm", parts)


def interval_plot(metric: MetricInfo, comparisons: Sequence[Comparison], colour: dict[str, str], width: int) -> str:
    """Differences from the other arms with their 95 % intervals, beside the line of no difference."""
    ends = [v for c in comparisons for v in (c.difference, c.low, c.high, 0.0) if v is not None and math.isfinite(v)]
    scale = axis(ends, f"difference ({metric.unit})" if metric.unit else "difference", 5 if width == WIDE else 3)
    left, right, top, row = 12, 12, 6, 46
    inner, height = width - left - right, row * len(comparisons)
    base = top + height
    parts = []
    for tick in scale.ticks:
        x = scale.place(tick, left, inner)
        kind = "zero" if tick == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{base}"/>')
        parts.append(_text("tick", x, base + 16, _tick(tick, scale), "middle"))
    for number, comparison in enumerate(comparisons):
        y = top + row * number + 30
        x = scale.place(comparison.difference, left, inner)
        said = f"beside {comparison.against}: {words.MARKS[comparison.verdict]}"
        parts.append(_text("label", left, y - 14, said))
        if comparison.low is not None and comparison.high is not None:
            low, high = (scale.place(v, left, inner) for v in (comparison.low, comparison.high))
            parts.append(
                f'<line class="interval {colour[comparison.arm]}" x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>'
            )
        parts.append(f'<circle class="dot {colour[comparison.arm]}" cx="{x:.1f}" cy="{y}" r="5.5"/>')
    parts.append(_text("axis", left + inner / 2, base + 34, scale.label, "middle"))
    return _svg(width, base + 40, f"differences in {metric.help}", parts)


def axis(values: Sequence[float], label: str, count: int, *, tight: bool = False) -> Axis:
    """An axis over `values` with about `count` round ticks; from zero where that costs little room."""
    finite = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if not tight and low >= 0 and low < 0.5 * high:
        low = 0.0
    text, _, unit = label.rpartition(" (")
    unit = unit.removesuffix(")") if text else ""
    factor, shown = words.scale(max(abs(low), abs(high)), unit)
    if shown != unit:
        label = f"{text} ({shown})"
    if high == low:
        low, high = low - 0.5 * factor, high + 0.5 * factor
    step = _round_step((high - low) / factor / max(count, 1)) * factor
    if not tight:
        low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return Axis(low, high, tuple(step * k for k in range(first, last + 1)), factor, label)


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    return next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)


def points(series: SeriesRecord) -> list[tuple[float, float]]:
    """What is drawn of a series: smoothed, without what is not a number."""
    window = smoothing(series)
    pairs = zip(series.x, moving_average(series.y, window), strict=True)
    return [(x, y) for x, y in pairs if math.isfinite(x) and math.isfinite(y)]


def smoothing(series: SeriesRecord) -> int:
    """Width of the moving average that a series is drawn with, in points."""
    return 1 if len(series.y) <= SMOOTH_ABOVE else max(3, len(series.y) // 24) | 1


def _frame(horizontal: Axis, vertical: Axis, left: float, top: float, width: float, height: float) -> str:
    parts = []
    for tick in vertical.ticks:
        y = vertical.place(tick, top + height, -height)
        parts.append(f'<line class="grid" x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text("tick", left - 8, y + 4, _tick(tick, vertical), "end"))
    base = top + height
    for tick in horizontal.ticks:
        x = horizontal.place(tick, left, width)
        anchor = "end" if x > left + width - 14 else "middle"
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 5}"/>')
        parts.append(_text("tick", x, base + 19, _tick(tick, horizontal), anchor))
    parts.append(f'<line class="base" x1="{left}" x2="{left + width}" y1="{base}" y2="{base}"/>')
    parts.append(_text("axis", left + width / 2, base + 38, horizontal.label, "middle"))
    return "".join(parts)


def _tick(value: float, axis: Axis) -> str:
    shown = value / axis.factor
    steps = [b - a for a, b in zip(axis.ticks, axis.ticks[1:], strict=False)]
    step = abs(steps[0] / axis.factor) if steps else abs(shown) or 1.0
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step < 1 or step != int(step) else 0
    if step > 0 and round(step, digits) != round(step, digits + 1):
        digits += 1
    return f"{shown if abs(shown) > step * 1e-6 else 0:,.{digits}f}"


def _text(kind: str, x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _dots(colour: str, points: Sequence[str]) -> list[str]:
    made = []
    for point in points:
        x, y = point.split(",")
        made.append(f'<circle class="dot {colour}" cx="{x}" cy="{y}" r="3.5"/>')
    return made


def _svg(width: int, height: float, title: str, parts: Sequence[str]) -> str:
    kind = "wide" if width == WIDE else "narrow"
    return (
        f'<svg class="{kind}" viewBox="0 0 {width} {height:g}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )
