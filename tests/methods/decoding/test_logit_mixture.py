"""The mixture against means taken by hand, generation without caches, and the bound on its loss."""

from __future__ import annotations

import copy

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config, PreTrainedTokenizerFast, T5Config
from transformers import T5ForConditionalGeneration as T5

import gratis
from gratis.contract.errors import InputError, ParameterError, SubjectError
from gratis.methods.decoding.logit_mixture import LogitMixture
from gratis.subjects.opening import set_tokenizer
from tests import tiny_language as tiny

NEW = 20


def tokenizer(swapped=()):
    words = {f"w{number}": number for number in range(tiny.VOCABULARY)}
    for one, other in swapped:
        words[f"w{one}"], words[f"w{other}"] = other, one
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))


@pytest.fixture
def experts():
    """Two Llamas and a GPT-2 of one vocabulary."""
    config = GPT2Config(
        vocab_size=tiny.VOCABULARY, n_embd=24, n_layer=2, n_head=2, n_positions=128, initializer_range=0.3,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(5)
    found = [tiny.tiny_language_model(0), tiny.tiny_language_model(1), AutoModelForCausalLM.from_config(config).eval()]
    for model in found:
        set_tokenizer(model, tokenizer())
    return found


def logits_of(models, ids, **options):
    with torch.no_grad():
        return [model(input_ids=ids, **options).logits.double() for model in models]


def generated(model, ids, mask=None, **options):
    torch.manual_seed(0)
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    return model.generate(input_ids=ids, attention_mask=mask, **options)


@pytest.mark.parametrize("mode", ["logit", "prob"])
@pytest.mark.parametrize(("weights", "temperatures"), [(None, None), ((1.0, 0.0, 3.0), None), (None, (1.0, 0.5, 2.0))])
def test_the_mean_is_that_taken_by_hand(experts, mode, weights, temperatures):
    ids = tiny.prompt(2)
    shares = torch.tensor(weights or (1.0, 1.0, 1.0), dtype=torch.float64)
    shares = shares / shares.sum()
    each = [z / t for z, t in zip(logits_of(experts, ids), temperatures or (1, 1, 1), strict=True)]
    if mode == "prob":
        expected = sum(w * z.softmax(-1) for w, z in zip(shares, each, strict=True)).log()
    else:
        expected = sum(w * z for w, z in zip(shares, each, strict=True))
    first, *others = experts
    method = LogitMixture(experts=tuple(others), weights=weights, mode=mode, temperatures=temperatures)
    with gratis.attach(first, method) as handle:
        got = first(input_ids=ids).logits
        assert first(input_ids=ids, logits_to_keep=1).logits.shape[1] == 1
        assert handle.report()["logit-mixture"]["forward_passes"] == 6
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-4)


def test_the_loss_is_never_above_the_weighted_mean_of_the_experts(experts):
    ids, shares = tiny.prompt(4), (0.2, 0.5, 0.3)
    each = [z.log_softmax(-1)[:, :-1] for z in logits_of(experts, ids)]
    targets = ids[:, 1:, None]
    losses = [-z.gather(-1, targets) for z in each]
    mean = sum(w * loss for w, loss in zip(shares, losses, strict=True))
    log_z = sum(w * z for w, z in zip(shares, each, strict=True)).logsumexp(-1, keepdim=True)
    first, *others = experts
    with gratis.attach(first, LogitMixture(experts=tuple(others), weights=shares)), torch.no_grad():
        found = first(input_ids=ids, labels=ids)
    loss = -found.logits[:, :-1].double().log_softmax(-1).gather(-1, targets)
    torch.testing.assert_close(loss, mean + log_z, rtol=0, atol=1e-4)
    assert bool((log_z <= 0).all())
    assert float(found.loss) == pytest.approx(float(loss.mean()), abs=1e-5)
    with gratis.attach(first, LogitMixture(experts=tuple(others), weights=shares, mode="prob")), torch.no_grad():
        loss = -first(input_ids=ids).logits[:, :-1].double().log_softmax(-1).gather(-1, targets)
    for w, own in zip(shares, losses, strict=True):
        assert bool((loss <= own - torch.tensor(w).log() + 1e-4).all())
    assert bool((loss <= mean + 1e-4).all())


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True}]
)
def test_caches_do_not_change_what_is_generated(experts, options):
    first, *others = experts
    ids = tiny.prompt(2)
    alone = generated(first, ids, **options)
    with gratis.attach(first, LogitMixture(experts=tuple(others))):
        cached = generated(first, ids, **options)
        plain = generated(first, ids, use_cache=False, **options)
        looked_up = generated(first, ids[:1], prompt_lookup_num_tokens=3) if not options else None
    assert torch.equal(cached, plain)
    assert not torch.equal(cached, alone)
    if looked_up is not None:
        # Drafts that are refused are cut from every cache.
        assert torch.equal(looked_up, cached[:1])
        row = ids
        for _ in range(NEW):
            mean = sum(z[:, -1] for z in logits_of(experts, row)) / 3
            row = torch.cat([row, mean.argmax(-1, keepdim=True)], dim=1)
        assert torch.equal(cached, row)


