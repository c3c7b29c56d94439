from __future__ import annotations

import random
import warnings

import pytest

import gratis
from gratis.contract.errors import InputError, ParameterError
from gratis.methods.programs.sec import ASKED, instruction, parse, render_answer, render_question
from gratis.subjects.chat import Chat, ChatError
from gratis.subjects.chat.formats import FORMATS, integers, normal_latex
from tests.tiny_chat import scripted

NUMBER = FORMATS["number"]


class Scripted:
    """A model that answers by a function of the attempt, and remembers what it was asked."""

    def __init__(self, write):
        self.write, self.generations, self.answers = write, [], []

    def __call__(self, messages, **parameters):
        if "similar ones with" in messages[-1]["content"]:
            self.generations.append((messages, parameters))
            return self.write(parameters["sample_index"], messages)
        self.answers.append((messages, parameters))
        return "The answer is 7."


def demos(count=ASKED, solution=False, start=1):
    return "\n\n".join(
        f"[Question{n}: What is {n} plus {n}?\n"
        + (f"Solution{n}: Double {n}.\n" if solution else "")
        + f"Answer{n}: {2 * n}]"
        for n in range(start, start + count)
    )


def test_valid_at_the_seventh_attempt():
    model = Scripted(lambda attempt, messages: demos() if attempt == 6 else "no")
    with gratis.attach(Chat(model), gratis.SEC(shots=4)) as chat:
        answer = chat.answer("What is 3 plus 4?", "number")
    assert [p["temperature"] for _, p in model.generations] == [0] * 6 + [1]
    assert len({m[-1]["content"] for m, _ in model.generations}) == 6
    assert len(model.answers) == 1
    assert (answer.answer, answer.attempts, answer.valid, answer.fallback) == ("7", 7, True, None)
    assert [d["answer"] for d in answer.demos] == ["2", "4", "6", "8"]


@pytest.mark.parametrize(("mode", "calls"), [("vanilla", 24), ("cot", 48)])
def test_after_all_attempts_it_falls_back_and_says_so(mode, calls):
    model = Scripted(lambda attempt, messages: "no")
    with gratis.attach(Chat(model), gratis.SEC(shots=2, mode=mode)) as chat:
        answer = chat.answer("What is 3 plus 4?", "number")
        assert chat.report()["sec"] == {"questions": 1, "generation_calls": calls, "valid": 0, "fallbacks": 1}
    assert answer.fallback == "zero-shot"
    assert answer.attempts == calls
    assert [m["role"] for m in model.answers[0][0]] == ["system", "user"]


def test_rationales_fall_back_to_answers_of_the_same_question():
    model = Scripted(lambda attempt, messages: "no" if "solution" in messages[-1]["content"] else demos())
    with gratis.attach(Chat(model), gratis.SEC(shots=2, mode="cot", max_attempts=3)) as chat:
        answer = chat.answer("What is 3 plus 4?", "number")
    assert (answer.fallback, answer.valid, answer.attempts) == ("vanilla", True, 4)


def test_a_chat_that_fails_is_not_asked_again_and_says_why():
    model = Scripted(lambda attempt, messages: (_ for _ in ()).throw(ChatError("HTTP 400: too long")))
    with gratis.attach(Chat(model), gratis.SEC()) as chat, pytest.raises(ChatError, match="write examples: HTTP 400"):
        chat.answer("What is 3 plus 4?", "number")
    assert len(model.generations) == 1


def test_one_paraphrase_is_the_first_one():
    model = Scripted(lambda attempt, messages: "no")
    with gratis.attach(Chat(model), gratis.SEC(paraphrases=1, max_attempts=3, greedy_attempts=1)) as chat:
        chat.answer("What is 3 plus 4?", "number")
    assert {m[-1]["content"] for m, _ in model.generations} == {
        instruction(NUMBER, {"question": "What is 3 plus 4?"}, "vanilla", 0)
    }
    assert [p["temperature"] for _, p in model.generations] == [0, 1, 1]


def test_hours_on_a_local_model_are_warned_of():
    from gratis.contract.errors import GratisWarning

    here = Chat(lambda messages, **parameters: "")
    here.backend.runs_here = True
    with pytest.warns(GratisWarning, match="72,000 tokens"):
        gratis.attach(here, gratis.SEC()).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gratis.attach(here, gratis.SEC(max_attempts=2, generation_tokens=400)).detach()
        gratis.attach(Chat(lambda messages, **parameters: ""), gratis.SEC()).detach()


