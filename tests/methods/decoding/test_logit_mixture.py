"""The mixture against means taken by hand, generation without caches, and the bound on its loss."""

from __future__ import annotations

import copy

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config, PreTrainedTokenizerFast, T5Config
from transformers import T5ForConditionalGeneration as T5

import gratis
from gratis.contract.errors import InputError, ParameterError, SubjectError
from gratis.methods.decoding.logit_mixture import LogitMixture, best_of_logits, best_of_probabilities
from gratis.subjects.cache_followers import followers
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
        asked = sum(1 for share in shares if share > 0)
        assert handle.report()["logit-mixture"]["forward_passes"] == 2 * asked
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
        ({"early": "close"}, "set veto, the nats by which an expert may do so, or mode='prob'"),
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


def by_hand(mode, own, scores, targets, share):
    """Mean loss of a mixture of two with weights (share, 1 - share)."""
    w = torch.tensor([share, 1 - share], dtype=torch.float64)
    if mode == "prob":
        return -float((own.double().exp() * w[:, None]).sum(0).log().mean())
    mean = (scores.double() * w[:, None, None]).sum(0)
    return -float(mean.log_softmax(-1).gather(-1, targets[:, None]).mean())


@pytest.mark.parametrize("mode", ["logit", "prob"])
def test_fitted_weights_are_the_best_of_a_grid(experts, mode):
    first, second, _ = experts
    torch.manual_seed(3)
    ids = torch.cat(
        [generated(model, tiny.prompt(), do_sample=True, max_new_tokens=60)[0, 40:] for model in experts[:2]]
    )
    method = LogitMixture(experts=(second,), mode=mode).fitted(first, ids)
    assert method.weights is not None
    assert sum(method.weights) == pytest.approx(1)
    scores = torch.stack([z[0, :-1] for z in logits_of([first, second], ids[None])])
    own = scores.log_softmax(-1).gather(-1, ids[1:].expand(2, -1)[..., None])[..., 0]
    grid = [number / 1000 for number in range(1001)]
    losses = [by_hand(mode, own, scores, ids[1:], share) for share in grid]
    best = min(losses)
    assert by_hand(mode, own, scores, ids[1:], method.weights[0]) <= best + 2e-5
    assert abs(method.weights[0] - grid[losses.index(best)]) < 0.02
    assert 0.05 < method.weights[0] < 0.95


def test_expectation_maximisation_solves_what_can_be_solved_by_hand():
    # One expert is sure of a third of the tokens, the other of the rest; each rules out what the other knows.
    own = torch.tensor([[0.0, -40.0, -40.0], [-40.0, 0.0, 0.0]])
    torch.testing.assert_close(best_of_probabilities(own), torch.tensor([1 / 3, 2 / 3], dtype=torch.float64))
    # p = (0.9, 0.5) and (0.3, 0.6): the derivative of log(0.3 + 0.6 w) + log(0.6 - 0.1 w) is zero at w = 2.75, beyond 1.
    table = torch.tensor([[0.9, 0.5], [0.3, 0.6]]).log()
    assert float(best_of_probabilities(table)[0]) == pytest.approx(1, abs=1e-3)
    # (0.8, 0.1) and (0.2, 0.5): log(0.2 + 0.6 w) + log(0.5 - 0.4 w) is largest at w = 11 / 24.
    table = torch.tensor([[0.8, 0.1], [0.2, 0.5]]).log()
    assert float(best_of_probabilities(table)[0]) == pytest.approx(11 / 24, abs=5e-3)


def test_one_step_of_logits_goes_down_the_gradient_to_the_expert_that_is_right():
    scores = torch.zeros(2, 4, 5)
    scores[0, :, 1], scores[1, :, 2] = 3.0, 3.0
    own = torch.stack([scores[0, :, 1], scores[1, :, 1]])
    assert float(best_of_logits(scores, own)[0]) > 0.999


def test_fitted_weights_of_the_subject_alone_and_of_too_little_text(experts):
    first, second, _ = experts
    assert LogitMixture().fitted(first, tiny.prompt()[0]) == LogitMixture()
    with pytest.raises(InputError, match="at least 2 tokens"):
        LogitMixture(experts=(second,)).fitted(first, torch.tensor([3]))
    words = tokenizer()
    words.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    set_tokenizer(first, words)
    method = LogitMixture(experts=(second,), mode="prob")
    assert method.fitted(first, "w3 w5 w8 w13") == method.fitted(first, torch.tensor([3, 5, 8, 13]))


