"""What users expect of every method that keeps a text in memory, whatever it keeps."""

from __future__ import annotations

import io

import pytest
import torch

import gratis
from gratis.contract.errors import InputError, MemoryShortError, SubjectError
from gratis.subjects import memory_need
from gratis.subjects.bounded_cache import BoundedCache
from gratis.subjects.language import CachedLayer, Rotation
from gratis.subjects.progress_bar import PatientBar, shown_elsewhere
from tests import tiny_language as tiny

METHODS = {
    "sliding-window": gratis.SlidingWindow(budget=24),
    "lacache": gratis.LaCache(budget=24, span=1),
    "infllm": gratis.InfLLM(window=16, sinks=2, block=4, blocks=2, lookup=8, hot_blocks=4, representatives=2),
}
every = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
OPTIONS = {"max_new_tokens": 6, "do_sample": False}


def generate(model, ids, **options):
    return model.generate(ids, attention_mask=torch.ones_like(ids), **{**OPTIONS, **options})


class Heard:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.pieces = []

    def put(self, value):
        self.pieces.append(value.flatten().tolist())

    def end(self):
        self.pieces.append("end")


@every
def test_tokens_stream_as_they_are_written(method):
    model, ids, heard = tiny.tiny_language_model(), tiny.prompt(), Heard()
    with gratis.attach(model, method):
        out = generate(model, ids, streamer=heard)
    assert heard.pieces == [ids[0].tolist(), *([token] for token in out[0, 40:].tolist()), "end"]


@every
def test_sampling_follows_the_seed(method):
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    with gratis.attach(model, method):
        drawn = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            drawn.append(generate(model, ids, do_sample=True, temperature=2.0, max_new_tokens=12))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("name", METHODS)
def test_beams_are_the_models_own_while_the_text_is_kept_whole(name):
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    plain = generate(model, ids, num_beams=3)
    size = "window" if name == "infllm" else "budget"
    with gratis.attach(model, METHODS[name].replace(**{size: 100})):
        assert torch.equal(generate(model, ids, num_beams=3), plain)


@every
def test_rows_of_unequal_length_are_written_as_if_alone(method):
    model, ids, mask = tiny.tiny_language_model(), tiny.prompt(3), torch.ones(3, 40, dtype=torch.long)
    mask[1, :7] = 0
    with gratis.attach(model, method):
        out = model.generate(ids, attention_mask=mask, num_return_sequences=2, do_sample=True, top_k=1, **{
            "max_new_tokens": 5
        })  # fmt: skip
        for row, padding in enumerate((0, 7, 0)):
            alone = generate(model, ids[row : row + 1, padding:], max_new_tokens=5)[0]
            for copy in (2 * row, 2 * row + 1):
                assert torch.equal(out[copy, padding:], alone)


@every
def test_padding_behind_a_prompt_is_refused(method):
    model, ids, mask = tiny.tiny_language_model(), tiny.prompt(2), torch.ones(2, 40, dtype=torch.long)
    mask[1, -4:] = 0
    with gratis.attach(model, method), pytest.raises(InputError, match="unequal lengths"):
        model.generate(ids, attention_mask=mask, **OPTIONS)


@every
def test_a_cache_passed_back_goes_on_and_must_be_of_the_same_text(method):
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    with gratis.attach(model, method):
        first = generate(model, ids, return_dict_in_generate=True)
        longer = torch.cat([first.sequences, tiny.prompt(seed=5)[:, :9]], 1)
        again = generate(model, longer, past_key_values=first.past_key_values, return_dict_in_generate=True)
        assert again.past_key_values is first.past_key_values
        assert again.past_key_values.get_seq_length() == longer.shape[1] + 5
        with pytest.raises(InputError, match=r"has read 60 tokens and the prompt has 40"):
            generate(model, ids, past_key_values=again.past_key_values)