def test_demonstrations_are_chat_turns_before_the_question():
    model = Scripted(lambda attempt, messages: demos(solution=True))
    with gratis.attach(Chat(model), gratis.SEC(shots=3, mode="cot")) as chat:
        chat.answer("What is 3 plus 4?", "number")
    messages, parameters = model.answers[0]
    assert [m["role"] for m in messages] == ["system"] + ["user", "assistant"] * 3 + ["user"]
    assert messages[1]["content"] == "What is 1 plus 1?"
    assert messages[2]["content"] == "Solution: Double 1.\nThe answer is 2."
    assert messages[-1]["content"] == "What is 3 plus 4?"
    assert parameters["temperature"] == 0
    assert parameters["max_tokens"] == 800


def test_the_question_is_part_of_its_own_generation_request():
    model = Scripted(lambda attempt, messages: demos())
    with gratis.attach(Chat(model), gratis.SEC(shots=1)) as chat:
        chat.answer_many(["What is 30 plus 4?", "What is 50 plus 6?"], "number")
    asked = [m[-1]["content"] for m, _ in model.generations]
    assert len(asked) == 2
    assert asked[0].startswith("What is 30 plus 4?")
    assert asked[1].startswith("What is 50 plus 6?")


def test_shared_demonstrations_are_written_once():
    model = Scripted(lambda attempt, messages: demos())
    with gratis.attach(Chat(model), gratis.SEC(shots=1, share=True)) as chat:
        chat.answer_many(["What is 30 plus 4?", "What is 50 plus 6?"], "number")
    assert len(model.generations) == 1
    assert len(model.answers) == 2


def test_answers_only_show_no_rationale():
    with_solution = {"question": "q", "rationale": "because", "answer": "5"}
    assert render_answer(NUMBER, with_solution, "vanilla") == "The answer is 5."
    assert render_answer(NUMBER, with_solution, "vanilla", compatible=True) == "The answer is because."
    assert render_answer(FORMATS["choice"], with_solution, "vanilla") == "Answer: 5"
    assert render_answer(FORMATS["choice"], with_solution, "cot") == "Solution: because Answer: 5"
    assert render_answer(FORMATS["latex"], with_solution, "vanilla") == "Answer: $5$"
    assert render_answer(FORMATS["latex"], with_solution, "cot").startswith(
        "Solution: Let's think step by step. because"
    )


def test_a_copy_of_the_question_is_not_a_demonstration():
    model = Scripted(lambda attempt, messages: demos())
    with gratis.attach(Chat(model), gratis.SEC(shots=4)) as chat:
        answer = chat.answer("what is 2 PLUS 2 ?", "number")
    assert [d["question"] for d in answer.demos] == [f"What is {n} plus {n}?" for n in (1, 3, 4, 5)]


def test_no_shots_are_byte_identical_requests_to_the_plain_chat():
    plain, attached = [], []
    for seen, method in ((plain, None), (attached, gratis.SEC(shots=0))):
        chat = Chat(lambda messages, seen=seen, **p: seen.append((messages, p)) or scripted(messages))
        if method is not None:
            gratis.attach(chat, method)
        chat.answer("What is 3 plus 4?", "number")
        chat.answer({"question": "Which?", "labels": ["A", "B"], "texts": ["x", "y"]}, "choice")
    assert plain == attached


def test_a_generator_that_returns_human_examples_equals_few_shot():
    human = [("What is 1 plus 1?", "The answer is 2."), ("What is 2 plus 2?", "The answer is 4.")]
    model = Scripted(lambda attempt, messages: demos())
    with gratis.attach(Chat(model), gratis.SEC(shots=2)) as chat:
        chat.answer("What is 3 plus 4?", "number")
    turns = model.answers[0][0]
    assert [(turns[1]["content"], turns[2]["content"]), (turns[3]["content"], turns[4]["content"])] == human


def random_demo(kind, generator):
    words = ["apples", "trains", "seven", "left", "blue"]
    question = " ".join(generator.choices(words, k=4)) + "?"
    if kind == "choice":
        return {"question": question, "labels": list("ABCD"), "texts": [f"{w} {i}" for i, w in enumerate(generator.choices(words, k=4))],
                "rationale": "It follows.", "answer": generator.choice("ABCD")}  # fmt: skip
    if kind == "code":
        return {"header": f"def f{generator.randrange(99)}(x):", "answer": "    y = x\n    return y"}
    answer = str(generator.randrange(1000)) if kind == "number" else f"\\frac{{{generator.randrange(9)}}}{{7}}"
    return {"question": question, "rationale": "Step by step.", "answer": answer}


def written(kind, mode, demo, number):
    if kind == "code":
        return f"[Function Header{number}: {demo['header']}\nFunction Body{number}:\n{demo['answer']}]"
    lines = [f"[Question{number}: {demo['question']}"]
    if kind == "choice":
        lines += [f"Labels{number}: {' | '.join(demo['labels'])}", f"Texts{number}: {' | '.join(demo['texts'])}"]
    if mode == "cot":
        lines.append(f"Solution{number}: {demo['rationale']}")
    answer = f"${demo['answer']}$" if kind == "latex" else demo["answer"]
    return "\n".join([*lines, f"Answer{number}: {answer}]"])


