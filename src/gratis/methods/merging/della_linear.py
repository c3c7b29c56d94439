"""Drop small changes more often than large ones, rescale what is kept, and add.

P. T. Deep, R. Bhardwaj and S. Poria, "DELLA-Merging", 2024, without the election of signs.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from gratis.contract.card import Card, Claim
from gratis.contract.method import Merge, MergePart
from gratis.contract.parameters import param
from gratis.methods.merging.della import check_spread, sample
from gratis.methods.merging.task_arithmetic import weighted_sum


class DELLALinear(Merge):
    """Task arithmetic over task vectors sampled by magnitude within each row."""

    card = Card(
        title="DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling",
        authors="Deep, Bhardwaj, Poria",
        year=2024,
        seed=26,
        paper="arXiv:2406.11617",
        acts_on="checkpoints",
        free_of=("training", "data"),
        summary="one model from several fine-tunes, with small changes dropped more often than large ones",
        unchanged_when={"scale": 0.0},
        examples={"density": 0.7, "scale": 0.4},
        limits="As for DELLA and task arithmetic.",
        claims=(
            Claim(
                name="keeps the accuracy of task arithmetic within 0.05",
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

    density: float = param(0.7, above=0, below=1, help="mean probability that an entry is kept (d)", search=(0.3, 0.9))
    spread: float = param(
        0.07, at_least=0, below=0.5, help="the row's largest is kept with d + spread, its smallest with d - spread (e)"
    )
    scale: float = param(0.3, at_least=0, help="factor of the sum of task vectors (lambda)", search=(0.05, 1.5))
    seed: int = param(0, at_least=0, help="seed of the random choice")

    def check_parameters(self) -> None:
        check_spread(type(self).__name__, self.density, self.spread)

    def unit(self, tensor: str, shape: tuple[int, ...]) -> Literal["row", "tensor"]:
        return "row" if len(shape) > 1 else "tensor"

    def prepare(self, expert: Tensor, number: int, part: MergePart) -> None:
        sample(expert, self.density, self.spread, self.seed, number, part)

    def combine(self, experts: list[Tensor], part: MergePart) -> Tensor:
        return weighted_sum(experts, part.weights).mul_(self.scale)
