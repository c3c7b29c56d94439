from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

import gratis
from gratis.contract.errors import InputError, MemoryShortError, ParameterError, SubjectError
from gratis.methods.memory.infllm import BlockMemory
from gratis.subjects import looked_up
from gratis.subjects.block_store import KEPT_FREE
from gratis.subjects.language import Rotation
from gratis.subjects.unrotated_door import MemoryCache, Text
from tests import tiny_language as tiny

DIM, HEADS, GROUPS = 8, 4, 2
SMALL = {"window": 16, "sinks": 3, "block": 4, "blocks": 2, "lookup": 8, "hot_blocks": 3, "representatives": 2}


def rotation(zero=False):
    frequencies = 100.0 ** (-torch.arange(0, DIM, 2).double() / DIM)
    return Rotation(frequencies * (0 if zero else 1), interleaved=False, start=0)


def turned(vector, position, turn):
    """One vector, turned pair by pair."""
    out, half = vector.copy(), DIM // 2
    for i, frequency in enumerate(turn.frequencies.tolist()):
        c, s = math.cos(position * frequency), math.sin(position * frequency)
        out[i] = vector[i] * c - vector[i + half] * s
        out[i + half] = vector[i] * s + vector[i + half] * c
    return out


def texts(length, seed=0, rows=1):
    generator = torch.Generator().manual_seed(seed)

    def drawn(heads):
        return torch.randn(rows, heads, length, DIM, generator=generator, dtype=torch.float64)

    return drawn(HEADS), drawn(GROUPS), drawn(GROUPS)


def read(method, query, key, value, pieces, turn, first=None):
    """What a memory outputs for a text that comes in `pieces`, and the memory."""
    text = Text()
    memory = BlockMemory(method, turn, text)
    memory.leave_window()
    outputs, at = [], 0
    for piece in pieces:
        parts = (tensor[:, :, at : at + piece] for tensor in (query, key, value))
        outputs.append(memory.read(*parts, DIM**-0.5, first))
        at += piece
        text.seen = at
    return torch.cat(outputs, 2), memory


