"""Speculative thinking: exact event logs of scripted writers, and limits, counts and refusals on tiny models."""

from __future__ import annotations

import pytest
import torch

import gratis
from gratis.contract.errors import InputError, ParameterError, SubjectError
from gratis.methods.decoding.speculative_thinking import Thinking
from gratis.subjects.chat import Chat, ChatError, Reply, Usage
from gratis.subjects.opening import set_tokenizer
from gratis.subjects.taking_turns import LARGE, SMALL
from gratis.subjects.writers import ChatWriter, Draft
from gratis.zoo.arithmetic import CHARACTERS
from gratis.zoo.text import character_tokenizer
from tests import tiny_language as tiny
from tests.subjects.test_generate_door import letters

STOPS = (3, 5, 7, 11, 13, 17, 19, 23)


def played(script, **options):
    """The log of turns and the state after the scripted drafts: texts, or Drafts."""
    method = gratis.SpeculativeThinking(**options)
    writer = ChatWriter("", Chat(lambda messages, **_: ""), [{"role": "user", "content": "q"}], delimiters=("\n\n",))
    state, log, entries = Thinking(method, writer.split), [], list(script)
    machine = state.run()
    draft = None
    try:
        while True:
            turn = machine.send(draft) if draft is not None else next(machine)
            log.append((turn.writer, turn.tokens, turn.lead))
            entry = entries.pop(0) if entries else Draft()
            if isinstance(entry, str):
                marks = writer._marks(entry)
                paused = turn.to_delimiter and entry.endswith("\n\n")
                entry = Draft(entry, None, len(entry.split()), marks, paused, entry.endswith("<end>"))
            draft = entry
    except StopIteration:
        pass
    return log, state


PROBE, TARGET, MORE = (SMALL, 20, ""), (LARGE, 20, ""), (LARGE, 125, "")
PARAGRAPH = (SMALL, 1024, "")


def test_a_neutral_probe_is_kept_as_the_small_models_next_tokens():
    log, state = played(["one\n\n", "two and", "two and three<end>"])
    assert log == [PARAGRAPH, PROBE, PARAGRAPH]
    assert str(state.text) == "one\n\ntwo and three<end>"
    assert (state.neutral, state.target_calls, state.text.ended) == (1, 0, True)


def test_the_release_mode_draws_a_neutral_probe_anew():
    log, state = played(["one\n\n", "two and", "other<end>"], reuse_probe=False)
    assert log == [PARAGRAPH, PROBE, PARAGRAPH]
    assert str(state.text) == "one\n\nother<end>"


def test_a_kept_probe_is_probed_again_behind_a_delimiter_within():
    log, state = played(["one\n\n", "two\n\nthree", "wait three", "Four.", "five<end>"])
    assert log == [PARAGRAPH, PROBE, PROBE, TARGET, PARAGRAPH]
    assert str(state.text) == "one\n\ntwo\n\nFour.five<end>"


@pytest.mark.parametrize(
    ("probe", "kept", "negatives", "log"),
    [
        ("wait, no", "Another way", 1, [TARGET]),
        ("yes, right", "Yes, sure", 0, [TARGET]),
        ("let me verify", "I verify it", 1, [TARGET, MORE]),
        ("hmm check", "All good", 0, [TARGET]),
    ],
    ids=["reflection", "affirmation", "verification", "verification that the target does not repeat"],
)
def test_takeovers(probe, kept, negatives, log):
    more = ["and more "] if MORE in log else []
    turns, state = played(["one\n\n", probe, kept, *more, "done<end>"])
    assert turns == [PARAGRAPH, PROBE, *log, PARAGRAPH]
    assert str(state.text) == "one\n\n" + kept + "".join(more) + "done<end>"
    assert state.negatives == negatives
    assert [one["beside"] for one in state.takeovers] == [probe, ""][: len(log)]


@pytest.mark.parametrize(
    ("text", "sign"),
    [("", 0), ("nothing", 0), ("Yes", 1), ("WAIT", -1), ("yes wait", -1), ("yes yeah wait", 1), ("checking", -1),
     ("yes, check it", -1)],
)  # fmt: skip
def test_ties_are_negative_and_words_count_within_words(text, sign):
    assert gratis.SpeculativeThinking().score(text) == sign


