"""Answers to many prompts at once are those to each alone, ended where the model ends them."""

from __future__ import annotations

import pytest
import torch

from gratis.contract.errors import SubjectError
from gratis.subjects.chat_answers import answers, chat
from tests import tiny_language as tiny


class Tokenizer:
    """A token for every letter; its template puts a token before the prompt."""

    chat_template = "<{}"
    pad_token_id = 0

    def __init__(self, end):
        self.eos_token_id = end

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert add_generation_prompt
        assert not tokenize
        return "<" + messages[0]["content"]

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [2 + ord(letter) % 90 for letter in text]}

    def batch_decode(self, rows, skip_special_tokens):
        return [" ".join(str(token) for token in row if token not in (0, self.eos_token_id)) for row in rows.tolist()]


PROMPTS = ["a", "how are you", "bcd", "what is the capital of Northia?"]


def alone(model, tokenizer, prompt, longest):
    ids = tokenizer(chat(tokenizer, prompt), add_special_tokens=False)["input_ids"]
    said = []
    for _ in range(longest):
        with torch.no_grad():
            said.append(int(model(torch.tensor([ids + said])).logits[0, -1].argmax()))
        if said[-1] == tokenizer.eos_token_id:
            break
    return said


def test_rows_are_answered_as_they_are_alone_and_ends_are_seen():
    model = tiny.tiny_language_model()
    free = [alone(model, Tokenizer(-1), prompt, 6) for prompt in PROMPTS]
    tokenizer = Tokenizer(free[1][3])  # so that at least one ends early
    expected = [alone(model, tokenizer, prompt, 6) for prompt in PROMPTS]
    found = answers(model, tokenizer, PROMPTS, 6, batch=3)
    end = tokenizer.eos_token_id
    assert found.texts == [" ".join(str(token) for token in said if token not in (0, end)) for said in expected]
    assert found.ended == [said[-1] == end for said in expected]
    assert found.ended[1]
    assert not all(found.ended)


def test_without_prompts_or_a_template():
    assert answers(tiny.tiny_language_model(), Tokenizer(1), [], 4).texts == []
    tokenizer = Tokenizer(1)
    tokenizer.chat_template = None
    with pytest.raises(SubjectError, match="no chat template"):
        chat(tokenizer, "a")
