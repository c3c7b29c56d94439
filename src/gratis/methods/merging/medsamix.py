"""Search, group of layers by group of layers, how several fine-tunes are merged, on a few labelled samples.

"MedSAMix: A Training-Free Model Merging Approach for Medical Image Segmentation", 2025, arXiv:2508.11032, with the search
of "Fine, I'll Merge It Myself", arXiv:2502.04030. A configuration says for each group of layers a method, and for each
set of parameters within it (attention, MLP, rest) the numbers of every method. Random forest, expected improvement,
Hyperband over the number of samples; several tasks by ParEGO.
"""

from __future__ import annotations

import json
import math
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gratis.contract.card import Card, Claim
from gratis.contract.errors import FileError, GratisWarning, InputError, MissingExtraError, ParameterError
from gratis.contract.method import Merge, MergePart
from gratis.contract.parameters import param
from gratis.methods.merging.average import Average
from gratis.methods.merging.slerp import SLERP
from gratis.methods.merging.task_arithmetic import TaskArithmetic
from gratis.methods.merging.ties import TIES
from gratis.subjects.merge_rules import Rule
from gratis.subjects.merging import merge_state_dicts

METHODS = ("linear", "task_arithmetic", "ties", "slerp")
LARGEST_MASK = 0.99
"""Most of a task vector that TIES may trim."""
AUGMENTATION = 0.05
"""Weight of the sum beside the largest of the weighted costs in ParEGO (rho)."""
TREES, LEAF, FEATURES = 10, 3, 5 / 6
ENOUGH = 8
"""Points from which a surrogate is fitted."""
MANY, FEW = 100, 200
"""Numbers to choose and trials at which a search finds little that chance would not."""

StateDict = Mapping[str, Tensor]
Score = Callable[[dict[str, Tensor], int], float | Mapping[str, float]]
"""Of a merged state dict, on the first so many samples: a score in [0, 1], or one per task. Higher is better."""
Vector = NDArray[np.float64]