def naive(method, query, key, value, steps, turn, first=None):
    """The card's algorithm for one row, token by token in float64: outputs, and per step and head what was attended.

    `first` (heads,) is added to the logit of token 0. With `method.together` above 1 all steps are one piece of text.
    """
    q, k, v = (tensor[0].numpy() for tensor in (query, key, value))
    share, window = HEADS // GROUPS, method.window
    scores = np.zeros((HEADS, q.shape[1]))
    packed, standing, coverage = [], [], []
    output, begin, oldest = np.zeros_like(q), 0, 0
    for number, step in enumerate(steps):
        stop = begin + step
        if number % method.together == 0:
            before = len(packed)
        # Look-ups that are scored at once know the blocks that there were for the first of them.
        known = before if before > method.blocks else len(packed)
        distant = np.array(
            [
                [turned(q[h, t], (window - 1) * method.distance_scale, turn) for t in range(begin, stop)]
                for h in range(HEADS)
            ]
        )
        mean = distant.mean(1)
        if known <= method.blocks:
            chosen = [list(range(known))] * HEADS
        elif method.per_head:
            chosen = [
                sorted(np.argsort([-mean[h] @ r[h] for r in standing[:known]], kind="stable")[: method.blocks])
                for h in range(HEADS)
            ]
        else:
            total = [-(mean * r).sum() for r in standing[:known]]
            chosen = [sorted(np.argsort(total, kind="stable")[: method.blocks])] * HEADS
        for h in range(HEADS):
            g = h // share
            for i, t in enumerate(range(begin, stop)):
                near = list(range(max(0, t - window + 1), t + 1))
                far = [p for b in chosen[h] for p in packed[b]]
                far += [p for p in range(min(method.sinks, oldest))]
                far += [p for p in range(oldest, (stop if method.compat else t + 1) - window)]
                local = turned(q[h, t], t * method.distance_scale, turn)
                logits = [local @ turned(k[g, p], p * method.distance_scale, turn) for p in near]
                logits += [distant[h, i] @ k[g, p] for p in far]
                logits = np.array(logits) * DIM**-0.5
                if first is not None:
                    logits[[p == 0 for p in near + far]] += float(first[h])
                weights = np.exp(logits - logits.max())
                weights /= weights.sum()
                coverage.append(sorted(near + far))
                output[h, t] = sum(w * v[g, p] for w, p in zip(weights, near + far, strict=True))
                received = weights if method.score == "attention" else logits
                for p, w in zip(near, received, strict=False):
                    scores[h, p] += w
        start = max(oldest, method.sinks)
        while stop - start - method.block >= window:
            tokens = list(range(start, start + method.block))
            best = [sorted(tokens, key=lambda p: -scores[h, p])[: method.representatives] for h in range(HEADS)]
            standing.append(np.array([k[h // share, best[h]].mean(0) for h in range(HEADS)]))
            packed.append(tokens)
            start = oldest = start + method.block
        begin = stop
    return output, coverage


@pytest.mark.parametrize("changed", [{}, {"per_head": True}, {"score": "logits"}, {"distance_scale": 0.5}], ids=str)
@pytest.mark.parametrize(
    "steps", [[1] * 70, [8] * 8 + [6], [8, 8, 5, 1, 1, 1, 8, 8, 3, 1, 8, 8, 8, 1]], ids=["tokens", "pieces", "mixed"]
)
def test_against_the_algorithm_written_down_naively(changed, steps):
    method = gratis.InfLLM(**{**SMALL, **changed})
    q, k, v = texts(sum(steps))
    out, memory = read(method, q, k, v, steps, rotation())
    expected, _ = naive(method, q, k, v, steps, rotation())
    np.testing.assert_allclose(out[0].numpy(), expected, atol=1e-5)
    assert memory.report()["blocks"] > method.blocks


def test_what_is_added_to_the_first_tokens_logit_is_added_wherever_it_is():
    """In the window, between window and blocks, among the first tokens, and for some queries of a piece in two."""
    method, first = gratis.InfLLM(**SMALL), torch.tensor([1.5, 0.0, -2.0, 0.3])
    q, k, v = texts(60)
    for steps in ([1] * 60, [8] * 7 + [4], [5] + [8] * 6 + [7]):
        out, _ = read(method, q, k, v, steps, rotation(), first)
        expected, _ = naive(method, q, k, v, steps, rotation(), first)
        np.testing.assert_allclose(out[0].numpy(), expected, atol=1e-5)


def test_compat_attends_twice_where_the_released_prefill_does():
    exact, compat = gratis.InfLLM(**SMALL), gratis.InfLLM(**SMALL, compat=True)
    q, k, v = texts(70)
    steps = [8] * 8 + [6]
    out, _ = read(compat, q, k, v, steps, rotation())
    expected, coverage = naive(compat, q, k, v, steps, rotation())
    np.testing.assert_allclose(out[0].numpy(), expected, atol=1e-5)
    twice = [len(seen) - len(set(seen)) for seen in coverage]
    assert 0 < max(twice) <= compat.lookup - 1
    _, coverage = naive(exact, q, k, v, steps, rotation())
    assert all(len(seen) == len(set(seen)) for seen in coverage)
    tokens = [read(method, q, k, v, [1] * 70, rotation())[0] for method in (exact, compat)]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("changed", [{}, {"per_head": True}], ids=str)
def test_look_ups_that_are_scored_together_know_older_blocks_only(changed):
    method = gratis.InfLLM(**{**SMALL, "window": 12, "together": 3, **changed})
    q, k, v = texts(96)
    out, memory = read(method, q, k, v, [96], rotation())
    expected, _ = naive(method, q, k, v, [8] * 12, rotation())
    np.testing.assert_allclose(out[0].numpy(), expected, atol=1e-5)
    one_by_one, alone = read(method.replace(together=1), q, k, v, [96], rotation())
    assert memory.report()["lookups"] == alone.report()["lookups"]
    assert not torch.allclose(out, one_by_one, atol=1e-3)


def test_another_base_is_another_rotation_once_the_text_outgrows_the_window():
    q, k, v = texts(60)
    turn = rotation()
    other = Rotation(20.0 ** (-torch.arange(0, DIM, 2).double() / DIM), interleaved=False, start=0)
    based, _ = read(gratis.InfLLM(**SMALL, base=20.0), q, k, v, [20] + [1] * 40, turn)
    turned_otherwise, _ = read(gratis.InfLLM(**SMALL), q, k, v, [20] + [1] * 40, other)
    torch.testing.assert_close(based, turned_otherwise, atol=1e-6, rtol=0)
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    with torch.no_grad():
        plain = model(ids[:, :16]).logits
        steps = []
        for base in (None, 10000.0, 20.0):
            with gratis.attach(model, gratis.InfLLM(**SMALL, base=base)):
                first = model(ids[:, :16])
                assert torch.equal(first.logits, plain)
                steps.append(model(ids[:, 16:], past_key_values=first.past_key_values).logits)
    torch.testing.assert_close(steps[0], steps[1], atol=1e-4, rtol=0)
    assert not torch.allclose(steps[0], steps[2], atol=0.1)


@pytest.mark.parametrize(("window", "lookup"), [(100, 100), (4096, 512)])
def test_a_look_up_serves_512_tokens_of_a_prompt_or_the_window(window, lookup):
    method = gratis.InfLLM(window=window, sinks=1, block=4, blocks=2, representatives=1)
    memory = BlockMemory(method, rotation(), Text())
    memory.leave_window()
    q, k, v = (t.float()[:, :, :1].expand(-1, -1, 1100, -1) for t in texts(1))
    seen = []
    memory._read_together = lambda query, *rest: seen.append(query.shape[2]) or query
    memory.read(q, k, v, 1.0)
    assert max(seen) == lookup
    assert sum(seen) == 1100


def test_one_long_piece_is_the_same_as_several_with_the_same_lookups():
    method = gratis.InfLLM(**SMALL)
    q, k, v = texts(80)
    whole, _ = read(method, q, k, v, [80], rotation())
    pieces, _ = read(method, q, k, v, [16, 8, 32, 24], rotation())
    torch.testing.assert_close(whole, pieces, atol=1e-6, rtol=0)


@pytest.mark.parametrize("pieces", [[60], [1] * 60, [7, 13, 8, 8, 8, 16]])
def test_without_angles_and_with_all_blocks_it_is_full_causal_attention(pieces):
    method = gratis.InfLLM(**{**SMALL, "blocks": 40, "hot_blocks": 40})
    q, k, v = texts(60)
    out, _ = read(method, q, k, v, pieces, rotation(zero=True))
    full = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, full, atol=1e-6, rtol=0)


def test_every_past_token_is_attended_exactly_once_when_all_blocks_are_taken():
    method = gratis.InfLLM(**{**SMALL, "blocks": 40, "hot_blocks": 40})
    q, k, v = texts(70)
    steps = [8, 8, 8, 3, 1, 1, 8, 8, 8, 8, 8, 1]
    expected, coverage = naive(method, q, k, v, steps, rotation())
    assert all(seen == list(range(len(seen))) for seen in coverage)
    out, _ = read(method, q, k, v, steps, rotation())
    np.testing.assert_allclose(out[0].numpy(), expected, atol=1e-5)


def test_what_is_outside_the_window_is_seen_from_its_far_end():
    method = gratis.InfLLM(**{**SMALL, "sinks": 1, "blocks": 1, "hot_blocks": 1})
    q, k, v = texts(22)
    v.zero_()
    v[:, :, 1:5, 0] = 1.0
    out, memory = read(method, q, k, v, [1] * 22, rotation())
    assert memory.report()["blocks"] == 1
    query, head = q[0, 3, 21].numpy(), 1
    local = [turned(query, 21, rotation()) @ turned(k[0, head, p].numpy(), p, rotation()) for p in range(6, 22)]
    distant = turned(query, method.window - 1, rotation())
    far = [distant @ k[0, head, p].numpy() for p in (0, 5, 1, 2, 3, 4)]
    weights = torch.tensor(local + far).mul(DIM**-0.5).softmax(0)
    torch.testing.assert_close(out[0, 3, 21, 0], weights[-4:].sum().double(), atol=1e-6, rtol=0)


def test_a_token_that_takes_all_attention_represents_its_block():
    method = gratis.InfLLM(**{**SMALL, "representatives": 1, "sinks": 1})
    q, k, v = texts(30)
    q[..., 0], k[..., 0] = 4.0, 0.0
    k[:, :, 3, 0] = 60.0
    turn = rotation(zero=True)
    _, memory = read(method, q, k, v, [30], turn)
    for head in range(HEADS):
        torch.testing.assert_close(memory.standing[0, 0, head], k[0, head // 2, 3].float())


def test_blocks_keep_key_heads_and_representatives_query_heads():
    q, k, v = texts(60)
    _, memory = read(gratis.InfLLM(**SMALL), q, k, v, [60], rotation())
    assert memory.store.parts[0].memory.shape[2:] == (GROUPS, 4, DIM)
    assert memory.standing.shape[2:] == (HEADS, DIM)


@pytest.mark.parametrize("changed", [{}, {"per_head": True}, {"eviction": "lru-s"}], ids=str)
def test_a_file_gives_what_memory_gives(changed):
    q, k, v = texts(120, rows=2)
    kept, memory = read(gratis.InfLLM(**SMALL, **changed), q, k, v, [40] + [1] * 80, rotation())
    filed, file = read(gratis.InfLLM(**SMALL, **changed, store="file"), q, k, v, [40] + [1] * 80, rotation())
    assert torch.equal(kept, filed)
    assert file.store.bytes == 0 < memory.store.bytes
    assert file.report()["hot_hits"] > 0


@pytest.mark.parametrize("changed", [{}, {"store": "file"}, {"store": "file", "eviction": "lru-s"}])
def test_blocks_copied_one_by_one_are_those_that_are_gathered(monkeypatch, changed):
    q, k, v = texts(200, rows=2)
    steps = [40] + [1] * 160
    method = gratis.InfLLM(**{**SMALL, "hot_blocks": 4}, **changed)
    few, one = read(method, q, k, v, steps, rotation())
    monkeypatch.setattr(looked_up, "FEW", 0)
    many, other = read(method, q, k, v, steps, rotation())
    assert torch.equal(few, many)
    assert one.report() == other.report()


def test_representatives_in_main_memory_choose_the_same_blocks_and_leave_the_device_what_it_had():
    q, k, v = texts(320, rows=2)
    steps = [40] + [1] * 280
    near, there = read(gratis.InfLLM(**SMALL), q, k, v, steps, rotation())
    far, here = read(gratis.InfLLM(**SMALL, representatives_in="memory"), q, k, v, steps, rotation())
    assert torch.equal(near, far)
    first, second = there.report(), here.report()
    assert first["retrieved"] == second["retrieved"]
    standing = there.standing.nbytes
    assert first["near_bytes"] - second["near_bytes"] == second["stored_bytes"] - first["stored_bytes"] == standing > 0
    _, longer = read(
        gratis.InfLLM(**SMALL, representatives_in="memory"), *(t.repeat(1, 1, 3, 1) for t in (q, k, v)),
        [40] + [1] * 920, rotation(),
    )  # fmt: skip
    assert longer.report()["near_bytes"] == second["near_bytes"]


def test_rows_look_up_for_themselves():
    method = gratis.InfLLM(**SMALL)
    q, k, v = texts(80, rows=3)
    together, _ = read(method, q, k, v, [32] + [1] * 48, rotation())
    for row in range(3):
        alone, _ = read(method, *(t[row : row + 1] for t in (q, k, v)), [32] + [1] * 48, rotation())
        torch.testing.assert_close(together[row], alone[0], atol=1e-6, rtol=0)


def test_rows_can_be_repeated_in_the_middle_of_a_text():
    method = gratis.InfLLM(**SMALL, store="file")
    q, k, v = texts(70)
    straight, _ = read(method, q, k, v, [50] + [1] * 20, rotation())
    text = Text()
    memory = BlockMemory(method, rotation(), text)
    memory.leave_window()
    memory.read(q[:, :, :50], k[:, :, :50], v[:, :, :50], DIM**-0.5)
    memory.select_rows(torch.tensor([0, 0]))
    for at in range(50, 70):
        parts = (t[:, :, at : at + 1].repeat(2, 1, 1, 1) for t in (q, k, v))
        out = memory.read(*parts, DIM**-0.5)
    torch.testing.assert_close(out[0], straight[0, :, -1:], atol=1e-6, rtol=0)
    torch.testing.assert_close(out[1], straight[0, :, -1:], atol=1e-6, rtol=0)


def test_scores_of_half_precision_keys_are_summed_in_float32():
    q, k, v = (t.half() for t in texts(60))
    _, memory = read(gratis.InfLLM(**SMALL), q, k, v, [60], rotation())
    assert memory.recent.scores(memory.recent.first, 60).dtype == memory.standing.dtype == torch.float32


def test_a_text_that_grows_past_the_window_goes_on_as_one_that_was_long_from_the_start():
    model = tiny.tiny_language_model()
    ids = torch.cat([tiny.prompt(seed=s) for s in (1, 2)], 1)
    with gratis.attach(model, gratis.InfLLM(**{**SMALL, "window": 24})), torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :24])
        assert not first.past_key_values.outgrown
        steps = [first.logits]
        for at in range(24, 80, 8):
            steps.append(model(ids[:, at : at + 8], past_key_values=first.past_key_values).logits)
        assert first.past_key_values.outgrown
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=2e-4, rtol=0)


def test_the_last_token_of_a_prompt_looks_up_for_itself():
    model = tiny.tiny_language_model()
    ids = tiny.prompt()
    with gratis.attach(model, gratis.InfLLM(**SMALL)) as handle, torch.no_grad():
        model(ids)
        plain = handle.report()["infllm"]["lookups"]
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
        assert handle.report()["infllm"]["lookups"] == plain + tiny.LAYERS
        step = model(ids[:, :-1])
        apart = model(ids[:, -1:], past_key_values=step.past_key_values).logits[:, -1]
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
        scores = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        ).logits[0]  # fmt: skip
    torch.testing.assert_close(scores, apart, atol=1e-4, rtol=0)


def test_a_conversation_goes_on_with_the_returned_cache():
    model = tiny.tiny_language_model()
    ids = tiny.prompt()
    with gratis.attach(model, gratis.InfLLM(**SMALL)), torch.no_grad():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, return_dict_in_generate=True
        )
        assert isinstance(out.past_key_values, MemoryCache)
        longer = torch.cat([out.sequences, tiny.prompt(seed=3)[:, :10]], 1)
        on = model.generate(
            longer, attention_mask=torch.ones_like(longer), max_new_tokens=3, do_sample=False,
            past_key_values=out.past_key_values, return_dict_in_generate=True,
        )  # fmt: skip
        assert on.past_key_values.get_seq_length() == longer.shape[1] + 2


