"""Drop both tails of every task vector: noise below and outliers above.

M. Davari and E. Belilovsky, "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks", ECCV 2024.
"""

from __future__ import annotations

import math

from torch import Tensor

from gratis.contract.card import Card, Claim
from gratis.contract.errors import ParameterError
from gratis.contract.method import Cutoff, Merge, MergePart, Survey
from gratis.contract.parameters import param
from gratis.methods.merging.task_arithmetic import weighted_sum
from gratis.methods.merging.ties import trim

Band = tuple[Cutoff, Cutoff | None]
"""What is kept from, and the smallest magnitude that is dropped as an outlier; None where no entry is."""


class Breadcrumbs(Merge):
    """Task arithmetic over task vectors without their largest and their smallest entries, tensor by tensor."""

    card = Card(
        title="Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks",
        authors="Davari, Belilovsky",
        year=2024,
        seed=26,
        paper="ECCV 2024, arXiv:2312.06795",
        acts_on="checkpoints",
        free_of=("training", "data"),
        summary="one model from several fine-tunes, without the outliers and the noise of each",
        unchanged_when={"scale": 0.0},
        examples={"density": 0.8, "outliers": 0.05, "scale": 0.4},
        limits="Shares are of each tensor; where their count rounds to 0 nothing is dropped.",
        claims=(
            Claim(
                name="keeps the accuracy of task arithmetic within 0.05 with a fifth of each tensor dropped",
                task="digits-merging",
                metric="accuracy",
                compare="difference",
                at_least=-0.05,
                against="task-arithmetic",
                against_parameters={"scale": 0.4},
                parameters={"density": 0.8, "scale": 0.4},
            ),
        ),
    )

    density: float = param(0.9, above=0, at_most=1, help="share of each tensor that is kept", search=(0.3, 0.95))
    outliers: float = param(
        0.01, at_least=0, below=1, help="share of the largest entries that is dropped (gamma)", search=(0.0, 0.05)
    )
    scale: float = param(0.3, at_least=0, help="factor of the sum of task vectors (lambda)", search=(0.05, 1.5))

    def check_parameters(self) -> None:
        check_shares(type(self).__name__, self.density, self.outliers)

    def survey(self, survey: Survey) -> dict[str, list[Band]]:
        return bands(survey)

    def combine(self, experts: list[Tensor], part: MergePart) -> Tensor:
        without_ends(experts, part)
        return weighted_sum(experts, part.weights).mul_(self.scale)


def check_shares(owner: str, density: float, outliers: float) -> None:
    """Raise ParameterError where more than everything would be kept and dropped."""
    if density + outliers > 1:
        raise ParameterError(
            f"{owner}: density and outliers must sum to at most 1, not {density} + {outliers} = {density + outliers:g}."
        )


def bands(survey: Survey) -> dict[str, list[Band]]:
    """By tensor, for every expert what is kept from and up to, by its own density and outliers."""
    found: dict[str, list[Band]] = {name: [] for name in survey.tensors}
    for number, own in enumerate(survey.each):
        density, outliers = own.density, own.outliers
        lower = survey.cutoffs(lambda experts, part, n=number: experts[n].abs(), min(density + outliers, 1.0))  # type: ignore[misc]
        upper = survey.cutoffs(lambda experts, part, n=number: experts[n].abs(), outliers)  # type: ignore[misc]
        for name, shape in survey.tensors.items():
            some = math.floor(outliers * math.prod(shape)) > 0
            found[name].append((lower[name], upper[name] if some else None))
    return found


def without_ends(experts: list[Tensor], part: MergePart) -> None:
    """Zero both tails of every expert's stretch, in place."""
    for delta, (lower, upper) in zip(experts, part.known[part.tensor], strict=True):
        trim(delta, lower, part.start)
        if upper is not None:
            largest = delta.clone()
            trim(largest, upper, part.start)
            delta.sub_(largest)
