"""What self-certainty loses where an endpoint tells only the largest log-probabilities: bias, and other choices.

    OMP_NUM_THREADS=1 python benchmarks/endpoint_certainty.py [--problems N] [--device cpu] [--limit SECONDS]

Samples of the embedded language model to small generated problems, scored exactly and by the bound from the K largest
log-probabilities. Writes benchmarks/results/endpoint_certainty.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from measuring import store
from rich.progress import track

import gratis
from gratis.subjects.answers import ranking
from gratis.subjects.token_statistics import self_certainty, self_certainty_bound
from gratis.tasks.reasoning import encoded, problems, respond
from gratis.tasks.sample_choice import rank_correlation

SAMPLES, PROBLEMS, NEW, TEMPERATURE, TOLD = 8, 6, 24, 0.8, (1, 5, 20, 100, 1000)
KINDS = ("chain_sum", "products", "gcd")


@torch.no_grad()
def scores(model: Any, prompt: torch.Tensor, tokens: list[int]) -> dict[str, tuple[float, float]]:
    """Exact score and bounds of one response, each with the share of tokens at which the bound was set to a floor."""
    logits = model(torch.cat([prompt, torch.tensor([tokens], device=prompt.device)], dim=1)).logits[
        0, prompt.shape[1] - 1 : -1
    ]
    found = {"exact": (float(self_certainty(logits).mean()), 0.0)}
    for count in TOLD:
        top = logits.double().log_softmax(-1).topk(count).values
        value, floored = self_certainty_bound(top, logits.shape[-1])
        found[str(count)] = float(value.mean()), float(floored.float().mean())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--problems", type=int, default=PROBLEMS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no problem is begun")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = gratis.open("smollm2").to(chosen.device)
    rows = []
    options = {"do_sample": True, "temperature": TEMPERATURE, "top_p": 1.0, "top_k": 0}
    begin = time.monotonic()
    for problem in track(problems(KINDS, chosen.problems, 0, "easy"), description="problems"):
        if time.monotonic() - begin > chosen.limit:
            break
        prompt = encoded(model, problem.question)
        drawn = respond(model, prompt, NEW, num_return_sequences=SAMPLES, **options)
        rows.append([scores(model, prompt, response.tokens) for response in drawn])
    table = {}
    for count in map(str, TOLD):
        pairs = [([r["exact"][0] for r in row], [r[count][0] for r in row]) for row in rows]
        table[f"{count} told"] = {
            "mean bias, nats": round(statistics.mean(b - a for exact, low in pairs for a, b in zip(exact, low, strict=True)), 3),
            "rank correlation with the exact score": round(statistics.mean(rank_correlation(*pair) for pair in pairs), 3),
            "same choice": round(statistics.mean(ranking(a)[0] == ranking(b)[0] for a, b in pairs), 3),
            "tokens at the floor": round(statistics.mean(r[count][1] for row in rows for r in row), 4),
        }  # fmt: skip
    exact = statistics.mean(r["exact"][0] for row in rows for r in row)
    store(
        "endpoint_certainty",
        {
            "repeat": "OMP_NUM_THREADS=1 python benchmarks/endpoint_certainty.py",
            "problems": len(rows),
            "samples": SAMPLES,
            "device": chosen.device,
            "mean exact score, nats": round(exact, 3),
            "bound": table,
        },
    )


if __name__ == "__main__":
    main()
