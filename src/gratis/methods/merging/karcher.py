"""The mean of several models on the sphere: the point with the least sum of squared angles.

H. Karcher, "Riemannian center of mass and mollifier smoothing", 1977, on flattened tensors. Every iterate lies in the span
of the models, so that one pass for their inner products gives all coefficients.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gratis.contract.card import Card, Claim
from gratis.contract.errors import InputError
from gratis.contract.method import Merge, MergePart
from gratis.contract.parameters import param

Vector = NDArray[np.float64]


class Karcher(Merge):
    """The spherical mean of the experts' weights, tensor by tensor, with the weighted mean of their lengths."""

    card = Card(
        title="Riemannian center of mass and mollifier smoothing",
        authors="Karcher",
        year=1977,
        paper="Communications on Pure and Applied Mathematics 30",
        acts_on="checkpoints",
        free_of=("training", "data", "base model"),
        summary="any number of models into one, along the arcs between them",
        examples={},
        limits="Tensors that point opposite ways have no spherical mean: they are averaged.",
        claims=(
            Claim(
                name="it is as good as the mean of three experts, within 0.05",
                task="digits-merging",
                metric="accuracy",
                compare="difference",
                at_least=-0.05,
                against="average",
                parameters={},
            ),
        ),
    )
    needs_base = False
    measures = True

    iterations: int = param(10, at_least=0, help="steps of exponential and logarithmic maps at most")
    tolerance: float = param(1e-5, above=0, unit="radians", help="length of a step at which it has converged")

    def measure(self, experts: list[Tensor], part: MergePart) -> Tensor:
        return inner_products(experts)

    def combine(self, experts: list[Tensor], part: MergePart) -> Tensor:
        return combination(experts, spherical_mean(part.measured, part.weights, self.iterations, self.tolerance))


def inner_products(experts: Sequence[Tensor]) -> Tensor:
    """(experts * experts,) inner products in float64, row by row."""
    stacked = torch.stack([expert.double() for expert in experts])
    return (stacked @ stacked.T).flatten()


def combination(experts: list[Tensor], factors: Sequence[float]) -> Tensor:
    """Sum of factor times expert, in place of the first."""
    merged = experts[0].mul_(factors[0])
    for expert, factor in zip(experts[1:], factors[1:], strict=True):
        merged.add_(expert, alpha=factor)
    return merged


def spherical_mean(
    products: tuple[float, ...], weights: tuple[float, ...], iterations: int, tolerance: float = 0.0
) -> list[float]:
    """Factors of the experts in their spherical mean: `iterations` steps from the normalised mean of directions."""
    count = len(weights)
    gram = np.asarray(products).reshape(count, count)
    lengths = np.sqrt(np.maximum(gram.diagonal(), 0.0))
    share = np.asarray(weights) * (lengths > 0)
    if share.sum() == 0:
        if any(weights) and not lengths.any():
            return [1.0] + [0.0] * (count - 1)
        raise InputError("The weights sum to 0, so there is no mean on the sphere.")
    share = share / share.sum()
    directions = np.diag(np.divide(1.0, lengths, out=np.zeros(count), where=lengths > 0))
    start = share @ directions
    if _length(start, gram) < 1e-6:
        return [float(s) for s in share]
    mean = _unit(start, gram)
    for _ in range(iterations):
        step = share @ _logarithms(mean, directions, gram)
        length = _length(step, gram)
        if length <= max(tolerance, 1e-12):
            break
        mean = _unit(np.cos(length) * mean + np.sin(length) / length * step, gram)
    factors: list[float] = (mean * float(share @ lengths)).tolist()
    return factors


def _length(vector: Vector, gram: Vector) -> float:
    return float(np.sqrt(max(float(vector @ gram @ vector), 0.0)))


def _unit(vector: Vector, gram: Vector) -> Vector:
    unit: Vector = vector / _length(vector, gram)
    return unit


def _logarithms(mean: Vector, directions: Vector, gram: Vector) -> Vector:
    """Tangents at `mean` that lead to each of `directions` (rows of factors)."""
    cosines = np.clip(directions @ gram @ mean, -1.0, 1.0)
    across = directions - cosines[:, None] * mean
    sizes = np.sqrt(np.maximum(np.einsum("ij,jk,ik->i", across, gram, across), 0.0))
    angles = np.arctan2(sizes, cosines)
    tangents: Vector = across * np.divide(angles, sizes, out=np.zeros_like(sizes), where=sizes > 1e-12)[:, None]
    return tangents
