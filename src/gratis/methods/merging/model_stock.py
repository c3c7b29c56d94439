"""Average a few fine-tunes and move back towards their base, as far as their disagreement says.

D.-H. Jang, S. Yun and D. Han, "Model Stock: All we need is just a few fine-tuned models", ECCV 2024. With the mean cosine
c between the differences of T experts to the base, `theta_0 + t mean(tau_i)` with `t = T c / (1 + (T - 1) c)`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gratis.contract.card import Card, Claim
from gratis.contract.errors import InputError
from gratis.contract.method import Merge, MergePart
from gratis.contract.parameters import param


class ModelStock(Merge):
    """The mean of the experts' changes, shortened tensor by tensor where they point different ways."""

    card = Card(
        title="Model Stock: All we need is just a few fine-tuned models",
        authors="Jang, Yun, Han",
        year=2024,
        paper="ECCV 2024, arXiv:2403.19522",
        acts_on="checkpoints",
        free_of=("training", "data"),
        summary="a few fine-tunes averaged, and pulled back to the base where they disagree",
        unchanged_when={"scale": 0.0},
        examples={"clamp": True},
        differs="The ratio is kept between 0 and 1; released code lets it leave that range where changes are opposed.",
        limits="For runs of one fine-tuning; experts of different tasks are nearly orthogonal, which returns the base.",
        claims=(
            Claim(
                name="experts of different tasks disagree, so it stays near the base: at most 0.05 above it",
                task="digits-merging",
                metric="accuracy",
                compare="difference",
                at_most=0.05,
                parameters={},
            ),
        ),
    )
    measures = True

    clamp: bool = param(True, help="keep the ratio between 0 and 1: beyond, it extrapolates and explodes")
    scale: float = param(1.0, at_least=0, help="factor of the merged change (lambda)", search=(0.3, 2.0))

    def check_experts(self, count: int) -> None:
        if count < 2:
            raise InputError("ModelStock compares fine-tunes with each other: give at least two.")

    def measure(self, experts: list[Tensor], part: MergePart) -> Tensor:
        stacked = torch.stack([expert.double() for expert in experts])
        return (stacked @ stacked.T).flatten()

    def combine(self, experts: list[Tensor], part: MergePart) -> Tensor:
        count = len(experts)
        ratio = stock_ratio(part.measured, count, self.clamp) * self.scale / count
        merged = experts[0]
        for expert in experts[1:]:
            merged.add_(expert)
        return merged.mul_(ratio)


def stock_ratio(products: tuple[float, ...], count: int, clamp: bool) -> float:
    """The ratio t, from the inner products of all pairs, row by row."""
    cosines = []
    for i in range(count):
        for j in range(i + 1, count):
            size = math.sqrt(products[i * count + i] * products[j * count + j])
            cosines.append(products[i * count + j] / size if size > 0 else 0.0)
    mean = sum(cosines) / len(cosines)
    below = 1 + (count - 1) * mean
    if not clamp:
        if below == 0:
            raise InputError("ModelStock: the changes cancel exactly, so the ratio is infinite; leave clamp on.")
        return count * mean / below
    return max(0.0, min(1.0, count * mean / below)) if below > 0 else 0.0
