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
SIXTEEN, ROUNDING, NOT_A_NUMBER, LAST_BIT = np.uint32(16), np.uint32(0x7FFF), np.uint16(0x7FC0), np.uint32(1)
ZERO, ONE = np.float32(0), np.float32(1)


def compiled(*signatures: str) -> Callable[[Loop], Loop]:
    """The loop in machine code, kept on disk; for `signatures` at once, for others at their first use."""

    def made(loop: Loop) -> Loop:
        try:
            return cast(Loop, njit(list(signatures) or None, nogil=True, cache=True, error_model="numpy")(loop))
        except RuntimeError as error:
            if "cannot cache" not in str(error):
                raise
            # Neither beside this file nor in the user's cache can be written: every process compiles anew.
            return cast(Loop, njit(list(signatures) or None, nogil=True, error_model="numpy")(loop))

    return made


def widen(halves: Tensor, into: Tensor) -> None:
    """Write bfloat16 numbers as float32 `into` a stretch."""
    _widen(_bits(halves), into.numpy())


def difference(halves: Tensor, base: Tensor, into: Tensor) -> None:
    """Write bfloat16 numbers less the base, (count,) float32, `into` a stretch."""
    _difference(_bits(halves), base.numpy(), into.numpy())


def rounded_sum(merged: Tensor, base: Tensor) -> Tensor:
    """Merged plus base, both (count,) float32, rounded to bfloat16."""
    rounded = torch.empty(merged.shape, dtype=torch.bfloat16)
    _rounded_sum(merged.numpy(), base.numpy(), _bits(rounded))
    return rounded


def survey(magnitudes: Tensor, low: int, high: int) -> tuple[int, int, int, NDArray[np.uint32]]:
    """Of magnitudes read as bits: how many lie below `low`, are equal to it and to `high`, and those between."""
    bits = magnitudes.numpy().view(np.uint32)
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


# Whole numbers are kept at 32 bits by casts, as sums of two would have 64, of which half as many fit in a register.


@njit(inline="always", nogil=True, error_model="numpy")
def _as_float(half: Any) -> Any:
    # A bfloat16 is the upper half of the float32 of the same value.
    return np.uint32(np.uint32(half) << SIXTEEN).view(np.float32)


@njit(inline="always", nogil=True, error_model="numpy")
def _as_half(number: Any) -> Any:
    # To the nearest, and of two that are equally near to the even one.
    bits = np.float32(number).view(np.uint32)
    rounded = np.uint32(bits + np.uint32(ROUNDING + np.uint32(np.uint32(bits >> SIXTEEN) & LAST_BIT)))
    return np.uint16(rounded >> SIXTEEN) if number == number else NOT_A_NUMBER


@compiled("(uint16[::1], float32[::1])")
def _widen(halves: Any, into: Any) -> None:
    for i in range(into.size):
        into[i] = _as_float(halves[i])


@compiled("(uint16[::1], float32[::1], float32[::1])")
def _difference(halves: Any, base: Any, into: Any) -> None:
    for i in range(into.size):
        into[i] = _as_float(halves[i]) - base[i]


@compiled("(float32[::1], float32[::1], uint16[::1])")
def _rounded_sum(merged: Any, base: Any, halves: Any) -> None:
    for i in range(halves.size):
        halves[i] = _as_half(merged[i] + base[i])


# Slices are indexed from 0: of `begin + i` the compiler does not know that it stays within, and writes slow loops.


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
            under = np.int32(under + np.int32(piece[i] < low))
            lowest = np.int32(lowest + np.int32(piece[i] == low))
            highest = np.int32(highest + np.int32(piece[i] == high))
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
            elected = np.int32(elected + np.int32(total[i] > ZERO) - np.int32(total[i] < ZERO))
        signs += elected
        for number, row in enumerate(rows):
            share, delta = shares[number], row[begin : begin + PIECE]
            for i in range(delta.size):
                sign = ONE if total[i] > ZERO else -ONE if total[i] < ZERO else sign_of_zero
                agreeing = delta[i] * sign
                mass[i] += agreeing if agreeing > ZERO else ZERO
                count[i] += share if agreeing > ZERO else ZERO
        for i in range(merged.size):
            open_sums = np.int32(open_sums | (np.int32(total[i] == ZERO) & np.int32(count[i] > ZERO)))
            sign = ONE if total[i] > ZERO else -ONE if total[i] < ZERO else sign_of_zero
            merged[i] = mass[i] * sign / (count[i] if divide and count[i] > ZERO else ONE)
        undecided |= open_sums
    return signs, undecided
