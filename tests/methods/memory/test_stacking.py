"""What goes together with a memory, against dense attention over places that are written down one by one."""

from __future__ import annotations

import functools
import math
import re

import pytest
import torch

import gratis
from gratis.contract.attach import Scope
from gratis.contract.errors import StackingError
from gratis.subjects.attention_door import install_attention
from tests import tiny_language as tiny
from tests.methods.memory.test_family import METHODS, generate
from tests.methods.memory.test_lacache import rule

LENGTH, SCALE, HEADS, LAYERS = 48, 3.0, (0, 3), (1, 2)
PIECES = {"infllm": [10, 17, 9, *[1] * 12], "sliding-window": [1] * LENGTH, "lacache": [1] * LENGTH}
ALL_BLOCKS = gratis.InfLLM(window=16, sinks=3, block=4, blocks=40, hot_blocks=40, lookup=8, representatives=2)


@functools.cache
def places(name, layer, t):
    """What query t attends to: pairs of (token, its place), and the query's own place. Tokens may come in two lists."""
    if name == "infllm":
        window = ALL_BLOCKS.window
        near = [(p, p) for p in range(max(0, t - window + 1), t + 1)]
        return [(near, t), ([(p, 0) for p in range(t - window + 1)], window - 1)]
    if name == "lacache":
        held = [*rule(tiny.LAYERS, t, 24, 1, 0, 4)[layer], t]
    else:
        held = [*range(t + 1)] if t < 24 else [0, 1, 2, 3, *range(t - 20, t + 1)]
    return [([(p, slot) for slot, p in enumerate(held)], len(held) - 1)]


def turned(vectors, at):
    """Rotary embedding of vectors (n, head_dim) of the tiny model at places (n,), pair by pair."""
    half = vectors.shape[1] // 2
    angle = torch.tensor(at).double()[:, None] * 10000.0 ** (-torch.arange(half).double() / half)
    cos, sin = angle.cos(), angle.sin()
    a, b = vectors.double().split(half, 1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], 1)


def reference(model, ids, name, scale=SCALE, heads=HEADS, layers=LAYERS):
    """Logits of a text that is read at once: dense attention, ln(scale) added to the first token's logit."""

    def attend(inner, module, query, key, value, mask, scaling=None, **kwargs):
        output = torch.zeros_like(query, dtype=torch.float64)
        for head in range(query.shape[1]):
            own = head // (query.shape[1] // key.shape[1])
            for t in range(query.shape[2]):
                logits, tokens = [], []
                for held, place in places(name, module.layer_idx, t):
                    if held:
                        at = [p for p, _ in held]
                        keys = turned(key[0, own, at], [slot for _, slot in held])
                        logits.append(keys @ turned(query[0, head, t : t + 1], [place])[0] * scaling)
                        tokens += at
                together = torch.cat(logits)
                if head in heads and module.layer_idx in layers:
                    together[tokens.index(0)] += math.log(scale)
                output[0, head, t] = together.softmax(0) @ value[0, own, tokens].double()
        return output.to(query.dtype).transpose(1, 2), None

    scope = Scope()
    install_attention(model, "reference", attend, scope)
    # At position 0 the model hands over queries and keys as they are.
    logits = model(ids, position_ids=torch.zeros_like(ids), use_cache=False).logits
    scope.close()
    return logits


def read(model, ids, sizes):
    cache, logits = None, []
    for piece in ids.split(sizes, 1):
        out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, 1)


@torch.no_grad()
@pytest.mark.parametrize("name", PIECES)
def test_zero_tuning_changes_the_first_tokens_logit_wherever_the_memory_has_it(name):
    model = tiny.tiny_language_model()
    ids = torch.randint(2, tiny.VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(3))
    memory = ALL_BLOCKS if name == "infllm" else METHODS[name]
    tuning = gratis.ZeroTuning(scale=SCALE, heads=HEADS, layers=LAYERS)
    expected = reference(model, ids, name)
    for stack in ((memory, tuning), (tuning, memory)):
        with gratis.attach(model, *stack):
            torch.testing.assert_close(read(model, ids, PIECES[name]), expected, atol=1e-3, rtol=1e-3)
    with gratis.attach(model, memory):
        alone = read(model, ids, PIECES[name])
    torch.testing.assert_close(alone, reference(model, ids, name, scale=1.0), atol=1e-3, rtol=1e-3)
    assert not torch.allclose(alone, expected, atol=0.1)


@torch.no_grad()
def test_what_is_attached_around_a_memory_comes_off_in_any_order():
    model, ids, memory = tiny.tiny_language_model(), tiny.prompt(), METHODS["infllm"]
    before, plain = tiny.snapshot(model), model(ids).logits
    with gratis.attach(model, memory):
        alone = read(model, ids, [20, 20])
    one = gratis.attach(model, memory)
    other = gratis.attach(model, gratis.ZeroTuning(scale=3.0))
    one.detach()
    assert not torch.equal(model(ids).logits, plain)
    again = gratis.attach(model, memory)
    other.detach()
    assert torch.equal(read(model, ids, [20, 20]), alone)
    again.detach()
    assert tiny.snapshot(model) == before
    assert torch.equal(model(ids).logits, plain)


@pytest.mark.parametrize("name", ["block-top-k", "zero-tuning", "log-length-scaling", *METHODS])
def test_self_certainty_goes_over_any(name):
    entry = gratis.catalogue.entries[name]
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    with gratis.attach(model, entry.load()(**entry.card.examples), gratis.SelfCertainty(samples=3)) as handle:
        torch.manual_seed(0)
        drawn = generate(model, ids, do_sample=True)
        torch.manual_seed(0)
        assert torch.equal(generate(model, ids, do_sample=True), drawn)
        report = handle.report()["self-certainty"]
    assert report["samples"] == 6
    assert len(report["ranking"][0]) == 3


@pytest.mark.parametrize(
    ("one", "other", "reason"),
    [
        (gratis.BlockTopK(), METHODS["infllm"], "keeps the mean key of every block .* leaves no cache behind"),
        (gratis.BlockTopK(), METHODS["lacache"], "entries must stay where they are, and lacache evicts .* and moves"),
        (METHODS["infllm"], METHODS["lacache"], "leaves no cache behind, and lacache evicts"),
        (METHODS["infllm"], gratis.LogLengthScaling(), "from one distance, however long the text is"),
        (
            METHODS["infllm"],
            gratis.GuidedCaptioning(),
            "remembers one text in every pass of the model, and .* reads two",
        ),
        (METHODS["infllm"], gratis.ZeroTuning(mode="key"), "keeps keys as they were before rotation"),
        (gratis.SlidingWindow(sinks=0), gratis.ZeroTuning(), "forgets the first token where it has no sinks"),
        (gratis.SelfCertainty(), gratis.Sampling(), "chooses the tokens that generate returns, .* does so too"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_what_cannot_go_together_is_refused_with_the_true_reason(one, other, reason):
    model = tiny.tiny_language_model()
    before = tiny.snapshot(model)
    for stack in ((one, other), (other, one)):
        with pytest.raises(
            StackingError, match=f"{stack[0].name} and {stack[1].name} cannot be attached together"
        ) as e:
            gratis.attach(model, *stack)
        if stack[0] is one:
            assert re.search(reason, str(e.value)), str(e.value)
    assert tiny.snapshot(model) == before
