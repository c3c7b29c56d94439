"""ZeroTuning: its fused form against the definition after the softmax, on rows, on models, in batches and while decoding."""

from __future__ import annotations

import math

import pytest
import torch

import gratis
from gratis.contract.attach import Scope
from gratis.contract.errors import InputError, ParameterError, SubjectError
from gratis.methods.attention.zero_tuning import FirstToken, extended, log_scale, tune
from gratis.subjects.attention_door import install_attention
from tests import tiny_language as tiny
from tests.architectures.building import build


def rescaled(a, scale):
    """The definition: column 0 of probability rows multiplied, rows renormalised."""
    a = a.clone()
    a[..., 0] *= scale
    return a / a.sum(-1, keepdim=True)


def after_softmax(scales, layers=None):
    """The released form as an attention function: eager, float64, one scale per query head."""

    def attend(inner, module, query, key, value, mask, scaling=None, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1).double(), value.repeat_interleave(groups, 1).double()
        scores = query.double() @ key.transpose(2, 3) * scaling
        length, seen = scores.shape[-2:]
        scores = scores.masked_fill(torch.ones(length, seen).triu(seen - length + 1).bool(), -torch.inf)
        a = scores.softmax(-1)
        if layers is None or module.layer_idx in layers:
            a = torch.stack([rescaled(a[:, head], scale) for head, scale in enumerate(scales)], 1)
        return (a @ value).to(query.dtype).transpose(1, 2), None

    return attend


def logits_of(model, ids, method=None):
    with torch.no_grad():
        if method is None:
            return model(ids).logits
        with gratis.attach(model, method):
            return model(ids).logits


def reference(model, ids, scales, layers=None):
    scope = Scope()
    install_attention(model, "reference", after_softmax(scales, layers), scope)
    with torch.no_grad():
        logits = model(ids).logits
    scope.close()
    return logits


def random_attention(seed=0, batch=2, heads=6, key_heads=2, length=9, dim=16):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, length, dim, generator=generator)
    key, value = (torch.randn(batch, key_heads, length, dim, generator=generator) for _ in range(2))
    return query, key, value


def test_all_forms_agree():
    query, key, value = random_attention()
    scaling, scales = 0.2, torch.tensor([0.1, 0.5, 1.0, 2.0, 4.0, 10.0])
    grown_key, grown_value = key.repeat_interleave(3, 1), value.repeat_interleave(3, 1)
    scores = (query @ grown_key.transpose(2, 3) * scaling).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    a = scores.softmax(-1)
    definition = torch.stack([rescaled(a[:, h], s) for h, s in enumerate(scales)], 1) @ grown_value
    bias = torch.zeros(1, 6, 1, 9)
    bias[..., 0] = scales.log()[:, None]
    torch.testing.assert_close((scores + bias).softmax(-1) @ grown_value, definition, atol=1e-5, rtol=1e-5)
    w = (scales[:, None] - 1) * a[..., 0]
    w = (w / (1 + w))[..., None]
    plain = a @ grown_value
    torch.testing.assert_close(plain + w * (grown_value[:, :, :1] - plain), definition, atol=1e-5, rtol=1e-5)
    longer = extended(query, key, value, scales.log(), None, scaling)
    fused = torch.nn.functional.scaled_dot_product_attention(*longer, is_causal=True, scale=scaling, enable_gqa=True)
    torch.testing.assert_close(fused[..., :16], definition, atol=1e-5, rtol=1e-5)
    assert {tensor.shape[-1] for tensor in longer} == {24}


def test_a_row_by_hand_and_what_stays_in_proportion():
    a = torch.tensor([0.6, 0.3, 0.1]).double()
    torch.testing.assert_close(rescaled(a, 2.0), torch.tensor([1.2, 0.3, 0.1]).double() / 1.6)
    previous = -1.0
    for scale in (0.1, 0.5, 1.0, 3.0):
        row = rescaled(a, scale)
        assert row[1] / row[2] == pytest.approx(3.0)
        assert row[0] > previous
        previous = float(row[0])


