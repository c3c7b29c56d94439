"""What holds and what tunes attention over a long text, on a CUDA device: the answers of a processor, near and far."""

from __future__ import annotations

import contextlib
import copy
import shutil

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

import gratis
from gratis.contract.errors import MemoryShortError
from tests import tiny_language as tiny

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
INFLLM = {
    "window": 16, "sinks": 2, "block": 4, "blocks": 2, "lookup": 8, "hot_blocks": 4, "representatives": 2,
}  # fmt: skip
METHODS = {
    "sliding-window": (gratis.SlidingWindow(budget=24),),
    "lacache": (gratis.LaCache(budget=24, span=1),),
    "infllm": (gratis.InfLLM(**INFLLM),),
    "infllm, every head": (gratis.InfLLM(**INFLLM, per_head=True, eviction="lru-s"),),
    "infllm, file": (gratis.InfLLM(**INFLLM, store="file"),),
    "infllm, device": (gratis.InfLLM(**INFLLM, store="device"),),
    "block-top-k": (gratis.BlockTopK(blocks=2, block=4, window=6, sinks=3),),
    "zero-tuning": (gratis.ZeroTuning(scale=3.0),),
    "zero-tuning and lacache": (gratis.LaCache(budget=24, span=1), gratis.ZeroTuning(scale=3.0)),
    "zero-tuning and infllm": (gratis.InfLLM(**INFLLM), gratis.ZeroTuning(scale=3.0)),
    "zero-tuning and block top-k": (
        gratis.BlockTopK(blocks=2, block=4, window=6, sinks=3),
        gratis.ZeroTuning(scale=3.0),
    ),
}
every = pytest.mark.parametrize("methods", METHODS.values(), ids=METHODS)


