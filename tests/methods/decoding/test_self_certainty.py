"""Self-certainty best-of-N: scores against a second pass and brute force, choices, batches, what it is together with."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import GenerationConfig

import gratis
from gratis.contract.errors import InputError, ParameterError, SubjectError
from gratis.methods.decoding.self_certainty import score
from gratis.subjects.answers import borda
from gratis.subjects.opening import set_tokenizer
from tests import tiny_language as tiny
from tests.architectures.building import build

NEW = 12


def generate(model, ids, seed=0, **options):
    torch.manual_seed(seed)
    options.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(input_ids=ids, max_new_tokens=NEW, **options)


@torch.no_grad()
def forced(model, prompt, response):
    """Mean KL(U ‖ p) over the distributions that drew the response, one float64 softmax at a time."""
    ids = torch.cat([prompt, torch.tensor([response])], dim=1)
    p = model(ids).logits[0, prompt.shape[1] - 1 : -1].double().softmax(-1)
    v = p.shape[-1]
    return float(sum(-(v * row).log().sum() / v for row in p) / len(p))


def responses(model, ids, handle, **options):
    """All samples in the order of drawing, by the report's ranking, with their reported scores."""
    samples = next(iter(handle.methods)).samples
    out = generate(model, ids, num_return_sequences=samples, **options)
    report = next(iter(handle.report().values()))
    rows = [row[ids.shape[1] :].tolist() for row in out]
    drawn = [None] * samples
    for place, sample in enumerate(report["ranking"][0]):
        drawn[sample] = rows[place][: report["lengths"][0][sample]]
    return drawn, report


def test_reported_scores_are_those_of_a_second_pass_at_the_papers_positions():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    with gratis.attach(model, gratis.SelfCertainty(samples=4, temperature=0.7)) as handle:
        drawn, report = responses(model, ids, handle)
    expected = [forced(model, ids, response) for response in drawn]
    assert report["self_certainty"][0] == pytest.approx(expected, abs=1e-4)
    assert score(model, ids, drawn) == pytest.approx(expected, abs=1e-4)
    assert report["ranking"][0] == sorted(range(4), key=lambda i: -expected[i])


def test_the_best_of_the_samples_is_returned():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    with gratis.attach(model, gratis.SelfCertainty(samples=4)) as handle:
        drawn, report = responses(model, ids, handle)
        one = generate(model, ids)
    best = max(range(4), key=lambda i: report["self_certainty"][0][i])
    assert one[0, ids.shape[1] :].tolist() == drawn[best]


def test_scores_ignore_how_tokens_are_drawn():
    """Temperature, top-k and top-p shape the draws; the scores of the same tokens stay those of the raw logits."""
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    for options in ({"temperature": 0.3}, {"top_k": 3}, {"top_p": 0.5}, {"repetition_penalty": 1.5}):
        with gratis.attach(model, gratis.SelfCertainty(samples=3)) as handle:
            drawn, report = responses(model, ids, handle, **options)
        assert report["self_certainty"][0] == pytest.approx([forced(model, ids, r) for r in drawn], abs=1e-4)


def test_the_mean_is_over_each_samples_own_tokens_with_the_last_one_counted():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    ends = list(range(2, 40))
    with gratis.attach(model, gratis.SelfCertainty(samples=6, temperature=1.5)) as handle:
        drawn, report = responses(model, ids, handle, eos_token_id=ends)
    assert len({len(response) for response in drawn}) > 1
    for response, truncated in zip(drawn, report["truncated_samples"][0], strict=True):
        assert truncated == (response[-1] not in ends)
        assert not set(response[:-1]) & set(ends)
    assert report["self_certainty"][0] == pytest.approx([forced(model, ids, r) for r in drawn], abs=1e-4)
    assert report["truncated"] == sum(report["truncated_samples"][0])


def test_the_releases_positions_are_one_token_later():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    response = [5, 6, 7, 8]
    with torch.no_grad():
        logits = model(torch.cat([ids, torch.tensor([response])], 1)).logits[0, ids.shape[1] :].double()
    expected = (logits.logsumexp(-1) - logits.mean(-1) - math.log(tiny.VOCABULARY)).mean().item()
    assert score(model, ids, [response], positions="release") == pytest.approx([expected], abs=1e-4)


def test_recorded_responses_in_batches_and_chunks_are_scored_alike():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    texts = [[5], [6, 7, 8], list(range(10, 40)), [9] * 11]
    expected = [forced(model, ids, text) for text in texts]
    for batch, chunk in ((1, 256), (8, 256), (3, 4), (2, 1)):
        assert score(model, ids, texts, batch=batch, chunk=chunk) == pytest.approx(expected, abs=1e-4)


def test_a_restricted_vocabulary_leaves_out_padded_rows():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    with torch.no_grad():
        logits = model(torch.cat([ids, torch.tensor([[5, 6]])], 1)).logits[0, ids.shape[1] - 1 : -1, :50].double()
    expected = (logits.logsumexp(-1) - logits.mean(-1) - math.log(50)).mean().item()
    assert score(model, ids, [[5, 6]], vocabulary=50) == pytest.approx([expected], abs=1e-4)


