"""The best that each budget buys: over models, samples, lengths and sparse attention."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gratis.contract.errors import ParameterError
from gratis.planning.cost import Attention, Cost, Shape, coverage, generation_cost, mean_cost
from gratis.planning.hardware import Hardware
from gratis.planning.traces import Trace
from gratis.trials.statistics import paired_interval

POINTS, SMOOTHED = 100, 3
"""Budgets of a frontier, and the width of the moving average over them."""


@dataclass(frozen=True)
class Option:
    """One way to answer every question, with what it costs and how often it is right."""

    model: str
    trials: int
    limit: int | None
    """Tokens at which generations are cut off; None leaves them whole."""
    attention: Attention
    assumed: bool
    """Whether the scores are those of dense attention, taken to hold for the sparse one."""
    costs: tuple[Cost, ...]
    """Per question."""
    scores: tuple[float, ...]
    """Per question: the probability that one of the trials is right."""
    length: int
    """Longest generation that was recorded."""

    @property
    def cost(self) -> Cost:
        """Mean over questions."""
        return mean_cost(self.costs)

    @property
    def accuracy(self) -> float:
        """Mean over questions."""
        return float(np.mean(self.scores))

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the accuracy, by drawing questions again; None for a single question."""
        return paired_interval(self.scores, [0.0] * len(self.scores))

    def generation(self) -> dict[str, Any]:
        """Arguments of `generate`, and of the attention method where one is needed."""
        chosen: dict[str, Any] = {"max_new_tokens": self.limit or self.length, "num_return_sequences": self.trials}
        chosen["do_sample"] = self.trials > 1
        if self.attention.budget is not None:
            window, block = self.attention.window, self.attention.block
            settings: dict[str, Any] = {"blocks": max(self.attention.blocks, 1), "block": block, "window": window}
            if block == 1:
                settings = {"choose": "token", **settings}
            chosen["attach"] = {"block-top-k": settings}
        return chosen


@dataclass(frozen=True)
class Choice:
    """What to do with a budget."""

    budget: float
    """eFLOP per question."""
    option: Option


@dataclass(frozen=True)
class Plan:
    """All options, and what each budget buys."""

    hardware: Hardware
    options: tuple[Option, ...]
    budgets: NDArray[np.float64]
    """(points,) eFLOP per question."""
    per_question: Mapping[str, NDArray[np.float64]]
    """Accuracy by model if every question could have its own best option: an upper bound."""
    single: Mapping[str, NDArray[np.float64]]
    """Accuracy by model with one option for all questions."""
    choices: tuple[Choice, ...]
    """The single options that are best from some budget on, cheapest first."""
    skipped: tuple[str, ...] = field(default=())
    """Models that had no traces, or traces whose model was not given."""

    def best(self, budget: float) -> Option:
        """The option with the highest accuracy whose mean cost is within `budget` eFLOP. Raises ParameterError."""
        within = [choice for choice in self.choices if choice.option.cost.total(self.hardware.intensity) <= budget]
        if not within:
            cheapest = min(option.cost.total(self.hardware.intensity) for option in self.options)
            raise ParameterError(
                f"Nothing is as cheap as {self.hardware.seconds(budget):.3g} s per question on {self.hardware.name}: the "
                f"cheapest option takes {self.hardware.seconds(cheapest):.3g} s."
            )
        return within[-1].option


