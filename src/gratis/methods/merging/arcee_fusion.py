"""Take from another model the entries that changed most and matter most.

The Arcee fusion rule of the merging community (as in mergekit): importance is the absolute difference times the row's
Kullback-Leibler divergence between softmaxed rows; entries above the median plus 1.5 interquartile ranges are taken.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from gratis.contract.card import Card, Claim
from gratis.contract.errors import InputError
from gratis.contract.method import Merge, MergePart
from gratis.contract.parameters import param


class ArceeFusion(Merge):
    """The base with those entries of the one expert whose importance is an outlier within its tensor."""

    card = Card(
        title="Arcee Fusion",
        authors="the merging community",
        year=2025,
        paper="mergekit's documentation",
        acts_on="checkpoints",
        free_of=("training", "data"),
        summary="a model that takes from another only what stands out",
        examples={},
        limits="Exactly one expert. Quantiles are exact, by selection.",
        claims=(
            Claim(
                name="a base that takes what stands out of one expert serves its digits better",
                task="digits-merging",
                metric="accuracy",
                compare="difference",
                at_least=0.02,
                task_parameters={"ways": 1},
                parameters={},
            ),
        ),
    )
    differences = False

    ranges: float = param(1.5, at_least=0, help="interquartile ranges above the median from which an entry is taken")

    def check_experts(self, count: int) -> None:
        if count != 1:
            raise InputError(f"ArceeFusion fuses one expert into the base, not {count}.")

    def unit(self, tensor: str, shape: tuple[int, ...]) -> Literal["tensor"]:
        return "tensor"

    def combine(self, experts: list[Tensor], part: MergePart) -> Tensor:
        assert part.base is not None
        width = part.shape[-1] if part.shape else 1
        expert, base = experts[0].view(-1, width), part.base.view(-1, width)
        p, q = expert.log_softmax(-1), base.log_softmax(-1)
        divergence = (p.exp() * (p - q)).sum(-1, keepdim=True).clamp_min_(0)
        importance = ((expert - base).abs() * divergence).flatten()
        lower, middle, upper = (quantile(importance, share) for share in (0.25, 0.5, 0.75))
        taken = importance > middle + self.ranges * (upper - lower)
        return torch.where(taken, experts[0], part.base)


def quantile(values: Tensor, share: float) -> float:
    """The quantile of flat values, interpolated linearly between neighbours, by selection."""
    place = share * (len(values) - 1)
    low, high = math.floor(place), math.ceil(place)
    first = float(values.kthvalue(low + 1).values)
    second = float(values.kthvalue(high + 1).values) if high > low else first
    return first + (place - low) * (second - first)