def text(length: int = 90) -> torch.Tensor:
    return torch.randint(2, tiny.VOCABULARY, (2, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def read(model, methods, ids, piece=30):
    """Logits of a text that comes in pieces, its last tokens one by one; and the cache."""
    ids, cache, logits = ids.to(model.device), None, []
    sizes = [piece] * (ids.shape[1] // piece - 1)
    sizes += [1] * (ids.shape[1] - sum(sizes))
    with gratis.attach(model, *methods) if methods else contextlib.nullcontext():
        for part in ids.split(sizes, 1):
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits.float().cpu())
    return torch.cat(logits, 1), cache


@every
def test_the_answers_are_those_of_a_processor(methods):
    model, ids = tiny.tiny_language_model(), text()
    expected, _ = read(model, methods, ids)
    got, _ = read(model.to(DEVICE), methods, ids)
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=2e-3)


@every
def test_half_precision_is_as_near_as_the_model_itself_is(methods):
    """A token whose block is chosen by a hair may go another way, so the middle of the errors is compared."""
    exact, coarse, ids = tiny.tiny_language_model(), tiny.tiny_language_model().to(torch.bfloat16).to(DEVICE), text()

    def error(on):
        return (read(exact, on, ids)[0] - read(coarse, on, ids)[0]).abs().median()

    assert error(methods) <= 4 * error(()) + 1e-3


@every
def test_generate_writes_what_a_processor_writes(methods):
    model, ids = tiny.tiny_language_model(), text(60)
    options = {"max_new_tokens": 12, "do_sample": False}
    with gratis.attach(model, *methods):
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    there = ids.to(DEVICE)
    with gratis.attach(model.to(DEVICE), *methods):
        out = model.generate(there, attention_mask=torch.ones_like(there), **options)
    assert out.device.type == DEVICE
    assert torch.equal(out.cpu(), expected)


@pytest.mark.parametrize("name", ["sliding-window", "lacache"])
def test_a_bounded_cache_lives_on_the_device_and_stays_there(name):
    _, cache = read(tiny.tiny_language_model(dtype=torch.bfloat16).to(DEVICE), METHODS[name], text(200))
    for layer in cache.layers:
        assert layer.keys.device.type == layer.values.device.type == DEVICE
        assert layer.keys.dtype == torch.bfloat16
        assert layer.keys.shape[2] <= 25


@pytest.mark.parametrize("name", ["infllm", "infllm, file", "infllm, device"])
def test_blocks_lie_where_they_were_sent_and_only_hot_ones_near(name):
    [method] = METHODS[name]
    ids = text(200)
    _, cache = read(tiny.tiny_language_model(dtype=torch.bfloat16).to(DEVICE), [method], ids)
    for memory in cache.memories:
        place = {"memory": "cpu", "file": "cpu", "device": DEVICE}[method.store]
        stored = memory.store.parts
        assert {part.memory.device.type for part in stored} == {place}
        assert all(part.memory.is_pinned() for part in stored) == (method.store == "memory")
        assert memory.keys.device.type == DEVICE
        report = memory.report()
        assert report["blocks"] >= 40
        assert (report["hot_hits"] > 0) == (method.store != "device")
    whole = 2 * 200 * tiny.LAYERS * 2 * 2 * 8 * 2
    near = sum(memory.report()["near_bytes"] for memory in cache.memories)
    need = method.footprint(tiny.tiny_language_model(dtype=torch.bfloat16).to(DEVICE), 200, rows=2)
    assert near <= need.device
    assert [need.main > 0, need.file > 0] == [method.store == "memory", method.store == "file"]
    assert need.device + need.main + need.file >= whole


@pytest.mark.parametrize("name", ["sliding-window", "lacache", "zero-tuning and lacache"])
@torch.no_grad()
def test_a_token_needs_no_other_kernel_than_flash_attention(name):
    model, ids = tiny.tiny_language_model(dtype=torch.bfloat16).to(DEVICE), text(60).to(DEVICE)
    with gratis.attach(model, *METHODS[name]):
        cache = model(ids[:, :40], use_cache=True).past_key_values
        kernels = [SDPBackend.FLASH_ATTENTION]
        if "zero-tuning" in name:
            # One number per head and key is added to a token's logits, which flash attention has no place for.
            kernels.append(SDPBackend.EFFICIENT_ATTENTION)
        with sdpa_kernel(kernels):
            for at in range(40, 60):
                logits = model(ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits
    assert logits.isfinite().all()


def test_a_copied_memory_goes_its_own_way():
    model, ids = tiny.tiny_language_model().to(DEVICE), text().to(DEVICE)
    with gratis.attach(model, *METHODS["infllm"]), torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        twin = copy.deepcopy(cache)
        for at in range(8):
            one = model(ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits
            other = model(ids[:, at : at + 1], past_key_values=twin, use_cache=True).logits
    assert torch.equal(one, other)


def test_a_device_without_room_is_a_sentence_and_nothing_stays():
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=97, max_position_embeddings=65536, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().to(DEVICE)
    model.set_attn_implementation("eager")
    ids = torch.randint(2, 97, (1, 20000), device=DEVICE)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, 1e9 / torch.cuda.mem_get_info()[1]))
    try:
        with gratis.attach(model, gratis.SlidingWindow(budget=1024)):
            with pytest.raises(MemoryShortError, match=r"ran out of memory after 0 tokens of a text of 20,000"):
                model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, prefill_chunk_size=512)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert out.shape == (1, 20002)


def test_layers_on_two_devices():
    accelerate = pytest.importorskip("accelerate")
    model, ids = tiny.tiny_language_model(), text(60)
    for methods in (METHODS["lacache"], METHODS["infllm"]):
        expected, _ = read(model, methods, ids)
        places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 0, "lm_head": 0}
        places |= {f"model.layers.{n}": 0 if n < 2 else "cpu" for n in range(tiny.LAYERS)}
        split = accelerate.dispatch_model(copy.deepcopy(model), places, main_device=0)
        got, _ = read(split, methods, ids)
        torch.testing.assert_close(got, expected, atol=2e-3, rtol=2e-3)


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize("name", ["lacache", "infllm", "block-top-k", "zero-tuning"])
@torch.no_grad()
def test_a_model_compiled_for_the_device_computes_the_same(name):
    model, ids = tiny.tiny_language_model().to(DEVICE), text(48)[:1]
    torch.compiler.reset()
    expected, _ = read(model, METHODS[name], ids, piece=16)
    compiled = torch.compile(model)
    with gratis.attach(model, *METHODS[name]):
        cache, logits = None, []
        for part in ids.to(DEVICE).split([16, 16, *[1] * 16], 1):
            out = compiled(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits.cpu())
    torch.testing.assert_close(torch.cat(logits, 1), expected, atol=2e-3, rtol=2e-3)
