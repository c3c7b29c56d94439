"""The door of `generate`: how calls are read, prompts split, draws seeded, and results put together."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

import gratis
from gratis.contract.errors import InputError, SubjectError
from gratis.subjects.generate_door import setting, split_prompts
from tests import tiny_language as tiny
from tests.architectures.building import build

NEW = 10


def majority(samples=3, **options):
    """Any method that chooses would do: the vote over whole responses needs no tokenizer."""
    return gratis.PerplexityPick(samples=samples, **{"temperature": 1.0, "top_p": 1.0, **options})


def generate(model, ids, seed=0, **options):
    torch.manual_seed(seed)
    options.setdefault("attention_mask", torch.ones_like(ids))
    options.setdefault("max_new_tokens", NEW)
    return model.generate(input_ids=ids, **options)


def letters():
    """A tokenizer whose token n is the n-th of 97 two-letter words."""
    words = {chr(97 + n // 17) + chr(97 + n % 17): n for n in range(tiny.VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="aa"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(".."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="aa")


@pytest.mark.parametrize("where", ["call", "config"])
def test_stop_strings_end_a_response(where):
    model, ids, tokenizer = tiny.tiny_language_model(), tiny.prompt(), letters()
    words = tokenizer.convert_ids_to_tokens(range(tiny.VOCABULARY))
    stops = words[2:30]
    options = {"stop_strings": stops}
    if where == "config":
        options = {"generation_config": GenerationConfig(stop_strings=stops, pad_token_id=0, max_new_tokens=40)}
    with gratis.attach(model, majority(6)) as handle:
        out = generate(model, ids, num_return_sequences=6, max_new_tokens=40, tokenizer=tokenizer, **options)
        report = handle.report()["perplexity-pick"]
    order = report["ranking"][0]
    for row, sample in zip(out[:, tiny.PROMPT :].tolist(), order, strict=True):
        length = report["lengths"][0][sample]
        kept = [words[token] for token in row[:length]]
        assert not any(stop in "".join(kept[:-1]) for stop in stops)
        assert any(stop in "".join(kept) for stop in stops) != report["truncated_samples"][0][sample]
        assert set(row[length:]) <= {0}
    assert min(report["lengths"][0]) < 40


class After(StoppingCriteria):
    """Stops every row at a length."""

    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_own_stopping_criteria_are_kept_and_are_no_truncation():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    stops = StoppingCriteriaList([After(tiny.PROMPT + 4)])
    with gratis.attach(model, majority()) as handle:
        out = generate(model, ids, stopping_criteria=stops)
    assert out.shape[1] == tiny.PROMPT + 4
    assert handle.report()["perplexity-pick"]["truncated"] == 0


def test_prompts_are_split_without_their_padding():
    model = tiny.tiny_language_model()
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    call = {"input_ids": ids, "attention_mask": (ids != 0).long(), "max_length": 9, "num_return_sequences": 1}
    first, second = split_prompts(model, call, "It")
    assert first["input_ids"].tolist() == [[5, 6]]
    assert first["attention_mask"].tolist() == [[1, 1]]
    assert first["max_length"] == 7
    assert second["input_ids"].tolist() == [[7, 8, 9, 10]]
    assert second["max_length"] == 9
    assert second["num_return_sequences"] == 1
    with pytest.raises(InputError, match="cannot tell which prompt token_type_ids"):
        split_prompts(model, {**call, "token_type_ids": torch.zeros(3, 4)}, "It")


def test_settings_come_from_the_call_then_its_config_then_the_models():
    model = tiny.tiny_language_model()
    model.generation_config.max_length = 7
    config = GenerationConfig(max_length=8)
    assert setting(model, {"max_length": 9, "generation_config": config}, "max_length") == 9
    assert setting(model, {"generation_config": config}, "max_length") == 8
    assert setting(model, {}, "max_length") == 7


def test_a_call_that_asks_for_greedy_is_drawn_by_the_methods_settings():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    with gratis.attach(model, majority(temperature=1.0)):
        asked = generate(model, ids, do_sample=False, temperature=0.01)
        plain = generate(model, ids)
    assert torch.equal(asked, plain)


def test_the_same_prompt_twice_in_a_batch_is_drawn_for_twice():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    with gratis.attach(model, majority(2)):
        out = generate(model, ids.expand(2, -1))
    assert not torch.equal(out[0], out[1])


def test_positional_arguments_are_read_too():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    config = GenerationConfig(max_new_tokens=NEW, pad_token_id=0)
    with gratis.attach(model, majority()):
        torch.manual_seed(0)
        out = model.generate(ids, config, attention_mask=torch.ones_like(ids))
        assert torch.equal(out, generate(model, ids))


def test_embeddings_as_a_prompt():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    embeddings = model.get_input_embeddings()(ids).detach()
    with gratis.attach(model, majority()) as handle:
        torch.manual_seed(0)
        out = model.generate(inputs_embeds=embeddings, max_new_tokens=NEW, num_return_sequences=3)
        report = handle.report()["perplexity-pick"]
    for place, sample in enumerate(report["ranking"][0]):
        with torch.no_grad():
            logs = model(torch.cat([ids, out[place : place + 1]], 1)).logits[0, tiny.PROMPT - 1 : -1].log_softmax(-1)
        mean = logs.gather(1, out[place][:, None]).mean().item()
        assert report["mean_log_probability"][0][sample] == pytest.approx(mean, abs=1e-4)


def test_ranks_scores_and_logits_of_a_batch_come_back_in_order():
    model, ids = tiny.tiny_language_model(), tiny.prompt(2)
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    with gratis.attach(model, majority(temperature=0.5)):
        out = generate(model, ids, num_return_sequences=2, temperature=0.5, **options)
    assert out.sequences.shape == (4, tiny.PROMPT + NEW)
    with torch.no_grad():
        raw = model(out.sequences).logits[:, tiny.PROMPT - 1 : -1]
    torch.testing.assert_close(torch.stack(out.logits, 1), raw, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(torch.stack(out.scores, 1), raw / 0.5, atol=1e-3, rtol=1e-3)


def test_the_returned_cache_belongs_to_the_returned_sequence():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    with gratis.attach(model, majority(4, temperature=1.5)):
        out = generate(model, ids, return_dict_in_generate=True, eos_token_id=list(range(2, 30)))
    cache = out.past_key_values
    assert cache.get_seq_length() == out.sequences.shape[1] - 1
    with torch.no_grad():
        after = model(out.sequences[:, -1:], past_key_values=cache).logits[:, -1]
        whole = model(out.sequences).logits[:, -1]
    torch.testing.assert_close(after, whole, atol=1e-4, rtol=1e-3)


def test_attentions_and_hidden_states_are_those_of_the_chosen_sample():
    model, ids = build("gpt2"), torch.randint(3, 90, (1, 8), generator=torch.Generator().manual_seed(0))
    with gratis.attach(model, majority()):
        torch.manual_seed(0)
        out = model.generate(
            input_ids=ids, max_new_tokens=3, return_dict_in_generate=True, output_hidden_states=True, do_sample=True
        )
    with torch.no_grad():
        states = model(out.sequences, output_hidden_states=True).hidden_states
    torch.testing.assert_close(out.hidden_states[-1][-1][:, -1], states[-1][:, -2], atol=1e-4, rtol=1e-3)


def test_empty_prompts_and_none():
    model = tiny.tiny_language_model()
    with gratis.attach(model, majority()):
        assert model.generate(max_new_tokens=4).shape == (1, 5)
        with pytest.raises(InputError, match="at least one token"):
            generate(model, torch.zeros(1, 0, dtype=torch.long))


def test_equal_candidates_go_to_the_first():
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    with gratis.attach(model, majority(4)) as handle:
        out = generate(model, ids, top_k=1)
        report = handle.report()["perplexity-pick"]
    assert report["ranking"] == [[0, 1, 2, 3]]
    assert report["truncated_samples"] == [[True] * 4]
    assert torch.equal(out, generate(model, ids, do_sample=False))


@pytest.mark.parametrize("name", ["assistant_model", "custom_generate", "past_key_values"])
def test_what_cannot_be_combined_is_named(name):
    model, ids = tiny.tiny_language_model(), tiny.prompt()
    with gratis.attach(model, majority()), pytest.raises(InputError, match=f"leave out {name}"):
        generate(model, ids, **{name: lambda *a, **k: None})


def test_subjects_that_do_not_generate():
    with pytest.raises(SubjectError, match="evaluation mode"):
        gratis.attach(tiny.tiny_language_model().train(), majority())
    with pytest.raises(SubjectError, match="not on a LlamaModel"):
        gratis.attach(tiny.tiny_language_model().model, majority())
