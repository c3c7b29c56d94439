"""What merges of whole matrices share: which tensors these are, means for the others, singular vectors of changes."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gratis.contract.errors import GratisWarning
from gratis.contract.method import MergePart

EXCLUDED = ("embed", "lm_head", r"\bwte\b", r"\bwpe\b", "text_projection")
"""Embeddings and heads: their changes are sparse by rows, and their decomposition is the slow part."""
EXCLUDED_HELP = "regular expressions of names of matrices that are merged by the mean"
COPIES = 0.95
"""Cosine of two changes from which the experts are near copies."""


def is_matrix(tensor: str, shape: tuple[int, ...], exclude: Sequence[str]) -> bool:
    """Whether a tensor is merged as a matrix."""
    return len(shape) == 2 and min(shape) > 0 and not any(re.search(pattern, tensor) for pattern in exclude)


def whole_matrices(tensor: str, shape: tuple[int, ...], exclude: Sequence[str]) -> Literal["stretch", "tensor"]:
    """What a merge of matrices asks for at once: these whole, all other tensors in stretches."""
    return "tensor" if is_matrix(tensor, shape, exclude) else "stretch"


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


def separable(experts: list[Tensor], part: MergePart, exclude: Sequence[str]) -> list[Tensor] | None:
    """The experts' changes as matrices (m, n) in float64, or None where they are merged by the mean.

    That is for vectors, convolutions, excluded names, and (with a warning) matrices of less rank than there are experts.
    Warns of near copies, whose small differences come back amplified.
    """
    if not is_matrix(part.tensor, part.shape, exclude):
        return None
    if len(experts) > min(part.shape):
        warnings.warn(f"{part.tensor!r} has less rank than there are experts: it is merged by the mean.", GratisWarning)
        return None
    deltas = [expert.view(part.shape).double() for expert in experts]
    if _near_copies(deltas):
        warnings.warn(
            "Two experts changed a matrix almost alike: average near copies first, then merge.", GratisWarning
        )
    return deltas


def _near_copies(deltas: Sequence[Tensor]) -> bool:
    flat = [delta.flatten() for delta in deltas]
    sizes = [float(one.norm()) for one in flat]
    return any(
        float(flat[i].dot(flat[j])) > COPIES * sizes[i] * sizes[j] > 0 for i in range(len(flat)) for j in range(i)
    )


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
    left, values, right = _stacked(deltas, ranks, weights)
    if not len(values):
        return torch.zeros_like(deltas[0])
    return (orthonormal(left, tolerance) * values) @ orthonormal(right, tolerance).T


def interference(deltas: list[Tensor], rank: int) -> float:
    """How much the tasks' kept singular vectors overlap: the sum of |(U'U - I) S (V'V - I)|; 0 where none does."""
    ones = [1.0] * len(deltas)
    return _overlap(*_stacked([delta.double() for delta in deltas], [rank] * len(deltas), ones))


@dataclass(frozen=True)
class Account:
    """What a merge of one matrix by singular vectors kept and undid."""

    ranks: tuple[int, ...]
    weights: tuple[float, ...]
    kept_energy: tuple[float, ...]
    """By task, the share of the squared change that its kept triplets hold."""
    interference: float
    """Overlap of the kept singular vectors before they are made orthogonal."""
    interference_after: float


def account(deltas: list[Tensor], ranks: Sequence[int], weights: Sequence[float], tolerance: float) -> Account:
    """Ranks, weights, kept energy and overlap of one matrix's changes (m, n), which are not changed."""
    deltas = [delta.double() for delta in deltas]
    left, values, right = _stacked(deltas, ranks, weights)
    energy = [float(s.square().sum()) for _, s, _ in (leading(d, k) for d, k in zip(deltas, ranks, strict=True))]
    sizes = [float(delta.square().sum()) for delta in deltas]
    return Account(
        tuple(ranks), tuple(weights), tuple(e / size if size else 1.0 for e, size in zip(energy, sizes, strict=True)),
        _overlap(left, values, right),
        _overlap(orthonormal(left, tolerance), values, orthonormal(right, tolerance)) if len(values) else 0.0,
    )  # fmt: skip


def _stacked(deltas: list[Tensor], ranks: Sequence[int], weights: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    parts = [leading(delta, rank) for delta, rank in zip(deltas, ranks, strict=True)]
    values = torch.cat([s * weight for (_, s, _), weight in zip(parts, weights, strict=True)])
    return torch.cat([u for u, _, _ in parts], 1), values, torch.cat([v for _, _, v in parts], 1)


def _overlap(left: Tensor, values: Tensor, right: Tensor) -> float:
    one = torch.eye(left.shape[1], dtype=left.dtype, device=left.device)
    return float((((left.T @ left - one) * values) @ (right.T @ right - one)).abs().sum())
