"""Recall of a number hidden in a long text, by method, length and depth, on the embedded language model.

    OMP_NUM_THREADS=1 python benchmarks/retrieval.py [SETTING[:ARM] …]

A pass key is stated once at one of three depths of a text; the text ends by asking for it. Texts of one setting share
their beginning, so every method reads it once and goes on from copies. Block top-k reads densely and differs from the
full cache only while it writes. Writes benchmarks/results/retrieval.json arm by arm; a named setting, or one arm of
it, renews only its own figures.
"""

from __future__ import annotations

import copy
import random
import sys
from dataclasses import dataclass
from typing import Any

import torch
from measuring import renew, stored
from measuring.reading import Reader, wilson
from rich.progress import Progress
from torch import Tensor
from transformers import DynamicCache

import gratis
from gratis.subjects.text import FILLER, documentation, random_key, tokens_of

DEPTHS = (1 / 6, 1 / 2, 5 / 6)
BEGINNING = "There is important information hidden inside a lot of irrelevant text. Find it and memorize it. "
FACT = " The pass key is {key}. Remember it. {key} is the pass key. "
QUESTION = " What is the pass key? The pass key is"
WRITTEN, CHUNK = 7, 512


SMALL = {"window": 512, "sinks": 32, "block": 32, "blocks": 15, "lookup": 128}
LARGE = {"window": 1024, "sinks": 32, "block": 64, "blocks": 16, "lookup": 128}
REPEAT = "OMP_NUM_THREADS=1 python benchmarks/retrieval.py"
ALL = ("full cache", "block top-k", "sliding window", "LaCache", "InfLLM")


@dataclass(frozen=True)
class Setting:
    """A text, InfLLM's parameters (the others attend to as many tokens as it does), and keys per depth."""

    length: int
    infllm: dict[str, int]
    keys: int = 2
    prose: str = FILLER
    arms: tuple[str, ...] = ALL

    @property
    def attended(self) -> int:
        """Tokens that a token attends to once the text is long."""
        return self.infllm["window"] + self.infllm["sinks"] + self.infllm["block"] * self.infllm["blocks"]

    def methods(self, arm: str) -> tuple[Any, ...]:
        """What is attached for `arm`."""
        if arm == "block top-k":
            return (gratis.BlockTopK(blocks=(self.attended - 64 - 4) // 16, window=64),)
        if arm == "sliding window":
            return (gratis.SlidingWindow(budget=self.attended, sinks=self.infllm["sinks"]),)
        if arm == "LaCache":
            return (gratis.LaCache(budget=self.attended, sinks=self.infllm["sinks"]),)
        return (gratis.InfLLM(**self.infllm),) if arm == "InfLLM" else ()


SETTINGS = {
    "1000 tokens": Setting(1000, SMALL),
    "2000 tokens": Setting(2000, SMALL),
    "4000 tokens": Setting(4000, SMALL),
    "8000 tokens": Setting(8000, SMALL),
    "10000 tokens": Setting(10000, LARGE, keys=3, arms=("full cache", "sliding window", "InfLLM")),
    "13000 tokens": Setting(13000, LARGE, keys=1, arms=("InfLLM",)),
    "3000 tokens of documentation": Setting(
        3000, LARGE, prose=documentation(), arms=("full cache", "sliding window", "InfLLM")
    ),
}


class Recall:
    """One setting on one model: what each arm writes where it should write the key."""

    def __init__(self, model: Any, tokenizer: Any, setting: Setting, progress: Progress) -> None:
        self.tokenizer, self.setting, self.progress = tokenizer, setting, progress
        self.readers = {arm: Reader(model, setting.methods(arm)) for arm in setting.arms}
        self.filler = tokens_of(tokenizer, setting.prose, setting.length)
        self.cuts = [round(depth * setting.length) for depth in DEPTHS]
        numbers = random.Random(setting.length)
        self.keys = [[random_key(numbers) for _ in range(setting.keys)] for _ in DEPTHS]

    def ids(self, text: str) -> Tensor:
        """(1, length)."""
        return torch.tensor([self.tokenizer(text, add_special_tokens=False).input_ids])

    def of(self, arm: str) -> tuple[dict[str, list[list[bool]]], float]:
        """Whether each key was found, by depth, under the arm and what reads as it does; seconds of reading a text."""
        arms = [arm, "block top-k"] if arm == "full cache" and "block top-k" in self.readers else [arm]
        hits: dict[str, list[list[bool]]] = {one: [[] for _ in DEPTHS] for one in arms}
        reader = self.readers[arm]
        spent, apart, last = 0.0, 0.0, 0
        before: Any = None
        task = self.progress.add_task(f"{self.setting.length} tokens, {arm}", total=sum(map(len, self.keys)))
        for number, cut in enumerate(self.cuts):
            reader.cache = before
            beginning = self.filler[:, last:cut]
            reader.read(torch.cat([self.ids(BEGINNING), beginning], 1) if not last else beginning, CHUNK)
            spent, before, last = spent + reader.seconds, reader.cache, cut
            for key in self.keys[number]:
                reader.cache = copy.deepcopy(before)
                question = self.ids(QUESTION)
                rest = [self.ids(FACT.format(key=key)), self.filler[:, cut:], question[:, :-1]]
                reader.read(torch.cat(rest, 1), CHUNK)
                apart = spent + reader.seconds
                text, reader.cache = reader.cache, None
                for one in arms:
                    hits[one][number].append(key in self.answer(self.readers[one], text, question[:, -1:]))
                self.progress.advance(task)
        return hits, apart

    def answer(self, reader: Reader, cache: Any, last: Tensor) -> str:
        """What is written after the prompt's last token, which looks up for itself; a full cache is put back."""
        reader.cache = cache
        length = cache.get_seq_length()
        written = reader.write(reader.read(last), WRITTEN)
        if isinstance(cache, DynamicCache):
            cache.crop(length - cache.get_seq_length())
        reader.cache = None
        return str(self.tokenizer.decode(written))


def row(arm: str, setting: Setting, hits: list[list[bool]], seconds: float) -> dict[str, Any]:
    """What is stored of one arm."""
    found, trials = sum(map(sum, hits)), sum(map(len, hits))
    return {
        "arm": arm,
        "attends to": setting.length if arm == "full cache" else min(setting.attended, setting.length),
        "found": found,
        "of": trials,
        "interval": wilson(found, trials),
        "found by depth": [sum(each) for each in hits],
        "CPU s to read": round(seconds, 1),
    }


def main() -> None:
    torch.set_num_threads(1)
    wanted = sys.argv[1:] or list(SETTINGS)
    if unknown := {name.partition(":")[0] for name in wanted} - set(SETTINGS):
        raise SystemExit(f"no setting {sorted(unknown)}: choose among {list(SETTINGS)}, with :ARM for one arm")
    model = gratis.open("smollm2")
    tokenizer = gratis.subjects.tokenizer_of(model)
    for name, _, only in (text.partition(":") for text in wanted):
        setting = SETTINGS[name]
        arms = [arm for arm in setting.arms if not only or arm == only]
        for arm in arms:
            if arm == "block top-k" and "full cache" in arms:
                continue
            with Progress() as progress:
                answers, seconds = Recall(model, tokenizer, setting, progress).of(arm)
            old = {each["arm"]: each for each in stored("retrieval").get(name, [])}
            new = {**old, **{one: row(one, setting, hits, seconds) for one, hits in answers.items()}}
            ordered = [new[one] for one in setting.arms if one in new]
            renew("retrieval", {"repeat": REPEAT, "depths": [round(d, 2) for d in DEPTHS], name: ordered})


if __name__ == "__main__":
    main()
