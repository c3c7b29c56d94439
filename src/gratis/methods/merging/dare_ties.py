"""Drop at random and rescale, then elect a sign and average what agrees.

L. Yu et al., "Language Models are Super Mario", ICML 2024, with P. Yadav et al., "TIES-Merging", NeurIPS 2023.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from gratis.contract.card import Card, Claim
from gratis.contract.method import Merge, MergePart
from gratis.contract.parameters import param
from gratis.methods.merging.dare import drop
from gratis.methods.merging.ties import elect_and_average, trim


class DARETIES(Merge):
    """TIES whose trimming is DARE's random dropping."""

    card = Card(
        title="Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
        authors="Yu, Yu, Yu, Huang, Li",
        year=2024,
        seed=26,
        paper="ICML 2024, arXiv:2311.03099",
        acts_on="checkpoints",
        free_of=("training", "data"),
        summary="one model from several fine-tunes: random dropping, then conflicts resolved by sign",
        unchanged_when={"scale": 0.0},
        examples={"density": 0.5},
        limits="As for DARE and TIES.",
        claims=(
            Claim(
                name="one model serves three ways of showing digits better than the base does",
                task="digits-merging",
                metric="accuracy",
                compare="difference",
                at_least=0.05,
                parameters={"density": 0.5},
            ),
        ),
    )

    density: float = param(0.5, above=0, at_most=1, help="probability that an entry is kept", search=(0.05, 1.0))
    scale: float = param(1.0, at_least=0, help="factor of the merged task vector (lambda)", search=(0.3, 2.0))
    trim: float | None = param(
        None, above=0, at_most=1, help="share of the largest magnitudes of each tensor that is kept after dropping"
    )
    divisor: Literal["count", "weight", "none"] = param(
        "count", help="average over the number of experts that agree, over the sum of their weights, or add them up"
    )
    seed: int = param(0, at_least=0, help="seed of the random choice")

    def kept_share(self) -> tuple[float, str] | None:
        return (self.trim, "tensor") if self.trim is not None and self.trim < 1 else None

    def prepare(self, expert: Tensor, number: int, part: MergePart) -> None:
        drop(expert, self.density, self.seed, number, part)

    def combine(self, experts: list[Tensor], part: MergePart) -> Tensor:
        for delta, cutoff in zip(experts, part.cutoffs, strict=False):
            trim(delta, cutoff, part.start)
        merged = elect_and_average(experts, part, self.divisor, "positive")
        return merged if self.scale == 1 else merged.mul_(self.scale)
