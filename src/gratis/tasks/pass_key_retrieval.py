"""Recall one number that was hidden somewhere in a long text."""

from __future__ import annotations

import random
from typing import Any, Literal

from gratis.contract.errors import SubjectError
from gratis.contract.parameters import param
from gratis.tasks.task import Measurement, Metric, Progress, Series, Task, TaskCard, silent


class PassKeyRetrieval(Task):
    """Find the pass key: a number stated once, at several depths of a text of any length.

    A. Mohtashami and M. Jaggi, "Landmark Attention: Random-Access Infinite Context Length for Transformers", 2023.
    """

    card = TaskCard(
        title="Pass-key retrieval",
        acts_on="language model",
        subject="smollm2",
        data="a five-digit number planted at evenly spaced depths in repeated filler or documentation prose",
        metrics=(
            Metric(name="accuracy", help="share of keys that were named"),
            Metric(name="prompt_tokens", help="mean length of the prompts", unit="tokens", cost=True),
        ),
    )

    length: int = param(1024, above=64, unit="tokens", help="length of the text around the key")
    depths: int = param(3, above=0, help="evenly spaced depths")
    trials: int = param(2, above=0, help="keys per depth")
    chunk: int | None = param(None, above=0, unit="tokens", help="read the prompt in pieces of this length")
    prose: Literal["repeated", "documentation"] = param("repeated", help="what the key is hidden in")

    def check(self, subject: Any) -> None:
        if not hasattr(subject, "generate"):
            raise SubjectError(f"pass-key-retrieval needs a language model, not a {type(subject).__name__}.")

    def measure(self, subject: Any, *, seed: int, progress: Progress = silent) -> Measurement:
        from gratis.subjects import tokenizer_of
        from gratis.subjects.text import FILLER, documentation, planted, random_key

        tokenizer = tokenizer_of(subject)
        generator = random.Random(seed)
        prose = FILLER if self.prose == "repeated" else documentation()
        hits: list[float] = []
        lengths: list[float] = []
        by_depth: list[float] = []
        places = [(i + 0.5) / self.depths for i in range(self.depths)]
        for number, depth in enumerate(places):
            found = 0
            for trial in range(self.trials):
                key = random_key(generator)
                fact = f"The pass key is {key}. Remember it. {key} is the pass key."
                text = planted(tokenizer, self.length, [fact], [depth], prose)
                prompt = (
                    "There is important information hidden inside a lot of irrelevant text. Find it and memorize it. "
                    f"{text} What is the pass key? The pass key is"
                )
                answer, count = continuation(subject, tokenizer, prompt, 8, self.chunk)
                hits.append(float(key in answer))
                lengths.append(float(count))
                found += key in answer
                done = (number * self.trials + trial + 1) / (self.depths * self.trials)
                progress(done, f"{int(sum(hits))} of {len(hits)} keys found")
            by_depth.append(found / self.trials)
        return Measurement(
            metrics={"accuracy": sum(hits) / len(hits), "prompt_tokens": sum(lengths) / len(lengths)},
            items={"accuracy": hits},
            series={"accuracy": Series(places, by_depth, "depth of the key in the text", "share found")},
            tokens=int(sum(lengths)),
            calls=len(hits),
        )


def continuation(model: Any, tokenizer: Any, prompt: str, count: int, chunk: int | None) -> tuple[str, int]:
    """Greedy continuation of `prompt` by `count` tokens, and the prompt's length in tokens."""
    import torch

    inputs = tokenizer(prompt, return_tensors="pt", verbose=False).to(model.device)
    options = {} if chunk is None else {"prefill_chunk_size": chunk}
    with torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=count, do_sample=False, pad_token_id=tokenizer.eos_token_id, **options
        )
    length = inputs.input_ids.shape[1]
    return tokenizer.decode(out[0, length:], skip_special_tokens=True), length
