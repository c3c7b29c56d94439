"""Move a model towards another where they are close already.

The NearSwap rule of the merging community (as in mergekit): from a towards b with weight `min(1, t / |a - b|)`, which is
a step of at most t.
"""

from __future__ import annotations

from torch import Tensor

from gratis.contract.card import Card, Claim
from gratis.contract.errors import InputError
from gratis.contract.method import Merge, MergePart
from gratis.contract.parameters import param


class NearSwap(Merge):
    """The second model's weights where they are within t of the first's, and a step of t towards them elsewhere."""

    card = Card(
        title="NearSwap",
        authors="the merging community",
        year=2024,
        paper="mergekit's documentation",
        acts_on="checkpoints",
        free_of=("training", "data", "base model"),
        summary="a model moved towards another, by a small step at most",
        unchanged_when={"t": 0.0},
        examples={"t": 0.001},
        limits="Exactly two models. Weights of the call are not used.",
        claims=(
            Claim(
                name="steps of 0.05 towards a second expert serve its digits too: 0.1 above the base",
                task="digits-merging",
                metric="accuracy",
                compare="difference",
                at_least=0.1,
                task_parameters={"ways": 2},
                parameters={"t": 0.05},
            ),
        ),
    )
    needs_base = False

    t: float = param(0.001, at_least=0, help="largest step of a weight", search=(1e-5, 1e-1))

    def check_experts(self, count: int) -> None:
        if count != 2:
            raise InputError(f"NearSwap moves one model towards another: give two, not {count}.")

    def combine(self, experts: list[Tensor], part: MergePart) -> Tensor:
        step = experts[1].sub_(experts[0]).clamp_(-self.t, self.t)
        return experts[0].add_(step)
