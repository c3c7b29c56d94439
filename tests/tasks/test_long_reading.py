from __future__ import annotations

import pytest

import gratis
from gratis.contract.errors import SubjectError
from gratis.subjects.opening import set_tokenizer
from tests import tiny_language as tiny


class Words:
    """One token per word, by its length and first letter."""

    eos_token_id = 0

    def __call__(self, text, return_tensors=None, **options):
        import torch
        from transformers import BatchEncoding

        ids = [2 + (7 * len(w) + ord(w[0])) % 90 for w in text.split()]
        if return_tensors is None:
            return BatchEncoding({"input_ids": ids})
        ids = torch.tensor([ids])
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def decode(self, ids, **options):
        return " ".join("w" * (int(i) % 7 + 1) for i in ids)


def subject():
    model = tiny.tiny_language_model()
    set_tokenizer(model, Words())
    return model


def test_it_measures_reading_and_recall_as_their_own_tasks_do():
    task = gratis.task_catalogue["long-reading"](tokens=96, chunk=8, recall=80, depths=2, trials=1)
    seen = []
    found = task.measure(subject(), seed=0, progress=lambda done, words: seen.append(done))
    read = gratis.task_catalogue["streaming-perplexity"](tokens=96, chunk=8).measure(subject(), seed=0)
    assert found.metrics["loss"] == pytest.approx(read.metrics["loss"])
    assert found.metrics["cache_bytes"] == read.metrics["cache_bytes"]
    assert found.metrics["recall"] == 0.0
    assert found.series["recall"].x == [0.25, 0.75]
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(1.0)


def test_a_text_that_is_too_short_is_refused():
    with pytest.raises(SubjectError, match="six pieces"):
        gratis.task_catalogue["long-reading"](tokens=96, chunk=32).check(subject())
