r"""Step-by-step arithmetic as text: problems, worked solutions with checks, and reading the answer.

A problem adds and subtracts two to four whole numbers. A solution works through it in paragraphs: a step, now and
then a check of that step digit by digit, at the end the answer:

    347+285-119
    <think>
    First, 347+285=622.

    Wait, let me check 347+285: 7+5=12, 4+8+1=13, 3+2+1=6, so 632. It is 632, not 622.

    Then 632-119=513.

    So the final answer is \boxed{513}.

`arithmetic-small` and `arithmetic-large` were trained on such solutions; planted mistakes were shown to them and not
taught. Their tokenizer writes each digit as one token and common phrases as one token each.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gratis.contract.errors import InputError

PIECES = (
    "<think>\n", "\n\n", "First, ", "Then ", "Wait, ", "Hold on, ", "let me check ", "Let me verify ", ": ", ", so ",
    ". ", ", ", "Yes, ", " is right", "It is ", ", not ", "So the ", "final answer", " is ", "\\boxed{", "}",
    "The answer is ",
)  # fmt: skip
CHARACTERS = "".join(chr(code) for code in range(32, 127)) + "\n"
_LARGEST = 999


@dataclass(frozen=True, slots=True)
class Problem:
    """A sum and difference of whole numbers: `numbers` joined by `signs` (each +1 or -1), from left to right."""

    numbers: tuple[int, ...]
    signs: tuple[int, ...]

    @property
    def question(self) -> str:
        """For example "347+285-119"."""
        rest = zip(self.signs, self.numbers[1:], strict=True)
        return str(self.numbers[0]) + "".join(f"{'+' if sign > 0 else '-'}{number}" for sign, number in rest)

    @property
    def prompt(self) -> str:
        """What a model of the zoo reads before it begins to reason."""
        return f"{self.question}\n<think>\n"

    @property
    def answer(self) -> int:
        """The right answer."""
        return self.numbers[0] + sum(sign * number for sign, number in zip(self.signs, self.numbers[1:], strict=True))

    def steps(self) -> list[tuple[int, int, int]]:
        """(value so far, sign, next number) from left to right."""
        value, found = self.numbers[0], []
        for sign, number in zip(self.signs, self.numbers[1:], strict=True):
            found.append((value, sign, number))
            value += sign * number
        return found


def problems(count: int, seed: int, terms: tuple[int, int] = (2, 4)) -> list[Problem]:
    """`count` problems of `terms` (fewest, most) numbers; every value on the way lies within 0 to 999."""
    if count < 0 or not 2 <= terms[0] <= terms[1]:
        raise InputError(f"Problems need a count of at least 0 and at least two terms, not {count} and {terms}.")
    generator = np.random.default_rng([seed, 7])
    return [_problem(generator, terms) for _ in range(count)]


def _problem(generator: np.random.Generator, terms: tuple[int, int]) -> Problem:
    value = int(generator.integers(10, 600))
    numbers, signs = [value], []
    for _ in range(int(generator.integers(terms[0], terms[1] + 1)) - 1):
        adds = value < 40 or (value < 800 and generator.random() < 0.5)
        number = int(generator.integers(10, min(_LARGEST - value, 599) + 1 if adds else min(value, 599) + 1))
        numbers.append(number)
        signs.append(1 if adds else -1)
        value += signs[-1] * number
    return Problem(tuple(numbers), tuple(signs))


def digit_work(value: int, sign: int, number: int) -> str:
    """The sum or difference written digit by digit from the right, for example "7+5=12, 4+8+1=13, 3+2+1=6"."""
    top, bottom = str(value)[::-1], str(number)[::-1]
    carried, parts = 0, []
    for place in range(max(len(top), len(bottom))):
        have = int(top[place]) if place < len(top) else 0
        other = int(bottom[place]) if place < len(bottom) else 0
        total = have + sign * (other + carried)
        borrows = total < 0
        terms = [other, carried] if carried else [other]
        shown = f"{have + 10 * borrows}" + "".join(f"{'+' if sign > 0 else '-'}{term}" for term in terms)
        parts.append(f"{shown}={total + 10 * borrows}")
        carried = int(borrows if sign < 0 else total >= 10)
    return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Solution:
    """A worked solution as parts of text; `taught[i]` is False where part i is a planted mistake."""

    parts: tuple[str, ...]
    taught: tuple[bool, ...]

    @property
    def text(self) -> str:
        """The whole solution, from after `<think>` to the boxed answer."""
        return "".join(self.parts)


def solution(
    problem: Problem, generator: np.random.Generator, mistakes: float = 0.15, checks: float = 0.25
) -> Solution:
    """A worked solution. Steps are wrong with probability `mistakes` and then checked nine times in ten; right ones
    are checked with probability `checks`. What a check corrects is correct from there on; a mistake that nobody checks
    is not planted, so that every solution ends with the right answer.
    """
    parts: list[str] = []
    taught: list[bool] = []

    def add(text: str, teach: bool = True) -> None:
        parts.append(text)
        taught.append(teach)

    for place, (value, sign, number) in enumerate(problem.steps()):
        expression, result = f"{value}{'+' if sign > 0 else '-'}{number}", value + sign * number
        wrong = generator.random() < mistakes
        checked = wrong or generator.random() < checks
        written = _slip(result, generator) if wrong else result
        add(("First, " if place == 0 else "Then ") + expression + "=")
        add(f"{written}", teach=not wrong)
        add(".\n\n")
        if checked:
            opening = ("Wait, let me check ", "Let me verify ", "Hold on, let me check ")[int(generator.integers(3))]
            verdict = f"It is {result}, not {written}." if wrong else f"Yes, {result} is right."
            add(f"{opening}{expression}: {digit_work(value, sign, number)}, so {result}. {verdict}\n\n")
    add(f"So the final answer is \\boxed{{{problem.answer}}}.")
    return Solution(tuple(parts), tuple(taught))


def _slip(result: int, generator: np.random.Generator) -> int:
    """A number near the result that differs in one digit, as a slip of the pen does."""
    place = 10 ** int(generator.integers(0, len(str(result))))
    slipped = result + place * (1 if generator.random() < 0.5 else -1)
    return slipped if 0 <= slipped <= _LARGEST else result + (1 if result == 0 else -1)


def answer_of(text: str) -> int | None:
    """The last boxed whole number of a solution, or None."""
    found = re.findall(r"\\boxed\{(\d+)\}", text)
    return int(found[-1]) if found else None


def accuracy(texts: Sequence[str], asked: Sequence[Problem]) -> float:
    """Share of solutions whose boxed answer is right."""
    if len(texts) != len(asked) or not texts:
        raise InputError(f"As many solutions as problems are needed, at least one, not {len(texts)} and {len(asked)}.")
    return sum(answer_of(text) == problem.answer for text, problem in zip(texts, asked, strict=True)) / len(asked)
