"""Kinds of question: how one is put, and how its answer is read from the reply. Nothing that a model wrote is run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gratis.contract.errors import InputError, UnknownNameError

Item = Mapping[str, Any]


@dataclass(frozen=True)
class Format:
    """How one kind of question is put and read. Subclass it for a kind of your own."""

    name: str
    system: str
    """System role for solving."""

    def item(self, question: Any) -> Item:
        """A checked item from what the user passed. Raises InputError."""
        item = {"question": question} if isinstance(question, str) else dict(question)
        if not str(item.get("question", "")).strip():
            raise InputError("The question is empty.")
        return item

    def render(self, item: Item) -> str:
        """The user's turn."""
        return str(item["question"])

    def choices(self, item: Item) -> tuple[str, ...]:
        """The only possible answers, which are then compared by their probability; empty where anything is possible."""
        return ()

    def extract(self, text: str, item: Item) -> str | None:
        """The answer in a reply, None where there is none."""
        return text.strip() or None


class Number(Format):
    """Questions whose answer is a whole number."""

    def extract(self, text: str, item: Item) -> str | None:
        numbers = integers(text)
        if len(numbers) == 1:
            return numbers[0]
        after = text.rpartition("The answer is")[2] if "The answer is" in text else ""
        return next(iter(integers(after)), None) or (numbers[-1] if numbers else None)


class Choice(Format):
    """Multiple choice: `question`, `labels` and `texts`."""

    def item(self, question: Any) -> Item:
        item = super().item(question)
        labels, texts = item.get("labels"), item.get("texts")
        if not isinstance(labels, (list, tuple)) or not isinstance(texts, (list, tuple)) or len(labels) < 2:
            raise InputError("A choice question needs labels and texts of at least two options.")
        if len(set(labels)) != len(labels) or len(labels) != len(texts):
            raise InputError("A choice question needs as many texts as labels, and labels that differ.")
        return item

    def render(self, item: Item) -> str:
        options = "\n".join(f"{label}. {text}" for label, text in zip(item["labels"], item["texts"], strict=True))
        return f"{item['question']}\n{options}"

    def extract(self, text: str, item: Item) -> str | None:
        labels = [str(label) for label in item["labels"]]
        one = "|".join(re.escape(label) for label in labels)

        def found(pattern: str, within: str) -> list[str]:
            return list(dict.fromkeys(re.findall(pattern, within)))

        everywhere = found(rf"\b({one})\b", text)
        if len(everywhere) == 1:
            return everywhere[0]
        after = text.rpartition("Answer:")[2] if "Answer:" in text else ""
        for candidates in (found(rf"\b({one})\b", after), found(rf"\b({one})\.", text), everywhere):
            if candidates:
                return candidates[0]
        return None


class Latex(Format):
    """Questions whose answer is a LaTeX expression between dollar signs."""

    def extract(self, text: str, item: Item) -> str | None:
        groups = re.findall(r"\$([^$]+)\$", text)
        if len(groups) == 1:
            return normal_latex(groups[0])
        after = re.findall(r"\$([^$]+)\$", text.rpartition("Answer:")[2]) if "Answer:" in text else []
        if after:
            return normal_latex(after[-1])
        numbers = integers(text)
        return numbers[-1] if numbers else None


class Code(Format):
    """A function to complete: `header` is its signature and docstring. The answer is text; it is never run here."""

    def item(self, question: Any) -> Item:
        item = {"header": question} if isinstance(question, str) else dict(question)
        if not str(item.get("header", "")).strip():
            raise InputError("A code question needs the header of a function.")
        return item

    def render(self, item: Item) -> str:
        return f"Complete this function. Write only its body.\n\n{item['header']}"

    def extract(self, text: str, item: Item) -> str | None:
        blocks = re.findall(r"```(?:python)?\n(.*?)```", text, flags=re.DOTALL)
        body = "\n\n".join(block.rstrip() for block in blocks) if blocks else text.rstrip()
        return body or None


FORMATS: dict[str, Format] = {
    "text": Format("text", ""),
    "number": Number("number", "You solve mathematical problems. End with: The answer is N."),
    "choice": Choice("choice", "You answer multiple-choice questions. End with: Answer: the label."),
    "latex": Latex("latex", "You solve mathematical problems. End with: Answer: $the result in LaTeX$."),
    "code": Code("code", "You complete Python functions. Write the body only."),
}
"""Built-in kinds of question by name."""


def format_of(kind: str | Format) -> Format:
    """The format called `kind`, or `kind` itself. Raises UnknownNameError."""
    if isinstance(kind, Format):
        return kind
    if kind not in FORMATS:
        raise UnknownNameError.among("kind of question", kind, FORMATS)
    return FORMATS[kind]


def integers(text: str) -> list[str]:
    """Whole numbers in `text`, thousands separators removed."""
    return [str(int(n)) for n in re.findall(r"-?\d+", re.sub(r"(?<=\d),(?=\d{3}\b)", "", text))]


def normal_latex(text: str) -> str:
    """A LaTeX answer in one spelling: units, text, sizes and spaces removed, fractions and decimals as fractions."""
    text = re.sub(r"\\(?:text|mbox)\s*\{[^}]*\}", "", text)
    text = text.replace("\\left", "").replace("\\right", "").replace("^\\circ", "").replace("^{\\circ}", "")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac").replace("\\!", "").replace("\\,", "").replace(" ", "")
    text = text.strip().rstrip(".")
    if match := re.fullmatch(r"(-?\d+)/(-?\d+)", text):
        text = f"\\frac{{{match[1]}}}{{{match[2]}}}"
    return "\\frac{1}{2}" if text in {"0.5", ".5"} else text
