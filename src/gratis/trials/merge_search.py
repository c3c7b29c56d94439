"""Tune the numbers of a merge against a task: what a method declares as worth searching, and the experts' weights.

Proposals are optuna's; a journal file keeps the trials, so that a search goes on where it was interrupted and comes to
the same result. Models are merged in memory, into one live model, or within a task that brings its own checkpoints.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from gratis.contract.errors import FileError, GratisError, InputError, MissingExtraError, SubjectError
from gratis.contract.parameters import Parameter
from gratis.subjects.merge_recipe import MergeRecipe
from gratis.subjects.merging import merge_into, merge_state_dicts
from gratis.tasks.task import Task

Progress = Callable[[float, str], None]
WEIGHT = "weight {}"
STUDY = "merge"
LOGARITHMIC = 50
"""Ratio of bounds from which a number is searched by its logarithm."""


@dataclass(frozen=True)
class SearchResult:
    """What a search came to. Scores are of the task's first metric, as the task reports it."""

    recipe: MergeRecipe
    """The recipe with the best values, and the trials behind it."""
    metric: str
    values: Mapping[str, float]
    """What was tuned, with the best values."""
    score: float
    before: float
    """The recipe as it was given."""
    elsewhere: float
    """The tuned recipe on data of another seed, which the search did not see."""
    before_elsewhere: float
    same_data: bool
    """Whether the task has the same data for every seed, so that `elsewhere` is no independent check."""
    done: int
    failed: int

    def summary(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "metric": self.metric, "values": dict(self.values), "score": self.score, "before": self.before,
            "elsewhere": self.elsewhere, "before_elsewhere": self.before_elsewhere, "same_data": self.same_data,
            "trials": self.done, "failed": self.failed,
        }  # fmt: skip

    def recipe_at(self, source: Path, target: Path) -> MergeRecipe:
        """The recipe with its paths, which were relative to `source`, relative to the file `target`."""
        if not self.recipe.written:
            return self.recipe
        old, new = source.parent.resolve(), target.parent.resolve()

        def moved(name: str | None, opened: Any) -> str | None:
            if name is None or Path(name).is_absolute() or old == new:
                return name
            # Of MODEL+ADAPTER both.
            parts = [str(opened)] if Path(opened).exists() else str(opened).rsplit("+", 1)
            return "+".join(os.path.relpath(Path(part).resolve(), new) for part in parts)

        written = {
            "base": moved(self.recipe.written.get("base"), self.recipe.base),
            "experts": [moved(n, e) for n, e in zip(self.recipe.written["experts"], self.recipe.experts, strict=True)],
        }
        return replace(self.recipe, written=written)


