"""Real English prose that ships with Python itself, and filler with facts planted in it."""

from __future__ import annotations

import random
from typing import Any

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
"""The repeated filler of the pass-key task (A. Mohtashami and M. Jaggi, "Landmark Attention", 2023)."""


def documentation() -> str:
    """About 465,000 characters of technical prose: the help topics of the Python language."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def tokens_of(tokenizer: Any, text: str, count: int, start: int = 0) -> Any:
    """(1, count) token ids of `text` from token `start` on, repeating the text where it is too short."""
    import torch

    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]
    repeats = -(-(start + count) // len(ids))
    return torch.cat([ids] * repeats)[start : start + count][None]


def planted(tokenizer: Any, length: int, facts: list[str], depths: list[float], prose: str) -> str:
    """Text of about `length` tokens in which each fact stands at its depth (0 is the beginning, 1 the end)."""
    import torch

    room = max(length - sum(len(tokenizer(fact, add_special_tokens=False).input_ids) for fact in facts), 1)
    filler = tokens_of(tokenizer, prose, room)[0]
    pieces, last = [], 0
    for depth, fact in sorted(zip(depths, facts, strict=True)):
        cut = round(depth * room)
        pieces.append(tokenizer.decode(filler[last:cut]))
        pieces.append(f" {fact} ")
        last = cut
    pieces.append(tokenizer.decode(filler[last:] if last < room else torch.empty(0, dtype=torch.long)))
    return "".join(pieces)


def random_key(generator: random.Random, digits: int = 5) -> str:
    """A number to remember."""
    return str(generator.randrange(10 ** (digits - 1), 10**digits))
