"""Keep the part of the summed changes that several tasks need.

K. Wang, N. Dimitriadis, G. Ortiz-Jimenez, F. Fleuret and P. Frossard, "Localizing Task Information for Improved Model
Merging and Compression", ICML 2024: task i needs an entry where `|tau_i| > l |tau_sum - tau_i|` (TALL mask); consensus
merging keeps entries that at least k tasks need.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gratis.contract.card import Card, Claim
from gratis.contract.method import Merge, MergePart
from gratis.contract.parameters import param
from gratis.methods.merging.matrices import weigh
from gratis.methods.merging.tall_mask import needed, summed


class Consensus(Merge):
    """Task arithmetic without the entries that no task, or only one selfish task, needs."""

    card = Card(
        title="Localizing Task Information for Improved Model Merging and Compression",
        authors="Wang, Dimitriadis, Ortiz-Jimenez, Fleuret, Frossard",
        year=2024,
        paper="ICML 2024, arXiv:2405.07813",
        acts_on="checkpoints",
        free_of=("training", "data"),
        summary="one model from several fine-tunes, of what at least two of them need",
        unchanged_when={"scale": 0.0},
        examples={"scale": 0.4},
        differs="The mask compares a task's change with the others', as in the paper's own code.",
        limits="Threshold and scale are the paper's validated choices; with two experts little is left.",
        claims=(
            Claim(
                name="keeps the accuracy of task arithmetic within 0.05 with only what two tasks need",
                task="digits-merging",
                metric="accuracy",
                compare="difference",
                at_least=-0.05,
                against="task-arithmetic",
                against_parameters={"scale": 0.4},
                parameters={"scale": 0.4},
            ),
        ),
    )

    threshold: float = param(
        0.4, at_least=0, help="share l of the others' change that makes an entry needed", search=(0.2, 0.6)
    )
    needed_by: int = param(2, at_least=0, unit="experts", help="experts that must need an entry (k); 0 keeps all")
    scale: float = param(0.3, at_least=0, help="factor of the sum of task vectors (lambda)", search=(0.05, 1.5))

    def combine(self, experts: list[Tensor], part: MergePart) -> Tensor:
        weigh(experts, part)
        total = summed(experts)
        count = torch.zeros_like(total)
        for expert in experts:
            count.add_(needed(expert, total, self.threshold))
        kept = count.sub_(self.needed_by - 0.5).sign_().clamp_min_(0)
        return total.mul_(kept).mul_(self.scale)
