"""Average the weights of several fine-tunes: the model soup.

M. Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing
inference time", ICML 2022 (uniform soup).
"""

from __future__ import annotations

from torch import Tensor

from gratis.contract.card import Card, Claim
from gratis.contract.errors import InputError
from gratis.contract.method import Merge, MergePart
from gratis.contract.parameters import param


class Average(Merge):
    """The weighted mean of the experts' weights; the plain baseline of every other merge."""

    card = Card(
        title="Model soups: averaging weights of multiple fine-tuned models improves accuracy",
        authors="Wortsman et al.",
        year=2022,
        paper="ICML 2022, arXiv:2203.05482",
        acts_on="checkpoints",
        free_of=("training", "data", "base model"),
        summary="one model from several fine-tunes, by their mean",
        limits="Experts must descend from one model.",
        claims=(
            Claim(
                name="one model serves three ways of showing digits better than the base does",
                task="digits-merging",
                metric="accuracy",
                compare="difference",
                at_least=0.05,
            ),
        ),
    )
    needs_base = False

    normalize: bool = param(True, help="divide by the sum of the weights; without it the result is a weighted sum")

    def combine(self, experts: list[Tensor], part: MergePart) -> Tensor:
        total = sum(part.weights) if self.normalize else 1.0
        if total == 0:
            raise InputError("Average: the weights sum to 0, so there is no mean.")
        merged = experts[0].mul_(part.weights[0] / total)
        for expert, weight in zip(experts[1:], part.weights[1:], strict=True):
            merged.add_(expert, alpha=weight / total)
        return merged
