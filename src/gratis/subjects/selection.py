"""The exact k-th largest magnitude of a stream of numbers that does not fit in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
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
Run = Callable[[Callable[[Stretch], Any], Sequence[Stretch]], Iterable[Any]]
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

    def survey(stretch: Stretch) -> tuple[int, int, int, NDArray[np.float32]]:
        # Comparisons of whole stretches are several times quicker in numpy than in torch.
        values = magnitudes(stretch).numpy()
        below, above = int(np.count_nonzero(values < low)), int(np.count_nonzero(values > high))
        at_high = int(np.count_nonzero(values == high)) if high != low else 0
        return below, above, at_high, np.compress((values > low) & (values < high), values)

    below = above = at_high = 0
    pieces: list[NDArray[np.float32]] = []
    for found in run(survey, stretches):
        below, above, at_high = below + found[0], above + found[1], at_high + found[2]
        pieces.append(found[3])
    inside = np.concatenate(pieces)
    at_low = total - below - above - at_high - len(inside)
    if rank < below or rank >= total - above:
        return _by_bits(stretches, rank, total, magnitudes, run)
    if rank < below + at_low:
        greater = total - below - at_low
        return Kept(low, keep - greater, keep - greater == at_low)
    if rank >= below + at_low + len(inside):
        return Kept(high, keep - above, keep - above == at_high)
    place = rank - below - at_low
    threshold = np.partition(inside, place)[place]
    equal = int(np.count_nonzero(inside == threshold))
    greater = above + at_high + int(np.count_nonzero(inside > threshold))
    return Kept(float(threshold), keep - greater, keep - greater == equal)


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
    margin = 0.01 if len(sample) > 100_000 else 0.02 if len(sample) > 10_000 else 0.1
    last = len(sample) - 1
    low = sample[max(int((share - margin) * last), 0)] if share > margin else torch.tensor(0.0)
    high = sample[min(int((share + margin) * last) + 1, last)]
    return float(low), float(high)


def _by_bits(stretches: Sequence[Stretch], rank: int, total: int, magnitudes: Magnitudes, run: Run) -> Kept:
    """Radix selection: float32 magnitudes order as their bits do."""

    def upper(stretch: Stretch) -> Tensor:
        return torch.bincount(magnitudes(stretch).view(torch.int32) >> 16, minlength=32768)

    counts = torch.zeros(32768, dtype=torch.long)
    for found in run(upper, stretches):
        counts += found
    ends = counts.cumsum(0)
    prefix = int((ends <= rank).sum())
    before = int(ends[prefix - 1]) if prefix else 0

    def lower(stretch: Stretch) -> Tensor:
        bits = magnitudes(stretch).view(torch.int32)
        return torch.bincount(bits[(bits >> 16) == prefix] & 0xFFFF, minlength=65536)

    fine = torch.zeros(65536, dtype=torch.long)
    for found in run(lower, stretches):
        fine += found
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
        tied = np.flatnonzero(magnitudes(stretch).numpy() == np.float32(kept.magnitude))
        if left <= len(tied):
            return number, stretch.start + int(tied[left - 1])
        left -= len(tied)
    raise AssertionError("fewer ties than counted")
