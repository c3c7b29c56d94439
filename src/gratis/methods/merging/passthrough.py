"""Copy a model, scaled: the building block of recipes that take tensors from different models.

The passthrough rule of the merging community (as in mergekit).
"""

from __future__ import annotations

from torch import Tensor

from gratis.contract.card import Card, Claim
from gratis.contract.errors import InputError
from gratis.contract.method import Merge, MergePart
from gratis.contract.parameters import param


class Passthrough(Merge):
    """The one model's weights, times a factor."""

    card = Card(
        title="Passthrough",
        authors="the merging community",
        year=2023,
        paper="mergekit's documentation",
        acts_on="checkpoints",
        free_of=("training", "data", "base model"),
        summary="a model's tensors as they are, or scaled",
        unchanged_when={"scale": 1.0},
        examples={"scale": 0.5},
        limits="Exactly one model.",
        claims=(
            Claim(
                name="an expert that is copied is that expert: as good as the average of it alone",
                task="digits-merging",
                metric="accuracy",
                compare="difference",
                at_least=0.0,
                against="average",
                task_parameters={"ways": 1},
                parameters={"scale": 1.0},
            ),
        ),
    )
    needs_base = False

    scale: float = param(1.0, help="factor of the weights", search=(0.5, 1.5))

    def check_experts(self, count: int) -> None:
        if count != 1:
            raise InputError(f"Passthrough copies one model, not {count}.")

    def combine(self, experts: list[Tensor], part: MergePart) -> Tensor:
        return experts[0] if self.scale == 1 else experts[0].mul_(self.scale)
