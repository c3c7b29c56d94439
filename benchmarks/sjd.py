"""Speculative Jacobi decoding: forward passes per token and seconds, on pictures as tokens and on text.

    OMP_NUM_THREADS=1 python benchmarks/sjd.py

Pictures of the zoo's prior with guidance 3, by window, initial drafts and the law of random drafts; then text of the
embedded language model at temperature 1. Seconds are CPU seconds per picture (or response) as shares of plain
sampling's, taken in turns. Whether the distribution is kept is verified by `gratis verify sjd`. Writes
benchmarks/results/sjd.json.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from measuring import store
from rich.progress import track

import gratis
from gratis import subjects
from gratis.subjects.text import documentation
from gratis.tasks.sampled_pictures import picture
from gratis.zoo.sprites_tokens import SIDE, TOKENS, WORLD, prompts, said

PICTURES, RESPONSES, NEW = 8, 2, 32
PLAIN = "plain sampling"


def arms(width: int | None) -> dict[str, Any]:
    """Methods by name; neighbours in rows of `width` where there are rows."""
    draws = {"temperature": 1.0, "top_p": 1.0}
    found = {PLAIN: gratis.Sampling(**draws)}
    windows = (4, 16) if width is None else (4, 8, 16, 32)
    found |= {f"window {window}": gratis.SJD(window=window, **draws) for window in windows}
    found["window 16, random drafts by their own law"] = gratis.SJD(window=16, random_law="uniform", **draws)
    if width is not None:
        found["window 16, plain Jacobi"] = gratis.SJD(window=16, accept="match", **draws)
        for initial in ("repeat_horizon", "sample_horizon", "repeat_vertical", "sample_vertical"):
            found[f"window 16, {initial}"] = gratis.SJD(window=16, initial=initial, width=width, **draws)
    return found


def measured(model: Any, methods: dict[str, Any], tasks: list[Any], tokens: int) -> dict[str, Any]:
    """Each method over the same tasks, which are called in turns."""
    passes = [0]
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    counts = dict.fromkeys(methods, 0)
    runs: dict[str, dict[int, int]] = {name: {} for name in methods}
    hook = None
    for number, task in enumerate(track(tasks, description=type(model).__name__)):
        for name, method in methods.items():
            with gratis.attach(model, method) as handle:
                passes[0] = 0
                hook = model.register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
                torch.manual_seed(number)
                begin = time.process_time()
                task()
                seconds[name].append(time.process_time() - begin)
                hook.remove()
                counts[name] += passes[0]
                for detail in handle.report()[method.name].get("tokens_per_pass", []):
                    for length, times in detail.items():
                        runs[name][length] = runs[name].get(length, 0) + times
    plain = counts[PLAIN]
    return {
        name: {
            "passes per token": round(counts[name] / (tokens * len(tasks)), 3),
            "passes, times fewer": round(plain / counts[name], 2),
            "CPU s": round(statistics.median(seconds[name]), 3),
            "CPU s over plain": round(
                statistics.median(a / b for a, b in zip(seconds[name], seconds[PLAIN], strict=True)), 2
            ),
            **(
                {"share of passes that commit one token": round(runs[name].get(1, 0) / sum(runs[name].values()), 2)}
                if runs[name]
                else {}
            ),
        }
        for name in methods
    }


def main() -> None:
    torch.set_num_threads(1)
    prior = gratis.open("zoo:sprites-prior")
    words = subjects.tokenizer_of(prior)
    asked = prompts(words, [said(scene) for scene in WORLD.scenes(3_000_000, 3_000_000 + PICTURES)])
    pictures = [lambda row=row: picture(prior, words, row[None], 3.0) for row in asked]  # type: ignore[misc]
    model = gratis.open("smollm2")
    tokenizer = subjects.tokenizer_of(model)
    texts = [part for part in documentation().split("\n\n") if len(part) > 400][:RESPONSES]
    openings = [tokenizer(text[:200], return_tensors="pt")["input_ids"] for text in texts]
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": True, "temperature": 1.0, "top_k": 0}
    responses = [
        lambda ids=ids: model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)  # type: ignore[misc]
        for ids in openings
    ]
    store(
        "sjd",
        {
            "repeat": "OMP_NUM_THREADS=1 python benchmarks/sjd.py",
            "pictures": PICTURES,
            "tokens per picture": TOKENS,
            "by method, pictures": measured(prior, arms(SIDE), pictures, TOKENS),
            "tokens per response": NEW,
            "by method, text": measured(model, arms(None), responses, NEW),
        },
    )


if __name__ == "__main__":
    main()
