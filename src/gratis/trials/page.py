"""A trial as one HTML file: plots and words, no network, readable on a phone and in the dark."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from gratis.contract.files import write_text
from gratis.trials import plots, words
from gratis.trials.trial import Arm, MetricInfo, Trial

TEMPLATE = Path(__file__).parent / "page.html.jinja"
STYLE = Path(__file__).parent / "page.css"


def save_page(trial: Trial, path: Path) -> Path:
    """Write the page of a trial: a kill leaves the old file or none."""
    write_text(path, render(trial))
    return path


def render(trial: Trial) -> str:
    """The page of a trial as HTML."""
    from markupsafe import Markup

    colour = plots.colours(trial.arms)
    return filled(
        TEMPLATE,
        trial=trial,
        method=trial.arms[-1],
        colour=colour,
        headlines=[(arm.label, words.headline(trial, arm.label)) for arm in trial.arms[:-1]],
        verdicts=words.verdicts(trial),
        marks=words.MARKS,
        tiles=_tiles(trial),
        lines=[(title, note, Markup(drawing)) for title, note, drawing in _line_plots(trial, colour)],
        intervals=[(title, note, Markup(drawing)) for title, note, drawing in _interval_plots(trial, colour)],
        costs=[(title, note, Markup(drawing)) for title, note, drawing in _cost_plots(trial, colour)],
        rows=_rows(trial),
        inside=_inside(trial),
        machine=_machine(trial),
    )


def filled(template: Path, **values: Any) -> str:
    """A template with its values and the style of all pages."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    source = template.read_text(encoding="utf-8")
    made = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
        source
    )
    return made.render(style=Markup(STYLE.read_text(encoding="utf-8")), **values)


def both(draw: Any) -> str:
    """What `draw` makes for wide and for narrow screens."""
    return "".join(draw(width) for width in (plots.WIDE, plots.NARROW))


def _line_plots(trial: Trial, colour: dict[str, str]) -> list[tuple[str, str, str]]:
    made = []
    for name in dict.fromkeys(n for arm in trial.arms for n in arm.series):
        arms = [arm for arm in trial.arms if name in arm.series and plots.points(arm.series[name])]
        if not arms:
            continue
        lines = [plots.Line(arm.label, colour[arm.label], arm.series[name]) for arm in arms]
        shown = lines[0].series
        axis = plots.axis([y for line in lines for y in line.series.y], shown.y_label, 5)
        title = f"{words.capitalised(axis.label)} against {shown.x_label.partition(' (')[0]}"
        window = plots.smoothing(shown)
        note = f"Moving average over {window} of {len(shown.y)} points." if window > 1 else ""
        made.append((title, note, both(lambda width, lines=lines: plots.line_plot(lines, width))))
    return made


def _interval_plots(trial: Trial, colour: dict[str, str]) -> list[tuple[str, str, str]]:
    made = []
    for metric in trial.task.metrics:
        shown = [c for c in trial.comparisons if c.metric == metric.name and c.arm == trial.arms[-1].label]
        shown = [c for c in shown if c.low is not None]
        if shown:
            direction = "right" if metric.higher_is_better else "left"
            note = f"Dots right of zero: {trial.arms[-1].label} has the higher value. Better is to the {direction}."
            title = words.capitalised(metric.help)
            made.append((title, note, both(lambda w, m=metric, s=shown: plots.interval_plot(m, s, colour, w))))
    return made


def _cost_plots(trial: Trial, colour: dict[str, str]) -> list[tuple[str, str, str]]:
    made = []
    for metric in trial.task.metrics:
        values = [arm.metrics[metric.name].median for arm in trial.arms]
        if (
            metric.cost
            and max(values) > 0
            and len(set(values)) > 1
            and all(math.isfinite(v) and v >= 0 for v in values)
        ):
            title = words.capitalised(metric.help)
            made.append((title, "", both(lambda w, m=metric: plots.cost_plot(m, trial.arms, colour, w))))
    return made


def _tiles(trial: Trial) -> list[dict[str, str]]:
    """The first quality metric, time and memory of the method beside the untouched subject."""
    label, untouched = trial.arms[-1].label, trial.arms[0].label
    compared = trial.compare(label, untouched)
    names = [m.name for m in trial.task.metrics if not m.cost][:2]
    names += [name for name in ("seconds", "peak_memory") if name in compared]
    made = []
    for name in names:
        metric, comparison = trial.metric(name), compared[name]
        made.append(
            {
                "title": metric.title,
                "value": words.number(comparison.value, metric.unit),
                "before": f"{words.number(comparison.baseline, metric.unit)} with {untouched}",
                "change": words.change(comparison, metric).split(" [")[0],
                "verdict": comparison.verdict,
            }
        )
    return made


def _rows(trial: Trial) -> list[dict[str, Any]]:
    """The table: every metric of every arm, and the method beside each other arm."""
    label = trial.arms[-1].label
    compared = [trial.compare(label, arm.label) for arm in trial.arms[:-1]]
    return [
        {
            "title": metric.title,
            "help": metric.help,
            "cells": [_cell(arm, metric) for arm in trial.arms],
            "changes": [(*_split(words.change(c[metric.name], metric)), c[metric.name].verdict) for c in compared],
        }
        for metric in trial.task.metrics
    ]


def _split(change: str) -> tuple[str, str]:
    """A difference and its interval."""
    figure, _, interval = change.partition(" [")
    return figure, interval.removesuffix("]").replace(",", " to")


def _cell(arm: Arm, metric: MetricInfo) -> tuple[str, str]:
    summary = arm.metrics[metric.name]
    return words.number(summary.median, metric.unit), words.spread(summary, metric.unit)


def _inside(trial: Trial) -> list[tuple[str, list[tuple[str, str]]]]:
    """What methods and task saw of the mechanism, per arm."""
    made = []
    for arm in trial.arms:
        pairs = [pair for report in [*arm.reports.values(), arm.details] for pair in words.reported(report)]
        if pairs:
            made.append((arm.label, pairs))
    return made


def _machine(trial: Trial) -> list[tuple[str, str]]:
    """Where and how it was measured."""
    around = trial.environment
    pairs = [
        ("task", f"{trial.task.title} ({trial.task.name}): {trial.task.data}"),
        ("task parameters", ", ".join(f"{k}={v}" for k, v in trial.task.parameters.items())),
        (
            "subject",
            ", ".join(f"{v:,}" + " parameters" if k == "parameters" else str(v) for k, v in trial.subject.items()),
        ),
        ("measured", f"{trial.started}, {words.number(trial.duration, 's')} in all"),
        ("runs", f"{trial.rounds} of each arm, in turns; warm-up: {trial.warm_up}; seed {trial.seed}"),
        ("machine", f"{around.get('processor', '')}, {around.get('cores')} cores, {around.get('memory_gb')} GB"),
    ]
    if "accelerator" in around:
        pairs.append(("accelerator", str(around["accelerator"])))
    state = f"{around.get('system', '')}, Python {around.get('python', '')}, {around.get('threads', '?')} torch threads"
    pairs.append(("system", f"{state}, load {around.get('load', '?')} at the start"))
    pairs.append(("versions", ", ".join(f"{k} {v}" for k, v in around.get("versions", {}).items())))
    return pairs