@every
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_cache": False}, "use_cache=False"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"cache_implementation": "offloaded"}, "cache_implementation"),
    ],
)
def test_settings_of_generate_that_contradict_are_refused(method, options, message):
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    with gratis.attach(model, method), pytest.raises(InputError, match=message):
        generate(model, ids, **options)


@every
def test_an_assistant_is_refused(method):
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    with gratis.attach(model, method), pytest.raises(InputError, match="an assistant needs: leave out assistant_model"):
        generate(model, ids, assistant_model=tiny.tiny_language_model())


@every
@torch.no_grad()
def test_caches_built_by_hand_are_refused(method):
    from transformers import DynamicCache, StaticCache
    from transformers.cache_utils import DynamicSlidingWindowLayer

    model, ids = tiny.tiny_language_model(), tiny.prompt()
    sliding = DynamicCache()
    sliding.layers = [DynamicSlidingWindowLayer(sliding_window=8) for _ in range(tiny.LAYERS)]
    quantized = type("QuantizedCache", (DynamicCache,), {})()
    filled = model(ids).past_key_values
    with gratis.attach(model, method):
        for cache, message in (
            (StaticCache(config=model.config, max_cache_len=90), "cannot use a StaticCache"),
            (sliding, "cannot use a DynamicCache"),
            (quantized, "cannot use a QuantizedCache"),
            (filled, "from its start"),
        ):
            with pytest.raises(InputError, match=message):
                model(ids, past_key_values=cache)
        assert torch.equal(model(ids, past_key_values=DynamicCache()).logits, model(ids).logits)


def refused_models():
    import transformers as hf

    small = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama = {**small, "intermediate_size": 16, "num_key_value_heads": 2, "max_position_embeddings": 64}
    yield (
        "encoder",
        hf.T5ForConditionalGeneration(
            hf.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ),
    )
    yield "rotary|turn", hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2))
    yield (
        "rotary|turn|position_ids",
        hf.BloomForCausalLM(hf.BloomConfig(vocab_size=50, hidden_size=16, n_layer=2, n_head=2)),
    )
    yield (
        "dynamic",
        hf.LlamaForCausalLM(
            hf.LlamaConfig(**llama, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
        ),
    )
    yield "sliding-window", hf.MistralForCausalLM(hf.MistralConfig(**llama, sliding_window=8))
    yield (
        "recurrent",
        hf.Mamba2ForCausalLM(
            hf.Mamba2Config(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_heads=4, head_dim=8, state_size=4)
        ),
    )
    yield "evaluation mode", tiny.tiny_language_model().train()


@pytest.mark.filterwarnings("ignore")
def test_models_whose_past_cannot_be_moved_are_refused():
    for reason, model in refused_models():
        model = model if reason == "evaluation mode" else model.eval()
        for method in METHODS.values():
            with pytest.raises(SubjectError) as caught:
                gratis.attach(model, method)
            if reason != "recurrent":
                assert any(word in str(caught.value) for word in reason.split("|")), str(caught.value)


@every
def test_a_text_that_cannot_fit_is_refused_with_the_length_that_would(method, monkeypatch):
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    need = method.footprint(model, 46)
    room = need.device + need.main - 1
    monkeypatch.setattr(memory_need, "free_bytes", lambda where: memory_need.Free(room, room, 0))
    calls = []
    with gratis.attach(model, method), model.register_forward_hook(lambda *a: calls.append(1)):
        with pytest.raises(MemoryShortError, match=r"about \d+ tokens fit") as caught:
            generate(model, ids)
        assert calls == []
        fits = int(str(caught.value).split("about ")[1].split()[0])
        fitting = method.footprint(model, fits)
        assert fits < 46
        assert fitting.device + fitting.main <= room
        generate(model, ids[:, : fits - 6])


def test_estimates_hold_what_is_really_taken():
    model = tiny.tiny_language_model()
    ids = torch.randint(2, tiny.VOCABULARY, (2, 200), generator=torch.Generator().manual_seed(0))
    for name, method in METHODS.items():
        with gratis.attach(model, method.replace(chunk=16)) as handle, torch.no_grad():
            cache = generate(model, ids, return_dict_in_generate=True).past_key_values
            report = handle.report()[name]
        taken = cache.bytes if name == "infllm" else report["peak_cache_bytes"]
        need = method.replace(chunk=16).footprint(model, 206, rows=2)
        assert taken <= need.device + need.main <= 4 * taken, name


@every
def test_only_infllm_grows_with_the_text(method):
    model = tiny.tiny_language_model()
    small, large = (method.replace(chunk=16).footprint(model, n) for n in (1000, 10_000))
    apart = method.replace(chunk=16, store="file").footprint(model, 10_000) if "store" in method.parameters() else large
    # One vector per block and head stays on the device: it is what tells which blocks to fetch.
    vectors = tiny.LAYERS * 32 * 4 * (10_000 // 4) * 3 // 2 if method.name == "infllm" else 0
    assert apart.device <= small.device + vectors
    assert (apart.file > 0) == ("store" in method.parameters())


@every
@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError])
def test_running_out_of_memory_in_the_middle_says_where_and_what_would_fit(method, kind):
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    before = tiny.snapshot(model)
    with gratis.attach(model, method.replace(chunk=10)):
        expected = generate(model, ids)
        passes = []

        def fail(module, args):
            passes.append(1)
            if len(passes) == 3:
                raise kind("CUDA out of memory. Tried to allocate 2 GiB")

        handle = model.model.layers[2].register_forward_pre_hook(fail)
        with pytest.raises(
            MemoryShortError, match=r"after 20 tokens of a text of 40 \(read 10 at a time\).* would fit"
        ):
            generate(model, ids)
        handle.remove()
        assert torch.equal(generate(model, ids), expected)
    assert tiny.snapshot(model) == before


