"""What being attached costs when a method has nothing to do: decoding with and without, token by token in turns.

    OMP_NUM_THREADS=1 python benchmarks/attach_overhead.py

On the embedded language model, one thread, process CPU seconds. Each method is attached at parameters at which it
changes nothing on this text. Writes benchmarks/results/attach_overhead.json.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from measuring import store

import gratis
from gratis.contract.attach import Scope
from gratis.subjects.attention_door import install_attention, pass_through
from gratis.subjects.text import documentation, tokens_of

PROMPT, STEPS = 512, 120
METHODS: dict[str, Any] = {
    "LaCache": gratis.LaCache(budget=8192),
    "sliding window": gratis.SlidingWindow(budget=8192),
    "attention door, passed through": None,
}


def on(model: Any, method: Any) -> Any:
    """Attach, and return what takes it off."""
    if method is not None:
        return gratis.attach(model, method).detach
    scope = Scope()
    install_attention(model, "pass-through", pass_through, scope)
    return scope.close


@torch.no_grad()
def overhead(model: Any, tokens: torch.Tensor, method: Any) -> dict[str, Any]:
    """Milliseconds per token with and without, and the median of their ratios."""
    caches: dict[str, Any] = {}
    seen: dict[str, list[float]] = {"without": [], "with": []}
    for at in [0, *range(PROMPT, PROMPT + STEPS)]:
        ids = tokens[:, :PROMPT] if at == 0 else tokens[:, at : at + 1]
        for arm in ("without", "with") if at % 2 else ("with", "without"):
            off = on(model, method) if arm == "with" else lambda: None
            begin = time.process_time()
            caches[arm] = model(ids, past_key_values=caches.get(arm), use_cache=True, logits_to_keep=1).past_key_values
            if at:
                seen[arm].append(time.process_time() - begin)
            off()
    ratios = [b / a for a, b in zip(seen["without"], seen["with"], strict=True)]
    return {
        "without, ms per token": round(1e3 * statistics.median(seen["without"]), 2),
        "with, ms per token": round(1e3 * statistics.median(seen["with"]), 2),
        "with / without": round(statistics.median(ratios), 4),
    }


def main() -> None:
    torch.set_num_threads(1)
    model = gratis.open("smollm2")
    tokens = tokens_of(gratis.subjects.tokenizer_of(model), documentation(), PROMPT + STEPS + 1)
    rows = [{"method": name, **overhead(model, tokens, method)} for name, method in METHODS.items()]
    store(
        "attach_overhead",
        {"repeat": "OMP_NUM_THREADS=1 python benchmarks/attach_overhead.py", "at the identity parameter": rows},
    )


if __name__ == "__main__":
    main()
