"""Masked diffusion that stops when the answer has converged: accuracy, steps and time beside other schedules.

    OMP_NUM_THREADS=1 python benchmarks/prophet.py

Sums by the zoo's masked-diffusion model. Schedules that always take as many steps, confidence-threshold decoding, and
Prophet with the authors' thresholds and with thresholds scaled on other prompts without labels; each again with the
words before the answer fixed, for the baseline too. Accuracy with 95 % intervals from resampling problems, forward
passes per problem, and CPU seconds of one prompt at a time, as shares of those of the full schedule, taken in turns.
Writes benchmarks/results/prophet.json.
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
from gratis.methods.decoding.prophet import calibrate
from gratis.subjects.masked_diffusion_door import generate
from gratis.zoo.masked_arithmetic import ANSWER, SUFFIX, SUFFIX_PLACE, WINDOW, by_prompt_length, sums

PROBLEMS, CALIBRATION, TIMED, SEED = 128, 32, 8, 2_000_003
FULL = "full schedule, 32 steps"


def schedules(model: Any, tokenizer: Any) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Methods, and what the call adds."""
    authors = gratis.Prophet(answer_positions=ANSWER)
    prompts = max(by_prompt_length(tokenizer, sums(CALIBRATION, SEED + 1)), key=lambda group: len(group[0]))[0]
    scaled, found = calibrate(model, prompts, authors, max_new_tokens=WINDOW)
    print("calibrated:", found)
    (word,) = tokenizer(SUFFIX, add_special_tokens=False).input_ids
    fixed = {"constraints": {SUFFIX_PLACE: word}}
    sure = gratis.ConfidenceThreshold(threshold=0.9)
    return {
        FULL: (None, {}),
        "16 steps": (gratis.FixedSteps(steps=16), {}),
        "8 steps": (gratis.FixedSteps(steps=8), {}),
        "confidence above 0.9": (sure, {}),
        "Prophet, the authors' thresholds": (authors, {}),
        "Prophet, scaled thresholds": (scaled, {}),
        "Prophet and confidence above 0.9": ([sure, authors], {}),
        "words fixed, full schedule": (None, fixed),
        "words fixed, Prophet": (authors, fixed),
    }


def put_on(model: Any, methods: Any) -> Any:
    """The methods on the model; FixedSteps is the base decoder as it is without one."""
    several = methods if isinstance(methods, list) else [methods or gratis.FixedSteps()]
    return gratis.attach(model, *several)


class Passes:
    """Rows that went through the model."""

    def __init__(self, model: Any) -> None:
        self.rows = 0
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: Any, kwargs: Any) -> None:
        self.rows += len(args[0] if args else kwargs["input_ids"])


def quality(model: Any, tokenizer: Any, passes: Passes, methods: Any, call: dict[str, Any]) -> dict[str, Any]:
    """Accuracy and passes of one schedule."""
    right: list[float] = []
    with put_on(model, methods):
        passes.rows = 0
        for prompts, windows in by_prompt_length(tokenizer, sums(PROBLEMS, SEED)):
            torch.manual_seed(0)
            found = generate(model, prompts, max_new_tokens=WINDOW, **call)[:, -WINDOW:]
            right += (found[:, list(ANSWER)] == windows[:, list(ANSWER)]).all(1).double().tolist()
        rows = passes.rows
    return {
        "accuracy": round(statistics.mean(right), 3),
        "interval": interval(right),
        "passes per problem": round(rows / len(right), 2),
    }


def times(model: Any, tokenizer: Any, passes: Passes, every: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of each schedule, one prompt at a time: passes and CPU seconds as shares of the full schedule's."""
    prompts = [row[None] for group, _ in by_prompt_length(tokenizer, sums(TIMED, SEED + 2)) for row in group]
    seconds: dict[str, list[float]] = {name: [] for name in every}
    steps: dict[str, list[int]] = {name: [] for name in every}
    for prompt in track(prompts, description="one prompt at a time"):
        for name, (methods, call) in every.items():
            with put_on(model, methods):
                passes.rows = 0
                begin = time.process_time()
                generate(model, prompt, max_new_tokens=WINDOW, **call)
                seconds[name].append(time.process_time() - begin)
                steps[name].append(passes.rows)
    share = {name: sum(steps[name]) / sum(steps[FULL]) for name in every}
    took = {
        name: statistics.median(a / b for a, b in zip(seconds[name], seconds[FULL], strict=True))
        * share[name]
        / statistics.median(a / b for a, b in zip(steps[name], steps[FULL], strict=True))
        for name in every
    }
    return {
        name: {
            "share of steps": round(share[name], 3),
            "share of seconds": round(took[name], 3),
            "seconds over steps": round(took[name] / share[name], 3),
        }
        for name in every
    }


def main() -> None:
    torch.set_num_threads(1)
    model = gratis.open("zoo:arithmetic-masked")
    tokenizer = subjects.tokenizer_of(model)
    every = schedules(model, tokenizer)
    passes = Passes(model)
    table = {
        name: quality(model, tokenizer, passes, methods, call)
        for name, (methods, call) in track(every.items(), description="schedules")
    }
    for name, found in times(model, tokenizer, passes, every).items():
        table[name] |= found
    store(
        "prophet",
        {
            "repeat": "OMP_NUM_THREADS=1 python benchmarks/prophet.py",
            "problems": PROBLEMS,
            "window": WINDOW,
            "schedules": table,
        },
    )


if __name__ == "__main__":
    main()
