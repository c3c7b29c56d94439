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
        divergence = row_divergence(expert, base)
        importance = ((expert - base).abs() * divergence).flatten()
        lower, middle, upper = (quantile(importance, share) for share in (0.25, 0.5, 0.75))
        taken = importance > middle + self.ranges * (upper - lower)
        return torch.where(taken, experts[0], part.base)


def row_divergence(expert: Tensor, base: Tensor) -> Tensor:
    """(rows, 1): KL divergence of softmaxed rows, in float64: of rows that nearly agree float32 leaves mostly rounding."""
    found, rows = [], max(1_000_000 // max(expert.shape[-1], 1), 1)
    for one, other in zip(expert.split(rows), base.split(rows), strict=True):
        p, q = one.double().log_softmax(-1), other.double().log_softmax(-1)
        found.append((p.exp() * (p - q)).sum(-1, keepdim=True).clamp_min_(0).float())
    return torch.cat(found)


def quantile(values: Tensor, share: float) -> float:
    """The quantile of flat values, interpolated linearly between neighbours, by selection."""
    place = share * (len(values) - 1)
    low, high = math.floor(place), math.ceil(place)
    first = float(values.kthvalue(low + 1).values)
    second = float(values.kthvalue(high + 1).values) if high > low else first
    return first + (place - low) * (second - first)
