"""Cautious next token prediction: against a plain reference that reads the whole text at every step."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from scipy.stats import chisquare
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
)

import gratis
from gratis.contract.errors import InputError, ParameterError, SubjectError
from gratis.methods.decoding.cntp import _seed
from gratis.subjects import branching
from gratis.subjects.generate_door import prompt_seeds
from gratis.subjects.opening import set_tokenizer
from tests import tiny_language as tiny
from tests.architectures.building import build
from tests.subjects.test_generate_door import letters

STOPS = (3, 5, 7, 11, 13, 17, 19, 23)
NEW = 24


def cautious(**options):
    return gratis.CNTP(
        **{"max_trials": 4, "temperature": 1.0, "top_p": 1.0, "stop_tokens": STOPS, "max_trial_tokens": 5, **options}
    )


def generate(model, ids, seed=0, **options):
    torch.manual_seed(seed)
    options.setdefault("attention_mask", torch.ones_like(ids))
    options.setdefault("max_new_tokens", NEW)
    return model.generate(input_ids=ids, **options)


def warped(logits, ids, temperature=1.0, top_p=1.0, penalty=1.0):
    """The distribution that tokens are drawn from, by the definitions: scores (1, vocabulary) with -inf for the cut."""
    scores = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.float()) / temperature
    if top_p < 1:
        p, order = scores.softmax(-1).sort(descending=True)
        cut = p.cumsum(-1) - p >= top_p
        scores = scores.masked_fill(torch.zeros_like(cut).scatter(-1, order, cut), -math.inf)
    return scores


@torch.no_grad()
def reference(model, ids, method, greedy=False, new=NEW, ends=(), **warp):
    """Algorithm 1, one trial after the other and without a cache. Returns the new tokens and the cautious steps."""
    torch.manual_seed(0)
    ((seed,),) = prompt_seeds([{"input_ids": ids}], 1)
    single, steps, end = torch.Generator().manual_seed(seed), [], ids.shape[1] + new

    def draw(scores, generator):
        noise = torch.empty_like(scores).exponential_(generator=generator)
        return (scores - noise.log()).argmax(-1)

    def finished(text):
        return text.shape[1] >= end or int(text[0, -1]) in ends

    text = ids
    while not finished(text):
        p = warped(model(text).logits[:, -1], text, **warp).double().softmax(-1)
        entropy = float(-(p * (p + 1e-10).log()).sum())
        share = (entropy - method.min_entropy) / (method.max_entropy - method.min_entropy)
        count = math.floor(1 + (method.max_trials - 1) * min(max(share, 0), 1))
        if count == 1:
            scores = warped(model(text).logits[:, -1], text, **warp)
            token = scores.argmax(-1) if greedy else draw(scores, single)
            text = torch.cat([text, token[None]], 1)
            continue
        trials, perplexities = [], []
        for trial in range(count):
            generator, grown, logs = torch.Generator().manual_seed(_seed(seed, len(steps), trial)), text, []
            while True:
                scores = warped(model(grown).logits[:, -1], grown, **warp)
                token = draw(scores, generator)
                logs.append(float(scores.double().log_softmax(-1)[0, token]))
                grown = torch.cat([grown, token[None]], 1)
                if int(token) in method.stop_tokens or finished(grown) or len(logs) == method.max_trial_tokens:
                    break
            trials.append(grown)
            perplexities.append(math.exp(-sum(logs) / len(logs)))
        chosen = perplexities.index(min(perplexities))
        lengths = [grown.shape[1] - text.shape[1] for grown in trials]
        steps.append((text.shape[1], entropy, count, chosen, perplexities, lengths))
        text = trials[chosen]
    return text[0, ids.shape[1] :].tolist(), steps


def compared(report):
    return [
        (s["at"], s["entropy"], s["trials"], s["chosen"], s["perplexities"], s["lengths"]) for s in report["steps"][0]
    ]


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize(
    "warp",
    [
        {"temperature": 0.6},
        {"temperature": 1.2},
        {"temperature": 0.8, "top_p": 0.7},
        {"temperature": 1.0, "penalty": 1.4},
    ],
    ids=str,
)
def test_tokens_entropies_and_perplexities_are_the_references(warp, greedy):
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    method = cautious(max_entropy=4.2, max_trials=9, temperature=warp["temperature"], top_p=warp.get("top_p", 1.0))
    tokens, steps = reference(model, ids, method, greedy, **warp)
    options = {"repetition_penalty": warp["penalty"]} if "penalty" in warp else {}
    with gratis.attach(model, method) as handle:
        out = generate(model, ids, **options, **({"do_sample": False} if greedy else {}))
        report = handle.report()["cntp"]
    assert out[0, tiny.PROMPT :].tolist() == tokens
    found = compared(report)
    assert len({step[2] for step in steps}) > 1
    assert [step[0] for step in found] == [step[0] for step in steps]
    for mine, theirs in zip(found, steps, strict=True):
        assert mine[1] == pytest.approx(theirs[1], abs=1e-4)
        assert mine[2:4] == theirs[2:4]
        assert mine[4] == pytest.approx(theirs[4], rel=1e-3)
        assert mine[5] == theirs[5]


def test_costs_are_counted():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    passes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    with gratis.attach(model, cautious(max_entropy=4.0)) as handle:
        branching.heeds_branches(model)
        passes.clear()
        generate(model, ids)
        report = handle.report()["cntp"]
    steps = report["steps"][0]
    dropped = sum(sum(step["lengths"]) - step["lengths"][step["chosen"]] for step in steps)
    assert report["generated_tokens"] == NEW + dropped
    assert report["cautious_steps"] == [len(steps)]
    assert report["cautious_tokens"] == [sum(step["lengths"][step["chosen"]] for step in steps)]
    assert report["forward_passes"] == len(passes)
    assert report["forward_tokens"] == [sum(passes)]


@pytest.mark.parametrize("how", ["copies", "groups", "one by one", "no cache"])
def test_branches_decode_alike_however_the_prefix_is_held(how, monkeypatch):
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    with gratis.attach(model, cautious()) as handle:
        expected = generate(model, ids, return_dict_in_generate=True)
        steps = handle.report()["cntp"]["steps"][0]
        passes = handle.report()["cntp"]["forward_passes"]
    monkeypatch.setattr(branching, "heeds_branches", lambda model: False)
    if how == "one by one":
        monkeypatch.setattr(branching, "can_repeat", lambda cache: False)
    options = {"use_cache": False} if how == "no cache" else {}
    with gratis.attach(model, cautious(together=2 if how == "groups" else None)) as handle:
        out = generate(model, ids, return_dict_in_generate=True, **options)
        again = handle.report()["cntp"]
    assert torch.equal(out.sequences, expected.sequences)
    assert [step["lengths"] for step in again["steps"][0]] == [step["lengths"] for step in steps]
    if how in {"groups", "one by one"}:
        assert again["forward_passes"] > passes
    for result in (expected, out):
        if result.past_key_values is None:
            continue
        cache = result.past_key_values
        assert cache.get_seq_length() == out.sequences.shape[1] - 1
        with torch.no_grad():
            after = model(out.sequences[:, -1:], past_key_values=cache).logits[:, -1]
            whole = model(out.sequences).logits[:, -1]
        torch.testing.assert_close(after, whole, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neo", "bloom", "mamba", "gemma2", "qwen3", "qwen3_next"])
def test_other_architectures_follow_the_reference(name):
    model = build(name)
    ids = torch.randint(3, 90, (1, 24), generator=torch.Generator().manual_seed(0))
    method = cautious(temperature=0.7)
    tokens, steps = reference(model, ids, method, new=12, ends=(2,), temperature=0.7)
    with gratis.attach(model, method) as handle:
        out = generate(model, ids, max_new_tokens=12, eos_token_id=2)
        report = handle.report()["cntp"]
    assert out[0, 24:].tolist() == tokens
    assert [step["lengths"] for step in report["steps"][0]] == [step[5] for step in steps]
    assert steps


def test_encoder_decoder_models_branch_their_decoder():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
            pad_token_id=0, eos_token_id=1, initializer_factor=2.0,
        )
    ).eval()  # fmt: skip
    source = torch.randint(2, 60, (1, 9), generator=torch.Generator().manual_seed(0))
    with gratis.attach(model, cautious()) as handle:
        torch.manual_seed(0)
        out = model.generate(input_ids=source, max_new_tokens=9, return_dict_in_generate=True, output_logits=True)
        assert handle.report()["cntp"]["cautious_steps"][0] > 0
    with torch.no_grad():
        whole = model(input_ids=source, decoder_input_ids=out.sequences).logits[0, :-1]
    torch.testing.assert_close(torch.cat(out.logits), whole, atol=1e-3, rtol=1e-3)


def test_one_trial_is_the_models_own_sampling():
    model, ids = tiny.tiny_language_model(), tiny.prompt(2)
    expected = generate(model, ids, do_sample=True, temperature=0.7)
    with gratis.attach(model, cautious(max_trials=1)):
        assert torch.equal(generate(model, ids, do_sample=True, temperature=0.7), expected)


def test_a_threshold_that_is_never_reached_is_plain_sampling():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    with gratis.attach(model, gratis.Sampling(temperature=0.7)):
        expected = generate(model, ids)
    with gratis.attach(model, cautious(temperature=0.7, top_p=0.9, max_entropy=1e9)) as handle:
        assert torch.equal(generate(model, ids), expected)
        assert handle.report()["cntp"]["cautious_steps"] == [0]


def test_a_single_surviving_token_starts_no_trials():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    greedy = generate(model, ids, do_sample=False)
    with gratis.attach(model, cautious(min_entropy=0.0, max_entropy=0.1)) as handle:
        assert torch.equal(generate(model, ids, top_k=1), greedy)
        assert handle.report()["cntp"]["cautious_steps"] == [0]


def test_of_trials_of_one_token_the_likeliest_drawn_is_kept():
    """With two candidates, every token a mark and n trials, the less likely one is kept with probability q ** n."""
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    with torch.no_grad():
        top = model(ids).logits[0, -1].topk(2)
    q = float((top.values / 8).softmax(-1)[1])
    method = cautious(max_trials=3, max_entropy=0.02, temperature=8.0, stop_tokens=tuple(range(tiny.VOCABULARY)))
    count = 300
    with gratis.attach(model, method):
        out = generate(model, ids.expand(count, -1), top_k=2, max_new_tokens=1)
    share = float((out[:, -1] == top.indices[1]).double().mean())
    assert abs(share - q**3) < 4 * math.sqrt(q**3 * (1 - q**3) / count)


@pytest.mark.parametrize(
    ("rule", "golden"),
    [
        ("release", {0.0: 1, 0.11: 1, 0.112: 2, 0.99: 9, 1.0: 10, 7.0: 10}),
        ("paper", {0.0: 1, 0.19: 1, 0.21: 2, 1.0: 10}),
    ],
)
def test_trials_by_entropy(rule, golden):
    method = gratis.CNTP(trial_rule=rule, stop_tokens=(1,))
    for share, trials in golden.items():
        assert method.trials(0.01 + share * 1.49) == trials
    assert method.trials(-1e-10) == 1


def test_an_end_inside_a_kept_trial_ends_the_response():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    ends = list(range(30, 50))
    method = cautious(max_trial_tokens=None)
    tokens, _ = reference(model, ids, method, ends=ends)
    with gratis.attach(model, method) as handle:
        out = generate(model, ids, eos_token_id=ends)
        report = handle.report()["cntp"]
    assert out[0, tiny.PROMPT :].tolist() == tokens
    assert tokens[-1] in ends
    assert not set(tokens[:-1]) & set(ends)
    assert report["truncated_samples"] == [[False]]
    last = report["steps"][0][-1]
    assert last["at"] + last["lengths"][last["chosen"]] == tiny.PROMPT + len(tokens)


def test_a_limit_cuts_trials_and_is_told():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    with gratis.attach(model, cautious(max_trial_tokens=None, stop_tokens=(96,))) as handle:
        out = generate(model, ids, max_new_tokens=7)
        report = handle.report()["cntp"]
    assert out.shape[1] == tiny.PROMPT + 7
    assert report["truncated_samples"] == [[True]]
    assert max(report["steps"][0][0]["lengths"]) <= 7


class Memory(LogitsProcessor):
    """Bans what it saw before; fails where it is not shown one text, token by token."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        assert input_ids.shape[0] == 1
        tokens = input_ids[0].tolist()
        assert not self.seen or tokens[:-1] == self.seen or tokens == self.seen
        self.seen = tokens
        return scores.index_fill(-1, input_ids[0], -math.inf)