@pytest.mark.parametrize(
    ("probe", "target", "taken"),
    [("wait", "fine", True), ("wait", "yes", True), ("wait", "hold on", False), ("yes", "wait", True), ("yes", "fine", False)],
)  # fmt: skip
def test_without_choose_large_the_target_is_taken_where_signs_disagree(probe, target, taken):
    _, state = played(["one\n\n", probe, target, "<end>"], choose_large=False)
    assert str(state.text) == "one\n\n" + (target if taken else probe) + "<end>"
    assert state.negatives == int((not taken and probe == "wait") or (taken and target == "wait"))


def test_many_negatives_bring_a_review_that_grows_to_its_caps():
    options = {"negatives": 2, "more_negatives": 1, "max_negatives": 3, "review_tokens": 10, "more_review_tokens": 4,
               "max_review_tokens": 15}  # fmt: skip
    round_ = ["p\n\n", "wait", "wait", "q\n\n", "wait", "wait"]
    extra = ["p\n\n", "wait", "wait"]
    script = [
        *round_,
        "r\n\n",
        "found it. ",
        *round_,
        *extra,
        "r\n\n",
        "again. ",
        *round_,
        *extra,
        "r\n\n",
        "last<end>",
    ]
    log, state = played(script, **options)
    reviews = [turn for turn in log if turn[2]]
    sentence = "Let me check whether there are some wrong steps:"
    assert reviews == [(LARGE, 10, sentence), (LARGE, 14, sentence), (LARGE, 15, sentence)]
    assert sentence + "found it. p\n\n" in str(state.text)
    assert [one["kind"] for one in state.takeovers].count("takeover") == 8


def test_the_target_may_begin_and_may_always_be_asked():
    log, state = played(["Begin. ", "one\n\n", "plain", "Taken. ", "x<end>"], begin=True, not_reasoning=True)
    assert log == [(LARGE, 100, ""), PARAGRAPH, PROBE, TARGET, PARAGRAPH]
    assert str(state.text) == "Begin. one\n\nTaken. x<end>"


def test_an_end_within_a_takeover_ends_the_answer():
    log, state = played(["one\n\n", "let me check", "verify<end>"])
    assert log[-1] == TARGET
    assert str(state.text) == "one\n\nverify<end>"
    assert state.text.ended
    assert played(["one\n\n", "wait", Draft()])[1].text.ended, "an empty target text is an end"


def test_a_failing_target_leaves_the_small_models_draft_and_is_left_alone_after_three():
    lost = Draft(error="timed out")
    turn = ["p\n\n", "wait", lost]
    log, state = played([*turn, *turn, *turn, "rest\n\n", "more<end>"])
    assert str(state.text) == "p\n\nwait" * 3 + "rest\n\nmore<end>"
    assert (state.failed_calls, state.negatives) == (3, 3)
    assert "3 times in a row, at last: timed out" in state.small_only
    assert log[-2:] == [PARAGRAPH, PARAGRAPH], "no more probes"
    _, again = played([*turn, *turn, "p\n\n", "wait", "Fine. ", *turn, "<end>"])
    assert again.small_only is None


def test_the_model_that_has_room_finishes():
    full = Draft(error="full", full=True)
    log, state = played(["one\n\n", "wait", full, "two<end>"])
    assert "target stopped" in state.small_only
    assert str(state.text) == "one\n\nwaittwo<end>"
    log, state = played(["one\n\n", full, full, "rest<end>"])
    assert log[-1] == (LARGE, 1024, "")
    assert str(state.text) == "one\n\nrest<end>"


def test_nothing_is_taken_over_in_code_or_behind_the_answer():
    assert played(["```py\n\n", "wait<end>"], skip_code=True)[1].target_calls == 0
    assert played(["\\boxed{1}\n\n", "wait<end>"], answer_marker="\\boxed{")[1].target_calls == 0
    assert played(["```py\n\n", "wait", "Yes<end>"])[1].target_calls == 1


