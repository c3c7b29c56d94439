"""Keep what one expert alone changed, and average what several did.

RAM as in fusion-bench, with its variant RAM+, which strengthens the changes of one expert alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gratis.contract.card import Card, Claim
from gratis.contract.method import Merge, MergePart, Survey
from gratis.contract.parameters import param

CHANGED = 1e-5
"""Magnitude above which a weight counts as changed."""


class RAM(Merge):
    """Unique changes as they are, shared ones by the mean of the experts that made them."""

    card = Card(
        title="RAM and RAM+",
        authors="",
        year=2026,
        paper="fusion-bench's documentation",
        acts_on="checkpoints",
        free_of=("training", "data"),
        summary="one model from several sparse fine-tunes, without watering down what only one of them changed",
        unchanged_when={"scale": 0.0},
        examples={"scale": 1.0},
        differs="With boost, rho is an expert's shared changes divided by its unique ones, which is a reading of ours.",
        limits="For sparse changes, as reinforcement learning makes them; dense ones are all shared, which gives the mean.",
        claims=(
            Claim(
                name="changes are shared throughout, so it is as good as the mean, within 0.02",
                task="digits-merging",
                metric="accuracy",
                compare="difference",
                at_least=-0.02,
                against="average",
                parameters={},
            ),
        ),
    )

    boost: float = param(0.0, at_least=0, help="strength r of RAM+: 0 is RAM, the paper's RAM+ has 0.1")
    ceiling: float = param(0.2, at_least=0, help="largest ratio of shared to unique changes that counts (a)")
    scale: float = param(1.0, at_least=0, help="factor of the merged change (lambda)", search=(0.3, 2.0))

    def survey(self, survey: Survey) -> list[float]:
        """The factor of every expert's unique changes."""
        if not self.boost:
            return [1.0] * survey.experts

        def counts(experts: list[Tensor], part: MergePart) -> Tensor:
            changed = torch.stack([expert.abs() > CHANGED for expert in experts])
            unique = changed & (changed.sum(0) == 1)
            return torch.cat([changed.sum(1), unique.sum(1)]).double()

        totals = [sum(column) for column in zip(*survey.sums(counts).values(), strict=True)]
        factors = []
        for changed, unique in zip(totals[: survey.experts], totals[survey.experts :], strict=True):
            ratio = (changed - unique) / unique if unique else self.ceiling
            factors.append(1 + self.boost * min(ratio, self.ceiling))
        return factors

    def combine(self, experts: list[Tensor], part: MergePart) -> Tensor:
        count = torch.zeros_like(experts[0])
        for expert in experts:
            count.add_(expert.abs() > CHANGED)
        unique = count == 1
        merged = torch.zeros_like(count)
        for expert, factor, weight in zip(experts, part.known, part.weights, strict=True):
            change = expert.masked_fill_(expert.abs() <= CHANGED, 0.0).mul_(weight)
            merged.add_(torch.where(unique, change * factor, change) if factor != 1 else change)
        return merged.div_(count.clamp_min_(1.0)).mul_(self.scale)