def plan(
    traces: Sequence[Trace],
    shapes: Mapping[str, Shape],
    hardware: Hardware,
    *,
    trials: Sequence[int] | None = None,
    sparse: Sequence[Attention] = (),
    element_bytes: float = 2.0,
    batch: float | None = None,
) -> Plan:
    """Cost and accuracy of every option, and the frontier of what budgets buy.

    `shapes` says what each model of the traces is. Options are best-of-n with a verifier for every n of `trials`
    (powers of two up to what was recorded, for None), and single generations cut off at the limits of the traces. For
    every attention of `sparse` the same is added with the scores of dense traces, marked as assumed: measure them where
    it matters. Raises ParameterError where models were not asked the same questions, or n is more than was recorded.
    """
    groups: dict[tuple[str, Attention], list[Trace]] = defaultdict(list)
    for trace in traces:
        if trace.model in shapes:
            groups[trace.model, Attention(trace.budget, trace.block)].append(trace)
    if not groups:
        raise ParameterError(
            f"No trace is of a given model: traces are of {', '.join(sorted({t.model for t in traces})) or 'none'}, models "
            f"are {', '.join(sorted(shapes)) or 'none'}."
        )
    asked = {tuple(sorted(trace.question for trace in group)) for group in groups.values()}
    if len(asked) > 1:
        raise ParameterError("The models were not asked the same questions, so their accuracies cannot be compared.")
    options: list[Option] = []
    for (model, attention), group in groups.items():
        group.sort(key=lambda trace: trace.question)
        added = [(attention, False)] + ([(other, True) for other in sparse] if attention.budget is None else [])
        for (kind, assumed), (n, limit) in itertools.product(added, _samplings(group, trials)):
            costs = tuple(
                generation_cost(
                    shapes[model], trace.prompt, np.minimum(trace.lengths, limit or max(trace.lengths)), n, kind,
                    element_bytes=element_bytes, batch=batch,
                )
                for trace in group
            )  # fmt: skip
            options.append(Option(model, n, limit, kind, assumed, costs, _scores(group, n, limit), _longest(group)))
    return _frontier(options, hardware, tuple(sorted({t.model for t in traces} ^ set(shapes))))


def _samplings(group: Sequence[Trace], trials: Sequence[int] | None) -> list[tuple[int, int | None]]:
    """Numbers of trials with whole generations, and limits of tokens with one."""
    recorded = min(len(trace.lengths) for trace in group)
    if trials is None:
        trials = [2**i for i in range(recorded.bit_length())]
    if any(n < 1 or n > recorded for n in trials):
        raise ParameterError(
            f"trials must be between 1 and {recorded}, the generations that were recorded for every question."
        )
    limits = sorted(set.intersection(*(set(trace.scores_at) for trace in group)))
    return [*((n, None) for n in trials), *((1, limit) for limit in limits)]


def _scores(group: Sequence[Trace], trials: int, limit: int | None) -> tuple[float, ...]:
    chosen = [trace.scores if limit is None else trace.scores_at[limit] for trace in group]
    return tuple(coverage(sum(scores), len(scores), trials) for scores in chosen)


def _longest(group: Sequence[Trace]) -> int:
    return max(max(trace.lengths) for trace in group)


def _frontier(options: list[Option], hardware: Hardware, skipped: tuple[str, ...]) -> Plan:
    intensity = hardware.intensity
    each = [[cost.total(intensity) for cost in option.costs] for option in options]
    budgets = np.geomspace(min(map(min, each)), max(map(max, each)), POINTS)
    per_question, single = {}, {}
    for model in dict.fromkeys(option.model for option in options):
        own = [i for i, option in enumerate(options) if option.model == model]
        costs = np.array([each[i] for i in own])
        scores = np.array([options[i].scores for i in own])
        affordable = np.where(costs[None] <= budgets[:, None, None], scores[None], 0.0)
        per_question[model] = _smoothed(affordable.max(1).mean(1))
        means, accuracies = costs.mean(1), scores.mean(1)
        single[model] = np.where(means[None] <= budgets[:, None], accuracies[None], 0.0).max(1)
    choices: list[Choice] = []
    for option in sorted(options, key=lambda option: (option.cost.total(intensity), -option.accuracy)):
        if not choices or option.accuracy > choices[-1].option.accuracy:
            choices.append(Choice(option.cost.total(intensity), option))
    return Plan(hardware, tuple(options), budgets, per_question, single, tuple(choices), skipped)


def _smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    padded = np.pad(values, SMOOTHED // 2, mode="edge")
    return np.convolve(padded, np.full(SMOOTHED, 1 / SMOOTHED), mode="valid")
