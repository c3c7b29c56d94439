"""Before and after: the arms of a trial are measured in turns, in one process, after a warm-up."""

from __future__ import annotations

import datetime
import math
import statistics as medians
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gratis.contract.attach import attach, attached
from gratis.contract.catalogue import catalogue
from gratis.contract.errors import GratisError, ParameterError, SubjectError
from gratis.contract.method import Attachable, Method
from gratis.tasks.task import Measurement, Metric, Progress, Task, silent, task_catalogue
from gratis.trials import statistics
from gratis.trials.environment import environment
from gratis.trials.memory import PeakMemory, synchronize
from gratis.trials.trial import (
    Arm,
    Comparison,
    MethodRecord,
    MetricInfo,
    Run,
    SeriesRecord,
    Summary,
    TaskRecord,
    Trial,
    Verdict,
)

COSTS = (
    Metric(name="seconds", unit="s", help="wall time of the run", higher_is_better=False, cost=True),
    Metric(name="cpu_seconds", unit="s", help="processor time of the run", higher_is_better=False, cost=True),
    Metric(
        name="peak_memory", unit="MB", help="peak memory above the loaded subject", higher_is_better=False, cost=True
    ),
    Metric(name="device_memory", unit="MB", help="peak memory of the accelerator", higher_is_better=False, cost=True),
    Metric(name="tokens", help="tokens processed or generated", higher_is_better=False, cost=True),
    Metric(name="calls", help="forward passes or requests", higher_is_better=False, cost=True),
)
"""What a trial measures on every task, unless the task measures it itself."""

CARD_KEYS = ("title", "authors", "year", "paper", "summary", "acts_on", "free_of", "limits", "differs")
"""What a trial keeps of a method's card."""

ONE_RUN = 0.1
"""With one run of each arm, a cost that differs by less than this share is not called better or worse."""

ROUNDS = 3
ENOUGH_SECONDS = 60.0
"""Without a wish for rounds, no further round is begun after this time."""


@dataclass(frozen=True)
class Candidate:
    """An arm before it is measured: a label and the methods that are put on, in order."""

    label: str
    methods: tuple[Method, ...] = ()


@dataclass
class Measured:
    """The runs of one arm."""

    candidate: Candidate
    runs: list[Run] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)


def try_method(
    method: str | Method | Sequence[Method],
    subject: Any = None,
    task: str | Task | None = None,
    *,
    against: Iterable[str | Method] = (),
    rounds: int | None = None,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    progress: Progress = silent,
    command: str = "",
) -> Trial:
    """Measure `subject` on `task` without and with `method`, in turns, and return the trial.

    Args:
        method: a method, its name (with its default parameters), or several methods that go on together.
        subject: what the method acts on, or a name for `gratis.open`; None is the task's own.
        task: a task or its name; None is that of the method's first claim.
        against: further methods that are measured in the same rounds. One given by name takes the values of the
            parameters that it shares with `method`, so that both have, for example, the same budget.
        rounds: how often every arm is measured. None: three times, or fewer when that takes more than a minute.
        seed: seed of the task's data and of what it draws.
        device: where a subject that is given by name is put, "cuda" for example.
        dtype: its numbers, "bfloat16" for example.
        progress: called with the fraction done and a few words.
        command: what repeats the trial, to be stored with it.

    Raises ParameterError, SubjectError, StackingError or UnknownNameError before anything is measured.

    """
    if rounds is not None and rounds < 1:
        raise ParameterError(f"A trial needs at least one round, not {rounds}.")
    methods = _methods(method)
    chosen_task = _task(task, methods[-1])
    rivals = [_rival(other, methods[-1]) for other in against]
    if subject is None and (device or dtype) and chosen_task.card.subject:
        subject = chosen_task.card.subject
    name = subject if isinstance(subject, str) else chosen_task.card.subject if subject is None else ""
    progress(0.0, "opening the subject")
    opened = _opened(subject, chosen_task, device, dtype)
    if not isinstance(subject, str) and subject is not None and attached(opened):
        raise SubjectError("Methods are already attached to this subject; detach them, so that before is before.")
    candidates = _candidates(chosen_task, methods, rivals)
    chosen_task.check(opened)
    for candidate in candidates:
        for one in candidate.methods:
            if isinstance(one, Attachable):
                one.check(opened)
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    begin = time.perf_counter()
    surroundings = environment()
    warmed = warm_up(chosen_task, opened, candidates, seed, progress)
    measured = measure_rounds(chosen_task, opened, candidates, rounds, seed, progress)
    return _trial(
        chosen_task,
        measured,
        subject=describe(opened, name),
        seed=seed,
        rounds=len(measured[0].runs),
        warm_up=warmed,
        environment=surroundings,
        started=started,
        duration=round(time.perf_counter() - begin, 3),
        command=command,
    )


