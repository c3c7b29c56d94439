"""Block top-k against masked dense attention, one decoded token at a time."""

from __future__ import annotations

import pytest
import torch
from transformers import StaticCache

import gratis
from gratis.contract.attach import Scope
from gratis.contract.errors import ParameterError, SubjectError
from gratis.subjects.attention_door import install_attention
from tests import tiny_language as tiny
from tests.architectures.building import build

SETTINGS = {"blocks": 2, "block": 4, "window": 6, "sinks": 3}


def masked(method, dense=(0,), seen=None):
    """The definition: dense logits; per key head the blocks with the largest mean logit; -inf elsewhere; softmax."""

    def attend(inner, module, query, key, value, mask, scaling=None, **kwargs):
        batch, heads, length, _ = query.shape
        n, groups = key.shape[2], heads // key.shape[1]
        grown_key, grown_value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        logits = query.double() @ grown_key.double().transpose(2, 3) * scaling
        if length > 1 or module.layer_idx in dense or n <= method.active_from:
            logits = logits.masked_fill(torch.ones(length, n).triu(n - length + 1).bool(), -torch.inf)
        else:
            keep = torch.zeros(batch, key.shape[1], n).bool()
            count = (n - method.window - method.sinks) // method.block
            end = method.sinks + count * method.block
            keep[..., : method.sinks] = True
            keep[..., end:] = True
            for row in range(batch):
                for head in range(key.shape[1]):
                    mean = logits[row, head * groups : (head + 1) * groups, 0].mean(0)
                    if method.choose == "token":
                        best = mean[method.sinks : end].topk(method.blocks * method.block).indices
                        keep[row, head, method.sinks + best] = True
                    elif method.choose == "block":
                        blocks = [mean[b : b + method.block].mean() for b in range(method.sinks, end, method.block)]
                        for block in torch.stack(blocks).topk(method.blocks).indices.tolist():
                            start = method.sinks + block * method.block
                            keep[row, head, start : start + method.block] = True
            if seen is not None:
                seen.append(keep)
            logits = logits.masked_fill(~keep.repeat_interleave(groups, 1)[:, :, None], -torch.inf)
        return (logits.softmax(-1) @ grown_value.double()).to(query.dtype).transpose(1, 2), None

    return attend


