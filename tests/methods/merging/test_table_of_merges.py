"""The merges of the field's table against dense float64 definitions, their limits, and chunking."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import gratis
from gratis.contract.errors import InputError, ParameterError
from gratis.contract.method import MergePart
from gratis.methods.merging.della import sample, uniform
from gratis.methods.merging.fisher import fisher_information
from gratis.methods.merging.matrices import interference, orthonormal
from gratis.methods.merging.r_tsvm import outlier_weights, shared_out
from gratis.methods.merging.reg_mean import gram_matrices
from gratis.subjects.merge_rules import Rule
from gratis.subjects.merging import merge_state_dicts
from tests.methods.merging.reference import trimmed
from tests.methods.merging.test_merging import assert_close, floats, models

GENERATOR = torch.Generator().manual_seed(5)


def small(count=3, seed=0):
    """A base and experts of a vector, a matrix, a cube and a convolution."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"v": (64,), "m": (12, 20), "c": (3, 4, 5), "k": (4, 3, 3, 3)}
    base = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    experts = [{n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in base.items()} for _ in range(count)]
    return base, experts


def taus(base, experts, name):
    return np.stack([floats(e)[name] - floats(base)[name] for e in experts])


def banded(tau, density, outliers):
    n = tau.size
    kept = trimmed(tau.reshape(-1), max(int(np.floor((density + outliers) * n)), 1))
    top = int(np.floor(outliers * n))
    return (kept - trimmed(tau.reshape(-1), top) if top else kept).reshape(tau.shape)


@pytest.mark.parametrize(("density", "outliers"), [(0.8, 0.05), (0.9, 0.01), (0.5, 0.0)])
def test_breadcrumbs(density, outliers):
    base, experts = small()
    method = gratis.Breadcrumbs(density=density, outliers=outliers, scale=0.5)
    expected = {
        n: floats(base)[n] + 0.5 * sum(banded(t, density, outliers) for t in taus(base, experts, n)) for n in base
    }
    assert_close(merge_state_dicts(method, experts, base), expected)
    with pytest.raises(ParameterError, match="at most 1"):
        gratis.Breadcrumbs(density=0.9, outliers=0.2)


def test_breadcrumbs_keeps_small_tensors():
    """With floor(gamma n) = 0 outliers nothing more is dropped; a negative slice of length 0 would drop everything."""
    base, expert = {"w": torch.zeros(64)}, {"w": torch.arange(1.0, 65.0)}
    merged = merge_state_dicts(gratis.Breadcrumbs(density=0.9, outliers=0.01, scale=1.0), [expert], base)["w"]
    assert int((merged != 0).sum()) == int(np.floor(0.91 * 64))


def test_breadcrumbs_ties_without_dropping_is_ties():
    base, experts = small()
    got = merge_state_dicts(gratis.BreadcrumbsTIES(density=1.0, outliers=0.0), experts, base)
    want = merge_state_dicts(gratis.TIES(density=1.0, zero_sums="positive"), experts, base)
    assert all(torch.equal(got[n], want[n]) for n in base)


def test_della_keeps_by_rank_and_is_unbiased():
    row = torch.tensor([[4.0, -1.0, 3.0, 2.0, -5.0]])
    part = MergePart("w", 0, (1.0,), shape=(1, 5))
    total, kept, rounds = torch.zeros(1, 5), torch.zeros(1, 5), 4000
    for seed in range(rounds):
        drawn = row.clone()
        sample(drawn.view(-1), 0.6, 0.3, seed, 0, part)
        total += drawn
        kept += drawn != 0
    torch.testing.assert_close(kept / rounds, torch.tensor([[0.75, 0.3, 0.6, 0.45, 0.9]]), atol=0.03, rtol=0)
    torch.testing.assert_close(total / rounds, row, atol=0.15, rtol=0.06)


