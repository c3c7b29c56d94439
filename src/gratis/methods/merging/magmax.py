"""Take every weight's largest change.

D. Marczak, B. Twardowski, T. Trzcinski and S. Cygert, "MagMax: Leveraging Model Merging for Seamless Continual Learning",
ECCV 2024.
"""

from __future__ import annotations

from torch import Tensor

from gratis.contract.card import Card, Claim
from gratis.contract.method import Merge, MergePart
from gratis.contract.parameters import param


class MagMax(Merge):
    """Of the experts' changes to a weight the one with the largest magnitude; the later expert wins ties."""

    card = Card(
        title="MagMax: Leveraging Model Merging for Seamless Continual Learning",
        authors="Marczak, Twardowski, Trzcinski, Cygert",
        year=2024,
        paper="ECCV 2024, arXiv:2407.06322",
        acts_on="checkpoints",
        free_of=("training", "data"),
        summary="one model from several fine-tunes: every weight's largest change",
        unchanged_when={"scale": 0.0},
        examples={"scale": 0.5},
        limits="Made for experts that were tuned one after the other; unrelated ones conflict.",
        claims=(
            Claim(
                name="one model serves three ways of showing digits better than the base does",
                task="digits-merging",
                metric="accuracy",
                compare="difference",
                at_least=0.05,
                parameters={"scale": 1.0},
            ),
        ),
    )

    scale: float = param(0.5, at_least=0, help="factor of the merged change (lambda)", search=(0.1, 1.5))

    def combine(self, experts: list[Tensor], part: MergePart) -> Tensor:
        for expert, weight in zip(experts, part.weights, strict=True):
            if weight != 1:
                expert.mul_(weight)
        merged = experts[0]
        for expert in experts[1:]:
            later = (expert.abs() - merged.abs()).sign_().add_(1).sign_()
            merged = merged.add_(expert.sub_(merged).mul_(later))
        return merged.mul_(self.scale)
