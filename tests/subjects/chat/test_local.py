"""Chats with a model in this process."""

from __future__ import annotations

import pytest
import torch

from gratis.contract.errors import InputError, SubjectError
from gratis.subjects.chat import Chat, Request


@pytest.fixture(scope="module")
def local():
    from gratis.subjects import open as open_subject

    return open_subject("smollm2")


QUESTIONS = ["Name a colour.", "What is the capital of France?", "Say hello in Spanish and in German."]


def asked(question, **options):
    return Request(messages=({"role": "user", "content": question},), max_tokens=8, **options)


def test_local_answers_do_not_depend_on_the_batch(local):
    alone = [Chat(local)(asked(q))[0].text for q in QUESTIONS]
    assert [a.text for a in Chat(local)([asked(q) for q in QUESTIONS])] == alone
    assert [a.text for a in Chat(local)([asked(q) for q in QUESTIONS[::-1]])] == alone[::-1]
    assert "Paris" in alone[1]
    sampled = [asked(q, temperature=1.0, top_p=0.9) for q in QUESTIONS[:2]]
    together = [a.text for a in Chat(local)(sampled)]
    assert together == [Chat(local)(r)[0].text for r in sampled]
    samples = {Chat(local)(asked(QUESTIONS[0], temperature=1.0, sample_index=i))[0].text for i in range(6)}
    assert len(samples) > 1


def test_a_shared_beginning_is_read_once_and_changes_nothing(local):
    system = {"role": "system", "content": "You are a terse librarian. " * 12}
    requests = [Request(messages=(system, {"role": "user", "content": q}), max_tokens=6) for q in QUESTIONS]
    together = Chat(local)
    answers = together(requests)
    alone = Chat(local)
    separately = [alone(r)[0] for r in requests]
    assert [a.text for a in answers] == [a.text for a in separately]
    assert all(a.usage.cached_input >= 64 for a in answers)
    assert together.backend.prefill_tokens < 0.6 * alone.backend.prefill_tokens


def test_local_choices_scores_stops_and_limits(local):
    made = Chat(local)
    [answer] = made(asked("Is Paris in France?", choices=("Yes", "No")))
    assert answer.text == max(answer.logprobs[0], key=answer.logprobs[0].get)
    scores = made.score("The capital of France is which city?", ["Paris", "The capital of France is Paris."])
    assert all(s < 0 for s in scores)
    ids = made.backend._prompt(asked("x"))
    with torch.no_grad():
        tail = made.backend._tokenizer("Paris", add_special_tokens=False).input_ids
        logits = local(torch.tensor([ids + tail])).logits[0].log_softmax(-1)
    expected = sum(logits[len(ids) - 1 + i, t].item() for i, t in enumerate(tail))
    assert made.score("x", ["Paris"])[0] == pytest.approx(expected, abs=1e-3)
    [stopped] = made(asked("What is the capital of France?", stop=("of",)))
    assert "of" not in stopped.text
    assert stopped.finish_reason == "stop"
    with pytest.raises(InputError, match="exceed the model's window"):
        made(Request(messages=({"role": "user", "content": "x"},), max_tokens=9000))


@pytest.fixture(scope="module")
def tiny_chats():
    """Tiny random models with a sliding window, with recurrent layers, and with neither, sharing a real tokenizer."""
    import transformers

    from gratis.subjects.embedded import embedded_folder
    from gratis.subjects.opening import set_tokenizer

    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded_folder("smollm2"))
    shape = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    kinds = {
        "llama": transformers.LlamaConfig(**shape),
        "mistral": transformers.MistralConfig(**shape, sliding_window=24),
        "lfm2": transformers.Lfm2Config(**shape, layer_types=["conv", "full_attention", "conv"]),
    }

    def made(kind):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(kinds[kind]).eval()
        with torch.no_grad():
            [weight.mul_(4) for weight in model.parameters() if weight.ndim > 1]
        set_tokenizer(model, tokenizer)
        return model

    return made


LIBRARIAN = {"role": "system", "content": "You are a terse librarian who knows every shelf. " * 8}


def sharing(questions=QUESTIONS):
    return [Request(messages=(LIBRARIAN, {"role": "user", "content": q}), max_tokens=6) for q in questions]


