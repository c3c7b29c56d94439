"""Singular vectors of changes: what the card of R-TSVM says shortcuts drop."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import gratis
from gratis.contract.errors import GratisWarning
from gratis.subjects.merging import merge_state_dicts
from tests.methods.merging.test_table_of_merges import matrix, merged_change, reference_tsvm


def test_the_rank_of_each_task_is_a_share_of_each_tensor_and_not_a_fixed_one():
    for tasks, shape in ((3, (40, 24)), (6, (40, 24)), (6, (14, 90)), (2, (7, 7))):
        deltas = [matrix(*shape, seed=i) for i in range(tasks)]
        found = gratis.TSVM().account(deltas)
        assert found.ranks == (min(shape) // tasks,) * tasks
        got = torch.linalg.matrix_rank(merged_change(gratis.TSVM(), deltas), rtol=1e-5)
        assert int(got) == tasks * (min(shape) // tasks)


def test_decorrelation_is_over_all_tasks_for_both_factors():
    deltas = [matrix(seed=i) for i in range(3)]
    truncated = sum(
        (u[:, :8] * s[:8]) @ v[:8]
        for u, s, v in (torch.linalg.svd(delta.double(), full_matrices=False) for delta in deltas)
    )
    got = merged_change(gratis.TSVM(), deltas)
    np.testing.assert_allclose(got.numpy(), reference_tsvm(deltas, 8), atol=1e-4)
    assert float((got - truncated).norm() / truncated.norm()) > 0.3, "truncating and adding is another method"


def test_singular_values_are_kept():
    deltas = [matrix(seed=i) for i in range(3)]
    got = merged_change(gratis.TSVM(polar_tol=0.0), deltas)
    kept = torch.cat([torch.linalg.svdvals(delta.double())[:8] for delta in deltas]).sort(descending=True).values
    torch.testing.assert_close(torch.linalg.svdvals(got.double())[:24], kept, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("noise", [0.0, 1e-6])
def test_the_released_formula_turns_shared_directions_into_141_percent_of_error(noise):
    copy = matrix(40, 24, rank=8)
    deltas = [copy + noise * matrix(40, 24, seed=i) for i in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GratisWarning)
        official = merged_change(gratis.TSVM(polar_tol=0.0), deltas)
        ours = merged_change(gratis.TSVM(polar_tol=1e-4), deltas)
    if noise:
        assert float((official - copy).norm() / copy.norm()) == pytest.approx(1.41, abs=0.02)
    torch.testing.assert_close(ours.float(), copy, atol=1e-4, rtol=1e-3)


def test_near_copies_and_matrices_of_too_little_rank_warn():
    deltas = [matrix(seed=0), matrix(seed=0) + 0.1 * matrix(seed=1)]
    with pytest.warns(GratisWarning, match="average near copies first"):
        merged_change(gratis.TSVM(), deltas)
    narrow = [matrix(40, 2, seed=i) for i in range(3)]
    with pytest.warns(GratisWarning, match="less rank than there are experts: it is merged by the mean"):
        got = merged_change(gratis.RTSVM(), narrow)
    torch.testing.assert_close(got.float(), sum(narrow) / 3, atol=1e-5, rtol=1e-5)


def test_matrices_are_summed_at_full_strength_and_all_else_is_averaged():
    one = torch.zeros(6, 4)
    one[0, 0] = 1.0
    two = torch.zeros(6, 4)
    two[3, 2] = 1.0
    base = {"w": torch.zeros(6, 4), "norm": torch.zeros(4), "conv": torch.zeros(2, 2, 3, 3)}
    experts = [
        {"w": one, "norm": torch.ones(4), "conv": torch.ones(2, 2, 3, 3)},
        {"w": two, "norm": torch.ones(4), "conv": torch.ones(2, 2, 3, 3)},
    ]
    merged = merge_state_dicts(gratis.TSVM(), experts, base)
    torch.testing.assert_close(merged["w"], one + two)
    assert torch.equal(merged["norm"], torch.ones(4))
    assert torch.equal(merged["conv"], torch.ones(2, 2, 3, 3))


def test_bfloat16_weights_are_subtracted_after_they_are_widened():
    generator = torch.Generator().manual_seed(0)
    base = {"w": (1 + torch.rand(24, 16, generator=generator)).bfloat16()}
    experts = [{"w": (base["w"].float() * (1 + 0.01 * matrix(24, 16, seed=i))).bfloat16()} for i in range(2)]
    exact = [{"w": e["w"].float()} for e in experts]
    wide = merge_state_dicts(gratis.TSVM(), exact, {"w": base["w"].float()})["w"]
    assert torch.equal(merge_state_dicts(gratis.TSVM(), experts, base)["w"], wide.bfloat16())


def test_the_merged_change_is_linear_in_its_scale():
    deltas = [matrix(seed=i) for i in range(3)]
    one, two = (merged_change(gratis.RTSVM(scale=scale), deltas) for scale in (1.0, 0.5))
    torch.testing.assert_close(two * 2, one)


def test_the_account_of_a_matrix():
    generator = torch.Generator().manual_seed(1)
    dense = [torch.randn(30, 20, generator=generator) for _ in range(2)]
    sparse = dense[1] * (torch.rand(30, 20, generator=generator) < 0.25)
    found = gratis.RTSVM().account([dense[0], sparse])
    assert sum(found.ranks) == 20
    assert found.ranks[0] == pytest.approx(20 / 1.25, abs=1.5)
    assert sum(found.weights) == pytest.approx(2)
    for delta, rank, energy in zip([dense[0], sparse], found.ranks, found.kept_energy, strict=True):
        squares = torch.linalg.svdvals(delta.double()).square()
        assert energy == pytest.approx(float(squares[:rank].sum() / squares.sum()))
    assert found.interference > 1
    assert found.interference_after < 1e-6 * found.interference
    plain = gratis.RTSVM(outlier="none", rank="equal").account(dense)
    assert plain == gratis.TSVM().account(dense)
    assert plain.ranks == (10, 10)
    assert plain.weights == (1.0, 1.0)
