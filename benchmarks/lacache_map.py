"""Where LaCache beats a sliding window of the same size and where it does not, on the embedded language model.

    OMP_NUM_THREADS=1 python benchmarks/lacache_map.py [prose] [facts]

"prose": loss of four kinds of text by budget, span and overlap, read 32 tokens at a time; differences from the window
are paired by stretches of 32 tokens, with 95 % bootstrap intervals, from where the budget is full on. "facts": a number
is stated once or several times, then filler pushes it out of the window, then it is asked for; the loss of its digits,
and how many are right. Writes benchmarks/results/lacache_map.json.
"""

from __future__ import annotations

import random
import statistics
import sys
import sysconfig
from pathlib import Path
from typing import Any

import sklearn.datasets
import torch
from measuring import renew
from measuring.reading import Reader, source_code
from rich.progress import track
from torch import Tensor

import gratis
from gratis.subjects.text import FILLER, documentation, random_key, tokens_of
from gratis.trials.statistics import paired_interval

REPEAT = "OMP_NUM_THREADS=1 python benchmarks/lacache_map.py"
LENGTH, CHUNK, BUDGETS = 1536, 32, (128, 256, 512)
PROSE = f"loss in nats beside the sliding window, {LENGTH} tokens"
FACTS, FACT_BUDGET, FACT_LENGTH, STATED = 4, 256, 1000, (1, 4)
DIGITS = 5
RECALL = f"a number of {DIGITS} digits, {FACTS} trials"
LADDERS = {"LaCache, span 15, overlap 0": {}, "LaCache, span 8, overlap 4": {"span": 8, "overlap": 4}}


def texts() -> dict[str, str]:
    """Four kinds of text that are installed with the project."""
    table = Path(sklearn.datasets.__file__).parent / "data" / "wine_data.csv"
    packages = Path(sysconfig.get_path("purelib"))
    licences = sorted(packages.glob("torch-*.dist-info/licenses/**/LICENSE*")) or sorted(packages.rglob("LICENSE*"))
    legal = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in licences[:40])
    return {
        "documentation": documentation(),
        "source code": source_code(),
        "licences": legal,
        "table of numbers": table.read_text(encoding="utf-8"),
    }


def losses(reader: Reader, ids: Tensor) -> Tensor:
    """(rows, length - 1) losses of the next token, read piece by piece."""
    found = []
    with torch.no_grad():
        for at in range(0, ids.shape[1] - 1, CHUNK):
            piece, after = ids[:, at : at + CHUNK], ids[:, at + 1 : at + CHUNK + 1]
            out = reader.model(piece, past_key_values=reader.cache, use_cache=True)
            reader.cache = out.past_key_values
            logits = out.logits[:, : after.shape[1]].transpose(1, 2)
            found.append(torch.nn.functional.cross_entropy(logits, after, reduction="none"))
    return torch.cat(found, 1)


def prose() -> dict[str, Any]:
    """A row per text and budget."""
    model = gratis.open("smollm2")
    tokenizer = gratis.subjects.tokenizer_of(model)
    kinds = texts()
    ids = torch.cat([tokens_of(tokenizer, text, LENGTH + 1) for text in kinds.values()])
    full, rows = losses(Reader(model, ()), ids), []
    for budget in track(BUDGETS, description="budgets"):
        window = losses(Reader(model, (gratis.SlidingWindow(budget=budget),)), ids)
        ladders = {
            name: losses(Reader(model, (gratis.LaCache(budget=budget, **settings),)), ids)
            for name, settings in LADDERS.items()
        }
        for row, kind in enumerate(kinds):
            plain = stretches(window[row, budget:])
            found = {
                "text": kind,
                "budget": budget,
                "full cache": round(statistics.fmean(stretches(full[row, budget:])), 3),
                "sliding window": round(statistics.fmean(plain), 3),
            }
            for name, loss in ladders.items():
                thinned = stretches(loss[row, budget:])
                found[f"{name}: difference"] = round(statistics.fmean(thinned) - statistics.fmean(plain), 3)
                interval = paired_interval(thinned, plain)
                assert interval is not None
                found[f"{name}: interval"] = [round(end, 3) for end in interval]
            rows.append(found)
        renew("lacache_map", {"repeat": REPEAT, PROSE: rows})
    return {PROSE: rows}


def stretches(loss: Tensor) -> list[float]:
    """Means of stretches of `CHUNK` tokens."""
    return [float(part.mean()) for part in loss.split(CHUNK) if len(part) == CHUNK]


def facts() -> dict[str, Any]:
    """Recall of a number that was stated once, or again and again, and has left the window."""
    model = gratis.open("smollm2")
    tokenizer = gratis.subjects.tokenizer_of(model)

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    arms = {
        "full cache": (),
        "sliding window": (gratis.SlidingWindow(budget=FACT_BUDGET),),
        **{name: (gratis.LaCache(budget=FACT_BUDGET, **settings),) for name, settings in LADDERS.items()},
    }
    filler = [int(token) for token in tokens_of(tokenizer, FILLER, FACT_LENGTH)[0]]
    numbers, rows = random.Random(0), []
    for times in track(STATED, description="facts"):
        keys = [random_key(numbers) for _ in range(FACTS)]
        batch = []
        for key in keys:
            said = ids(f" The pass key is {key}. Remember it. {key} is the pass key. ")
            between = filler[: FACT_LENGTH // 10]
            batch.append(
                [*(said + between) * times, *filler, *ids(" What is the pass key? The pass key is"), *ids(f" {key}")]
            )
        if len({len(one) for one in batch}) > 1:
            raise SystemExit("keys of different lengths in tokens: choose another seed")
        text = torch.tensor(batch)
        found: dict[str, Any] = {"stated": times, "tokens since": FACT_LENGTH, "budget": FACT_BUDGET}
        for name, methods in arms.items():
            loss = losses(Reader(model, methods), text)[:, -DIGITS:]
            found[f"{name}, nats per digit"] = round(float(loss.mean()), 3)
        rows.append(found)
        renew("lacache_map", {"repeat": REPEAT, RECALL: rows})
    return {RECALL: rows}


PARTS = {"prose": prose, "facts": facts}


def main() -> None:
    torch.set_num_threads(1)
    wanted = sys.argv[1:] or list(PARTS)
    if unknown := set(wanted) - set(PARTS):
        raise SystemExit(f"no part {sorted(unknown)}: choose among {list(PARTS)}")
    for part in wanted:
        renew("lacache_map", {"repeat": REPEAT, **PARTS[part]()})


if __name__ == "__main__":
    main()
