"""Read two kinds of text, the code of Python's standard library and its docstrings: what does each cost in bits?"""

from __future__ import annotations

import math
import statistics
from typing import Any

from gratis.contract.errors import SubjectError
from gratis.contract.parameters import param
from gratis.tasks.task import Measurement, Metric, Progress, Task, TaskCard, silent
from gratis.zoo.library_text import library_text

KINDS = ("code", "prose")
LENGTH = 128


class TwoTexts(Task):
    """Bits per character of held-out pieces of 128 characters: of code, of prose, and of as many of both."""

    card = TaskCard(
        title="Code and prose",
        acts_on="language model",
        subject="zoo:glyphs-code",
        data="every tenth module of Python's standard library: its code without comments, and its docstrings",
        metrics=(
            Metric(name="both", help="bits per character over as many pieces of each", unit="bits", higher_is_better=False),
            Metric(name="code", help="bits per character of code", unit="bits", higher_is_better=False),
            Metric(name="prose", help="bits per character of docstrings", unit="bits", higher_is_better=False),
        ),
        warm_up={"pieces": 8},
    )  # fmt: skip

    pieces: int = param(128, at_least=2, at_most=512, unit="pieces", help="pieces of each kind")

    def check(self, subject: Any) -> None:
        from gratis.subjects.opening import tokenizer_of

        if subject.get_output_embeddings() is None:
            raise SubjectError(f"two-texts reads with a language model; {type(subject).__name__} has no head.")
        tokenizer_of(subject)

    def measure(self, subject: Any, *, seed: int, progress: Progress = silent) -> Measurement:
        items: dict[str, list[float]] = {}
        tokens = calls = 0
        for done, kind in enumerate(KINDS):
            texts = held_out_pieces(kind, self.pieces, seed)
            found, read, passes = bits_per_character(subject, texts)
            items[kind], tokens, calls = found, tokens + read, calls + passes
            progress((done + 1) / len(KINDS), f"{len(texts)} pieces of {kind} read")
        items["both"] = items["code"] + items["prose"]
        return Measurement(
            metrics={name: statistics.fmean(values) for name, values in items.items()},
            items=items,
            tokens=tokens,
            calls=calls,
        )


def held_out_pieces(kind: Any, count: int, seed: int = 0) -> list[str]:
    """`count` evenly spaced pieces of the held-out text of a kind; the seed moves them."""
    text = library_text(kind, held_out=True)
    gap = (len(text) - LENGTH) // count
    return [text[start : start + LENGTH] for start in range(seed * 997 % gap, gap * count, gap)]


def bits_per_character(model: Any, texts: list[str], batch: int = 32) -> tuple[list[float], int, int]:
    """Bits per character of each text after its first token, tokens read, and forward passes."""
    import torch
    from torch.nn import functional

    from gratis.subjects.opening import tokenizer_of

    tokenizer = tokenizer_of(model)
    rows = [tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0] for text in texts]
    by_length: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(place)
    found, calls = [0.0] * len(rows), 0
    for places in by_length.values():
        for start in range(0, len(places), batch):
            part = places[start : start + batch]
            ids = torch.stack([rows[place] for place in part]).to(model.device)
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            losses = functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").sum(1)
            calls += 1
            for place, loss in zip(part, losses.tolist(), strict=True):
                read = len(texts[place]) - len(tokenizer.decode(rows[place][:1]))
                found[place] = loss / math.log(2) / max(read, 1)
    return found, sum(map(len, rows)), calls
