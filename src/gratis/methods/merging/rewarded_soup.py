"""Average fine-tunes by a user's preferences over what each is good at.

A. Rame et al., "Rewarded soups: towards Pareto-optimal alignment by interpolating weights fine-tuned on diverse rewards",
NeurIPS 2023.
"""

from __future__ import annotations

from torch import Tensor

from gratis.contract.card import Card, Claim
from gratis.contract.errors import InputError
from gratis.contract.method import Merge, MergePart


class RewardedSoup(Merge):
    """The mean of the experts' weights under preferences: the weights of the call, none negative, summing to 1."""

    card = Card(
        title="Rewarded soups: towards Pareto-optimal alignment by interpolating weights",
        authors="Rame et al.",
        year=2023,
        paper="NeurIPS 2023, arXiv:2306.04488",
        acts_on="checkpoints",
        free_of=("training", "data", "base model"),
        summary="one model for every mixture of preferences, without training again",
        examples={},
        limits="The preferences are the weights of the call; without any they are equal.",
        claims=(
            Claim(
                name="equal preferences serve three ways of showing digits better than the base does",
                task="digits-merging",
                metric="accuracy",
                compare="difference",
                at_least=0.05,
                parameters={},
            ),
        ),
    )
    needs_base = False

    def combine(self, experts: list[Tensor], part: MergePart) -> Tensor:
        total = sum(part.weights)
        equal = all(weight == 1 for weight in part.weights)
        if min(part.weights) < 0 or not (equal or abs(total - 1) < 1e-6):
            raise InputError(
                f"RewardedSoup: preferences must not be negative and must sum to 1, not {list(part.weights)}."
            )
        merged = experts[0].mul_(part.weights[0] / total)
        for expert, weight in zip(experts[1:], part.weights[1:], strict=True):
            merged.add_(expert, alpha=weight / total)
        return merged
