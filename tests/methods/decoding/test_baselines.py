"""The plain ways of choosing tokens and responses, each against transformers or a definition."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import gratis
from gratis.subjects.opening import set_tokenizer
from tests import tiny_language as tiny
from tests.methods.decoding.test_self_certainty import Words, generate, responses


def test_greedy_takes_the_likeliest_token_whatever_the_call_says():
    model, ids = tiny.tiny_language_model(), tiny.prompt(2)
    expected = generate(model, ids, do_sample=False)
    with gratis.attach(model, gratis.Greedy()):
        assert torch.equal(generate(model, ids, do_sample=True, temperature=3.0), expected)


def test_sampling_draws_one_response_from_the_distribution():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    with torch.no_grad():
        p = (model(ids).logits[0, -1] / 0.8).softmax(-1)
    with gratis.attach(model, gratis.Sampling(temperature=0.8, top_p=1.0)):
        torch.manual_seed(0)
        many = torch.cat([
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=1)[:, -1]
            for _ in range(400)
        ])  # fmt: skip
    seen = torch.bincount(many, minlength=tiny.VOCABULARY) / 400
    top = int(p.argmax())
    assert abs(float(seen[top] - p[top])) < 4 * float((p[top] * (1 - p[top]) / 400).sqrt()) + 1e-3


def test_majority_vote_returns_the_commonest_answer():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    set_tokenizer(model, Words())
    with gratis.attach(model, gratis.MajorityVote(samples=9, answer="number", temperature=0.5)) as handle:
        drawn, report = responses(model, ids, handle, top_k=2)
    answers = [str(response[-1]) for response in drawn]
    most = max(Counter(answers).values())
    chosen = answers[report["chosen"][0]]
    assert Counter(answers)[chosen] == most
    assert report["chosen"][0] == answers.index(chosen)


def test_perplexity_pick_takes_the_response_with_the_highest_mean_log_probability():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    with gratis.attach(model, gratis.PerplexityPick(samples=5, temperature=1.0)) as handle:
        drawn, report = responses(model, ids, handle)
    means = []
    for response in drawn:
        with torch.no_grad():
            logits = model(torch.cat([ids, torch.tensor([response])], 1)).logits[0, ids.shape[1] - 1 : -1]
        means.append(float(logits.double().log_softmax(-1)[range(len(response)), response].mean()))
    assert report["ranking"][0] == sorted(range(5), key=lambda i: -means[i])
    named = [key for key in report if "log_probability" in key or "perplexity" in key]
    assert named, f"the report tells the figure it chose by: {sorted(report)}"


@pytest.mark.parametrize("kind", [gratis.MajorityVote, gratis.PerplexityPick])
def test_one_sample_changes_nothing(kind):
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    expected = generate(model, ids, do_sample=True)
    options = {"answer": "response"} if kind is gratis.MajorityVote else {}
    with gratis.attach(model, kind(samples=1, **options)):
        assert torch.equal(generate(model, ids, do_sample=True), expected)
