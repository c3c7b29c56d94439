"""Choosing among sampled responses: a random pick, the model's own scores, votes, and a perfect pick, on the same draws.

    OMP_NUM_THREADS=1 python benchmarks/choosing.py

Eight responses of the embedded language model to each of 72 small generated sums, products and divisors. Gains are over
the mean of the same eight responses, with 95 % intervals from resampling problems. Writes
benchmarks/results/choosing.json.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from measuring import store
from rich.progress import track

import gratis
from gratis import subjects
from gratis.subjects.answers import borda, extract, ranking
from gratis.subjects.token_statistics import entropy, log_probability
from gratis.tasks.reasoning import encoded, problems, respond
from gratis.tasks.sample_choice import rank_correlation

SAMPLES, PROBLEMS, SEEDS, NEW, TEMPERATURE = 8, 24, (0, 1, 2), 48, 0.8
KINDS = ("chain_sum", "products", "gcd")
SCORES = ("self-certainty", "mean log-probability", "negative entropy", "log-probability")


@torch.no_grad()
def scored(model: Any, prompt: torch.Tensor, tokens: list[int]) -> dict[str, float]:
    """Scores of one response from its own distributions, higher is better."""
    logits = model(torch.cat([prompt, torch.tensor([tokens])], dim=1)).logits[0, prompt.shape[1] - 1 : -1]
    logs = log_probability(logits, torch.tensor(tokens))
    return {
        "mean log-probability": float(logs.mean()),
        "log-probability": float(logs.sum()),
        "negative entropy": -float(entropy(logits).mean()),
    }


def drawn(model: Any, seed: int) -> list[list[dict[str, Any]]]:
    """Responses to the problems of one seed, with their scores, answers and marks."""
    found = []
    torch.manual_seed(seed)
    with gratis.attach(model, gratis.SelfCertainty(samples=SAMPLES)) as handle:
        for problem in track(problems(KINDS, PROBLEMS, seed, "easy"), description=f"seed {seed}"):
            prompt = encoded(model, problem.question)
            responses = respond(
                model, prompt, NEW, num_return_sequences=SAMPLES, do_sample=True, temperature=TEMPERATURE, top_p=1.0,
                top_k=0,
            )  # fmt: skip
            report = handle.report()["self-certainty"]
            rows: list[dict[str, Any]] = [{}] * SAMPLES
            for place, response in zip(report["ranking"][0], responses, strict=True):
                answer = extract("number", response.text)
                rows[place] = {
                    "self-certainty": report["self_certainty"][0][place],
                    "answer": answer,
                    "mark": problem.score(answer),
                    "length": float(len(response.tokens)),
                    **scored(model, prompt, response.tokens),
                }
            found.append(rows)
    return found


def choosers() -> dict[str, Callable[[list[dict[str, Any]]], int]]:
    """Ways to choose: from the responses to one problem to the index of one."""

    def best(name: str) -> Callable[[list[dict[str, Any]]], int]:
        return lambda rows: ranking([row[name] for row in rows])[0]

    def voted(power: float) -> Callable[[list[dict[str, Any]]], int]:
        return lambda rows: borda([row["self-certainty"] for row in rows], [row["answer"] for row in rows], power).index

    return {
        **{f"highest {name}": best(name) for name in SCORES},
        "majority of answers": voted(0),
        **{f"vote by rank of self-certainty, power {power}": voted(power) for power in (0.3, 0.5, 1.2)},
    }


def interval(values: list[float]) -> list[float]:
    """95 % interval of the mean, from 2,000 resamplings."""
    data = torch.tensor(values, dtype=torch.float64)
    picks = torch.randint(len(data), (2000, len(data)), generator=torch.Generator().manual_seed(0))
    means = data[picks].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return [round(float(value), 3) for value in means]


def main() -> None:
    torch.set_num_threads(1)
    model = gratis.open("smollm2")
    assert subjects.tokenizer_of(model).chat_template, "the embedded model is asked through its chat template"
    rows = [problem for seed in SEEDS for problem in drawn(model, seed)]
    means = [statistics.mean(row["mark"] for row in problem) for problem in rows]
    gains = {}
    for name, choose in choosers().items():
        values = [problem[choose(problem)]["mark"] - mean for problem, mean in zip(rows, means, strict=True)]
        gains[name] = {"gain": round(statistics.mean(values), 3), "interval": interval(values)}
    lengths = {
        name: round(
            statistics.mean(rank_correlation([row[name] for row in p], [row["length"] for row in p]) for p in rows), 3
        )
        for name in SCORES
    }
    store(
        "choosing",
        {
            "repeat": "OMP_NUM_THREADS=1 python benchmarks/choosing.py",
            "problems": len(rows),
            "samples": SAMPLES,
            "random pick": round(statistics.mean(means), 3),
            "perfect pick": round(statistics.mean(max(row["mark"] for row in problem) for problem in rows), 3),
            "gain over a random pick": gains,
            "rank correlation with length": lengths,
        },
    )


if __name__ == "__main__":
    main()
