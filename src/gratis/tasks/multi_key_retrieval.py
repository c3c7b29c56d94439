"""Recall the value of one of many keys that a long text names."""

from __future__ import annotations

import random
from typing import Any

from gratis.contract.errors import SubjectError
from gratis.contract.parameters import param
from gratis.tasks.pass_key_retrieval import continuation
from gratis.tasks.task import Measurement, Metric, Progress, Series, Task, TaskCard, silent

NAMES = (
    "apple", "bridge", "candle", "desert", "engine", "forest", "garden", "harbor", "island", "jacket", "kettle",
    "ladder", "mirror", "needle", "orange", "pencil", "quarry", "rocket", "saddle", "temple", "umbrella", "valley",
    "window", "yellow",
)  # fmt: skip


class MultiKeyRetrieval(Task):
    """Several numbers with names stand in a long text; one of them is asked for.

    The multi-key needle of C.-P. Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language
    Models?", 2024.
    """

    card = TaskCard(
        title="Multi-key retrieval",
        acts_on="language model",
        subject="smollm2",
        data="named five-digit numbers planted at evenly spaced depths in repeated filler; one is asked for",
        metrics=(
            Metric(name="accuracy", help="share of questions answered with the right number"),
            Metric(name="confused", help="share answered with another key's number", higher_is_better=False),
        ),
    )

    length: int = param(1024, above=128, unit="tokens", help="length of the text around the keys")
    keys: int = param(4, above=1, at_most=24, help="numbers in the text")
    trials: int = param(6, above=0, help="questions, each over its own text")
    chunk: int | None = param(None, above=0, unit="tokens", help="read the prompt in pieces of this length")

    def check(self, subject: Any) -> None:
        if not hasattr(subject, "generate"):
            raise SubjectError(f"multi-key-retrieval needs a language model, not a {type(subject).__name__}.")

    def measure(self, subject: Any, *, seed: int, progress: Progress = silent) -> Measurement:
        from gratis.subjects import tokenizer_of
        from gratis.subjects.text import FILLER, planted, random_key

        tokenizer = tokenizer_of(subject)
        generator = random.Random(seed)
        hits: list[float] = []
        confused: list[float] = []
        depths: list[float] = []
        tokens = 0
        for trial in range(self.trials):
            names = generator.sample(NAMES, self.keys)
            values = [random_key(generator) for _ in names]
            places = [(i + 0.5) / self.keys for i in range(self.keys)]
            facts = [f"The number of {name} is {value}." for name, value in zip(names, values, strict=True)]
            asked = trial % self.keys
            text = planted(tokenizer, self.length, facts, places, FILLER)
            prompt = f"Remember the numbers in this text. {text} The number of {names[asked]} is"
            answer, count = continuation(subject, tokenizer, prompt, 8, self.chunk)
            tokens += count
            hits.append(float(values[asked] in answer))
            confused.append(float(any(v in answer for i, v in enumerate(values) if i != asked)))
            depths.append(places[asked])
            progress((trial + 1) / self.trials, f"{int(sum(hits))} of {trial + 1} right")
        return Measurement(
            metrics={"accuracy": sum(hits) / len(hits), "confused": sum(confused) / len(confused)},
            items={"accuracy": hits, "confused": confused},
            series={"accuracy": Series(depths, hits, "depth of the asked key", "right")},
            tokens=tokens,
            calls=self.trials,
        )
