"""Loops over a stretch of a checkpoint that do in one pass what torch does in many, compiled by numba.

Each has a form in torch at the place where it is used, for accelerators and where numba is not installed; both write the
same bytes. Loops work on pieces that stay in the processor's first cache, and none of them holds the interpreter's lock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

Loop = TypeVar("Loop", bound=Callable[..., Any])
PIECE = 2048
"""Numbers worked on at a time within a stretch."""
READ = (torch.bfloat16, torch.float32)
"""What `difference` reads."""
SIXTEEN, ROUNDING, MAGNITUDE, INFINITE = np.uint32(16), np.uint32(0x7FFF), np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)
NOT_A_NUMBER = np.uint16(0x7FC0)
ZERO, ONE, LAST_BIT = np.float32(0), np.float32(1), np.uint32(1)


def compiled(*signatures: str) -> Callable[[Loop], Loop]:
    """The loop in machine code, kept on disk; for `signatures` at once, for others at their first use."""
    return cast(Callable[[Loop], Loop], njit(list(signatures) or None, nogil=True, cache=True, error_model="numpy"))


def widen(values: Tensor, into: Tensor) -> None:
    """Write bfloat16 values as float32 `into` a stretch."""
    _widen(_bits(values), _numbers(into))


def difference(values: Tensor, base: Tensor, into: Tensor) -> None:
    """Write values less base, (count,) float32, `into` a stretch. Values are of a dtype in `READ`."""
    if values.dtype == torch.bfloat16:
        _difference_of_halves(_bits(values), base.numpy(), into.numpy())
    else:
        _difference(values.numpy(), base.numpy(), into.numpy())


def rounded_sum(merged: Tensor, base: Tensor) -> Tensor:
    """Merged plus base, both (count,) float32, rounded to bfloat16."""
    rounded = torch.empty(merged.shape, dtype=torch.bfloat16)
    _rounded_sum(merged.numpy(), base.numpy(), _bits(rounded))
    return rounded


def survey(magnitudes: Tensor, low: int, high: int) -> tuple[int, int, int, NDArray[np.uint32]]:
    """Of magnitudes read as bits: how many lie below `low`, are equal to it and to `high`, and those between."""
    bits = _numbers(magnitudes)
    found = np.empty(len(bits) + 1, dtype=np.uint32)
    below, at_low, at_high, count = _survey(bits, np.uint32(low), np.uint32(high), found)
    return below, at_low, at_high, found[:count].copy()


def trim(delta: Tensor, below: float) -> None:
    """Zero the entries whose magnitude is `below` or less, in place."""
    _trim(delta.numpy(), np.float32(below))


def scale_kept(delta: Tensor, kept: NDArray[np.bool_], scale: np.float32) -> None:
    """Multiply what is kept by `scale` and the rest by 0, in place."""
    _scale_kept(delta.numpy(), kept, scale)


def elect_and_average(
    deltas: list[Tensor], weights: Sequence[float], shares: Sequence[float], zero_goes_up: bool, divide: bool
) -> tuple[int, bool]:
    """TIES' election and mean, written in place of the first delta; the others hold what is weighted afterwards.

    Returns the sum of the elected signs, and whether any sum was 0 although entries were not.
    """
    rows = tuple(delta.numpy() for delta in deltas)
    factors, parts = np.array(weights, dtype=np.float32), np.array(shares, dtype=np.float32)
    signs, undecided = _elect_and_average(rows, factors, parts, ONE if zero_goes_up else -ONE, divide)
    return signs, bool(undecided)


def _bits(halves: Tensor) -> NDArray[np.uint16]:
    return halves.view(torch.uint16).numpy()


def _numbers(magnitudes: Tensor) -> NDArray[np.uint32]:
    return magnitudes.numpy().view(np.uint32)


# Slices are indexed from 0: of `begin + i` the compiler does not know that it stays within, and writes slow loops.


@compiled("(uint16[::1], uint32[::1])")
def _widen(values: Any, bits: Any) -> None:
    # A bfloat16 is the upper half of the float32 of the same value.
    for i in range(bits.size):
        bits[i] = np.uint32(values[i]) << SIXTEEN


@compiled("(uint16[::1], float32[::1], float32[::1])")
def _difference_of_halves(values: Any, base: Any, into: Any) -> None:
    for begin in range(0, into.size, PIECE):
        value, less, out = values[begin : begin + PIECE], base[begin : begin + PIECE], into[begin : begin + PIECE]
        bits = out.view(np.uint32)
        for i in range(bits.size):
            bits[i] = np.uint32(value[i]) << SIXTEEN
        for i in range(out.size):
            out[i] -= less[i]


@compiled("(float32[::1], float32[::1], float32[::1])")
def _difference(values: Any, base: Any, into: Any) -> None:
    for i in range(into.size):
        into[i] = values[i] - base[i]


@compiled("(float32[::1], float32[::1], uint16[::1])")
def _rounded_sum(merged: Any, base: Any, rounded: Any) -> None:
    sums = np.empty(PIECE, np.float32)
    bits = sums.view(np.uint32)
    for begin in range(0, merged.size, PIECE):
        change, start, out = merged[begin : begin + PIECE], base[begin : begin + PIECE], rounded[begin : begin + PIECE]
        for i in range(out.size):
            sums[i] = change[i] + start[i]
        for i in range(out.size):
            # To the nearest, and of two that are equally near to the even one.
            half = np.uint16((bits[i] + ROUNDING + ((bits[i] >> SIXTEEN) & LAST_BIT)) >> SIXTEEN)
            out[i] = half if bits[i] & MAGNITUDE <= INFINITE else NOT_A_NUMBER


@compiled("(uint32[::1], uint32, uint32, uint32[::1])")
def _survey(bits: Any, low: Any, high: Any, found: Any) -> tuple[int, int, int, int]:
    marks = np.zeros(PIECE, np.uint8)
    marked = marks.view(np.uint64)
    first, width = np.uint32(low + LAST_BIT), np.uint32(max(high, low + LAST_BIT) - low - LAST_BIT)
    below: Any = 0
    at_low: Any = 0
    at_high: Any = 0
    count = 0
    for begin in range(0, bits.size, PIECE):
        piece = bits[begin : begin + PIECE]
        under = lowest = highest = np.int32(0)
        for i in range(piece.size):
            under += np.int32(piece[i] < low)
            lowest += np.int32(piece[i] == low)
            highest += np.int32(piece[i] == high)
        below, at_low, at_high = below + under, at_low + lowest, at_high + highest
        for i in range(piece.size):
            marks[i] = np.uint8(np.uint32(piece[i] - first) < width)
        # Few are marked: eight marks are looked at together.
        for word in range(piece.size // 8):
            if marked[word]:
                for i in range(8 * word, 8 * word + 8):
                    found[count] = piece[i]
                    count += marks[i]
        for i in range(piece.size // 8 * 8, piece.size):
            found[count] = piece[i]
            count += marks[i]
    return below, at_low, at_high, count


@compiled("(float32[::1], float32)")
def _trim(delta: Any, below: Any) -> None:
    for i in range(delta.size):
        delta[i] = delta[i] if abs(delta[i]) > below else ZERO


@compiled("(float32[::1], boolean[::1], float32)")
def _scale_kept(delta: Any, kept: Any, scale: Any) -> None:
    for i in range(delta.size):
        delta[i] *= scale if kept[i] else ZERO


@compiled()
def _elect_and_average(rows: Any, weights: Any, shares: Any, sign_of_zero: Any, divide: bool) -> tuple[int, int]:
    total, mass, count = np.empty(PIECE, np.float32), np.empty(PIECE, np.float32), np.empty(PIECE, np.float32)
    signs: Any = 0
    undecided: Any = 0
    for begin in range(0, rows[0].size, PIECE):
        merged = rows[0][begin : begin + PIECE]
        for i in range(merged.size):
            total[i] = mass[i] = count[i] = ZERO
        for number, row in enumerate(rows):
            weight, delta = weights[number], row[begin : begin + PIECE]
            for i in range(delta.size):
                delta[i] *= weight
                total[i] += delta[i]
        elected = open_sums = np.int32(0)
        for i in range(merged.size):
            elected += np.int32(total[i] > ZERO) - np.int32(total[i] < ZERO)
        signs += elected
        for number, row in enumerate(rows):
            share, delta = shares[number], row[begin : begin + PIECE]
            for i in range(delta.size):
                sign = ONE if total[i] > ZERO else -ONE if total[i] < ZERO else sign_of_zero
                agreeing = delta[i] * sign
                mass[i] += agreeing if agreeing > ZERO else ZERO
                count[i] += share if agreeing > ZERO else ZERO
        for i in range(merged.size):
            open_sums |= np.int32(total[i] == ZERO) & np.int32(count[i] > ZERO)
            sign = ONE if total[i] > ZERO else -ONE if total[i] < ZERO else sign_of_zero
            merged[i] = mass[i] * sign / (count[i] if divide and count[i] > ZERO else ONE)
        undecided |= open_sums
    return signs, undecided
