"""Add the tasks' changes and give the sum a flat spectrum.

D. Marczak et al., "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces", ICML 2025
(Iso-C): the sum of changes is U S V', and S is replaced by its mean.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gratis.contract.card import Card, Claim
from gratis.contract.method import Merge, MergePart
from gratis.contract.parameters import param
from gratis.methods.merging.matrices import EXCLUDED, EXCLUDED_HELP, is_matrix, mean, weigh, whole_matrices


class IsoC(Merge):
    """The summed change of every matrix with all its singular values made equal; other tensors by their mean."""

    card = Card(
        title="No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces",
        authors="Marczak et al.",
        year=2025,
        paper="ICML 2025, arXiv:2502.04959",
        acts_on="checkpoints",
        free_of=("training", "data"),
        summary="one model from several fine-tunes, with strong and weak directions made equal",
        unchanged_when={"scale": 0.0},
        examples={"scale": 1.0},
        limits="Null directions of the sum are filled, so small changes of low rank are drowned.",
        claims=(
            Claim(
                name="a little better than the base over three ways of showing digits",
                task="digits-merging",
                metric="accuracy",
                compare="difference",
                at_least=0.02,
                parameters={},
            ),
        ),
    )

    scale: float = param(1.0, at_least=0, help="factor of the merged change (lambda)", search=(0.3, 2.0))
    exclude: tuple[str, ...] = param(EXCLUDED, help=EXCLUDED_HELP)

    def unit(self, tensor: str, shape: tuple[int, ...]) -> Literal["stretch", "tensor"]:
        return whole_matrices(tensor, shape, self.exclude)

    def combine(self, experts: list[Tensor], part: MergePart) -> Tensor:
        weigh(experts, part)
        if not is_matrix(part.tensor, part.shape, self.exclude):
            return mean(experts).mul_(self.scale)
        total = torch.stack([expert.view(part.shape).double() for expert in experts]).sum(0)
        left, values, right = torch.linalg.svd(total, full_matrices=False)
        merged: Tensor = (left @ right).mul_(values.mean() * self.scale)
        return merged.float().flatten()