def test_a_word_before_each_probe_is_part_of_the_text_only_with_its_draft():
    log, state = played(["one\n\n", "neutral", "two\n\n", "wait", "Taken<end>"], help_think_word="Hmm, ")
    assert log == [PARAGRAPH, (SMALL, 20, "Hmm, "), PARAGRAPH, (SMALL, 20, "Hmm, "), (LARGE, 20, "Hmm, ")]
    assert str(state.text) == "one\n\ntwo\n\nHmm, Taken<end>"


# On models


def lettered(seed=0):
    model = tiny.tiny_language_model(seed)
    set_tokenizer(model, letters())
    return model


def generate(model, ids, **options):
    torch.manual_seed(0)
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, **options)


TOKENS = {"delimiters": (), "delimiter_tokens": STOPS, "takeover_tokens": 5}
NO_WORDS = {"affirmation": (), "reflection": (), "verification": ()}


@pytest.mark.parametrize("sample", [True, False])
def test_without_keywords_it_is_the_small_model_alone(sample):
    model, ids = lettered(), tiny.prompt()
    drawing = {"temperature": 1.0, "top_p": 1.0, "top_k": 0} if sample else {}
    with gratis.attach(model, gratis.Sampling(**drawing) if sample else gratis.Greedy()):
        plain = generate(model, ids)
    with gratis.attach(
        model, gratis.SpeculativeThinking(target=lettered(1), **TOKENS, **NO_WORDS, **drawing)
    ) as handle:
        out = generate(model, ids, **({} if sample else {"do_sample": False}))
    assert torch.equal(out, plain)
    assert handle.report()["speculative-thinking"]["neutral_probes"][0] > 0


def test_a_target_that_is_the_model_itself_changes_no_greedy_text():
    model, ids = lettered(), tiny.prompt()
    plain = generate(model, ids, do_sample=False)
    method = gratis.SpeculativeThinking(**TOKENS, **NO_WORDS, not_reasoning=True)
    with gratis.attach(model, method) as handle:
        assert torch.equal(generate(model, ids, do_sample=False), plain)
    assert handle.report()["speculative-thinking"]["target_tokens"][0] > 0


def test_every_token_is_read_once_by_each_model():
    small, large, ids = lettered(0), lettered(1), tiny.prompt()
    read = {"small": [], "large": []}
    method = gratis.SpeculativeThinking(target=large, **TOKENS, **NO_WORDS, not_reasoning=True)
    with gratis.attach(small, method) as handle:
        for name, model in (("small", small), ("large", large)):
            model.register_forward_hook(
                lambda module, args, kwargs, out, name=name: read[name].append(kwargs["input_ids"].shape[1]),
                with_kwargs=True,
            )
        out = generate(small, ids, do_sample=False)
    report = handle.report()["speculative-thinking"]
    assert {name: sum(counts) for name, counts in read.items()} == report["encoded"][0]
    assert len(report["takeovers"][0]) > 1
    length = out.shape[1]
    dropped = report["drafted"][0]["small"] - (length - ids.shape[1] - report["target_tokens"][0])
    assert report["encoded"][0]["small"] <= length + dropped
    assert report["encoded"][0]["large"] <= length


def test_the_targets_part_is_what_the_target_would_write_there():
    small, large, ids = lettered(0), lettered(1), tiny.prompt()
    method = gratis.SpeculativeThinking(target=large, **TOKENS, **NO_WORDS, not_reasoning=True)
    with gratis.attach(small, method) as handle:
        out = generate(small, ids, do_sample=False)
    for first, end, kind in handle.report()["speculative-thinking"]["places"][0]:
        assert kind == "takeover"
        before = out[:, : ids.shape[1] + first]
        alone = large.generate(
            input_ids=before, attention_mask=torch.ones_like(before), max_new_tokens=end - first, do_sample=False
        )
        assert torch.equal(alone, out[:, : ids.shape[1] + end])


