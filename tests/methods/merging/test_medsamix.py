"""MedSAMix: groups, the search space, the search's promises, and its parts against what they must be."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import norm

import gratis
from gratis.contract.errors import FileError, GratisWarning, InputError, ParameterError
from gratis.methods.merging.medsamix import (
    MedSAMix,
    Space,
    _Forest,
    brackets,
    expected_improvement,
    layer_groups,
    pareto,
    scalarised,
)
from gratis.subjects.merging import merge_state_dicts

NAMES = [f"model.layers.{n}.{part}.weight" for n in range(4) for part in ("attn.q", "mlp.up", "norm")]
NAMES += ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]


def states(count=3, names=NAMES):
    generator = torch.Generator().manual_seed(1)
    base = {name: torch.randn(4, 3, generator=generator) for name in names}
    return base, [{n: t + 0.3 * torch.randn(4, 3, generator=generator) for n, t in base.items()} for _ in range(count)]


def nearness(target, width=1.0):
    """A score in [0, 1] that is 1 at a target."""

    def score(state, budget):
        return math.exp(-sum(float((state[name] - target[name]).square().sum()) for name in target) / width)

    return score


def quiet(*args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GratisWarning)
        return MedSAMix(**options).search(*args, samples=options.pop("samples", 30))


def test_groups_take_consecutive_layers_and_the_ends_go_with_first_and_last():
    groups = layer_groups(NAMES, 2)
    assert [groups[f"model.layers.{n}.attn.q.weight"] for n in range(4)] == [0, 0, 1, 1]
    assert groups["model.embed_tokens.weight"] == 0
    assert groups["model.norm.weight"] == groups["lm_head.weight"] == 1


def test_a_segmenter_s_prompt_encoder_and_decoder_are_one_more_group():
    from safetensors import safe_open

    from gratis import zoo

    with safe_open(zoo.folder_of("sprites-segmenter") / "model.safetensors", "pt") as file:
        groups = layer_groups(list(file.keys()), 2)
    assert groups["vision_encoder.layers.5.attn.qkv.weight"] == 2
    assert groups["vision_encoder.pos_embed"] == groups["vision_encoder.patch_embed.projection.weight"] == 0
    assert groups["vision_encoder.neck.conv1.weight"] == 2
    assert {g for name, g in groups.items() if name.startswith(("mask_decoder", "prompt_encoder"))} == {3}


def test_granularity_divides_the_layers():
    with pytest.raises(ValueError, match="does not divide the 4 layers"):
        layer_groups(NAMES, 3)


def test_the_dimension_of_the_card_s_example():
    names = [f"layers.{n}.{part}" for n in range(12) for part in ("attn", "mlp", "norm")]
    space = Space(layer_groups(names, 3), ("attn", "mlp"), ("linear", "task_arithmetic", "ties", "slerp"), 3)
    assert space.dimensions == 112
    point = np.random.default_rng(0).random(112)
    np.testing.assert_allclose(space.decode(space.encode(space.decode(point)))[2]["sets"]["mlp"]["slerp"],
                               space.decode(point)[2]["sets"]["mlp"]["slerp"])  # fmt: skip
    assert [g["method"] for g in space.decode(space.encode(space.decode(point)))] == [
        g["method"] for g in space.decode(point)
    ]


@pytest.mark.parametrize("optimizer", ["forest", "optuna", "random"])
def test_with_one_trial_per_model_the_result_is_the_best_single_model_bit_for_bit(optimizer):
    base, models = states()
    found = quiet(base, models, nearness(models[1]), layer_granularity=2, n_trials=3, optimizer=optimizer)
    assert all(torch.equal(found.state_dict[name], models[1][name]) for name in NAMES)
    assert len(found.trials) == 3


def group(method, **numbers):
    sets = {
        "linear": [0.2, 0.6, 0.0], "task_arithmetic": 0.7, "ties_mask": 0.6, "ties": 0.9, "slerp": [0.1, 0.9, 0.4],
        **numbers,
    }  # fmt: skip
    return {"method": method, "sets": {kind: dict(sets) for kind in ("attn", "mlp", "rest")}}


def test_every_method_of_a_group_does_what_the_card_says():
    base, models = states()
    space = Space(layer_groups(NAMES, 1), ("attn", "mlp"), ("linear", "task_arithmetic", "ties", "slerp"), 3)
    choices = [group("linear"), group("task_arithmetic"), group("ties"), group("slerp")]
    choices[3]["sets"]["attn"]["slerp"] = [0.5, 0.0, 0.0]
    got = merge_state_dicts(gratis.Average(), models, base, rules=space.rules(choices))
    name = "model.layers.0.mlp.up.weight"
    torch.testing.assert_close(got[name], 0.25 * models[0][name] + 0.75 * models[1][name], rtol=0, atol=1e-6)
    name = "model.layers.1.mlp.up.weight"
    expected = base[name] + 0.7 * sum(model[name] - base[name] for model in models)
    torch.testing.assert_close(got[name], expected, rtol=0, atol=1e-6)
    name = "model.layers.2.attn.q.weight"
    deltas = torch.stack([model[name] - base[name] for model in models])
    keep = max(int(0.4 * deltas[0].numel()), 1)  # the mask is the share removed, of this tensor alone
    for delta in deltas:
        delta[delta.abs() < delta.abs().flatten().sort(descending=True).values[keep - 1]] = 0
    sign = torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
    agree = (deltas != 0) & (deltas.sign() == sign)
    expected = base[name] + 0.9 * (deltas * agree).sum(0) / agree.sum(0).clamp_min(1)
    torch.testing.assert_close(got[name], expected, rtol=0, atol=1e-6)
    # Scores summed over sets: 0.7, 1.8, 0.8; so models 1 and 2, in that order, also where a set alone says otherwise.
    for name, t in (
        ("model.layers.3.mlp.up.weight", math.exp(0.4) / (math.exp(0.9) + math.exp(0.4))),
        ("model.layers.3.attn.q.weight", 0.5),
    ):
        one, two = models[1][name].double(), models[2][name].double()
        angle = torch.acos((one * two).sum() / (one.norm() * two.norm()))
        expected = (torch.sin((1 - t) * angle) * one + torch.sin(t * angle) * two) / torch.sin(angle)
        torch.testing.assert_close(got[name].double(), expected, rtol=0, atol=1e-6)


def test_weights_of_zero_become_equal_weights():
    base, models = states()
    space = Space(layer_groups(NAMES, 4), ("attn", "mlp"), ("linear",), 3)
    got = merge_state_dicts(
        gratis.Average(), models, base, rules=space.rules([group("linear", linear=[0.0, 0.0, 0.0])])
    )
    torch.testing.assert_close(got[NAMES[0]], sum(model[NAMES[0]] for model in models) / 3)


@pytest.mark.evidence
def test_the_search_reaches_the_optimum_of_a_grid():
    # Two groups, linear only, two models: brute force over 11 x 11 shares.
    names = ["layers.0.w", "layers.1.w"]
    _, models = states(2, names)
    target = {"layers.0.w": 0.8 * models[0]["layers.0.w"] + 0.2 * models[1]["layers.0.w"],
              "layers.1.w": 0.3 * models[0]["layers.1.w"] + 0.7 * models[1]["layers.1.w"]}  # fmt: skip
    score = nearness(target, 3.0)
    grid = max(
        score({n: a * models[0][n] + (1 - a) * models[1][n] for n, a in zip(names, (i / 10, j / 10), strict=True)}, 0)
        for i in range(11) for j in range(11)
    )  # fmt: skip
    assert grid == pytest.approx(1)
    options = {"layer_granularity": 1, "filters": (), "methods": ("linear",), "n_trials": 40, "min_budget": 30}
    scores = [quiet(None, models, score, seed=seed, **options).score["score"] for seed in range(3)]
    assert np.median(scores) > grid - 0.01


@pytest.mark.evidence
def test_forest_beats_chance_where_the_landscape_is_smooth():
    base, models = states()
    target = merge_state_dicts(gratis.TaskArithmetic(scale=0.6), models, base)
    options = {"layer_granularity": 4, "filters": (), "n_trials": 32, "min_budget": 30}
    wins = [
        quiet(base, models, nearness(target), seed=seed, **options).score["score"]
        >= quiet(base, models, nearness(target), seed=seed, optimizer="random", **options).score["score"]
        for seed in range(3)
    ]
    assert sum(wins) >= 2


def test_a_saved_configuration_gives_the_same_weights_again(tmp_path):
    base, models = states()
    found = quiet(base, models, nearness(models[0]), layer_granularity=2, n_trials=9)
    content = json.loads(found.save(tmp_path / "found.json").read_text())
    space = Space(layer_groups(NAMES, 2), ("attn", "mlp"), MedSAMix().methods, 3)
    again = merge_state_dicts(gratis.Average(), models, base, rules=space.rules(content["configuration"]))
    assert all(torch.equal(again[name], found.state_dict[name]) for name in NAMES)
    through_rules = merge_state_dicts(gratis.Average(), models, base, rules=found.rules)
    assert all(torch.equal(through_rules[name], found.state_dict[name]) for name in NAMES)


def test_budgets_follow_hyperband_and_promote_the_best():
    assert brackets(100, 1000, 3) == [[(9, 111), (3, 333), (1, 1000)], [(5, 333), (1, 1000)], [(3, 1000)]]
    base, models = states()
    seen = []

    def score(state, budget):
        seen.append(budget)
        return nearness(models[0])(state, budget)

    found = quiet(base, models, score, layer_granularity=2, n_trials=16, min_budget=3, max_budget=27)
    assert seen[:3] == [27, 27, 27], "single models are scored on all samples"
    cheap = found.trials[3:12]
    assert [trial.budget for trial in cheap] == [3] * 9
    order = sorted(cheap, key=lambda trial: trial.cost)
    assert [trial.configuration for trial in found.trials[12:15]] == [trial.configuration for trial in order[:3]]
    assert [trial.budget for trial in found.trials[12:16]] == [9, 9, 9, 27]


def test_several_tasks_give_a_front_without_dominated_members():
    base, models = states()
    one, two = nearness(models[0]), nearness(models[1])

    def score(state, budget):
        return {"one": one(state, budget), "two": two(state, budget)}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GratisWarning)
        method = MedSAMix(layer_granularity=2, n_trials=25, min_budget=30)
        found = method.search(base, models, score, samples=30)
        first = method.search(base, models, score, samples=30, prefer={"one": 1.0})
    costs = [(trial.costs["one"], trial.costs["two"]) for trial in found.front]
    assert not any(a != b and a[0] <= b[0] and a[1] <= b[1] for a in costs for b in costs)
    assert len(costs) >= 2
    mean = sum(found.score.values())
    assert all(mean >= sum(single.values()) - 1e-12 for single in found.singles)
    assert first.score["one"] == max(1 - trial.costs["one"] for trial in first.front)


def test_one_objective_by_name_is_the_single_task_search():
    base, models = states()
    plain = quiet(base, models, nearness(models[2]), layer_granularity=2, n_trials=20)
    named = quiet(
        base, models, lambda s, b: {"task": nearness(models[2])(s, b)}, layer_granularity=2, n_trials=20
    )  # fmt: skip
    assert [t.configuration for t in plain.trials] == [t.configuration for t in named.trials]


def test_the_same_seed_and_an_interrupted_search_come_to_the_same(tmp_path):
    base, models = states()
    options = {"layer_granularity": 2, "n_trials": 14}
    whole = quiet(base, models, nearness(models[2]), **options)
    calls = []

    def score(state, budget):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return nearness(models[2])(state, budget)

    journal = tmp_path / "journal"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GratisWarning)
        with pytest.raises(KeyboardInterrupt):
            MedSAMix(**options).search(base, models, score, samples=30, journal=journal)
        with open(journal, "a") as file:
            file.write('{"key": "half a li')
        again = MedSAMix(**options).search(base, models, score, samples=30, journal=journal)
    assert [t.configuration for t in whole.trials] == [t.configuration for t in again.trials]
    # A configuration that comes again on as many samples is not scored again either.
    distinct = {json.dumps([t.configuration, t.budget]) for t in whole.trials}
    assert len(calls) == 8 + len(distinct) - 7
    journal.write_text("no journal\n{}\n")
    with pytest.raises(FileError, match="damaged in line 1"), warnings.catch_warnings():
        warnings.simplefilter("ignore", GratisWarning)
        MedSAMix(**options).search(base, models, score, samples=30, journal=journal)


def test_failed_trials_cost_one_and_are_counted():
    base, models = states()
    calls = []

    def score(state, budget):
        calls.append(1)
        return [0.5, math.nan, 7.0, 0.25][len(calls) % 4]

    found = quiet(base, models, score, layer_granularity=2, n_trials=12)
    assert found.failures == 6
    assert found.score["score"] == 0.5
    assert all(trial.cost == 1 for trial in found.trials if trial.failed)
    with pytest.raises(InputError, match="Every trial failed"):
        quiet(base, models, lambda state, budget: math.nan, layer_granularity=2, n_trials=4)


def test_report_samples_are_scored_apart():
    base, models = states()
    with pytest.warns(GratisWarning, match="few to choose by"):
        found = MedSAMix(layer_granularity=2, n_trials=4).search(
            base, models, nearness(models[0]), samples=5, report=lambda state: nearness(models[1])(state, 0)
        )
    assert [single["score"] for single in found.reported_singles][1] == 1
    assert found.reported["score"] < 1

    def both(state, budget=0):
        return nearness(models[0])(state, budget)

    with pytest.warns(GratisWarning, match="other samples than you search on"):
        MedSAMix(layer_granularity=2, n_trials=4).search(base, models, both, samples=30, report=both)


def test_expected_improvement_is_the_closed_form():
    mean, deviation = np.array([0.2, 0.5, 0.9]), np.array([0.1, 0.3, 0.0])
    draws = np.random.default_rng(0).standard_normal((400_000, 3)) * deviation + mean
    expected = np.maximum(0.4 - draws, 0).mean(0)
    np.testing.assert_allclose(expected_improvement(mean, deviation, 0.4), expected, atol=1e-3)
    z = (0.4 - 0.5) / 0.3
    exact = -0.1 * norm.cdf(z) + 0.3 * norm.pdf(z)
    assert expected_improvement(mean, deviation, 0.4)[1] == pytest.approx(exact, abs=1e-12)


def test_parego_weighs_between_least_and_greatest():
    costs = np.array([[0.2, 10.0], [0.6, 20.0], [0.4, 30.0]])
    got = scalarised(costs, np.array([0.25, 0.75]))
    np.testing.assert_allclose(got, [0, 0.375 + 0.05 * (0.25 + 0.375), 0.75 + 0.05 * (0.125 + 0.75)])
    assert pareto(np.array([[1, 2], [2, 1], [2, 2], [1, 2]])) == [0, 1, 3]


def test_the_forest_s_deviation_holds_spread_within_and_between_trees():
    generator = np.random.default_rng(0)
    points = generator.random((200, 2))
    values = np.where(points[:, 0] > 0.5, 1.0, 0.0) + np.where(points[:, 1] > 0.5, 0.5, 0.01) * generator.normal(
        size=200
    )
    forest = _Forest(points, values, 0)
    mean, deviation = forest(np.array([[0.25, 0.25], [0.75, 0.25], [0.25, 0.75]]))
    assert mean[0] < 0.3 < 0.7 < mean[1]
    leaves = forest._forest.apply(np.array([[0.25, 0.75]]))[0]
    trees = [tree.tree_ for tree in forest._forest.estimators_]
    within = np.mean([tree.impurity[leaf] for tree, leaf in zip(trees, leaves, strict=True)])
    between = np.var([tree.value[leaf].item() for tree, leaf in zip(trees, leaves, strict=True)])
    assert within > 0.01 < between + within
    assert deviation[2] == pytest.approx(math.sqrt(within + between))
    assert mean[2] == pytest.approx(forest._forest.predict(np.array([[0.25, 0.75]]))[0])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ({"models": 1}, {}, InputError, "at least two models"),
        ({"base": None}, {}, InputError, "need the base"),
        ({"samples": 0}, {}, InputError, "there are none"),
        ({}, {"n_trials": 2}, ParameterError, "at least 3"),
        ({}, {"layer_granularity": 3}, InputError, "does not divide"),
        ({"extra": True}, {}, InputError, "other tensors than model 0: extra"),
        ({"shape": True}, {}, InputError, "other shapes than model 0"),
    ],
)
def test_refusals(arguments, options, error, message):
    base, models = states()
    if arguments.get("extra"):
        models[1]["extra"] = torch.zeros(1)
    if arguments.get("shape"):
        models[2][NAMES[0]] = torch.zeros(1)
    method = MedSAMix(**{"layer_granularity": 2, "n_trials": 5, **options})
    with pytest.raises(error, match=message):
        method.search(
            arguments.get("base", base), models[: arguments.get("models", 3)], nearness(base),
            samples=arguments.get("samples", 30),
        )  # fmt: skip


@pytest.mark.parametrize("bad", [{"methods": ("lerp",)}, {"methods": ()}, {"min_budget": 9, "max_budget": 4}])
def test_parameters_that_contradict(bad):
    with pytest.raises(ParameterError):
        MedSAMix(**bad)


def test_as_a_plain_merge_it_says_what_to_call():
    base, models = states()
    with pytest.raises(InputError, match="searches with your score"):
        merge_state_dicts(MedSAMix(), models, base)


def test_a_filter_that_matches_nothing_warns():
    with pytest.warns(GratisWarning, match="'attention' in it"):
        Space(layer_groups(NAMES, 2), ("attention",), ("linear",), 2)


def test_many_numbers_and_few_trials_warn():
    base, models = states()
    with pytest.warns(GratisWarning, match="112 numbers are close to random search: choose a larger layer_granularity"):
        MedSAMix(layer_granularity=1, n_trials=3).search(base, models, nearness(models[0]), samples=30)


@pytest.mark.evidence
def test_a_search_from_the_first_changed_group_on_comes_to_the_same_trials():
    """Also what it scores: the plain score, bit for bit."""
    from gratis.tasks.segmentation_merging import SegmentationMerging

    found = []
    for cached in (True, False):
        task = SegmentationMerging(search=24, pictures=1, looks=("textured",), prefix_cache=cached)
        method = MedSAMix(layer_granularity=2, n_trials=7, min_budget=8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GratisWarning)
            with task.applied(task.subject(), method) as merged:
                found.append(task.measure(merged, seed=0))
    assert found[0].details.pop("layers skipped") > 0
    assert found[0].metrics == found[1].metrics
    assert found[0].details == found[1].details


@pytest.mark.evidence
def test_the_weights_of_an_exact_linear_merge_are_recovered():
    _, models = states(2, ["layers.0.w"])
    share = 0.35
    target = {"layers.0.w": share * models[0]["layers.0.w"] + (1 - share) * models[1]["layers.0.w"]}
    options = {"layer_granularity": 1, "filters": (), "methods": ("linear",), "n_trials": 60, "min_budget": 30}
    recovered = []
    for seed in range(3):
        weights = quiet(None, models, nearness(target), seed=seed, **options).configuration[0]["sets"]["rest"]["linear"]
        recovered.append(weights[0] / sum(weights))
    assert np.median(np.abs(np.array(recovered) - share)) < 0.05
