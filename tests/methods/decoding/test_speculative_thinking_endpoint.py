"""Speculative thinking over HTTP: two endpoints of either kind, and one local model with one endpoint."""

from __future__ import annotations

import pytest
import torch

import gratis
from gratis.contract.errors import SubjectError
from gratis.subjects.chat import Chat, ChatError
from tests.methods.decoding.test_speculative_thinking import NO_WORDS, SPELLED, generate, spelling
from tests.subjects.chat.test_endpoint import reply, server

__all__ = ["server"]

STORY = "First, 2+3=6.\n\nWait, 2+3 is 5.\n\nSo it is \\boxed{5}."
TAKEN = "Hold on: it is 5."
PLAIN = {"opening": "", "instruction": ""}


def begun_of(body):
    """What of an answer a request holds."""
    if "prompt" in body:
        return body["prompt"].partition("<think>\n")[2]
    last = body["messages"][-1]
    return last["content"].partition("<think>\n")[2] if last["role"] == "assistant" else ""


def goes_on(said, tells=True, most=None):
    """A server's answer to a request, in the form that was asked for.

    It is `said(what is begun)` up to a stop string, at most `most` characters.
    """

    def answer(body):
        text = said(begun_of(body))
        stops = [(text.index(stop), stop) for stop in body.get("stop", ()) if stop in text]
        at, stop = min(stops) if stops else (len(text), None)
        words, finish = text[:at], "stop"
        if most is not None and at > most:
            words, finish, stop = text[:most], "length", None
        more = {"stop_reason": stop} if tells else {}
        usage = {"prompt_tokens": 20, "completion_tokens": len(words.split()), "total_tokens": 0}
        if "prompt" in body:
            return {
                "id": "1", "object": "text_completion", "created": 0, "model": "m", "usage": usage,
                "choices": [{"index": 0, "text": words, "finish_reason": finish, "logprobs": None, **more}],
            }  # fmt: skip
        made = reply(words, usage=usage)
        made["choices"][0] |= {"finish_reason": finish, **more}
        return made

    return answer


def pair(small, large):
    """A server that answers as the small or the large model, by the name that is asked for."""
    return lambda body: (small if body["model"] == "small" else large)(body)


@pytest.mark.parametrize("tells", [True, False], ids=["says what stopped it", "does not say"])
@pytest.mark.parametrize("how", ["prefill", "completions"])
def test_two_endpoints(server, how, tells):
    server.plays(pair(goes_on(lambda begun: STORY[len(begun) :], tells), goes_on(lambda begun: TAKEN, tells)))
    small, large = (Chat(server.url, name, continues=how) for name in ("small", "large"))
    method = gratis.SpeculativeThinking(target=large, instruction="")
    with gratis.attach(small, method) as handle:
        answer = small.answer("What is 2+3?")
    kept = "First, 2+3=6.\n\n"
    assert answer.response == kept + TAKEN
    report = handle.report()["speculative-thinking"]
    assert (report["takeovers"], report["target_calls"], report["failed_calls"]) == (1, 1, 0)
    [asked] = [body for body in server.requests if body["model"] == "large"]
    assert begun_of(asked) == kept, "the target reads the whole text, with its delimiter"
    assert asked["max_tokens"] == 20
    assert "stop" not in asked
    first = server.requests[0]
    assert first["stop"] == ["\n\n"]
    if how == "prefill":
        assert asked["continue_final_message"] is True
        assert asked["add_generation_prompt"] is False
        assert [message["role"] for message in asked["messages"]] == ["user", "assistant"]
    else:
        assert asked["prompt"].endswith("<think>\n" + kept)
    assert handle.report()["speculative-thinking"]["target_share"] > 0


def test_a_server_without_continuation_is_refused_before_anything_is_sent(server):
    server.plays(reply("x"))
    with pytest.raises(SubjectError, match="prefill"):
        gratis.attach(Chat(server.url, "m"), gratis.SpeculativeThinking())
    with pytest.raises(SubjectError, match="target of SpeculativeThinking"):
        gratis.attach(
            Chat(server.url, "m", continues="prefill"), gratis.SpeculativeThinking(target=Chat(server.url, "n"))
        )
    assert server.requests == []


def test_an_endpoint_that_breaks_leaves_the_small_model_alone(server):
    down = (500, {}, {"error": {"message": "broken"}}, 0)
    story = goes_on(lambda begun: STORY[len(begun) :], most=12)
    # "First, 2+3=6", then "." up to the delimiter, then the probe; from there on everything fails.
    server.plays(story, story, story, down)
    small = Chat(server.url, "small", continues="prefill", attempts=1, sleep=lambda seconds: None)
    large = Chat(server.url, "large", continues="prefill", attempts=1, sleep=lambda seconds: None)
    with gratis.attach(small, gratis.SpeculativeThinking(target=large, instruction="")) as handle:
        answer = small.answer("What is 2+3?")
    assert answer.response == "First, 2+3=6.\n\nWait, 2+3 is"
    assert "small model did not answer: HTTP 500" in answer.fallback
    assert handle.report()["speculative-thinking"]["failed_calls"] == 1
    server.plays(down)
    with gratis.attach(small, gratis.SpeculativeThinking(target=large)), pytest.raises(ChatError, match="broken"):
        small.answer("What is 2+3?")


def test_a_local_model_with_an_endpoint_as_its_target(server):
    server.plays(goes_on(lambda begun: "wait"))
    model, tokenizer = spelling(0, ())
    ids = tokenizer("12+ab=", return_tensors="pt").input_ids
    target = Chat(server.url, "large", continues="prefill")
    method = gratis.SpeculativeThinking(target=target, **SPELLED, **NO_WORDS, not_reasoning=True)
    with gratis.attach(model, method) as handle:
        out = generate(model, ids, do_sample=False)
    report = handle.report()["speculative-thinking"]
    response = tokenizer.decode(out[0, ids.shape[1] :])
    assert report["target_calls"][0] == len(server.requests) >= 1
    for body in server.requests:
        user, said = body["messages"][0]["content"], body["messages"][-1]["content"]
        assert user == "12+ab="
        assert response.startswith(said)
        assert response[len(said) :].startswith("wait")
        assert body["temperature"] == 0


def test_an_endpoint_with_a_local_model_as_its_target(server):
    server.plays(goes_on(lambda begun: STORY[len(begun) :]))
    model, _ = spelling(1, ())
    small = Chat(server.url, "small", continues="prefill")
    method = gratis.SpeculativeThinking(target=model, takeover_tokens=5, top_k=1, top_p=1.0, instruction="")
    torch.manual_seed(0)
    with gratis.attach(small, method) as handle:
        answer = small.answer("2+3", max_tokens=40)
    report = handle.report()["speculative-thinking"]
    [[taken, *_]] = report["takeovers_of_last_call"]
    assert taken["kind"] == "takeover"
    assert taken["tokens"] == 5
    assert answer.response.startswith("First, 2+3=6.\n\n" + taken["text"])
    assert report["target_tokens"] >= 5