def test_processors_with_a_state_are_copied_for_each_trial():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    with gratis.attach(model, cautious()):
        out = generate(model, ids, logits_processor=LogitsProcessorList([Memory()]))
    new = out[0, tiny.PROMPT :].tolist()
    assert len(set(new)) == NEW
    assert not set(new) & set(ids[0].tolist())


class Streamed:
    """Remembers what it was given."""

    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces.append(value.flatten().tolist())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("method", [cautious(), gratis.Sampling()], ids=lambda m: m.name)
def test_a_streamer_sees_the_prompt_and_what_was_kept(method):
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    streamer = Streamed()
    with gratis.attach(model, method):
        out = generate(model, ids, streamer=streamer)
        with pytest.raises(InputError, match="streamer"):
            generate(model, ids.expand(2, -1), streamer=Streamed())
    assert streamer.pieces[0] == ids[0].tolist()
    assert [token for piece in streamer.pieces for token in piece] == out[0].tolist()
    assert streamer.ended


def test_stop_strings_end_trials_and_text():
    model, ids, tokenizer = tiny.tiny_language_model(), tiny.prompt(), letters()
    words = tokenizer.convert_ids_to_tokens(range(tiny.VOCABULARY))
    with gratis.attach(model, cautious(max_trial_tokens=None)):
        out = generate(model, ids, stop_strings=words[40:60], tokenizer=tokenizer)
    new = out[0, tiny.PROMPT :].tolist()
    assert new[-1] in range(40, 60)
    assert not set(new[:-1]) & set(range(40, 60))


