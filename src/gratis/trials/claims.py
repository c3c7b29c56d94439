"""Running claims: what methods promise is measured, beside its baseline, and held against its bound."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from gratis.contract.card import Claim
from gratis.contract.catalogue import Entry, catalogue
from gratis.contract.errors import GratisError
from gratis.contract.files import write_text
from gratis.tasks.task import Progress, Task, silent, task_catalogue
from gratis.trials.environment import environment
from gratis.trials.measuring import Candidate, Measured, Refused, compare, infos, measure_rounds, warm_up
from gratis.trials.trial import Record, VersionedRecord, load_record

RESULTS = Path(__file__).parent / "results" / "claims.json"
"""Results of the last stored run of every claim; they are part of the package."""


class ClaimResult(Record):
    """What one claim measured, held against its bound."""

    method: str
    claim: str
    passed: bool
    figure: float | None
    """None where nothing could be measured; `error` says why."""
    bound: str
    metric: str
    unit: str = ""
    compare: str
    value: float | None = None
    """The metric with the method on."""
    baseline: float | None = None
    low: float | None = None
    """Ends of the 95 % interval of the difference, where the task gives items."""
    high: float | None = None
    against: str = ""
    task: str
    subject: str = ""
    parameters: dict[str, Any] = Field(default_factory=dict)
    task_parameters: dict[str, Any] = Field(default_factory=dict)
    rounds: int = 0
    seed: int = 0
    seconds: float = 0.0
    """Wall seconds of the runs behind it, which claims on the same work share."""
    measured: str = ""
    """Date and time, UTC."""
    error: str = ""

    @property
    def repeat(self) -> str:
        """The command that measures it again."""
        return f"gratis verify {self.method}"

    def is_of(self, claim: Claim) -> bool:
        """Whether this is a result of `claim` as it stands now."""
        then = [self.claim, self.metric, self.compare, self.bound, self.parameters, self.task_parameters]
        return _identity(claim) == json.dumps(then, sort_keys=True, default=str)


class ClaimResults(VersionedRecord):
    """Stored results: those of one run, and of methods that were not in it."""

    environment: dict[str, Any]
    results: tuple[ClaimResult, ...]


@dataclass(frozen=True)
class _Promise:
    """A claim with the method it belongs to."""

    entry: Entry
    claim: Claim


@dataclass
class _Group:
    """Claims on the same work: task, its parameters, subject."""

    task: str
    parameters: dict[str, Any]
    subject: str
    promises: list[_Promise] = field(default_factory=list)


Told = Callable[[ClaimResult], None]


def verify(
    names: str | Iterable[str] | None = None,
    *,
    seed: int = 0,
    progress: Progress = silent,
    tell: Told | None = None,
) -> list[ClaimResult]:
    """Run the claims of the named methods (all, for None) and return their results, in the catalogue's order.

    Claims on the same task, with the same parameters and subject, share the runs of the baseline; nothing is kept
    from one call to the next. A claim that cannot be measured is a failed claim with the reason. `tell` is called
    with each result as it is known. Raises UnknownNameError for a name that is none.
    """
    if names is None:
        entries = list(catalogue.entries.values())
    else:
        entries = [catalogue.resolve(name) for name in ([names] if isinstance(names, str) else names)]
    promises = [_Promise(entry, claim) for entry in entries for claim in entry.card.claims]
    groups = _groups(promises)
    found: dict[tuple[str, str], ClaimResult] = {}
    opened: dict[str, Any] = {}
    for position, group in enumerate(groups):

        def part(fraction: float, words: str, position: int = position, task: str = group.task) -> None:
            progress((position + fraction) / len(groups), f"{task}: {words}")

        upcoming = {other.subject for other in groups[position:]}
        for name in [name for name in opened if name not in upcoming]:
            del opened[name]
        for promise, result in _run_group(group, opened, seed, part):
            found[promise.entry.name, promise.claim.name] = result
            if tell is not None:
                tell(result)
    progress(1.0, "done")
    return [found[p.entry.name, p.claim.name] for p in promises]


def store(results: Sequence[ClaimResult], path: Path = RESULTS) -> Path:
    """Write results to `path`, in place of earlier ones of the same methods; those of other methods stay."""
    now = {result.method for result in results}
    earlier = stored(path) if path.exists() else ()
    kept = [r for r in earlier if r.method not in now and r.method in catalogue.entries]
    order = {name: position for position, name in enumerate(catalogue.entries)}
    every = sorted([*kept, *results], key=lambda r: order.get(r.method, len(order)))
    record = ClaimResults(environment=environment(), results=tuple(every))
    write_text(path, record.model_dump_json(indent=1) + "\n")
    return path


def stored(path: Path = RESULTS) -> tuple[ClaimResult, ...]:
    """The stored results, none when there is no file. Raises FileError if the file is damaged."""
    return load_record(ClaimResults, path, "results").results if path.exists() else ()


def last_result(method: str, claim: Claim, path: Path = RESULTS) -> ClaimResult | None:
    """The stored result of `claim` as it stands now; None where it was not run since it was written or changed."""
    return next((r for r in stored(path) if r.method == method and r.is_of(claim)), None)


def _groups(promises: list[_Promise]) -> list[_Group]:
    groups: dict[str, _Group] = {}
    for promise in promises:
        claim = promise.claim
        entry = task_catalogue.entries.get(claim.task)
        subject = claim.subject or (entry.card.subject if entry is not None else "")
        key = json.dumps([claim.task, dict(claim.task_parameters), subject], sort_keys=True, default=str)
        group = groups.setdefault(key, _Group(claim.task, dict(claim.task_parameters), subject))
        group.promises.append(promise)
    return sorted(groups.values(), key=lambda group: group.subject)


def _run_group(
    group: _Group, opened: dict[str, Any], seed: int, progress: Progress
) -> list[tuple[_Promise, ClaimResult]]:
    """Measure what the claims of a group need, in turns, and hold each against its bound."""
    begin = time.perf_counter()
    try:
        task: Task = task_catalogue[group.task](**group.parameters)
        subject = _subject(group, task, opened)
        task.check(subject)
    except Exception as error:
        return [(promise, _failed(promise, group, error, seed)) for promise in group.promises]
    needed: list[tuple[_Promise, Candidate, Candidate | None]] = []
    judged: list[tuple[_Promise, ClaimResult]] = []
    for promise in group.promises:
        try:
            needed.append((promise, *_arms(promise, task)))
        except Exception as error:
            judged.append((promise, _failed(promise, group, error, seed)))
    candidates = list(dict.fromkeys([*(b for _, _, b in needed if b is not None), *(a for _, a, _ in needed)]))
    refused: Refused = {}
    timed = any(_is_cost(promise, task) for promise, _, _ in needed)
    if timed:
        warm_up(task, subject, candidates, seed, progress, refused)
    measured = measure_rounds(task, subject, candidates, None if timed else 1, seed, progress, refused)
    arms = {arm.candidate: arm for arm in measured}
    seconds = round(time.perf_counter() - begin, 1)
    for promise, after, before in needed:
        reasons = [refused[arm] for arm in (after, before) if arm is not None and arm in refused]
        if reasons:
            judged.append((promise, _failed(promise, group, reasons[0], seed)))
        else:
            baseline = arms[before] if before is not None else None
            judged.append((promise, _judged(promise, group, task, arms[after], baseline, seed, seconds)))
    return judged


def _subject(group: _Group, task: Task, opened: dict[str, Any]) -> Any:
    if not group.subject:
        return task.subject()
    if group.subject not in opened:
        from gratis.subjects import open as open_subject

        opened[group.subject] = task.subject() if group.subject == task.card.subject else open_subject(group.subject)
    return opened[group.subject]


def _arms(promise: _Promise, task: Task) -> tuple[Candidate, Candidate | None]:
    """The arm under the claim, and its baseline where the claim compares."""
    entry, claim = promise.entry, promise.claim
    after = Candidate(entry.class_name, (entry.load()(**claim.parameters),))
    if claim.compare == "value":
        return after, None
    if claim.against is None:
        return after, Candidate(task.card.untouched)
    kind = catalogue[claim.against]
    return after, Candidate(kind.__name__, (kind(**claim.against_parameters),))


def _is_cost(promise: _Promise, task: Task) -> bool:
    return any(m.cost for m in infos(task, ["seconds", "cpu_seconds"]) if m.name == promise.claim.metric)


def _judged(
    promise: _Promise,
    group: _Group,
    task: Task,
    after: Measured,
    before: Measured | None,
    seed: int,
    seconds: float,
) -> ClaimResult:
    claim = promise.claim
    common = [name for name in after.runs[0].metrics if before is None or name in before.runs[0].metrics]
    metric = next((m for m in infos(task, common) if m.name == claim.metric), None)
    if metric is None:
        return _failed(promise, group, GratisError(f"The task {task.name} does not measure {claim.metric}."), seed)
    comparison = compare(metric, after, before or after)
    figure = {"value": comparison.value, "difference": comparison.difference, "ratio": comparison.ratio}[claim.compare]
    if figure is None:
        nothing = GratisError(f"The baseline's {claim.metric} is 0, so there is no ratio to it.")
        return _failed(promise, group, nothing, seed)
    return _result(
        promise,
        group,
        passed=claim.holds(figure),
        figure=figure,
        unit="" if claim.compare == "ratio" else metric.unit,
        value=comparison.value,
        baseline=comparison.baseline if before is not None else None,
        low=comparison.low if claim.compare == "difference" else None,
        high=comparison.high if claim.compare == "difference" else None,
        against=before.candidate.label if before is not None else "",
        rounds=len(after.runs),
        seed=seed,
        seconds=seconds,
    )


def _failed(promise: _Promise, group: _Group, error: Exception, seed: int) -> ClaimResult:
    return _result(promise, group, passed=False, figure=None, error=_said(error), seed=seed)


def _result(promise: _Promise, group: _Group, **rest: Any) -> ClaimResult:
    claim = promise.claim
    return ClaimResult(
        method=promise.entry.name,
        claim=claim.name,
        bound=claim.bound,
        metric=claim.metric,
        compare=claim.compare,
        task=claim.task,
        subject=group.subject,
        parameters=json.loads(json.dumps(dict(claim.parameters), default=str)),
        task_parameters=json.loads(json.dumps(dict(claim.task_parameters), default=str)),
        measured=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **rest,
    )


def _identity(claim: Claim) -> str:
    parts = [
        claim.name,
        claim.metric,
        claim.compare,
        claim.bound,
        dict(claim.parameters),
        dict(claim.task_parameters),
    ]
    return json.dumps(parts, sort_keys=True, default=str)


def _said(error: Exception) -> str:
    """An error in one sentence: its own where gratis raised it, with its class in front where something else did."""
    text = " ".join(str(error).split())
    return text if isinstance(error, GratisError) else ": ".join(filter(None, (type(error).__name__, text)))
