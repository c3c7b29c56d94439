"""Self-certainty over an endpoint that tells its largest log-probabilities: a bound, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

import gratis
from gratis.contract.errors import SubjectError
from gratis.methods.decoding.self_certainty import bound
from gratis.subjects.chat import Chat, ChatError, Reply, Usage
from gratis.subjects.token_statistics import self_certainty

VOCABULARY = 50


def told(logits, count):
    """What an endpoint says of tokens whose logits are (tokens, vocabulary)."""
    logs = logits.double().log_softmax(-1).topk(count, dim=-1).values.tolist()
    return [
        {"token": "x", "logprob": row[0], "top_logprobs": [{"token": "x", "logprob": v} for v in row]} for row in logs
    ]


class Scripted:
    """An endpoint that answers every sample by its number."""

    model, tells_log_probabilities = "scripted", True

    def __init__(self, texts, spreads, count=20):
        self.texts, self.spreads, self.count, self.requests = texts, spreads, count, []

    def generate(self, requests):
        self.requests += requests
        replies = []
        for request in requests:
            place = (request.sample_index - 1) % len(self.texts)
            logits = torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(place)) * self.spreads[place]
            logprobs = told(logits, self.count) if self.count else None
            replies.append(Reply(self.texts[place], usage=Usage(input=5, output=4), logprobs=logprobs))
        return replies


def method(**options):
    return gratis.SelfCertainty(**{"samples": 3, "endpoint_vocabulary": VOCABULARY, **options})


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
def test_the_bound_is_below_the_score_and_tightens_with_what_is_told(spread):
    logits = torch.randn(6, VOCABULARY, generator=torch.Generator().manual_seed(0)) * spread
    exact = float(self_certainty(logits).mean())
    bounds = [bound(Reply("", logprobs=told(logits, count)), VOCABULARY)[0] for count in (1, 5, 20, 49, 50)]
    assert bounds == pytest.approx(sorted(bounds), abs=1e-9)
    assert bounds[-1] == pytest.approx(exact, abs=1e-4)
    assert bounds[0] <= exact + 1e-6


def test_a_distribution_that_is_told_whole_by_its_head_is_flagged():
    entry = {"token": "x", "logprob": 0.0, "top_logprobs": [{"token": "x", "logprob": 0.0}]}
    value, floored = bound(Reply("", logprobs=[entry]), VOCABULARY)
    assert floored == 1.0
    assert math.isfinite(value)


def test_the_most_certain_reply_is_taken():
    chat = Chat(Scripted(["one", "two", "three"], [0.5, 6.0, 1.0]))
    with gratis.attach(chat, method()) as handle:
        answer = chat.answer("What?")
    assert answer.response == "two"
    report = handle.report()["self-certainty"]
    assert report["ranking"][0][0] == 1
    assert report["samples"] == 3
    assert [request.logprobs for request in chat.backend.requests] == [20] * 3
    assert len({request.sample_index for request in chat.backend.requests}) == 3


def test_votes_weighted_by_rank_over_an_endpoint():
    chat = Chat(Scripted(["It is 4.", "It is 7.", "So 4"], [1.0, 6.0, 0.5]))
    with gratis.attach(chat, method(select="borda", answer="number", power=0.0)):
        assert chat.answer("What?").response == "It is 4."
    with gratis.attach(chat, method(select="borda", answer="number", power=5.0)):
        assert chat.answer("What?").response == "It is 7."


def test_endpoints_without_log_probabilities_are_refused():
    with pytest.raises(SubjectError, match="tells log-probabilities"):
        gratis.attach(Chat(lambda messages, **_: "x"), method())
    with pytest.raises(SubjectError, match="endpoint_vocabulary"):
        gratis.attach(Chat(Scripted(["a"], [1.0])), gratis.SelfCertainty(samples=2))
    silent = Chat(Scripted(["a", "b", "c"], [1.0] * 3, count=0))
    with gratis.attach(silent, method()), pytest.raises(ChatError, match="told no log-probabilities"):
        silent.answer("What?")
