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
MOST_HELD = 8_000_000
"""Numbers within the bracket that are held at a time, however long the stream is."""


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

    One stretch is selected from as it is. Otherwise a sample brackets the answer; one pass counts what lies below and
    collects what lies within (narrowing the bracket where that would be too much to hold); the answer is selected from
    that. If the bracket misses, the bits of the numbers are counted instead (two more passes).
    """
    total = sum(stretch.count for stretch in stretches)
    rank = total - keep
    if len(stretches) == 1:
        values = magnitudes(stretches[0]).numpy(force=True)
        threshold = np.partition(values, rank)[rank]
        ties = keep - int(np.count_nonzero(values > threshold))
        return Kept(float(threshold), ties, ties == int(np.count_nonzero(values == threshold)))
    low, high = _bracket(stretches, rank / max(total - 1, 1), magnitudes)

    def survey(stretch: Stretch) -> tuple[float, float, int, int, int, NDArray[np.float32]]:
        # Comparisons of whole stretches are several times quicker in numpy than in torch.
        values, (first, last) = magnitudes(stretch).numpy(force=True), (low, high)
        below, above = int(np.count_nonzero(values < first)), int(np.count_nonzero(values > last))
        at_last = int(np.count_nonzero(values == last)) if last != first else 0
        return first, last, below, above, at_last, np.compress((values > first) & (values < last), values)

    below = above = at_high = seen = held = 0
    pieces: list[NDArray[np.float32]] = []
    for stretch, (first, last, less, more, at_last, piece) in zip(stretches, run(survey, stretches), strict=True):
        seen += stretch.count
        if (first, last) != (low, high):
            # Surveyed before the bracket was narrowed, which left both of its ends outside.
            at_first = stretch.count - less - more - at_last - len(piece)
            less += at_first + int(np.count_nonzero(piece < low))
            more += at_last + int(np.count_nonzero(piece > high))
            at_last = int(np.count_nonzero(piece == high)) if high != low else 0
            piece = np.compress((piece > low) & (piece < high), piece)
        below, above, at_high, held = below + less, above + more, at_high + at_last, held + len(piece)
        pieces.append(piece)
        if held > MOST_HELD:
            inside = np.concatenate(pieces)
            at_low = seen - below - above - at_high - held
            likely = round(rank * seen / total) - below - at_low
            ends = np.clip([likely - MOST_HELD // 4, likely + MOST_HELD // 4], 0, held - 1)
            inside.partition(ends)
            low, high = (float(inside[end]) for end in ends)
            below += at_low + int(np.count_nonzero(inside < low))
            above += at_high + int(np.count_nonzero(inside > high))
            at_high = int(np.count_nonzero(inside == high)) if high != low else 0
            pieces = [np.compress((inside > low) & (inside < high), inside)]
            held = len(pieces[0])
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
