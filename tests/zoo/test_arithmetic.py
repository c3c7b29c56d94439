import re

import numpy as np
import pytest

from gratis.contract.errors import InputError
from gratis.zoo.arithmetic import (
    CHARACTERS,
    OPENINGS,
    PIECES,
    Problem,
    accuracy,
    answer_of,
    carries,
    digit_work,
    problems,
    solution,
)
from gratis.zoo.masked_arithmetic import (
    ANSWER,
    SUFFIX_PLACE,
    WINDOW,
    answers_of,
    by_prompt_length,
    column_work,
    sums,
    window_ids,
)
from gratis.zoo.text import character_tokenizer, word_tokenizer

TOKENIZER = character_tokenizer(CHARACTERS, 1024, mask=True, pieces=PIECES)


def test_problems_are_seeded_and_stay_in_range():
    assert problems(20, 1) == problems(20, 1)
    assert problems(20, 1) != problems(20, 2)
    for problem in problems(500, 3):
        assert problem.answer == eval(problem.question)
        assert all(0 <= value <= 99 for value, _, _ in problem.steps())
        assert 0 <= problem.answer <= 99
        assert 3 <= len(problem.numbers) <= 4
    assert max(problem.answer for problem in problems(500, 3, largest=999)) > 800


@pytest.mark.parametrize(
    ("value", "sign", "number", "work"),
    [(347, 1, 285, "7+5=12, 4+8+1=13, 3+2+1=6"), (342, -1, 119, "12-9=3, 4-1-1=2, 3-1=2"),
     (47, 1, 5, "7+5=12, 4+0+1=5"), (103, -1, 99, "13-9=4, 10-9-1=0, 1-0-1=0")],
)  # fmt: skip
def test_digit_work(value, sign, number, work):
    assert digit_work(value, sign, number) == work


def test_digit_work_spells_the_result():
    for problem in problems(300, 5, terms=(2, 2)):
        (step,) = problem.steps()
        columns = [int(part.split("=")[1]) for part in digit_work(*step).split(", ")]
        assert all(column < 20 for column in columns)
        digits = [column % 10 for column in columns[:-1]] + columns[-1:]
        assert sum(digit * 10**place for place, digit in enumerate(digits)) == problem.answer
        for part in digit_work(*step).split(", "):
            left, right = part.split("=")
            assert eval(left) == int(right)


@pytest.mark.parametrize(
    ("value", "sign", "number", "hard"),
    [(47, 1, 28, True), (41, 1, 28, False), (47, -1, 28, True), (48, -1, 27, False), (95, 1, 4, False), (5, 1, 95, True),
     (190, 1, 20, True), (103, -1, 13, True)],
)  # fmt: skip
def test_steps_that_carry_are_hard(value, sign, number, hard):
    assert carries(value, sign, number) == hard


def test_digit_work_shows_a_carry_exactly_where_the_step_is_hard():
    for problem in problems(300, 11):
        for step in problem.steps():
            columns = digit_work(*step).split(", ")
            shown = any(int(column.split("=")[1]) > 9 for column in columns) or any(
                int(re.split("[-+]", column)[0]) > 9 for column in columns
            )
            assert carries(*step) == shown


def test_hard_steps_are_checked_more_often():
    generator = np.random.default_rng(1)
    counted = {True: [0, 0], False: [0, 0]}
    for problem in problems(300, 12):
        text = solution(problem, generator).text
        for value, sign, number in problem.steps():
            count = counted[carries(value, sign, number)]
            count[0] += any(f"{opening}{value}{'+' if sign > 0 else '-'}{number}: " in text for opening in OPENINGS)
            count[1] += 1
    assert counted[True][0] / counted[True][1] == pytest.approx(0.25 + 0.75 * 0.85, abs=0.08)
    assert counted[False][0] / counted[False][1] == pytest.approx(0.03 + 0.97 * 0.35, abs=0.06)


