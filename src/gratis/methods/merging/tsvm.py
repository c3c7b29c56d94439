"""Merge the leading singular vectors of every task's change, decorrelated across tasks.

A. A. Gargiulo et al., "Task Singular Vectors: Reducing Task Interference in Model Merging", CVPR 2025 (TSV-M). Of every
matrix's change the floor(r / T) leading singular triplets per task are kept, concatenated over tasks, and both factors
replaced by the nearest matrices with orthonormal columns.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from gratis.contract.card import Card, Claim
from gratis.contract.method import Merge, MergePart
from gratis.contract.parameters import param


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
    exclude: tuple[str, ...] = param(
        ("embed", "lm_head", r"\bwte\b", r"\bwpe\b", "text_projection"),
        help="regular expressions of names of matrices that are merged by the mean",
    )

    def unit(self, tensor: str, shape: tuple[int, ...]) -> Literal["stretch", "tensor"]:
        return "tensor" if is_matrix(tensor, shape, self.exclude) else "stretch"

    def combine(self, experts: list[Tensor], part: MergePart) -> Tensor:
        weigh(experts, part)
        if not is_matrix(part.tensor, part.shape, self.exclude) or len(experts) > min(part.shape):
            return mean(experts).mul_(self.scale)
        deltas = [expert.view(part.shape).double() for expert in experts]
        ranks = [min(part.shape) // len(experts)] * len(experts)
        return decorrelated(deltas, ranks, [1.0] * len(experts), self.polar_tol).mul_(self.scale).float().flatten()


def is_matrix(tensor: str, shape: tuple[int, ...], exclude: Sequence[str]) -> bool:
    """Whether a tensor is merged as a matrix."""
    return len(shape) == 2 and min(shape) > 0 and not any(re.search(pattern, tensor) for pattern in exclude)


def weigh(experts: list[Tensor], part: MergePart) -> None:
    """Multiply every expert by its weight, in place."""
    for expert, weight in zip(experts, part.weights, strict=True):
        if weight != 1:
            expert.mul_(weight)


def mean(experts: list[Tensor]) -> Tensor:
    """The plain mean, in place of the first."""
    merged = experts[0]
    for expert in experts[1:]:
        merged.add_(expert)
    return merged.div_(len(experts))


def leading(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, k), s (k,) and V (n, k) of the `rank` leading triplets, null ones left out; delta (m, n) in float64.

    By the eigenvectors of the smaller Gram matrix, which is several times cheaper than a full decomposition.
    """
    wide = delta.shape[0] <= delta.shape[1]
    matrix = delta if wide else delta.T
    values, vectors = torch.linalg.eigh(matrix @ matrix.T)
    values, vectors = values.flip(0)[:rank].clamp_min(0).sqrt(), vectors.flip(1)[:, :rank]
    kept = int((values > 1e-7 * values[:1]).sum()) if len(values) else 0
    values, vectors = values[:kept], vectors[:, :kept]
    others = (matrix.T @ vectors) / values
    return (vectors, values, others) if wide else (others, values, vectors)


def orthonormal(factor: Tensor, tolerance: float) -> Tensor:
    """The nearest matrix with orthonormal columns (polar factor); null directions are dropped where tolerance > 0."""
    if tolerance == 0:
        left, _, right = torch.linalg.svd(factor, full_matrices=False)
        nearest: Tensor = left @ right
        return nearest
    values, vectors = torch.linalg.eigh(factor.T @ factor)
    sizes = values.clamp_min(0).sqrt()
    inverse = torch.where(sizes > tolerance * sizes.max(), 1 / sizes.clamp_min(1e-300), 0.0)
    polar: Tensor = factor @ ((vectors * inverse) @ vectors.T)
    return polar


def decorrelated(deltas: list[Tensor], ranks: Sequence[int], weights: Sequence[float], tolerance: float) -> Tensor:
    """(m, n): the tasks' kept triplets, singular values times weight, in orthonormal factors."""
    parts = [leading(delta, rank) for delta, rank in zip(deltas, ranks, strict=True)]
    left, right = torch.cat([u for u, _, _ in parts], 1), torch.cat([v for _, _, v in parts], 1)
    values = torch.cat([s * weight for (_, s, _), weight in zip(parts, weights, strict=True)])
    if not len(values):
        return torch.zeros_like(deltas[0])
    return (orthonormal(left, tolerance) * values) @ orthonormal(right, tolerance).T


def interference(deltas: list[Tensor], rank: int) -> float:
    """How much the tasks' kept singular vectors overlap: the sum of |(U'U - I) S (V'V - I)|; 0 where none does."""
    parts = [leading(delta.double(), rank) for delta in deltas]
    left, right = torch.cat([u for u, _, _ in parts], 1), torch.cat([v for _, _, v in parts], 1)
    values, one = torch.cat([s for _, s, _ in parts]), torch.eye(left.shape[1], dtype=left.dtype, device=left.device)
    return float((((left.T @ left - one) * values) @ (right.T @ right - one)).abs().sum())