def test_what_cannot_be_scored():
    model, other, ids = tiny.tiny_language_model(), tiny.tiny_language_model(seed=1), tiny.prompt()
    with pytest.raises(InputError, match="cross_model=True"):
        score(model, ids, [[5]], generator=other)
    assert score(model, ids, [[5]], generator=other, cross_model=True) == score(model, ids, [[5]])
    with pytest.raises(InputError, match="prompt is empty"):
        score(model, [], [[5]])
    with pytest.raises(ParameterError, match="positions"):
        score(model, ids, [[5]], positions="both")
    with pytest.warns(UserWarning, match="empty response"):
        assert score(model, ids, [[5], []])[1] == -math.inf
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        score(model, ids, [[5]])
    with pytest.raises(InputError, match="not finite"), gratis.attach(model, gratis.SelfCertainty(samples=2)):
        generate(model, ids, suppress_tokens=[3])


class Words:
    """A tokenizer of numbers: token n is the text "n "."""

    def __len__(self):
        return 60

    def decode(self, tokens, skip_special_tokens=True):
        return " ".join(str(int(token)) for token in tokens)


def test_votes_weighted_by_rank_decide_between_answers():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    set_tokenizer(model, Words())
    method = gratis.SelfCertainty(samples=8, select="borda", answer="number", power=0.5, temperature=0.4)
    with gratis.attach(model, method) as handle:
        drawn, report = responses(model, ids, handle, top_k=2)
    answers = [str(response[-1]) for response in drawn]
    assert report["answers"][0] == answers
    vote = borda(report["self_certainty"][0], answers, 0.5)
    assert report["chosen"][0] == vote.index
    assert report["votes"][0] == list(vote.totals)


def test_a_response_without_an_answer_is_never_preferred():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    tokenizer = Words()
    tokenizer.decode = lambda tokens, skip_special_tokens=True: "even 1" if int(tokens[-1]) % 2 == 0 else "odd"
    set_tokenizer(model, tokenizer)
    with gratis.attach(model, gratis.SelfCertainty(samples=8, answer="number", temperature=1.0)) as handle:
        drawn, report = responses(model, ids, handle)
    even = [sample for sample, response in enumerate(drawn) if response[-1] % 2 == 0]
    assert 0 < len(even) < 8
    scores = report["self_certainty"][0]
    assert report["ranking"][0] == sorted(range(8), key=lambda i: (i not in even, -scores[i]))


def test_the_tokenizers_vocabulary():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    set_tokenizer(model, Words())
    with gratis.attach(model, gratis.SelfCertainty(samples=2, vocabulary="tokenizer")) as handle:
        drawn, report = responses(model, ids, handle)
    assert report["self_certainty"][0] == pytest.approx(score(model, ids, drawn, vocabulary=60), abs=1e-4)
    bare = tiny.tiny_language_model()
    with pytest.raises(SubjectError, match="tokenizer"):
        gratis.attach(bare, gratis.SelfCertainty(vocabulary="tokenizer"))


def test_loops_rank_last_when_asked():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    method = gratis.SelfCertainty(samples=6, temperature=0.05, max_repetition=0.2)
    with gratis.attach(model, method) as handle:
        drawn, report = responses(model, ids, handle)
    from gratis.subjects.token_statistics import repeated_share

    loops = [repeated_share(response) > 0.2 for response in drawn]
    order = [loops[sample] for sample in report["ranking"][0]]
    assert order == sorted(order)


def test_the_prompt_is_encoded_once_for_all_samples():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    lengths = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    with gratis.attach(model, gratis.SelfCertainty(samples=5)) as handle:
        generate(model, ids)
        report = next(iter(handle.report().values()))
    assert lengths[0] == (1, tiny.PROMPT - 1)
    assert set(lengths[1:]) == {(5, 1)}
    assert report["prompt_tokens_encoded"] == tiny.PROMPT - 1 + 5
    assert report["generated_tokens"] == 5 * NEW
    assert report["forward_passes"] == len(lengths)


def test_no_logits_are_kept():
    """What the recorder holds after n steps is one number per sample and step."""
    from gratis.subjects.sampling_loop import Recorder
    from gratis.subjects.token_statistics import self_certainty

    recorder = Recorder(self_certainty)
    logits = torch.randn(4, 1000)
    for _ in range(7):
        assert recorder(torch.zeros(4, 1), logits) is logits
    assert recorder.finish(torch.zeros(4, 8)).shape == (7, 4)
    assert sum(step.numel() for step in recorder.steps) == 28
    assert all(step.untyped_storage().nbytes() < 100 for step in recorder.steps)


def test_a_prompt_answers_alike_alone_and_in_a_padded_batch():
    model, ids = tiny.tiny_language_model(), tiny.prompt(2)
    short = ids[1:, -20:]
    padded = torch.cat([ids[:1], torch.nn.functional.pad(short, (20, 0))])
    mask = (padded != 0).long()
    with gratis.attach(model, gratis.SelfCertainty(samples=3)):
        alone = [generate(model, ids[:1]), generate(model, short)]
        both = generate(model, padded, attention_mask=mask)
    assert both[0].tolist() == alone[0][0].tolist()
    assert both[1, -NEW:].tolist() == alone[1][0, -NEW:].tolist()


