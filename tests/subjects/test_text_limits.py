"""How long a text may be, and what would allow a longer one."""

from __future__ import annotations

import pytest
import torch

import gratis
from gratis.contract.errors import InputError, MemoryShortError
from gratis.subjects import memory_need, text_limits
from gratis.subjects.memory_need import Footprint, Free, check_fits, fits
from gratis.subjects.text_limits import UNLIMITED, footprint, free_in_words, in_words, longest_text, room_for
from tests import tiny_language as tiny

GIB = 1 << 30
CPU = torch.device("cpu")


def learned_positions():
    import transformers as hf

    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    return hf.GPT2LMHeadModel(config).eval()


def test_a_prompt_as_long_as_the_window_names_the_methods_that_would_read_it():
    model = tiny.tiny_language_model()
    assert room_for(model, 255) == 1
    allow = [entry.name for entry in gratis.catalogue.select(any_length=True)]
    assert len(allow) >= 3
    with pytest.raises(InputError, match="prompt of 256 tokens leaves no room .* window of 256: shorten it, or") as e:
        room_for(model, 256)
    assert all(name in str(e.value) for name in allow)


def test_with_such_a_method_there_is_no_limit():
    model, method = tiny.tiny_language_model(), gratis.SlidingWindow(budget=24)
    assert room_for(model, 10_000, [method]) == UNLIMITED
    with gratis.attach(model, method):
        assert room_for(model, 10_000) == UNLIMITED
    with pytest.raises(InputError):
        room_for(model, 10_000, [gratis.ZeroTuning()])


def test_a_model_that_no_method_takes_further_is_not_promised_one():
    with pytest.raises(InputError, match=r"window of 64: shorten it\.$"):
        room_for(learned_positions(), 64)


def test_scaling_that_grows_with_the_text_is_part_of_the_length():
    import transformers as hf

    small = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    scaling = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    config = hf.LlamaConfig(**small, intermediate_size=16, max_position_embeddings=64, rope_parameters=scaling)
    assert longest_text(hf.LlamaForCausalLM(config)) == 256


@pytest.mark.parametrize("method", [gratis.Greedy(), gratis.SelfCertainty(samples=2)], ids=lambda m: m.name)
def test_what_chooses_tokens_refuses_prompts_past_the_window_unless_something_holds_them(method):
    model = tiny.tiny_language_model()
    ids = torch.randint(2, tiny.VOCABULARY, (1, 260), generator=torch.Generator().manual_seed(0))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3}
    with gratis.attach(model, method), pytest.raises(InputError, match="leaves no room in LlamaForCausalLM's window"):
        model.generate(ids, **options)
    with gratis.attach(model, gratis.LaCache(budget=24, span=1), method):
        assert model.generate(ids, **options).shape[1] == 263


def test_the_full_cache_is_all_keys_and_values():
    assert footprint(tiny.tiny_language_model(), [gratis.Greedy()], 1000, rows=2) == Footprint(
        device=2 * 1000 * tiny.LAYERS * 2 * 2 * 8 * 4
    )
    assert footprint(learned_positions(), [], 1000) is None


def test_a_full_cache_without_room_names_what_would_hold_the_text(monkeypatch):
    model = tiny.tiny_language_model()
    a_token = tiny.LAYERS * 2 * 2 * 8 * 4
    free = Free(5000 * a_token, 5000 * a_token, GIB)
    for module in (memory_need, text_limits):
        monkeypatch.setattr(module, "free_bytes", lambda where: free)
    assert footprint(model, [], 5000).device == 5000 * a_token
    with pytest.raises(MemoryShortError, match="about 5,000 tokens fit; .* would hold this text") as e:
        footprint(model, [], 8000)
    for named in ("infllm:chunk=512,store=file", "lacache:chunk=512", "sliding-window:chunk=512"):
        assert named in str(e.value)
    chosen = gratis.SlidingWindow(budget=24, chunk=512)
    assert footprint(model, [chosen], 8000) == chosen.footprint(model, 8000)


def test_where_something_does_not_fit_is_named(monkeypatch):
    cuda = torch.device("cuda", 0)
    free = Free(main=2 * GIB, device=GIB, file=3 * GIB)
    monkeypatch.setattr(memory_need, "free_bytes", lambda where: free)
    for where, need, place in (
        (CPU, Footprint(device=GIB, main=GIB + 1), "2.00 GiB of main memory"),
        (cuda, Footprint(device=GIB + 1), "1.00 GiB of the memory of cuda:0"),
        (cuda, Footprint(main=2 * GIB + 1), "2.00 GiB of main memory"),
        (CPU, Footprint(file=4 * GIB), "4.00 GiB of disk for temporary files"),
    ):
        assert not fits(need, where, free)
        with pytest.raises(MemoryShortError, match=f"X needs {place} .* about 7 tokens fit; wait"):
            check_fits("X", where, need, lambda tokens, need=need: need if tokens > 7 else Footprint(), "wait")
    assert fits(Footprint(device=GIB, main=2 * GIB, file=3 * GIB), cuda, free)
    assert in_words(Footprint(GIB, 2 * GIB, 0)) == "1.00 GiB beside the model and 2.00 GiB of main memory"
    assert free_in_words(free, cuda) == "2.00 GiB of main memory, 1.00 GiB on cuda:0, 3.00 GiB for temporary files"
