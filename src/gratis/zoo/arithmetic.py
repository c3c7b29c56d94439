r"""Step-by-step arithmetic as text: problems, worked solutions with checks, and reading the answer.

A problem adds and subtracts a few whole numbers. A solution works through it in paragraphs: a step in one go, where
that is hard (a digit carries or borrows) mostly a check of it digit by digit, at the end the answer:

    47+28-14
    <think>
    First, 47+28=65.

    Wait, let me check 47+28: 7+8=15, 4+2+1=7, so 75. It is 75, not 65.

    Then 75-14=61.

    So the final answer is \boxed{61}.

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
    "The answer is ", "Alternatively, ",
)  # fmt: skip
CHARACTERS = "".join(chr(code) for code in range(32, 127)) + "\n"
OPENINGS = ("Wait, let me check ", "Hold on, let me check ", "Let me verify ", "Alternatively, ")
"""How a check of a step begins."""


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


def problems(count: int, seed: int, terms: tuple[int, int] = (3, 4), largest: int = 99) -> list[Problem]:
    """`count` problems of `terms` (fewest, most) numbers of at least 10; values on the way are within 0 to `largest`.

    Raises InputError for a negative count, fewer than two terms, or `largest` below 30.
    """
    if count < 0 or not 2 <= terms[0] <= terms[1] or largest < 30:
        raise InputError(
            f"Problems need a count of at least 0, at least two terms and values up to 30 at least, not {count}, {terms} "
            f"and {largest}."
        )
    generator = np.random.default_rng([seed, 7])
    return [_problem(generator, terms, largest) for _ in range(count)]


def _problem(generator: np.random.Generator, terms: tuple[int, int], largest: int) -> Problem:
    value = int(generator.integers(10, largest + 1))
    numbers, signs = [value], []
    for _ in range(int(generator.integers(terms[0], terms[1] + 1)) - 1):
        adds = value < 20 or (value <= largest - 10 and generator.random() < 0.5)
        number = int(generator.integers(10, (largest - value if adds else value) + 1))
        numbers.append(number)
        signs.append(1 if adds else -1)
        value += signs[-1] * number
    return Problem(tuple(numbers), tuple(signs))


def carries(value: int, sign: int, number: int) -> bool:
    """Whether any digit of the sum carries, or of the difference borrows: what makes a step hard."""
    places = range(1, len(str(max(value, number))) + 1)
    rest = [(value % 10**place, number % 10**place) for place in places]
    return any(
        have < other if sign < 0 else have + other >= 10**place
        for place, (have, other) in zip(places, rest, strict=True)
    )


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
    problem: Problem,
    generator: np.random.Generator,
    mistakes: tuple[float, float] = (0.03, 0.25),
    checks: tuple[float, float] = (0.35, 0.85),
    waits: float = 0.25,
) -> Solution:
    """A worked solution. The pairs are probabilities for easy and for hard steps (those that carry).

    A step is written wrong with probability `mistakes`, and then always checked; a right one is checked with
    probability `checks`. A check begins with the first of `OPENINGS` with probability `waits`, else with any other.
    What it corrects is correct from there on, so that every solution ends right.
    """
    parts: list[str] = []
    taught: list[bool] = []

    def add(text: str, teach: bool = True) -> None:
        parts.append(text)
        taught.append(teach)

    for place, (value, sign, number) in enumerate(problem.steps()):
        expression, result = f"{value}{'+' if sign > 0 else '-'}{number}", value + sign * number
        hard = carries(value, sign, number)
        wrong = generator.random() < mistakes[hard]
        checked = wrong or generator.random() < checks[hard]
        written = _slip(result, generator) if wrong else result
        add(("First, " if place == 0 else "Then ") + expression + "=")
        add(f"{written}", teach=not wrong)
        add(".\n\n")
        if checked:
            others = int(generator.integers(1, len(OPENINGS)))
            opening = OPENINGS[0 if generator.random() < waits else others]
            verdict = f"It is {result}, not {written}." if wrong else f"Yes, {result} is right."
            add(f"{opening}{expression}: {digit_work(value, sign, number)}, so {result}. {verdict}\n\n")
    add(f"So the final answer is \\boxed{{{problem.answer}}}.")
    return Solution(tuple(parts), tuple(taught))


def _slip(result: int, generator: np.random.Generator) -> int:
    """A number near the result that differs by one in one place, as where a carry was forgotten."""
    place: int = 10 ** int(generator.integers(0, len(str(result))))
    slipped = result + place * (1 if generator.random() < 0.5 else -1)
    return slipped if slipped >= 0 else result + place


def answer_of(text: str) -> int | None:
    """The last boxed whole number of a solution, or None."""
    found = re.findall(r"\\boxed\{(\d+)\}", text)
    return int(found[-1]) if found else None


def accuracy(texts: Sequence[str], asked: Sequence[Problem]) -> float:
    """Share of solutions whose boxed answer is right."""
    if len(texts) != len(asked) or not texts:
        raise InputError(f"As many solutions as problems are needed, at least one, not {len(texts)} and {len(asked)}.")
    return sum(answer_of(text) == problem.answer for text, problem in zip(texts, asked, strict=True)) / len(asked)
