"""Reasoning problems and the choice among samples: on models whose answers are known."""

from __future__ import annotations

import math

import pytest
import torch

import gratis
from gratis import subjects
from gratis.contract.errors import ParameterError, SubjectError
from gratis.tasks.reasoning import Reasoning, drawn_tokens, problems
from gratis.tasks.sample_choice import SampleChoice, rank_correlation, rescored_difference
from tests import tiny_language as tiny

pytest.importorskip("reasoning_gym")
END = 1


class Oracle:
    """A model and its tokenizer in one: it answers each problem as `say` does. Tokens are characters."""

    chat_template = None
    eos_token_id = END

    def __init__(self, say):
        self.say, self.generation_config, self.device = say, self, torch.device("cpu")
        self.pad_token_id = 0
        self.calls = []

    def __call__(self, text, return_tensors=None, **options):
        return {"input_ids": torch.tensor([[ord(letter) for letter in text]])}

    def decode(self, tokens, skip_special_tokens=True):
        return "".join(chr(token) for token in tokens if token > 1)

    def generate(self, input_ids, attention_mask, max_new_tokens, num_return_sequences=1, **options):
        self.calls.append({"max_new_tokens": max_new_tokens, **options})
        question = self.decode(input_ids[0].tolist()).removeprefix("Question: ").removesuffix("\nAnswer:")
        rows = [[*map(ord, self.say(question, place)), END] for place in range(num_return_sequences)]
        longest = max(map(len, rows))
        return torch.cat(
            [input_ids.expand(len(rows), -1), torch.tensor([row + [0] * (longest - len(row)) for row in rows])], 1
        )


@pytest.fixture(autouse=True)
def own_tokenizer(monkeypatch):
    """The oracle is its own tokenizer."""
    known = subjects.tokenizer_of
    monkeypatch.setattr(subjects, "tokenizer_of", lambda m: m if isinstance(m, Oracle) else known(m))


def answers(size, seed=0, kinds=("chain_sum", "products", "gcd")):
    return {p.question: str(p.entry["answer"]) for p in problems(kinds, size, seed, "easy")}


def test_problems_take_the_kinds_in_turn_and_depend_on_the_seed_only():
    first = problems(("chain_sum", "gcd"), 5, 0, "easy")
    assert [p.kind for p in first] == ["chain_sum", "gcd", "chain_sum", "gcd", "chain_sum"]
    assert [p.question for p in first] == [p.question for p in problems(("chain_sum", "gcd"), 5, 0, "easy")]
    assert [p.question for p in first] != [p.question for p in problems(("chain_sum", "gcd"), 5, 1, "easy")]
    assert first[0].score(first[0].entry["answer"]) == 1
    assert first[0].score(None) == 0
    with pytest.raises(ParameterError, match="chain_sum"):
        problems(("chain_sun",), 1, 0, "easy")


def test_accuracy_counts_the_last_number():
    known = answers(6)
    right = Oracle(lambda question, place: f"7 is not it, it is {known[question]}.")
    wrong = Oracle(lambda question, place: f"{known[question]}, or rather -1")
    found = Reasoning(size=6).measure(right, seed=0)
    assert found.metrics["accuracy"] == 1
    assert found.items["accuracy"] == [1.0] * 6
    lengths = [len(f"7 is not it, it is {answer}.") + 1 for answer in known.values()]
    assert found.metrics["response_tokens"] == pytest.approx(sum(lengths) / 6)
    assert found.tokens == sum(lengths)
    assert Reasoning(size=6).measure(wrong, seed=0).metrics["accuracy"] == 0


def test_first_mean_and_any_of_known_samples():
    known = answers(4)
    model = Oracle(lambda question, place: known[question] if place in (0, 2) else "-1 or, well, -1")
    found = SampleChoice(size=4, samples=4, temperature=0.7).measure(model, seed=0)
    assert found.metrics["first_accuracy"] == 1
    assert found.metrics["mean_accuracy"] == 0.5
    assert found.metrics["any_accuracy"] == 1
    assert found.metrics["gain"] == 0.5
    assert math.isnan(found.metrics["rescored_difference"])
    assert model.calls[0]["temperature"] == 0.7
    assert model.calls[0]["do_sample"] is True
    last = Oracle(lambda question, place: known[question] if place == 3 else "-1")
    assert SampleChoice(size=4, samples=4).measure(last, seed=0).metrics["gain"] == -0.25


def test_a_preference_for_length_shows():
    by_length = Oracle(lambda question, place: "1" * (8 - place))
    found = SampleChoice(size=3, samples=4).measure(by_length, seed=0)
    assert found.metrics["length_correlation"] == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 3], [5, 5, 5]) == 0


def test_reported_scores_are_compared_with_a_second_pass():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    with gratis.attach(model, gratis.SelfCertainty(samples=3)) as handle:
        torch.manual_seed(0)
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, num_return_sequences=3
        )
        rows = out[:, tiny.PROMPT :].tolist()
        assert rescored_difference(model, ids, rows) < 1e-4
        assert rescored_difference(model, ids, [[(token + 1) % 97 for token in row] for row in rows]) > 1e-2
        assert drawn_tokens(model) == handle.report()["self-certainty"]["generated_tokens"] == 18
    assert drawn_tokens(model) == 0
    assert math.isnan(rescored_difference(model, ids, rows))


def test_what_is_refused():
    with pytest.raises(ParameterError, match="kinds is empty"):
        Reasoning(kinds=())
    with pytest.raises(ParameterError, match="samples"):
        SampleChoice(samples=1)
    for task in (Reasoning(), SampleChoice()):
        with pytest.raises(SubjectError, match="needs a language model"):
            task.check(torch.nn.Linear(1, 1))
