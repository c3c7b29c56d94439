"""Recall of a number hidden in a long text, by method, length and depth, on the embedded language model.

    OMP_NUM_THREADS=1 python benchmarks/retrieval.py [--device cuda] [--dtype T] [--rows N] [SETTING] [SETTING:ARM] [:ARM] …

A pass key is stated once at one of five depths of a text; the text ends by asking for it. Texts are read 128 tokens at
a time, `--rows` of them at once, and the last token by itself. InfLLM attends to 1,024 latest and 32 first tokens and
to 16 blocks of 64; the others to as many tokens. Block top-k reads densely and differs from the full cache only while
it writes. Writes benchmarks/results/retrieval.json arm by arm; a named setting, or one arm of it, renews only its own.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from typing import Any

import torch
from measuring import renew_rows
from measuring.reading import Reader, wilson
from rich.progress import track
from torch import Tensor

import gratis
from gratis.subjects.text import FILLER, documentation, random_key, tokens_of

DEPTHS, KEYS = (0.1, 0.3, 0.5, 0.7, 0.9), 4
BEGINNING = "There is important information hidden inside a lot of irrelevant text. Find it and memorize it. "
FACT = " The pass key is {key}. Remember it. {key} is the pass key. "
QUESTION = " What is the pass key? The pass key is"
WRITTEN, CHUNK, WINDOW, SINKS, BLOCK, BLOCKS = 7, 128, 1024, 32, 64, 16
ATTENDED = WINDOW + SINKS + BLOCK * BLOCKS
ARMS = ("full cache", "sliding window", "LaCache", "InfLLM", "block top-k")
LENGTHS = (1000, 2000, 4000, 8000, 10000, 13000)
PROSE = {"filler": FILLER, "documentation": documentation()}


@dataclass(frozen=True)
class Setting:
    """What a number is hidden in."""

    length: int
    prose: str = "filler"

    @property
    def title(self) -> str:
        """The table's title."""
        return f"{self.length} tokens of {self.prose}"


SETTINGS = {
    setting.title: setting
    for setting in (
        *(Setting(length) for length in LENGTHS),
        Setting(3000, "documentation"),
        Setting(6000, "documentation"),
    )
}


def methods(arm: str, device: str) -> tuple[Any, ...]:
    """What is attached for `arm`."""
    if arm == "InfLLM":
        store = "memory" if device == "cpu" else "device"
        return (
            gratis.InfLLM(window=WINDOW, sinks=SINKS, block=BLOCK, blocks=BLOCKS, lookup=CHUNK, store=store),
        )  # fmt: skip
    return {
        "full cache": (),
        "sliding window": (gratis.SlidingWindow(budget=ATTENDED, sinks=SINKS),),
        "LaCache": (gratis.LaCache(budget=ATTENDED, sinks=SINKS),),
        "block top-k": (gratis.BlockTopK(blocks=(ATTENDED - 64 - 4) // 16, window=64),),
    }[arm]


def prompts(tokenizer: Any, setting: Setting) -> tuple[Tensor, list[str]]:
    """(texts, length) token ids, depth by depth, and the key of each."""

    def ids(text: str) -> Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)

    filler = tokens_of(tokenizer, PROSE[setting.prose], setting.length)[0]
    numbers, texts, keys = random.Random(setting.length), [], []
    for depth in DEPTHS:
        cut = round(depth * setting.length)
        for _ in range(KEYS):
            keys.append(random_key(numbers))
            said = ids(FACT.format(key=keys[-1]))
            texts.append(torch.cat([ids(BEGINNING), filler[:cut], said, filler[cut:], ids(QUESTION)]))
    return torch.stack(texts), keys


def recall(model: Any, tokenizer: Any, setting: Setting, arm: str, rows: int) -> dict[str, Any]:
    """What is stored of one arm."""
    texts, keys = prompts(tokenizer, setting)
    hits, seconds = [], 0.0
    for some in track(texts.split(rows), description=f"{setting.title}, {arm}"):
        reader = Reader(model, methods(arm, model.device.type))
        some = some.to(model.device)
        reader.read(some[:, :-1], CHUNK)
        seconds += reader.seconds
        for written in tokenizer.batch_decode(reader.write(reader.read(some[:, -1:]), WRITTEN)):
            hits.append(keys[len(hits)] in written)
    row: dict[str, Any] = {
        "arm": arm,
        "attends to": texts.shape[1] if arm == "full cache" else min(ATTENDED, texts.shape[1]),
        "found": sum(hits),
        "of": len(hits),
        "interval": wilson(sum(hits), len(hits)),
        **{f"depth {depth}": sum(hits[at * KEYS : (at + 1) * KEYS]) for at, depth in enumerate(DEPTHS)},
    }
    if model.device.type == "cpu":
        row["CPU s to read a text"] = round(seconds / len(hits), 1)
    return row


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="SETTING[:ARM]", help=f"of {list(SETTINGS)} and {list(ARMS)}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", type=int, default=1, help="texts that are read at once")
    given = parser.parse_args()
    chosen = []
    for part in given.parts or SETTINGS:
        name, _, only = part.partition(":")
        if name not in {"", *SETTINGS} or only not in {"", *ARMS}:
            parser.error(f"no part {part!r}: choose among {list(SETTINGS)}, with :ARM for one of {list(ARMS)}")
        settings = [SETTINGS[name]] if name else list(SETTINGS.values())
        chosen += [(setting, arm) for setting in settings for arm in ARMS if only in ("", arm)]
    chosen = list(dict.fromkeys(chosen))
    model = gratis.open("smollm2", dtype=given.dtype, device=given.device)
    tokenizer = gratis.subjects.tokenizer_of(model)
    for setting, arm in chosen:
        row = recall(model, tokenizer, setting, arm, given.rows)
        renew_rows("retrieval", setting.title, [row], lambda row: ARMS.index(row["arm"]), given.device)


if __name__ == "__main__":
    main()