@pytest.mark.parametrize("scale", [0.3, 4.0])
def test_the_model_computes_the_definition(scale):
    model, ids = tiny.tiny_language_model(), tiny.prompt(2)
    expected = reference(model, ids, [scale] * 4)
    torch.testing.assert_close(logits_of(model, ids, gratis.ZeroTuning(scale=scale)), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(expected, logits_of(model, ids), atol=1e-2)


def test_heads_are_query_heads_and_layers_are_chosen():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    for heads, scales in (((1,), [1, 3, 1, 1]), ((2, 3), [1, 1, 3, 3])):
        got = logits_of(model, ids, gratis.ZeroTuning(scale=3.0, heads=heads))
        torch.testing.assert_close(got, reference(model, ids, scales), atol=1e-4, rtol=1e-4)
    got = logits_of(model, ids, gratis.ZeroTuning(scale=3.0, layers=(0, 2)))
    torch.testing.assert_close(got, reference(model, ids, [3] * 4, layers=(0, 2)), atol=1e-4, rtol=1e-4)


def test_a_scale_of_zero_hides_the_first_token_from_all_rows_but_its_own():
    model, ids = tiny.tiny_language_model(), tiny.prompt()

    def hidden(inner, module, query, key, value, mask, **kwargs):
        length = query.shape[2]
        seen = torch.ones(length, length).tril().bool()
        seen[1:, 0] = False
        return inner(module, query, key, value, seen[None, None], **kwargs)

    scope = Scope()
    install_attention(model, "hidden", hidden, scope)
    expected = logits_of(model, ids)
    scope.close()
    torch.testing.assert_close(logits_of(model, ids, gratis.ZeroTuning(scale=0.0)), expected, atol=1e-4, rtol=1e-4)


def test_the_first_row_is_unaffected():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    changed, plain = logits_of(model, ids, gratis.ZeroTuning(scale=5.0)), logits_of(model, ids)
    torch.testing.assert_close(changed[:, 0], plain[:, 0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_left_padded_rows_are_what_they_are_alone():
    model, ids = tiny.tiny_language_model(), tiny.prompt(2)
    short = ids[1:, -25:]
    padded = torch.cat([ids[:1], torch.nn.functional.pad(short, (15, 0))])
    mask = torch.ones_like(padded)
    mask[1, :15] = 0
    with gratis.attach(model, gratis.ZeroTuning(scale=4.0)):
        together = model(padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0)).logits
        alone = model(short).logits
    torch.testing.assert_close(together[1, 15:], alone[0], atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_decoding_with_a_cache_is_reading_at_once():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    with gratis.attach(model, gratis.ZeroTuning(scale=4.0, heads=(0, 3))):
        whole = model(ids).logits
        cache = model(ids[:, :20], use_cache=True).past_key_values
        steps = []
        for at in range(20, tiny.PROMPT):
            out = model(ids[:, at : at + 1], past_key_values=cache, use_cache=True)
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole[:, 20:], atol=1e-4, rtol=1e-3)
    plain = tiny.tiny_language_model()
    untouched = plain(ids, use_cache=True).past_key_values.layers[0].keys
    torch.testing.assert_close(cache.layers[0].keys, untouched)


def test_key_mode_multiplies_the_logit_per_key_head():
    model, ids = tiny.tiny_language_model(), tiny.prompt()

    def multiplied(inner, module, query, key, value, mask, **kwargs):
        key = key.clone()
        key[:, :, 0] *= 1.7
        return inner(module, query, key, value, mask, **kwargs)

    scope = Scope()
    install_attention(model, "multiplied", multiplied, scope)
    expected = logits_of(model, ids)
    scope.close()
    torch.testing.assert_close(logits_of(model, ids, gratis.ZeroTuning(scale=1.7, mode="key")), expected)


def test_eager_attention_and_half_precision():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    expected = logits_of(model, ids, gratis.ZeroTuning(scale=3.0))
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits_of(model, ids, gratis.ZeroTuning(scale=3.0)), expected, atol=1e-4, rtol=1e-3)
    half = tiny.tiny_language_model(dtype=torch.float16)
    for scale in (0.0, 1e-3, 1000.0):
        assert logits_of(half, ids, gratis.ZeroTuning(scale=scale)).isfinite().all()


def test_the_first_token_is_found_in_every_kind_of_mask():
    find = FirstToken()
    assert find.columns(None, 3) is None
    seen = torch.ones(2, 1, 4, 6).bool()
    assert find.columns(seen, 2) is None
    seen = seen.clone()
    seen[1, :, :, :2] = False
    assert find.columns(seen, 2).tolist() == [0, 2]
    floats = torch.zeros(2, 1, 4, 6).masked_fill(~seen, torch.finfo(torch.float32).min)
    assert find.columns(floats, 2).tolist() == [0, 2]


def test_log_scale():
    assert log_scale(1.0) == 0
    assert log_scale(math.e) == pytest.approx(1.0)
    assert log_scale(0.0) == -60.0


def test_it_stacks_with_a_bounded_cache():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    with gratis.attach(model, gratis.LaCache(budget=24, sinks=4, span=1), gratis.ZeroTuning(scale=3.0)) as handle:
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
        assert handle.report()["lacache"]["compactions"] > 0
        assert handle.report()["zero-tuning"]["layers_changed"] == 4
    assert out.shape[1] == tiny.PROMPT + 10


def test_refusals():
    model = tiny.tiny_language_model()
    with pytest.raises(ParameterError, match="scale"):
        gratis.ZeroTuning(scale=-1)
    with pytest.raises(ParameterError, match="scale"):
        gratis.ZeroTuning(scale=math.inf)
    for bad in ({"heads": (4,)}, {"layers": (9,)}, {"heads": ()}):
        with pytest.raises((SubjectError, ParameterError), match="heads|layers"):
            gratis.attach(model, gratis.ZeroTuning(**bad))
    with pytest.raises(SubjectError, match="learned sinks"):
        gratis.attach(build("gpt_oss"), gratis.ZeroTuning())
    with pytest.raises(SubjectError, match="local"):
        gratis.attach(build("gemma3_text"), gratis.ZeroTuning())
    with gratis.attach(build("gemma2"), gratis.ZeroTuning()) as handle:
        assert handle.report()["zero-tuning"] == {"layers_changed": 1, "local_layers_skipped": 1}


def prompts(count=24):
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(2, tiny.VOCABULARY, (n,), generator=generator) for n in range(6, 6 + count)]