def default_task(method: type[Method] | Method) -> str:
    """Name of the task of the method's first claim, else of the only task on what it acts on. Raises ParameterError."""
    card = method.card
    if card.claims:
        return card.claims[0].task
    fitting = [name for name, entry in _task_entries().items() if entry.card.acts_on == card.acts_on]
    if len(fitting) == 1:
        return str(fitting[0])
    some = ", ".join(fitting) if fitting else "none yet"
    raise ParameterError(f"Name a task for this method with --task; tasks on a {card.acts_on}: {some}.")


Refused = dict[Candidate, Exception]
"""Arms that could not be measured, and why."""


def warm_up(
    task: Task,
    subject: Any,
    candidates: Sequence[Candidate],
    seed: int,
    progress: Progress = silent,
    refused: Refused | None = None,
) -> str:
    """Run once what is about to be measured, discard it, and say what was run.

    A task with a short form is run so under every arm; another in full, under the first. With `refused`, an arm
    that raises is entered there instead of ending the trial.
    """
    short = task.replace(**task.card.warm_up) if task.card.warm_up else task
    sizes = " with " + ", ".join(f"{n}={v}" for n, v in task.card.warm_up.items()) if task.card.warm_up else " in full"
    arms = candidates if task.card.warm_up else candidates[:1]
    for candidate in arms:
        progress(0.0, f"warming up: {candidate.label}")
        _attempt(short, subject, candidate, seed, 0, silent, refused)
    return ("each arm" if len(arms) > 1 else arms[0].label) + " once" + sizes


def measure_rounds(
    task: Task,
    subject: Any,
    candidates: Sequence[Candidate],
    rounds: int | None,
    seed: int,
    progress: Progress = silent,
    refused: Refused | None = None,
) -> list[Measured]:
    """Measure every arm once per round, the order rotating.

    With `refused`, an arm that raises leaves with its reason, and the others go on.
    """
    measured = {candidate: Measured(candidate) for candidate in candidates}
    wanted = rounds or ROUNDS
    begin = time.perf_counter()
    for number in range(wanted):
        order = [c for c in candidates if refused is None or c not in refused]
        turns = number % len(order) if order else 0
        for turn, candidate in enumerate([*order[turns:], *order[:turns]]):
            prefix = f"round {number + 1} of {wanted}: " if wanted > 1 else ""
            past, total = number * len(order) + turn, wanted * len(order)
            tell = _part(progress, past / total, 1 / total, prefix + candidate.label)
            tell(0.0, "")
            once = _attempt(task, subject, candidate, seed, number, tell, refused)
            if once is not None:
                run, measurement, measured[candidate].reports = once
                measured[candidate].runs.append(run)
                measured[candidate].measurements.append(measurement)
        if rounds is None and time.perf_counter() - begin > ENOUGH_SECONDS:
            break
    progress(1.0, "done")
    return [arm for arm in measured.values() if refused is None or arm.candidate not in refused]


def _part(progress: Progress, past: float, share: float, words: str) -> Progress:
    """Progress of one part of a longer work."""

    def tell(fraction: float, detail: str) -> None:
        progress(past + fraction * share, f"{words}, {detail}" if detail else words)

    return tell


Once = tuple[Run, Measurement, dict[str, dict[str, Any]]]


def _attempt(
    task: Task,
    subject: Any,
    candidate: Candidate,
    seed: int,
    number: int,
    progress: Progress,
    refused: Refused | None,
) -> Once | None:
    if refused is None:
        return run_once(task, subject, candidate, seed, number, progress)
    if candidate in refused:
        return None
    try:
        return run_once(task, subject, candidate, seed, number, progress)
    except Exception as error:
        refused[candidate] = error
        return None


