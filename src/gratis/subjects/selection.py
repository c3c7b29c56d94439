"""The exact k-th largest magnitude of streams of numbers that do not fit in memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gratis.subjects.compiled import compiled_loops

SAMPLE_BLOCKS = 256
SAMPLE_BLOCK = 1024
SAMPLED = 16
"""At most one number of so many is in a sample: of a small tensor all but few would cost more than they spare."""
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
    tied: tuple[int, ...] | None = None
    """Entries equal to it in each stretch, where they were counted."""


def largest(stretches: Sequence[Stretch], keep: int, magnitudes: Magnitudes, run: Run) -> Kept:
    """What separates the `keep` largest magnitudes from the rest, exactly: `largest_of_each` of one stream."""
    return largest_of_each(stretches, [keep], lambda stretch: [magnitudes(stretch)], run)[0]


def largest_of_each(
    stretches: Sequence[Stretch], keeps: Sequence[int], magnitudes: Callable[[Stretch], Iterable[Tensor]], run: Run
) -> list[Kept]:
    """What separates the `keeps` largest magnitudes of several streams from the rest, exactly, in one pass over them.

    `magnitudes` gives each stream's (count,) numbers of a stretch, one after the other. One stretch is selected from as
    it is. Otherwise a sample brackets the answer; the pass counts what lies below and collects what lies within
    (narrowing the bracket where that would be too much to hold); the answer is selected from that. If the bracket
    misses, the bits of the numbers are counted instead (two more passes).
    """
    total = sum(stretch.count for stretch in stretches)
    if len(stretches) == 1:
        return [_at_once(values, keep) for values, keep in zip(magnitudes(stretches[0]), keeps, strict=True)]
    samples = _samples(stretches, magnitudes)
    searches = [_Search(total, keep, sample) for keep, sample in zip(keeps, samples, strict=True)]

    def survey(stretch: Stretch) -> list[_Seen]:
        return [search.survey(values) for search, values in zip(searches, magnitudes(stretch), strict=True)]

    for found in run(survey, stretches):
        for search, seen in zip(searches, found, strict=True):
            search.add(seen)

    def stream(number: int) -> Magnitudes:
        return lambda stretch: next(itertools.islice(magnitudes(stretch), number, None))

    return [
        search.kept() or _by_bits(stretches, total - keep, total, stream(number), run)
        for number, (search, keep) in enumerate(zip(searches, keeps, strict=True))
    ]


def _at_once(magnitudes: Tensor, keep: int) -> Kept:
    values = magnitudes.numpy(force=True)
    threshold = np.partition(values, len(values) - keep)[len(values) - keep]
    ties = keep - int(np.count_nonzero(values > threshold))
    return Kept(float(threshold), ties, ties == int(np.count_nonzero(values == threshold)))


@dataclass(frozen=True)
class _Seen:
    """What of a stretch lies below, at and within a bracket, whose ends are bits of magnitudes."""

    low: int
    high: int
    count: int
    below: int
    at_low: int
    at_high: int
    inside: NDArray[np.uint32]


class _Search:
    """The search for one stream's k-th magnitude. Magnitudes of float32 order as their bits do, read as integers."""

    def __init__(self, total: int, keep: int, sample: NDArray[np.float32]) -> None:
        self._total, self._keep = total, keep
        self._bracket = _bracket(sample, (total - keep) / max(total - 1, 1))
        self._below = self._seen = self._held = 0
        # One entry per stretch, so that the last tie is found without reading the stream again.
        self._at_low: list[int] = []
        self._at_high: list[int] = []
        self._inside: list[NDArray[np.uint32]] = []

    def survey(self, magnitudes: Tensor) -> _Seen:
        """Count a stretch; may run beside others."""
        low, high = self._bracket
        if magnitudes.is_cuda:
            return _Seen(low, high, len(magnitudes), *_counted_there(magnitudes, low, high))
        if (loops := compiled_loops(magnitudes)) is not None:
            return _Seen(low, high, len(magnitudes), *loops.survey(magnitudes, low, high))
        # Comparisons of whole stretches are several times quicker in numpy than in torch.
        bits = magnitudes.numpy().view(np.uint32)
        below = int(np.count_nonzero(bits < low))
        if low == high:
            at_low = int(np.count_nonzero(bits == low))
            return _Seen(low, high, len(bits), below, at_low, at_low, bits[:0].copy())
        # Where few are wanted, half the time of indexing by truth values.
        found = bits.take(np.flatnonzero(np.subtract(bits, np.uint32(low)) <= np.uint32(high - low)))
        return _Seen(low, high, len(bits), below, *_parted(found, low, high))

    def add(self, seen: _Seen) -> None:
        """Take in a stretch's counts, in the stream's order."""
        low, high = self._bracket
        below, at_low, at_high, inside = seen.below, seen.at_low, seen.at_high, seen.inside
        if (seen.low, seen.high) != (low, high):
            # Surveyed before the bracket was narrowed, which left both of its old ends outside.
            below += at_low + int(np.count_nonzero(inside < low))
            at_low, at_high, inside = _parted(inside[(inside >= low) & (inside <= high)], low, high)
        self._below += below
        self._seen += seen.count
        self._held += len(inside)
        self._at_low.append(at_low)
        self._at_high.append(at_high)
        self._inside.append(inside)
        if self._held > MOST_HELD:
            self._narrow()

    def _narrow(self) -> None:
        inside = np.concatenate(self._inside)
        rank = self._total - self._keep
        likely = round(rank * self._seen / self._total) - self._below - sum(self._at_low)
        ends = np.clip([likely - MOST_HELD // 4, likely + MOST_HELD // 4], 0, len(inside) - 1)
        inside.partition(ends)
        low, high = (int(inside[end]) for end in ends)
        self._below += sum(self._at_low) + int(np.count_nonzero(inside < low))
        self._bracket = low, high
        parted = [_parted(piece[(piece >= low) & (piece <= high)], low, high) for piece in self._inside]
        self._at_low, self._at_high = [found[0] for found in parted], [found[1] for found in parted]
        self._inside = [found[2] for found in parted]
        self._held = sum(map(len, self._inside))

    def kept(self) -> Kept | None:
        """The answer, once every stretch was taken in; None where it lies outside the bracket."""
        low, high = self._bracket
        rank = self._total - self._keep - self._below
        at_low, at_high = sum(self._at_low), sum(self._at_high) if high != low else 0
        if rank < 0:
            return None
        if rank < at_low:
            bits, tied = low, self._at_low
            first = 0
        elif rank < at_low + self._held:
            inside = np.concatenate(self._inside)
            inside.partition(rank - at_low)
            bits = int(inside[rank - at_low])
            tied = [int(np.count_nonzero(piece == bits)) for piece in self._inside]
            first = at_low + int(np.count_nonzero(inside < bits))
        elif rank < at_low + self._held + at_high:
            bits, tied = high, self._at_high
            first = at_low + self._held
        else:
            return None
        ties = first + sum(tied) - rank
        magnitude = float(np.uint32(bits).view(np.float32))
        return Kept(magnitude, ties, rank == first, tuple(tied))


def _parted(found: NDArray[np.uint32], low: int, high: int) -> tuple[int, int, NDArray[np.uint32]]:
    """How many of the numbers from `low` to `high` equal each end, and the others."""
    at_low = int(np.count_nonzero(found == low))
    at_high = int(np.count_nonzero(found == high)) if high != low else at_low
    if at_low or at_high:
        found = found[(found != low) & (found != high)]
    return at_low, at_high, found


def _counted_there(magnitudes: Tensor, low: int, high: int) -> tuple[int, int, int, NDArray[np.uint32]]:
    """The same counts by an accelerator, which hands back only what lies within."""
    bits = magnitudes.view(torch.int32)
    found = bits[(bits >= low) & (bits <= high)].numpy(force=True).view(np.uint32)
    return int((bits < low).sum()), *_parted(found, low, high)


def _samples(
    stretches: Sequence[Stretch], magnitudes: Callable[[Stretch], Iterable[Tensor]]
) -> list[NDArray[np.float32]]:
    """Some of each stream's numbers, from blocks spread over it."""
    step = max(sum(stretch.count for stretch in stretches) // SAMPLE_BLOCKS, SAMPLED * SAMPLE_BLOCK)
    pieces: list[list[NDArray[np.float32]]] = []
    wanted = passed = 0
    for stretch in stretches:
        while wanted < passed + stretch.count:
            at = stretch.start + wanted - passed
            count = min(SAMPLE_BLOCK, stretch.start + stretch.count - at)
            pieces.append(
                [values.numpy(force=True).copy() for values in magnitudes(Stretch(stretch.tensor, at, count))]
            )
            wanted += step
        passed += stretch.count
    return [np.concatenate(stream) for stream in zip(*pieces, strict=True)]


def _bracket(sample: NDArray[np.float32], share: float) -> tuple[int, int]:
    """Bits of two magnitudes between which the one at `share` of the stream almost surely is."""
    margin = 0.01 if len(sample) > 100_000 else 0.02 if len(sample) > 10_000 else 0.1
    last = len(sample) - 1
    low, high = max(int((share - margin) * last), 0), min(int((share + margin) * last) + 1, last)
    bits = np.partition(sample, (low, high))[[low, high]].view(np.uint32)
    return int(bits[0]) if share > margin else 0, int(bits[1])


def _by_bits(stretches: Sequence[Stretch], rank: int, total: int, magnitudes: Magnitudes, run: Run) -> Kept:
    """Radix selection: float32 magnitudes order as their bits do."""

    def upper(stretch: Stretch) -> Tensor:
        return torch.bincount(magnitudes(stretch).view(torch.int32) >> 16, minlength=32768).cpu()

    counts = torch.zeros(32768, dtype=torch.long)
    for found in run(upper, stretches):
        counts += found
    ends = counts.cumsum(0)
    prefix = int((ends <= rank).sum())
    before = int(ends[prefix - 1]) if prefix else 0

    def lower(stretch: Stretch) -> Tensor:
        bits = magnitudes(stretch).view(torch.int32)
        return torch.bincount(bits[(bits >> 16) == prefix] & 0xFFFF, minlength=65536).cpu()

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
        if kept.tied is not None and left > kept.tied[number]:
            left -= kept.tied[number]
            continue
        tied = np.flatnonzero(magnitudes(stretch).numpy(force=True) == np.float32(kept.magnitude))
        if left <= len(tied):
            return number, stretch.start + int(tied[left - 1])
        left -= len(tied)
    raise AssertionError("fewer ties than counted")
