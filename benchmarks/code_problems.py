"""HumanEval under several ways of decoding: functions that pass the problems' own tests, run in the sandbox.

    OMP_NUM_THREADS=1 python benchmarks/code_problems.py [--problems N] [--device cpu] [--items FOLDER]

On the embedded language model: greedy, CNTP, and several samples per problem from which a random pick, the perplexity
pick, the majority of equal programs, self-certainty and a perfect pick choose. Writes benchmarks/results/code_problems.json.

Responses are kept in FOLDER as they come; `--only ARM` (greedy, cntp-0, draws), `--part 0/2` and `--limit SECONDS` draw a
part of them, on another machine for example, and nothing is run or scored then.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path
from typing import Any

import decoding
import torch
from decoding import Asked, Items, interval
from measuring import store

import gratis
from gratis.subjects.answers import borda, ranking
from gratis.subjects.folders import cache_folder
from gratis.subjects.sandbox import run_all
from gratis.tasks.human_eval import problems, written_code
from gratis.tasks.reasoning import encoded

PROBLEMS, SEED, SAMPLES, LONGEST, TEMPERATURE = 100, 0, 8, 200, 0.8
NAME = "human-eval"


def rates(posed: list[Any], found: dict[str, dict[int, dict[str, Any]]]) -> dict[str, Any]:
    """Share of problems solved, tokens drawn and passes, on the problems that all arms answered."""
    numbers = sorted(set.intersection(*(set(items) for items in found.values())))
    runs = [(arm, n, place) for arm in found for n in numbers for place in range(len(found[arm][n]["texts"]))]
    programs = [posed[n].program(found[arm][n]["texts"][place]) for arm, n, place in runs]
    passed = {key: float(outcome.passed) for key, outcome in zip(runs, run_all(programs), strict=True)}
    table: dict[str, Any] = {}

    def add(name: str, arm: str, picks: list[int] | None) -> None:
        several = [range(len(found[arm][n]["texts"])) if picks is None else [picks[i]] for i, n in enumerate(numbers)]
        marks = [
            statistics.mean(passed[arm, n, place] for place in places)
            for n, places in zip(numbers, several, strict=True)
        ]
        one = picks is None
        table[name] = {
            "solved": round(statistics.mean(marks), 4),
            "interval": interval(marks),
            "tokens drawn per problem": round(
                statistics.mean(
                    statistics.mean(found[arm][n]["lengths"]) if one else found[arm][n]["drawn"] for n in numbers
                ),
                1,
            ),
        }

    draws = [found["draws"][n] for n in numbers]
    add("greedy", "greedy", [0] * len(numbers))
    add("cntp", "cntp-0", [0] * len(numbers))
    add("sampling", "draws", None)
    add("perplexity pick", "draws", [ranking(one["likely"])[0] for one in draws])
    add("self-certainty, best", "draws", [ranking(one["self-certainty"])[0] for one in draws])
    codes = [[written_code(text).strip() or None for text in one["texts"]] for one in draws]
    add("majority of equal programs", "draws", [borda([0.0] * len(row), row, 0).index for row in codes])
    best = [
        max(range(len(one["texts"])), key=lambda place, n=n: (passed["draws", n, place], -place))  # type: ignore[misc]
        for n, one in zip(numbers, draws, strict=True)
    ]
    add("a perfect pick", "draws", best)
    return {"problems": len(numbers), "methods": table}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--problems", type=int, default=PROBLEMS, help="at most 164")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--items", type=Path, default=cache_folder() / "benchmarks" / "human-eval")
    parser.add_argument("--only", nargs="*", default=[], metavar="ARM")
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--limit", type=float, default=float("inf"))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    posed = problems()
    random.Random(SEED).shuffle(posed)
    posed = posed[: chosen.problems]
    draws = {"temperature": TEMPERATURE, "top_p": 1.0}
    methods = {
        "greedy": gratis.Greedy(),
        "cntp-0": gratis.CNTP(match="text", **draws),
        "draws": gratis.SelfCertainty(samples=SAMPLES, **draws),
    }
    items, begin = Items(chosen.items, NAME), time.monotonic()
    decoding.LONGEST[NAME] = LONGEST
    wanted = [arm for arm in chosen.only or methods if len(items.of(arm)) < len(posed)]
    if wanted:
        model = gratis.open("smollm2").to(chosen.device)
        asked = [Asked(encoded(model, problem.question), lambda text: 0.0) for problem in posed]
        for arm in wanted:
            items.draw(model, methods[arm], arm, asked, chosen.part, chosen.limit - (time.monotonic() - begin))
    if not chosen.only:
        store(
            "code_problems",
            {
                "repeat": "OMP_NUM_THREADS=1 python benchmarks/code_problems.py",
                "temperature": TEMPERATURE,
                "samples": SAMPLES,
                "longest response": LONGEST,
                **rates(posed, {arm: items.of(arm) for arm in methods}),
            },
        )


if __name__ == "__main__":
    main()
