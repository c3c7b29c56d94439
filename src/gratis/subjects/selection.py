"""The exact k-th largest magnitude of a stream of numbers that does not fit in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLE_BLOCKS = 256
SAMPLE_BLOCK = 1024


@dataclass(frozen=True)
class Stretch:
    """`count` numbers of a stream, from its flat index `start` on; `tensor` says of what."""

    tensor: str
    start: int
    count: int


Magnitudes = Callable[[Stretch], Tensor]
Run = Callable[[Callable[[Stretch], object], Sequence[Stretch]], Iterable[object]]
"""Applies a function to stretches, perhaps in several threads, and yields the results in order."""


@dataclass(frozen=True)
class Kept:
    """The smallest magnitude of the k largest, and how many entries equal to it belong to them."""

    magnitude: float
    ties: int
    all_ties: bool


def largest(stretches: Sequence[Stretch], keep: int, magnitudes: Magnitudes, run: Run) -> Kept:
    """What separates the `keep` largest magnitudes from the rest, exactly, in two passes over the stream.

    A sample brackets the answer; one pass counts what lies below and collects what lies within; the answer is selected
    from that. If the bracket misses, the bits of the numbers are counted instead (two more passes).
    """
    total = sum(stretch.count for stretch in stretches)
    rank = total - keep
    low, high = _bracket(stretches, rank / max(total - 1, 1), magnitudes)

    def survey(stretch: Stretch) -> tuple[int, int, int, Tensor]:
        values = magnitudes(stretch)
        below, above = int((values < low).sum()), int((values > high).sum())
        inside = values[(values > low) & (values < high)]
        return below, above, int((values == high).sum()) if high != low else 0, inside

    found = list(run(survey, stretches))
    below = sum(f[0] for f in found)  # type: ignore[index]
    above = sum(f[1] for f in found)  # type: ignore[index]
    at_high = sum(f[2] for f in found)  # type: ignore[index]
    inside = torch.cat([f[3] for f in found])  # type: ignore[index]
    at_low = total - below - above - at_high - len(inside)
    if rank < below or rank >= total - above:
        return _by_bits(stretches, rank, total, magnitudes, run)
    if rank < below + at_low:
        greater = total - below - at_low
        return Kept(low, keep - greater, keep - greater == at_low)
    if rank >= below + at_low + len(inside):
        return Kept(high, keep - above, keep - above == at_high)
    threshold = float(inside.kthvalue(rank - below - at_low + 1).values)
    equal = int((inside == threshold).sum())
    greater = above + at_high + int((inside > threshold).sum())
    return Kept(threshold, keep - greater, keep - greater == equal)


def _bracket(stretches: Sequence[Stretch], share: float, magnitudes: Magnitudes) -> tuple[float, float]:
    total = sum(stretch.count for stretch in stretches)
    step = max(total // SAMPLE_BLOCKS, 1)
    pieces, wanted, passed = [], 0, 0
    for stretch in stretches:
        while wanted < passed + stretch.count:
            at = stretch.start + wanted - passed
            count = min(SAMPLE_BLOCK, stretch.start + stretch.count - at)
            pieces.append(magnitudes(Stretch(stretch.tensor, at, count)).clone())
            wanted += step
        passed += stretch.count
    sample = torch.cat(pieces).sort().values
    margin = 0.02 if len(sample) > 10_000 else 0.1
    last = len(sample) - 1
    low = sample[max(int((share - margin) * last), 0)] if share > margin else torch.tensor(0.0)
    high = sample[min(int((share + margin) * last) + 1, last)]
    return float(low), float(high)


def _by_bits(stretches: Sequence[Stretch], rank: int, total: int, magnitudes: Magnitudes, run: Run) -> Kept:
    """Radix selection: float32 magnitudes order as their bits do."""

    def upper(stretch: Stretch) -> Tensor:
        return torch.bincount(magnitudes(stretch).view(torch.int32) >> 16, minlength=32768)

    counts = torch.stack(list(run(upper, stretches))).sum(0)  # type: ignore[arg-type]
    ends = counts.cumsum(0)
    prefix = int((ends <= rank).sum())
    before = int(ends[prefix - 1]) if prefix else 0

    def lower(stretch: Stretch) -> Tensor:
        bits = magnitudes(stretch).view(torch.int32)
        return torch.bincount(bits[(bits >> 16) == prefix] & 0xFFFF, minlength=65536)

    fine = torch.stack(list(run(lower, stretches))).sum(0)  # type: ignore[arg-type]
    ends = fine.cumsum(0)
    suffix = int((ends <= rank - before).sum())
    threshold = torch.tensor((prefix << 16) | suffix, dtype=torch.int32).view(torch.float32)
    greater = total - before - int(ends[suffix])
    ties = total - rank - greater
    return Kept(float(threshold), ties, ties == int(fine[suffix]))


def last_tie(stretches: Sequence[Stretch], kept: Kept, magnitudes: Magnitudes) -> tuple[int, int]:
    """(stretch number, flat index) of the last entry equal to the threshold that is kept, in the stream's order."""
    left = kept.ties
    for number, stretch in enumerate(stretches):
        tied = (magnitudes(stretch) == kept.magnitude).nonzero()[:, 0]
        if left <= len(tied):
            return number, stretch.start + int(tied[left - 1])
        left -= len(tied)
    raise AssertionError("fewer ties than counted")
