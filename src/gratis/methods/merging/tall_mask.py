"""Give one task its own model back out of the sum of all tasks' changes, by a mask of bits.

K. Wang, N. Dimitriadis, G. Ortiz-Jimenez, F. Fleuret and P. Frossard, "Localizing Task Information for Improved Model
Merging and Compression", ICML 2024: `theta_0 + m_i * tau_sum` with `m_i = |tau_i| > l |tau_sum - tau_i|`.
"""

from __future__ import annotations

from torch import Tensor

from gratis.contract.card import Card, Claim
from gratis.contract.errors import InputError
from gratis.contract.method import Merge, MergePart
from gratis.contract.parameters import param
from gratis.methods.merging.matrices import weigh


class TALLMask(Merge):
    """The model of one of the tasks, from the base, the sum of all changes, and the task's mask."""

    card = Card(
        title="Localizing Task Information for Improved Model Merging and Compression",
        authors="Wang, Dimitriadis, Ortiz-Jimenez, Fleuret, Frossard",
        year=2024,
        paper="ICML 2024, arXiv:2405.07813",
        acts_on="checkpoints",
        free_of=("training", "data"),
        summary="many fine-tunes stored as one sum and a bit per weight each",
        unchanged_when={"scale": 0.0},
        examples={"scale": 1.0},
        differs="The mask compares a task's change with the others', as in the paper's own code.",
        limits="The result serves the one task that is named: a compression of several models, not one model for all.",
        claims=(
            Claim(
                name="one task's model out of the sum is better over all ways than the base",
                task="digits-merging",
                metric="accuracy",
                compare="difference",
                at_least=0.02,
                parameters={},
            ),
        ),
    )

    task: int = param(0, at_least=0, help="number of the expert whose model is restored, from 0")
    threshold: float = param(
        0.4, at_least=0, help="share l of the others' change that makes an entry the task's", search=(0.2, 0.6)
    )
    scale: float = param(1.0, at_least=0, help="factor of the merged change (lambda)", search=(0.3, 2.0))

    def check_experts(self, count: int) -> None:
        if self.task >= count:
            raise InputError(f"TALLMask: task is {self.task}, but there are {count} experts, numbered from 0.")

    def combine(self, experts: list[Tensor], part: MergePart) -> Tensor:
        weigh(experts, part)
        total = summed(experts)
        mask = needed(experts[self.task], total, self.threshold)
        return total.mul_(mask).mul_(self.scale)


def summed(experts: list[Tensor]) -> Tensor:
    """The sum of the changes, which are left as they are."""
    total = experts[0].clone()
    for expert in experts[1:]:
        total.add_(expert)
    return total


def needed(own: Tensor, total: Tensor, threshold: float) -> Tensor:
    """1 where a task needs an entry, `|own| > threshold |total - own|`, else 0: floats are quicker than truth values."""
    return own.abs().sub_((total - own).abs_().mul_(threshold)).sign_().clamp_min_(0)