def test_marks_are_found_in_the_tokenizer():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    tokenizer = letters()
    set_tokenizer(model, tokenizer)
    words = tokenizer.convert_ids_to_tokens(range(tiny.VOCABULARY))
    first = gratis.CNTP(punctuation=("ab", "cdab"))
    assert first._marks(tokenizer) == [words.index("ab"), words.index("cd")]
    text = gratis.CNTP(punctuation=("b",), match="text")
    assert text._marks(tokenizer) == [n for n, word in enumerate(words) if word.endswith("b")]
    for method in (first, text):
        with gratis.attach(model, method):
            assert generate(model, ids).shape[1] == tiny.PROMPT + NEW
    with pytest.raises(SubjectError, match="none of the marks"):
        gratis.attach(model, gratis.CNTP(punctuation=("?",), match="text"))


def test_a_prompt_answers_alike_alone_and_in_a_padded_batch():
    model, ids = tiny.tiny_language_model(), tiny.prompt(2)
    short = ids[1:, -20:]
    padded = torch.cat([ids[:1], torch.nn.functional.pad(short, (20, 0))])
    with gratis.attach(model, cautious()):
        alone = [generate(model, ids[:1]), generate(model, short)]
        both = generate(model, padded, attention_mask=(padded != 0).long())
    assert both[0].tolist() == alone[0][0].tolist()
    assert both[1, -NEW:].tolist() == alone[1][0, -NEW:].tolist()


