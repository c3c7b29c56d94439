"""Let parameters compete within each task and between tasks, and keep the winners.

G. Du et al., "Parameter Competition Balancing for Model Merging", NeurIPS 2024. Over each task's whole vector: a = |tau|
clamped at its 0.01 % tails, s = minmax(a)^2, b = exp(T s) tanh(tau_i sum_j tau_j), c = minmax of the largest share of b;
the merged change is `sum sign(tau) a c / sum c`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gratis.contract.card import Card, Claim
from gratis.contract.method import Cutoff, Merge, MergePart, Survey
from gratis.contract.parameters import param

TAILS = 1e-4
"""Share of each tail that magnitudes are clamped at."""


class PCB(Merge):
    """Changes weighted by how large they are within their task, and how much the other tasks agree."""

    card = Card(
        title="Parameter Competition Balancing for Model Merging",
        authors="Du et al.",
        year=2024,
        paper="NeurIPS 2024, arXiv:2410.02396",
        acts_on="checkpoints",
        free_of=("training", "data"),
        summary="one model from several fine-tunes, of the parameters that win the competition between them",
        unchanged_when={"scale": 0.0},
        examples={"density": 0.1},
        limits="Scores of entries that the sum opposes are negative and never win.",
        claims=(
            Claim(
                name="one model serves three ways of showing digits better than the base does",
                task="digits-merging",
                metric="accuracy",
                compare="difference",
                at_least=0.05,
                parameters={"density": 0.2},
            ),
        ),
    )

    density: float = param(
        0.1, above=0, at_most=1, help="share of each task's entries that win (rho)", search=(0.05, 0.5)
    )
    scale: float = param(1.2, at_least=0, help="factor of the merged change (lambda)", search=(0.8, 1.5))

    def survey(self, survey: Survey) -> list[tuple[float, ...]]:
        """For every expert: the lower and the upper clamp of its magnitudes, the winners' smallest and largest score."""
        found: list[tuple[float, ...]] = []
        for number in range(survey.experts):

            def magnitude(experts: list[Tensor], part: MergePart, n: int = number) -> Tensor:
                return experts[n].abs()

            low = _one(survey.cutoffs(magnitude, 1 - TAILS, "global"))
            high = _one(survey.cutoffs(magnitude, TAILS, "global"))

            def score(
                experts: list[Tensor], part: MergePart, n: int = number, low: float = low, high: float = high
            ) -> Tensor:
                return scores(experts, n, low, high).clamp_min_(0)

            found.append(
                (
                    low,
                    high,
                    _one(survey.cutoffs(score, self.density, "global")),
                    _one(survey.cutoffs(score, 1e-30, "global")),
                )
            )
        return found

    def combine(self, experts: list[Tensor], part: MergePart) -> Tensor:
        merged, total = torch.zeros_like(experts[0]), torch.zeros_like(experts[0])
        for number, (low, high, least, most) in enumerate(part.known):
            won = scores(experts, number, low, high).clamp_min_(0).sub_(least).clamp_min_(0)
            won = won.div_(most - least) if most > least else won
            total.add_(won)
            merged.add_(experts[number].sign() * experts[number].abs().clamp(low, high) * won)
        return merged.div_(total.clamp_min_(1e-12)).mul_(self.scale)


def scores(experts: list[Tensor], number: int, low: float, high: float) -> Tensor:
    """B of expert `number`: exp(T s) * tanh(tau * sum of all tau)."""
    own = experts[number]
    total = experts[0].clone()
    for expert in experts[1:]:
        total.add_(expert)
    within = own.abs().clamp_(low, high).sub_(low).div_(high - low if high > low else 1.0).square_()
    return within.mul_(len(experts)).exp_().mul_(total.mul_(own).tanh_())


def _one(cutoffs: dict[str, Cutoff]) -> float:
    """The magnitude that all tensors of one global cutoff share."""
    return next(iter(cutoffs.values())).magnitude if cutoffs else 0.0
