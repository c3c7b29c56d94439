"""Scores of answers: padded batches and shared beginnings against every prompt read alone."""

from __future__ import annotations

import pytest
import torch

import gratis
from gratis.contract.errors import InputError
from gratis.subjects import prompted_answers
from gratis.subjects.prompted_answers import answer_scores, token_rows
from tests import tiny_language as tiny
from tests.architectures.building import build


def rows(shared: int, count: int = 9) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    begin = torch.randint(2, 50, (shared,), generator=generator)
    return [torch.cat([begin, torch.randint(2, 50, (3 + n % 4,), generator=generator)]) for n in range(count)]


@torch.no_grad()
def alone(model, texts, answers, labels):
    found = {"entropy": [], "answer_entropy": [], "accuracy": [], "parsed_accuracy": [], "valid": []}
    for text, label in zip(texts, labels, strict=True):
        p = model(text[None]).logits[0, -1].double().softmax(-1)
        classes = torch.stack([p[torch.tensor(tokens)].sum() for tokens in answers])
        shares = classes / classes.sum()
        found["entropy"].append(float(-(p * p.log()).sum()))
        found["answer_entropy"].append(float(-(shares * shares.log()).sum()))
        found["accuracy"].append(float(classes.argmax() == label))
        found["parsed_accuracy"].append(float(int(p.argmax()) in answers[label]))
        found["valid"].append(float(any(int(p.argmax()) in tokens for tokens in answers)))
    return found


@pytest.mark.parametrize("shared", [0, 5, 20])
@pytest.mark.parametrize("method", [None, gratis.ZeroTuning(scale=4.0)])
def test_scores_are_those_of_every_prompt_alone(shared, method, monkeypatch):
    model, texts = tiny.tiny_language_model(), rows(shared)
    # Half of all tokens name a class, so that what is written is an answer now and then.
    answers, labels = [list(range(2, 30)), list(range(30, 55))], [n % 2 for n in range(len(texts))]
    read = []
    monkeypatch.setattr(
        prompted_answers,
        "_padded",
        lambda each, device, real=prompted_answers._padded: read.append(each) or real(each, device),
    )
    handle = gratis.attach(model, method) if method else None
    expected = alone(model, texts, answers, labels)
    found = answer_scores(model, texts, answers=answers, labels=labels, batch=4)
    if handle:
        handle.detach()
    for name, values in expected.items():
        assert getattr(found, name) == pytest.approx(values, abs=1e-4), name
    assert 0 < sum(expected["valid"]) < len(texts)
    longest = max(len(row) for group in read for row in group)
    assert longest == 6 if shared == 20 else longest == shared + 6


@torch.no_grad()
def test_a_model_without_a_plain_cache_reads_whole_prompts():
    model, texts = build("gemma2"), rows(20)
    found = answer_scores(model, texts, batch=4)
    expected = [
        float(torch.distributions.Categorical(logits=model(text[None]).logits[0, -1]).entropy()) for text in texts
    ]
    assert found.entropy == pytest.approx(expected, abs=1e-4)
    assert found.means() == {"entropy": pytest.approx(sum(expected) / len(expected), abs=1e-4)}


def test_equal_prompts_and_one_prompt():
    model, text = tiny.tiny_language_model(), rows(20)[0]
    single = answer_scores(model, [text]).entropy
    assert answer_scores(model, [text] * 3).entropy == pytest.approx(single * 3, abs=1e-4)


def test_prompts_that_are_none():
    for none in ([], [torch.tensor([], dtype=torch.long)]):
        with pytest.raises(InputError, match="at least one prompt"):
            token_rows(tiny.tiny_language_model(), none)
