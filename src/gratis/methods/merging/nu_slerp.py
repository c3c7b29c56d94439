"""Spherical interpolation between two models by their weights: whole tensors, rows or columns.

NuSLERP of the merging community (as in mergekit): SLERP with `t = w_2 / (w_1 + w_2)`, of weights or of differences.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gratis.contract.card import Card, Claim
from gratis.contract.errors import InputError
from gratis.contract.method import Merge, MergePart
from gratis.contract.parameters import param
from gratis.methods.merging.slerp import PARALLEL


class NuSLERP(Merge):
    """A point on the arc between two models; where on it, the weights of the call say."""

    card = Card(
        title="NuSLERP",
        authors="the merging community",
        year=2024,
        paper="mergekit's documentation",
        acts_on="checkpoints",
        free_of=("training", "data"),
        summary="two models into one, along the arcs between their tensors, rows or columns",
        examples={},
        limits="Exactly two models.",
        claims=(
            Claim(
                name="between two experts it is as good as their mean, within 0.05",
                task="digits-merging",
                metric="accuracy",
                compare="difference",
                at_least=-0.05,
                against="average",
                task_parameters={"ways": 2},
                parameters={},
            ),
        ),
    )

    of: Literal["weights", "differences"] = param(
        "weights", help="interpolate the weights, or the differences to the base"
    )
    along: Literal["tensor", "row", "column"] = param("tensor", help="what is one vector")

    @property
    def needs_base(self) -> bool:  # type: ignore[override]
        """Whether differences are interpolated."""
        return self.of == "differences"

    def check_experts(self, count: int) -> None:
        if count != 2:
            raise InputError(f"NuSLERP interpolates between two models, not {count}.")

    def unit(self, tensor: str, shape: tuple[int, ...]) -> Literal["row", "tensor"]:
        return "row" if self.along == "row" and len(shape) > 1 else "tensor"

    def combine(self, experts: list[Tensor], part: MergePart) -> Tensor:
        total = sum(part.weights)
        if total == 0:
            raise InputError("NuSLERP: the weights sum to 0, so they name no point between the models.")
        if self.along == "tensor" or len(part.shape) < 2:
            a, b = (expert.view(1, -1) for expert in experts)
        else:
            width = 1
            for size in part.shape[1:]:
                width *= size
            a, b = (expert.view(-1, width) for expert in experts)
        across = 0 if self.along == "column" and len(part.shape) > 1 else 1
        return interpolate(a, b, part.weights[1] / total, across).flatten()


def interpolate(a: Tensor, b: Tensor, t: float, dim: int) -> Tensor:
    """SLERP of the vectors along `dim` of two matrices; linear where they are nearly parallel."""
    x, y = a.double(), b.double()
    sizes = x.norm(dim=dim, keepdim=True) * y.norm(dim=dim, keepdim=True)
    cosines = ((x * y).sum(dim, keepdim=True) / sizes.clamp_min(1e-300)).clamp(-1, 1)
    linear = (cosines.abs() > PARALLEL) | (sizes == 0)
    angles = cosines.masked_fill(linear, 0.0).acos()
    first = torch.where(linear, torch.full_like(angles, 1 - t), ((1 - t) * angles).sin() / angles.sin())
    second = torch.where(linear, torch.full_like(angles, t), (t * angles).sin() / angles.sin())
    return (first * x + second * y).float()