@every
def test_a_cache_whose_pass_was_interrupted(method):
    """What evicts has only the whole of a piece or none of it; a memory of blocks may have a part, and says so."""
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    with gratis.attach(model, method), torch.no_grad():
        plain = model(ids[:, :30]).past_key_values
        expected = model(ids[:, 30:], past_key_values=plain).logits
        cache = model(ids[:, :30]).past_key_values

        def fail(module, args):
            raise KeyboardInterrupt

        handle = model.model.layers[2].register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, 30:], past_key_values=cache)
        handle.remove()
        if method.name == "infllm":
            with pytest.raises(InputError, match="start the text again"):
                model(ids[:, 30:], past_key_values=cache)
        else:
            torch.testing.assert_close(model(ids[:, 30:], past_key_values=cache).logits, expected)


@every
def test_gradients_are_refused_in_a_sentence(method):
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    with gratis.attach(model, method), pytest.raises(InputError, match=r"torch\.no_grad"):
        model(ids)


@pytest.mark.parametrize("name", ["sliding-window", "lacache"])
@torch.no_grad()
def test_prompts_longer_than_the_trained_window_are_read_in_pieces(name):
    model = tiny.tiny_language_model()
    ids = torch.randint(2, tiny.VOCABULARY, (1, 300), generator=torch.Generator().manual_seed(0))
    seen = []
    with (
        gratis.attach(model, METHODS[name]),
        model.register_forward_hook(lambda m, a, k, o: seen.append(k["input_ids"].shape[1]), with_kwargs=True),
    ):
        out = generate(model, ids)
        assert out.shape == (1, 306)
        assert max(seen) <= 256 - 24
        assert sum(seen) == 305
        cache = model(ids[:, :30]).past_key_values
        with pytest.raises(InputError, match=r"cannot read 250 tokens more at once: pass pieces of at most 232"):
            model(ids[:, :250], past_key_values=cache)


@every
def test_layers_sent_elsewhere_by_a_device_map(method, tmp_path):
    from accelerate import disk_offload

    model, ids = tiny.tiny_language_model(), tiny.prompt()
    with gratis.attach(model, method):
        expected = generate(model, ids)
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    with gratis.attach(model, method):
        assert torch.equal(generate(model, ids), expected)