class MedSAMix(Merge):
    """One model from several fine-tunes, each group of layers merged by the method that serves your samples best.

    `MedSAMix(…).search(base, models, score, samples=40)` returns a `Found`: the merged state dict, the configuration and
    its `rules` for `gratis.merge`, every trial, and the Pareto front of several tasks.
    """

    card = Card(
        title="MedSAMix: A Training-Free Model Merging Approach for Medical Image Segmentation",
        year=2025,
        seed=18,
        paper="arXiv:2508.11032",
        acts_on="checkpoints",
        free_of=("training", "gradients"),
        summary="layer by layer the merge that serves a few labelled samples of yours best",
        examples={"n_trials": 8},
        differs=(
            "The released repository has no source; groups of a segmenter, the single models' evaluation on all "
            "samples, and the forest's settings are this project's."
        ),
        limits=(
            "Needs labelled samples; with under 200 trials and over 100 numbers to choose the forest is close to random "
            "search: choose a larger layer_granularity, or optuna, which found more on the zoo's segmenters in 80 trials. "
            "Tune task arithmetic first: its one number may do as well. No clinical claim."
        ),
        claims=(
            Claim(
                name="one segmenter from a generalist and two specialists beats the best single one on unseen pictures",
                task="segmentation-merging",
                metric="dice",
                compare="difference",
                at_least=0.01,
                parameters={"layer_granularity": 2, "n_trials": 60},
            ),
            Claim(
                name="and is at least as good as averaging the three, within 0.01",
                task="segmentation-merging",
                metric="dice",
                compare="difference",
                at_least=-0.01,
                against="average",
                parameters={"layer_granularity": 2, "n_trials": 60},
            ),
        ),
    )

    layer_granularity: int = param(3, above=0, unit="layers", help="layers of a group; must divide their number")
    filters: tuple[str, ...] = param(
        ("attn", "mlp"), help="parts of names that form a set of parameters within a group; the first that fits"
    )
    methods: tuple[str, ...] = param(METHODS, help="merges that may be chosen: linear, task_arithmetic, ties, slerp")
    n_trials: int = param(500, above=0, unit="trials", help="evaluations in all, one per model at least")
    min_budget: int | None = param(
        None, above=0, unit="samples", help="samples of the cheapest trials; None: a fifth of max_budget"
    )
    max_budget: int | None = param(None, above=0, unit="samples", help="samples of the dearest trials; None: all")
    eta: int = param(3, at_least=2, help="of so many configurations one goes on to so many times the samples")
    optimizer: Literal["forest", "optuna", "random"] = param(
        "forest", help="what proposes: a random forest (paper), optuna's tree of Parzen estimators, or chance (control)"
    )
    seed: int = param(0, at_least=0, help="seed of the search")

    def check_parameters(self) -> None:
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown or not self.methods:
            raise ParameterError(f"MedSAMix: methods are some of {', '.join(METHODS)}, not {unknown or 'none'}.")
        if self.min_budget is not None and self.max_budget is not None and self.min_budget > self.max_budget:
            raise ParameterError("MedSAMix: min_budget must be at most max_budget.")

    def check_experts(self, count: int) -> None:
        raise InputError("MedSAMix searches with your score: call .search(base, models, score, samples=…).")

    def combine(self, experts: list[Tensor], part: MergePart) -> Tensor:
        raise InputError("MedSAMix searches with your score: call .search(base, models, score, samples=…).")

    def search(
        self,
        base: StateDict | None,
        models: Sequence[StateDict],
        score: Score,
        *,
        samples: int,
        report: Callable[[dict[str, Tensor]], float | Mapping[str, float]] | None = None,
        groups: Mapping[str, int] | None = None,
        prefer: Mapping[str, float] | None = None,
        journal: str | Path | None = None,
        progress: Callable[[float, str], None] | None = None,
    ) -> Found:
        """The best configuration for `score`, from at least two `models` (state dicts of one class) and their `base`.

        `samples` is how many labelled samples `score` can be asked for; a budget is always the first so many of them.
        `report` scores on samples that the search does not see, for the models and the result. `groups` maps names to
        groups where the layers should not be found by name. `prefer` weights tasks in the choice from the front. A
        `journal` file keeps every trial, and a search that was interrupted goes on from it.

        Raises InputError for state dicts that do not fit together, a granularity that does not divide the layers, no
        samples, or when every trial fails. A failed trial costs 1.
        """
        if len(models) < 2:
            raise InputError(f"MedSAMix merges at least two models, not {len(models)}.")
        if base is None and {"task_arithmetic", "ties"} & set(self.methods):
            raise InputError("task_arithmetic and ties need the base: give it, or leave them out of methods.")
        if samples < 1:
            raise InputError("MedSAMix needs labelled samples to score on; there are none.")
        if self.n_trials < len(models):
            raise ParameterError(f"MedSAMix: n_trials must be at least {len(models)}, one per model.")
        if samples < 10:
            warnings.warn(f"{samples} samples are few to choose by: the score will be noisy.", GratisWarning)
        if id(report) == id(score):
            warnings.warn("Report on other samples than you search on, or the gain is chosen luck.", GratisWarning)
        _check_fit(base, models)
        names = [name for name, tensor in models[0].items() if tensor.is_floating_point()]
        numbers = layer_groups(names, self.layer_granularity) if groups is None else _given(groups, names)
        space = Space(numbers, self.filters, self.methods, len(models))
        if space.dimensions > MANY and self.n_trials < FEW and self.optimizer != "random":
            warnings.warn(
                f"{self.n_trials} trials for {space.dimensions} numbers are close to random search: choose a larger "
                "layer_granularity.",
                GratisWarning,
            )
        state = _Search(self, space, base, models, score, samples, journal, progress or (lambda f, w: None))
        return state.run(report, prefer)


def layer_groups(names: Sequence[str], granularity: int) -> dict[str, int]:
    """The group of each name: so many layers each; embeddings with the first, final norm and head with the last.

    What belongs to neither the stack of layers nor its ends (the prompt encoder and mask decoder of a segmenter) is one
    more group. Raises InputError where there are no layers or `granularity` does not divide their number.
    """
    counts: dict[str, set[int]] = {}
    tensors: dict[str, int] = {}
    for name in names:
        if found := re.match(r"(.*?\.|)(\d+)\.", name):
            counts.setdefault(found.group(1), set()).add(int(found.group(2)))
            tensors[found.group(1)] = tensors.get(found.group(1), 0) + 1
    if not counts:
        raise InputError("No layers were found among the names: give groups.")
    prefix = max(tensors, key=lambda p: (len(counts[p]), tensors[p]))
    layers = max(counts[prefix]) + 1
    if layers % granularity:
        raise InputError(f"MedSAMix: layer_granularity {granularity} does not divide the {layers} layers.")
    last = layers // granularity - 1
    root = prefix[: -len("layers.")].rpartition(".")[0] + "." if "." in prefix.rstrip(".") else ""
    made = {}
    for name in names:
        if name.startswith(prefix) and name[len(prefix) :].partition(".")[0].isdigit():
            made[name] = int(name[len(prefix) :].partition(".")[0]) // granularity
        elif name.startswith(root):
            made[name] = 0 if re.search(r"embed|wte|wpe", name[len(root) :]) else last
        else:
            made[name] = last if "head" in name.partition(".")[0] else last + 1
    return made