@pytest.mark.parametrize(
    ("kind", "mode"),
    [(k, m) for k in ("number", "choice", "latex") for m in ("vanilla", "cot")] + [("code", "vanilla")],
)
def test_what_the_template_writes_is_parsed_back(kind, mode):
    generator = random.Random(0)
    form = FORMATS[kind]
    item = {"question": "Other?", "labels": list("ABCD"), "texts": list("wxyz"), "header": "def other():"}
    for blank in ("\n", "\n\n", "\n\n\n"):
        original = [random_demo(kind, generator) for _ in range(ASKED)]
        text = blank.join(written(kind, mode, demo, n) for n, demo in enumerate(original, 1))
        found = parse(form, f"Here they are:\n\n{text}\n", mode, item)
        assert [render_question(form, d) for d in found] == [render_question(form, d) for d in original]
        assert [render_answer(form, d, mode) for d in found] == [render_answer(form, d, mode) for d in original]


def test_incomplete_demonstrations_are_invalid_and_never_an_exception():
    generator = random.Random(1)
    form, item = FORMATS["choice"], {"question": "Other?", "labels": list("ABCD"), "texts": list("wxyz")}
    demo = random_demo("choice", generator)
    for change in ({"labels": list("ABC")}, {"answer": "E"}, {"texts": ["one"]}, {"question": ""}):
        assert parse(form, written("choice", "vanilla", {**demo, **change}, 1), "vanilla", item) == []
    assert parse(NUMBER, "[Question1: How many?\nAnswer1: none]", "vanilla", item) == []
    assert parse(NUMBER, "[Question1: How many?\nAnswer1: 4]", "cot", item) == []
    assert (
        parse(FORMATS["code"], "[Function Header1: def f():\nFunction Body1: pass]", "vanilla", {"header": "def g():"})
        == []
    )
    text = demos(solution=True)
    for _ in range(300):
        cut = list(text)
        for _ in range(5):
            del cut[generator.randrange(len(cut))]
        for kind in ("number", "choice", "latex", "text"):
            parse(FORMATS[kind], "".join(cut), generator.choice(["vanilla", "cot"]), item)


def test_instructions_ask_for_every_field_and_have_six_openings():
    item = {"question": "Q?"}
    texts = {instruction(NUMBER, item, "cot", a) for a in range(12)}
    assert len(texts) == 6
    assert all(f"Solution{n}" in t for t in texts for n in range(1, 6))
    assert "Function Header" in instruction(FORMATS["code"], {"header": "def f():"}, "vanilla", 0)
    assert "Heaser" not in instruction(FORMATS["code"], {"header": "def f():"}, "vanilla", 0)


def test_bad_use():
    with pytest.raises(ParameterError, match="shots"):
        gratis.SEC(shots=6)
    with gratis.attach(Chat(scripted), gratis.SEC(mode="cot")) as chat:
        with pytest.raises(ParameterError, match="code has no rationales"):
            chat.answer("def f():", "code")
        with pytest.raises(InputError, match="empty"):
            chat.answer("  ", "number")
        with pytest.raises(InputError, match="at least two options"):
            chat.answer({"question": "q", "labels": ["A"], "texts": ["x"]}, "choice")
        with pytest.raises(InputError, match="labels that differ"):
            chat.answer({"question": "q", "labels": ["A", "A"], "texts": ["x", "y"]}, "choice")


@pytest.mark.parametrize(
    ("kind", "text", "answer"),
    [
        ("number", "It is 1,204.", "1204"),
        ("number", "3 and 4. The answer is 12. Or 13", "12"),
        ("number", "3 then 4", "4"),
        ("number", "none", None),
        ("choice", "I think B", "B"),
        ("choice", "A or B? Answer: B", "B"),
        ("choice", "A against B. Surely", "B"),
        ("latex", "so $x$ and $y$. Answer: $ \\dfrac{1}{2} $", "\\frac{1}{2}"),
        ("latex", "it is 3", "3"),
    ],
)
def test_answers_are_read(kind, text, answer):
    item = {"labels": ["A", "B"], "texts": ["x", "y"]}
    assert FORMATS[kind].extract(text, item) == answer


def test_latex_in_one_spelling():
    assert normal_latex("3/4") == normal_latex("\\dfrac{3}{4}") == "\\frac{3}{4}"
    assert normal_latex("0.5") == "\\frac{1}{2}"
    assert normal_latex("90^\\circ") == "90"
    assert normal_latex("5 \\text{ cm}") == "5"
    assert integers("-3 and 1,000,000") == ["-3", "1000000"]