def test_della_draws_do_not_depend_on_chunks_and_rows_of_one_entry_keep_the_density():
    whole = uniform(3, 1, "w", 0, 200_000)
    pieces = np.concatenate([uniform(3, 1, "w", at, min(7_777, 200_000 - at)) for at in range(0, 200_000, 7_777)])
    np.testing.assert_array_equal(whole, pieces)
    column = torch.ones(20_000)
    sample(column, 0.7, 0.1, 0, 0, MergePart("w", 0, (1.0,), shape=(20_000, 1)))
    assert abs(float((column != 0).float().mean()) - 0.7) < 0.02
    assert float(column.max()) == pytest.approx(1 / 0.7)


def test_della_without_spread_is_dare_in_distribution():
    base, expert = {"w": torch.zeros(100, 100)}, {"w": torch.ones(100, 100)}
    merged = merge_state_dicts(gratis.DELLALinear(density=0.5, spread=0.0, scale=1.0), [expert], base)["w"]
    assert set(merged.unique().tolist()) == {0.0, 2.0}
    assert abs(float(merged.mean()) - 1) < 0.05
    with pytest.raises(ParameterError, match="spread"):
        gratis.DELLA(density=0.95, spread=0.1)


@pytest.mark.parametrize("method", [gratis.Karcher(), gratis.MultiSLERP(), gratis.SCE(), gratis.RAM()])
def test_copies_of_one_model_return_it(method):
    base, experts = small()
    assert_close(
        merge_state_dicts(method, [experts[0]] * 3, base if method.needs_base else None), floats(experts[0]), 1e-5
    )


def test_the_spherical_mean_of_two_is_half_way_on_the_arc():
    _, experts = small(2)
    a, b = floats(experts[0]), floats(experts[1])
    for method in (gratis.Karcher(), gratis.MultiSLERP()):
        for name, got in floats(merge_state_dicts(method, experts)).items():
            direction = a[name] / np.linalg.norm(a[name]) + b[name] / np.linalg.norm(b[name])
            direction = direction / np.linalg.norm(direction)
            length = (np.linalg.norm(a[name]) + np.linalg.norm(b[name])) / 2
            np.testing.assert_allclose(got, direction * length, atol=1e-5)


def test_the_karcher_mean_has_no_gradient():
    _, experts = small(3, seed=2)
    mean = floats(merge_state_dicts(gratis.Karcher(iterations=50, tolerance=1e-9), experts))["m"].reshape(-1)
    mean /= np.linalg.norm(mean)
    step = 0
    for expert in experts:
        u = floats(expert)["m"].reshape(-1)
        u = u / np.linalg.norm(u)
        across = u - (u @ mean) * mean
        step = step + np.arccos(u @ mean) * across / np.linalg.norm(across)
    assert np.linalg.norm(step) < 1e-5


