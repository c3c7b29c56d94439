"""Guidance against two passes taken by hand without caches, marginals by enumeration, and its limits."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    pipeline,
)

import gratis
from gratis.contract.errors import InputError, ParameterError, SubjectError
from gratis.methods.decoding.guided_captioning import GuidedCaptioning
from gratis.subjects.opening import set_tokenizer
from tests import tiny_captioners as tiny
from tests import tiny_language

NEW = 9
KINDS = [*tiny.BUILD]


def tokenizer(shift=0, size=tiny.VOCABULARY):
    words = {f"w{(number + shift) % size}": number for number in range(size)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w3")))


@pytest.fixture(scope="module")
def captioners():
    built = {kind: build() for kind, build in tiny.BUILD.items()}
    for model in built.values():
        set_tokenizer(model, tokenizer())
        model.generation_config.eos_token_id = None
    built["blip"].config.text_config.sep_token_id = None
    return built


def generated(model, given, **options):
    torch.manual_seed(0)
    # A text that stands for pictures itself cannot be read by hand.
    options = {"max_new_tokens": NEW, "do_sample": False, "suppress_tokens": [tiny.IMAGE], **options}
    return model.generate(**{name: value.clone() for name, value in given.items()}, **options)


def start_of(kind, given):
    """The tokens (rows, length) that the text begins with."""
    if kind == "encoder-decoder":
        return torch.full((len(given["pixel_values"]), 1), tiny.BOS)
    return given["input_ids"][:, :-1] if kind == "blip" else given["input_ids"]


@torch.no_grad()
def looking(kind, model, ids, pixels):
    """log p(next | ids, pictures), (rows, V), everything read anew."""
    if kind == "encoder-decoder":
        seen = model.encoder(pixel_values=pixels).last_hidden_state
        logits = model.decoder(input_ids=ids, encoder_hidden_states=seen).logits
    elif kind == "blip":
        seen = model.vision_model(pixel_values=pixels)[0]
        logits = model.text_decoder(input_ids=ids, encoder_hidden_states=seen).logits
    else:
        logits = model(input_ids=ids, pixel_values=pixels).logits
    return logits[:, -1].double().log_softmax(-1)


@torch.no_grad()
def blind(kind, model, ids, null):
    """log p(next | ids), (rows, V), by leaving the picture out."""
    if kind == "llava":
        places = ids == tiny.IMAGE
        if null == "zeros":
            embedded = model.get_input_embeddings()(ids).masked_fill(places[..., None], 0)
            logits = model(inputs_embeds=embedded).logits
        else:
            logits = model(input_ids=ids[~places].view(len(ids), -1)).logits
    elif kind == "git":
        logits = model(input_ids=ids).logits
    else:
        seen = None if null == "absent" else torch.zeros(len(ids), 5, 16)
        decoder = model.decoder if kind == "encoder-decoder" else model.text_decoder
        logits = decoder(input_ids=ids, encoder_hidden_states=seen).logits
    return logits[:, -1].double().log_softmax(-1)


def by_hand(kind, model, given, step, count=NEW):
    """Greedy tokens where `step(ids)` gives scores (rows, V)."""
    ids = start_of(kind, given)
    for _ in range(count):
        ids = torch.cat([ids, step(ids)[:, : tiny.IMAGE].argmax(-1, keepdim=True)], dim=1)
    return ids


WAYS = [(kind, null) for kind in KINDS for null in ("absent", "zeros") if (kind, null) != ("git", "zeros")]


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 3.0])
@pytest.mark.parametrize(("kind", "null"), WAYS)
def test_greedy_captions_are_those_of_two_passes_by_hand(captioners, kind, null, gamma):
    model, given = captioners[kind], tiny.prompt(kind)

    def step(ids):
        c, u = looking(kind, model, ids, given["pixel_values"]), blind(kind, model, ids, null)
        return u + gamma * (c - u)

    expected = by_hand(kind, model, given, step)
    with gratis.attach(model, GuidedCaptioning(gamma=gamma, null=null)) as handle:
        found = generated(model, given)
        uncached = generated(model, given, use_cache=False)
        report = handle.report()["guided-captioning"]
    assert torch.equal(found, expected)
    assert torch.equal(uncached, expected)
    assert report["passes_without_picture"] == report["forward_passes"] == 2 * NEW


@pytest.mark.parametrize("kind", KINDS)
def test_gamma_zero_is_blind_and_gamma_one_is_the_model(captioners, kind):
    model, given = captioners[kind], tiny.prompt(kind)
    other = {**given, "pixel_values": tiny.pictures(2, seed=7)}
    plain, of_other = generated(model, given), generated(model, other)
    assert not torch.equal(plain, of_other)
    with gratis.attach(model, GuidedCaptioning(gamma=1.0, null="absent")):
        assert torch.equal(generated(model, given), plain)
    with gratis.attach(model, GuidedCaptioning(gamma=1.0, null="absent", cut=1e-9)):
        # The whole path with guidance that changes nothing.
        assert torch.equal(generated(model, given), plain)
    with gratis.attach(model, GuidedCaptioning(gamma=0.0, null="absent")):
        assert torch.equal(generated(model, given), generated(model, other))
    assert torch.equal(generated(model, given), plain)


def test_the_base_is_the_blind_side():
    c, u = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.2, 0.5, 0.3]).log()
    found = GuidedCaptioning(gamma=2.0, null="absent").combine(c, u).exp()
    weights = torch.tensor([0.5**2 / 0.2, 0.3**2 / 0.5, 0.2**2 / 0.3])
    torch.testing.assert_close(found, weights / weights.sum())
    ruled_out = GuidedCaptioning(gamma=2.0, null="absent").combine(
        torch.tensor([0.0, -math.inf]), torch.tensor([-1.0, -math.inf])
    )
    assert ruled_out.tolist() == [0.0, -math.inf]
    q = torch.tensor([0.1, 0.1, 0.8]).log()
    method = GuidedCaptioning(null="absent", lm="x", alpha=0.5, beta=3.0)
    weights = torch.tensor([0.1**0.5 * 2.5**3, 0.1**0.5 * 0.6**3, 0.8**0.5 * (2 / 3) ** 3])
    torch.testing.assert_close(method.combine(c, u, q).exp(), weights / weights.sum())
    cut = GuidedCaptioning(gamma=2.0, null="absent", cut=0.5).combine(c, u).exp()
    torch.testing.assert_close(cut, torch.tensor([1.25, 0.18, 0.0]) / 1.43)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_normalised_and_other_processors_come_after_guidance(captioners, kind):
    model, given = captioners[kind], tiny.prompt(kind)
    start = start_of(kind, given).shape[1]
    seen = []

    def watch(input_ids, scores):
        seen.append(scores.clone())
        return scores

    with gratis.attach(model, GuidedCaptioning(gamma=2.0, null="absent")):
        plain = generated(model, given, logits_processor=[watch], suppress_tokens=None)
        out = generated(
            model, given, output_logits=True, output_scores=True, return_dict_in_generate=True, repetition_penalty=5.0,
            do_sample=True, top_k=5,
        )  # fmt: skip
    for scores in seen:
        torch.testing.assert_close(scores.logsumexp(-1), torch.zeros(2), rtol=0, atol=1e-4)
    expected = []
    for place in range(start, out.sequences.shape[1]):
        ids = out.sequences[:, :place]
        c, u = looking(kind, model, ids, given["pixel_values"]), blind(kind, model, ids, "absent")
        expected.append((u + 2 * (c - u)).log_softmax(-1))
    for logits, by_two_passes, scores in zip(out.logits, expected, out.scores, strict=True):
        torch.testing.assert_close(logits.double(), by_two_passes, rtol=0, atol=2e-4)
        assert bool((scores.isfinite().sum(-1) <= 5).all())
    assert not torch.equal(out.sequences, plain)


@pytest.mark.parametrize("kind", ["encoder-decoder", "blip"])
def test_a_wide_beam_finds_the_best_of_all_captions(captioners, kind):
    model, given = captioners[kind], {name: value[:1] for name, value in tiny.prompt(kind).items()}
    start = start_of(kind, given)
    pairs = torch.tensor(list(itertools.product(range(tiny.VOCABULARY), repeat=2)))
    first = start.expand(1, -1)
    table = []
    for ids in (first, torch.cat([first.expand(50, -1), torch.arange(50)[:, None]], dim=1)):
        c = looking(kind, model, ids, given["pixel_values"].expand(len(ids), -1, -1, -1))
        u = blind(kind, model, ids, "zeros")
        table.append((u + 2.5 * (c - u)).log_softmax(-1))
    totals = table[0][0, pairs[:, 0]] + table[1][pairs[:, 0], pairs[:, 1]]
    with gratis.attach(model, GuidedCaptioning(gamma=2.5, null="zeros")):
        out = generated(
            model, given, max_new_tokens=2, num_beams=tiny.VOCABULARY, length_penalty=0.0, suppress_tokens=None, output_scores=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    assert torch.equal(out.sequences[0, -2:], pairs[totals.argmax()])
    assert float(out.sequences_scores[0]) == pytest.approx(float(totals.max()), abs=1e-4)


@pytest.mark.parametrize(("kind", "null"), WAYS)
def test_beams_keep_every_side_with_its_text(captioners, kind, null):
    model, given = captioners[kind], tiny.prompt(kind)
    with gratis.attach(model, GuidedCaptioning(gamma=2.0, null=null)):
        cached = generated(model, given, num_beams=3, num_return_sequences=2)
        plain = generated(model, given, num_beams=3, num_return_sequences=2, use_cache=False)
    assert torch.equal(cached, plain)


OTHERS = tiny.pictures(3, seed=5)


@pytest.mark.parametrize("kind", KINDS)
def test_other_pictures_are_weighted_by_how_well_they_explain_the_caption(captioners, kind):
    model, given = captioners[kind], tiny.prompt(kind)
    start = start_of(kind, given).shape[1]

    def step(ids):
        c = looking(kind, model, ids, given["pixel_values"])
        each = []
        for other in OTHERS:
            pixels = other.expand(2, -1, -1, -1)
            so_far = torch.zeros(2, dtype=torch.float64)
            for place in range(start, ids.shape[1]):
                so_far += looking(kind, model, ids[:, :place], pixels).gather(1, ids[:, place : place + 1])[:, 0]
            each.append((so_far, looking(kind, model, ids, pixels)))
        weights = torch.stack([so_far for so_far, _ in each]).softmax(0)
        u = sum(w[:, None] * scores.exp() for w, (_, scores) in zip(weights, each, strict=True)).log()
        return u + 2 * (c - u)

    expected = by_hand(kind, model, given, step, count=5)
    method = GuidedCaptioning(gamma=2.0, null="others", pictures=OTHERS)
    with gratis.attach(model, method):
        assert torch.equal(generated(model, given, max_new_tokens=5), expected)
        beams = generated(model, given, num_beams=3)
        assert torch.equal(beams, generated(model, given, num_beams=3, use_cache=False))


@pytest.mark.parametrize("kind", ["encoder-decoder", "llava"])
def test_the_marginal_of_a_caption_is_the_mean_over_the_pictures(captioners, kind):
    model, given = captioners[kind], tiny.prompt(kind)
    start = start_of(kind, given)
    whole = torch.cat([start, torch.tensor([[4, 9, 30, 7], [12, 12, 3, 41]])], dim=1)

    def likelihood(pixels):
        total = torch.zeros(2, dtype=torch.float64)
        for place in range(start.shape[1], whole.shape[1]):
            total += looking(kind, model, whole[:, :place], pixels).gather(1, whole[:, place : place + 1])[:, 0]
        return total

    own = likelihood(given["pixel_values"])
    mean = torch.stack([likelihood(other.expand(2, -1, -1, -1)) for other in OTHERS]).logsumexp(0) - math.log(3)
    found = GuidedCaptioning(null="others", pictures=OTHERS).scores(model, whole, **given)
    torch.testing.assert_close(found.likelihood.double(), own, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.information.double(), own - mean, rtol=0, atol=2e-4)
    assert found.lengths.tolist() == [4, 4]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_captions_are_those_of_their_generation(captioners, kind):
    model, given = captioners[kind], tiny.prompt(kind)
    method = GuidedCaptioning(gamma=2.0, null="absent")
    with gratis.attach(model, method):
        out = generated(model, given, output_logits=True, return_dict_in_generate=True)
    start = start_of(kind, given).shape[1]
    chosen = torch.stack(out.logits, dim=1).gather(-1, out.sequences[:, start:, None])[..., 0]
    found = method.scores(model, out.sequences, **{name: value.clone() for name, value in given.items()})
    torch.testing.assert_close(found.guided, chosen, rtol=0, atol=1e-4)
    assert "forward" not in vars(model)
    with pytest.raises(InputError, match="that generate returned"):
        method.scores(model, out.sequences[:, :start], **{name: value.clone() for name, value in given.items()})


def test_what_comes_after_the_end_of_a_caption_counts_nothing(captioners):
    model, given = captioners["encoder-decoder"], tiny.prompt("encoder-decoder")
    model = copy.deepcopy(model)
    model.generation_config.eos_token_id = tiny.EOS
    rows = torch.tensor([[1, 8, 2, 0, 0], [1, 8, 2, 9, 30]])
    given = {"pixel_values": given["pixel_values"][:1].expand(2, -1, -1, -1)}
    found = GuidedCaptioning(gamma=2.0).scores(model, rows, **given)
    assert found.lengths.tolist() == [2, 2]
    assert float(found.information[0]) == pytest.approx(float(found.information[1]), abs=1e-5)
    assert found.guided[:, 2:].abs().sum() == 0


def test_every_token_is_read_once_by_each_side_and_the_picture_once(captioners):
    model, given = captioners["encoder-decoder"], tiny.prompt("encoder-decoder")
    read, seen = [], []
    hooks = [
        model.decoder.transformer.register_forward_pre_hook(lambda module, args: read.append(tuple(args[0].shape))),
        model.encoder.register_forward_pre_hook(lambda module, args: seen.append(1)),
    ]
    with gratis.attach(model, GuidedCaptioning(gamma=2.0)):
        generated(model, given)
    assert read == [(2, 1)] * (2 * NEW)
    assert len(seen) == 1
    read.clear()
    seen.clear()
    with gratis.attach(model, GuidedCaptioning(gamma=2.0, null="others", pictures=OTHERS)):
        generated(model, given)
    assert read == [(2, 1), (6, 1)] * NEW
    assert len(seen) == 2
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("null", ["grey", "mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_another_picture_in_the_place_of_none(captioners, kind, null):
    model, given = captioners[kind], tiny.prompt(kind)
    instead = torch.zeros(2, 3, 8, 8) if null == "grey" else OTHERS.mean(0).expand(2, -1, -1, -1)

    def step(ids):
        c, u = looking(kind, model, ids, given["pixel_values"]), looking(kind, model, ids, instead)
        return u + 2 * (c - u)

    settings = {"pictures": OTHERS} if null == "mean" else {}
    with gratis.attach(model, GuidedCaptioning(gamma=2.0, null=null, **settings)):
        assert torch.equal(generated(model, given), by_hand(kind, model, given, step))


class Decoder(GPT2LMHeadModel):
    """The text side of the captioner as a language model."""


@pytest.fixture
def language(captioners):
    decoder = captioners["encoder-decoder"].decoder
    model = Decoder(decoder.config).eval()
    model.load_state_dict(decoder.state_dict())
    set_tokenizer(model, tokenizer())
    return model


def test_a_language_model_that_is_the_blind_side_gives_plain_guidance(captioners, language):
    model, given = captioners["encoder-decoder"], tiny.prompt("encoder-decoder")
    with gratis.attach(model, GuidedCaptioning(gamma=2.5, null="absent")):
        expected = generated(model, given)
    with gratis.attach(model, GuidedCaptioning(null="absent", lm=language, beta=2.5)) as handle:
        assert torch.equal(generated(model, given), expected)
        assert handle.report()["guided-captioning"]["passes_of_the_language_model"] == NEW
        beams = generated(model, given, num_beams=3)
        assert torch.equal(beams, generated(model, given, num_beams=3, use_cache=False))


@pytest.mark.parametrize("mapped", [False, True])
def test_a_language_model_reads_its_own_prompt(captioners, mapped):
    torch.manual_seed(4)
    size = 60 if mapped else tiny.VOCABULARY
    lm = GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=16, n_layer=1, n_head=2, initializer_range=0.6)).eval()
    set_tokenizer(lm, tokenizer(size=size))
    model, given = captioners["encoder-decoder"], tiny.prompt("encoder-decoder")
    table = [(number * 7 + 3) % 60 for number in range(tiny.VOCABULARY)] if mapped else [*range(tiny.VOCABULARY)]
    if mapped:
        table[17] = -1
    prompt = torch.tensor([[8]] * 2)

    def step(ids):
        c, u = (
            looking("encoder-decoder", model, ids, given["pixel_values"]),
            blind("encoder-decoder", model, ids, "zeros"),
        )
        text = torch.cat([prompt, torch.tensor(table)[ids[:, 1:]]], dim=1)
        with torch.no_grad():
            q = lm(input_ids=text).logits[:, -1].double().log_softmax(-1)[:, torch.tensor(table)]
        if mapped:
            q[:, 17] = -math.inf
        return 0.7 * q + 1.5 * (c - u)

    expected = by_hand("encoder-decoder", model, given, step)
    method = GuidedCaptioning(lm=lm, lm_prompt="w8", alpha=0.7, beta=1.5, lm_tokens=tuple(table) if mapped else None)
    with gratis.attach(model, method):
        assert torch.equal(generated(model, given), expected)
        assert 17 not in generated(model, given) or not mapped


def test_a_row_of_a_padded_batch_is_that_row_alone(captioners):
    model, given = captioners["llava"], tiny.prompt("llava")
    ids = torch.cat([torch.zeros(2, 3, dtype=torch.long), given["input_ids"]], dim=1)
    ids[0, :3], mask = 5, torch.ones_like(ids)
    mask[1, :3] = 0
    padded = {"pixel_values": given["pixel_values"], "input_ids": ids, "attention_mask": mask}
    alone = {name: value[1:] for name, value in given.items()}
    for null in ("absent", "zeros"):
        with gratis.attach(model, GuidedCaptioning(gamma=2.0, null=null)):
            assert torch.equal(generated(model, padded)[1, 3:], generated(model, alone)[0])


def test_a_language_model_is_guided_by_its_prompt():
    model = tiny_language.tiny_language_model()
    ids = tiny_language.prompt(2)

    row = ids
    for _ in range(NEW):
        with torch.no_grad():
            c, u = (model(part).logits[:, -1].double().log_softmax(-1) for part in (row, row[:, ids.shape[1] - 1 :]))
        scores = u + 1.5 * (c - u)
        scores[:, tiny.IMAGE] = -math.inf
        row = torch.cat([row, scores.argmax(-1, keepdim=True)], dim=1)
    with gratis.attach(model, GuidedCaptioning(gamma=1.5, null="absent")):
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        assert torch.equal(generated(model, given), row)
        one = {name: value[:1] for name, value in given.items()}
        # Drafts that are refused are taken back on both sides.
        assert torch.equal(generated(model, one, prompt_lookup_num_tokens=3), row[:1])
    # The same arithmetic as that of transformers, which reads the blind side in its own way.
    with gratis.attach(model, GuidedCaptioning(gamma=1.5, null="absent")):
        found = generated(model, one)
    assert torch.equal(found, generated(model, one, guidance_scale=1.5))


def test_drafts_are_taken_back_from_the_marginal_too(captioners):
    model, given = captioners["llava"], {name: value[:1] for name, value in tiny.prompt("llava").items()}
    with gratis.attach(model, GuidedCaptioning(gamma=2.0, null="others", pictures=OTHERS)):
        expected = generated(model, given, max_new_tokens=16)
        assert torch.equal(generated(model, given, max_new_tokens=16, prompt_lookup_num_tokens=2), expected)


def test_everything_is_as_it_was_after_an_exception(captioners):
    model, given = captioners["blip"], tiny.prompt("blip")
    expected = generated(model, given)

    def stop(input_ids, scores):
        raise KeyboardInterrupt

    before = tiny_language.snapshot(model)
    with pytest.raises(KeyboardInterrupt), gratis.attach(model, GuidedCaptioning(gamma=2.0, null="absent")):
        generated(model, given, logits_processor=[stop])
    assert tiny_language.snapshot(model) == before
    assert torch.equal(generated(model, given), expected)
    with gratis.attach(model, GuidedCaptioning(gamma=2.0, null="absent")):
        with pytest.raises(KeyboardInterrupt):
            generated(model, given, logits_processor=[stop])
        # Outside generate nothing is guided.
        ids = torch.tensor([[1, 5]])
        plain = model.text_decoder(input_ids=ids, encoder_hidden_states=torch.zeros(1, 5, 16)).logits
    assert torch.equal(model.text_decoder(input_ids=ids, encoder_hidden_states=torch.zeros(1, 5, 16)).logits, plain)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": -1.0}, "gamma"),
        ({"gamma": math.inf}, "gamma"),
        ({"null": "others"}, "needs pictures"),
        ({"null": "others", "pictures": OTHERS[:1]}, "at least two"),
        ({"null": "absent", "pictures": OTHERS}, "pictures go with"),
        ({"beta": 2.0}, "go with a language model"),
        ({"cut": 0.0}, "cut"),
    ],
)
def test_parameters_that_are_refused(settings, message):
    with pytest.raises(ParameterError, match=message):
        GuidedCaptioning(**settings)


def test_subjects_that_are_refused(captioners):
    for kind in ("blip", "llava", "git"):
        with pytest.raises(SubjectError, match="does not say that it was trained with dropped pictures"):
            gratis.attach(captioners[kind], GuidedCaptioning())
    with pytest.raises(SubjectError, match="cannot be set to zero"):
        gratis.attach(captioners["git"], GuidedCaptioning(null="zeros"))
    with pytest.raises(SubjectError, match="takes no pictures"):
        gratis.attach(tiny_language.tiny_language_model(), GuidedCaptioning(null="grey"))
    recurrent = MambaForCausalLM(MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=1, vocab_size=97))
    with pytest.raises(SubjectError, match="keeps a state of another kind"):
        gratis.attach(recurrent.eval(), GuidedCaptioning(null="absent"))
    encoder = T5ForConditionalGeneration(
        T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=97)
    )
    with pytest.raises(SubjectError, match="reads something else"):
        gratis.attach(encoder.eval(), GuidedCaptioning(null="zeros"))
    lm = tiny_language.tiny_language_model()
    set_tokenizer(lm, tokenizer(shift=1))
    with pytest.raises(SubjectError, match="50 token ids differ between them: 0 is 'w0' and 'w1'"):
        gratis.attach(captioners["encoder-decoder"], GuidedCaptioning(lm=lm))
    with pytest.raises(SubjectError, match="lm_tokens has the id 97"):
        gratis.attach(captioners["encoder-decoder"], GuidedCaptioning(lm=lm, lm_tokens=(97,)))


def test_calls_that_are_refused(captioners):
    model, given = captioners["llava"], tiny.prompt("llava")
    with gratis.attach(model, GuidedCaptioning(gamma=2.0, null="absent")):
        with pytest.raises(InputError, match="leave out guidance_scale"):
            generated(model, given, guidance_scale=2.0)
        with pytest.raises(InputError, match="prefill_chunk_size"):
            generated(model, given, prefill_chunk_size=2)
    with (
        gratis.attach(model, GuidedCaptioning(gamma=2.0, null="others", pictures=torch.zeros(2, 3, 4, 4))),
        pytest.raises(InputError, match=r"are \(3, 4, 4\), and those to describe \(3, 8, 8\)"),
    ):
        generated(model, given)


def test_a_pipeline_is_guided_as_generate_is():
    model = tiny_language.tiny_language_model()
    words = tokenizer(size=tiny_language.VOCABULARY)
    words.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    write = pipeline("text-generation", model=model, tokenizer=words)
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    ids = words("w3 w5 w8 w13", return_tensors="pt").input_ids
    plain = write("w3 w5 w8 w13", **options)
    with gratis.attach(model, GuidedCaptioning(gamma=3.0, null="absent")):
        guided = write("w3 w5 w8 w13", **options)
        expected = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)[0, 4:]
    assert guided[0]["generated_text"].split() == words.decode(expected).split()
    assert guided != plain
