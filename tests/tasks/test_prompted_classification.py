"""Classification by prompt: what is set apart, the prompts, and the metrics of a model whose answers are known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gratis.contract.errors import ParameterError, SubjectError
from gratis.subjects.opening import set_tokenizer
from gratis.subjects.prompted_answers import word_tokens
from gratis.tasks.prompted_classification import (
    CLASSES,
    PromptedClassification,
    answer_tokens,
    examples,
    prompts_of,
)
from tests import tiny_language as tiny


class Letters:
    """A tokenizer of letters, with a chat template that marks turns."""

    chat_template = "yes"
    pad_token_id = eos_token_id = 0

    def __call__(self, text, add_special_tokens=True):
        return SimpleNamespace(input_ids=[2 + ord(letter) % 90 for letter in text])

    def apply_chat_template(self, turns, tokenize, add_generation_prompt):
        return f"<{turns[0]['content']}>"


@pytest.mark.parametrize("data", ["reviews", "questions"])
def test_what_is_set_apart_is_never_tested_on(data):
    apart = {text for seed in range(3) for text, _ in examples(data, 100, seed, calibration=True)}
    tested = {text for seed in range(5) for text, _ in examples(data, 120, seed)}
    assert len(apart) == 100
    assert not apart & tested
    chosen = examples(data, 120, 0)
    assert chosen == examples(data, 120, 0) != examples(data, 120, 1)
    counts = [[label for _, label in chosen].count(place) for place in range(len(CLASSES[data]))]
    assert max(counts) == min(counts)


def test_questions_ask_for_what_their_class_says():
    begins = {"person": ("Who", "Which person", "What is the name"), "place": ("Where", "In which city", "What country"),
              "number": ("How",), "date": ("When", "In what year", "On which day")}  # fmt: skip
    for text, label in examples("questions", 200, 0):
        assert text.startswith(begins[CLASSES["questions"][label]])


def test_forms_of_the_prompt():
    model = tiny.tiny_language_model()
    set_tokenizer(model, Letters())
    asked = "What does the question ask for: person, place, number or date? Answer with one word.\nQuestion: Who?"
    expected = {"plain": f"{asked}\nAnswer:", "chat": f"<{asked}\nAnswer:>", "begun": f"<{asked}>Answer:"}
    for form, text in expected.items():
        (row,) = prompts_of(model, "questions", ["Who?"], form)
        assert row.tolist() == Letters()(text).input_ids
    model = tiny.tiny_language_model()
    set_tokenizer(model, SimpleNamespace(chat_template=None))
    with pytest.raises(SubjectError, match="no chat template"):
        prompts_of(model, "questions", ["Who?"], "begun")


def test_tokens_that_begin_several_words_are_left_out():
    model = tiny.tiny_language_model()
    set_tokenizer(model, Letters())
    first = [[Letters()(one).input_ids[0] for one in (name, name.capitalize())] for name in CLASSES["reviews"]]
    assert answer_tokens(model, "reviews") == [sorted(tokens) for tokens in first]
    with pytest.raises(SubjectError, match="begin with the same token"):
        word_tokens(model, ["person", "place"])


@torch.no_grad()
def test_metrics_of_a_model_whose_answers_are_known(monkeypatch):
    """Answers are read off the model itself: it is right wherever its likeliest class is called the right one."""
    model = tiny.tiny_language_model()
    set_tokenizer(model, Letters())
    classes = [list(range(2, 40)), list(range(40, 97))]
    monkeypatch.setattr("gratis.tasks.prompted_classification.answer_tokens", lambda model, data: classes)
    task = PromptedClassification(size=12, form="plain")
    chosen = examples("reviews", 12, 4)
    right = []
    for row, (_, label) in zip(prompts_of(model, "reviews", [t for t, _ in chosen], "plain"), chosen, strict=True):
        p = model(row[None]).logits[0, -1].softmax(-1)
        right.append(float(int(p[classes[1]].sum() > p[classes[0]].sum()) == label))
    measured = task.measure(model, seed=4)
    assert measured.items["accuracy"] == right
    assert measured.metrics["accuracy"] == pytest.approx(sum(right) / 12)
    assert measured.calls == 12


def test_more_texts_than_there_are():
    with pytest.raises(ParameterError, match="lower size"):
        examples("questions", 4000, 0)
    with pytest.raises(SubjectError, match="needs a language model"):
        PromptedClassification().check(object())
