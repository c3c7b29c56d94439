from __future__ import annotations

import copy

import pytest
import torch

import gratis
from gratis.contract.errors import InputError, ParameterError
from gratis.methods.memory.lacache import Ladders
from gratis.subjects.bounded_cache import BoundedCache
from gratis.subjects.language import Rotation, rotations
from tests import tiny_language as tiny


def simulate(layers, tokens, **parameters):
    """Pure-Python simulator: lists of token numbers per layer, token by token."""
    ladders = Ladders(gratis.LaCache(**parameters), layers)
    cache = [[] for _ in range(layers)]
    for token in range(tokens):
        for layer in cache:
            layer.append(token)
        for chosen in ladders.select(len(cache[0])):
            indices = chosen.indices(layers)
            cache = [[layer[i] for i in row.tolist()] for layer, row in zip(cache, indices, strict=True)]
    return cache


def rule(layers, tokens, budget, span, overlap, sinks):
    """The rule of the paper's released code written down once more, naively, for token-by-token text."""
    step = span - overlap
    tall = 1 + -((span - layers) // step)
    kept = min(-(-span // step), tall)
    gone = tall - kept

    def thin(cache, start, count):
        out = []
        for i, layer in enumerate(cache):
            new = layer[:start]
            for j in range(count):
                for k in range(kept):
                    new.append(layer[start + tall * j + i % (gone + 1) + k])
            out.append(new + layer[start + tall * count :])
        return out

    limit, cursor, first = budget, sinks, True
    cache = [[] for _ in range(layers)]
    for token in range(tokens):
        [layer.append(token) for layer in cache]
        n = len(cache[0])
        if n <= limit:
            continue
        if first:
            limit, first = limit + gone // 2, False
        need = n - limit
        if need <= 0:
            continue
        room = limit - cursor - layers

        if need <= room // kept * gone:
            count = -(-need // gone)
            cache, cursor = thin(cache, cursor, count), cursor + count * kept
        else:
            count = max(room // kept, 0)
            cache = thin(cache, cursor, count)
            rest = -(-(need - count * gone) // gone)
            cache, cursor = thin(cache, sinks, rest), sinks + rest * kept
    return cache


def test_golden_vector():
    cache = simulate(32, 1500, budget=256, span=16, overlap=0, sinks=4)
    assert {len(layer) for layer in cache} == {256}
    assert cache[0][:14] == [0, 1, 2, 3, 4, 68, 132, 196, 260, 324, 388, 448, 480, 512]
    assert cache[1][:14] == [0, 1, 2, 3, 67, 131, 195, 259, 323, 387, 447, 479, 511, 543]
    assert len(set().union(*cache)) == 400


@pytest.mark.parametrize(
    ("layers", "span", "overlap", "constants"),
    [
        (32, 16, 0, (2, 1, 1)),
        (32, 8, 4, (7, 2, 5)),
        (32, 9, 3, (5, 2, 3)),
        (24, 9, 7, (9, 5, 4)),
        (30, 15, 0, (2, 1, 1)),
    ],
)
def test_constants_of_one_ladder(layers, span, overlap, constants):
    ladders = Ladders(gratis.LaCache(budget=256, span=span, overlap=overlap), layers)
    assert (ladders.tall, ladders.kept, ladders.removed) == constants


@pytest.mark.parametrize(
    ("layers", "span", "overlap"), [(32, 16, 0), (32, 8, 4), (24, 9, 7), (30, 8, 4), (6, 2, 1), (4, 1, 0)]
)
@pytest.mark.parametrize("budget", [64, 100])
def test_the_rule_token_by_token(layers, span, overlap, budget):
    mine = simulate(layers, 400, budget=budget, span=span, overlap=overlap, sinks=4)
    assert mine == rule(layers, 400, budget, span, overlap, 4)


def test_layers_differ_after_the_first_compaction():
    cache = simulate(8, 41, budget=40, span=4)
    assert cache[0] != cache[1]


def test_the_newest_tokens_are_in_every_layer():
    for tokens in (300, 301, 333, 399):
        layers = simulate(12, tokens, budget=64, span=4, overlap=1)
        removed = Ladders(gratis.LaCache(budget=64, span=4, overlap=1), 12).removed
        for layer in layers:
            assert layer[-(12 - removed + 1) :] == list(range(tokens - (12 - removed + 1), tokens))


def test_the_budget_is_raised_once_only():
    ladders = Ladders(gratis.LaCache(budget=64, span=4, overlap=2), 12)
    for _ in range(5):
        ladders.select(200)
    assert ladders.budget == 64 + ladders.removed // 2


def test_old_tokens_are_kept_through_starting_over():
    cache = simulate(32, 3000, budget=256, span=16)
    beyond_a_window = {t for layer in cache for t in layer if 4 <= t < 3000 - 256}
    assert len(beyond_a_window) > 50
    assert min(beyond_a_window) < 3000 - 4 * 256


@pytest.mark.parametrize("prompt", [200, 4096, 32768])
def test_a_long_prompt_neither_underfills_nor_runs_out_of_range(prompt):
    ladders = Ladders(gratis.LaCache(budget=128, span=8, overlap=4), 30)
    length, held = prompt, torch.arange(prompt).expand(30, -1)
    for chosen in ladders.select(length):
        indices = chosen.indices(30)
        assert indices.max() < held.shape[1]
        held = held.gather(1, indices)
    assert 0.9 * 128 <= held.shape[1] <= 128 + ladders.removed // 2
    assert (held.diff(dim=1) > 0).all()


def test_contiguous_pattern_climbs_from_shallow_to_deep():
    ladders = Ladders(gratis.LaCache(budget=64, span=4, pattern="contiguous"), 12)
    middle = ladders.select(70)[0].middle[:, 0]
    assert (middle.diff() >= 0).all()
    assert middle[0] < middle[-1]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"budget": 64, "span": 5}, "span 5"),
        ({"budget": 64, "span": 4}, "thins nothing"),
        ({"budget": 9, "sinks": 4, "span": 2}, "below 10"),
        ({"budget": 300}, "window of 256"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_anything_changed(parameters, message):
    model = tiny.tiny_language_model()
    before = tiny.snapshot(model)
    with pytest.raises(ParameterError, match=message):
        gratis.attach(model, gratis.LaCache(**parameters))
    assert tiny.snapshot(model) == before


def test_overlap_must_be_below_span():
    with pytest.raises(ParameterError, match="overlap 3 must be below span 2"):
        gratis.LaCache(span=2, overlap=3)


def feed(model, ids, sizes):
    """Run ids through the model in pieces and return its cache and all logits."""
    cache, logits, start = None, [], 0
    with torch.no_grad():
        for size in sizes:
            out = model(ids[:, start : start + size], past_key_values=cache, use_cache=True)
            cache, start = out.past_key_values, start + size
            logits.append(out.logits)
    return cache, torch.cat(logits, dim=1)


def reference_forward(model, ids, budget, span):
    """Full recomputation: raw keys kept per layer, turned to slot positions at every step. One token at a time."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

    layers = model.config.num_hidden_layers
    ladders = Ladders(gratis.LaCache(budget=budget, span=span, sinks=2), layers)
    raw = [None] * layers
    out = []
    for t in range(ids.shape[1]):
        x = model.model.embed_tokens(ids[:, t : t + 1])
        for i, block in enumerate(model.model.layers):
            h = block.input_layernorm(x)
            shape = (*h.shape[:-1], -1, block.self_attn.head_dim)
            q = block.self_attn.q_proj(h).view(shape).transpose(1, 2)
            k = block.self_attn.k_proj(h).view(shape).transpose(1, 2)
            v = block.self_attn.v_proj(h).view(shape).transpose(1, 2)
            keys, values = (k, v) if raw[i] is None else (torch.cat([raw[i][0], k], 2), torch.cat([raw[i][1], v], 2))
            raw[i] = (keys, values)
            n = keys.shape[2]
            cos, sin = model.model.rotary_emb(x, torch.arange(n)[None])
            _, turned = apply_rotary_pos_emb(keys, keys, cos, sin)
            query, _ = apply_rotary_pos_emb(q, q, cos[:, -1:], sin[:, -1:])
            groups = block.self_attn.num_key_value_groups
            scores = query @ repeat_kv(turned, groups).transpose(2, 3) * block.self_attn.scaling
            mixed = (scores.softmax(-1) @ repeat_kv(values, groups)).transpose(1, 2).reshape(*h.shape[:-1], -1)
            x = x + block.self_attn.o_proj(mixed)
            x = x + block.mlp(block.post_attention_layernorm(x))
        out.append(model.lm_head(model.model.norm(x)))
        for chosen in ladders.select(raw[0][0].shape[2]):
            for i, row in enumerate(chosen.indices(layers)):
                raw[i] = (raw[i][0][:, :, row], raw[i][1][:, :, row])
    return torch.cat(out, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("span", [1, 2])
def test_the_model_computes_what_a_full_recomputation_at_slot_positions_computes(span):
    model = tiny.tiny_language_model()
    ids = torch.randint(2, tiny.VOCABULARY, (1, 120), generator=torch.Generator().manual_seed(3))
    with gratis.attach(model, gratis.LaCache(budget=24, span=span, sinks=2)):
        cache, logits = feed(model, ids, [1] * 120)
    torch.testing.assert_close(logits, reference_forward(model, ids, 24, span), atol=2e-4, rtol=1e-3)
    assert isinstance(cache, BoundedCache)
    assert cache.stored <= 25


def test_turned_keys_equal_raw_keys_turned_at_their_new_slots():
    generator = torch.Generator().manual_seed(0)
    rotation = Rotation(10000.0 ** (-torch.arange(0, 16, 2) / 16), False, 0)
    keys = torch.randn(2, 30, 16, generator=generator)
    at = rotation.turn_(keys.clone(), torch.arange(30))
    moved = rotation.turn_(at[:, ::3].clone(), torch.arange(10) - torch.arange(0, 30, 3))
    torch.testing.assert_close(moved, rotation.turn_(keys[:, ::3].clone(), torch.arange(10)), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_logits_are_identical_to_the_plain_cache_until_something_is_evicted():
    model = tiny.tiny_language_model()
    ids = tiny.prompt(2)
    _, plain = feed(model, ids, [16] + [1] * 24)
    with gratis.attach(model, gratis.LaCache(budget=40, span=2)):
        _, mine = feed(model, ids, [16] + [1] * 24)
    assert torch.equal(plain, mine)


@torch.no_grad()
def test_memory_is_bounded_and_layers_hold_equally_many():
    model = tiny.tiny_language_model()
    ids = torch.randint(2, tiny.VOCABULARY, (1, 900), generator=torch.Generator().manual_seed(3))
    with gratis.attach(model, gratis.LaCache(budget=32, span=2)) as handle:
        cache, _ = feed(model, ids, [30] + [10] * 87)
        report = handle.report()["lacache"]
    assert report["entries_per_layer"] <= 32
    assert report["tokens_seen"] == 900
    assert 32 < report["distinct_tokens"] <= 4 * 32
    assert report["compactions"] > 80
    assert report["peak_cache_bytes"] < 4 * 2 * 2 * 8 * 4 * 200 * 2
    assert cache.get_seq_length() == 900


@torch.no_grad()
def test_generate_in_chunks_bounds_the_prefill():
    model = tiny.tiny_language_model()
    ids = torch.randint(2, tiny.VOCABULARY, (1, 200), generator=torch.Generator().manual_seed(3))
    with gratis.attach(model, gratis.LaCache(budget=32, span=2, chunk=16)) as handle:
        first = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        peak = handle.report()["lacache"]["peak_cache_bytes"]
    with gratis.attach(model, gratis.LaCache(budget=32, span=2)) as handle:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        assert peak < handle.report()["lacache"]["peak_cache_bytes"]
    assert first.shape == (1, 208)


@torch.no_grad()
def test_beam_search_reorders_the_cache():
    model = tiny.tiny_language_model()
    ids = tiny.prompt()
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "num_beams": 3, "do_sample": False}
    plain = model.generate(ids, **options)
    with gratis.attach(model, gratis.LaCache(budget=60, span=2)):
        assert torch.equal(model.generate(ids, **options), plain)
    with gratis.attach(model, gratis.LaCache(budget=24, span=2)):
        assert model.generate(ids, **options).shape == plain.shape


@torch.no_grad()
def test_a_session_goes_on_when_its_cache_is_passed_back():
    model = tiny.tiny_language_model()
    ids = torch.randint(2, tiny.VOCABULARY, (1, 100), generator=torch.Generator().manual_seed(3))
    with gratis.attach(model, gratis.LaCache(budget=24, span=2)):
        cache, _ = feed(model, ids[:, :60], [60])
        branch = copy.deepcopy(cache)
        a = model(ids[:, 60:80], past_key_values=cache).logits
        b = model(ids[:, 60:80], past_key_values=branch).logits
        assert torch.equal(a, b)
        cache, _ = feed(model, ids[:, :60], [60])
        out = model.generate(
            ids[:, :61], past_key_values=cache, attention_mask=torch.ones(1, 61, dtype=torch.long),
            max_new_tokens=4, do_sample=False,
        )  # fmt: skip
    assert out.shape[1] == 65


@torch.no_grad()
def test_unequal_rows_are_refused_once_something_must_be_evicted():
    model = tiny.tiny_language_model()
    ids = tiny.prompt(2)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with gratis.attach(model, gratis.LaCache(budget=80, span=2)):
        padded = model(ids, attention_mask=mask).logits
    assert torch.equal(padded, model(ids, attention_mask=mask).logits)
    with gratis.attach(model, gratis.LaCache(budget=24, span=2)), pytest.raises(InputError, match="unequal lengths"):
        model(ids, attention_mask=mask)


@torch.no_grad()
def test_caches_made_elsewhere_are_refused():
    from transformers import DynamicCache, StaticCache

    model = tiny.tiny_language_model()
    filled = DynamicCache(config=model.config)
    model(tiny.prompt(), past_key_values=filled)
    with gratis.attach(model, gratis.LaCache(budget=24, span=2)):
        with pytest.raises(InputError, match="from its start"):
            model(tiny.prompt(), past_key_values=filled)
        with pytest.raises(InputError, match="StaticCache"):
            model(tiny.prompt(), past_key_values=StaticCache(config=model.config, max_cache_len=100))
        cache = model(tiny.prompt()).past_key_values
    with gratis.attach(model, gratis.SlidingWindow(budget=24)), pytest.raises(InputError, match="filled under LaCache"):
        model(tiny.prompt(), past_key_values=cache)


def test_half_precision_does_not_drift():
    model = tiny.tiny_language_model()
    half = tiny.tiny_language_model(dtype=torch.bfloat16)
    ids = torch.randint(2, tiny.VOCABULARY, (1, 400), generator=torch.Generator().manual_seed(3))
    caches = []
    for each in (model, half):
        with gratis.attach(each, gratis.LaCache(budget=32, span=2)):
            caches.append(feed(each, ids, [1] * 400)[0])
    exact, rounded = (c._blocks[0].keys[0, :, :, :8].float() for c in caches)
    # Layer 0 keys depend on tokens and positions only, so rounding once is all that may differ.
    assert (exact - rounded).abs().max() < 0.02 * exact.abs().max()


def test_rotations_are_found_for_the_standard_model():
    model = tiny.tiny_language_model()
    found = rotations(model, "LaCache")
    assert len(found) == tiny.LAYERS
    assert not found[0].interleaved
    torch.testing.assert_close(found[0].frequencies, model.model.rotary_emb.inv_freq)
    assert all(r is found[0] for r in found)


@torch.no_grad()
def test_a_share_of_the_prompt_is_the_budget_of_each_text():
    """Of the prompt of generate, or of a text's first piece; never above budget, nor below what the model needs."""
    model, method = tiny.tiny_language_model(), gratis.LaCache(budget=60, span=1, share=0.5)
    ids = torch.randint(2, tiny.VOCABULARY, (1, 160), generator=torch.Generator().manual_seed(3))
    least = 4 + tiny.LAYERS + 4
    with gratis.attach(model, method) as handle:
        for length, budget in ((80, 40), (160, 60), (14, least)):
            text = ids[:, :length]
            model.generate(text, attention_mask=torch.ones_like(text), max_new_tokens=20, do_sample=False)
            kept = handle.report()["lacache"]["entries_per_layer"]
            assert budget - 3 <= kept <= budget + 1, length
        cache, _ = feed(model, ids, [60, *[1] * 30])
        assert 27 <= cache.stored <= 31
    with gratis.attach(model, method.replace(share=None)) as handle:
        feed(model, ids, [60, *[1] * 30])
        assert handle.report()["lacache"]["entries_per_layer"] >= 57
