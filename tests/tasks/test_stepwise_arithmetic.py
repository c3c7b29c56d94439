"""Sums step by step: what counts as right, and the share of a second model."""

from __future__ import annotations

import pytest
import torch

import gratis
from gratis.contract.errors import SubjectError
from gratis.subjects.opening import set_tokenizer
from gratis.zoo.arithmetic import CHARACTERS, PIECES, problems
from gratis.zoo.text import character_tokenizer
from tests import tiny_language as tiny
from tests.subjects.test_generate_door import letters

SEED = 3_000_003


class Scripted:
    """Answers every second problem rightly."""

    device, config = torch.device("cpu"), None

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.answers = {problem.prompt: problem.answer for problem in problems(4, SEED)}
        self.asked = 0

    def generate(self, input_ids, attention_mask, max_new_tokens):
        prompt = self.tokenizer.decode(input_ids[0], skip_special_tokens=True)
        wrong = self.asked % 2
        self.asked += 1
        text = f"So \\boxed{{{self.answers[prompt] + wrong}}}"
        return torch.cat([input_ids, self.tokenizer(text, return_tensors="pt")["input_ids"]], dim=1)


def test_the_boxed_answer_counts(monkeypatch):
    tokenizer = character_tokenizer(CHARACTERS, 512, pieces=PIECES)
    model = Scripted(tokenizer)
    monkeypatch.setattr("gratis.subjects.tokenizer_of", lambda subject: tokenizer)
    found = gratis.task_catalogue["stepwise-arithmetic"](size=4).measure(model, seed=0)
    assert found.items["accuracy"] == [1, 0, 1, 0]
    assert found.metrics["accuracy"] == 0.5
    assert found.metrics["target_share"] == 0


def test_the_share_of_a_second_model_is_that_of_the_report():
    tokenizer = character_tokenizer(CHARACTERS, 512, pieces=PIECES)
    models = []
    for seed in (0, 1):
        model = tiny.tiny_language_model(seed)
        model.resize_token_embeddings(len(tokenizer))
        set_tokenizer(model, tokenizer)
        models.append(model)
    small, large = models
    method = gratis.SpeculativeThinking(target=large, begin=True, begin_tokens=3)
    with gratis.attach(small, method):
        found = gratis.task_catalogue["stepwise-arithmetic"](size=2, max_new_tokens=8).measure(small, seed=0)
    assert found.items["response_tokens"] == [8, 8]
    assert found.metrics["target_share"] == pytest.approx(3 / 8)


def test_other_models_are_refused():
    model = tiny.tiny_language_model()
    set_tokenizer(model, letters())
    with pytest.raises(SubjectError, match="arithmetic-small"):
        gratis.task_catalogue["stepwise-arithmetic"]().check(model)