def search_recipe(
    recipe: MergeRecipe,
    task: Task,
    *,
    trials: int = 30,
    seed: int = 0,
    journal: str | os.PathLike[str] | None = None,
    sampler: Literal["tpe", "random"] = "tpe",
    subject: Any = None,
    progress: Progress | None = None,
) -> SearchResult:
    """Tune a recipe against `task`. The first trial is the recipe as given.

    `subject` is the live model to merge into, the recipe's base opened by default. For a task that brings its own
    checkpoints (`acts_on="checkpoints"`) only the method's parameters are tuned, on those. Raises MissingExtraError
    without optuna, InputError when nothing can be tuned or every trial fails, FileError for a journal of another search.
    """
    try:
        import optuna
    except ImportError:
        raise MissingExtraError.of("optuna", "search") from None
    tell = progress or (lambda fraction, words: None)
    if recipe.rules:
        raise InputError("A recipe with rules cannot be searched: tune it without them, or use MedSAMix.")
    own = task.card.acts_on == "checkpoints"
    space = search_space(recipe, weights=not own)
    if not space:
        raise InputError(f"{recipe.method.name} declares nothing to search, and its weights change nothing.")
    metric = next(metric for metric in task.card.metrics if not metric.cost)
    target = task.subject() if own else _Live(recipe, task, subject)

    def measured(tried: MergeRecipe, at: int) -> float:
        context = task.applied(target, tried.method) if own else target.with_merged(tried)
        with context as merged:
            return float(task.measure(merged, seed=at).metrics[metric.name])

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = _study(optuna, journal, metric.higher_is_better, _identity(recipe, task, space, seed))
    finished = [t for t in study.trials if t.state in (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.FAIL)]
    given = _inside(space, _values(recipe, space))
    for number in range(len(finished), trials):
        study.sampler = _sampler(optuna, sampler, seed, number)
        if number == 0:
            study.enqueue_trial(given)
        trial = study.ask()
        values = {name: _suggest(trial, name, parameter) for name, parameter in space.items()}
        best = study.best_value if any(t.value is not None for t in study.trials) else None
        tell(number / trials, f"trial {number + 1}" + (f", best {best:.4f}" if best is not None else ""))
        try:
            value = measured(recipe if number == 0 else with_values(recipe, values), seed)
            if not math.isfinite(value):
                raise InputError(f"{metric.name} is not finite.")
            study.tell(trial, value)
        except (GratisError, ArithmeticError) as error:
            trial.set_user_attr("failed", str(error))
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
    done = [t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    failures = [t for t in study.trials if t.state == optuna.trial.TrialState.FAIL]
    if not done:
        raise InputError(f"Every trial failed, the first because {failures[0].user_attrs.get('failed', 'unknown')}")
    best_trial = study.best_trial
    first = next((t for t in done if t.number == 0), None)
    tuned = recipe if best_trial.number == 0 else with_values(recipe, best_trial.params)
    tell(1.0, "measuring on other data")
    before = first.value if first is not None else math.nan
    elsewhere, before_elsewhere = measured(tuned, seed + 1), measured(recipe, seed + 1) if first else math.nan
    lines = [
        {"task": task.name, "task_parameters": task.parameters(), "seed": seed, "metric": metric.name, "score": t.value,
         "values": dict(t.params)}
        for t in sorted(done, key=lambda t: t.value, reverse=metric.higher_is_better)[:10]
    ]  # fmt: skip
    lines.append(
        {"task": task.name, "seed": seed + 1, "metric": metric.name, "score": elsewhere, "as_given": before_elsewhere}
    )
    return SearchResult(
        replace(tuned, trials=tuple(lines)), metric.name, dict(best_trial.params), float(best_trial.value), before,
        elsewhere, before_elsewhere, before == before_elsewhere and float(best_trial.value) == elsewhere, len(done),
        len(failures),
    )  # fmt: skip


def search_space(recipe: MergeRecipe, weights: bool = True) -> dict[str, Parameter]:
    """What can be tuned: the method's parameters that declare a range or values, and weights where they matter."""
    declared = type(recipe.method).declared()
    space = {name: parameter for name, parameter in declared.items() if parameter.search}
    if weights and len(recipe.experts) > 1 and _weights_matter(recipe):
        for place in range(len(recipe.experts)):
            name = WEIGHT.format(place)
            space[name] = Parameter(1.0, "weight of an expert", search=(0.0, 1.0), name=name, type=float)
    return space


def _weights_matter(recipe: MergeRecipe) -> bool:
    """Whether the method's result depends on its experts' weights, seen on a few numbers."""
    count = len(recipe.experts)
    generator = torch.Generator().manual_seed(0)
    experts = [{"probe": torch.randn(8, 8, generator=generator)} for _ in range(count)]
    base = {"probe": torch.zeros(8, 8)}
    try:
        even = merge_state_dicts(recipe.method, experts, base, [1.0] * count)
        uneven = merge_state_dicts(recipe.method, experts, base, [0.3 + 0.6 * n / count for n in range(count)])
    except GratisError:
        return False
    return not torch.equal(even["probe"], uneven["probe"])


def with_values(recipe: MergeRecipe, values: Mapping[str, Any]) -> MergeRecipe:
    """The recipe with these parameters and weights. Raises ParameterError."""
    parameters = {name: value for name, value in values.items() if not name.startswith("weight ")}
    weights = tuple(values.get(WEIGHT.format(n), weight) for n, weight in enumerate(recipe.weights))
    return replace(recipe, method=recipe.method.replace(**parameters), weights=weights)


def _values(recipe: MergeRecipe, space: Mapping[str, Parameter]) -> dict[str, Any]:
    known = recipe.method.parameters()
    return {
        name: known[name] if name in known else recipe.weights[int(name.rpartition(" ")[2])] for name in space
    }  # fmt: skip


def _range(parameter: Parameter) -> tuple[float, float] | None:
    """(low, high) of a number, None for a choice."""
    search = parameter.search
    numeric = parameter.inner_type in (int, float) and len(search) == 2
    return (float(search[0]), float(search[1])) if numeric else None


def _inside(space: Mapping[str, Parameter], values: Mapping[str, Any]) -> dict[str, Any]:
    """What of the values lies in the space; the rest is optuna's to choose, the first trial is measured as given."""
    found = {}
    for name, value in values.items():
        bounds = _range(space[name])
        if bounds is not None and value is not None:
            found[name] = min(max(value, bounds[0]), bounds[1])
        elif value in space[name].search:
            found[name] = value
    return found


def _suggest(trial: Any, name: str, parameter: Parameter) -> Any:
    bounds = _range(parameter)
    if bounds is None:
        return trial.suggest_categorical(name, list(parameter.search))
    low, high = bounds
    if parameter.inner_type is int:
        return trial.suggest_int(name, int(low), int(high))
    return trial.suggest_float(name, low, high, log=low > 0 and high / low > LOGARITHMIC)


def _sampler(optuna: Any, kind: str, seed: int, number: int) -> Any:
    """A sampler of this trial's own seed, so that a search that goes on proposes what it would have proposed."""
    own = (seed * 1_000_003 + number) % 2**32
    return optuna.samplers.RandomSampler(own) if kind == "random" else optuna.samplers.TPESampler(seed=own)


def _identity(recipe: MergeRecipe, task: Task, space: Mapping[str, Parameter], seed: int) -> dict[str, Any]:
    """What must be the same for a journal to be gone on with."""
    written = recipe.written or {"experts": [str(getattr(e, "path", e)) for e in recipe.experts]}
    return {
        "method": recipe.method.name, "parameters": repr(recipe.method.parameters()), "experts": repr(written),
        "weights": repr(recipe.weights), "task": task.name, "task parameters": repr(task.parameters()), "seed": seed,
        "space": repr(sorted((name, p.search) for name, p in space.items())),
    }  # fmt: skip


def _study(optuna: Any, journal: Any, higher: bool, identity: Mapping[str, Any]) -> Any:
    storage = None
    if journal is not None:
        path = Path(journal)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            backend = optuna.storages.journal.JournalFileBackend(str(path))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                storage = optuna.storages.JournalStorage(backend)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise FileError(f"The journal {path} is damaged or no journal: name another, or remove it.") from error
    direction = "maximize" if higher else "minimize"
    study = optuna.create_study(storage=storage, study_name=STUDY, direction=direction, load_if_exists=True)
    for key, value in identity.items():
        before = study.user_attrs.get(key)
        if before is not None and before != value:
            raise FileError(f"The journal {journal} is of another search ({key} differs): name another, or remove it.")
        study.set_user_attr(key, value)
    return study


class _Live:
    """A live model into which merges are written, and which is as it was afterwards."""

    def __init__(self, recipe: MergeRecipe, task: Task, subject: Any) -> None:
        from gratis.subjects import open as open_subject

        source = recipe.base if recipe.base is not None else recipe.experts[0]
        if subject is None:
            if hasattr(source, "places"):
                raise InputError("A recipe of slices cannot be searched: merge it first.")
            if not Path(source).exists() or Path(source).suffix == ".gguf":
                raise InputError(
                    f"A search puts merges into a live model, which {source} is not: name a model's folder as base."
                )
            subject = open_subject(str(Path(source).absolute()))
        self.model = subject
        task.check(subject)

    @contextmanager
    def with_merged(self, recipe: MergeRecipe) -> Any:
        weights = {n: t for n, t in self.model.state_dict().items() if t.is_floating_point()}
        before = {name: tensor.clone() for name, tensor in weights.items()}
        try:
            _into(recipe, weights)
            yield self.model
        finally:
            for name, tensor in weights.items():
                tensor.copy_(before[name])


def _into(recipe: MergeRecipe, weights: Mapping[str, torch.Tensor]) -> None:
    missing = merge_into(
        weights, recipe.method, recipe.experts, recipe.base, recipe.weights, tokenizer=recipe.tokenizer
    )
    if missing:
        raise SubjectError(
            f"The model has no weight called {missing[0]!r} as its checkpoint does, so merges cannot be put into it."
        )
