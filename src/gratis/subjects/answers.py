"""Finding the answer in a response, and voting over answers.

An extractor turns a response's text into the string that is compared with others', or None where it holds none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gratis.contract.errors import InputError, UnknownNameError
from gratis.subjects.opening import tokenizer_of

AnswerName = Literal["none", "response", "text", "last line", "number", "choice", "boxed", "code"]
"""Where the answer is in a response: see `extract`. `none` and `response` need no tokenizer."""

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_CHOICE = re.compile(r"(?<![A-Za-z0-9])\(?([A-J])(?=[).:,\s]|$)")
_SAID = re.compile(r"(?:answer|choice|option)\s*(?:is|:)?\s*\**\(?([A-J])(?![A-Za-z0-9])", re.IGNORECASE)
_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


def whole_text(text: str) -> str | None:
    """The response without surrounding blanks."""
    return text.strip() or None


def last_line(text: str) -> str | None:
    """The last line that is not blank."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else None


def number(text: str) -> str | None:
    """The last number, in its shortest form: `1,250.0`, `1250` and `+1250` are one answer."""
    found = _NUMBER.findall(text)
    if not found:
        return None
    sign = "-" if found[-1].startswith("-") else ""
    whole, _, fraction = found[-1].lstrip("+-").replace(",", "").partition(".")
    whole, fraction = whole.lstrip("0") or "0", fraction.rstrip("0")
    value = f"{whole}.{fraction}" if fraction else whole
    return value if value == "0" else sign + value


def choice(text: str) -> str | None:
    """The letter of a multiple-choice answer: the one said to be the answer last, else the last that stands alone."""
    found = _SAID.findall(text) or _CHOICE.findall(text)
    return found[-1].upper() if found else None


def boxed(text: str) -> str | None:
    r"""What the last `\boxed{…}` holds, braces balanced, blanks removed."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed{")
    for end in range(begin - 1, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return re.sub(r"\s+", "", text[begin:end]) or None
    return None


def code(text: str) -> str | None:
    """All fenced Python blocks, each stripped, joined by a blank line."""
    blocks = [block.strip() for block in _FENCE.findall(text)]
    return "\n\n".join(block for block in blocks if block) or None


def first_code(text: str) -> str | None:
    """The first fenced Python block as it stands, indentation kept; None where there is none."""
    found = _FENCE.search(text)
    return found.group(1).rstrip() if found is not None and found.group(1).strip() else None


EXTRACTORS: dict[str, Callable[[str], str | None]] = {
    "text": whole_text, "last line": last_line, "number": number, "choice": choice, "boxed": boxed, "code": code,
}  # fmt: skip


def extract(name: str, text: str) -> str | None:
    """The answer in `text` by the extractor called `name`, None where there is none. Raises UnknownNameError."""
    if name not in EXTRACTORS:
        raise UnknownNameError.among("answer extractor", name, EXTRACTORS)
    return EXTRACTORS[name](text)


def response_answers(model: Any, responses: Sequence[Sequence[int]], name: AnswerName) -> list[str | None]:
    """The answer of each response (token ids): by the extractor `name` from its text, or the tokens themselves.

    `none` finds no answer; `response` compares whole responses token by token.
    """
    if name == "none":
        return [None] * len(responses)
    if name == "response":
        return [" ".join(map(str, response)) for response in responses]
    tokenizer = tokenizer_of(model)
    return [extract(name, tokenizer.decode(response, skip_special_tokens=True)) for response in responses]


@dataclass(frozen=True)
class Vote:
    """The outcome of a vote over responses."""

    index: int
    """The response that won: the first of those that hold the answer with the largest total."""
    totals: tuple[float, ...]
    """(responses,) what each response holds: its answer's votes at the first response with that answer, else 0."""
    ranking: tuple[int, ...]
    """All responses: the winner, then by their answers' votes, then by score."""


def borda(scores: Sequence[float], answers: Sequence[str | None], power: float) -> Vote:
    """Rank-weighted vote (Z. Kang et al., 2025, eq. 12): rank r of N by descending score casts `(N - r + 1) ** power`.

    Votes go to the first response with an equal answer; responses without an answer (None) keep their rank and cast
    nothing. Ties, in rank and in votes, go to the lower index. `power` 0 is majority voting; a large power is the
    best-scored answer. Where no response has an answer the best-scored response is returned.

    Raises InputError for no responses, lists of unequal length, a power that is negative or not finite, or a score
    that is not a number.
    """
    if len(scores) != len(answers):
        raise InputError(f"There are {len(scores)} scores for {len(answers)} answers: give one of each per response.")
    if not scores:
        raise InputError("There is nothing to vote on: give at least one response.")
    if not 0 <= power < float("inf"):
        raise InputError(f"The power of a Borda vote must be finite and >= 0, not {power}.")
    order = ranking(scores)
    first: dict[str, int] = {}
    for index, answer in enumerate(answers):
        if answer is not None:
            first.setdefault(answer, index)
    totals = [0.0] * len(scores)
    for rank, index in enumerate(order, start=1):
        if (answer := answers[index]) is not None:
            totals[first[answer]] += float(len(scores) - rank + 1) ** power
    winner = max(first.values(), key=lambda index: (totals[index], -index)) if first else order[0]

    def held(index: int) -> float:
        answer = answers[index]
        return totals[first[answer]] if answer is not None else -1.0

    rest = sorted(order, key=lambda index: -held(index))
    return Vote(winner, tuple(totals), (winner, *(index for index in rest if index != winner)))


def ranking(scores: Sequence[float]) -> list[int]:
    """Indices by descending score, ties by index. Raises InputError for a score that is not a number."""
    if any(score != score for score in scores):
        raise InputError("A score is not a number: the model's logits were not finite.")
    return sorted(range(len(scores)), key=lambda index: (-scores[index], index))