def spelling(seed, pieces):
    """A model over characters and `pieces` (which it hardly ever writes): other pieces are another vocabulary."""
    tokenizer = character_tokenizer(CHARACTERS, 256, pieces=pieces)
    model = tiny.tiny_language_model(seed)
    model.resize_token_embeddings(len(tokenizer))
    set_tokenizer(model, tokenizer)

    def text_only(module, args, out):
        out.logits[..., :4] = -1e4

    model.register_forward_hook(text_only)
    return model, tokenizer


SPELLED = {"delimiters": tuple("abcdefghijklmnopqrstuvwxyz0123456789"), "takeover_tokens": 5, "top_k": 0, "top_p": 1.0}


@torch.no_grad()
def written(model, tokenizer, ids, text, count):
    """What a model writes on its own, token by token and without a cache, after its prompt and a text."""
    ids = [*ids, *tokenizer(text, add_special_tokens=False).input_ids]
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids[len(ids) - count :], clean_up_tokenization_spaces=False)


def test_a_target_of_another_vocabulary_reads_and_writes_text():
    small, own = spelling(0, ())
    large, other = spelling(1, ("~~", "^|^", "%%%%"))
    assert own.get_vocab() != other.get_vocab()
    ids = own("12+ab=", return_tensors="pt").input_ids
    method = gratis.SpeculativeThinking(target=large, **SPELLED, **NO_WORDS, not_reasoning=True)
    with gratis.attach(small, method) as handle:
        out = generate(small, ids, do_sample=False)
    report = handle.report()["speculative-thinking"]
    taken = report["takeovers"][0]
    assert len(taken) >= 2
    prompt = other("12+ab=\n").input_ids
    whole = ""
    for one, (first, end, _) in zip(taken, report["places"][0], strict=True):
        before = own.decode(out[0, ids.shape[1] : ids.shape[1] + first], clean_up_tokenization_spaces=False)
        assert before.startswith(whole)
        said = own.decode(out[0, ids.shape[1] + first : ids.shape[1] + end], clean_up_tokenization_spaces=False)
        # The last one may be cut at the call's length.
        assert written(large, other, prompt, before, one["tokens"]).startswith(said)
        assert said == one["text"] or end == out.shape[1] - ids.shape[1]
        whole = before + said
    assert out.shape[1] == ids.shape[1] + 40
    with gratis.attach(small, method), pytest.raises(InputError, match="SuppressTokens"):
        generate(small, ids, do_sample=False, suppress_tokens=[4])


def test_every_token_is_read_once_by_models_of_different_vocabularies():
    small, own = spelling(0, ())
    large, _ = spelling(1, ("~~", "^|^", "%%%%"))
    read = []
    method = gratis.SpeculativeThinking(target=large, **SPELLED, **NO_WORDS, not_reasoning=True)
    with gratis.attach(small, method) as handle:
        large.register_forward_hook(
            lambda module, args, kwargs, out: read.append(kwargs["input_ids"]), with_kwargs=True
        )
        out = generate(small, own("12+ab=", return_tensors="pt").input_ids, do_sample=False)
    report = handle.report()["speculative-thinking"]
    assert sum(ids.shape[1] for ids in read) == report["encoded"][0]["large"]
    # One token of the large model is at least one of the small model's: no more are read than the text has.
    assert report["encoded"][0]["large"] <= out.shape[1] + 1


