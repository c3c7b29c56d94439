from __future__ import annotations

import numpy as np
import pytest
import torch

from gratis.subjects import selection
from gratis.subjects.selection import Stretch, largest_of_each, last_tie

SIZE, STRETCH = 200_000, 65_536


def streams(kind):
    """Two streams of magnitudes (2, SIZE) float32."""
    generator = np.random.default_rng(0)
    if kind == "levels":
        # Eighths: thousands of equal numbers, also at both ends of any bracket.
        return torch.from_numpy((generator.integers(0, 9, (2, SIZE)) / 8).astype(np.float32))
    if kind == "rounded":
        return torch.from_numpy(generator.normal(size=(2, SIZE)).astype(np.float32)).abs().bfloat16().float()
    if kind == "mostly zero":
        values = generator.normal(size=(2, SIZE)) * (generator.random((2, SIZE)) < 0.3)
        return torch.from_numpy(np.abs(values).astype(np.float32))
    return torch.from_numpy(np.abs(generator.normal(size=(2, SIZE))).astype(np.float32))


def found(values, keeps):
    stretches = [Stretch("t", at, min(STRETCH, SIZE - at)) for at in range(0, SIZE, STRETCH)]

    def magnitudes(stretch):
        return list(values[:, stretch.start : stretch.start + stretch.count])

    return stretches, magnitudes, largest_of_each(stretches, keeps, magnitudes, map)


@pytest.mark.parametrize("kind", ["normal", "rounded", "levels", "mostly zero"])
@pytest.mark.parametrize("shares", [(0.5, 0.2), (0.9, 0.01), (1 / SIZE, 1.0), (0.875, 0.111)])
def test_against_sorting_everything(kind, shares):
    values, keeps = streams(kind), [round(share * SIZE) for share in shares]
    stretches, magnitudes, kept = found(values, keeps)
    for number, (keep, one) in enumerate(zip(keeps, kept, strict=True)):
        numbers = values[number].numpy()
        threshold = np.sort(numbers)[SIZE - keep]
        equal = np.flatnonzero(numbers == threshold)
        ties = keep - int((numbers > threshold).sum())
        assert (one.magnitude, one.ties, one.all_ties) == (threshold, ties, ties == len(equal))
        stretch, index = last_tie(stretches, one, lambda part, number=number: magnitudes(part)[number])
        assert index == equal[ties - 1]
        assert stretch == index // STRETCH


@pytest.mark.parametrize("kind", ["normal", "rounded", "levels", "mostly zero"])
def test_a_small_sample_brackets_the_answer_so_that_one_pass_is_enough(kind, monkeypatch):
    def missed(*arguments):
        raise AssertionError("the bracket missed")

    monkeypatch.setattr(selection, "_by_bits", missed)
    sampled = []
    monkeypatch.setattr(selection, "_bracket", lambda sample, share, real=selection._bracket: (
        sampled.append(len(sample)), real(sample, share))[1])  # fmt: skip
    found(streams(kind), [SIZE // 2, SIZE // 5])
    assert all(0 < count <= SIZE // 12 for count in sampled)


@pytest.mark.parametrize("off", [-10, 10])
def test_an_answer_at_either_end_of_the_bracket_is_in_it(off, monkeypatch):
    monkeypatch.setattr(selection, "_by_bits", None)
    values = streams("levels")
    for number, kept in enumerate(found(values, [int((row == 1).sum()) + off for row in values])[2]):
        assert kept.magnitude == (1.0 if off < 0 else 0.875)
        assert kept.ties == (int((values[number] == 1).sum()) - 10 if off < 0 else 10)


def test_where_the_bracket_misses_bits_are_counted(monkeypatch):
    values = streams("rounded")
    right = found(values, [SIZE // 2, SIZE // 5])[2]
    monkeypatch.setattr(selection, "_bracket", lambda sample, share: (0, 1))
    for one, other in zip(found(values, [SIZE // 2, SIZE // 5])[2], right, strict=True):
        assert (one.magnitude, one.ties, one.all_ties) == (other.magnitude, other.ties, other.all_ties)
