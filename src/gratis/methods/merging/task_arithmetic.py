"""Add what each fine-tune learned to the base model.

G. Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023.
"""

from __future__ import annotations

from torch import Tensor

from gratis.contract.card import Card, Claim
from gratis.contract.errors import InputError
from gratis.contract.method import Merge, MergePart
from gratis.contract.parameters import param


class TaskArithmetic(Merge):
    """base + scale * sum of weighted task vectors, where a task vector is a fine-tune minus its base."""

    card = Card(
        title="Editing Models with Task Arithmetic",
        authors="Ilharco, Ribeiro, Wortsman, Gururangan, Schmidt, Hajishirzi, Farhadi",
        year=2023,
        seed=26,
        paper="ICLR 2023, arXiv:2212.04089",
        acts_on="checkpoints",
        free_of=("training", "data"),
        summary="one model from several fine-tunes, by adding their differences to the base",
        unchanged_when={"scale": 0.0},
        examples={"scale": 0.4},
        limits="The scale must be tuned to the number of experts; far too large a sum breaks the model.",
        claims=(
            Claim(
                name="one model serves three ways of showing digits better than the base does",
                task="digits-merging",
                metric="accuracy",
                compare="difference",
                at_least=0.05,
                parameters={"scale": 0.4},
            ),
        ),
    )

    scale: float = param(0.3, at_least=0, help="factor of the sum of task vectors (lambda)", search=(0.05, 1.5))

    normalize: bool = param(
        False, help="divide by the sum of the weights, as mergekit can: the mean of the differences"
    )

    def combine(self, experts: list[Tensor], part: MergePart) -> Tensor:
        total = sum(part.weights)
        if self.normalize and total == 0:
            raise InputError("TaskArithmetic: the weights sum to 0, so they cannot be normalised.")
        if self.normalize:
            return weighted_sum(experts, part.weights).mul_(self.scale / total)
        return weighted_sum(experts, part.weights).mul_(self.scale)


def weighted_sum(deltas: list[Tensor], weights: tuple[float, ...]) -> Tensor:
    """Sum of weight times delta, in place of the first delta."""
    total = deltas[0] if weights[0] == 1 else deltas[0].mul_(weights[0])
    for delta, weight in zip(deltas[1:], weights[1:], strict=True):
        total.add_(delta, alpha=weight)
    return total