def test_it_stacks_with_what_chooses_among_samples():
    model = tiny.tiny_language_model()
    ids = tiny.prompt()
    with gratis.attach(model, gratis.InfLLM(**SMALL), gratis.SelfCertainty(samples=3)) as handle:
        torch.manual_seed(0)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6)
        assert out.shape[1] <= 46
        assert handle.report()["self-certainty"]["samples"] == 3


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"lookup": 17}, "lookup 17 must be at most window 16"),
        ({"hot_blocks": 1}, "hot_blocks 1 must be at least blocks 2"),
        ({"representatives": 5}, "representatives 5 must be at most block 4"),
        ({"blocks": 0}, "blocks"),
    ],
)
def test_contradicting_parameters_are_refused(parameters, message):
    with pytest.raises(ParameterError, match=message):
        gratis.InfLLM(**{**SMALL, **parameters})


def test_a_window_longer_than_the_trained_one_is_refused():
    with pytest.raises(ParameterError, match="window 512 is longer than the model's window of 256"):
        gratis.attach(tiny.tiny_language_model(), gratis.InfLLM(**{**SMALL, "window": 512}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "beams"),
        ({"output_attentions": True}, "output_attentions"),
        ({"cache_implementation": "static"}, "cache_implementation"),
    ],
)
def test_generation_settings_that_contradict_it_are_refused(options, message):
    model = tiny.tiny_language_model()
    model.set_attn_implementation("eager")
    ids = tiny.prompt()
    with gratis.attach(model, gratis.InfLLM(**SMALL)), pytest.raises(InputError, match=message):
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, **options)


