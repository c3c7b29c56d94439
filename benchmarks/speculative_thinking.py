"""A larger model that takes over where the small one hesitates: accuracy, shares, and what each model reads.

    OMP_NUM_THREADS=1 python benchmarks/speculative_thinking.py

Step-by-step sums by the zoo's small and large arithmetic models: each alone, and the small one with the large as its
target, in several modes. Beside accuracy (95 % intervals from resampling problems): tokens by each model, tokens that
each model read (every one once where caches are kept), and CPU seconds. Writes
benchmarks/results/speculative_thinking.json.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from decoding import interval
from measuring import store
from rich.progress import track

import gratis
from gratis import subjects
from gratis.zoo.arithmetic import Problem, answer_of, problems

PROBLEMS, SEED, LIMIT, TEMPERATURE = 32, 20_002, 300, 0.6


def measured(model: Any, method: Any, asked: list[Problem], name: str) -> dict[str, Any]:
    """One way of answering all problems."""
    tokenizer = subjects.tokenizer_of(model)
    right: list[float] = []
    lengths: list[int] = []
    totals = {"by the target": 0, "takeovers": 0, "read by small": 0, "read by large": 0, "needed": 0, "dropped": 0}
    begin = time.process_time()
    with gratis.attach(model, method) as handle:
        for number, problem in enumerate(track(asked, description=name)):
            ids = tokenizer(problem.prompt, return_tensors="pt")["input_ids"]
            torch.manual_seed(number)
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=LIMIT)
            response = out[0, ids.shape[1] :]
            right.append(float(answer_of(tokenizer.decode(response, skip_special_tokens=True)) == problem.answer))
            lengths.append(len(response))
            report = handle.report()[method.name]
            if "encoded" in report:
                kept = len(response) - report["target_tokens"][0]
                totals["by the target"] += report["target_tokens"][0]
                totals["takeovers"] += len(report["takeovers"][0])
                totals["read by small"] += report["encoded"][0]["small"]
                totals["read by large"] += report["encoded"][0]["large"]
                totals["needed"] += out.shape[1]
                totals["dropped"] += report["drafted"][0]["small"] - kept
    count, tokens = len(asked), sum(lengths)
    found: dict[str, Any] = {
        "accuracy": round(statistics.mean(right), 3),
        "interval": interval(right),
        "tokens per problem": round(tokens / count, 1),
        "CPU s per problem": round((time.process_time() - begin) / count, 3),
    }
    if totals["needed"]:
        found |= {
            "share of tokens by the target": round(totals["by the target"] / tokens, 3),
            "takeovers per problem": round(totals["takeovers"] / count, 2),
            "read by the small model, of the text and what it drafted": round(
                totals["read by small"] / (totals["needed"] + totals["dropped"]), 3
            ),
            "read by the large model, of the text": round(totals["read by large"] / totals["needed"], 3),
        }
    return found


def main() -> None:
    torch.set_num_threads(1)
    small, large = gratis.open("zoo:arithmetic-small"), gratis.open("zoo:arithmetic-large")
    asked = problems(PROBLEMS, SEED)
    draws = {"temperature": TEMPERATURE, "top_p": 0.95, "top_k": 50}

    def thinking(**options: Any) -> Any:
        return gratis.SpeculativeThinking(target=large, **draws, **options)

    ways = {
        "small alone": (small, gratis.Sampling(**draws)),
        "large alone": (large, gratis.Sampling(**draws)),
        "takeovers at keywords": (small, thinking()),
        "the target asked at every paragraph": (small, thinking(not_reasoning=True)),
        "and it begins": (small, thinking(not_reasoning=True, begin=True, begin_tokens=20)),
    }
    store(
        "speculative_thinking",
        {
            "repeat": "OMP_NUM_THREADS=1 python benchmarks/speculative_thinking.py",
            "problems": PROBLEMS,
            "temperature": TEMPERATURE,
            "by way": {name: measured(model, method, asked, name) for name, (model, method) in ways.items()},
        },
    )


if __name__ == "__main__":
    main()
