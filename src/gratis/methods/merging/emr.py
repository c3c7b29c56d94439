"""Elect one change for all tasks, and give every task its mask and its scale.

C. Huang, P. Ye, T. Chen, T. He, X. Yue and W. Ouyang, "EMR-Merging: Tuning-Free High-Performance Model Merging", NeurIPS
2024: elect `u = g * max |tau_i|` over the entries that agree with the sign g of the sum; `m_i = (tau_i g > 0)`;
`scale_i = sum |tau_i| / sum |m_i u|`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gratis.contract.card import Card, Claim
from gratis.contract.errors import InputError
from gratis.contract.method import Merge, MergePart, Survey
from gratis.contract.parameters import param


class EMR(Merge):
    """The model of one of the tasks: the unified change where it agrees with the task's, rescaled to its size."""

    card = Card(
        title="EMR-Merging: Tuning-Free High-Performance Model Merging",
        authors="Huang, Ye, Chen, He, Yue, Ouyang",
        year=2024,
        paper="NeurIPS 2024, arXiv:2405.17461",
        acts_on="checkpoints",
        free_of=("training", "data"),
        summary="many fine-tunes stored as one change, a bit per weight and one number each",
        unchanged_when={"scale": 0.0},
        examples={"scale": 1.0},
        limits="The result serves the one task that is named. The scale is taken over the whole model.",
        claims=(
            Claim(
                name="one task's model is better over all ways than the base",
                task="digits-merging",
                metric="accuracy",
                compare="difference",
                at_least=0.02,
                parameters={},
            ),
        ),
    )

    task: int = param(0, at_least=0, help="number of the expert whose model is restored, from 0")
    scale: float = param(1.0, at_least=0, help="factor of the merged change (lambda)", search=(0.3, 2.0))

    def check_experts(self, count: int) -> None:
        if self.task >= count:
            raise InputError(f"EMR: task is {self.task}, but there are {count} experts, numbered from 0.")

    def survey(self, survey: Survey) -> float:
        """The task's scale over the whole model."""

        def sizes(experts: list[Tensor], part: MergePart) -> Tensor:
            own = experts[self.task].abs().double().sum()
            return torch.stack([own, masked(experts, self.task).abs().double().sum()])

        found = list(survey.sums(sizes).values())
        own, unified = sum(pair[0] for pair in found), sum(pair[1] for pair in found)
        return own / unified if unified > 0 else 0.0

    def combine(self, experts: list[Tensor], part: MergePart) -> Tensor:
        return masked(experts, self.task).mul_(part.known * self.scale)


def masked(experts: list[Tensor], task: int) -> Tensor:
    """The unified change where its sign is that of the task's change, 0 elsewhere."""
    signs = experts[0].clone()
    for expert in experts[1:]:
        signs.add_(expert)
    signs.sign_()
    largest = torch.zeros_like(signs)
    for expert in experts:
        largest = torch.maximum(largest, expert * signs)
    mask = (experts[task] * signs).sign_().clamp_min_(0)
    return largest.mul_(signs).mul_(mask)
