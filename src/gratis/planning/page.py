"""A plan as a table and as a page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gratis.contract.files import write_text
from gratis.planning.frontier import Option, Plan
from gratis.trials import plots
from gratis.trials.page import both, filled
from gratis.trials.trial import SeriesRecord
from gratis.trials.words import number

TEMPLATE = Path(__file__).parent / "page.html.jinja"
HEADS = (
    "model",
    "samples",
    "tokens",
    "attention",
    "accuracy",
    "95 % interval",
    "compute",
    "memory read",
    "eFLOP",
    "time",
)
COLOURS = 5
"""Lines that can be told apart."""


def row(option: Option, plan: Plan) -> tuple[str, ...]:
    """An option in words, in the order of HEADS: amounts are those of one question."""
    interval = option.interval
    cost = option.cost
    total = cost.total(plan.hardware.intensity)
    return (
        option.model,
        str(option.trials),
        str(option.limit) if option.limit is not None else f"up to {option.length}",
        f"{option.attention}{' *' if option.assumed else ''}",
        f"{option.accuracy:.3f}",
        f"{interval[0]:.2f} to {interval[1]:.2f}" if interval is not None else "",
        f"{cost.compute / 1e12:.4g} TFLOP",
        number(cost.traffic, "bytes"),
        f"{total / 1e12:.4g} T",
        number(plan.hardware.seconds(total), "s"),
    )


def save_page(plan: Plan, path: Path, command: str) -> Path:
    """Write the page of a plan: a kill leaves the old file or none."""
    from markupsafe import Markup

    drawn = [
        (
            "Accuracy against time per question, one setting for all questions",
            "What can be had in practice.",
            both(lambda width: plots.line_plot(_lines(plan, plan.single), width)),
        ),
        (
            "Accuracy against time per question, the best setting for every single question",
            "An upper bound: nobody knows beforehand which setting a question needs.",
            both(lambda width: plots.line_plot(_lines(plan, plan.per_question), width)),
        ),
    ]
    last = plan.choices[-1].option
    content = filled(
        TEMPLATE,
        hardware=plan.hardware.name,
        intensity=f"{plan.hardware.intensity:.4g}",
        headline=f"At best {last.accuracy:.0%} right: {last.model}, {last.trials} samples, {last.attention} attention",
        legend=[(name, place % COLOURS) for place, name in enumerate(plan.single)],
        lines=[(title, note, Markup(drawing)) for title, note, drawing in drawn],
        heads=HEADS,
        rows=[row(choice.option, plan) for choice in plan.choices],
        assumed=any(choice.option.assumed for choice in plan.choices),
        command=command,
    )
    write_text(path, content)
    return path


def _lines(plan: Plan, values: Mapping[str, NDArray[np.float64]]) -> list[plots.Line]:
    seconds = np.log10(plan.hardware.seconds(1.0) * plan.budgets)
    return [
        plots.Line(
            name,
            f"c{place % COLOURS}",
            SeriesRecord(
                x=tuple(map(float, seconds[::2])),
                y=tuple(map(float, accuracy[::2])),
                x_label="log10 of seconds per question",
                y_label="accuracy",
            ),
        )
        for place, (name, accuracy) in enumerate(values.items())
    ]
