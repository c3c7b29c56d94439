"""Which tensors of a merge are combined in which way."""

from __future__ import annotations

import fnmatch
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gratis.contract.errors import GratisWarning, InputError
from gratis.contract.method import Merge
from gratis.subjects.merge_inputs import checked_weights


@dataclass(frozen=True)
class Rule:
    """How some tensors are merged. Of several rules the first that names a tensor holds for it."""

    tensors: tuple[str, ...]
    """Names, with `*` and `?` as wildcards."""
    method: Merge
    weights: tuple[float, ...] | None = None
    """One per expert of the rule; None: those of the whole merge."""
    experts: tuple[int, ...] | None = None
    """Places of the experts that are used, in their order; None: all."""
    each: tuple[Merge, ...] = ()
    """The method with the parameters of each expert, where these differ (densities)."""


@dataclass(frozen=True)
class Portion:
    """Tensors of a merge that are combined in one way."""

    method: Merge
    names: tuple[str, ...]
    weights: tuple[float, ...]
    experts: tuple[int, ...]
    each: tuple[Merge, ...] = ()


def portions(
    method: Merge, rules: Sequence[Rule], names: Iterable[str], weights: tuple[float, ...]
) -> tuple[Portion, ...]:
    """Which tensors are merged in which way: rules first, `method` for the rest. A rule without tensors warns."""
    exact: dict[str, int] = {}
    wild: list[tuple[int, re.Pattern[str]]] = []
    for number, rule in enumerate(rules):
        for name in rule.tensors:
            if any(sign in name for sign in "*?["):
                wild.append((number, re.compile(fnmatch.translate(name))))
            else:
                exact.setdefault(name, number)
    found: dict[int, list[str]] = {}
    for name in names:
        first = min(exact.get(name, len(rules)), next((n for n, pattern in wild if pattern.match(name)), len(rules)))
        found.setdefault(first, []).append(name)
    for number, rule in enumerate(rules):
        if number not in found:
            warnings.warn(f"No tensor is called {', '.join(rule.tensors[:3])}: that rule does nothing.", GratisWarning)
    every = tuple(range(len(weights)))
    made = []
    for number, tensors in sorted(found.items()):
        rule = rules[number] if number < len(rules) else Rule((), method)
        chosen = every if rule.experts is None else rule.experts
        if not chosen or not all(0 <= place < len(weights) for place in chosen) or len(set(chosen)) != len(chosen):
            raise InputError(f"A rule names experts {list(chosen)}; there are {len(weights)}, from 0 on.")
        own = tuple(weights[place] for place in chosen) if rule.weights is None else rule.weights
        rule.method.check_experts(len(chosen))
        if rule.each and len(rule.each) != len(chosen):
            raise InputError(f"A rule has {len(chosen)} experts but parameters for {len(rule.each)}.")
        made.append(Portion(rule.method, tuple(tensors), checked_weights(own, len(chosen)), chosen, rule.each))
    return tuple(made)