def test_keys_stay_on_the_device_of_their_layer():
    turn = Rotation(torch.tensor([1.0, 0.1]), False, 0)
    devices = [torch.device(name) for name in ("cpu", "meta", "meta", "cpu")]
    layers = [CachedLayer(turn, 2, 4, 4, device) for device in devices]
    cache = BoundedCache(gratis.SlidingWindow(budget=6, sinks=2), layers, None, "SlidingWindow")
    for _ in range(5):
        cache.begin(3)
        for index, device in enumerate(devices):
            keys = torch.randn(1, 2, 3, 4).to(device)
            held, values = cache.layers[index].update(keys, keys)
            assert held.device == values.device == device
        cache.finish(3)
    assert cache.stored == 6
    assert [sorted(block.layers) for block in cache._blocks] == [[0, 3], [1, 2]]


@every
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_either_implementation_of_attention_carries_it(method, attention):
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    with gratis.attach(model, method):
        expected = generate(model, ids)
    model.set_attn_implementation(attention)
    with gratis.attach(model, method):
        assert torch.equal(generate(model, ids), expected)


@every
def test_self_certainty_goes_over_it(method):
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    with gratis.attach(model, method, gratis.SelfCertainty(samples=2)) as handle:
        torch.manual_seed(0)
        assert generate(model, ids).shape[1] <= 46
        assert handle.report()["self-certainty"]["samples"] == 2


@pytest.mark.parametrize("name", ["sliding-window", "lacache"])
@torch.no_grad()
def test_zero_tuning_goes_with_what_keeps_the_first_token(name):
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    with gratis.attach(model, METHODS[name]):
        alone = model(ids, use_cache=True).logits
    with gratis.attach(model, METHODS[name], gratis.ZeroTuning(scale=3.0)):
        both = model(ids, use_cache=True).logits
    with gratis.attach(model, METHODS[name], gratis.ZeroTuning(scale=1.0)):
        assert torch.equal(model(ids, use_cache=True).logits, alone)
    assert not torch.equal(alone, both)


@every
def test_a_chat_template_is_a_prompt_like_any_other(method):
    from transformers import AutoTokenizer

    from gratis.subjects.embedded import embedded_folder

    tokenizer = AutoTokenizer.from_pretrained(embedded_folder("smollm2"))
    talk = [{"role": "user", "content": "Name three colours of the rainbow, and say which you like."}]
    inputs = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    inputs["input_ids"] %= tiny.VOCABULARY
    model = tiny.tiny_language_model()
    with gratis.attach(model, method):
        out = model.generate(**inputs, **OPTIONS)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 6 > 24 + 6


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_appears_on_a_terminal_when_it_takes_long(monkeypatch):
    for error, patience, elsewhere, appears in (
        (Terminal(), 0.0, False, True),
        (Terminal(), 1000.0, False, False),
        (Terminal(), 0.0, True, False),
        (io.StringIO(), 0.0, False, False),
    ):
        monkeypatch.setattr("sys.stderr", error)
        monkeypatch.setattr("gratis.subjects.progress_bar.PATIENCE", patience)
        with shown_elsewhere() if elsewhere else io.StringIO(), PatientBar(30, "InfLLM reads") as bar:
            bar.advance(10)
            bar.advance(10)
            bar.advance(10)
        assert ("InfLLM reads" in error.getvalue()) == appears


@every
@pytest.mark.evidence
def test_a_compiled_model_computes_the_same(method):
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    torch.compiler.reset()
    with gratis.attach(model, method), torch.no_grad():
        logits = []
        for run in (model, torch.compile(model, backend="eager")):
            cache, outs = None, []
            for begin, end in ((0, 20), (20, 40), (3, 4), (7, 8)):
                out = run(ids[:, begin:end], past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                outs.append(out.logits)
            logits.append(torch.cat(outs, 1))
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)
