"""Branches of one text: which models decode them as one row, and that none sees another."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from gratis.subjects import branching
from gratis.subjects.branching import Text, heeds_branches
from tests import tiny_language as tiny
from tests.architectures.building import build


def begun(model, ids):
    config = GenerationConfig()
    config.prefill_chunk_size = None
    text = Text(model, ids, config, {"past_key_values": DynamicCache(config=model.config), "use_cache": True})
    text.read()
    return text


def grow(text, length, kept, together=None):
    """Three branches that follow the likeliest token to their own lengths; the logits that each saw."""
    start, seen = text.ids.shape[1], {}

    def draw(branches, ids, logits):
        for branch, row, own in zip(branches, ids, logits, strict=True):
            seen[tuple(row.tolist())] = own
            assert branch == int(row[start]) - 10
        return logits.argmax(-1)

    def done(ids):
        return torch.tensor([ids.shape[1] - start >= length[int(row[start]) - 10] for row in ids])

    chosen, tokens = text.branch(torch.tensor([10, 11, 12]), draw, done, lambda branch: -abs(branch - kept), together)
    assert chosen == kept
    return tokens, seen


@pytest.mark.parametrize("kept", [0, 1, 2])
@pytest.mark.parametrize("shared", [True, False])
def test_every_branch_sees_the_prefix_and_itself(kept, shared, monkeypatch):
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    monkeypatch.setattr(branching, "heeds_branches", lambda model: shared)
    text = begun(model, ids)
    passes = text.passes
    tokens, seen = grow(text, [2, 5, 4], kept)
    assert [len(branch) for branch in tokens] == [2, 5, 4]
    assert text.passes - passes == 4
    assert text.read_tokens == tiny.PROMPT + (1 + 4 + 3 if shared else 3 * 4)
    for row, logits in seen.items():
        with torch.no_grad():
            expected = model(torch.tensor([row])).logits[0, -1]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-3)
    assert torch.equal(text.ids[0, tiny.PROMPT :], tokens[kept])
    after = text.read()
    with torch.no_grad():
        torch.testing.assert_close(after, model(text.ids).logits[:, -1], atol=1e-4, rtol=1e-3)
    assert text.cache.get_seq_length() == text.ids.shape[1]


def test_after_sharing_the_cache_lacks_only_the_last_token():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    text = begun(model, ids)
    grow(text, [3, 6, 2], kept=1)
    assert text.cache.get_seq_length() == tiny.PROMPT + 5
    text.read()
    grow(text, [3, 6, 2], kept=0)
    assert text.cache.get_seq_length() == tiny.PROMPT + 6 + 2


def test_branches_that_end_at_once_cost_nothing():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    text = begun(model, ids)
    tokens, seen = grow(text, [1, 1, 1], kept=2)
    assert [branch.tolist() for branch in tokens] == [[10], [11], [12]]
    assert not seen
    assert text.passes == 1
    assert text.cache.get_seq_length() == tiny.PROMPT


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "qwen3", "gpt_neox", "phi"])
def test_models_that_decode_branches_as_one_row(name):
    assert heeds_branches(build(name))


@pytest.mark.parametrize("name", ["bloom", "gpt_neo", "mistral"])
def test_models_with_a_mask_or_a_window_of_their_own_do_not(name):
    assert not heeds_branches(build(name))


def test_what_the_trial_finds_is_the_mask():
    """A model that ignores the mask lets branches see each other: it is found out."""
    model = tiny.tiny_language_model()
    forward = model.forward
    model.forward = lambda *args, attention_mask=None, **kwargs: forward(*args, **kwargs)
    model.config.name_or_path = "deaf"
    assert not heeds_branches(model)


def test_the_prefix_is_neither_repeated_for_query_heads_nor_copied_as_branches_grow(monkeypatch):
    import transformers.integrations.sdpa_attention as sdpa

    model, ids = tiny.tiny_language_model(), tiny.prompt()
    assert model.config.num_attention_heads > model.config.num_key_value_heads
    assert model.config._attn_implementation == "sdpa"
    text = begun(model, ids)
    repeated, places = [], set()
    monkeypatch.setattr(sdpa, "repeat_kv", lambda states, times: repeated.append(times))

    def draw(branches, ids, logits):
        places.add(text.cache.layers[0].keys.data_ptr())
        return logits.argmax(-1)

    def done(ids):
        return torch.full((len(ids),), ids.shape[1] >= tiny.PROMPT + 6)

    text.branch(torch.tensor([10, 11, 12]), draw, done, float)
    assert repeated == []
    assert len(places) == 1
    assert model.config._attn_implementation == "sdpa"
    text.catch_up()
    assert {type(layer).__name__ for layer in text.cache.layers} == {"DynamicLayer"}
