"""Statistics of token distributions against their definitions in float64."""

from __future__ import annotations

import math

import pytest
import torch

from gratis.subjects.token_statistics import (
    entropy,
    gini_impurity,
    log_probability,
    repeated_share,
    self_certainty,
    self_certainty_bound,
)


def brute_force(logits):
    """KL(U ‖ p) term by term."""
    p = logits.double().softmax(-1)
    v = p.shape[-1]
    return -(v * p).log().sum(-1) / v


def test_self_certainty_is_the_divergence_of_uniform_from_the_model():
    logits = 4 * torch.randn(5, 3, 97, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(self_certainty(logits).double(), brute_force(logits), atol=1e-5, rtol=1e-5)


def test_golden_value_and_direction():
    p = torch.tensor([0.7, 0.2, 0.1])
    assert self_certainty(p.log()).item() == pytest.approx(0.3243, abs=1e-4)
    assert math.log(3) - entropy(p.log()).item() == pytest.approx(0.2968, abs=1e-4)


def test_uniform_is_zero_and_constants_do_not_matter():
    assert self_certainty(torch.full((50,), 3.0)).item() == pytest.approx(0, abs=1e-6)
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1))
    assert self_certainty(logits + 11).item() == pytest.approx(self_certainty(logits).item(), abs=1e-5)


def test_half_precision_logits_are_reduced_in_float32():
    logits = (20 * torch.randn(4, 50_000, generator=torch.Generator().manual_seed(2))).bfloat16()
    torch.testing.assert_close(self_certainty(logits).double(), brute_force(logits.float()), atol=1e-3, rtol=1e-5)
    assert self_certainty(logits).dtype == torch.float32
    assert self_certainty((40 * torch.randn(4, 500)).half()).isfinite().all()


def test_other_statistics_against_definitions():
    logits = torch.randn(6, 31, generator=torch.Generator().manual_seed(3))
    tokens = torch.tensor([0, 3, 30, 2, 7, 7])
    p = logits.double().softmax(-1)
    torch.testing.assert_close(log_probability(logits, tokens).double(), p[range(6), tokens].log(), atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy(logits).double(), -(p * p.log()).sum(-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(gini_impurity(logits).double(), 1 - (p * p).sum(-1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("known", [1, 5, 20])
def test_the_bound_from_the_top_is_below_the_score(known):
    logits = 3 * torch.randn(40, 200, generator=torch.Generator().manual_seed(4))
    top = logits.double().log_softmax(-1).topk(known, -1).values
    bound, floored = self_certainty_bound(top, 200)
    assert (bound <= brute_force(logits) + 1e-9).all()
    assert not floored.any()


def test_the_bound_is_exact_when_all_or_all_but_equal_tails_are_known():
    logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(5))
    bound, _ = self_certainty_bound(logits.double().log_softmax(-1), 10)
    torch.testing.assert_close(bound, brute_force(logits))
    p = torch.tensor([[0.6, 0.1, 0.1, 0.1, 0.1]]).double()
    bound, _ = self_certainty_bound(p.log()[:, :1], 5)
    torch.testing.assert_close(bound, brute_force(p.log()))


def test_the_bound_flags_what_rounds_to_one():
    bound, floored = self_certainty_bound(torch.tensor([[0.0, -80.0]]), 100)
    assert floored.item()
    assert bound.isfinite().all()


def test_repeated_share():
    assert repeated_share([1, 2, 3]) == 0
    assert repeated_share(list(range(30))) == 0
    assert repeated_share([5] * 30) > 0.95
    assert repeated_share([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
