"""Self-certainty: what scoring during generation costs, what encoding the prompt once saves, what memory it takes.

    OMP_NUM_THREADS=1 python benchmarks/self_certainty.py

On the embedded language model, one thread. The same samples are drawn with and without the recorder, in turns; beside
them transformers' own `num_return_sequences`, which encodes the prompt once per sample, and the second pass over the
finished responses that scoring afterwards takes. Writes benchmarks/results/self_certainty.json.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from measuring import store
from rich.progress import track

import gratis
from gratis.methods.decoding.self_certainty import score
from gratis.subjects.sampling_loop import Recorder
from gratis.subjects.text import documentation, tokens_of

SAMPLES, PROMPT, NEW, ROUNDS = 8, 512, 48, 7


def seconds(run: Callable[[], Any]) -> float:
    begin = time.process_time()
    run()
    return time.process_time() - begin


def main() -> None:
    torch.set_num_threads(1)
    model = gratis.open("smollm2")
    ids = tokens_of(gratis.subjects.tokenizer_of(model), documentation(), PROMPT)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "min_new_tokens": NEW}
    drawn: dict[str, Any] = {}

    def with_scores() -> None:
        torch.manual_seed(0)
        with gratis.attach(model, gratis.SelfCertainty(samples=SAMPLES)):
            drawn["all"] = model.generate(input_ids=ids, num_return_sequences=SAMPLES, **options)

    def without_scores() -> None:
        torch.manual_seed(0)
        with gratis.attach(model, gratis.MajorityVote(samples=SAMPLES, answer="response", temperature=0.6, top_p=0.9)):
            model.generate(input_ids=ids, **options)

    def transformers_alone() -> None:
        torch.manual_seed(0)
        model.generate(
            input_ids=ids, do_sample=True, temperature=0.6, top_p=0.9, top_k=0, num_return_sequences=SAMPLES, **options
        )

    def second_pass() -> None:
        score(model, ids, list(drawn["all"][:, PROMPT:]))

    recording: list[float] = []
    held: dict[str, int] = {}
    call = Recorder.__call__

    def timed(self: Recorder, input_ids: Any, scores: Any) -> Any:
        begin = time.process_time()
        result = call(self, input_ids, scores)
        recording.append(time.process_time() - begin)
        held["bytes"] = sum(step.untyped_storage().nbytes() for step in self.steps)
        return result

    Recorder.__call__ = timed  # type: ignore[method-assign]
    arms = {
        "self-certainty": with_scores,
        "the same samples, no scores": without_scores,
        "transformers' num_return_sequences": transformers_alone,
        "second pass over the responses": second_pass,
    }
    seen: dict[str, list[float]] = {name: [] for name in arms}
    spent = []
    for number in track(range(ROUNDS + 1), description="rounds"):
        for name, run in arms.items():
            recording.clear()
            took = seconds(run)
            if number:
                seen[name].append(took)
                if name == "self-certainty":
                    spent.append(sum(recording) / took)
    middle = {name: statistics.median(values) for name, values in seen.items()}
    ratios = [a / b for a, b in zip(seen["self-certainty"], seen["the same samples, no scores"], strict=True)]
    vocabulary = int(model.config.vocab_size)
    store(
        "self_certainty",
        {
            "repeat": "OMP_NUM_THREADS=1 python benchmarks/self_certainty.py",
            "samples": SAMPLES,
            "prompt tokens": PROMPT,
            "new tokens": NEW,
            "CPU seconds": {name: {"CPU s": round(value, 2)} for name, value in middle.items()},
            "scoring, share of generation": round(statistics.median(spent), 4),
            "with scores over without": round(statistics.median(ratios), 4),
            "transformers' num_return_sequences over self-certainty": round(
                middle["transformers' num_return_sequences"] / middle["self-certainty"], 2
            ),
            "second pass, share of generation": round(
                middle["second pass over the responses"] / middle["self-certainty"], 3
            ),
            "kept while generating, bytes": held["bytes"],
            "logits of all steps would be, bytes": SAMPLES * NEW * vocabulary * 4,
        },
    )


if __name__ == "__main__":
    main()