@pytest.mark.parametrize("along", ["tensor", "row", "column"])
@pytest.mark.parametrize("of", ["weights", "differences"])
def test_nu_slerp(along, of):
    base, experts = small(2)
    got = merge_state_dicts(gratis.NuSLERP(along=along, of=of), experts, base, (1.0, 3.0))["m"]
    start = floats(base)["m"] if of == "differences" else 0.0
    a, b = (floats(e)["m"] - start for e in experts)
    lines = {"tensor": (a.reshape(1, -1), b.reshape(1, -1)), "row": (a, b), "column": (a.T, b.T)}[along]
    out = []
    for x, y in zip(*lines, strict=True):
        o = np.arccos(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
        out.append(
            np.sin(0.25 * o) / np.sin(o) * x + np.sin(0.75 * o) / np.sin(o) * y
            if abs(np.cos(o)) <= 0.9995
            else 0.25 * x + 0.75 * y
        )
    out = np.stack(out)
    out = out.T if along == "column" else out.reshape(a.shape)
    np.testing.assert_allclose(got.double().numpy(), out + start, atol=1e-6)


def test_tall_mask_and_emr_against_their_definitions():
    base, experts = small()
    tall = merge_state_dicts(gratis.TALLMask(task=1), experts, base)
    emr = merge_state_dicts(gratis.EMR(task=2), experts, base)
    own = unified = 0.0
    parts = {}
    for name in base:
        tau = taus(base, experts, name)
        total = tau.sum(0)
        mask = np.abs(tau[1]) > 0.4 * np.abs(total - tau[1])
        far = np.abs(tall[name].double().numpy() - floats(base)[name] - mask * total) > 1e-6
        assert far.sum() <= 1
        sign = np.sign(total)
        u = sign * np.where(tau * sign > 0, np.abs(tau), 0).max(0)
        parts[name] = u * (tau[2] * sign > 0)
        own, unified = own + np.abs(tau[2]).sum(), unified + np.abs(parts[name]).sum()
    assert_close(emr, {n: floats(base)[n] + own / unified * parts[n] for n in base}, 1e-5)
    with pytest.raises(InputError, match="numbered from 0"):
        merge_state_dicts(gratis.EMR(task=3), experts, base)


def test_ram():
    base = {"w": torch.zeros(4)}
    experts = [{"w": torch.tensor([1.0, 2.0, 0.0, 0.0])}, {"w": torch.tensor([3.0, 0.0, 5.0, 1e-6])}]
    assert merge_state_dicts(gratis.RAM(), experts, base)["w"].tolist() == [2.0, 2.0, 5.0, 0.0]
    stronger = merge_state_dicts(gratis.RAM(boost=0.1, ceiling=0.2), experts, base)["w"]
    torch.testing.assert_close(stronger, torch.tensor([2.0, 2.04, 5.1, 0.0]))


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_sce(density):
    base, experts = small()
    expected = {}
    for name in base:
        tau = taus(base, experts, name)
        variance = tau.var(0)
        kept = trimmed(variance.reshape(-1), max(int(np.floor(density * variance.size)), 1)).reshape(variance.shape) > 0
        tau = tau * kept
        weights = (tau**2).mean(axis=tuple(range(1, tau.ndim)))
        weights = (weights / weights.sum()).reshape(-1, *[1] * (tau.ndim - 1))
        agree = tau * np.sign(tau.sum(0)) > 0
        divisor = (weights * agree).sum(0)
        expected[name] = floats(base)[name] + (weights * tau * agree).sum(0) / np.where(divisor == 0, 1, divisor)
    assert_close(merge_state_dicts(gratis.SCE(density=density), experts, base), expected, 1e-5)


def test_pcb():
    base, experts = small()
    order = list(base)
    tau = np.stack([np.concatenate([taus(base, experts, n)[i].reshape(-1) for n in order]) for i in range(3)])
    n = tau.shape[1]
    a = np.abs(tau)
    lowest = np.sort(a, 1)[:, n - int(np.floor((1 - 1e-4) * n))]
    a = np.clip(a, lowest[:, None], a.max(1, keepdims=True))
    s = ((a - a.min(1, keepdims=True)) / (a.max(1, keepdims=True) - a.min(1, keepdims=True))) ** 2
    b = np.exp(3 * s) * np.tanh(tau * tau.sum(0))
    least = np.sort(b, 1)[:, n - int(np.floor(0.2 * n))][:, None]
    c = np.clip(b - least, 0, None) / (b.max(1, keepdims=True) - least)
    want = 1.2 * (np.sign(tau) * a * c).sum(0) / np.maximum(c.sum(0), 1e-12)
    got = merge_state_dicts(gratis.PCB(density=0.2), experts, base)
    change = np.concatenate([(floats(got)[n] - floats(base)[n]).reshape(-1) for n in order])
    np.testing.assert_allclose(change, want, atol=2e-5)


def test_arcee_fusion():
    base, experts = small(1)
    for name in base:
        x, y = floats(experts[0])[name], floats(base)[name]
        p, q = (np.exp(z) / np.exp(z).sum(-1, keepdims=True) for z in (x, y))
        importance = np.abs(x - y) * (p * np.log(p / q)).sum(-1, keepdims=True)
        lower, middle, upper = np.quantile(importance, [0.25, 0.5, 0.75])
        want = np.where(importance > middle + 1.5 * (upper - lower), x, y)
        got = merge_state_dicts(gratis.ArceeFusion(), experts, base)[name].double().numpy()
        assert (np.abs(got - want) > 1e-6).sum() <= 1
        assert 0 < (got != y).sum() < y.size


def test_rewarded_soup_and_passthrough():
    _, experts = small(2)
    got = merge_state_dicts(gratis.RewardedSoup(), experts, None, (0.3, 0.7))
    assert_close(got, {n: 0.3 * floats(experts[0])[n] + 0.7 * floats(experts[1])[n] for n in got})
    with pytest.raises(InputError, match="sum to 1"):
        merge_state_dicts(gratis.RewardedSoup(), experts, None, (0.3, 0.9))
    assert_close(
        merge_state_dicts(gratis.Passthrough(scale=0.5), experts[:1]), {n: t / 2 for n, t in floats(experts[0]).items()}
    )


def test_normalised_task_arithmetic_is_the_mean_of_differences():
    base, experts = small(2)
    got = merge_state_dicts(gratis.TaskArithmetic(scale=1.0, normalize=True), experts, base, (1.0, 3.0))
    assert_close(got, {n: 0.25 * floats(experts[0])[n] + 0.75 * floats(experts[1])[n] for n in got}, 1e-5)


# Matrices


def matrix(m=40, n=24, rank=None, seed=0, noise=0.0):
    generator = torch.Generator().manual_seed(seed)
    rank = rank or min(m, n)
    product = torch.randn(m, rank, generator=generator) @ torch.randn(rank, n, generator=generator)
    return product + noise * torch.randn(m, n, generator=generator)


def merged_change(method, deltas, weights=None):
    base = {"w": torch.zeros_like(deltas[0])}
    return merge_state_dicts(method, [{"w": d} for d in deltas], base, weights)["w"].double()


def reference_tsvm(deltas, k):
    u, s, v = zip(*(np.linalg.svd(d.double().numpy(), full_matrices=False) for d in deltas), strict=True)
    left = np.concatenate([x[:, :k] for x in u], 1)
    right = np.concatenate([x[:k] for x in v], 0)
    values = np.concatenate([x[:k] for x in s])
    p, _, q = np.linalg.svd(left, full_matrices=False)
    a, _, b = np.linalg.svd(right, full_matrices=False)
    return (p @ q) @ np.diag(values) @ (a @ b)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_tsvm_against_an_independent_definition(shape):
    deltas = [matrix(*shape, seed=i) for i in range(3)]
    got = merged_change(gratis.TSVM(), deltas)
    np.testing.assert_allclose(got.numpy(), reference_tsvm(deltas, 8), atol=1e-4)
    kept = sum(float((torch.linalg.svdvals(d.double())[:8] ** 2).sum()) for d in deltas)
    assert float(got.square().sum()) == pytest.approx(kept, rel=1e-5)


def test_tsvm_at_its_limits():
    one = matrix()
    torch.testing.assert_close(merged_change(gratis.TSVM(), [one]).float(), one, atol=1e-4, rtol=1e-4)
    apart = [torch.zeros(40, 24) for _ in range(3)]
    for i, delta in enumerate(apart):
        delta[i * 10 : i * 10 + 10, i * 8 : i * 8 + 8] = matrix(10, 8, seed=i)
    torch.testing.assert_close(merged_change(gratis.TSVM(), apart).float(), sum(apart), atol=1e-4, rtol=1e-4)
    assert interference(apart, 8) < 1e-9 < interference([matrix(seed=i) for i in range(3)], 8)


def test_shared_directions_come_back_once_and_the_released_formula_amplifies_them():
    copy = matrix(rank=8)
    exact = merged_change(gratis.TSVM(), [copy] * 3).float()
    torch.testing.assert_close(exact, copy, atol=1e-4, rtol=1e-4)
    official = merged_change(gratis.TSVM(polar_tol=0.0), [copy] * 3)
    assert float((official - copy).norm() / copy.norm()) > 0.5


def test_gram_and_svd_polar_factors_agree():
    factor = torch.randn(50, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(orthonormal(factor, 1e-6), orthonormal(factor, 0.0), atol=1e-12, rtol=0)


def test_vectors_and_excluded_matrices_are_averaged_and_weights_come_before_the_decomposition():
    base, experts = small()
    base = {"embed_tokens.weight": base["m"], "v": base["v"], "k": base["k"]}
    experts = [{"embed_tokens.weight": e["m"], "v": e["v"], "k": e["k"]} for e in experts]
    assert_close(
        merge_state_dicts(gratis.TSVM(), experts, base), {n: np.mean([floats(e)[n] for e in experts], 0) for n in base}
    )
    deltas = [matrix(seed=i) for i in range(2)]
    torch.testing.assert_close(
        merged_change(gratis.TSVM(), deltas, (2.0, 0.5)), merged_change(gratis.TSVM(), [deltas[0] * 2, deltas[1] / 2])
    )


def test_r_tsvm_without_its_additions_is_tsvm_bit_for_bit():
    deltas = [matrix(seed=i) for i in range(3)]
    plain = merged_change(gratis.TSVM(), deltas)
    assert torch.equal(merged_change(gratis.RTSVM(outlier="none", rank="equal"), deltas), plain)
    permuted = [deltas[0], -deltas[0], deltas[0].flip(0)]
    torch.testing.assert_close(merged_change(gratis.RTSVM(), permuted), merged_change(gratis.TSVM(), permuted))
    assert not torch.equal(merged_change(gratis.RTSVM(outlier="clip", rank="equal", z=1.0), deltas), plain)


def test_ranks_and_weights_of_r_tsvm():
    assert shared_out(24, [0.5, 0.25, 0.25]) == [12, 6, 6]
    assert shared_out(10, [1.0, 1.0, 1.0]) in ([4, 3, 3], [3, 4, 3], [3, 3, 4])
    assert shared_out(8, [1.0, 0.0, 1e-9]) == [6, 1, 1]
    assert shared_out(9, [0.0, 0.0, 0.0]) == [3, 3, 3]
    spiky, flat = torch.zeros(100, dtype=torch.float64), torch.ones(100, dtype=torch.float64)
    spiky[0] = 9.0
    assert outlier_weights([spiky, flat], 3.0) == [2.0, 0.0]
    assert outlier_weights([flat, flat], 3.0) == [1.0, 1.0]


def test_iso_c():
    deltas = [matrix(seed=i) for i in range(3)]
    got = torch.linalg.svdvals(merged_change(gratis.IsoC(), deltas))
    want = torch.linalg.svdvals(sum(deltas).double()).mean()
    torch.testing.assert_close(got, want.expand(24), rtol=1e-5, atol=1e-5)


def wudi_loss(t, deltas):
    return sum(float(((t - d) @ d.T).square().sum() / d.square().sum()) for d in (d.double() for d in deltas))


def test_wudi_descends_and_its_exact_form_is_stationary():
    deltas = [0.01 * matrix(24, 20, seed=i) for i in range(2)]
    start = sum(deltas).double()
    adam = merged_change(gratis.WUDI(rate=1e-3, iterations=400), deltas)
    exact = merged_change(gratis.WUDI(solver="pseudo-inverse", cutoff=1e-9), deltas)
    assert wudi_loss(exact, deltas) <= wudi_loss(adam, deltas) * 1.001 + 1e-9 < wudi_loss(start, deltas)
    assert torch.equal(merged_change(gratis.WUDI(iterations=0), deltas).float(), start.float())


# Methods that need inputs


def test_reg_mean(tmp_path):
    generator = torch.Generator().manual_seed(0)
    nets, inputs, paths = [], [], []
    for i in range(2):
        net = torch.nn.Linear(6, 4)
        torch.nn.init.normal_(net.weight, generator=generator)
        x = torch.randn(50, 6, generator=generator)
        paths.append(str(tmp_path / f"{i}.safetensors"))
        save_file(gram_matrices(net, [x], lambda m, e: m(e)), paths[-1])
        nets.append({n: t.detach() for n, t in net.state_dict().items()})
        inputs.append(x)
    got = merge_state_dicts(gratis.RegMean(grams=tuple(paths), off_diagonal=1.0), nets)
    stacked = torch.cat(inputs)
    answers = torch.cat([x @ net["weight"].T for x, net in zip(inputs, nets, strict=True)])
    want = torch.linalg.lstsq(stacked, answers).solution.T
    torch.testing.assert_close(got["weight"], want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got["bias"], (nets[0]["bias"] + nets[1]["bias"]) / 2)
    same = merge_state_dicts(gratis.RegMean(grams=(paths[0], paths[0])), nets)
    torch.testing.assert_close(same["weight"], (nets[0]["weight"] + nets[1]["weight"]) / 2, atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="1 files"):
        merge_state_dicts(gratis.RegMean(grams=(paths[0],)), nets)


def test_fisher(tmp_path):
    net = torch.nn.Linear(5, 3)
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    found = fisher_information(net, x, lambda m, e: m(e).log_softmax(-1))
    want = torch.zeros(3, 5)
    for row in x:
        p = net(row).softmax(-1).detach()
        for y in range(3):
            gradient = (torch.eye(3)[y] - p)[:, None] * row[None]
            want += p[y] * gradient**2 / len(x)
    torch.testing.assert_close(found["weight"], want, atol=1e-6, rtol=1e-4)
    paths = [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]
    save_file({"w": torch.tensor([3.0, 0.0])}, paths[0])
    save_file({"w": torch.tensor([1.0, 0.0])}, paths[1])
    experts = [{"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([5.0, 3.0])}]
    got = merge_state_dicts(gratis.Fisher(information=tuple(paths)), experts)["w"]
    torch.testing.assert_close(got, torch.tensor([2.0, 2.0]), atol=1e-5, rtol=1e-5)
    equal = merge_state_dicts(gratis.Fisher(information=(paths[0], paths[0]), normalize=True), experts)["w"]
    torch.testing.assert_close(equal, torch.tensor([3.0, 2.0]))


# The instruction vector


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_instruction_vector(dtype):
    base, (domain, instruct, _) = models(dtype)
    of = gratis.InstructionVector
    kept = merge_state_dicts(of(scale=0.0), [domain, instruct], base)
    swapped = merge_state_dicts(of(domain_scale=0.0), [domain, instruct], base)
    back = merge_state_dicts(of(), [base, instruct], base)
    for name in base:
        if base[name].is_floating_point():
            assert torch.equal(kept[name], domain[name])
            assert torch.equal(swapped[name], instruct[name])
            assert torch.equal(back[name], instruct[name])
    if dtype == torch.float32:
        got = merge_state_dicts(of(scale=0.75), [domain, instruct], base)
        assert_close(got, {n: floats(domain)[n] + 0.75 * (floats(instruct)[n] - floats(base)[n]) for n in floats(base)})
    with pytest.raises(InputError, match="two experts"):
        merge_state_dicts(of(), [domain], base)


CHUNKED = [
    gratis.Breadcrumbs(density=0.8, outliers=0.05), gratis.DELLA(), gratis.DELLALinear(), gratis.EMR(), gratis.SCE(density=0.5),
    gratis.PCB(), gratis.RAM(boost=0.1), gratis.Karcher(), gratis.NuSLERP(along="row"), gratis.TSVM(), gratis.InstructionVector(),
]  # fmt: skip


@pytest.mark.parametrize("method", CHUNKED, ids=lambda m: m.name)
def test_the_result_does_not_depend_on_stretches(method):
    base, experts = models()
    experts = experts[:2]
    one, other = (merge_state_dicts(method, experts, base, stretch=s) for s in (65536, 10**6))
    assert all(torch.equal(one[n], other[n]) for n in base)


def test_fisher_and_regmean_take_what_they_need_from_inputs(tmp_path):
    """Two linear classifiers of one weight each, so that both have a closed form."""
    generator = torch.Generator().manual_seed(2)
    models = [torch.nn.Linear(3, 2, bias=False) for _ in range(2)]
    inputs = [torch.randn(40, 3, generator=generator) for _ in range(2)]
    with torch.no_grad():
        for model in models:
            model.weight.copy_(torch.randn(2, 3, generator=generator))
    states = [model.state_dict() for model in models]
    grams = [x.double().T @ x.double() / len(x) for x in inputs]
    grams = [g * 0.9 + 0.1 * g.diagonal().diag() for g in grams]
    products = sum(g @ s["weight"].double().T for g, s in zip(grams, states, strict=True))
    expected = torch.linalg.solve(sum(grams), products).T.float()
    got = merge_state_dicts(gratis.RegMean().from_inputs(models, inputs, tmp_path), states)["weight"]
    torch.testing.assert_close(got, expected)
    # E_{y~p} (d log p(y))^2 of a linear classifier is p (1 - p) x^2, for both classes of two.
    shares = [(x @ s["weight"].T).softmax(-1) for x, s in zip(inputs, states, strict=True)]
    importance = [
        ((p * (1 - p)).T @ x.square() / len(x)) + 1e-6 for p, x in zip(shares, inputs, strict=True)
    ]  # fmt: skip
    expected = sum(f * s["weight"] for f, s in zip(importance, states, strict=True)) / sum(importance)
    got = merge_state_dicts(gratis.Fisher().from_inputs(models, inputs, tmp_path), states)["weight"]
    torch.testing.assert_close(got, expected)
    with pytest.raises(InputError, match="at least one example"):
        gratis.Fisher().from_inputs(models, [[], []], tmp_path)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (gratis.TIES(density=0.2), gratis.TIES(density=0.9)),
        (gratis.DARE(density=0.2), gratis.DARE(density=0.9)),
        (gratis.DARETIES(density=0.2), gratis.DARETIES(density=0.9)),
        (gratis.Breadcrumbs(density=0.2, outliers=0.1), gratis.Breadcrumbs(density=0.6, outliers=0.3)),
        (gratis.BreadcrumbsTIES(density=0.2), gratis.BreadcrumbsTIES(density=0.9)),
        (gratis.DELLA(density=0.3), gratis.DELLA(density=0.8)),
        (gratis.DELLALinear(density=0.3), gratis.DELLALinear(density=0.8)),
    ],
    ids=lambda method: method.name,
)
def test_every_expert_has_the_density_that_is_its_own(one, other):
    """With a weight of 0 for the rest, a merge is that of the one expert with its own parameters."""
    generator = torch.Generator().manual_seed(0)
    base, *experts = [{"w": torch.randn(40, 50, generator=generator)} for _ in range(3)]
    for weights, own in (((1.0, 0.0), one), ((0.0, 1.0), other)):
        rules = [Rule(("*",), one, weights=weights, each=(one, other))]
        got = merge_state_dicts(one, experts, base, rules=rules)["w"]
        assert torch.equal(got, merge_state_dicts(own, experts, base, weights)["w"])
    assert not torch.equal(got, merge_state_dicts(one, experts, base, weights)["w"])