def test_tuning_without_labels_takes_the_scale_of_least_entropy():
    model, texts = tiny.tiny_language_model(), prompts()

    def mean_entropy(method):
        total = 0.0
        for text in texts:
            p = logits_of(model, text[None], method)[0, -1].double().softmax(-1)
            total += float(-(p * p.log()).sum())
        return total / len(texts)

    scales = (0.2, 1.0, 5.0)
    found = tune(model, texts, scales=scales, level=1, batch=7)
    expected = {s: mean_entropy(None if s == 1 else gratis.ZeroTuning(scale=s)) for s in scales}
    assert found.curve == pytest.approx(expected, abs=1e-4)
    assert found.method.scale == min(expected, key=expected.get)
    assert found.baseline == found.curve[1.0]


def test_profiling_changes_one_head_index_in_all_layers():
    model, texts = tiny.tiny_language_model(), prompts()
    answers, labels = [5, 9], [n % 2 for n in range(len(texts))]

    def accuracy(method):
        right = 0
        for text, label in zip(texts, labels, strict=True):
            row = logits_of(model, text[None], method)[0, -1]
            right += int(row[answers].argmax()) == label
        return right / len(texts)

    found = tune(model, texts, labels=labels, answers=answers, scales=(0.5, 1.0, 2.0), probes=(8.0, 0.1), fraction=1.0)
    for probe in (8.0, 0.1):
        expected = [accuracy(gratis.ZeroTuning(scale=probe, heads=(head,))) for head in range(4)]
        assert found.profile[probe] == pytest.approx(expected)
    groups = []
    for values in found.profile.values():
        helped = [head for head, value in enumerate(values) if value > found.baseline]
        groups.append((len(helped), sum(values[head] - found.baseline for head in helped), helped))
    dominant = max(groups)[2]
    assert found.method.heads == (tuple(dominant) if dominant else (0, 1, 2, 3))
    assert found.curve[found.method.scale] == max(found.curve.values())


def test_ties_go_to_the_scale_closest_to_one():
    model, texts = tiny.tiny_language_model(), prompts(4)
    found = tune(model, texts, labels=[0] * 4, answers=[5], scales=(0.5, 0.9, 4.0), level=1)
    assert found.method.scale == 0.9


def test_what_cannot_be_tuned():
    model = tiny.tiny_language_model()
    with pytest.raises(InputError, match="at least one prompt"):
        tune(model, [])
    with pytest.raises(InputError, match="one label per prompt"):
        tune(model, prompts(2), labels=[0], answers=[1, 2])
    with pytest.warns(UserWarning, match="20 or more"):
        tune(model, prompts(2), level=1, scales=(1.0,))