@pytest.mark.parametrize("options", [{}, {"num_beams": 4}, {"do_sample": True}])
@pytest.mark.parametrize("mode", ["logit", "prob"])
def test_copies_of_a_model_are_that_model(experts, options, mode):
    model, ids = experts[0], tiny.prompt(2)
    expected = generated(model, ids, **options)
    twin = copy.deepcopy(model)
    set_tokenizer(twin, tokenizer())
    with gratis.attach(model, LogitMixture(experts=(model, twin), mode=mode)):
        assert torch.equal(generated(model, ids, **options), expected)


def test_a_copied_cache_goes_on_by_itself(experts):
    first, *others = experts
    ids = tiny.prompt()
    with gratis.attach(first, LogitMixture(experts=tuple(others))), torch.no_grad():
        whole = first(input_ids=ids).logits
        cache = first(input_ids=ids[:, :30]).past_key_values
        copied = copy.deepcopy(cache)
        cache.crop(-20)
        torch.testing.assert_close(first(input_ids=ids[:, 30:], past_key_values=copied).logits, whole[:, 30:])
        torch.testing.assert_close(first(input_ids=ids[:, 10:], past_key_values=cache).logits, whole[:, 10:])


def test_one_weight_alone_is_that_expert(experts):
    first, second, _ = experts
    expected = generated(second, tiny.prompt())
    with gratis.attach(first, LogitMixture(experts=(second,), weights=(0.0, 2.0))):
        assert torch.equal(generated(first, tiny.prompt()), expected)


def test_prompts_of_different_lengths_are_generated_as_alone(experts):
    first, *others = experts
    ids = tiny.prompt(2)
    mask = torch.ones_like(ids)
    mask[1, :15], ids[1, :15] = 0, 0
    with gratis.attach(first, LogitMixture(experts=tuple(others))):
        both = generated(first, ids, mask)
        alone = generated(first, ids[1:, 15:])
    assert torch.equal(both[1, 15:], alone[0])


def test_everything_is_as_it_was_afterwards(experts):
    first, *others = experts
    generated(first, tiny.prompt())
    before, expected = [tiny.snapshot(model) for model in experts], tiny.run(first)
    with gratis.attach(first, LogitMixture(experts=tuple(others))):
        generated(first, tiny.prompt(), num_beams=2)
    assert [tiny.snapshot(model) for model in experts] == before
    assert torch.equal(tiny.run(first), expected)


def test_different_tokens_are_refused_by_name(experts):
    first, second, third = experts
    set_tokenizer(second, tokenizer(swapped=[(3, 8)]))
    with pytest.raises(
        SubjectError, match=r"2 token ids differ between them: 3 is 'w3' and 'w8', 8 is 'w8' and 'w3'\."
    ):
        gratis.attach(first, LogitMixture(experts=(third, second)))
    second.resize_token_embeddings(tiny.VOCABULARY + 3)
    with pytest.raises(SubjectError, match="the models have 97 and 100"):
        gratis.attach(first, LogitMixture(experts=(second,)))
    encoder = T5(T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=97)).eval()
    with pytest.raises(SubjectError, match="has an encoder"):
        gratis.attach(first, LogitMixture(experts=(encoder,)))
    assert "forward" not in vars(first)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": (1.0, 1.0, 1.0)}, "weights must be 2 numbers"),
        ({"weights": (1.0, -1.0)}, "must not be negative"),
        ({"weights": (0.0, 0.0)}, "one must be above 0"),
        ({"temperatures": (1.0,)}, "temperatures must be 2 numbers"),
        ({"temperatures": (1.0, 0.0)}, "must be above 0"),
    ],
)
def test_parameters_that_are_refused(settings, message):
    with pytest.raises(ParameterError, match=message):
        LogitMixture(experts=("other",), **settings)


def test_calls_that_are_refused(experts):
    first, second, _ = experts
    ids = tiny.prompt()
    cache = DynamicCache(config=first.config)
    first(input_ids=ids, past_key_values=cache)
    with gratis.attach(first, LogitMixture(experts=(second,))):
        with pytest.raises(InputError, match="not filled by the mixture"):
            first(input_ids=ids[:, :1], past_key_values=cache)
        with pytest.raises(InputError, match="pass input_ids"):
            first(inputs_embeds=torch.zeros(1, 3, 32))
        with pytest.raises(InputError, match="padding mask"):
            first(input_ids=ids, attention_mask=torch.zeros(1, 1, 40, 40))
