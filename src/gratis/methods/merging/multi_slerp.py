"""Spherical interpolation between any number of models: one step in the tangent space at their normalised mean.

The multi-SLERP rule of the merging community (as in mergekit).
"""

from __future__ import annotations

from torch import Tensor

from gratis.contract.card import Card, Claim
from gratis.contract.method import Merge, MergePart
from gratis.methods.merging.karcher import combination, inner_products, spherical_mean


class MultiSLERP(Merge):
    """The experts' directions averaged in the tangent space at their mean, with the weighted mean of their lengths."""

    card = Card(
        title="Multi-SLERP",
        authors="the merging community",
        year=2025,
        paper="mergekit's documentation",
        acts_on="checkpoints",
        free_of=("training", "data", "base model"),
        summary="any number of models into one, each tensor keeping a length between theirs",
        examples={},
        limits="Tensors that point opposite ways have no mean on the sphere: they are averaged.",
        claims=(
            Claim(
                name="it is as good as the mean of three experts, within 0.05",
                task="digits-merging",
                metric="accuracy",
                compare="difference",
                at_least=-0.05,
                against="average",
                parameters={},
            ),
        ),
    )
    needs_base = False
    measures = True

    def measure(self, experts: list[Tensor], part: MergePart) -> Tensor:
        return inner_products(experts)

    def combine(self, experts: list[Tensor], part: MergePart) -> Tensor:
        return combination(experts, spherical_mean(part.measured, part.weights, iterations=1))
