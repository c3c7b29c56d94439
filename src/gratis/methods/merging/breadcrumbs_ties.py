"""Drop both tails of every task vector, then elect a sign and average what agrees.

M. Davari and E. Belilovsky, "Model Breadcrumbs", ECCV 2024, with P. Yadav et al., "TIES-Merging", NeurIPS 2023.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from gratis.contract.card import Card, Claim
from gratis.contract.method import Merge, MergePart, Survey
from gratis.contract.parameters import param
from gratis.methods.merging.breadcrumbs import Band, bands, check_shares, without_ends
from gratis.methods.merging.ties import elect_and_average


class BreadcrumbsTIES(Merge):
    """TIES whose trimming drops the largest entries as well as the smallest."""

    card = Card(
        title="Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks",
        authors="Davari, Belilovsky",
        year=2024,
        seed=26,
        paper="ECCV 2024, arXiv:2312.06795",
        acts_on="checkpoints",
        free_of=("training", "data"),
        summary="one model from several fine-tunes: both tails dropped, then conflicts resolved by sign",
        unchanged_when={"scale": 0.0},
        examples={"density": 0.8},
        limits="As for Breadcrumbs and TIES.",
        claims=(
            Claim(
                name="one model serves three ways of showing digits better than the base does",
                task="digits-merging",
                metric="accuracy",
                compare="difference",
                at_least=0.05,
                parameters={"density": 0.8},
            ),
        ),
    )

    density: float = param(0.9, above=0, at_most=1, help="share of each tensor that is kept", search=(0.3, 0.95))
    outliers: float = param(
        0.01, at_least=0, below=1, help="share of the largest entries that is dropped (gamma)", search=(0.0, 0.05)
    )
    divisor: Literal["count", "weight", "none"] = param(
        "count", help="average over the number of experts that agree, over the sum of their weights, or add them up"
    )
    scale: float = param(1.0, at_least=0, help="factor of the merged change (lambda)", search=(0.3, 2.0))

    def check_parameters(self) -> None:
        check_shares(type(self).__name__, self.density, self.outliers)

    def survey(self, survey: Survey) -> dict[str, list[Band]]:
        return bands(survey)

    def combine(self, experts: list[Tensor], part: MergePart) -> Tensor:
        without_ends(experts, part)
        return elect_and_average(experts, part, self.divisor, "positive").mul_(self.scale)
