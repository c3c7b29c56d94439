"""`gratis generate` on a tiny model: what it says before, while and after."""

from __future__ import annotations

import json

import pytest
import torch

from gratis.cli import generating, run
from gratis.subjects import memory_need, text_limits
from tests import tiny_language as tiny

LACACHE = "lacache:budget=24,span=1"


class Letters:
    """A tokenizer of letters."""

    chat_template = None
    eos_token_id = 0

    def __call__(self, text, **options):
        return {"input_ids": torch.tensor([[2 + ord(letter) % 90 for letter in text]])}

    def decode(self, tokens, **options):
        return "".join(chr(97 + token % 26) for token in tokens)


@pytest.fixture
def tiny_model(monkeypatch):
    model = tiny.tiny_language_model()
    monkeypatch.setattr("gratis.subjects.open", lambda name, **options: model)
    monkeypatch.setattr("gratis.subjects.tokenizer_of", lambda model: Letters())
    return model


def answered(capsys, *arguments, code=0):
    assert run(["generate", "--raw", *arguments]) == code
    return capsys.readouterr()


def test_without_a_method_the_likeliest_tokens_are_written(tiny_model, capsys):
    shown = answered(capsys, "abcd", "-n", "5", "--json")
    found = json.loads(shown.out)
    ids = Letters()("abcd")["input_ids"]
    out = tiny_model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert found["tokens"] == out[0, 4:].tolist()
    assert found["methods"] == ["Greedy()"]
    assert found["memory"] is None


def test_a_prompt_past_the_window_names_the_methods_and_they_read_it(tiny_model, capsys):
    shown = answered(capsys, "x" * 300, code=2)
    assert "prompt of 300 tokens leaves no room" in shown.err
    assert "infllm, lacache or sliding-window" in shown.err
    found = json.loads(answered(capsys, "x" * 300, "--method", LACACHE, "-n", "4", "--json").out)
    assert found["prompt_tokens"] == 300
    assert len(found["tokens"]) == 4
    assert found["reports"]["lacache"]["tokens_seen"] == 303
    assert found["methods"][-1] == "Greedy()"


def test_an_answer_ends_where_the_window_does(tiny_model, capsys):
    assert len(json.loads(answered(capsys, "x" * 250, "-n", "40", "--json").out)["tokens"]) == 6


def test_methods_stack_and_those_that_cannot_are_refused(tiny_model, capsys):
    found = json.loads(
        answered(capsys, "x" * 60, "--method", LACACHE, "--method", "self-certainty:samples=2", "-n", "4", "--json").out
    )
    assert found["reports"]["self-certainty"]["samples"] == 2
    assert found["reports"]["lacache"]["compactions"] > 0
    shown = answered(capsys, "x", "--method", "lacache", "--method", "sliding-window", code=2)
    assert "lacache and sliding-window cannot be attached together: lacache evicts" in shown.err
    shown = answered(capsys, "x", "--method", "lacache", "--method", "greedy", "--set", "budget=3", code=2)
    assert "give each its parameters" in shown.err


def test_a_long_text_says_what_it_takes_before_it_is_read(tiny_model, capsys, monkeypatch):
    monkeypatch.setattr(generating, "LONG", 50)
    shown = answered(capsys, "x" * 60, "--method", LACACHE, "-n", "4")
    before, after = shown.err.strip().splitlines()
    assert before.startswith("64 tokens take at most 0.00 GiB beside the model; free: ")
    assert after.startswith("lacache + greedy: 4 tokens")
    assert "take at most" not in answered(capsys, "x" * 40, "-n", "4").err


def test_a_long_text_without_room_is_refused_before_it_is_read(tiny_model, capsys, monkeypatch):
    monkeypatch.setattr(generating, "LONG", 50)
    for module in (memory_need, text_limits):
        monkeypatch.setattr(module, "free_bytes", lambda where: memory_need.Free(30_000, 30_000, 1 << 30))
    calls = []
    tiny_model.register_forward_hook(lambda module, a, k, out: calls.append(k["input_ids"].shape[1]), with_kwargs=True)
    shown = answered(capsys, "x" * 100, code=2)
    assert "tokens fit" in shown.err
    shown = answered(capsys, "x" * 100, "--method", LACACHE, "-n", "4", code=2)
    assert "LaCache needs" in shown.err
    assert "lower budget" in shown.err
    assert max(calls) < 50


def test_an_interrupted_answer_shows_what_was_written(tiny_model, capsys):
    passes = []

    def interrupt(module, arguments):
        passes.append(1)
        if len(passes) > 6:
            raise KeyboardInterrupt

    tiny_model.model.layers[1].register_forward_pre_hook(interrupt)
    assert run(["generate", "--raw", "abcd", "-n", "20"]) == 130
    shown = capsys.readouterr()
    assert len(shown.out.strip()) == 6
    assert "interrupted; greedy: 6 tokens" in shown.err
    assert "left out" not in shown.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--method", "infllm:windw=4"), "did you mean 'window'?"),
        (("--method", "infllm:window=4,lookup=8"), "lookup 8 must be at most window 4"),
        (("--method", "infllm:window=4096"), "window 4096 is longer than the model's window of 256"),
        (("--method", "lacash"), "did you mean 'lacache'?"),
        (("--method", "ties"), "has no part in writing a text"),
        (("--method", "deepcache"), "acts on a diffusion pipeline"),
    ],
)
def test_what_is_mistyped_or_out_of_place_is_one_sentence(tiny_model, capsys, arguments, said):
    shown = answered(capsys, "abcd", *arguments, code=2)
    assert said in shown.err
    assert shown.err.count("\n") == 1
