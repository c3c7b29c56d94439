"""All decoding methods of language models on the same problems, at about equal cost in tokens.

    OMP_NUM_THREADS=1 python benchmarks/decoding.py [PROBLEMS]

Step-by-step sums by the small and the large arithmetic model of the zoo. Methods that draw several responses draw as
many as make up about the tokens that CNTP draws. Accuracy with 95 % intervals from resampling problems; tokens, forward
passes and CPU seconds per problem. Writes benchmarks/results/decoding.json.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch
from measuring import store
from rich.progress import track

import gratis
from gratis import subjects
from gratis.zoo.arithmetic import Problem, answer_of, problems

PROBLEMS, SEED, LIMIT, TEMPERATURE = 60, 20_001, 300, 0.8


def interval(values: list[float]) -> list[float]:
    """95 % interval of the mean, from 2,000 resamplings."""
    data = torch.tensor(values, dtype=torch.float64)
    picks = torch.randint(len(data), (2000, len(data)), generator=torch.Generator().manual_seed(0))
    return [round(float(v), 3) for v in data[picks].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))]


def measured(model: Any, method: Any, asked: list[Problem], name: str) -> dict[str, Any]:
    """One method over all problems."""
    tokenizer = subjects.tokenizer_of(model)
    right: list[float] = []
    tokens: list[int] = []
    passes = [0]

    def count(*_: Any) -> None:
        passes[0] += 1

    others = [model, *([method.target] if getattr(method, "target", None) is not None else [])]
    hooks = [one.register_forward_hook(count) for one in others]
    begin = time.process_time()
    with gratis.attach(model, method) as handle:
        for number, problem in enumerate(track(asked, description=name)):
            ids = tokenizer(problem.prompt, return_tensors="pt")["input_ids"]
            torch.manual_seed(number)
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=LIMIT)
            response = out[0, ids.shape[1] :]
            right.append(float(answer_of(tokenizer.decode(response, skip_special_tokens=True)) == problem.answer))
            tokens.append(len(response))
        report = handle.report()[method.name]
    seconds = time.process_time() - begin
    for hook in hooks:
        hook.remove()
    drawn = report.get("generated_tokens", sum(tokens))
    return {
        "accuracy": round(statistics.mean(right), 3),
        "interval": interval(right),
        "tokens drawn per problem": round(drawn / len(asked), 1),
        "forward passes per problem": round(passes[0] / len(asked), 1),
        "CPU s per problem": round(seconds / len(asked), 3),
    }


def table(model: Any, asked: list[Problem], more: dict[str, Any]) -> dict[str, Any]:
    """All methods on one model; `more` are those that need something beside it."""
    draws = {"temperature": TEMPERATURE, "top_p": 1.0}
    rows = {
        "greedy": measured(model, gratis.Greedy(), asked, "greedy"),
        "sampling": measured(model, gratis.Sampling(**draws), asked, "sampling"),
        "cntp": measured(model, gratis.CNTP(**draws), asked, "cntp"),
    }
    cost = {name: row["tokens drawn per problem"] for name, row in rows.items()}
    samples = max(2, round(cost["cntp"] / cost["sampling"]))
    several = {
        "majority vote": gratis.MajorityVote(samples=samples, answer="boxed", **draws),
        "perplexity pick": gratis.PerplexityPick(samples=samples, **draws),
        "self-certainty, best": gratis.SelfCertainty(samples=samples, answer="boxed", **draws),
        "self-certainty, vote": gratis.SelfCertainty(samples=samples, select="borda", answer="boxed", **draws),
    }
    for name, method in {**several, **more}.items():
        rows[name] = measured(model, method, asked, name)
    return {"samples of those that draw several": samples, "methods": rows}


def main() -> None:
    torch.set_num_threads(1)
    count = int(sys.argv[1]) if len(sys.argv) > 1 else PROBLEMS
    asked = problems(count, SEED)
    small, large = gratis.open("zoo:arithmetic-small"), gratis.open("zoo:arithmetic-large")
    thinking = {"speculative thinking": gratis.SpeculativeThinking(target=large, temperature=TEMPERATURE)}
    store(
        "decoding",
        {
            "repeat": "OMP_NUM_THREADS=1 python benchmarks/decoding.py",
            "problems": count,
            "temperature": TEMPERATURE,
            "arithmetic-small": table(small, asked, thinking),
            "arithmetic-large": table(large, asked, {}),
        },
    )


if __name__ == "__main__":
    main()
