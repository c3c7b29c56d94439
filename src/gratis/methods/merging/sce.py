"""Select where the experts differ most, calculate how much each changed, erase what goes against the majority.

F. Wan, L. Zhong, Z. Yang, R. Chen and X. Quan, "FuseChat: Knowledge Fusion of Chat Models", 2024 (SCE).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gratis.contract.card import Card, Claim
from gratis.contract.method import Cutoff, Merge, MergePart, Survey
from gratis.contract.parameters import param


class SCE(Merge):
    """The experts' changes where they vary most, weighted by their mean squares, without those against the majority."""

    card = Card(
        title="FuseChat: Knowledge Fusion of Chat Models",
        authors="Wan, Zhong, Yang, Chen, Quan",
        year=2024,
        paper="arXiv:2408.07990",
        acts_on="checkpoints",
        free_of=("training", "data"),
        summary="one model from several fine-tunes, weighted by how much each changed each tensor",
        unchanged_when={"scale": 0.0},
        examples={"density": 0.5},
        limits="Weights of the call are not used: each tensor has its own.",
        claims=(
            Claim(
                name="one model serves three ways of showing digits better than the base does",
                task="digits-merging",
                metric="accuracy",
                compare="difference",
                at_least=0.05,
                parameters={},
            ),
        ),
    )

    density: float = param(
        1.0, above=0, at_most=1, help="share of each tensor's entries that is kept, by variance over experts",
        search=(0.1, 1.0),
    )  # fmt: skip
    scale: float = param(1.0, at_least=0, help="factor of the merged change (lambda)", search=(0.3, 2.0))

    def survey(self, survey: Survey) -> dict[str, tuple[Cutoff | None, tuple[float, ...]]]:
        """By tensor, the cutoff of the variance and the experts' mean squares."""
        cutoffs = survey.cutoffs(lambda experts, part: variance(experts), self.density) if self.density < 1 else {}

        def squares(experts: list[Tensor], part: MergePart) -> Tensor:
            kept = selected(experts, cutoffs.get(part.tensor), part.start)
            return torch.stack([(expert.double() * kept).square().sum() for expert in experts])

        return {name: (cutoffs.get(name), sums) for name, sums in survey.sums(squares).items()}

    def combine(self, experts: list[Tensor], part: MergePart) -> Tensor:
        cutoff, squares = part.known.get(part.tensor, (None, (0.0,) * len(experts)))
        total = sum(squares)
        kept = selected(experts, cutoff, part.start)
        sign = torch.zeros_like(kept)
        for expert in experts:
            sign.add_(expert.mul_(kept))
        sign.sign_()
        merged, weight = torch.zeros_like(kept), torch.zeros_like(kept)
        for expert, square in zip(experts, squares, strict=True):
            agreeing = (expert * sign).clamp_min_(0)
            share = square / total if total > 0 else 0.0
            merged.add_(agreeing, alpha=share)
            weight.add_(agreeing.sign_(), alpha=share)
        weight.masked_fill_(weight == 0, 1.0)
        return merged.mul_(sign).div_(weight).mul_(self.scale)


def variance(experts: list[Tensor]) -> Tensor:
    """Variance over the experts of every entry."""
    return torch.stack(experts).var(0, correction=0)


def selected(experts: list[Tensor], cutoff: Cutoff | None, start: int) -> Tensor:
    """1 where the entry is kept, 0 elsewhere."""
    if cutoff is None:
        return torch.ones_like(experts[0])
    spread = variance(experts)
    kept = spread > cutoff.magnitude
    earlier = max(cutoff.last + 1 - start, 0)
    kept[:earlier] |= spread[:earlier] == cutoff.magnitude
    return kept.to(torch.float32)
