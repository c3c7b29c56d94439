"""Where LaCache beats a sliding window of the same size and where it does not, on the embedded language model.

    OMP_NUM_THREADS=1 python benchmarks/lacache_map.py [--device cuda] [prose[:BUDGET]] [facts[:STATED]] …

"prose": loss of four kinds of text by budget, span and overlap, read 32 tokens at a time; differences from the window
are paired by stretches of 32 tokens, with 95 % bootstrap intervals, from the token on at which the largest budget is
full. "facts": a number is stated once or several times, then filler pushes it out of the window, then it is asked for:
the loss of its digits, and how many numbers are written right. Writes benchmarks/results/lacache_map.json row by
row; a named part renews only its own.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import random
import statistics
from pathlib import Path
from typing import Any

import sklearn.datasets
import torch
from measuring import renew_rows
from measuring.reading import Reader, source_code
from rich.progress import track
from torch import Tensor

import gratis
from gratis.subjects.text import FILLER, documentation, random_key, tokens_of
from gratis.trials.statistics import paired_interval

LENGTH, PLACES, CHUNK, BUDGETS = 5120, 2, 32, (128, 256, 512, 1024)
PROSE = f"loss in nats beside the sliding window, {PLACES} places of {LENGTH} tokens"
ENOUGH = 300_000
"""Characters of licences that are read."""
DIGITS, FACTS, FACT_BUDGET = 5, 24, 512
STATED, SINCE = (1, 4), (600, 1000, 2000)
RECALL = f"recall of {FACTS} numbers of {DIGITS} digits, budget {FACT_BUDGET}"
LADDERS: dict[str, dict[str, Any]] = {
    "LaCache, span 15, overlap 0": {},
    "LaCache, span 15, overlap 0, one ladder": {"pattern": "contiguous"},
    "LaCache, span 8, overlap 4": {"span": 8, "overlap": 4},
    "LaCache, span 11, overlap 9": {"span": 11, "overlap": 9},
}


def texts() -> dict[str, str]:
    """Four kinds of text that are installed with the project."""
    table = Path(sklearn.datasets.__file__).parent / "data" / "breast_cancer.csv"
    return {
        "documentation": documentation(),
        "source code": source_code(),
        "licences": licences(),
        "table of numbers": table.read_text(encoding="utf-8"),
    }


def licences() -> str:
    """The different licences of the packages that are installed."""
    found: dict[str, None] = {}
    for package in sorted(importlib.metadata.distributions(), key=lambda one: str(one.metadata["Name"])):
        for file in package.files or ():
            if "licen" in file.name.lower() and file.suffix in {"", ".txt", ".md", ".rst"}:
                path = Path(str(file.locate()))
                if path.is_file() and sum(map(len, found)) < ENOUGH:
                    found[path.read_text(encoding="utf-8", errors="replace")] = None
    return "\n".join(found)


def prose(model: Any, budget: int) -> None:
    """Rows of one budget, a text each."""
    tokenizer = gratis.subjects.tokenizer_of(model)
    kinds, parts = texts(), []
    for kind, text in kinds.items():
        known = len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        if known < PLACES * LENGTH + 1:
            raise SystemExit(f"{kind}: {known} tokens are installed here, {PLACES * LENGTH + 1} are needed")
        parts += [tokens_of(tokenizer, text, LENGTH + 1, place * LENGTH) for place in range(PLACES)]
    ids = torch.cat(parts).to(model.device)
    arms: dict[str, tuple[Any, ...]] = {
        "full cache": (),
        "sliding window": (gratis.SlidingWindow(budget=budget),),
        **{name: (gratis.LaCache(budget=budget, **settings),) for name, settings in LADDERS.items()},
    }
    loss = {
        name: Reader(model, methods).losses(ids, CHUNK)[:, max(BUDGETS) :].cpu()
        for name, methods in track(arms.items(), description=f"budget {budget}")
    }
    rows = []
    for number, kind in enumerate(kinds):
        here = slice(number * PLACES, (number + 1) * PLACES)
        means = {name: stretches(values[here]) for name, values in loss.items()}
        row: dict[str, Any] = {
            "text": kind,
            "budget": budget,
            **{name: round(statistics.fmean(means[name]), 3) for name in ("full cache", "sliding window")},
        }
        for name in LADDERS:
            interval = paired_interval(means[name], means["sliding window"])
            assert interval is not None
            difference = statistics.fmean(means[name]) - statistics.fmean(means["sliding window"])
            row[f"{name}: difference"] = round(difference, 3)
            row[f"{name}: interval"] = [round(end, 3) for end in interval]
        rows.append(row)
    order = list(kinds)
    renew_rows(
        "lacache_map", PROSE, rows, lambda row: (order.index(row["text"]), row["budget"]), device=model.device.type
    )


def stretches(loss: Tensor) -> list[float]:
    """Means of stretches of `CHUNK` tokens of (rows, length) losses."""
    whole = loss[:, : loss.shape[1] // CHUNK * CHUNK]
    return [float(mean) for mean in whole.unflatten(1, (-1, CHUNK)).mean(2).flatten()]


def facts(model: Any, times: int) -> None:
    """Recall of numbers that were stated so many times, by how many tokens ago the last was."""
    tokenizer = gratis.subjects.tokenizer_of(model)

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    arms = {
        "full cache": (),
        "sliding window": (gratis.SlidingWindow(budget=FACT_BUDGET),),
        **{name: (gratis.LaCache(budget=FACT_BUDGET, **settings),) for name, settings in LADDERS.items()},
    }
    numbers = random.Random(0)
    keys = [random_key(numbers) for _ in range(FACTS)]
    filler = [int(token) for token in tokens_of(tokenizer, FILLER, max(SINCE))[0]]
    for since in track(SINCE, description=f"stated {times} times"):
        batch = []
        for key in keys:
            said = ids(f" The pass key is {key}. Remember it. {key} is the pass key. ")
            again = (said + filler[:100]) * (times - 1) + said
            batch.append([*again, *filler[:since], *ids(" What is the pass key? The pass key is"), *ids(f" {key}")])
        if len({len(one) for one in batch}) > 1:
            raise SystemExit("keys of different lengths in tokens: choose another seed")
        text = torch.tensor(batch, device=model.device)
        row: dict[str, Any] = {"stated": times, "tokens since": since}
        for name, methods in arms.items():
            reader, losses, right = Reader(model, methods), [], torch.ones(FACTS, dtype=torch.bool)
            logits = reader.read(text[:, :-DIGITS], CHUNK)
            for digit in text[:, -DIGITS:].unbind(1):
                losses.append(float(torch.nn.functional.cross_entropy(logits, digit)))
                right &= (logits.argmax(-1) == digit).cpu()
                logits = reader.read(digit[:, None])
            row[f"{name}: nats per digit"] = round(statistics.fmean(losses), 3)
            row[f"{name}: right"] = int(right.sum())
        renew_rows(
            "lacache_map", RECALL, [row], lambda row: (row["stated"], row["tokens since"]), device=model.device.type
        )


PARTS = {**{f"prose:{budget}": (prose, budget) for budget in BUDGETS}, **{f"facts:{n}": (facts, n) for n in STATED}}


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {list(PARTS)}, or prose, or facts")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    if unknown := set(given.parts) - {"prose", "facts", *PARTS}:
        parser.error(f"no part {sorted(unknown)}: choose among {['prose', 'facts', *PARTS]}")
    asked = given.parts or ["prose", "facts"]
    wanted = [name for name in PARTS if name in asked or name.partition(":")[0] in asked]
    model = gratis.open("smollm2", dtype="float32", device=given.device)
    for name in wanted:
        measure, setting = PARTS[name]
        measure(model, setting)


if __name__ == "__main__":
    main()
