"""`gratis generate` with methods that choose tokens: what is marked, streamed, stopped, seeded and interrupted."""

from __future__ import annotations

import io
import json
import re

import pytest
import torch
from rich.console import Console

import gratis
from gratis.cli import generating, run, terminal
from gratis.subjects.opening import set_tokenizer
from tests import tiny_language as tiny
from tests.subjects.test_generate_door import letters

PROMPT = "abacadaeafag"


@pytest.fixture
def model(monkeypatch):
    made = tiny.tiny_language_model()
    set_tokenizer(made, letters())
    monkeypatch.setattr("gratis.subjects.open", lambda name, **options: made)
    return made


@pytest.fixture
def shown(monkeypatch):
    """What is printed to a terminal with colours: (answer, sums)."""
    out, err = io.StringIO(), io.StringIO()

    def console(stderr=False):
        return Console(file=err if stderr else out, force_terminal=True, width=10_000, highlight=False)

    monkeypatch.setattr(terminal, "console", console)
    return out, err


def cautious(**options):
    """The method of the command line, as an object."""
    return gratis.CNTP(
        temperature=1.0, top_p=1.0, stop_tokens=(3, 5, 7, 11, 13, 17, 19, 23), max_trial_tokens=4, max_trials=3,
        max_entropy=4.4, **options,
    )  # fmt: skip


def answer(model, method, seed=0, new=24, **options):
    """What the library gives for the same call."""
    ids = letters()(PROMPT, return_tensors="pt")["input_ids"]
    torch.manual_seed(seed)
    with gratis.attach(model, method) as handle:
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **options)
        return out[0, ids.shape[1] :].tolist(), handle.report()[method.name]


METHOD = [
    "--method", "cntp", "-s", "temperature=1.0", "-s", "top_p=1.0", "-s", "stop_tokens=3,5,7,11,13,17,19,23", "-s",
    "max_trial_tokens=4", "-s", "max_trials=3", "-s", "max_entropy=4.4",
]  # fmt: skip


def test_cautious_places_are_highlighted_as_they_are_committed(model, shown):
    assert run(["generate", "--raw", PROMPT, "-n", "24", *METHOD]) == 0
    tokens, report = answer(model, cautious())
    places = report["places"][0]
    assert 0 < len(places) < 24, "some are cautious, some are not"
    expected, at = "", 0
    for first, end, _ in places:
        expected += letters().decode(tokens[at:first]) + f"\x1b[1;33m{letters().decode(tokens[first:end])}\x1b[0m"
        at = end
    expected += letters().decode(tokens[at:])
    assert shown[0].getvalue() == expected + "\n"
    said = re.sub(r"\x1b\[[0-9;]*m", "", shown[1].getvalue())
    assert "24 tokens, " in said
    assert f"{report['generated_tokens']} drawn in all" in said
    assert f"{report['forward_passes']} forward passes" in said
    assert f"{len(places)} places marked" in said