def _given(groups: Mapping[str, int], names: Sequence[str]) -> dict[str, int]:
    missing = [name for name in names if name not in groups]
    if missing:
        raise InputError(f"groups has no entry for {', '.join(missing[:3])}.")
    order = sorted({groups[name] for name in names})
    return {name: order.index(groups[name]) for name in names}


def _check_fit(base: StateDict | None, models: Sequence[StateDict]) -> None:
    first = models[0]
    for place, other in enumerate([*models[1:], *([base] if base is not None else [])], 1):
        which = "the base" if place == len(models) else f"model {place}"
        differing = sorted(first.keys() ^ other.keys())
        if differing:
            raise InputError(f"{which} has other tensors than model 0: {', '.join(differing[:3])}.")
        shapes = [name for name in first if first[name].shape != other[name].shape]
        if shapes:
            raise InputError(f"{which} has other shapes than model 0: {', '.join(shapes[:3])}.")


Configuration = list[dict[str, Any]]
"""Per group: "method", and "sets": for each set of parameters the numbers of every method."""


class Space:
    """The configurations of some groups, sets of parameters, methods and models, and the unit cube that stands for them.

    All numbers are always there, also those of methods not chosen: `G (1 + F (2 N + 3))` dimensions.
    """

    def __init__(self, groups: Mapping[str, int], filters: Sequence[str], methods: Sequence[str], models: int) -> None:
        self.methods, self.models = tuple(methods), models
        self.sets = (*filters, "rest")
        self.members: dict[tuple[int, str], list[str]] = {}
        for name, group in groups.items():
            kind = next((part for part in filters if part in name), "rest")
            self.members.setdefault((group, kind), []).append(name)
        for part in filters:
            if not any(kind == part for _, kind in self.members):
                warnings.warn(f"No tensor's name has {part!r} in it: that filter does nothing.", GratisWarning)
        self.groups = max(groups.values()) + 1
        self.per_set = 2 * models + 3

    @property
    def dimensions(self) -> int:
        """Numbers of a configuration, the method of a group counted as one."""
        return self.groups * (1 + len(self.sets) * self.per_set)

    def single(self, model: int) -> Configuration:
        """The configuration that is one of the models, unmerged (step 3)."""
        numbers = {
            "linear": [float(place == model) for place in range(self.models)],
            "task_arithmetic": 0.0, "ties_mask": 0.1, "ties": 0.0, "slerp": [0.0] * self.models,
        }  # fmt: skip
        method = "linear" if "linear" in self.methods else self.methods[0]
        return [{"method": method, "sets": {kind: dict(numbers) for kind in self.sets}} for _ in range(self.groups)]

    def decode(self, point: Vector) -> Configuration:
        """The configuration at a point of the cube, (dimensions,)."""
        made: Configuration = []
        for row in point.reshape(self.groups, -1):
            choice = min(int(row[0] * len(self.methods)), len(self.methods) - 1)
            sets = {}
            for kind, v in zip(self.sets, row[1:].reshape(len(self.sets), self.per_set).tolist(), strict=True):
                n = self.models
                sets[kind] = {
                    "linear": v[:n], "task_arithmetic": v[n], "ties_mask": v[n + 1] * LARGEST_MASK,
                    "ties": v[n + 2], "slerp": v[n + 3 :],
                }  # fmt: skip
            made.append({"method": self.methods[choice], "sets": sets})
        return made

    def encode(self, configuration: Configuration) -> Vector:
        """The point of a configuration."""
        rows = []
        for group in configuration:
            row = [(self.methods.index(group["method"]) + 0.5) / len(self.methods)]
            for kind in self.sets:
                s = group["sets"][kind]
                row += [*s["linear"], s["task_arithmetic"], s["ties_mask"] / LARGEST_MASK, s["ties"], *s["slerp"]]
            rows.append(row)
        return np.array(rows, np.float64).reshape(-1)

    def one_hot(self, points: Vector) -> Vector:
        """Points (n, dimensions) with each method as one column per choice, for the forest."""
        rows = points.reshape(len(points), self.groups, -1)
        choice = np.minimum((rows[..., :1] * len(self.methods)).astype(int), len(self.methods) - 1)
        hot = (choice == np.arange(len(self.methods))).astype(np.float64)
        return np.concatenate([hot, rows[..., 1:]], -1).reshape(len(points), -1)

    def rules(self, configuration: Configuration) -> tuple[Rule, ...]:
        """How `gratis.merge` does what a configuration says."""
        return tuple(
            self.rule(group, kind, configuration[group]) for group, kind in sorted(self.members)
        )  # fmt: skip

    def rule(self, group: int, kind: str, choice: Mapping[str, Any]) -> Rule:
        """The merge of one set of parameters in one group."""
        names, numbers = tuple(self.members[group, kind]), choice["sets"][kind]
        if choice["method"] == "linear":
            weights = tuple(float(w) for w in numbers["linear"])
            return Rule(names, Average(), weights if sum(weights) > 0 else (1.0,) * self.models)
        ones = (1.0,) * self.models
        if choice["method"] == "task_arithmetic":
            return Rule(names, TaskArithmetic(scale=numbers["task_arithmetic"]), ones)
        if choice["method"] == "ties":
            density = 1 - numbers["ties_mask"]
            return Rule(names, TIES(density=density, scale=numbers["ties"], scope="tensor"), ones)
        # The two models are the group's, the place between them each set's own.
        totals = [sum(choice["sets"][k]["slerp"][m] for k in self.sets) for m in range(self.models)]
        first, second = sorted(range(self.models), key=lambda m: -totals[m])[:2]
        one, two = (math.exp(numbers["slerp"][m]) for m in (first, second))
        return Rule(names, SLERP(t=two / (one + two)), (1.0, 1.0), (first, second))