def test_it_stacks_with_a_bounded_cache():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    with gratis.attach(model, gratis.LaCache(budget=24, sinks=4, span=1), cautious()) as handle:
        out = generate(model, ids)
        report = handle.report()
    assert out.shape == (1, tiny.PROMPT + NEW)
    assert report["cntp"]["cautious_steps"][0] > 0
    assert report["lacache"]["entries_per_layer"] <= 24 + 6
    with gratis.attach(model, gratis.LaCache(budget=200, sinks=4, span=1), cautious()):
        within = generate(model, ids)
    with gratis.attach(model, cautious()):
        assert torch.equal(within, generate(model, ids))


def test_scores_and_logits_are_those_of_the_kept_tokens():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    with gratis.attach(model, cautious(temperature=0.5)):
        out = generate(model, ids, return_dict_in_generate=True, output_scores=True, output_logits=True)
    with torch.no_grad():
        raw = model(out.sequences).logits[0, tiny.PROMPT - 1 : -1]
    torch.testing.assert_close(torch.cat(out.logits), raw, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(torch.cat(out.scores), raw / 0.5, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_entropy": 0.5, "min_entropy": 0.5}, "above min_entropy"),
        ({"punctuation": ()}, "punctuation is empty"),
        ({"stop_tokens": ()}, "stop_tokens"),
        ({"stop_tokens": (-1,)}, "stop_tokens"),
        ({"min_entropy": -0.1}, "min_entropy"),
        ({"max_trials": 0}, "max_trials"),
    ],
)
def test_parameters_that_make_no_sense(options, message):
    with pytest.raises(ParameterError, match=message):
        gratis.CNTP(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "num_beams"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"cache_implementation": "static"}, "cache_implementation"),
    ],
)
def test_calls_that_contradict_it_are_refused(options, message):
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    with gratis.attach(model, cautious()), pytest.raises(InputError, match=message):
        generate(model, ids, **options)


