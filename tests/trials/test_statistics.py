from __future__ import annotations

import math
import random

import pytest

from gratis.trials.statistics import is_mean_of, moving_average, paired_interval, summary


def test_the_interval_is_that_of_the_normal_approximation_for_many_items():
    generator = random.Random(0)
    before = [generator.gauss(5, 3) for _ in range(4000)]
    noise = [generator.gauss(0.2, 0.5) for _ in range(4000)]
    low, high = paired_interval([b + n for b, n in zip(before, noise, strict=True)], before)
    mean = sum(noise) / len(noise)
    error = 1.96 * math.sqrt(sum((n - mean) ** 2 for n in noise) / len(noise)) / math.sqrt(len(noise))
    assert low == pytest.approx(mean - error, abs=0.1 * error)
    assert high == pytest.approx(mean + error, abs=0.1 * error)


def test_pairing_removes_what_items_have_in_common():
    before = [float(i * 100) for i in range(20)]
    assert paired_interval([b + 1 for b in before], before) == (1.0, 1.0)


def test_the_interval_covers_the_truth_about_nineteen_times_in_twenty():
    generator = random.Random(1)
    covered = 0
    for trial in range(200):
        sample = [generator.gauss(1, 2) for _ in range(60)]
        low, high = paired_interval(sample, [0.0] * 60, resamples=400, seed=trial)
        covered += low <= 1 <= high
    assert 178 <= covered <= 199


def test_no_interval_where_there_is_none():
    assert paired_interval([1.0], [0.0]) is None
    assert paired_interval([1.0, 2.0], [0.0]) is None
    assert paired_interval([1.0, float("nan")], [0.0, 0.0]) is None


def test_same_seed_same_interval():
    after, before = [1.0, 4.0, 2.0, 8.0], [0.0, 1.0, 3.0, 2.0]
    assert paired_interval(after, before, seed=3) == paired_interval(after, before, seed=3)


def test_summary_and_means():
    assert summary([3.0, 1.0, 2.0, 10.0]) == (2.5, 1.0, 10.0)
    assert is_mean_of(2.0, [1.0, 3.0])
    assert not is_mean_of(math.exp(2.0), [1.0, 3.0])
    assert not is_mean_of(0.0, [])


def test_moving_average_by_brute_force():
    values = [random.Random(2).random() for _ in range(31)]
    for window in (1, 3, 7):
        half = window // 2
        expected = [sum(part) / len(part) for i in range(31) if (part := values[max(0, i - half) : i + half + 1])]
        assert moving_average(values, window) == pytest.approx(expected)