def test_seeds_make_the_answer(model, capsys):
    found = []
    for seed in ("3", "3", "4"):
        assert run(["generate", "--raw", PROMPT, "-n", "24", "--seed", seed, "--json", *METHOD]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["tokens"] == found[1]["tokens"] == answer(model, cautious(), seed=3)[0]
    assert found[0]["tokens"] != found[2]["tokens"]
    assert found[0]["places"] == answer(model, cautious(), seed=3)[1]["places"][0]
    assert found[0]["text"] == letters().decode(found[0]["tokens"], skip_special_tokens=True)


def test_an_answer_ends_at_a_stop_string(model, capsys):
    tokens, _ = answer(model, cautious())
    word = letters().decode([tokens[9]])
    end = tokens.index(tokens[9]) + 1
    assert run(["generate", "--raw", PROMPT, "-n", "24", "--stop", word, "--json", *METHOD]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == tokens[:end]


def test_interrupted_it_shows_what_was_committed_and_not_the_trials(model, capsys):
    tokens, report = answer(model, cautious())
    passes = []

    def interrupt(module, arguments, keywords):
        passes.append(1)
        if len(passes) > report["forward_passes"] // 2:
            raise KeyboardInterrupt

    hook = model.register_forward_pre_hook(interrupt, with_kwargs=True)
    assert run(["generate", "--raw", PROMPT, "-n", "24", "--json", *METHOD]) == 130
    hook.remove()
    found = json.loads(capsys.readouterr().out)
    assert found["interrupted"]
    assert 0 < len(found["tokens"]) < 24
    assert found["tokens"] == tokens[: len(found["tokens"])]
    ids = letters()(PROMPT)["input_ids"]
    assert found["reports"]["cntp"]["interrupted"] == ids + found["tokens"]


def test_what_a_target_wrote_is_marked(model, shown, monkeypatch):
    large = tiny.tiny_language_model(1)
    set_tokenizer(large, letters())
    monkeypatch.setattr("gratis.methods.decoding.speculative_thinking.open_subject", lambda name: large)
    arguments = [
        "generate", "--raw", PROMPT, "-n", "20", "--method", "speculative-thinking", "-s", "target=zoo:large", "-s",
        "not_reasoning=true", "-s", "takeover_tokens=3", "-s", f"delimiters={','.join(letters().decode([n]) for n in range(20, 60))}",
    ]  # fmt: skip
    assert run(arguments) == 0
    assert "\x1b[1;33m" in shown[0].getvalue()
    assert re.search(r"\d+ places marked, \d+ % by the target", shown[1].getvalue())


def test_methods_that_choose_among_samples_print_their_choice(model, capsys):
    method = ["--method", "majority-vote", "-s", "samples=3", "-s", "answer=response"]
    assert run(["generate", "--raw", PROMPT, "-n", "6", *method]) == 0
    out = capsys.readouterr()
    tokens, _ = answer(model, gratis.MajorityVote(samples=3, answer="response"), new=6)
    assert out.out == letters().decode(tokens) + "\n"
    assert "drawn in all" in out.err


def test_half_a_character_is_shown_when_the_rest_is_there_or_at_the_end(shown):
    class Bytes:
        def decode(self, tokens, **options):
            return bytes(tokens).decode("utf-8", "replace")

    out = io.StringIO()
    writer = generating._Writer(Bytes(), Console(file=out, width=100), show=True)
    writer.put(torch.tensor([[1, 2]]))
    for byte in "aé".encode():
        writer.put(torch.tensor([byte]))
    assert out.getvalue() == "aé"
    writer.put(torch.tensor([0xC3]))
    assert out.getvalue() == "aé"
    writer.end()
    assert out.getvalue() == "aé�"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["", *METHOD], "prompt is empty"),
        ([PROMPT, "--method", "cntp"], "none of the marks"),
        ([PROMPT, "--method", "cntp", "-s", "max_entropy=0.001"], "must be above min_entropy"),
        ([PROMPT, "--method", "cntp", "-s", "max_trails=3"], "max_trials"),
        ([PROMPT, "--method", "self-certainty", "-s", "select=borda"], "answer"),
        ([PROMPT, "--method", "prophet"], "masked-diffusion"),
        ([PROMPT, "--method", "speculative-thinking", "-s", "reflection=Wait"], "lower-case"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(model, capsys, arguments, said):
    assert run(["generate", "--raw", *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_a_chat_says_what_it_does_not_take(monkeypatch, capsys):
    from gratis.subjects.chat import Chat

    asked = []

    def answers(messages, **parameters):
        asked.append(parameters)
        return "Paris"

    monkeypatch.setattr("gratis.subjects.open", lambda name, **options: Chat(answers))
    for option, value in (("--stop", ["x"]), ("--raw", [])):
        assert run(["generate", "Capital of France?", "--model", "chat:any", "--method", "sec", option, *value]) == 2
        assert f"leave out {option}" in capsys.readouterr().err
    assert not asked