@torch.no_grad()
def decoded(model, ids, prompt=12):
    """Logits of every token after the prompt, read one at a time."""
    cache = model(ids[:, :prompt], use_cache=True).past_key_values
    steps = []
    for at in range(prompt, ids.shape[1]):
        steps.append(model(ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits)
    return torch.cat(steps, 1)


def reference(model, ids, method, **options):
    scope = Scope()
    install_attention(model, "reference", masked(method, **options), scope)
    logits = decoded(model, ids)
    scope.close()
    return logits


def text(rows=1, length=60, seed=3):
    return torch.randint(2, tiny.VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("choose", ["block", "token", "local"])
@pytest.mark.parametrize("rows", [1, 2])
def test_it_is_dense_attention_masked_to_the_best_blocks(choose, rows):
    model, ids = tiny.tiny_language_model(), text(rows)
    method = gratis.BlockTopK(**SETTINGS, choose=choose)
    with gratis.attach(model, method) as handle:
        got = decoded(model, ids)
        report = handle.report()["block-top-k"]
    torch.testing.assert_close(got, reference(model, ids, method), atol=1e-4, rtol=1e-3)
    assert not torch.allclose(got, decoded(model, ids), atol=1e-2)
    assert report["sparse_layers"] == 3
    assert report["share_attended"] < 0.7


def test_one_choice_per_key_head_and_sinks_and_latest_always():
    model, ids, seen = tiny.tiny_language_model(), text(), []
    method = gratis.BlockTopK(**SETTINGS)
    reference(model, ids, method, seen=seen)
    assert any(not torch.equal(keep[0, 0], keep[0, 1]) for keep in seen)
    assert all(keep[..., :3].all() and keep[..., -6:].all() for keep in seen)


def test_nothing_changes_below_the_length_where_something_is_left_out():
    model, ids = tiny.tiny_language_model(), text(length=20)
    method = gratis.BlockTopK(**SETTINGS)
    assert method.active_from == 20
    expected = decoded(model, ids)
    with gratis.attach(model, method):
        assert torch.equal(decoded(model, ids), expected)
    longer = text(length=21)
    expected = decoded(model, longer)
    with gratis.attach(model, method):
        got = decoded(model, longer)
    assert torch.equal(got[:, :-1], expected[:, :-1])
    assert not torch.equal(got[:, -1], expected[:, -1])


def test_enough_blocks_are_dense_attention():
    model, ids = tiny.tiny_language_model(), text()
    expected = decoded(model, ids)
    with gratis.attach(model, gratis.BlockTopK(blocks=100, block=4, window=6)):
        assert torch.equal(decoded(model, ids), expected)


def test_layers_can_stay_dense():
    model, ids = tiny.tiny_language_model(), text()
    for dense in ((), (0, 2)):
        method = gratis.BlockTopK(**SETTINGS, dense_layers=dense)
        with gratis.attach(model, method):
            got = decoded(model, ids)
        torch.testing.assert_close(got, reference(model, ids, method, dense=dense), atol=1e-4, rtol=1e-3)


def test_prompts_are_read_densely():
    model, ids = tiny.tiny_language_model(), text()
    with torch.no_grad():
        expected = model(ids).logits
        with gratis.attach(model, gratis.BlockTopK(**SETTINGS)):
            assert torch.equal(model(ids).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("dense", [(0,), ()])
def test_texts_that_take_turns_do_not_share_mean_keys(dense):
    """The first layer's keys are of single tokens: where both texts go on alike, they do not tell them apart."""
    model, texts = tiny.tiny_language_model(), [text(seed=1), text(seed=2)]
    texts[1][:, 40:] = texts[0][:, 40:]
    method = gratis.BlockTopK(**SETTINGS, dense_layers=dense)
    expected = [reference(model, ids, method, dense=dense) for ids in texts]
    with gratis.attach(model, method):
        caches = [model(ids[:, :12], use_cache=True).past_key_values for ids in texts]
        steps = [[], []]
        for at in range(12, 60):
            for n, ids in enumerate(texts):
                steps[n].append(model(ids[:, at : at + 1], past_key_values=caches[n], use_cache=True).logits)
    for n in range(2):
        torch.testing.assert_close(torch.cat(steps[n], 1), expected[n], atol=1e-4, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("choose", ["block", "token", "local"])
def test_slots_of_a_preallocated_cache_that_are_not_filled_are_no_text(choose):
    model, ids = tiny.tiny_language_model(), text()
    method = gratis.BlockTopK(**SETTINGS, choose=choose)
    expected = reference(model, ids, method)
    cache, steps = StaticCache(config=model.config, max_cache_len=96), []
    with gratis.attach(model, method) as handle:
        model(ids[:, :12], past_key_values=cache, use_cache=True)
        for at in range(12, 60):
            steps.append(model(ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits)
        report = handle.report()["block-top-k"]
    torch.testing.assert_close(torch.cat(steps, 1), expected, atol=1e-4, rtol=1e-3)
    assert report["sparse_steps"] == 3 * 40


def test_beams_are_followed():
    model, ids = tiny.tiny_language_model(), text(length=40)
    method = gratis.BlockTopK(**SETTINGS)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "num_beams": 3, "do_sample": False}
    scope = Scope()
    install_attention(model, "reference", masked(method), scope)
    expected = model.generate(input_ids=ids, **options)
    scope.close()
    with gratis.attach(model, method):
        assert torch.equal(model.generate(input_ids=ids, **options), expected)


@pytest.mark.parametrize("choose", ["overlapping", "random"])
def test_the_comparisons_keep_to_the_budget_and_their_seed(choose):
    model, ids = tiny.tiny_language_model(), text()
    results = []
    for _ in range(2):
        with gratis.attach(model, gratis.BlockTopK(**SETTINGS, choose=choose)) as handle:
            results.append(decoded(model, ids))
            share = handle.report()["block-top-k"]["share_attended"]
    assert torch.equal(*results)
    with gratis.attach(model, gratis.BlockTopK(**SETTINGS)) as handle:
        decoded(model, ids)
        assert handle.report()["block-top-k"]["share_attended"] == share
    if choose == "random":
        with gratis.attach(model, gratis.BlockTopK(**SETTINGS, choose=choose, seed=1)):
            assert not torch.equal(decoded(model, ids), results[0])


@torch.no_grad()
def test_a_padded_row_is_the_text_alone_where_its_padding_is_whole_blocks():
    """The block with its first tokens is always chosen, in the place of the sinks of the text alone: one block more."""
    model, ids, pad = tiny.tiny_language_model(), text(length=50), 8
    padded = torch.nn.functional.pad(ids, (pad, 0), value=5)
    mask = (torch.arange(58) >= pad).long()[None]
    settings = {"block": 4, "window": 6, "sinks": 4}
    with gratis.attach(model, gratis.BlockTopK(**settings, blocks=2)):
        alone = decoded(model, ids, prompt=40)
    with gratis.attach(model, gratis.BlockTopK(**settings, blocks=3)):
        cache = model(
            padded[:, :48], attention_mask=mask[:, :48], position_ids=(mask.cumsum(1) - 1).clamp_min(0)[:, :48],
            use_cache=True,
        ).past_key_values  # fmt: skip
        steps = [
            model(
                padded[:, at : at + 1], attention_mask=mask[:, : at + 1], position_ids=torch.tensor([[at - pad]]),
                past_key_values=cache, use_cache=True,
            ).logits
            for at in range(48, 58)
        ]  # fmt: skip
    torch.testing.assert_close(torch.cat(steps, 1), alone, atol=1e-4, rtol=1e-3)


def test_padded_rows_see_only_themselves():
    model, ids = tiny.tiny_language_model(), text(length=50)
    padded = torch.nn.functional.pad(ids, (10, 0))
    mask = (torch.arange(60) >= 10).long()[None]
    written = []
    for filler in (0, 7):
        padded[:, :10] = filler
        with gratis.attach(model, gratis.BlockTopK(**SETTINGS)):
            out = model.generate(input_ids=padded, attention_mask=mask, max_new_tokens=15, do_sample=False)
        written.append(out[:, 60:])
    assert torch.equal(*written)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_it_stacks_with_zero_tuning(implementation):
    model, ids = tiny.tiny_language_model(), text()
    model.set_attn_implementation(implementation)
    method = gratis.BlockTopK(**SETTINGS)
    with gratis.attach(model, method, gratis.ZeroTuning(scale=3.0)):
        one = decoded(model, ids)
    with gratis.attach(model, gratis.ZeroTuning(scale=3.0), method):
        other = decoded(model, ids)
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


@pytest.mark.evidence
@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_compiled_model_computes_the_same(backend):
    model, ids = tiny.tiny_language_model(), text(length=32)
    torch.compiler.reset()
    with gratis.attach(model, gratis.BlockTopK(**SETTINGS)) as handle:
        expected = decoded(model, ids, prompt=24)
        got = decoded(torch.compile(model, backend=backend), ids, prompt=24)
        assert handle.report()["block-top-k"]["sparse_steps"] == 2 * 3 * 8
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)


def test_a_session_goes_on_with_the_cache_of_the_call_before():
    model, ids = tiny.tiny_language_model(), text(length=40)
    options = {"do_sample": False, "return_dict_in_generate": True}
    with gratis.attach(model, gratis.BlockTopK(**SETTINGS)):
        first = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, **options)
        again = model.generate(
            first.sequences, attention_mask=torch.ones_like(first.sequences), max_new_tokens=6,
            past_key_values=first.past_key_values, **options,
        )  # fmt: skip
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=15, **options)
    assert torch.equal(again.sequences, whole.sequences)
    assert again.past_key_values is first.past_key_values


def test_attention_that_cannot_leave_keys_out_is_refused():
    model = tiny.tiny_language_model()
    model.set_attn_implementation("flex_attention")
    with pytest.raises(SubjectError, match="load the model with attention 'sdpa' or 'eager'"):
        gratis.attach(model, gratis.BlockTopK(**SETTINGS))


def test_refusals():
    with pytest.raises(ParameterError, match="blocks"):
        gratis.BlockTopK(blocks=0)
    model = tiny.tiny_language_model()
    with pytest.raises(SubjectError, match="dense_layers"):
        gratis.attach(model, gratis.BlockTopK(dense_layers=(9,)))
    with pytest.raises(SubjectError, match="left to act on"):
        gratis.attach(model, gratis.BlockTopK(dense_layers=(0, 1, 2, 3)))
    with pytest.raises(SubjectError, match="left to act on"):
        gratis.attach(build("gemma3_text"), gratis.BlockTopK())
    with pytest.raises(SubjectError, match="attention interface"):
        gratis.attach(build("bloom"), gratis.BlockTopK())