def run_once(
    task: Task, subject: Any, candidate: Candidate, seed: int, number: int, progress: Progress = silent
) -> Once:
    """One run of `task` with the candidate's methods on, with its time and peak memory."""
    last = candidate.methods[-1] if candidate.methods else None
    with PeakMemory() as memory, ExitStack() as stack:
        if len(candidate.methods) > 1:
            stack.enter_context(attach(subject, *candidate.methods[:-1]))
        target = stack.enter_context(task.applied(subject, last))
        wall, cpu = time.perf_counter(), time.process_time()
        measurement = task.measure(target, seed=seed, progress=progress)
        synchronize()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        reports = {name: report for one in attached(subject) for name, report in one.report().items()}
    metrics = dict(measurement.metrics)
    metrics.setdefault("seconds", wall)
    metrics.setdefault("cpu_seconds", cpu)
    metrics.setdefault("peak_memory", memory.megabytes)
    if memory.device_megabytes is not None:
        metrics.setdefault("device_memory", memory.device_megabytes)
    for count in ("tokens", "calls"):
        if getattr(measurement, count):
            metrics.setdefault(count, float(getattr(measurement, count)))
    missing = [m.name for m in task.card.metrics if m.name not in metrics]
    if missing:
        raise GratisError(f"The task {task.name} did not measure {missing[0]}, which its card promises.")
    return Run(round=number, metrics={n: float(v) for n, v in metrics.items()}), measurement, _plain(reports)


def describe(subject: Any, name: str = "") -> dict[str, Any]:
    """What a subject is, in plain values: its name, class and, where it has them, parameters and dtype."""
    described: dict[str, Any] = {"name": _shown(name), "type": type(subject).__name__}
    if hasattr(subject, "num_parameters"):
        described["parameters"] = int(subject.num_parameters())
    for attribute in ("dtype", "device"):
        value = getattr(subject, attribute, None)
        if value is not None and not callable(value):
            described[attribute] = str(value).removeprefix("torch.")
    if not described["name"]:
        described["name"] = described["type"] if type(subject).__module__ != "builtins" else "the task's own"
    return described


def _shown(name: str) -> str:
    """A subject's name without the folders of this machine, and an address without what may be secret in it."""
    if "://" in name:
        address = urlsplit(name)
        return f"{address.scheme}://{address.hostname}" + (f":{address.port}" if address.port else "")
    return Path(name).name if name and Path(name).exists() else name


def compare(metric: MetricInfo, after: Measured, before: Measured) -> Comparison:
    """One metric of one arm beside another's, with an interval where the task gave items."""
    values, baselines = ([run.metrics[metric.name] for run in arm.runs] for arm in (after, before))
    value, baseline = medians.median(values), medians.median(baselines)
    difference = value - baseline
    interval = None
    if not metric.cost:
        items, others = (arm.measurements[0].items.get(metric.name, []) for arm in (after, before))
        if statistics.is_mean_of(value, items) and statistics.is_mean_of(baseline, others):
            interval = statistics.paired_interval(items, others)
        if interval is not None and not interval[0] <= difference <= interval[1]:
            interval = None
    low, high = interval or (None, None)
    return Comparison(
        metric=metric.name,
        arm=after.candidate.label,
        against=before.candidate.label,
        value=value,
        baseline=baseline,
        difference=difference,
        ratio=value / baseline if baseline else None,
        low=low,
        high=high,
        verdict=_verdict(metric, values, baselines, interval),
    )


def _verdict(
    metric: MetricInfo, values: list[float], baselines: list[float], interval: tuple[float, float] | None
) -> Verdict:
    """Better or worse where interval (quality) or spread (cost, several rounds) leave no doubt."""
    difference = medians.median(values) - medians.median(baselines)
    if math.isnan(difference):
        return "unclear"
    if difference == 0:
        return "same"
    if interval is not None:
        doubtful = interval[0] <= 0 <= interval[1]
    elif metric.cost:
        doubtful = min(values) <= max(baselines) and min(baselines) <= max(values)
        if len(values) == 1:
            doubtful = abs(difference) < ONE_RUN * abs(baselines[0])
    else:
        doubtful = False
    if doubtful:
        return "unclear"
    return "better" if (difference > 0) == metric.higher_is_better else "worse"


def _methods(method: str | Method | Sequence[Method]) -> tuple[Method, ...]:
    if isinstance(method, str):
        return (catalogue[method](),)
    methods = (method,) if isinstance(method, Method) else tuple(method)
    if not methods:
        raise ParameterError("Nothing to try: name at least one method.")
    for one in methods:
        if not isinstance(one, Method):
            raise ParameterError(f"{one!r} is not a method: give an instance, for example gratis.LaCache(budget=512).")
    return methods


def _rival(other: str | Method, method: Method) -> Method:
    if isinstance(other, Method):
        return other
    kind = catalogue[other]
    theirs, ours = kind.declared(), method.declared()
    shared = {n: getattr(method, n) for n, p in theirs.items() if n in ours and p.type == ours[n].type}
    return kind(**shared)  # type: ignore[no-any-return]