EARLY = [
    {"mode": "prob", "weights": (0.8, 0.15, 0.05), "early": "close", "tolerance": 0.06},
    {"mode": "logit", "weights": (0.9, 0.08, 0.02), "early": "close", "tolerance": 0.1, "veto": 10.0},
    {"mode": "prob", "weights": (0.6, 0.3, 0.1), "early": "decided"},
    {"mode": "logit", "weights": (0.9, 0.08, 0.02), "early": "decided", "veto": 10.0},
]


@pytest.mark.parametrize("settings", EARLY)
def test_what_is_left_out_moves_no_more_than_promised(experts, settings):
    first, *others = experts
    whole = LogitMixture(experts=tuple(others), **{**settings, "early": "never"})
    ids = tiny.prompt(1)
    left_out = 0
    for length in range(4, 20):
        with gratis.attach(first, whole), torch.no_grad():
            expected = first(input_ids=ids[:, :length], logits_to_keep=1).logits.softmax(-1)
        with gratis.attach(first, whole.replace(early=settings["early"])) as handle, torch.no_grad():
            found = first(input_ids=ids[:, :length], logits_to_keep=1).logits.softmax(-1)
            report = handle.report()["logit-mixture"]
        left_out += report["left_out"]
        assert report["forward_passes"] + report["left_out"] == 3
        if settings["early"] == "decided":
            assert torch.equal(found.argmax(-1), expected.argmax(-1))
        else:
            moved = float((found - expected).abs().sum(-1).max()) / 2
            assert moved <= report["largest_error"] + 1e-6
            assert report["largest_error"] <= settings["tolerance"]
    assert left_out > 0


@pytest.mark.parametrize("settings", EARLY[2:])
@pytest.mark.parametrize("options", [{}, {"num_beams": 1, "prompt_lookup_num_tokens": 3}])
def test_experts_that_were_left_out_read_up_when_they_are_asked(experts, settings, options):
    first, *others = experts
    ids = tiny.prompt(1)
    whole = LogitMixture(experts=tuple(others), **{**settings, "early": "never"})
    with gratis.attach(first, whole):
        expected = generated(first, ids, max_new_tokens=40)
    with gratis.attach(first, whole.replace(early="decided")) as handle:
        found = generated(first, ids, max_new_tokens=40, **options)
        report = handle.report()["logit-mixture"]
    assert torch.equal(found, expected)
    assert 0 < report["left_out"] < 80


def test_beams_take_along_what_is_unread(experts):
    first, second, _ = experts
    ids = tiny.prompt(2)
    settings = {"experts": (second,), "mode": "prob", "weights": (0.9, 0.1)}
    passes = []
    with gratis.attach(first, LogitMixture(**settings)):
        cache = first(input_ids=ids[:, :30]).past_key_values
        expected = first(input_ids=ids[[1, 1], 30:], past_key_values=reordered(cache)).logits
    half = LogitMixture(**settings, early="close", tolerance=0.5)
    with gratis.attach(first, half), torch.no_grad():
        cache = first(input_ids=ids[:, :20]).past_key_values
        assert followers(cache)[0].unread.shape == (2, 20)
        cache = first(input_ids=ids[:, 20:33], past_key_values=cache).past_key_values
        cache.crop(-3)
        passes.append(followers(cache)[0].unread.shape)
        cache = reordered(cache)
    with gratis.attach(first, LogitMixture(**settings)), torch.no_grad():
        found = first(input_ids=ids[[1, 1], 30:], past_key_values=cache).logits
    assert passes == [(2, 30)]
    torch.testing.assert_close(found, expected)


def reordered(cache):
    cache.reorder_cache(torch.tensor([1, 1]))
    return cache


def test_an_expert_without_weight_is_not_asked(experts):
    first, *others = experts
    with gratis.attach(first, LogitMixture(experts=tuple(others), weights=(1.0, 0.0, 1.0))) as handle:
        generated(first, tiny.prompt(), max_new_tokens=5)
        assert handle.report()["logit-mixture"]["forward_passes"] == 10


def test_an_expert_given_by_name_shares_an_equal_table(experts, tmp_path):
    first, *_ = experts
    other = copy.deepcopy(first)
    with torch.no_grad():
        other.get_output_embeddings().weight.mul_(0.5)
    other.config.tie_word_embeddings = False
    other.save_pretrained(tmp_path / "expert")
    tokenizer().save_pretrained(tmp_path / "expert")
    ids = tiny.prompt()
    table = first.get_input_embeddings().weight
    expected = sum(model(input_ids=ids).logits for model in (first, gratis.open(tmp_path / "expert"))) / 2
    with gratis.attach(first, LogitMixture(experts=(str(tmp_path / "expert"),))) as handle:
        torch.testing.assert_close(first(input_ids=ids).logits, expected)
        assert handle.report()["logit-mixture"]["shared_bytes"] == table.numel() * 4
