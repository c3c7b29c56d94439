"""Base decoders of masked diffusion, each against a few lines of its own."""

from __future__ import annotations

import math

import pytest
import torch

import gratis
from gratis.contract.errors import InputError
from gratis.subjects.masked_diffusion import Blocks, Times, confidence, perturbed
from gratis.subjects.masked_diffusion_door import generate
from tests import tiny_masked as tiny
from tests.tiny_masked import MASK, NEW, PROMPT


def generators(count, seed=0):
    return [torch.Generator().manual_seed(seed + row) for row in range(count)]


def read(model, text):
    """Clean log-probabilities (window, vocabulary), the mask token ruled out."""
    with torch.no_grad():
        logits = model(input_ids=text).logits[0, PROMPT:].float()
    logits[:, MASK] = -math.inf
    return logits.log_softmax(-1)


SURE = {
    "low_confidence": lambda logs: logs.exp().max(-1).values,
    "topk_margin": lambda logs: logs.exp().topk(2).values @ torch.tensor([1.0, -1.0]),
    "entropy": lambda logs: (logs.exp() * logs.clamp_min(-100)).sum(-1),
}


@pytest.mark.parametrize("strategy", SURE)
@pytest.mark.parametrize("block", [4, NEW])
def test_each_strategy_takes_the_places_it_is_most_sure_of(strategy, block):
    model = tiny.tiny_masked_model()
    found = generate(model, tiny.prompt(), max_new_tokens=NEW, block_length=block, remasking=strategy)
    text = torch.cat([tiny.prompt(), torch.full((1, NEW), MASK)], dim=1)
    for step in range(NEW):
        logs = read(model, text)
        sure = SURE[strategy](logs).masked_fill(text[0, PROMPT:] != MASK, -math.inf)
        sure[(step // block + 1) * block :] = -math.inf
        place = int(sure.argmax())
        text[0, PROMPT + place] = logs[place].argmax()
    assert torch.equal(found, text)


def test_random_order_is_uniform_over_the_blocks_places_and_seeded():
    """Which place of a block of four is taken first: a chi-square test with three degrees of freedom, p > 0.001."""
    rows = 400
    masked = torch.ones(rows, 8, dtype=torch.bool)
    plan = Blocks(block_length=4, remasking="random").plan(masked)
    _, sure = plan.propose(torch.zeros(rows, 8, 5), generators(rows))
    taken = plan.take(1, masked, sure, torch.arange(rows), generators(rows))
    counts = taken.sum(0)
    assert counts[4:].sum() == 0
    assert counts.sum() == rows
    assert float(((counts[:4] - rows / 4) ** 2 / (rows / 4)).sum()) < 16.27
    model = tiny.tiny_masked_model()
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        generate(model, tiny.prompt(), max_new_tokens=NEW, remasking="random", steps=4)
    torch.manual_seed(0)
    first = generate(model, tiny.prompt(), max_new_tokens=NEW, remasking="random", steps=4)
    torch.manual_seed(0)
    assert torch.equal(first, generate(model, tiny.prompt(), max_new_tokens=NEW, remasking="random", steps=4))


@pytest.mark.parametrize("alg", ["maskgit_plus", "topk_margin", "entropy"])
@pytest.mark.parametrize("steps", [4, NEW])
def test_the_global_schedule_takes_a_share_by_diffusion_times(alg, steps):
    model = tiny.tiny_masked_model()
    with gratis.attach(model, gratis.GlobalSchedule(steps=steps, alg=alg)):
        found = model.generate(tiny.prompt(), max_new_tokens=NEW)
    sure_of = SURE["low_confidence" if alg == "maskgit_plus" else alg]
    text = torch.cat([tiny.prompt(), torch.full((1, NEW), MASK)], dim=1)
    times = torch.linspace(1, 1e-3, steps + 1)
    for step in range(steps):
        logs, masked = read(model, text), text[0, PROMPT:] == MASK
        left = int(masked.sum())
        count = left if step == steps - 1 else int(left * float(1 - times[step + 1] / times[step]))
        places = sure_of(logs).masked_fill(~masked, -math.inf).topk(count).indices
        text[0, PROMPT + places] = logs[places].argmax(-1)
    assert torch.equal(found, text)


def test_the_origin_schedule_takes_each_place_with_the_share_as_its_chance():
    rows, steps = 300, 4
    masked = torch.ones(rows, 16, dtype=torch.bool)
    plan = Times(steps=steps, alg="origin").plan(masked)
    share = float(1 - torch.linspace(1, 1e-3, steps + 1)[1])
    taken = plan.take(1, masked, torch.zeros(rows, 16), torch.arange(rows), generators(rows)).double().mean()
    assert abs(float(taken) - share) < 4 * math.sqrt(share * (1 - share) / (rows * 16))
    assert plan.take(steps, masked, torch.zeros(rows, 16), torch.arange(rows), generators(rows)).all()


def test_the_order_by_temperature_is_a_draw_without_replacement():
    """With alg_temp the first of the taken places is drawn from softmax(confidence / alg_temp)."""
    rows = 4000
    scores = torch.tensor([0.0, 0.5, 1.0])
    plan = Times(steps=3, alg="entropy", alg_temp=0.5, eps=0.0).plan(torch.ones(rows, 3, dtype=torch.bool))
    taken = plan.take(
        1, torch.ones(rows, 3, dtype=torch.bool), scores.expand(rows, 3), torch.arange(rows), generators(rows)
    )
    assert bool((taken.sum(-1) == 1).all())
    expected = (scores / 0.5).softmax(-1)
    assert float(((taken.sum(0) - rows * expected) ** 2 / (rows * expected)).sum()) < 13.8


def test_noise_has_the_temperature_as_its_scale_and_leaves_confidence_alone():
    """The largest of logits − T ln(−ln U) is a draw from softmax(logits / T): chi-square, two degrees, p > 0.001."""
    rows, temperature = 4000, 0.7
    logits = torch.tensor([0.3, -0.4, 1.0]).expand(rows, 1, 3)
    noisy = perturbed(logits, temperature, generators(rows))
    assert noisy.dtype == torch.float64
    counts = noisy.argmax(-1).flatten().bincount(minlength=3)
    expected = rows * (logits[0, 0] / temperature).softmax(-1)
    assert float(((counts - expected) ** 2 / expected).sum()) < 13.8
    tokens = torch.full((rows, 1), 1)
    torch.testing.assert_close(confidence(logits, tokens, "low_confidence", []), logits.softmax(-1)[..., 1])


def test_schedules_that_do_not_fit_are_refused():
    model = tiny.tiny_masked_model()
    for method, call in (
        (gratis.FixedSteps(), {"steps": NEW + 1}), (gratis.FixedSteps(), {"steps": 0}),
        (gratis.GlobalSchedule(), {"steps": NEW + 1}), (gratis.GlobalSchedule(), {"alg": "best"}),
    ):  # fmt: skip
        with gratis.attach(model, method), pytest.raises(InputError):
            model.generate(tiny.prompt(), max_new_tokens=NEW, **call)