def test_solutions_end_right_and_every_planted_mistake_is_corrected_and_not_taught():
    generator = np.random.default_rng(0)
    planted = 0
    for problem in problems(300, 6):
        worked = solution(problem, generator)
        assert answer_of(worked.text) == problem.answer
        for place, taught in enumerate(worked.taught):
            if not taught:
                planted += 1
                expression = re.sub(r"^(First, |Then )|=$", "", worked.parts[place - 1])
                assert eval(expression) != int(worked.parts[place])
                assert f"It is {eval(expression)}, not {worked.parts[place]}." in worked.parts[place + 2]
    assert 40 < planted < 130
    assert all(solution(problem, generator, mistakes=(0, 0), checks=(0, 0)).taught for problem in problems(20, 7))


def test_answers_are_read_from_the_last_box():
    assert answer_of("\\boxed{1} and \\boxed{23}.") == 23
    assert answer_of("no box") is None
    assert accuracy(["\\boxed{3}", "\\boxed{4}"], [Problem((1, 2), (1,)), Problem((1, 2), (1,))]) == 0.5
    with pytest.raises(InputError):
        accuracy([], [])
    for wrong in ({"count": -1}, {"terms": (1, 3)}, {"largest": 20}):
        with pytest.raises(InputError, match="at least"):
            problems(**{"count": 1, "seed": 0, **wrong})


def test_the_tokenizer_splits_losslessly_and_phrases_are_one_token():
    generator = np.random.default_rng(0)
    for problem in problems(50, 8):
        text = problem.prompt + solution(problem, generator).text
        ids = TOKENIZER(text).input_ids
        assert TOKENIZER.decode(ids) == text
        assert TOKENIZER.unk_token_id not in ids
    assert len(TOKENIZER("\n\n").input_ids) == 1
    assert len(TOKENIZER("347").input_ids) == 3
    assert TOKENIZER.mask_token_id == 4
    assert TOKENIZER("\u00e9").input_ids == [TOKENIZER.unk_token_id]


def test_windows_hold_the_answer_where_they_say():
    for problem in sums(200, 9):
        window = window_ids(TOKENIZER, problem)
        assert window.shape == (WINDOW,)
        assert TOKENIZER.decode(window[SUFFIX_PLACE]) == "The answer is "
        assert answers_of(TOKENIZER, window[None]) == [problem.answer]
        assert window[ANSWER[-1] + 1] == TOKENIZER.eos_token_id
    ((prompts, windows),) = by_prompt_length(TOKENIZER, sums(64, 10))
    assert len(prompts) == len(windows) == 64
    for problem in (Problem((100, 200, 300), (1, 1)), Problem((300, 200), (-1,)), Problem((300, 20), (1,))):
        with pytest.raises(InputError, match="two numbers of three digits"):
            window_ids(TOKENIZER, problem)


def test_columns_hold_what_is_carried_into_them():
    assert column_work(347, 285) == "7+5+0=12, 4+8+1=13, 3+2+1=06"
    for problem in sums(100, 4):
        columns = column_work(*problem.numbers).split(", ")
        carried = 0
        for column in columns:
            left, right = column.split("=")
            assert sum(int(digit) for digit in left.split("+")) == int(right)
            assert int(left[-1]) == carried
            carried = int(right[0])
        assert int("".join(column[-1] for column in reversed(columns))) == problem.answer


def test_sums_that_are_held_out_never_occur_in_the_other_part():
    held_out, seen = set(sums(2000, 1)), set(sums(20_000, 2, held_out=False))
    assert not held_out & seen
    assert sums(50, 1) == sums(50, 1) != sums(50, 3)
    assert all(min(problem.numbers) >= 100 and problem.answer <= 999 for problem in held_out)


def test_word_tokenizer():
    tokenizer = word_tokenizer(("a", "red", "circle"), 8)
    assert tokenizer("a red circle").input_ids == [1, 4, 5, 6, 2]
    assert tokenizer("a blue circle").input_ids == [1, 4, 3, 6, 2]
    assert tokenizer(["a", "a red"], padding="max_length").input_ids[0] == [1, 4, 2, 0, 0, 0, 0, 0]