def test_missing_tokenizers_and_broken_logits():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    with pytest.raises(SubjectError, match="tokenizer"):
        gratis.attach(model, gratis.CNTP())
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with gratis.attach(model, cautious()), pytest.raises(InputError, match="not finite"):
        generate(model, ids)


# Exact laws, on a model of five tokens


def five(seed=1):
    """A model of five tokens whose distributions are neither flat nor sharp."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=5,
        max_position_embeddings=32, initializer_range=0.8, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.generation_config.pad_token_id = 0
    return model


@torch.no_grad()
def law(model, ids, length, temperature, ends=()):
    """Probability of every continuation of `length` tokens, or of fewer where one of `ends` comes before."""
    if length == 0 or (int(ids[0, -1]) in ends and ids.shape[1] > 2):
        return {(): 1.0}
    chances = (model(ids).logits[0, -1].double() / temperature).softmax(-1)
    found = {}
    for token, chance in enumerate(chances.tolist()):
        rest = law(model, torch.cat([ids, torch.tensor([[token]])], 1), length - 1, temperature, ends)
        found |= {(token, *more): chance * other for more, other in rest.items()}
    return found


def p_value(drawn, expected):
    """Chi-square test that draws (tuples) follow a law, rare ones pooled."""
    count, seen = len(drawn), Counter(drawn)
    assert set(seen) <= set(expected)
    often = [one for one, chance in expected.items() if chance * count >= 5]
    observed = [*(seen[one] for one in often), count - sum(seen[one] for one in often)]
    chances = torch.tensor([*(expected[one] for one in often)], dtype=torch.float64)
    chances = torch.cat([chances, (1 - chances.sum()).clamp_min(1e-12)[None]])
    return float(chisquare(observed, (chances * count).numpy()).pvalue)


@pytest.mark.parametrize("options", [{"max_trials": 1}, {"max_entropy": 1e9}], ids=["one trial", "no cautious step"])
def test_its_limits_have_the_models_own_distribution(options):
    model, ids, runs = five(), torch.tensor([[1, 2]]), 300
    method = cautious(**{"temperature": 1.3, **options, "stop_tokens": (0,)})
    with gratis.attach(model, method):
        out = generate(model, ids.expand(runs, -1), max_new_tokens=3, do_sample=True, temperature=1.3, top_k=0)
    assert p_value([tuple(row) for row in out[:, 2:].tolist()], law(model, ids, 3, 1.3)) > 1e-3


def test_the_kept_segment_has_the_law_of_the_least_perplexing_of_the_trials():
    """Every segment is enumerated: it is kept where none of the other trials is less perplexing (ties: the first)."""
    model, ids, runs, trials = five(), torch.tensor([[1, 2]]), 300, 3
    method = cautious(
        max_trials=trials, min_entropy=0.0, max_entropy=0.05, temperature=1.3, stop_tokens=(0, 4), max_trial_tokens=2
    )
    segments = law(model, ids, 2, 1.3, ends=(0, 4))
    worth = {one: math.log(chance) / len(one) for one, chance in segments.items()}
    expected = {}
    for one, chance in segments.items():
        equal = sum(p for other, p in segments.items() if worth[other] == worth[one])
        worse = sum(p for other, p in segments.items() if worth[other] < worth[one])
        expected[one] = ((worse + equal) ** trials - worse**trials) * chance / equal
    assert sum(expected.values()) == pytest.approx(1)
    with gratis.attach(model, method) as handle:
        out = generate(model, ids.expand(runs, -1), max_new_tokens=2)
        steps = handle.report()["cntp"]["steps"]
    kept = [
        tuple(row[2 : 2 + one[0]["lengths"][one[0]["chosen"]]]) for row, one in zip(out.tolist(), steps, strict=True)
    ]
    assert {one[0]["trials"] for one in steps} == {trials}
    assert p_value(kept, expected) > 1e-3
    assert p_value(kept, segments) < 1e-3, "and not that of plain sampling"


# Odd calls


def test_a_prompt_at_the_windows_end_has_room_for_what_fits():
    model = tiny.tiny_language_model()
    window = model.config.max_position_embeddings
    ids = torch.randint(2, tiny.VOCABULARY, (1, window - 3), generator=torch.Generator().manual_seed(0))
    with gratis.attach(model, cautious(max_trial_tokens=None, stop_tokens=(96,))) as handle:
        out = generate(model, ids, max_new_tokens=3)
        assert out.shape[1] == window
        steps = handle.report()["cntp"]["steps"][0]
    assert max(step["at"] + max(step["lengths"]) for step in steps) <= window


def test_trials_that_are_all_equal_keep_the_first_and_all_cut_ones_are_told():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    # A flat distribution: every trial of one length is as likely as every other.
    method = cautious(max_trials=4, max_entropy=1.0, stop_tokens=(96,), max_trial_tokens=3)
    with gratis.attach(model, method) as handle:
        generate(model, ids, max_new_tokens=2)
        report = handle.report()["cntp"]
    [step] = report["steps"][0]
    assert step["lengths"] == [2] * 4
    assert len(set(step["perplexities"])) == 1
    assert step["chosen"] == 0
    assert report["truncated_samples"] == [[True]]


def test_empty_prompts_are_refused():
    model = tiny.tiny_language_model()
    with gratis.attach(model, cautious()), pytest.raises(InputError, match="empty"):
        model.generate(input_ids=torch.empty(1, 0, dtype=torch.long), max_new_tokens=3)


def test_tokenizers_without_marks_are_refused_and_marks_of_the_wrong_type():
    model = tiny.tiny_language_model()
    set_tokenizer(model, letters())
    with pytest.raises(SubjectError, match="none of the marks"):
        gratis.attach(model, gratis.CNTP())
    for wrong in (".", (1,), 5):
        with pytest.raises(ParameterError, match="punctuation"):
            gratis.CNTP(punctuation=wrong)
    assert torch.equal(generate(model, tiny.prompt()), generate(tiny.tiny_language_model(), tiny.prompt()))


def test_interrupted_it_tells_what_was_committed():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    whole = {}
    with gratis.attach(model, cautious()) as handle:
        whole = generate(model, ids)[0].tolist()
        passes = handle.report()["cntp"]["forward_passes"]
        calls = []

        def interrupt(module, arguments):
            calls.append(1)
            if len(calls) == passes - 2:
                raise KeyboardInterrupt

        model.model.layers[0].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            generate(model, ids)
        held = handle.report()["cntp"]["interrupted"]
    assert held == whole[: len(held)]
    assert tiny.PROMPT < len(held) < len(whole)
    assert model.config._attn_implementation == "sdpa", "how it attends is as it was"
