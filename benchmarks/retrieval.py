"""Recall of a number hidden in a long text, by method, length and depth, on the embedded language model.

    OMP_NUM_THREADS=1 python benchmarks/retrieval.py [--device cuda] [--dtype T] [--texts N] [SETTING] [SETTING:ARM] [:ARM] …

A pass key is stated once at one of five depths of a text; the text ends by asking for it. Every text is another stretch
of the prose, with a key of its own at each depth. Texts are read 128 tokens at a time, and the last token by itself.
InfLLM attends to 1,024 latest and 32 first tokens and to 16 blocks of 64; the others to as many tokens. Block top-k reads
densely and differs from the full cache only while it writes. Writes benchmarks/results/retrieval.json arm by arm; a
named setting, or one arm of it, renews only its own.
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

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
BEGINNING = "There is important information hidden inside a lot of irrelevant text. Find it and memorize it. "
FACT = " The pass key is {key}. Remember it. {key} is the pass key. "
QUESTION = " What is the pass key? The pass key is"
WRITTEN, CHUNK, WINDOW, SINKS, BLOCK, BLOCKS = 7, 128, 1024, 32, 64, 16
ATTENDED = WINDOW + SINKS + BLOCK * BLOCKS
ARMS = ("full cache", "sliding window", "LaCache", "InfLLM", "block top-k")
STRIDE = 6173
"""Tokens from the beginning of one text's prose to that of the next: of another stretch, or of another place in the filler."""
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


def recall(model: Any, tokenizer: Any, setting: Setting, arm: str, texts: int, rows: int) -> dict[str, Any]:
    """What is stored of one arm: in every text, which begins at a place of its own, a key at each depth."""

    def ids(text: str) -> Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)

    numbers, prompts, keys, found = random.Random(setting.length), [], [], []
    for number in range(texts):
        filler = tokens_of(tokenizer, PROSE[setting.prose], setting.length, number * STRIDE)[0]
        for depth in DEPTHS:
            cut = round(depth * setting.length)
            keys.append(random_key(numbers))
            fact = ids(FACT.format(key=keys[-1]))
            prompts.append(torch.cat([ids(BEGINNING), filler[:cut], fact, filler[cut:], ids(QUESTION)]))
    together = torch.stack(prompts).to(model.device).split(rows)
    for part in track(together, description=f"{setting.title}, {arm}"):
        reader = Reader(model, methods(arm, model.device.type))
        reader.read(part[:, :-1], CHUNK)
        written = tokenizer.batch_decode(reader.write(reader.read(part[:, -1:]), WRITTEN))
        found += [key in words for key, words in zip(keys[len(found) :], written, strict=False)]
    length = prompts[0].shape[0]
    return {
        "arm": arm,
        "numbers": str(model.dtype).removeprefix("torch."),
        "attends to": length if arm == "full cache" else min(ATTENDED, length),
        "found": sum(found),
        "of": len(found),
        "interval": wilson(sum(found), len(found)),
        **{f"depth {depth}": sum(found[at :: len(DEPTHS)]) for at, depth in enumerate(DEPTHS)},
    }


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="SETTING[:ARM]", help=f"of {list(SETTINGS)} and {list(ARMS)}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--texts", type=int, default=4, help="stretches of prose, each read with a key at each depth")
    parser.add_argument("--rows", type=int, default=5, help="texts read at once")
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
        row = recall(model, tokenizer, setting, arm, given.texts, given.rows)
        renew_rows("retrieval", setting.title, [row], lambda row: ARMS.index(row["arm"]), given.device, arm)


if __name__ == "__main__":
    main()