def _task(task: str | Task | None, method: Method) -> Task:
    if isinstance(task, Task):
        return task
    if task is not None:
        return task_catalogue[task]()  # type: ignore[no-any-return]
    parameters = method.card.claims[0].task_parameters if method.card.claims else {}
    return task_catalogue[default_task(method)](**parameters)  # type: ignore[no-any-return]


def _task_entries() -> Mapping[str, Any]:
    return task_catalogue.entries


def _opened(subject: Any, task: Task, device: str | None, dtype: str | None) -> Any:
    if isinstance(subject, str):
        from gratis.subjects import open as open_subject

        try:
            return open_subject(subject, device=device, dtype=dtype)
        except (RuntimeError, AssertionError) as error:
            if device is None:
                raise
            raise SubjectError(f"{subject} cannot be put on {device!r}: {str(error).splitlines()[0]}.") from error
    if device or dtype:
        raise ParameterError("device and dtype are for a subject that is opened by name; put this one there yourself.")
    return task.subject() if subject is None else subject


def _candidates(task: Task, methods: tuple[Method, ...], rivals: list[Method]) -> list[Candidate]:
    arms: list[tuple[Method, ...]] = [*((rival,) for rival in rivals), methods]
    if len(set(arms)) < len(arms):
        raise ParameterError("Two arms of the trial are the same method with the same parameters; leave one out.")
    labels = [" + ".join(type(m).__name__ for m in arm) for arm in arms]
    named = [
        label if labels.count(label) == 1 else " + ".join(repr(m) for m in arm)
        for label, arm in zip(labels, arms, strict=True)
    ]
    return [Candidate(task.card.untouched), *(Candidate(n, arm) for n, arm in zip(named, arms, strict=True))]


def infos(task: Task, seen: Iterable[str]) -> tuple[MetricInfo, ...]:
    """The task's own metrics, then those that trials add, as far as they were measured."""
    own = {m.name for m in task.card.metrics}
    measured = set(seen)
    every = [*task.card.metrics, *(m for m in COSTS if m.name not in own and m.name in measured)]
    return tuple(MetricInfo(**vars(m)) for m in every)


def _trial(task: Task, measured: list[Measured], **rest: Any) -> Trial:
    metrics = infos(task, set.intersection(*(set(arm.runs[0].metrics) for arm in measured)))
    pairs = [(measured[-1], other) for other in measured[:-1]]
    pairs += [(rival, measured[0]) for rival in measured[1:-1]]
    return Trial(
        task=TaskRecord(
            name=task.name,
            title=task.card.title,
            data=task.card.data,
            parameters=_plain(task.parameters()),
            metrics=metrics,
        ),
        arms=tuple(_arm(arm) for arm in measured),
        comparisons=tuple(compare(metric, after, before) for after, before in pairs for metric in metrics),
        **rest,
    )


def _arm(arm: Measured) -> Arm:
    first = arm.measurements[0]
    names = arm.runs[0].metrics
    values = {name: [run.metrics[name] for run in arm.runs] for name in names}
    return Arm(
        label=arm.candidate.label,
        methods=tuple(
            MethodRecord(
                name=m.name,
                title=type(m).__name__,
                parameters=_plain(m.parameters()),
                card={key: _plain(getattr(m.card, key)) for key in CARD_KEYS},
            )
            for m in arm.candidate.methods
        ),
        runs=tuple(arm.runs),
        metrics={
            name: Summary(median=middle, low=low, high=high)
            for name, (middle, low, high) in ((n, statistics.summary(v)) for n, v in values.items())
        },
        items={name: tuple(_short(v) for v in items) for name, items in first.items.items()},
        series={name: _series(name, arm.measurements) for name in first.series},
        tokens=first.tokens,
        calls=first.calls,
        details=_plain(first.details),
        reports=arm.reports,
    )


def _series(name: str, measurements: list[Measurement]) -> SeriesRecord:
    first = measurements[0].series[name]
    columns = zip(*(m.series[name].y for m in measurements), strict=True)
    return SeriesRecord(
        x=tuple(_short(v) for v in first.x),
        y=tuple(_short(medians.median(column)) for column in columns),
        x_label=first.x_label,
        y_label=first.y_label,
        marks=tuple((float(place), words) for place, words in first.marks),
    )


def _short(value: float) -> float:
    """Seven significant digits: what a float32 holds."""
    return float(f"{float(value):.7g}")


def _plain(value: Any) -> Any:
    """Mappings, sequences and numbers as JSON knows them; anything else as text."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(v) for v in (sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value)]
    item: Callable[[], Any] | None = getattr(value, "item", None)
    if item is not None and getattr(value, "ndim", 1) == 0:
        return _plain(item())
    return str(value)