@dataclass
class Trial:
    """One evaluation."""

    configuration: Configuration
    budget: int
    """Samples."""
    costs: dict[str, float]
    """By task: 1 minus the score."""
    seconds: float
    failed: str = ""
    """Why it failed, where it did."""

    @property
    def cost(self) -> float:
        """Mean over tasks."""
        return sum(self.costs.values()) / len(self.costs)


@dataclass
class Found:
    """What a search came to."""

    configuration: Configuration
    state_dict: dict[str, Tensor]
    rules: tuple[Rule, ...]
    """For `gratis.merge` and merge recipes."""
    trials: list[Trial]
    front: list[Trial]
    """Trials on all samples that no other beats on every task, in the order of the first task."""
    failures: int
    score: dict[str, float]
    """By task, on the search's samples."""
    singles: list[dict[str, float]]
    """The same of each model."""
    reported: dict[str, float] = field(default_factory=dict)
    """By task, on the samples of `report`."""
    reported_singles: list[dict[str, float]] = field(default_factory=list)

    def save(self, path: str | Path) -> Path:
        """Write configuration and trials as JSON."""
        from gratis.contract.files import write_text

        content = {
            "configuration": self.configuration, "score": self.score, "singles": self.singles,
            "reported": self.reported, "reported_singles": self.reported_singles, "failures": self.failures,
            "trials": [{"budget": t.budget, "costs": t.costs, "seconds": t.seconds, "configuration": t.configuration}
                       for t in self.trials],
        }  # fmt: skip
        write_text(Path(path), json.dumps(content, indent=1) + "\n")
        return Path(path)


def expected_improvement(mean: Vector, deviation: Vector, best: float) -> Vector:
    """E[max(best - y, 0)] for y normal: how much lower than `best` a cost is expected to come."""
    from scipy.stats import norm

    safe = np.maximum(deviation, 1e-12)
    z = (best - mean) / safe
    found: Vector = np.where(
        deviation > 1e-12, (best - mean) * norm.cdf(z) + safe * norm.pdf(z), np.maximum(best - mean, 0)
    )
    return found


