"""A trial: a subject measured on a task before and after, as it is written to a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gratis.contract.errors import FileError
from gratis.contract.files import write_text

VERSION = 1
"""Version of the file format; a file of another version is refused."""

Verdict = Literal["better", "worse", "same", "unclear"]


class Record(BaseModel):
    """Base of what trial files consist of: immutable, unknown keys refused, not-a-number kept."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class VersionedRecord(Record):
    """A record that is a file."""

    version: int = VERSION


class MetricInfo(Record):
    """What a metric is, stored beside its values so that a file explains itself."""

    name: str
    help: str
    unit: str = ""
    higher_is_better: bool = True
    cost: bool = False
    fidelity: bool = False

    @property
    def title(self) -> str:
        """The name as words."""
        return self.name.replace("_", " ")


class Summary(Record):
    """A metric over the runs of one arm."""

    median: float
    low: float
    high: float


class SeriesRecord(Record):
    """Values along something, median over the runs."""

    x: tuple[float, ...]
    y: tuple[float, ...]
    x_label: str
    y_label: str
    marks: tuple[tuple[float, str], ...] = ()


class MethodRecord(Record):
    """A method by the arguments that rebuild it."""

    name: str
    title: str
    parameters: dict[str, Any]
    card: dict[str, Any] = Field(default_factory=dict)
    """What the method's card said when it was measured: paper, year, summary, limits."""


class Run(Record):
    """One measured run."""

    round: int
    metrics: dict[str, float]


class Arm(Record):
    """The subject with nothing, one method or several on it, and what was measured then."""

    label: str
    methods: tuple[MethodRecord, ...]
    runs: tuple[Run, ...]
    metrics: dict[str, Summary]
    items: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    series: dict[str, SeriesRecord] = Field(default_factory=dict)
    tokens: int = 0
    calls: int = 0
    details: dict[str, Any] = Field(default_factory=dict)
    """What the task saw of the mechanism."""
    reports: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """What each method says it did, by name."""


class Comparison(Record):
    """One metric of one arm beside another's."""

    metric: str
    arm: str
    against: str
    value: float
    baseline: float
    difference: float
    ratio: float | None
    low: float | None = None
    """Ends of the 95 % interval of the difference; None where the task gave no items, or for costs."""
    high: float | None = None
    verdict: Verdict


class TaskRecord(Record):
    """A task by the arguments that rebuild it, and what it measures."""

    name: str
    title: str
    data: str
    parameters: dict[str, Any]
    metrics: tuple[MetricInfo, ...]


class Trial(VersionedRecord):
    """A subject measured on a task before and after, alternated in one process."""

    task: TaskRecord
    subject: dict[str, Any]
    seed: int
    rounds: int
    warm_up: str
    """What was run and discarded before measuring, in words."""
    arms: tuple[Arm, ...]
    """The untouched subject first, the method under trial last."""
    comparisons: tuple[Comparison, ...]
    environment: dict[str, Any]
    started: str
    duration: float
    """Wall seconds of the whole trial."""
    command: str = ""
    """What repeats it, as typed."""

    @property
    def method(self) -> MethodRecord:
        """The method under trial (the last of a stack)."""
        return self.arms[-1].methods[-1]

    def arm(self, label: str) -> Arm:
        """The arm called `label`."""
        return next(arm for arm in self.arms if arm.label == label)

    def metric(self, name: str) -> MetricInfo:
        """What the metric called `name` is."""
        return next(metric for metric in self.task.metrics if metric.name == name)

    def compare(self, arm: str, against: str) -> dict[str, Comparison]:
        """The comparisons of one arm with another, by metric, in the task's order."""
        return {c.metric: c for c in self.comparisons if c.arm == arm and c.against == against}

    def save(self, path: Path) -> Path:
        """Write the trial as JSON: a kill leaves the old file or none."""
        write_text(path, self.model_dump_json(indent=1) + "\n")
        return path

    @classmethod
    def load(cls, path: Path) -> Trial:
        """Read a trial file. Raises FileError if it is missing, damaged or of another version."""
        return load_record(cls, path, "trial")


Versioned = TypeVar("Versioned", bound="VersionedRecord")


def load_record(kind: type[Versioned], path: Path, what: str) -> Versioned:
    """Read a JSON file of a versioned record. Raises FileError in one sentence."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"The {what} file {path} cannot be read: {reason(error)}.") from None
    try:
        loaded = kind.model_validate_json(text)
    except ValidationError as error:
        first: Mapping[str, Any] = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "its text"
        raise FileError(f"{path} is not a {what} file: {place}: {first['msg']}.") from None
    if loaded.version != VERSION:
        raise FileError(f"{path} has version {loaded.version}; this gratis reads version {VERSION}.")
    return loaded


def reason(error: Exception) -> str:
    """Why a file could not be read, in a few words."""
    return error.strerror.lower() if isinstance(error, OSError) and error.strerror else "it is not text"