def test_rows_of_unequal_length_are_each_read_as_if_alone_past_the_window():
    model = tiny.tiny_language_model()
    ids, mask = tiny.prompt(3), torch.ones(3, 40, dtype=torch.long)
    mask[0, :3] = mask[2, :3] = 0
    with gratis.attach(model, gratis.InfLLM(**{**SMALL, "window": 32})):
        out = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
        for row, padding in enumerate((3, 0, 3)):
            own = ids[row : row + 1, padding:]
            alone = model.generate(own, attention_mask=torch.ones_like(own), max_new_tokens=12, do_sample=False)
            assert torch.equal(out[row, :padding], ids[row, :padding])
            assert torch.equal(out[row, padding:], alone[0])
        with pytest.raises(InputError, match="one at a time"):
            model(ids, attention_mask=mask)
        with pytest.raises(InputError, match="unequal lengths"):
            model.generate(ids, attention_mask=mask, max_new_tokens=12, return_dict_in_generate=True)


def test_a_text_that_memory_cannot_hold_is_refused_before_it_is_read(monkeypatch):
    model = tiny.tiny_language_model()
    ids = tiny.prompt()
    free = type("Free", (), {"available": KEPT_FREE + 60_000})
    monkeypatch.setattr("gratis.subjects.block_store.psutil.virtual_memory", lambda: free)
    with (
        gratis.attach(model, gratis.InfLLM(**SMALL)),
        pytest.raises(MemoryShortError, match=r"about \d+ tokens fit; use store='file'"),
    ):
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4)
    with gratis.attach(model, gratis.InfLLM(**SMALL, store="file")):
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4)