def test_one_sample_leaves_every_call_to_the_model():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    expected = [
        generate(model, ids, do_sample=False),
        generate(model, ids, do_sample=True),
        generate(model, ids, num_beams=2),
    ]
    with gratis.attach(model, gratis.SelfCertainty(samples=1)):
        again = [
            generate(model, ids, do_sample=False),
            generate(model, ids, do_sample=True),
            generate(model, ids, num_beams=2),
        ]
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))


def test_seeds_make_draws_and_samples_do_not_depend_on_their_number():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    with gratis.attach(model, gratis.SelfCertainty(samples=4, temperature=1.0)) as handle:
        first, _ = responses(model, ids, handle, seed=1)
        again, _ = responses(model, ids, handle, seed=1)
        other, _ = responses(model, ids, handle, seed=2)
    with gratis.attach(model, gratis.SelfCertainty(samples=6, temperature=1.0)) as handle:
        more, _ = responses(model, ids, handle, seed=1)
    assert first == again == more[:4]
    assert first != other


def test_outputs_and_scores_in_the_calls_own_form():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    with gratis.attach(model, gratis.SelfCertainty(samples=3)):
        out = generate(model, ids, return_dict_in_generate=True, output_scores=True, output_logits=True)
        plain = generate(model, ids)
    assert torch.equal(out.sequences, plain)
    assert len(out.scores) == len(out.logits) == NEW
    with torch.no_grad():
        raw = model(out.sequences).logits[0, ids.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.cat(out.logits), raw, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "num_beams"),
        ({"num_return_sequences": 5}, "num_return_sequences"),
        ({"prompt_lookup_num_tokens": 3}, "prompt lookup"),
        ({"streamer": object()}, "streamer"),
        ({"stop_strings": ["x"]}, "tokenizer"),
    ],
)
def test_calls_that_contradict_it_are_refused(options, message):
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    with gratis.attach(model, gratis.SelfCertainty(samples=3)), pytest.raises(InputError, match=message):
        generate(model, ids, **options)


def test_parameters_that_contradict_each_other():
    with pytest.raises(ParameterError, match="answer to vote on"):
        gratis.SelfCertainty(select="borda")
    with pytest.raises(ParameterError, match="power"):
        gratis.SelfCertainty(power=float("inf"))


def test_generation_settings_come_from_the_call_the_config_or_the_method():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    config = GenerationConfig(do_sample=True, temperature=1e-4, pad_token_id=0, max_new_tokens=NEW)
    greedy = generate(model, ids, do_sample=False)
    with gratis.attach(model, gratis.SelfCertainty(samples=3, temperature=5.0)):
        torch.manual_seed(0)
        cold = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        hot = generate(model, ids)
    assert torch.equal(cold, greedy)
    assert not torch.equal(hot, greedy)


def test_it_stacks_with_a_bounded_cache():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    budget = gratis.LaCache(budget=24, sinks=4, span=1)
    with gratis.attach(model, budget, gratis.SelfCertainty(samples=3)) as handle:
        out = generate(model, ids)
        report = handle.report()
    assert out.shape == (1, tiny.PROMPT + NEW)
    assert report["lacache"]["compactions"] > 0
    assert report["lacache"]["entries_per_layer"] <= 26
    assert len(report["self-certainty"]["self_certainty"][0]) == 3


@pytest.mark.parametrize("name", ["gpt2", "mamba", "bloom"])
def test_other_architectures_score_as_a_second_pass_does(name):
    model = build(name)
    ids = torch.randint(3, 90, (1, 10), generator=torch.Generator().manual_seed(0))
    with gratis.attach(model, gratis.SelfCertainty(samples=3)) as handle:
        drawn, report = responses(model, ids, handle)
    assert report["self_certainty"][0] == pytest.approx([forced(model, ids, r) for r in drawn], abs=1e-3)


def test_encoder_decoder_models_score_their_decoders_tokens():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
            pad_token_id=0, eos_token_id=1, initializer_factor=2.0,
        )
    ).eval()  # fmt: skip
    source = torch.randint(2, 60, (1, 9), generator=torch.Generator().manual_seed(0))
    with gratis.attach(model, gratis.SelfCertainty(samples=3)) as handle:
        torch.manual_seed(0)
        out = model.generate(input_ids=source, max_new_tokens=6, num_return_sequences=3)
        report = handle.report()["self-certainty"]
    for place, sample in enumerate(report["ranking"][0]):
        response = out[place, 1 : 1 + report["lengths"][0][sample]]
        with torch.no_grad():
            fed = torch.cat([torch.tensor([0]), response[:-1]])[None]
            logits = model(input_ids=source, decoder_input_ids=fed).logits[0].double()
        expected = (logits.logsumexp(-1) - logits.mean(-1) - math.log(60)).mean().item()
        assert report["self_certainty"][0][sample] == pytest.approx(expected, abs=1e-4)
        assert score(model, source, [response]) == pytest.approx([expected], abs=1e-4)
