"""LaCache: time per decoded token against history, what thinning costs, and kvpress's streaming press beside it.

    OMP_NUM_THREADS=1 python benchmarks/lacache.py [history] [kvpress]

On the embedded language model and the documentation's text, one thread, process CPU seconds. In "history" arms take
turns token by token; in "kvpress", each runs in a process of its own, in turns (kvpress caps transformers below ours,
so it runs in its own environment). Writes benchmarks/results/lacache.json; a named part renews only its own figures.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measuring import medians, peer_python, renew, run_apart
from rich.progress import track

import gratis
from gratis.subjects.bounded_cache import BoundedCache
from gratis.subjects.embedded import embedded_folder
from gratis.subjects.text import documentation, tokens_of

BUDGET, CHUNK, STEPS = 1024, 128, 40
HISTORIES = (1024, 2048, 4096, 8000)
ARMS: dict[str, tuple[Any, ...]] = {
    "full cache": (),
    "sliding window": (gratis.SlidingWindow(budget=BUDGET),),
    "LaCache": (gratis.LaCache(budget=BUDGET),),
    "LaCache, span 8, overlap 4": (gratis.LaCache(budget=BUDGET, span=8, overlap=4),),
}
PEER_CONTEXT, PEER_NEW, PEER_ROUNDS = 4096, 64, 2


class Reader:
    """One arm: a model of its own with the methods on it, and the text read so far."""

    def __init__(self, tokens: torch.Tensor, methods: tuple[Any, ...]) -> None:
        self.model, self.tokens = gratis.open("smollm2"), tokens
        if methods:
            gratis.attach(self.model, *methods)
        self.cache: Any = None
        self.at = 0

    def read(self, count: int) -> float:
        """CPU seconds for the next `count` tokens at once."""
        ids = self.tokens[:, self.at : self.at + count]
        begin = time.process_time()
        out = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        took = time.process_time() - begin
        self.cache = out.past_key_values
        self.at += count
        return took


def timed_eviction() -> list[float]:
    """Seconds that bounded caches spend after every forward pass, as they come."""
    spent: list[float] = []
    finish = BoundedCache.finish

    def timed(self: BoundedCache, count: int) -> None:
        begin = time.process_time()
        finish(self, count)
        spent.append(time.process_time() - begin)

    BoundedCache.finish = timed  # type: ignore[method-assign]
    return spent


@torch.no_grad()
def time_against_history(tokens: torch.Tensor) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of milliseconds per token by history, and of the share that evicting takes.

    That share depends on how far a pass of thinning has come, so it is taken over as many tokens as the budget: a whole
    pass and more.
    """
    readers = {name: Reader(tokens, methods) for name, methods in ARMS.items()}
    spent = timed_eviction()
    rows, shares = [], []
    for history in track(HISTORIES, description="histories"):
        for reader in readers.values():
            while reader.at < history:
                reader.read(min(CHUNK, history - reader.at))
        seen: dict[str, list[float]] = {name: [] for name in readers}
        for _ in range(STEPS):
            for name, reader in readers.items():
                seen[name].append(reader.read(1))
        rows.append({"history": history, **{f"{n}, ms": round(1e3 * statistics.median(s), 2) for n, s in seen.items()}})
    for name in track(list(readers)[1:], description="a whole pass of thinning"):
        spent.clear()
        took = sum(readers[name].read(1) for _ in range(BUDGET))
        share = round(sum(spent) / took, 4)
        shares.append({"method": name, "ms per token": round(1e3 * sum(spent) / BUDGET, 3), "share of decoding": share})
    return rows, shares


def beside_kvpress() -> list[dict[str, Any]]:
    """Reading 4,096 tokens and writing 64: medians of processes that take turns."""
    script = Path(__file__).parent / "measuring" / "read_and_write.py"
    peer = peer_python("kvpress", "kvpress==0.5.5")
    arms = {"LaCache": sys.executable, "sliding window": sys.executable, "kvpress StreamingLLMPress": peer}
    seen: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    for _ in track(range(PEER_ROUNDS), description="beside kvpress"):
        for name, python in arms.items():
            seen[name].append(
                run_apart(python, script, name, embedded_folder("smollm2"), PEER_CONTEXT, PEER_NEW, BUDGET)
            )
    return [{"arm": name, **medians(rows)} for name, rows in seen.items()]


def history() -> dict[str, Any]:
    """Time per token by history, its growth, and what thinning costs."""
    tokenizer = gratis.subjects.tokenizer_of(gratis.open("smollm2"))
    rows, shares = time_against_history(
        tokens_of(tokenizer, documentation(), HISTORIES[-1] + len(HISTORIES) * STEPS + BUDGET)
    )
    first, last = rows[0], rows[-1]
    return {
        f"time per decoded token, budget {BUDGET}": rows,
        f"time at {HISTORIES[-1]} tokens over time at {HISTORIES[0]}": {
            name: round(last[f"{name}, ms"] / first[f"{name}, ms"], 3) for name in ARMS
        },
        "full cache over each at the longest": {
            name: round(last["full cache, ms"] / last[f"{name}, ms"], 2) for name in ARMS
        },
        "what thinning costs": shares,
    }


def kvpress() -> dict[str, Any]:
    """Our arms and the peer's, and how many times ours the peer's figures are."""
    peers = beside_kvpress()
    ours, theirs = peers[0], peers[-1]
    return {
        f"{PEER_CONTEXT} tokens read, {PEER_NEW} written, budget {BUDGET}": peers,
        "kvpress over LaCache": {
            key: round(theirs[key] / ours[key], 2) for key in ours if isinstance(ours[key], float) and ours[key]
        },
    }


PARTS = {"history": history, "kvpress": kvpress}


def main() -> None:
    torch.set_num_threads(1)
    wanted = sys.argv[1:] or list(PARTS)
    if unknown := set(wanted) - set(PARTS):
        raise SystemExit(f"no part {sorted(unknown)}: choose among {list(PARTS)}")
    for part in wanted:
        renew("lacache", PARTS[part]())


if __name__ == "__main__":
    main()
