"""Movie-review snippets: the draw, the metrics on a chat whose answers are known, and SEC over an endpoint."""

from __future__ import annotations

import json

import pytest

import gratis
from gratis.cli import run
from gratis.contract.errors import SubjectError
from gratis.subjects.chat import Chat
from gratis.tasks.sentiment import Sentiment, balanced, rated_snippets
from tests.subjects.chat.test_endpoint import reply, server

__all__ = ["server"]


def truth() -> dict[str, str]:
    return {text: "positive" if rating > 0 else "negative" for rating, text in rated_snippets()}


def test_the_draw_is_balanced_rated_and_seeded():
    known = truth()
    chosen = balanced(30, 5)
    assert chosen == balanced(30, 5)
    assert chosen != balanced(30, 6)
    assert len({text for text, _ in chosen}) == 30
    assert [sign for _, sign in chosen].count("positive") == 15
    assert all(known[text] == sign for text, sign in chosen)
    assert [sign for _, sign in balanced(7, 0)].count("negative") == 4


@pytest.mark.parametrize(("right", "positive"), [(True, 0.5), (False, 1.0)])
def test_metrics_of_a_chat_whose_answers_are_known(right, positive):
    known = truth()

    def judge(messages, **parameters):
        return known[messages[-1]["content"].split("\n", 1)[1]].capitalize() + "." if right else "positive"

    measured = Sentiment(snippets=10).measure(Chat(judge), seed=0)
    assert measured.metrics["accuracy"] == (1.0 if right else 0.5)
    assert measured.metrics["positive_share"] == positive
    assert measured.metrics["calls_per_question"] == 1.0
    assert len(measured.items["accuracy"]) == 10
    assert measured.calls == 10


def test_what_is_no_chat_is_refused():
    with pytest.raises(SubjectError, match="chat:NAME"):
        gratis.try_method("sec", object(), "sentiment")


def test_sec_over_an_endpoint_from_the_command_line(server, tmp_path, capsys):
    def answer(body):
        if "similar ones with" in body["messages"][-1]["content"]:
            shown = [f"[Question{n}: a film of {n} reels\nAnswer{n}: positive]" for n in range(1, 6)]
            return reply("\n\n".join(shown))
        return reply('{"answer": "negative"}' if len(body["messages"]) > 2 else '"positive"')

    server.plays((200, {}, answer, 0))
    command = ["try", "sec", "--model", f"{server.url}#m", "--rounds", "1", "--task-set", "snippets=4", "--json"]
    assert run([*command, "--out", str(tmp_path)]) == 0
    trial = json.loads(capsys.readouterr().out)
    shares = [arm["metrics"]["positive_share"]["median"] for arm in trial["arms"]]
    assert shares == [1.0, 0.0]
    last = [m["role"] for m in server.requests[-1]["messages"]]
    assert last == ["system"] + ["user", "assistant"] * 4 + ["user"]


def test_an_endpoint_that_refuses_is_one_sentence(server, tmp_path, capsys):
    server.plays((404, {}, {"error": {"message": "there is no model m"}}, 0))
    command = ["try", "sec", "--model", f"{server.url}#m", "--task-set", "snippets=4", "--out", str(tmp_path)]
    assert run(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("gratis: The chat did not answer: HTTP 404")
    assert "there is no model m" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
