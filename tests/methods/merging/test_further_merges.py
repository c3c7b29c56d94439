"""SLERP, model stock, MagMax, NearSwap and consensus against dense float64 definitions and their limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gratis
from gratis.contract.errors import InputError
from gratis.subjects.merging import merge_state_dicts
from tests.methods.merging.test_merging import WEIGHTS, assert_close, floats, models


def deltas(base, experts, name):
    return [np.asarray(e[name], np.float64) - np.asarray(base[name], np.float64) for e in experts]


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
def test_slerp_against_the_definition(t):
    _, (a, b, _) = models()
    a["apart"], b["apart"] = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    expected = {}
    for name in floats(a):
        x, y = floats(a)[name], floats(b)[name]
        cosine = float((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum())) if x.size else 1.0
        if abs(cosine) > 0.9995:
            expected[name] = (1 - t) * x + t * y
        else:
            o = np.arccos(cosine)
            expected[name] = np.sin((1 - t) * o) / np.sin(o) * x + np.sin(t * o) / np.sin(o) * y
    assert_close(merge_state_dicts(gratis.SLERP(t=t), [a, b]), expected)


def test_slerp_ends_at_its_models_and_keeps_lengths():
    _, (a, b, _) = models()
    ends = [merge_state_dicts(gratis.SLERP(t=t), [a, b]) for t in (0.0, 1.0)]
    assert all(torch.equal(ends[0][n], a[n]) for n in a)
    assert_close(ends[1], floats(b))
    one, other = {"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])}
    middle = merge_state_dicts(gratis.SLERP(t=0.5), [one, other])["w"]
    torch.testing.assert_close(middle, torch.tensor([0.5, 0.5]).sqrt())


def stock(base, experts, clamp):
    count, out = len(experts), {}
    for name in floats(base):
        tau = [d.reshape(-1) for d in deltas(base, experts, name)]
        cosines = [
            (tau[i] @ tau[j]) / np.sqrt((tau[i] @ tau[i]) * (tau[j] @ tau[j])) if tau[i].size else 0.0
            for i in range(count) for j in range(i + 1, count)
        ]  # fmt: skip
        c = float(np.mean(cosines))
        t = count * c / (1 + (count - 1) * c)
        t = min(max(t, 0.0), 1.0) if clamp else t
        out[name] = floats(base)[name] + t * np.mean(deltas(base, experts, name), axis=0)
    return out


@pytest.mark.parametrize("clamp", [True, False])
def test_model_stock_against_the_definition(clamp):
    base, experts = models()
    for expert in experts:
        expert["embed.weight"] = expert["embed.weight"] + 0.1
    assert_close(merge_state_dicts(gratis.ModelStock(clamp=clamp), experts, base), stock(base, experts, clamp), 1e-5)


def test_model_stock_at_its_limits():
    base, experts = models()
    same = merge_state_dicts(gratis.ModelStock(), [experts[0]] * 3, base)
    assert_close(same, floats(experts[0]))
    opposed = {n: 2 * base[n] - experts[0][n] if base[n].is_floating_point() else base[n] for n in base}
    back = merge_state_dicts(gratis.ModelStock(), [experts[0], opposed], base)
    assert_close(back, floats(base))
    with pytest.raises(InputError, match="at least two"):
        merge_state_dicts(gratis.ModelStock(), experts[:1], base)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_magmax_against_the_definition(weights):
    base, experts = models()
    expected = {}
    for name in floats(base):
        tau = np.stack([w * d for w, d in zip(weights, deltas(base, experts, name), strict=True)])
        best = (len(tau) - 1) - np.abs(tau[::-1]).argmax(0)
        expected[name] = floats(base)[name] + 0.5 * np.take_along_axis(tau, best[None], 0)[0]
    assert_close(merge_state_dicts(gratis.MagMax(), experts, base, weights), expected)


def test_magmax_gives_ties_to_the_later_expert():
    base = {"w": torch.zeros(2)}
    experts = [{"w": torch.tensor([1.0, 3.0])}, {"w": torch.tensor([-1.0, 2.0])}]
    assert merge_state_dicts(gratis.MagMax(scale=1.0), experts, base)["w"].tolist() == [-1.0, 3.0]


def test_near_swap_steps_at_most_t():
    _, (a, b, _) = models()
    t = 0.05
    expected = {}
    for name, x in floats(a).items():
        distance = np.abs(floats(b)[name] - x)
        weight = np.minimum(1, t / np.where(distance == 0, 1, distance))
        expected[name] = x + weight * (floats(b)[name] - x)
    assert_close(merge_state_dicts(gratis.NearSwap(t=t), [a, b]), expected)
    assert_close(merge_state_dicts(gratis.NearSwap(t=1e6), [a, b]), floats(b))


@pytest.mark.parametrize("needed_by", [0, 1, 2, 3])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_consensus_against_the_definition(needed_by, weights):
    base, experts = models()
    expected = {}
    for name in floats(base):
        tau = np.stack([w * d for w, d in zip(weights, deltas(base, experts, name), strict=True)])
        total = tau.sum(0)
        needed = (np.abs(tau) > 0.4 * np.abs(total - tau)).sum(0)
        expected[name] = floats(base)[name] + 0.3 * total * (needed >= needed_by)
    got = merge_state_dicts(gratis.Consensus(needed_by=needed_by), experts, base, weights)
    for name, value in expected.items():
        far = np.abs(got[name].double().numpy() - value) > 1e-6
        assert far.sum() <= 1e-4 * far.size, name  # entries that lie on the threshold to the last digit may differ


def test_consensus_limits():
    base, experts = models()
    everything = merge_state_dicts(gratis.Consensus(needed_by=0), experts, base)
    plain = merge_state_dicts(gratis.TaskArithmetic(scale=0.3), experts, base)
    assert_close(everything, floats(plain))
    nothing = merge_state_dicts(gratis.Consensus(needed_by=4), experts, base)
    assert all(torch.equal(nothing[n], base[n]) for n in base)


@pytest.mark.parametrize("method", [gratis.SLERP(), gratis.NearSwap()])
def test_two_models_exactly(method):
    _, experts = models()
    with pytest.raises(InputError, match="two"):
        merge_state_dicts(method, experts)


@pytest.mark.parametrize("divisor", ["count", "weight", "none"])
def test_breadcrumbs_that_drop_nothing_divide_as_ties_does(divisor):
    generator = torch.Generator().manual_seed(4)
    base, *experts = ({"w": torch.randn(40, 30, generator=generator)} for _ in range(4))
    weights = (0.5, 1.0, 2.0)
    got = merge_state_dicts(gratis.BreadcrumbsTIES(density=1.0, outliers=0.0, divisor=divisor), experts, base, weights)
    ties = gratis.TIES(density=1.0, divisor=divisor, zero_sums="positive")
    torch.testing.assert_close(got["w"], merge_state_dicts(ties, experts, base, weights)["w"], rtol=0, atol=1e-6)
