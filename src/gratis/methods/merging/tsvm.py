"""Merge the leading singular vectors of every task's change, decorrelated across tasks.

A. A. Gargiulo et al., "Task Singular Vectors: Reducing Task Interference in Model Merging", CVPR 2025 (TSV-M). Of every
matrix's change the floor(r / T) leading singular triplets per task are kept, concatenated over tasks, and both factors
replaced by the nearest matrices with orthonormal columns.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from gratis.contract.card import Card, Claim
from gratis.contract.method import Merge, MergePart
from gratis.contract.parameters import param
from gratis.methods.merging.matrices import (
    EXCLUDED,
    EXCLUDED_HELP,
    Account,
    account,
    decorrelated,
    mean,
    separable,
    weigh,
    whole_matrices,
)


class TSVM(Merge):
    """The tasks' leading singular vectors, made orthogonal between tasks, with their own singular values.

    Vectors, convolutions and excluded matrices are merged by the mean of the changes. Weights of the call multiply each
    task's change before its decomposition.
    """

    card = Card(
        title="Task Singular Vectors: Reducing Task Interference in Model Merging",
        authors="Gargiulo, Crisostomi, Bucarelli, Scardapane, Silvestri, Rodola",
        year=2025,
        seed=26,
        paper="CVPR 2025, arXiv:2412.00081",
        acts_on="checkpoints",
        free_of=("training", "data"),
        summary="one model from several fine-tunes, each in directions of its own",
        unchanged_when={"scale": 0.0},
        examples={"scale": 1.0},
        differs="Directions that several tasks share are dropped from the null space (polar_tol); 0 is the released code.",
        limits="Average near copies first. A matrix of less rank than there are experts is merged by the mean.",
        claims=(
            Claim(
                name="three fine-tunes for three ways of showing digits: no gain over their average",
                task="digits-merging",
                metric="accuracy",
                compare="difference",
                at_most=0.02,
                against="average",
                parameters={},
            ),
        ),
    )

    scale: float = param(1.0, at_least=0, help="factor of the merged change (alpha)", search=(0.5, 1.5))
    polar_tol: float = param(
        1e-6, at_least=0, below=1, help="directions below this share of the largest are null and dropped; 0 keeps all"
    )
    exclude: tuple[str, ...] = param(EXCLUDED, help=EXCLUDED_HELP)

    def unit(self, tensor: str, shape: tuple[int, ...]) -> Literal["stretch", "tensor"]:
        return whole_matrices(tensor, shape, self.exclude)

    def combine(self, experts: list[Tensor], part: MergePart) -> Tensor:
        weigh(experts, part)
        deltas = separable(experts, part, self.exclude)
        if deltas is None:
            return mean(experts).mul_(self.scale)
        ranks, weights = self.choices(deltas)
        return decorrelated(deltas, ranks, weights, self.polar_tol).mul_(self.scale).float().flatten()

    def choices(self, deltas: list[Tensor]) -> tuple[list[int], list[float]]:
        """By task the rank that is kept of its change (m, n), and the factor of its singular values."""
        return [min(deltas[0].shape) // len(deltas)] * len(deltas), [1.0] * len(deltas)

    def account(self, deltas: list[Tensor]) -> Account:
        """What the merge of one matrix's changes (m, n) keeps of each task, and the interference that it undoes."""
        return account(deltas, *self.choices([delta.double() for delta in deltas]), self.polar_tol)
