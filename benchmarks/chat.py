"""A local model as a chat: shared beginnings read once, requests in batches, and what an answer from the cache costs.

    OMP_NUM_THREADS=1 python benchmarks/chat.py

16 requests with 400 shared tokens, about 30 of their own and 16 to write, on the embedded language model; one thread,
process CPU seconds, arms in turns. Writes benchmarks/results/chat.json.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Any

import torch
from measuring import store
from rich.progress import track

import gratis
from gratis.subjects.chat import Request, local
from gratis.subjects.text import documentation, tokens_of

REQUESTS, SHARED, OWN, NEW, ROUNDS = 16, 400, 30, 16, 3


def conversations(model: Any) -> list[Request]:
    """Requests whose first `SHARED` tokens are the same."""
    tokenizer = gratis.subjects.tokenizer_of(model)
    text = documentation()
    common = tokenizer.decode(tokens_of(tokenizer, text, SHARED)[0])
    own = [tokenizer.decode(tokens_of(tokenizer, text, OWN, start=2000 + 100 * i)[0]) for i in range(REQUESTS)]
    return [
        Request(messages=({"role": "user", "content": f"{common}\n{part}"},), temperature=0.0, max_tokens=NEW)
        for part in own
    ]


def main() -> None:
    torch.set_num_threads(1)
    model = gratis.open("smollm2")
    asked = conversations(model)
    least = local.PREFIX_LEAST
    arms = {
        "batch, shared beginning read once": (least, 1 << 16),
        "batch, every prompt read whole": (1 << 30, 1 << 16),
        "one request at a time": (1 << 30, 1),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    texts: dict[str, list[str]] = {}
    read: dict[str, int] = {}
    for number in track(range(ROUNDS + 1), description="rounds"):
        for name, (prefix, tokens) in arms.items():
            local.PREFIX_LEAST = prefix
            backend = local.LocalModel(model, tokens, 1 << 29)
            begin = time.process_time()
            replies = backend.generate(asked)
            if number:
                seconds[name].append(time.process_time() - begin)
            texts[name], read[name] = [reply.text for reply in replies], backend.prefill_tokens
    local.PREFIX_LEAST = least
    whole, alone = "batch, every prompt read whole", "one request at a time"
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    first = next(iter(arms))
    with tempfile.TemporaryDirectory() as folder:
        chat = gratis.Chat(lambda messages, **parameters: "yes", cache=f"{folder}/answers.db")
        chat(asked)
        begin = time.perf_counter()
        chat(asked)
        cached = (time.perf_counter() - begin) / REQUESTS
    store(
        "chat",
        {
            "repeat": "OMP_NUM_THREADS=1 python benchmarks/chat.py",
            f"{REQUESTS} requests, {SHARED} shared tokens, {NEW} new": [
                {
                    "arm": name,
                    "CPU s": round(middle[name], 2),
                    "prompt tokens read": read[name],
                    "same answers as one at a time": texts[name] == texts[alone],
                }
                for name in arms
            ],
            "read whole over read once, CPU s": round(middle[whole] / middle[first], 2),
            "one at a time over read once, CPU s": round(middle[alone] / middle[first], 2),
            "answer from the cache, ms": round(1e3 * cached, 3),
        },
    )


if __name__ == "__main__":
    main()
