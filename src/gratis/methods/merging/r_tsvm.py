"""Task singular vectors with weights from outliers and ranks from sparsity: merging helpful, honest and harmless.

"Mix Data or Merge Models? Balancing the Helpfulness, Honesty, and Harmlessness of Large Language Model via Model Merging",
2025 (RESM, R-TSVM). The two additions are a reconstruction from the abstracts: the paper's formulas were not at hand.
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


class RTSVM(Merge):
    """TSV-M that gives more weight to tasks with heavy outliers and more rank to tasks that changed more entries."""

    card = Card(
        title="Mix Data or Merge Models? Balancing the Helpfulness, Honesty, and Harmlessness via Model Merging",
        authors="",
        year=2025,
        seed=26,
        paper="arXiv:2502.06876",
        acts_on="checkpoints",
        free_of=("training", "data"),
        summary="one model from several fine-tunes, weighted by outliers, with ranks by density",
        unchanged_when={"scale": 0.0},
        examples={"scale": 1.0},
        differs="Weights and ranks are reconstructed from the abstracts; with both off it is TSVM bit for bit.",
        limits=(
            "The additions did not help: weights by outliers cost a language model of three aspects 0.09 of its good "
            "answers against TSVM, clipping and ranks by sparsity changed nothing. Measure before preferring it."
        ),
        claims=(
            Claim(
                name="no gain over TSVM on digits, and no great loss: within 0.03 of it",
                task="digits-merging",
                metric="accuracy",
                compare="difference",
                at_least=-0.03,
                against="tsvm",
                parameters={},
            ),
        ),
    )

    scale: float = param(1.0, at_least=0, help="factor of the merged change (alpha)", search=(0.5, 1.5))
    outlier: Literal["mass", "clip", "none"] = param(
        "mass", help="weigh tasks by the mass of their outliers, clip outliers before decomposing, or neither"
    )
    z: float = param(3.0, above=0, unit="standard deviations", help="distance from the mean magnitude of an outlier")
    rank: Literal["sparsity", "equal"] = param("sparsity", help="ranks by the share of changed entries, or equal")
    tau: float = param(1e-5, at_least=0, help="magnitude up to which an entry counts as unchanged")
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
        return decorrelated(self.clipped(deltas), ranks, weights, self.polar_tol).mul_(self.scale).float().flatten()

    def choices(self, deltas: list[Tensor]) -> tuple[list[int], list[float]]:
        """By task the rank that is kept of its change (m, n), and the factor of its singular values."""
        whole, count = min(deltas[0].shape), len(deltas)
        ranks, weights = [whole // count] * count, [1.0] * count
        if self.rank == "sparsity":
            ranks = shared_out(whole, [float((delta.abs() > self.tau).double().mean()) for delta in deltas])
        if self.outlier == "mass":
            weights = outlier_weights(deltas, self.z)
        return ranks, weights

    def clipped(self, deltas: list[Tensor]) -> list[Tensor]:
        """The changes without what lies beyond mean + z standard deviations of their magnitudes, for outlier="clip"."""
        if self.outlier != "clip":
            return deltas
        limits = [float(delta.abs().mean() + self.z * delta.abs().std(correction=0)) for delta in deltas]
        return [delta.clamp(-limit, limit) for delta, limit in zip(deltas, limits, strict=True)]

    def account(self, deltas: list[Tensor]) -> Account:
        """What the merge of one matrix's changes (m, n) keeps of each task, and the interference that it undoes."""
        deltas = [delta.double() for delta in deltas]
        return account(self.clipped(deltas), *self.choices(deltas), self.polar_tol)


def outlier_weights(deltas: list[Tensor], z: float) -> list[float]:
    """One weight per task, 1 in the mean: its share of the mass of entries beyond mean + z standard deviations."""
    masses = []
    for delta in deltas:
        sizes = delta.abs()
        masses.append(float(sizes[sizes > sizes.mean() + z * sizes.std(correction=0)].sum()))
    total = sum(masses)
    return [len(masses) * mass / total for mass in masses] if total > 0 else [1.0] * len(masses)


def shared_out(rank: int, densities: list[float]) -> list[int]:
    """`rank` in proportion to `densities`, by largest remainders, at least 1 each and never more than `rank` in all."""
    total = sum(densities)
    exact = [rank * density / total for density in densities] if total > 0 else [rank / len(densities)] * len(densities)
    found = [int(share) for share in exact]
    order = sorted(range(len(exact)), key=lambda i: exact[i] - found[i], reverse=True)
    for i in order[: rank - sum(found)]:
        found[i] += 1
    for i, value in enumerate(found):
        if value == 0:
            found[found.index(max(found))] -= 1
            found[i] = 1
    return found
