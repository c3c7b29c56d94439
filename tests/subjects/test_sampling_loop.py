"""Samples of one prompt, drawn at once: their law, their prompt's cache, what is watched while they grow."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

import gratis
from gratis.contract.errors import InputError
from gratis.subjects.sampling_loop import Recorder, Samples, can_repeat
from tests import tiny_language as tiny
from tests.architectures.building import build


def test_draws_follow_the_processed_distribution():
    """Pearson's statistic of 4,000 first tokens against softmax(logits / temperature) cut to the nucleus."""
    model, ids, count = tiny.tiny_language_model(), tiny.prompt(), 4000
    with torch.no_grad():
        p = (model(ids).logits[0, -1].double() / 2.0).softmax(-1)
    order = p.argsort(descending=True)
    kept = order[: int((p[order].cumsum(0) < 0.9).sum()) + 1]
    q = p[kept] / p[kept].sum()
    with gratis.attach(model, gratis.PerplexityPick(samples=count, temperature=2.0, top_p=0.9)):
        torch.manual_seed(0)
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, num_return_sequences=count
        )
    seen = torch.bincount(out[:, -1], minlength=tiny.VOCABULARY).double()
    assert seen[kept].sum() == count
    statistic = float(((seen[kept] - count * q) ** 2 / (count * q)).sum())
    freedom = len(kept) - 1
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5


def test_prompts_read_in_pieces_give_the_same_samples():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    found = []
    for pieces in (None, 7):
        with gratis.attach(model, gratis.PerplexityPick(samples=3)):
            torch.manual_seed(0)
            found.append(
                model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, prefill_chunk_size=pieces
                )
            )
    assert torch.equal(*found)


@pytest.mark.parametrize("options", [{"use_cache": False}, {"output_attentions": True}])
def test_where_the_prompt_cannot_be_shared_each_sample_reads_it(options):
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    model.set_attn_implementation("eager")
    options = {**options, "attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "num_return_sequences": 3}
    with gratis.attach(model, gratis.PerplexityPick(samples=3)) as handle:
        torch.manual_seed(0)
        alone = model.generate(input_ids=ids, **options)
        assert handle.report()["perplexity-pick"]["prompt_tokens_encoded"] == 3 * tiny.PROMPT
    with gratis.attach(model, gratis.PerplexityPick(samples=3)):
        torch.manual_seed(0)
        shared = model.generate(input_ids=ids, **{**options, "use_cache": True, "output_attentions": False})
    assert torch.equal(alone, shared)


def test_which_caches_can_be_repeated():
    model = tiny.tiny_language_model()
    assert can_repeat(DynamicCache(config=model.config))
    assert not can_repeat(StaticCache(config=model.config, max_cache_len=8))
    assert not can_repeat(None)
    assert not can_repeat(((torch.zeros(1),),))
    mamba = build("mamba")
    with torch.no_grad():
        state = mamba(torch.tensor([[5, 6, 7]]), use_cache=True)
    assert not can_repeat(getattr(state, "cache_params", None))


def test_means_are_over_each_samples_own_tokens_and_refuse_what_is_not_finite():
    sequences = torch.zeros(2, 5, dtype=torch.long)
    values = torch.tensor([[1.0, 4.0], [3.0, float("nan")], [5.0, float("inf")]])
    samples = Samples(sequences, 2, [3, 1], [False, False], values, 3, 2, 0)
    assert samples.means() == [3.0, 4.0]
    samples.lengths = [3, 2]
    with pytest.raises(InputError, match="not finite"):
        samples.means()


def test_a_recorder_passes_scores_on_unchanged():
    recorder = Recorder(lambda logits: logits.sum(-1))
    scores = torch.randn(3, 5)
    assert recorder(torch.zeros(3, 1), scores) is scores
    torch.testing.assert_close(recorder.finish(torch.zeros(3, 2)), scores.sum(-1)[None])
