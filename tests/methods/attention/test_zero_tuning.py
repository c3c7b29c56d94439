"""ZeroTuning: its fused form against the definition after the softmax, on rows, on models, in batches and while decoding."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch

import gratis
from gratis.contract.attach import Scope
from gratis.contract.errors import InputError, ParameterError, SubjectError
from gratis.methods.attention.zero_tuning import (
    biased,
    corrected,
    dominant,
    extended,
    head_groups,
    log_scale,
    with_scaled_key,
)
from gratis.subjects.attention_door import install_attention
from gratis.subjects.first_token import FirstToken, attention_to_first_token
from gratis.subjects.opening import set_tokenizer
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


@torch.no_grad()
def last_logits(model, texts, method=None):
    """Of every text alone, without padding."""
    with gratis.attach(model, method) if method is not None else nullcontext():
        return [model(text[None]).logits[0, -1] for text in texts]


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
    sums = scores.logsumexp(-1)
    moved = corrected(plain.transpose(1, 2), sums, query, key, value, scales.log(), None, scaling)
    torch.testing.assert_close(moved.transpose(1, 2), definition, atol=1e-5, rtol=1e-5)
    for mask in (
        None,
        torch.ones(9, 9).tril().bool()[None, None],
        scores.new_zeros(1, 1, 9, 9).masked_fill(scores[:1, :1].isinf(), -1e9),
    ):
        added = biased(mask, query, key, scales.log(), None)
        torch.testing.assert_close(
            (query @ grown_key.transpose(2, 3) * scaling + added).softmax(-1) @ grown_value,
            definition,
            atol=1e-5,
            rtol=1e-5,
        )
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


@pytest.mark.parametrize(("heads", "factors"), [(None, [1.7, 1.7]), ((1,), [1.0, 1.7])])
def test_key_mode_multiplies_the_logit_per_key_head(heads, factors):
    model, ids = tiny.tiny_language_model(), tiny.prompt()

    def multiplied(inner, module, query, key, value, mask, **kwargs):
        key = key.clone()
        for head, factor in enumerate(factors):
            key[:, head, 0] *= factor
        return inner(module, query, key, value, mask, **kwargs)

    scope = Scope()
    install_attention(model, "multiplied", multiplied, scope)
    expected = logits_of(model, ids)
    scope.close()
    torch.testing.assert_close(logits_of(model, ids, gratis.ZeroTuning(scale=1.7, mode="key", heads=heads)), expected)


def test_a_scaled_key_is_that_of_the_first_real_token():
    key = torch.ones(2, 2, 5, 3)
    scaled = with_scaled_key(key, torch.tensor([3.0, 1.0]), torch.tensor([0, 2]))
    assert [(b, j) for b in range(2) for j in range(5) if scaled[b, 0, j, 0] == 3] == [(0, 0), (1, 2)]
    assert bool((scaled[:, 1] == 1).all())
    assert bool((key == 1).all())


def test_output_correction_in_padded_rows():
    query, key, value = random_attention()
    scaling, logs = 0.2, torch.tensor([0.3, 1.0, 3.0, 8.0, 1.0, 0.5]).log()
    grown_key, grown_value = key.repeat_interleave(3, 1), value.repeat_interleave(3, 1)
    hidden = torch.ones(9, 9).triu(1).bool().expand(2, 1, 9, 9).clone()
    hidden[1, :, :, :4] = True
    scores = (query @ grown_key.transpose(2, 3) * scaling).masked_fill(hidden, -torch.inf)
    added = torch.zeros(2, 6, 1, 9)
    added[0, :, 0, 0] = added[1, :, 0, 4] = logs
    definition = ((scores + added).softmax(-1) @ grown_value).transpose(1, 2)
    plain = (scores.softmax(-1) @ grown_value).transpose(1, 2)
    moved = corrected(plain, scores.logsumexp(-1), query, key, value, logs, torch.tensor([0, 4]), scaling)
    torch.testing.assert_close(moved[0], definition[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(moved[1, 4:], definition[1, 4:], atol=1e-5, rtol=1e-5)


def test_a_model_whose_kernel_returns_its_log_sum_exp(monkeypatch):
    model, ids = tiny.tiny_language_model(), tiny.prompt(2)
    expected = logits_of(model, ids, gratis.ZeroTuning(scale=3.0, heads=(1, 2)))

    def kernel(inner, module, query, key, value, mask, scaling=None, **kwargs):
        assert query.shape[-1] == 8, "the head dimension is the model's own"
        scores = (query @ key.repeat_interleave(2, 1).transpose(2, 3) * scaling).masked_fill(
            torch.ones(query.shape[2], key.shape[2]).triu(1).bool(), -torch.inf
        )
        output = scores.softmax(-1) @ value.repeat_interleave(2, 1)
        return output.transpose(1, 2), scores.logsumexp(-1)

    scope = Scope()
    install_attention(model, "kernel", kernel, scope)
    monkeypatch.setattr("gratis.methods.attention.zero_tuning.returns_log_sum_exp", lambda model, query: True)
    torch.testing.assert_close(
        logits_of(model, ids, gratis.ZeroTuning(scale=3.0, heads=(1, 2))), expected, atol=1e-4, rtol=1e-4
    )
    scope.close()


@torch.no_grad()
def test_what_is_added_comes_after_a_soft_cap():
    model = build("gemma2")
    model.set_attn_implementation("eager")
    ids = torch.arange(2, 22)[None]
    plain = model(ids, output_attentions=True).attentions[1]
    with gratis.attach(model, gratis.ZeroTuning(scale=4.0)):
        changed = {}
        layer = model.model.layers[1].self_attn
        hook = layer.register_forward_hook(lambda module, inputs, out: changed.update(weights=out[1]))
        model(ids)
        hook.remove()
    torch.testing.assert_close(changed["weights"], rescaled(plain, 4.0), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_attention_on_the_first_token_is_reported_before_and_after():
    model, rows = tiny.tiny_language_model(), [tiny.prompt()[0], tiny.prompt(seed=4)[0, :30]]
    reported = {
        scale: attention_to_first_token(model, rows, gratis.ZeroTuning(scale=scale), skip=3) for scale in (1.0, 5.0)
    }
    model.set_attn_implementation("eager")
    weights = [model(row[None], output_attentions=True).attentions for row in rows]
    columns = [torch.cat([each[layer][0, :, 3:, 0] for each in weights], 1) for layer in range(4)]
    expected = torch.stack([column.mean(1) for column in columns]).double()
    torch.testing.assert_close(reported[1.0], expected, atol=1e-5, rtol=0)
    # The first layer reads the same in both cases, so the closed form holds row by row.
    closed = (5 * columns[0] / (1 + 4 * columns[0])).mean(1).double()
    torch.testing.assert_close(reported[5.0][0], closed, atol=1e-5, rtol=0)
    assert bool((reported[5.0] > reported[1.0]).all())


def test_what_cannot_be_reported():
    model = tiny.tiny_language_model()
    with pytest.raises(InputError, match="more than 64 tokens"):
        attention_to_first_token(model, [tiny.prompt()[0]], skip=64)
    with gratis.attach(model, gratis.ZeroTuning(scale=3.0)), pytest.raises(SubjectError, match="detach"):
        attention_to_first_token(model, [tiny.prompt()[0]])
    local = attention_to_first_token(build("gemma2"), [torch.arange(2, 22)])
    assert local.isnan().any(1).tolist() == [True, False]


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


def test_the_first_token_is_found_in_a_block_mask():
    from torch.nn.attention.flex_attention import create_block_mask

    pads = torch.tensor([0, 3])
    mask = create_block_mask(lambda b, h, q, k: (k >= pads[b]) & (k <= q + 2), 2, None, 4, 6, device="cpu")
    assert FirstToken().columns(mask, 2).tolist() == [0, 3]


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
    with pytest.raises(SubjectError, match="heads must be below 2, the number of key heads"):
        gratis.attach(model, gratis.ZeroTuning(heads=(2,), mode="key"))
    with pytest.raises(SubjectError, match="local"):
        gratis.attach(build("gemma2"), gratis.ZeroTuning(layers=(0,)))
    with gratis.attach(build("gemma2"), gratis.ZeroTuning()) as handle:
        assert handle.report()["zero-tuning"] == {"layers_changed": 1, "local_layers_skipped": 1}


def prompts(count=24):
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(2, tiny.VOCABULARY, (n,), generator=generator) for n in range(6, 6 + count)]


def test_tuning_without_labels_takes_the_scale_of_least_entropy():
    model, texts = tiny.tiny_language_model(), prompts()

    def mean_entropy(method):
        total = 0.0
        for row in last_logits(model, texts, method):
            p = row.double().softmax(-1)
            total += float(-(p * p.log()).sum())
        return total / len(texts)

    scales = (0.2, 1.0, 5.0)
    found = gratis.ZeroTuning().tune(model, texts, scales=scales, level=1, batch=7)
    expected = {s: mean_entropy(None if s == 1 else gratis.ZeroTuning(scale=s)) for s in scales}
    assert found.curve == pytest.approx(expected, abs=1e-4)
    assert found.method.scale == min(expected, key=expected.get)
    assert found.baseline == found.curve[1.0]
    assert found.objective == "entropy"


def test_the_entropy_may_be_that_of_the_answers_only():
    model, texts, answers = tiny.tiny_language_model(), prompts(), [5, (9, 11)]

    def mean_entropy(method):
        total = 0.0
        for text in texts:
            p = logits_of(model, text[None], method)[0, -1].double().softmax(-1)
            two = torch.stack([p[5], p[9] + p[11]])
            two = two / two.sum()
            total += float(-(two * two.log()).sum())
        return total / len(texts)

    tuner = gratis.ZeroTuning(layers=(1, 2))
    found = tuner.tune(model, texts, answers=answers, objective="answer entropy", scales=(1.0, 4.0), level=1)
    expected = {1.0: mean_entropy(None), 4.0: mean_entropy(gratis.ZeroTuning(scale=4.0, layers=(1, 2)))}
    assert found.curve == pytest.approx(expected, abs=1e-4)
    assert found.method.layers == (1, 2)


def accuracy_of(model, texts, labels, answers, method):
    right = [
        int(row[answers].argmax()) == label
        for row, label in zip(last_logits(model, texts, method), labels, strict=True)
    ]
    return sum(right) / len(texts)


@pytest.mark.parametrize(("mode", "heads"), [("logit", 4), ("key", 2)])
def test_profiling_changes_one_head_index_in_all_layers(mode, heads):
    model, texts = tiny.tiny_language_model(), prompts(12)
    answers, labels = [5, 9], [n % 2 for n in range(len(texts))]
    found = gratis.ZeroTuning(mode=mode).tune(
        model, texts, labels=labels, answers=answers, scales=(0.5, 1.0, 2.0), probes=(8.0, 0.1), fraction=1.0
    )
    for probe in (8.0, 0.1):
        changed = [gratis.ZeroTuning(scale=probe, heads=(head,), mode=mode) for head in range(heads)]
        expected = [accuracy_of(model, texts, labels, answers, method) for method in changed]
        assert found.profile[probe] == pytest.approx(expected)
    assert found.method.mode == mode
    larger = max(found.groups.values(), key=len)
    assert found.method.heads == (tuple(sorted(larger)) if larger else None)
    assert found.curve[found.method.scale] == max(found.curve.values())
    chosen = accuracy_of(model, texts, labels, answers, found.method)
    assert found.scores[found.method.scale]["accuracy"] == pytest.approx(chosen)


def test_heads_are_grouped_by_the_direction_that_helps_them():
    profile = {
        2.0: [0.7, 0.9, 0.3, 0.5, 0.5, 0.5, 0.6, 0.4],
        0.5: [0.5, 0.6, 0.7, 0.6, 0.4, 0.5, 0.9, 0.2],
    }
    groups = head_groups(profile, 0.5, 1.0, range(8))
    # Of two heads worse either way (7), the one that loses less with more attention helps nowhere.
    assert groups == {"up": (1, 0, 4), "down": (2, 6, 3)}
    assert head_groups({2.0: profile[2.0]}, 0.5, 1.0, range(8)) == {"up": (1, 0, 6), "down": (2, 7)}
    assert head_groups({0.5: profile[0.5]}, 0.5, 1.0, range(8)) == {"up": (7, 4), "down": (6, 2, 1, 3)}
    less = {probe: [-value for value in values] for probe, values in profile.items()}
    assert head_groups(less, -0.5, -1.0, range(8)) == groups


def test_of_the_larger_group_a_fraction_is_kept():
    assert dominant({"up": (4, 2), "down": (7, 1, 3, 0)}, 0.5) == (1, 7)
    assert dominant({"up": (4, 2), "down": (7, 1, 3, 0)}, 1.0) == (0, 1, 3, 7)
    assert dominant({"up": (4, 2), "down": (7,)}, 0.1) == (4,)
    assert dominant({"up": (), "down": ()}, 0.5) == ()


def test_level_0_tries_few_scales_for_all_heads_and_level_1_a_grid():
    model, texts = tiny.tiny_language_model(), prompts(20)
    few = gratis.ZeroTuning().tune(model, texts, level=0)
    assert set(few.curve) == {0.3, 1.0, 2.0, 4.0}
    assert few.profile == {}
    assert few.method.heads is None
    grid = gratis.ZeroTuning(heads=(1, 3)).tune(model, texts, level=1)
    assert len(grid.curve) == 11
    assert grid.method.heads == (1, 3)


def test_texts_are_read_by_the_tokenizer_and_answers_may_be_parsed():
    model, texts = tiny.tiny_language_model(), prompts(6)

    class Words:
        pad_token_id, eos_token_id = 0, 1

        def __call__(self, text):
            return type("Read", (), {"input_ids": list(map(int, text.split()))})

        def batch_decode(self, rows, skip_special_tokens):
            return [" ".join(map(str, row)) for row in rows.tolist()]

    set_tokenizer(model, Words())

    def parse(text):
        last = int(text.split()[-1])
        return last % 2 if last % 3 else None

    read = {}
    for name, method in (("plain", None), ("tuned", gratis.ZeroTuning(scale=3.0))):
        read[name] = []
        with gratis.attach(model, method) if method else nullcontext():
            for text in texts:
                seen = torch.ones_like(text)[None]
                out = model.generate(input_ids=text[None], attention_mask=seen, do_sample=False, max_new_tokens=3)
                read[name].append(parse(" ".join(map(str, out[0, len(text) :].tolist()))))
    labels = [0, 1, 0, 1, 0, 1]
    found = gratis.ZeroTuning().tune(
        model, [" ".join(map(str, text.tolist())) for text in texts], labels=labels, parse=parse, new_tokens=3, level=1,
        scales=(1.0, 3.0), batch=1,
    )  # fmt: skip
    assert found.objective == "parsed accuracy"
    for scale, name in ((1.0, "plain"), (3.0, "tuned")):
        right = [one == label for one, label in zip(read[name], labels, strict=True)]
        assert found.curve[scale] == pytest.approx(sum(right) / 6)
        assert found.scores[scale]["valid"] == pytest.approx(sum(one is not None for one in read[name]) / 6)


def test_what_is_attached_stays_attached_and_the_search_takes_itself_off():
    model, texts = tiny.tiny_language_model(), prompts(20)
    before = tiny.snapshot(model)
    with gratis.attach(model, gratis.LaCache(budget=24, sinks=4, span=1)):
        gratis.ZeroTuning().tune(model, texts, level=0)

    def interrupt(share, words):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gratis.ZeroTuning().tune(model, texts, level=0, progress=interrupt)
    assert tiny.snapshot(model) == before


def test_ties_go_to_the_scale_closest_to_one():
    model, texts = tiny.tiny_language_model(), prompts(4)
    found = gratis.ZeroTuning().tune(model, texts, labels=[0] * 4, answers=[5], scales=(0.5, 0.9, 4.0), level=1)
    assert found.method.scale == 0.9


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"labels": [0], "answers": [1, 2]}, "one label per prompt: there are 1 for 2"),
        ({"labels": [0, 1]}, "Labels say nothing without answers"), ({"labels": [0, 2], "answers": [1, 2]}, "between 0 and 1"),
        ({"answers": [1, ()]}, "Every answer needs a token"), ({"objective": "answer entropy"}, "'answer entropy' needs answers"),
        ({"objective": "accuracy"}, "'accuracy' needs labels and answers"), ({"objective": "loss"}, "objective must be one of"),
        ({"level": 3}, "level must be 0, 1 or 2"), ({"scales": ()}, "at least one scale"), ({"fraction": 0.0}, "fraction"),
        ({"probes": (2.0, 3.0)}, "one scale above 1"), ({"probes": (1.0,)}, "one scale above 1"),
        ({"probes": (-1.0,)}, "one scale above 1"), ({"probes": ()}, "one scale above 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_tuned(given, message):
    with pytest.raises(InputError, match=message):
        gratis.ZeroTuning().tune(tiny.tiny_language_model(), prompts(2), **given)


def test_no_prompts_and_few_prompts():
    model = tiny.tiny_language_model()
    for none in ([], [[]]):
        with pytest.raises(InputError, match="at least one prompt"):
            gratis.ZeroTuning().tune(model, none)
    with pytest.warns(UserWarning, match="20 or more"):
        gratis.ZeroTuning().tune(model, prompts(2), level=1, scales=(1.0,))
