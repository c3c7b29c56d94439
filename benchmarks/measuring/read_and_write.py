"""One arm of the comparison with kvpress, in a process of its own: prints one line of JSON.

python read_and_write.py ARM MODEL_FOLDER CONTEXT NEW BUDGET. Needs gratis for its own arms, kvpress for the peer's.
"""

from __future__ import annotations

import contextlib
import json
import os
import pydoc_data.topics as topics
import sys
import threading
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

ARM, FOLDER, CONTEXT, NEW, BUDGET = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
CHUNK = 128


def resident() -> float:
    """MB of memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


class Peak:
    """Largest resident memory while the block ran."""

    def __enter__(self) -> Peak:
        self.value, self._stop = resident(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.value = max(self.value, resident())
            time.sleep(0.01)

    def __exit__(self, *error: Any) -> None:
        self._stop.set()
        self._thread.join()


def method(model: Any) -> Any:
    """The context in which the arm reads; kvpress's is left before writing, as its users do."""
    if ARM.startswith("kvpress"):
        from kvpress import StreamingLLMPress

        return StreamingLLMPress(compression_ratio=1 - BUDGET / CONTEXT)(model)
    import gratis

    chosen = gratis.LaCache(budget=BUDGET) if ARM == "LaCache" else gratis.SlidingWindow(budget=BUDGET)
    return gratis.attach(model, chosen)


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    text = "\n".join(topics.topics[key] for key in sorted(topics.topics))
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :CONTEXT]
    model(ids[:, :64])
    base, peer = resident(), ARM.startswith("kvpress")
    pieces = [ids] if peer else list(ids.split(CHUNK, dim=1))
    cache: Any = DynamicCache()
    with contextlib.ExitStack() as on:
        on.enter_context(method(model))
        begin = time.process_time()
        with Peak() as peak:
            for piece in pieces:
                out = model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = out.past_key_values
        reading = time.process_time() - begin
        if peer:
            on.close()
        token, begin = out.logits[:, -1].argmax(-1, keepdim=True), time.process_time()
        for step in range(NEW):
            where = {"position_ids": torch.tensor([[CONTEXT + step]])} if peer else {}
            out = model(token, past_key_values=cache, use_cache=True, **where)
            cache, token = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
        writing = time.process_time() - begin
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / 1e6
    print(
        json.dumps(
            {
                "reading, CPU s": round(reading, 3),
                "ms per written token": round(1e3 * writing / NEW, 3),
                "peak memory above the model, MB": round(peak.value - base, 1),
                "keys and values, MB": round(held, 1),
            }
        )
    )


main()
