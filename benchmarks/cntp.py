"""Cautious next token prediction: what a cautious segment costs beside a single trial, and a text beside sampling.

    OMP_NUM_THREADS=1 python benchmarks/cntp.py
    OMP_NUM_THREADS=2 python benchmarks/cntp.py --threads 2

On the embedded language model. Trials of one length after the same prefix, in turns: one, five side by side on the
prefix's own cache, and five as rows of a copied cache: CPU seconds of one thread (medians), and wall seconds of two (the
shortest of the rounds, as other work may share the cores). The model's linear layers alone say what five rows cost
beside one at least. Then whole responses beside plain sampling, one thread. Renews its part of
benchmarks/results/cntp.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from measuring import renew, stored
from rich.progress import track
from transformers import DynamicCache, GenerationConfig

import gratis
from gratis import subjects
from gratis.subjects import branching
from gratis.subjects.branching import Text
from gratis.subjects.growing_cache import GrowingLayer
from gratis.subjects.text import documentation, tokens_of

TRIALS, LENGTH, ROUNDS, PREFIXES = 5, 12, 5, (128, 512, 2048)
NEW, TEMPERATURE = 64, 0.8


def begun(model: Any, ids: torch.Tensor) -> Text:
    """A text that was read up to its end."""
    config = GenerationConfig()
    config.prefill_chunk_size = None
    text = Text(model, ids, config, {"past_key_values": DynamicCache(config=model.config), "use_cache": True})
    text.read()
    return text


def segment(text: Text, trials: int, shared: bool, clock: Callable[[], float]) -> float:
    """Seconds, by this clock, of `trials` trials of LENGTH tokens; the text is put back as it was."""
    ids, kwargs, pending = text.ids, dict(text._kwargs), text._pending
    start = ids.shape[1]
    known, branching.heeds_branches = branching.heeds_branches, lambda model: shared
    text._heeds = None

    def done(texts: torch.Tensor) -> torch.Tensor:
        return torch.full((len(texts),), texts.shape[1] - start >= LENGTH)

    begin = clock()
    text.branch(torch.arange(100, 100 + trials), lambda branches, texts, logits: logits.argmax(-1), done, float)
    took = clock() - begin
    branching.heeds_branches = known
    text.cache.crop(start - text.cache.get_seq_length())
    for layer in text.cache.layers:
        if isinstance(layer, GrowingLayer):
            layer.become_plain()
    text.ids, text._kwargs, text._pending = ids, kwargs, pending
    return took


def segments(
    model: Any, tokenizer: Any, prefixes: Sequence[int], rounds: int, unit: str, clock: Callable[[], float],
    summary: Callable[[Sequence[float]], float],
) -> dict[str, Any]:  # fmt: skip
    """Seconds per cautious segment by prefix, and their ratio to a single trial's."""
    assert branching.heeds_branches(model), "the embedded model decodes branches side by side"
    arms = {"one trial": (1, True), "five side by side": (TRIALS, True), "five as copies": (TRIALS, False)}
    found = {}
    for prefix in prefixes:
        text = begun(model, tokens_of(tokenizer, documentation(), prefix))
        seen: dict[str, list[float]] = {name: [] for name in arms}
        for number in track(range(rounds + 1), description=f"segments after {prefix} tokens"):
            for name, (trials, shared) in arms.items():
                took = segment(text, trials, shared, clock)
                if number:
                    seen[name].append(took)
        middle = {name: summary(values) for name, values in seen.items()}
        found[f"{prefix} tokens"] = {
            **{f"{name}, {unit}": round(value, 3) for name, value in middle.items()},
            "side by side over one": round(middle["five side by side"] / middle["one trial"], 2),
            "copies over one": round(middle["five as copies"] / middle["one trial"], 2),
        }
    return found


def linear_layers(
    model: Any, rounds: int, clock: Callable[[], float], summary: Callable[[Sequence[float]], float]
) -> float:
    """What the products of all linear layers take for a row per trial, over what they take for one row."""
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    seen: dict[int, list[float]] = {1: [], TRIALS: []}
    for number in range(2 * rounds + 1):
        for rows, times in seen.items():
            inputs = {layer.in_features: torch.ones(1, rows, layer.in_features) for layer in layers}
            begin = clock()
            for layer in layers:
                layer(inputs[layer.in_features])
            took = clock() - begin
            if number:
                times.append(took)
    return round(summary(seen[TRIALS]) / summary(seen[1]), 2)


def responses(model: Any, tokenizer: Any) -> dict[str, Any]:
    """CPU seconds per token of the response beside sampling, on openings of paragraphs of documentation."""
    texts = [part for part in documentation().split("\n\n") if len(part) > 400][:6]
    prompts = [tokenizer(text[:200], return_tensors="pt")["input_ids"] for text in texts]
    arms = {
        "sampling": gratis.Sampling(temperature=TEMPERATURE),
        "cntp": gratis.CNTP(temperature=TEMPERATURE),
        "cntp, at most 5 trials": gratis.CNTP(temperature=TEMPERATURE, max_trials=5),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    counts: dict[str, list[int]] = {name: [0, 0, 0] for name in arms}
    for prompt in track(prompts, description="responses"):
        for name, method in arms.items():
            torch.manual_seed(0)
            with gratis.attach(model, method) as handle:
                begin = time.process_time()
                out = model.generate(
                    input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, min_new_tokens=NEW
                )
                seconds[name].append((time.process_time() - begin) / (out.shape[1] - prompt.shape[1]))
                report = handle.report()[method.name]
            for place, value in enumerate(
                (out.shape[1] - prompt.shape[1], report["generated_tokens"], sum(report.get("cautious_tokens", [0])))
            ):
                counts[name][place] += value
    return {
        name: {
            "CPU s per token": round(statistics.median(seconds[name]), 4),
            "over sampling": round(
                statistics.median(a / b for a, b in zip(seconds[name], seconds["sampling"], strict=True)), 2
            ),
            "tokens drawn per token kept": round(counts[name][1] / counts[name][0], 2),
            "share of tokens in cautious segments": round(counts[name][2] / counts[name][0], 2),
        }
        for name in arms
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--threads", type=int, choices=(1, 2), default=1)
    parser.add_argument("--prefixes", type=int, nargs="*", default=PREFIXES)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--segments-only", action="store_true", help="leave out whole responses")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    model = gratis.open("smollm2")
    tokenizer = subjects.tokenizer_of(model)
    content: dict[str, Any] = {
        "repeat": "OMP_NUM_THREADS=1 python benchmarks/cntp.py; OMP_NUM_THREADS=2 python benchmarks/cntp.py --threads 2",
        "trials": TRIALS,
        "tokens per trial": LENGTH,
    }
    name = "a cautious segment, by prefix" + (", two threads" if chosen.threads == 2 else "")
    measure = (
        ("wall s", time.perf_counter, min) if chosen.threads == 2 else ("CPU s", time.process_time, statistics.median)
    )
    with torch.no_grad():
        bound = linear_layers(model, chosen.rounds, *measure[1:])
        renew("cntp", {f"linear layers alone, five rows over one, threads: {chosen.threads}": bound})
        found = dict(stored("cntp").get(name, {}))
        for prefix in chosen.prefixes:
            found |= segments(model, tokenizer, [prefix], chosen.rounds, *measure)
            renew("cntp", {**content, name: found})
        if chosen.threads == 1 and not chosen.segments_only:
            renew("cntp", {**content, "whole responses": responses(model, tokenizer)})


if __name__ == "__main__":
    main()
