"""What "better" means: data plus metric, deterministic under a seed, sized by one argument."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from gratis.contract.attach import attach
from gratis.contract.card import ActsOn
from gratis.contract.catalogue import Catalogue
from gratis.contract.method import Attachable, Method, kebab
from gratis.contract.parameters import Declared

Progress = Callable[[float, str], None]
"""Called with the fraction done, in [0, 1], and a few words on what is being done."""


def silent(fraction: float, words: str) -> None:
    """A Progress that shows nothing."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number that a task reports."""

    name: str
    help: str
    unit: str = ""
    higher_is_better: bool = True
    cost: bool = False
    """Time, memory, tokens or calls rather than quality."""
    fidelity: bool = False
    """How near the result is to that of the untouched subject: no method can improve on it."""


@dataclass(frozen=True, kw_only=True)
class TaskCard:
    """What a task declares about itself. A literal, as method cards are."""

    title: str
    acts_on: ActsOn
    metrics: tuple[Metric, ...]
    data: str
    """What it is measured on, in words."""
    subject: str = ""
    """Name of the subject (for `gratis.open`) when the user names none; empty where the task makes its own."""
    untouched: str = "untouched"
    """What the subject without a method is called beside the methods: "full cache", "greedy" …"""
    warm_up: Mapping[str, Any] = field(default_factory=dict)
    """Parameters of a short run that trials make and discard before they measure; empty: the full task is run."""


@dataclass(frozen=True)
class Series:
    """Values along something, for a plot: loss along the text, memory along the length."""

    x: Sequence[float]
    y: Sequence[float]
    x_label: str
    y_label: str
    marks: Sequence[tuple[float, str]] = ()
    """Places on the x axis worth a line, with what they are: `(8192, "trained window")`."""


@dataclass
class Measurement:
    """What one run of a task saw."""

    metrics: dict[str, float]
    """Metric name to value. The trial adds `seconds` (wall), `cpu_seconds` (of the process) and `peak_memory` (MB, 1e6
    bytes, above the level before the run) unless the task measured them itself."""
    items: dict[str, list[float]] = field(default_factory=dict)
    """Metric name to one value per item of the data, in the data's order: what intervals are computed from."""
    series: dict[str, Series] = field(default_factory=dict)
    tokens: int = 0
    """Tokens processed or generated, counted."""
    calls: int = 0
    """Forward passes or requests, counted."""
    details: dict[str, Any] = field(default_factory=dict)
    """Plain values that show the mechanism: evictions, skipped steps, chosen samples …"""


class Task(Declared):
    """Data plus metric. One task, one file under `gratis/tasks/`, found by its literal `card`."""

    card: ClassVar[TaskCard]

    @property
    def name(self) -> str:
        """The task's name on the command line: its file's name, hyphenated."""
        return kebab(type(self).__module__.rpartition(".")[2])

    def subject(self) -> Any:
        """The subject that is measured when the user names none."""
        from gratis.subjects import open as open_subject

        return open_subject(self.card.subject)

    def check(self, subject: Any) -> None:
        """Raise SubjectError if the task cannot be run on `subject` (no tokenizer, too short a window …)."""

    def applied(self, subject: Any, method: Method | None) -> AbstractContextManager[Any]:
        """A context that yields what is measured: `subject` with `method` on it, or as it is for None.

        Tasks on what has no live subject (checkpoints, features) override this and yield what `measure` takes.
        """
        if method is None:
            return nullcontext(subject)
        assert isinstance(method, Attachable)
        return attach(subject, method)

    def measure(self, subject: Any, *, seed: int, progress: Progress = silent) -> Measurement:
        """Run the task once on what `applied` yielded. The same seed gives the same data and the same metrics.

        Every metric of the card is present in the result, except `cost` metrics that the trial adds
        (`seconds`, `cpu_seconds`, `peak_memory`, and `tokens` and `calls` from the fields of those names).
        """
        raise NotImplementedError


task_catalogue = Catalogue("gratis.tasks", Path(__file__).parent, "task", {"TaskCard": TaskCard, "Metric": Metric})
"""Every task of the installation, by name."""


def tasks() -> Mapping[str, Any]:
    """Every task of the installation, by name."""
    return task_catalogue
