"""Trim, elect a sign, and average what agrees with it.

P. Yadav, D. Tam, L. Choshen, C. Raffel and M. Bansal, "TIES-Merging: Resolving Interference When Merging Models",
NeurIPS 2023, section 4.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from gratis.contract.card import Card, Claim
from gratis.contract.method import Cutoff, Merge, MergePart
from gratis.contract.parameters import param
from gratis.subjects.compiled import compiled_loops


class TIES(Merge):
    """Merge task vectors without letting small or conflicting changes wash out the large ones.

    Of each task vector only the largest `density` is kept; every weight then goes the way that most of the mass points
    to, by the mean of the experts that agree.
    """

    card = Card(
        title="TIES-Merging: Resolving Interference When Merging Models",
        authors="Yadav, Tam, Choshen, Raffel, Bansal",
        year=2023,
        seed=26,
        paper="NeurIPS 2023, arXiv:2306.01708",
        acts_on="checkpoints",
        free_of=("training", "data"),
        summary="one model from several fine-tunes, with conflicts resolved by sign",
        unchanged_when={"scale": 0.0},
        examples={"density": 0.5, "scope": "tensor"},
        differs="Exactly the stated share is kept: entries equal to the threshold are taken in their order.",
        limits="With few experts of one base, plain task arithmetic is often as good.",
        claims=(
            Claim(
                name="with half of each task vector kept, it beats plain averaging of three experts",
                task="digits-merging",
                metric="accuracy",
                compare="difference",
                at_least=0.02,
                against="average",
                parameters={"density": 0.5},
            ),
        ),
    )

    density: float = param(0.2, above=0, at_most=1, help="share of each task vector that is kept", search=(0.05, 1.0))
    scale: float = param(1.0, at_least=0, help="factor of the merged task vector (lambda)", search=(0.3, 2.0))
    scope: Literal["global", "tensor"] = param(
        "global", help="keep the share of the whole task vector (paper), or of each tensor"
    )
    divisor: Literal["count", "weight", "none"] = param(
        "count",
        help="average over the number of experts that agree (paper), over the sum of their weights, or add them up",
    )
    zero_sums: Literal["majority", "positive"] = param(
        "majority", help="sign where the mass cancels: the sign that most entries elected (released code), or positive"
    )

    def kept_share(self) -> tuple[float, str] | None:
        return (self.density, self.scope) if self.density < 1 else None

    def combine(self, experts: list[Tensor], part: MergePart) -> Tensor:
        for delta, cutoff in zip(experts, part.cutoffs, strict=False):
            trim(delta, cutoff, part.start)
        merged = elect_and_average(experts, part, self.divisor, self.zero_sums)
        return merged if self.scale == 1 else merged.mul_(self.scale)

    def revised(self, totals: dict[str, float]) -> Merge | None:
        return Negative(**self.parameters()) if self.zero_sums == "majority" and totals.get("signs", 0) < 0 else None


class Negative(TIES):
    """TIES with cancelled entries going down: what a negative majority asks for."""

    card = TIES.card

    def combine(self, experts: list[Tensor], part: MergePart) -> Tensor:
        for delta, cutoff in zip(experts, part.cutoffs, strict=False):
            trim(delta, cutoff, part.start)
        return elect_and_average(experts, part, self.divisor, "negative").mul_(self.scale)


def trim(delta: Tensor, cutoff: Cutoff, start: int) -> None:
    """Zero the entries of `delta` (a stretch from flat index `start` on) that are below the cutoff, in place."""
    first_dropped = min(max(cutoff.last + 1 - start, 0), len(delta))
    just_below = np.nextafter(np.float32(cutoff.magnitude), np.float32(-1))
    loops = compiled_loops(delta)
    for piece, below in ((delta[:first_dropped], float(just_below)), (delta[first_dropped:], cutoff.magnitude)):
        if len(piece) and loops is not None:
            loops.trim(piece, below)
        elif len(piece):
            torch.hardshrink(piece, below, out=piece)


def elect_and_average(deltas: list[Tensor], part: MergePart, divisor: str, zero_sums: str) -> Tensor:
    """Elect the sign of the weighted sum and average the entries that agree (section 4, steps 2 and 3).

    Where the sum is 0 although entries are not, the sign follows `zero_sums`; a majority is only known at the end, so
    such parts are marked for revision and go up for now.
    """
    weights = part.weights
    shares = [abs(weight) if divisor == "weight" else 1.0 for weight in weights]
    if (loops := compiled_loops(deltas[0])) is not None:
        signs, undecided = loops.elect_and_average(
            deltas, weights, shares, zero_goes_up=zero_sums != "negative", divide=divisor != "none"
        )
        if zero_sums == "majority":
            part.totals["signs"] = part.totals.get("signs", 0.0) + signs
            part.revise |= undecided
        return deltas[0]
    if any(weight != 1 for weight in weights):
        for delta, weight in zip(deltas, weights, strict=True):
            delta.mul_(weight)
    total = torch.add(deltas[0], deltas[1]) if len(deltas) > 1 else deltas[0].clone()
    for delta in deltas[2:]:
        total.add_(delta)
    signs = torch.sign(total)
    if zero_sums == "majority":
        part.totals["signs"] = part.totals.get("signs", 0.0) + signs.sum().item()
    # Signs of 0 become up or down. All in floats: masks of truth values are several times slower.
    signs.add_(-0.5 if zero_sums == "negative" else 0.5).sign_()
    merged = deltas[0].mul_(signs).relu_()
    count = torch.sign(merged).mul_(shares[0])
    for delta, share in zip(deltas[1:], shares[1:], strict=True):
        agreeing = delta.mul_(signs).relu_()
        merged.add_(agreeing)
        count.add_(agreeing.sign_(), alpha=share)
    if zero_sums == "majority" and _any_undecided(total, count):
        part.revise = True
    if divisor == "none":
        return merged.mul_(signs)
    if divisor == "weight":
        count.masked_fill_(count == 0, 1.0)
    else:
        count.clamp_min_(1.0)
    return merged.mul_(signs).div_(count)


def _any_undecided(total: Tensor, count: Tensor) -> bool:
    """Whether a sum is 0 although entries are not."""
    if total.is_cuda:
        return bool(((total == 0) & (count > 0)).any())
    # Comparisons of whole stretches are several times quicker in numpy than in torch.
    return bool(((total.numpy() == 0) & (count.numpy() > 0)).any())