def test_a_streamer_sees_what_was_committed_and_an_interrupted_call_tells_it():
    class Seen:
        def __init__(self, limit=None):
            self.tokens, self.limit, self.puts = [], limit, 0

        def put(self, value):
            self.puts += 1
            if self.limit is not None and self.puts > self.limit:
                raise KeyboardInterrupt
            self.tokens += value.flatten().tolist()

        def end(self):
            self.puts = -1

    model, ids = lettered(), tiny.prompt()
    method = gratis.SpeculativeThinking(target=lettered(1), **TOKENS, **NO_WORDS, not_reasoning=True)
    with gratis.attach(model, method) as handle:
        seen = Seen()
        out = generate(model, ids, do_sample=False, streamer=seen)
        assert seen.tokens == out[0].tolist()
        broken = Seen(limit=3)
        with pytest.raises(KeyboardInterrupt):
            generate(model, ids, do_sample=False, streamer=broken)
        held = handle.report()["speculative-thinking"]["interrupted"]
    assert held == out[0, : len(held)].tolist()
    assert len(held) >= ids.shape[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delimiters": ()}, "delimiters is empty"),
        ({"delimiters": ("",)}, "empty text"),
        ({"reflection": ("Wait",)}, "lower-case"),
        ({"reflection": "wait"}, "list of values"),
        ({"verification": (3,)}, "verification must be"),
        ({"takeover_tokens": 0}, "takeover_tokens"),
        ({"max_negatives": 3}, "must not be below"),
        ({"delimiter_tokens": (-1,)}, "token ids"),
    ],
)
def test_parameters_that_make_no_sense(options, message):
    with pytest.raises(ParameterError, match=message):
        gratis.SpeculativeThinking(**options)


def test_tokenizers_without_the_delimiter_and_chats_that_cannot_go_on_are_refused():
    with pytest.raises(SubjectError, match="cannot write"):
        gratis.attach(lettered(), gratis.SpeculativeThinking())
    with pytest.raises(SubjectError, match="goes on from the beginning"):
        gratis.attach(Chat(lambda messages, **_: "x"), gratis.SpeculativeThinking())
    with pytest.raises(SubjectError, match="goes on from the beginning"):
        gratis.attach(lettered(), gratis.SpeculativeThinking(target=Chat(lambda messages, **_: "x"), **TOKENS))


# Over chats


class Scripted:
    """A chat's back end that goes on from the beginning of an answer: `go_on(text)` is what comes next."""

    model, continues = "scripted", True

    def __init__(self, go_on):
        self.go_on, self.begun = go_on, []

    def generate(self, requests):
        replies = []
        for request in requests:
            last = request.messages[-1]
            text = last["content"] if last["role"] == "assistant" else ""
            self.begun.append(text)
            said = self.go_on(text)
            if isinstance(said, Exception):
                replies.append(Reply.failed(str(said)))
                continue
            stops = [said.index(stop) for stop in request.stop if stop in said]
            stopped = bool(stops)
            words = said[: min(stops)] if stops else said
            replies.append(
                Reply(words, stopped_by="\n\n" if stopped else "", usage=Usage(input=9, output=len(words.split())),
                      finish_reason="stop")
            )  # fmt: skip
        return replies


STORY = "First, 2+3=6.\n\nWait, 2+3 is 5.\n\nSo it is \\boxed{5}."


def test_two_chats_answer_questions_side_by_side():
    small = Chat(Scripted(lambda text: STORY[len(text) :]))
    large = Chat(Scripted(lambda text: "Hold on: it is 5, so \\boxed{5}."))
    method = gratis.SpeculativeThinking(target=large, opening="", instruction="")
    with gratis.attach(small, method) as handle:
        answers = small.answer_many(["What is 2+3?", "And 2 plus 3?"], "text")
    assert [answer.response for answer in answers] == ["First, 2+3=6.\n\nHold on: it is 5, so \\boxed{5}."] * 2
    report = handle.report()["speculative-thinking"]
    assert (report["questions"], report["takeovers"], report["target_calls"]) == (2, 2, 2)
    assert large.backend.begun == ["First, 2+3=6.\n\n"] * 2, "the target reads the whole text with its delimiter"


def test_a_target_that_does_not_answer_leaves_the_small_models_text():
    small = Chat(Scripted(lambda text: STORY[len(text) :]))
    large = Chat(Scripted(lambda text: ChatError("down")))
    method = gratis.SpeculativeThinking(target=large, opening="", instruction="")
    with gratis.attach(small, method) as handle:
        assert small.answer("What is 2+3?").response == STORY
    assert handle.report()["speculative-thinking"]["failed_calls"] >= 1
    dead = Chat(Scripted(lambda text: ChatError("down")))
    with gratis.attach(dead, method), pytest.raises(ChatError, match="down"):
        dead.answer("What is 2+3?")