@pytest.mark.parametrize(("kind", "shares"), [("llama", True), ("mistral", False), ("lfm2", False)])
def test_batches_equal_single_requests_whatever_the_cache_keeps(tiny_chats, kind, shares):
    model = tiny_chats(kind)
    together = Chat(model)
    answers = together(sharing())
    assert [a.text for a in answers] == [Chat(model)(request)[0].text for request in sharing()]
    assert all((a.usage.cached_input > 0) == shares for a in answers)
    ids, tails = together.backend._prompt(sharing()[0]), ["a word", "another one"]
    for tail, score in zip(tails, together.score(sharing()[0], tails), strict=True):
        more = together.backend._tokenizer(tail, add_special_tokens=False).input_ids
        with torch.no_grad():
            logits = model(torch.tensor([ids + more])).logits[0].log_softmax(-1)
        expected = sum(logits[len(ids) - 1 + i, token].item() for i, token in enumerate(more))
        assert score == pytest.approx(expected, abs=1e-3)


def test_nothing_read_by_other_weights_is_used_again(tiny_chats, tmp_path):
    model = tiny_chats("llama")
    made = Chat(model, cache=tmp_path / "c.sqlite")
    chosen = asked("Which?", choices=("one", "two"))
    before = [a.text for a in made([*sharing(), chosen])][:-1]
    name = made.backend.model
    weight = model.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        kept = weight[3, 5].clone()
        weight[3, 5] = 60.0
    changed = made(sharing())
    assert made.backend.model != name
    assert not made(chosen)[0].cached
    assert [a.text for a in changed] == [a.text for a in Chat(model)(sharing())]
    with torch.no_grad():
        weight[3, 5] = kept
        values = model.model.layers[0].self_attn.v_proj.weight
        values.neg_()
    changed = [a.text for a in made(sharing())]
    assert changed == [a.text for a in Chat(model)(sharing())]
    assert changed != before
    with torch.no_grad():
        values.neg_()
    assert made.backend.model == name
    assert [a.text for a in made(sharing())] == before
    assert made(chosen)[0].cached


def test_answers_under_an_attached_method_are_its_own(tiny_chats, tmp_path):
    import gratis

    model = tiny_chats("llama")
    made = Chat(model, cache=tmp_path / "c.sqlite")
    plain = made(sharing())
    chosen = asked("Which?", choices=("one", "two"))
    made(chosen)
    with gratis.attach(model, gratis.SlidingWindow(budget=32)):
        bounded = made(sharing())
        assert not made(chosen)[0].cached
        assert [a.text for a in bounded] == [Chat(model)(request)[0].text for request in sharing()]
    assert [a.text for a in bounded] != [a.text for a in plain]
    assert made(chosen)[0].cached


def test_what_a_local_chat_cannot_do_is_refused(tiny_chats):
    import transformers

    from gratis.subjects.opening import set_tokenizer, tokenizer_of

    with pytest.raises(InputError, match="no logprobs"):
        Chat(tiny_chats("llama"))(asked("x", logprobs=2))
    state_space = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=8, hidden_size=8, state_size=2, num_hidden_layers=1)
    ).eval()
    set_tokenizer(state_space, tokenizer_of(tiny_chats("llama")))
    with pytest.raises(SubjectError, match="MambaForCausalLM"):
        Chat(state_space)


def test_templates_without_a_system_role_get_it_in_the_first_question(tiny_chats, monkeypatch):
    made = Chat(tiny_chats("llama"))
    tokenizer = made.backend._tokenizer
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns alternate') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    user = {"role": "user", "content": "hello"}
    ids = made.backend._prompt(Request(messages=({"role": "system", "content": "be brief"}, user)))
    assert tokenizer.decode(ids) == "<user>be brief\n\nhello"
    with pytest.raises(InputError, match="does not allow this conversation: turns alternate"):
        made(Request(messages=(user, user)))
    with pytest.raises(InputError, match="does not allow this conversation: turns alternate"):
        made(Request(messages=({"role": "system", "content": "be brief"}, user, user)))


def test_a_model_without_a_chat_template():
    from tests import tiny_language as tiny

    with pytest.raises(SubjectError):
        Chat(tiny.tiny_language_model())