def test_a_model_that_does_not_depend_on_distances_alone_is_refused():
    from transformers import OPTConfig, OPTForCausalLM

    model = OPTForCausalLM(
        OPTConfig(
            hidden_size=16,
            ffn_dim=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=50,
            word_embed_proj_dim=16,
        )
    ).eval()
    with pytest.raises(SubjectError, match="InfLLM"):
        gratis.attach(model, gratis.InfLLM(**SMALL))


@pytest.mark.parametrize("store", ["memory", "file"])
def test_a_copied_cache_goes_its_own_way(store):
    model = tiny.tiny_language_model()
    ids = tiny.prompt()
    with gratis.attach(model, gratis.InfLLM(**SMALL, store=store)), torch.no_grad():
        cache = model(ids).past_key_values
        twin = copy.deepcopy(cache)
        one = [model(ids[:, at : at + 1], past_key_values=cache).logits for at in range(12)]
        other = [model(ids[:, at : at + 1], past_key_values=twin).logits for at in range(12)]
    assert torch.equal(torch.cat(one), torch.cat(other))
    assert twin.get_seq_length() == cache.get_seq_length() == 52


def test_it_stacks_with_branches():
    model = tiny.tiny_language_model()
    ids = tiny.prompt()
    with gratis.attach(model, gratis.InfLLM(**SMALL), gratis.CNTP(**gratis.catalogue["cntp"].card.examples)):
        torch.manual_seed(0)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12)
    assert out.shape[1] == 52


def test_the_length_that_a_memory_budget_names_fits_and_one_block_more_does_not():
    model = tiny.tiny_language_model()
    settings = {"window": 8, "sinks": 2, "block": 4, "blocks": 2, "lookup": 4, "representatives": 2}
    ids = tiny.prompt(seed=3).repeat(1, 2)[:, :53]
    a_token = 4 * 2 * 2 * 8 * 4  # layers, keys and values, key heads, head_dim, bytes
    with gratis.attach(model, gratis.InfLLM(**settings, memory_budget=39.9 * a_token / 2**30)):
        with pytest.raises(MemoryShortError, match="about 46 tokens fit"):
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
        short = ids[:, :45]
        out = model.generate(input_ids=short, attention_mask=torch.ones_like(short), max_new_tokens=1, do_sample=False)
    assert out.shape[1] == 46
