"""Answers are found in responses and voted on, by hand-computed cases."""

from __future__ import annotations

import pytest

from gratis.contract.errors import InputError, UnknownNameError
from gratis.subjects.answers import borda, extract, ranking


@pytest.mark.parametrize(
    ("name", "text", "answer"),
    [
        ("number", "It is 3 + 4, so 1,250.50", "1250.5"),
        ("number", "minus: -0.0", "0"),
        ("number", "+007", "7"),
        ("number", "none here", None),
        ("choice", "A is tempting, but the answer is (C).", "C"),
        ("choice", "(B)", "B"),
        ("choice", "Apples", None),
        ("boxed", r"so \boxed{\frac{1}{2}} and \boxed{ x^{2} }", "x^{2}"),
        ("boxed", r"\boxed{open", None),
        ("code", "a\n```python\nx = 1\n```\nb\n```\ny = 2\n```", "x = 1\n\ny = 2"),
        ("code", "no fence", None),
        ("last line", "one\ntwo\n\n", "two"),
        ("text", "  whole  ", "whole"),
        ("text", "  ", None),
    ],
)
def test_extractors(name, text, answer):
    assert extract(name, text) == answer


def test_unknown_extractor_is_named_with_the_nearest():
    with pytest.raises(UnknownNameError, match="number"):
        extract("numbr", "1")


def test_borda_by_hand():
    # Ranks by score: 1 (0.9), 3 (0.5), 0 (0.4), 2 (0.1). Votes with p = 1: 4, 3, 2, 1.
    vote = borda([0.4, 0.9, 0.1, 0.5], ["a", "b", "a", "a"], 1)
    assert vote.totals == (6.0, 4.0, 0.0, 0.0)
    assert vote.index == 0
    assert vote.ranking[0] == 0
    # p = 2: 16 for b against 4 + 1 + 9 for a.
    assert borda([0.4, 0.9, 0.1, 0.5], ["a", "b", "a", "a"], 2).index == 1


def test_responses_without_an_answer_keep_their_rank_and_cast_nothing():
    vote = borda([0.9, 0.8, 0.7], [None, "a", "b"], 1)
    assert vote.totals == (0.0, 2.0, 1.0)
    assert vote.index == 1


def test_power_zero_is_the_majority_and_a_large_power_the_best_score():
    scores, answers = [0.9, 0.3, 0.2, 0.1], ["x", "y", "y", "z"]
    assert borda(scores, answers, 0).index == 1
    assert borda(scores, answers, 50).index == 0


def test_ties_go_to_the_lower_index():
    assert ranking([1.0, 2.0, 2.0]) == [1, 2, 0]
    assert borda([0.5, 0.5], ["a", "b"], 0).index == 0


def test_nobody_answered():
    assert borda([0.1, 0.9], [None, None], 1).index == 1


@pytest.mark.parametrize(
    ("scores", "answers", "power", "message"),
    [
        ([1.0], [], 1, "1 scores for 0 answers"),
        ([], [], 1, "nothing to vote on"),
        ([1.0], ["a"], -1, "finite and >= 0"),
        ([1.0], ["a"], float("inf"), "finite and >= 0"),
        ([float("nan")], ["a"], 1, "not a number"),
    ],
)
def test_what_cannot_be_voted_on(scores, answers, power, message):
    with pytest.raises(InputError, match=message):
        borda(scores, answers, power)