def scalarised(costs: Vector, weights: Vector) -> Vector:
    """ParEGO: costs (points, tasks), each task between its least and greatest, largest weighted plus a little sum."""
    low, high = costs.min(0), costs.max(0)
    scaled = weights * (costs - low) / np.where(high > low, high - low, 1)
    found: Vector = scaled.max(1) + AUGMENTATION * scaled.sum(1)
    return found


def pareto(costs: Vector) -> list[int]:
    """Rows of (points, tasks) that no other row is at most as dear as on every task and cheaper on one."""
    better = np.all(costs[None] <= costs[:, None], axis=-1) & np.any(costs[None] < costs[:, None], axis=-1)
    return [int(place) for place in np.flatnonzero(~np.any(better, axis=1))]


def brackets(least: int, most: int, eta: int) -> list[list[tuple[int, int]]]:
    """Hyperband: per bracket the rounds (configurations, samples), from many cheap to few dear ones."""
    deepest = int(math.log(most / least) / math.log(eta) + 1e-9)
    made = []
    for s in range(deepest, -1, -1):
        count = math.ceil((deepest + 1) / (s + 1) * eta**s)
        made.append([(max(count // eta**i, 1), round(most / eta ** (s - i))) for i in range(s + 1)])
    return made


class _Forest:
    """Mean and deviation of a regression forest: the law of total variance over trees and leaves."""

    def __init__(self, points: Vector, costs: Vector, seed: int) -> None:
        from sklearn.ensemble import RandomForestRegressor

        self._forest = RandomForestRegressor(
            n_estimators=TREES, min_samples_leaf=LEAF, max_features=FEATURES, random_state=seed, n_jobs=1
        ).fit(points, costs)

    def __call__(self, points: Vector) -> tuple[Vector, Vector]:
        narrow = np.asarray(points, np.float32)
        trees = [tree.tree_ for tree in self._forest.estimators_]
        leaves = [tree.apply(narrow) for tree in trees]
        means = np.stack([tree.value[leaf, 0, 0] for tree, leaf in zip(trees, leaves, strict=True)])
        within = np.stack([tree.impurity[leaf] for tree, leaf in zip(trees, leaves, strict=True)])
        return means.mean(0), np.sqrt(np.maximum(within.mean(0) + means.var(0), 0))


class _Search:
    def __init__(
        self,
        method: MedSAMix,
        space: Space,
        base: StateDict | None,
        models: Sequence[StateDict],
        score: Score,
        samples: int,
        journal: str | Path | None,
        tell: Callable[[float, str], None],
    ) -> None:
        self.method, self.space, self.base, self.models, self.score = method, space, base, models, score
        self.most = min(method.max_budget or samples, samples)
        self.least = min(method.min_budget or max(self.most // 5, 1), self.most)
        self.generator = np.random.default_rng(method.seed)
        self.trials: list[Trial] = []
        self.points: list[Vector] = []
        self.tell = tell
        self.proposals = 0
        self.tasks: list[str] = []
        self.journal = Path(journal) if journal is not None else None
        self.known = self._read_journal()
        self.merged: dict[tuple[int, str], tuple[str, dict[str, Tensor]]] = {}
        self.study: Any = None

    def run(self, report: Any, prefer: Mapping[str, float] | None) -> Found:
        for model in range(len(self.models)):
            self.evaluate(self.space.single(model), self.most)
        rounds = brackets(self.least, self.most, self.method.eta)
        at = 0
        while len(self.trials) < self.method.n_trials:
            self.bracket(rounds[at % len(rounds)])
            at += 1
        if all(trial.failed for trial in self.trials):
            raise InputError(f"Every trial failed, the first because {self.trials[0].failed}.")
        dear = [trial for trial in self.trials if trial.budget == self.most and not trial.failed]
        if not dear:
            raise InputError("Every trial on all samples failed, so that nothing can be recommended.")
        costs = np.array([[trial.costs[task] for task in self.tasks] for trial in dear])
        front = sorted((dear[place] for place in pareto(costs)), key=lambda trial: trial.costs[self.tasks[0]])
        weights = {task: float((prefer or {}).get(task, 1.0 if not prefer else 0.0)) for task in self.tasks}
        best = min(front, key=lambda trial: sum(weights[task] * trial.costs[task] for task in self.tasks))
        made = self.merge(best.configuration)
        found = Found(
            best.configuration, made, self.space.rules(best.configuration), self.trials, front,
            sum(bool(trial.failed) for trial in self.trials),
            {task: 1 - best.costs[task] for task in self.tasks},
            [{task: 1 - trial.costs.get(task, 1.0) for task in self.tasks} for trial in self.trials[: len(self.models)]],
        )  # fmt: skip
        if report is not None:
            found.reported = _named(report(made))
            found.reported_singles = [_named(report(dict(model))) for model in self.models]
        return found

    def bracket(self, rounds: list[tuple[int, int]]) -> None:
        """Propose many, try them on few samples, and go on with the best."""
        weights = self.draw_weights()
        alive: list[tuple[Configuration, Any]] = []
        for number, (count, budget) in enumerate(rounds):
            if number == 0:
                alive = []
                for _ in range(count):
                    if len(self.trials) >= self.method.n_trials:
                        return
                    proposal = self.propose(budget)
                    self.evaluate(*proposal[:1], budget, proposal[1])
                    alive.append(proposal)
                tried = self.trials[-count:]
            else:
                order = np.argsort(scalarised(self.costs_of(tried), weights), kind="stable")[:count]
                chosen = [tried[place].configuration for place in order]
                tried = []
                for configuration in chosen:
                    if len(self.trials) >= self.method.n_trials:
                        return
                    tried.append(self.evaluate(configuration, budget))

    def draw_weights(self) -> Vector:
        drawn: Vector = self.generator.random(len(self.tasks))
        drawn /= drawn.sum()
        return drawn

    def costs_of(self, trials: Sequence[Trial]) -> Vector:
        return np.array([[trial.costs[task] for task in self.tasks] for trial in trials])

    def propose(self, budget: int) -> tuple[Configuration, Any]:
        """A configuration to try next on `budget` samples, and optuna's trial where it was optuna's."""
        self.proposals += 1
        if self.method.optimizer == "optuna":
            return self.ask()
        points = self.generator.random((1000, self.space.dimensions))
        rows = self.rows_for(budget)
        if self.method.optimizer == "random" or self.proposals % 5 == 0 or len(rows) < ENOUGH:
            return self.space.decode(points[0]), None
        seen = np.stack([self.points[row] for row in rows])
        costs = scalarised(self.costs_of([self.trials[row] for row in rows]), self.draw_weights())
        forest = _Forest(self.space.one_hot(seen), costs, int(self.generator.integers(2**31)))

        def gain(at: Vector) -> Vector:
            return expected_improvement(*forest(self.space.one_hot(at)), float(costs.min()))

        starts = seen[np.argsort(costs, kind="stable")[:10]]
        found = np.concatenate([points, self.climbed(starts, gain)])
        return self.space.decode(found[int(gain(found).argmax())]), None

    def rows_for(self, budget: int) -> list[int]:
        """Trials to learn from: those on as many samples, else on the most samples that enough were tried on."""
        by_budget: dict[int, list[int]] = {}
        for row, trial in enumerate(self.trials):
            by_budget.setdefault(trial.budget, []).append(row)
        if len(by_budget.get(budget, [])) >= ENOUGH:
            return by_budget[budget]
        return next((by_budget[b] for b in sorted(by_budget, reverse=True) if len(by_budget[b]) >= ENOUGH), [])

    def climbed(self, starts: Vector, gain: Callable[[Vector], Vector]) -> Vector:
        """Local search from each start: steps along one coordinate at a time, another method among them."""
        here, value = starts.copy(), gain(starts)
        width = self.space.dimensions
        choices = np.arange(width) % (width // self.space.groups) == 0
        for _ in range(10):
            around = np.repeat(here[:, None], 40, 1)
            along = self.generator.integers(width, size=around.shape[:2])
            step = 0.2 * self.generator.standard_normal(around.shape[:2])
            moved = np.take_along_axis(around, along[..., None], 2)[..., 0] + step
            moved = np.where(choices[along], self.generator.random(moved.shape), np.clip(moved, 0, 1))
            np.put_along_axis(around, along[..., None], moved[..., None], 2)
            gains = gain(around.reshape(-1, width)).reshape(around.shape[:2])
            best = gains.argmax(1)
            rows = np.arange(len(here))
            better = gains[rows, best] > value
            if not better.any():
                break
            here[better], value[better] = around[rows, best][better], gains[rows, best][better]
        return here

    def ask(self) -> tuple[Configuration, Any]:
        try:
            import optuna
        except ImportError:
            raise MissingExtraError.of("optuna", "search") from None
        if self.study is None:
            optuna.logging.set_verbosity(optuna.logging.WARNING)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                sampler = optuna.samplers.TPESampler(seed=self.method.seed, multivariate=True)
            self.study = optuna.create_study(sampler=sampler)
        trial = self.study.ask()
        width = self.space.dimensions // self.space.groups
        point = [
            (trial.suggest_categorical(f"{n}", list(range(len(self.space.methods)))) + 0.5) / len(self.space.methods)
            if n % width == 0 else trial.suggest_float(f"{n}", 0.0, 1.0)
            for n in range(self.space.dimensions)
        ]  # fmt: skip
        return self.space.decode(np.array(point)), trial

    def evaluate(self, configuration: Configuration, budget: int, asked: Any = None) -> Trial:
        """Merge, score, note."""
        key = json.dumps([configuration, budget])
        began = time.perf_counter()
        failed, costs = "", self.known.get(key)
        if costs is None:
            try:
                scores = _named(self.score(self.merge(configuration), budget))
                wrong = [task for task, value in scores.items() if not 0 <= value <= 1]
                if wrong:
                    raise ValueError(f"the score of {wrong[0]} is {scores[wrong[0]]}, not within 0 and 1")
                costs = {task: 1 - value for task, value in scores.items()}
            except (ArithmeticError, ValueError, RuntimeError) as error:
                failed = str(error) or type(error).__name__
                costs = dict.fromkeys(self.tasks or ["score"], 1.0)
            self._note(key, costs, failed)
        if not self.tasks or (set(self.tasks) != set(costs) and all(trial.failed for trial in self.trials)):
            self.tasks = list(costs)
            for earlier in self.trials:
                earlier.costs = dict.fromkeys(self.tasks, 1.0)
        trial = Trial(configuration, budget, costs, time.perf_counter() - began, failed)
        self.trials.append(trial)
        self.points.append(self.space.encode(configuration))
        if asked is not None:
            self.study.tell(asked, trial.cost)
        best = min(t.cost for t in self.trials)
        self.tell(len(self.trials) / self.method.n_trials, f"trial {len(self.trials)}, best {1 - best:.4f}")
        return trial

    def merge(self, configuration: Configuration) -> dict[str, Tensor]:
        """The merged state dict; sets of parameters that are as in the trial before are not merged again."""
        whole = dict(self.models[0])
        for (group, kind), names in self.space.members.items():
            rule = self.space.rule(group, kind, configuration[group])
            key = repr((rule.method, rule.weights, rule.experts))
            if self.merged.get((group, kind), ("",))[0] != key:
                parts = [{name: model[name] for name in names} for model in self.models]
                base = {name: self.base[name] for name in names} if self.base is not None else None
                chosen = parts if rule.experts is None else [parts[place] for place in rule.experts]
                self.merged[group, kind] = key, merge_state_dicts(rule.method, chosen, base, rule.weights)
            whole.update(self.merged[group, kind][1])
        if not all(bool(torch.isfinite(tensor).all()) for tensor in whole.values() if tensor.is_floating_point()):
            raise ArithmeticError("the merged weights are not finite")
        return whole

    def _read_journal(self) -> dict[str, dict[str, float]]:
        if self.journal is None or not self.journal.is_file():
            return {}
        found: dict[str, dict[str, float]] = {}
        lines = self.journal.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                if not entry["failed"]:
                    found[entry["key"]] = {str(task): float(cost) for task, cost in entry["costs"].items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                if number == len(lines):
                    break  # a killed search may leave half a line at the end
                raise FileError(f"The journal {self.journal} is damaged in line {number}.") from error
        return found

    def _note(self, key: str, costs: Mapping[str, float], failed: str) -> None:
        if self.journal is not None:
            self.journal.parent.mkdir(parents=True, exist_ok=True)
            with open(self.journal, "a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "costs": dict(costs), "failed": failed}) + "\n")


def _named(score: float | Mapping[str, float]) -> dict[str, float]:
    return {str(k): float(v) for k, v in score.items()} if isinstance(score, Mapping) else {"score": float(score)}
