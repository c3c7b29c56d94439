"""Find the change of every matrix that interferes least with the inputs of all tasks, without data.

R. Cheng et al., "Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via Task Vectors", ICML
2025 (WUDI): minimise `sum_i |(t - tau_i) tau_i'|^2 / |tau_i|^2` from `t = sum tau_i`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gratis.contract.card import Card, Claim
from gratis.contract.method import Merge, MergePart
from gratis.contract.parameters import param
from gratis.methods.merging.matrices import EXCLUDED, EXCLUDED_HELP, is_matrix, mean, weigh, whole_matrices


class WUDI(Merge):
    """A change per matrix that, along each task's own directions, does what that task's change does."""

    card = Card(
        title="Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via Task Vectors",
        authors="Cheng et al.",
        year=2025,
        paper="ICML 2025, arXiv:2503.08099",
        acts_on="checkpoints",
        free_of=("training", "data"),
        summary="one model from several fine-tunes, by an optimisation that needs no data",
        unchanged_when={"scale": 0.0},
        examples={"iterations": 20},
        limits="The step is absolute: changes much larger than steps times rate need a larger rate.",
        claims=(
            Claim(
                name="its exact form comes near the average of three experts, and does not beat it on digits",
                task="digits-merging",
                metric="accuracy",
                compare="difference",
                at_least=-0.05,
                against="average",
                parameters={"solver": "pseudo-inverse"},
            ),
        ),
    )

    scale: float = param(1.0, at_least=0, help="factor of the merged change (lambda)", search=(0.3, 2.0))
    solver: Literal["adam", "pseudo-inverse"] = param(
        "adam", help="the paper's iterations, or the stationary point by a pseudo-inverse"
    )
    iterations: int = param(300, at_least=0, help="steps of Adam")
    rate: float = param(1e-5, above=0, help="learning rate of Adam", search=(1e-6, 1e-3))
    cutoff: float = param(1e-3, at_least=0, below=1, help="relative cutoff of the pseudo-inverse")
    exclude: tuple[str, ...] = param(EXCLUDED, help=EXCLUDED_HELP)

    def unit(self, tensor: str, shape: tuple[int, ...]) -> Literal["stretch", "tensor"]:
        return whole_matrices(tensor, shape, self.exclude)

    def combine(self, experts: list[Tensor], part: MergePart) -> Tensor:
        weigh(experts, part)
        if not is_matrix(part.tensor, part.shape, self.exclude):
            return mean(experts).mul_(self.scale)
        deltas = torch.stack([expert.view(part.shape).double() for expert in experts])
        sizes = deltas.square().sum((1, 2), keepdim=True)
        scaled = torch.where(sizes > 0, deltas / sizes.clamp_min(1e-300), 0.0)
        grams = deltas.mT @ scaled
        # The loss is quadratic: its gradient is 2 (t A - B).
        a, b = grams.sum(0), (deltas @ grams).sum(0)
        if self.solver == "pseudo-inverse":
            merged = b @ torch.linalg.pinv(a, rtol=self.cutoff, hermitian=True)
        else:
            merged = adam(deltas.sum(0), a, b, self.iterations, self.rate)
        flat: Tensor = merged.mul_(self.scale).float().flatten()
        return flat


def adam(start: Tensor, a: Tensor, b: Tensor, iterations: int, rate: float) -> Tensor:
    """Minimise the quadratic with gradient 2 (t a - b) by Adam (betas 0.9 and 0.999) from `start`."""
    t, first, second = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for step in range(1, iterations + 1):
        gradient = 2 * (t @ a - b)
        first.lerp_(gradient, 0.1)
        second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        t.sub_(rate * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8))
    return t
