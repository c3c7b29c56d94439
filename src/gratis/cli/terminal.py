"""What is printed: tables, progress, JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from gratis.tasks.task import Progress
    from gratis.trials.claims import ClaimResult
    from gratis.trials.trial import Trial

WIDE = 160
"""Columns of what is printed into a file or a pipe."""

STYLES = {"better": "green", "worse": "red", "same": "dim", "unclear": "dim"}


def console(stderr: bool = False) -> Console:
    """A console that colours and fits a terminal, and is plain and wide elsewhere. Honours NO_COLOR."""
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    stream = sys.stderr if stderr else sys.stdout
    return Plain(stderr=stderr, width=None if stream.isatty() else WIDE, highlight=False, soft_wrap=False)


def print_json(value: Any) -> None:
    """`value` as JSON on standard output."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str, allow_nan=False))


def table(*columns: str, numbers: Sequence[int] = ()) -> Table:
    """A table without vertical rules; the columns at the places `numbers` are set flush right."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, column in enumerate(columns):
        made.add_column(column, justify="right" if place in numbers else "left", overflow="fold")
    return made


@contextmanager
def progress(show: bool = True) -> Iterator[Progress]:
    """A Progress that is a live bar on a terminal's error stream, and silent elsewhere."""
    from gratis.subjects.progress_bar import shown_elsewhere
    from gratis.tasks.task import silent

    if not show or not sys.stderr.isatty():
        yield silent
        return
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), BarColumn(bar_width=30), TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn())
    made = Progress(*columns, TextColumn("{task.description}"), console=console(stderr=True), transient=True)
    with shown_elsewhere(), made as bar:
        line = bar.add_task("", total=1.0)

        def tell(fraction: float, words: str) -> None:
            bar.update(line, completed=min(1.0, max(0.0, fraction)), description=words)

        yield tell


def print_trial(trial: Trial) -> None:
    """The trial as a table of arms and metrics, and what it comes to in plain words."""
    from rich.text import Text

    from gratis.trials import words

    out = console()
    last = trial.arms[-1]
    others = [arm.label for arm in trial.arms[:-1]]
    heads = [f"beside {label}" for label in others]
    made = table(
        "", *(arm.label for arm in trial.arms), *heads,
        numbers=range(1, 1 + len(trial.arms) + len(heads)),
    )  # fmt: skip
    compared = [trial.compare(last.label, other) for other in others]
    for metric in trial.task.metrics:
        cells: list[Any] = [metric.title]
        for arm in trial.arms:
            summary = arm.metrics[metric.name]
            spread = words.spread(summary, metric.unit)
            cells.append(words.number(summary.median, metric.unit) + (f" ({spread})" if spread else ""))
        for comparisons in compared:
            comparison = comparisons[metric.name]
            cells.append(Text(words.change(comparison, metric), style=STYLES[comparison.verdict]))
        made.add_row(*cells)
    out.print(Text(f"{trial.task.title} · {trial.subject['name']}", style="bold"))
    out.print(made)
    for other, told in words.verdicts(trial):
        out.print(Text(f"{last.label} beside {other}: {words.headline(trial, other)}.", style="bold"))
        for verdict, sentence in told:
            out.print(Text("• " + sentence, style=STYLES[verdict]))
        out.print()
    for arm in trial.arms[1:]:
        for name, report in arm.reports.items():
            said = ", ".join(f"{key} {value}" for key, value in words.reported(report))
            out.print(Text(f"{name}: {said}", style="dim"))
    runs = "1 run" if trial.rounds == 1 else f"{trial.rounds} runs, in turns"
    out.print(Text(f"{runs} of each; warm-up: {trial.warm_up}; seed {trial.seed}", style="dim"))


def print_purposes(trial: Trial, metrics: Sequence[str]) -> None:
    """What each arm is for, with a few of its figures."""
    from rich.text import Text

    from gratis.contract.catalogue import catalogue
    from gratis.trials import words

    out = console()
    summaries = {entry.class_name: entry.card.summary for entry in catalogue.entries.values()}
    out.print(Text("\nWhat each is for", style="bold"))
    for arm in trial.arms:
        does = summaries.get(arm.label, "the model as it comes: everything is kept, and memory grows with the text")
        shown = [trial.metric(name) for name in metrics]
        said = ", ".join(f"{one.title} {words.number(arm.metrics[one.name].median, one.unit)}" for one in shown)
        out.print(Text(f"• {arm.label}: {does} ({said})"))


def print_claim(result: ClaimResult, out: Console) -> None:
    """One claim: PASS or FAIL, its figure against its bound."""
    from rich.markup import escape

    from gratis.trials import words

    mark = "[green]PASS[/]" if result.passed else "[red]FAIL[/]"
    if result.figure is None:
        figure = result.error
    else:
        figure = f"{result.metric.replace('_', ' ')} {figure_words(result)} against {words_bound(result)}"
        if result.low is not None and result.high is not None:
            figure += f" (95 % interval {words.signed(result.low)} to {words.signed(result.high)})"
    out.print(f"{mark}  [bold]{escape(result.method)}[/]  {escape(result.claim)}\n      {escape(figure)}")


def figure_words(result: ClaimResult) -> str:
    """The figure of a claim with what kind of figure it is."""
    from gratis.trials import words

    if result.figure is None:
        return "–"
    if result.compare == "ratio":
        return f"× {words.number(result.figure)} of {result.against}"
    if result.compare == "difference":
        return f"{words.signed(result.figure, result.unit)} from {result.against}"
    return words.number(result.figure, result.unit)


def words_bound(result: ClaimResult) -> str:
    """The bound as mathematics writes it."""
    return result.bound.replace("<=", "≤").replace(">=", "≥")
