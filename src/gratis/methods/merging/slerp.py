"""Spherical interpolation between two models, tensor by tensor.

K. Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985, on flattened tensors: with the angle o between
them, `sin((1 - t) o) / sin o * a + sin(t o) / sin o * b`; linear where they are nearly parallel.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gratis.contract.card import Card, Claim
from gratis.contract.errors import InputError
from gratis.contract.method import Merge, MergePart
from gratis.contract.parameters import param

PARALLEL = 0.9995
"""Absolute cosine from which interpolation is linear."""


class SLERP(Merge):
    """A point on the arc between two models, each tensor keeping a length between theirs."""

    card = Card(
        title="Animating rotation with quaternion curves",
        authors="Shoemake",
        year=1985,
        paper="SIGGRAPH 1985",
        acts_on="checkpoints",
        free_of=("training", "data", "base model"),
        summary="two models into one, along the arc between their weights",
        unchanged_when={"t": 0.0},
        examples={"t": 0.5},
        limits="Exactly two models. Weights of the call are not used; t says where between them.",
        claims=(
            Claim(
                name="half-way between two experts it is as good as their mean, within 0.02",
                task="digits-merging",
                metric="accuracy",
                compare="difference",
                at_least=-0.02,
                against="average",
                task_parameters={"ways": 2},
                parameters={"t": 0.5},
            ),
        ),
    )
    needs_base = False
    measures = True

    t: float = param(0.5, at_least=0, at_most=1, help="0 is the first model, 1 the second", search=(0.0, 1.0))

    def check_experts(self, count: int) -> None:
        if count != 2:
            raise InputError(f"SLERP interpolates between two models, not {count}.")

    def measure(self, experts: list[Tensor], part: MergePart) -> Tensor:
        a, b = (expert.double() for expert in experts)
        return torch.stack([a.dot(a), b.dot(b), a.dot(b)])

    def combine(self, experts: list[Tensor], part: MergePart) -> Tensor:
        first, second = arc(part.measured, self.t)
        return experts[0].mul_(first).add_(experts[1], alpha=second)


def arc(products: tuple[float, ...], t: float) -> tuple[float, float]:
    """Factors of the two ends, from their squared norms and inner product."""
    aa, bb, ab = products
    size = math.sqrt(aa * bb)
    cosine = max(-1.0, min(1.0, ab / size)) if size > 0 else 1.0
    if abs(cosine) > PARALLEL:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
