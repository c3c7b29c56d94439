"""Time, memory and loss against the length of a text: full cache, sliding window, LaCache, InfLLM, block top-k.

    OMP_NUM_THREADS=1 python benchmarks/long_context.py [decoding] [bfloat16] [streaming] [loss] [--device cuda]

On the embedded language model. "decoding": at several lengths all arms read the same next tokens one by one, in turns,
on models that share their weights; at the longest also with two threads, in wall time. "bfloat16": the longest alone,
in half precision. "streaming", or "streaming:LaCache" for one arm: each arm reads 32,768 tokens in a process of its own
whose memory is watched (the full cache stops at 12,288, past the window; InfLLM keeps all that grows off the device).
"loss", or "loss:LaCache": what each arm makes of those tokens, on three stretches of documentation and three of source
code; block top-k, which reads densely, is compared token by token at the end of each stretch. Only "loss" takes a
device. Writes benchmarks/results/long_context.json; a named part renews only its own figures.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from measuring import renew, renew_rows, run_apart
from measuring.reading import Reader, source_code
from rich.progress import track

import gratis
from gratis.subjects.text import documentation, tokens_of
from gratis.trials.memory import PeakMemory, resident_bytes

BUDGET, CHUNK = 1024, 256
INFLLM = {"window": 512, "sinks": 32, "block": 32, "blocks": 15, "lookup": 128}
ARMS: dict[str, tuple[Any, ...]] = {
    "full cache": (),
    "sliding window": (gratis.SlidingWindow(budget=BUDGET),),
    "LaCache": (gratis.LaCache(budget=BUDGET),),
    "InfLLM": (gratis.InfLLM(**INFLLM),),
}
TOP_K = "block top-k, a quarter"
HISTORIES, STEPS, THREADED = (1000, 2000, 4000, 8000), 20, 20
STREAMED, FULL, SEGMENT = 32768, 12288, 2048
PLACES, LOSS_SEGMENT, ONE_BY_ONE = 3, 1024, 64


def quarter(length: int) -> gratis.BlockTopK:
    """Block top-k that attends to a fourth of `length` tokens."""
    return gratis.BlockTopK(blocks=max(1, (length // 4 - 64 - 4) // 16), window=64)


def decoding(device: str) -> None:
    """Time per token and loss by length, stored length by length; at the longest, wall time with two threads besides."""
    times, losses = [], []
    for arms, ids, history in histories():
        seen, loss = steps(arms, ids, STEPS)
        times.append(
            {"history": history, **{f"{n}, ms": round(1e3 * statistics.median(s), 1) for n, s in seen.items()}}
        )
        losses.append({"history": history, **{f"{n}, nats": round(statistics.fmean(s), 3) for n, s in loss.items()}})
        renew("long_context", tables(times, losses))
    torch.set_num_threads(2)
    both, _ = steps(arms, ids, THREADED, clock=time.perf_counter)
    torch.set_num_threads(1)
    wall = {name: statistics.median(values) for name, values in both.items()}
    renew("long_context", {
        f"wall time per decoded token at {history}, two threads": {n: round(1e3 * s, 1) for n, s in wall.items()},
        f"full cache over each at {history}, two threads": {n: round(wall["full cache"] / s, 2) for n, s in wall.items()},
    })  # fmt: skip


def half_precision(device: str) -> None:
    """Wall time per token at the longest length in bfloat16, with one thread and with two."""
    model, history, rows = gratis.open("smollm2", dtype="bfloat16"), HISTORIES[-1], []
    ids = tokens_of(gratis.subjects.tokenizer_of(model), documentation(), history + 2 * STEPS + 4)
    readers = {name: Reader(model, ARMS[name]) for name in ("full cache", "sliding window", "LaCache")}
    torch.set_num_threads(2)
    for reader in readers.values():
        reader.read(ids[:, :history], CHUNK)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        seen, _ = steps(readers, ids, STEPS, clock=time.perf_counter)
        wall = {name: statistics.median(values) for name, values in seen.items()}
        rows.append({
            "threads": threads, **{f"{name}, ms": round(1e3 * took, 1) for name, took in wall.items()},
            **{f"full cache over {name}": round(wall["full cache"] / wall[name], 2) for name in list(wall)[1:]},
        })  # fmt: skip
    torch.set_num_threads(1)
    renew("long_context", {f"wall time per decoded token at {history}, bfloat16": rows})


def histories() -> Iterator[tuple[dict[str, Reader], torch.Tensor, int]]:
    """Readers that have read as many tokens as each history has, the text, and that number."""
    model = gratis.open("smollm2")
    ids = tokens_of(gratis.subjects.tokenizer_of(model), documentation(), HISTORIES[-1] + STEPS + THREADED + 3)
    readers = {name: Reader(model, methods) for name, methods in ARMS.items()}
    for history in track(HISTORIES, description="lengths"):
        for reader in readers.values():
            reader.read(ids[:, reader.at : history], CHUNK)
        sparse = Reader(model, (quarter(history),))
        sparse.cache, sparse.at = copy.deepcopy(readers["full cache"].cache), history
        yield {**readers, TOP_K: sparse}, ids, history


def tables(times: list[dict[str, Any]], losses: list[dict[str, Any]]) -> dict[str, Any]:
    """What is stored of the lengths measured so far."""
    last = times[-1]
    names = [key.removesuffix(", ms") for key in last if key != "history"]
    return {
        f"time per decoded token, budget {BUDGET}, one thread": times,
        f"loss of the next {STEPS} tokens": losses,
        "full cache over each at the longest, one thread": {
            name: round(last["full cache, ms"] / last[f"{name}, ms"], 2) for name in names
        },
        "InfLLM over sliding window": {
            str(row["history"]): round(row["InfLLM, ms"] / row["sliding window, ms"], 2) for row in times
        },
        "full cache over block top-k": {
            str(row["history"]): round(row["full cache, ms"] / row[f"{TOP_K}, ms"], 2) for row in times
        },
    }


def steps(
    arms: dict[str, Reader], ids: torch.Tensor, count: int, clock: Any = time.process_time
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds and losses of the next `count` tokens, one by one, the arms taking turns; the first is for warming up."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    losses: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(count + 1):
        for name, reader in arms.items():
            begin = clock()
            logits = reader.read(ids[:, reader.at : reader.at + 1])
            took = clock() - begin
            if number:
                seconds[name].append(took)
                losses[name].append(float(torch.nn.functional.cross_entropy(logits.float(), ids[:, reader.at])))
    return seconds, losses


def streaming(name: str) -> None:
    """The tables of the streamed text with the columns of one arm renewed."""
    rows: list[dict[str, Any]] = run_apart(sys.executable, __file__, "--stream", name)["rows"]
    titles = {
        "memory above the model, MB": "memory of the process above the model, peak of each stretch",
        "keys and values near, MB": "keys and values on the model's device",
        "ms per token": "time to read a token",
    }
    for key, title in titles.items():
        fresh = [{"read": row["read"], name: row[key]} for row in rows]
        renew_rows("long_context", f"{title}, streamed, budget {BUDGET}", fresh, lambda row: row["read"])


def stream(name: str) -> list[dict[str, Any]]:
    """One arm's stretches."""
    model = gratis.open("smollm2")
    length = FULL if name == "full cache" else STREAMED
    ids = tokens_of(gratis.subjects.tokenizer_of(model), documentation(), length)
    Reader(model, ()).read(ids[:, :CHUNK])
    methods = ARMS[name] if name != "InfLLM" else (gratis.InfLLM(**INFLLM, representatives_in="memory"),)
    reader, rows = Reader(model, methods), []
    base = resident_bytes()
    for start in range(0, length, SEGMENT):
        with PeakMemory() as peak:
            reader.read(ids[:, start : start + SEGMENT], CHUNK)
        rows.append(
            {
                "read": start + SEGMENT,
                "memory above the model, MB": round((peak.peak - base) / 1e6, 1),
                "keys and values near, MB": round(near_bytes(reader.cache) / 1e6, 1),
                "ms per token": round(1e3 * reader.seconds / SEGMENT, 2),
            }
        )
    return rows


def near_bytes(cache: Any) -> int:
    """Bytes that the cache holds on the model's device."""
    if hasattr(cache, "memories"):
        return sum(int(memory.report()["near_bytes"]) for memory in cache.memories)
    stores = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for x in cache.layers for t in (x.keys, x.values)
    }
    return sum(stores.values())


def loss(name: str, device: str) -> None:
    """Rows of the loss of each stretch, one arm's columns, a table per kind of text."""
    model, ids = texts(device)
    if name == TOP_K:
        one_by_one(model, ids, device)
        return
    length, losses = FULL if name == "full cache" else STREAMED, []
    methods = ARMS[name] if name != "InfLLM" or device == "cpu" else (gratis.InfLLM(**INFLLM, store="device"),)
    reader = Reader(model, methods)
    for start in track(range(0, length, LOSS_SEGMENT), description=name):
        losses.append(reader.losses(ids[:, start : start + LOSS_SEGMENT + 1], CHUNK).mean(1).cpu())
    for number, kind in enumerate(KINDS):
        own = torch.stack(losses, 1)[number * PLACES : (number + 1) * PLACES].mean(0).tolist()
        rows = [{"read": (at + 1) * LOSS_SEGMENT, name: round(value, 3)} for at, value in enumerate(own)]
        title = f"loss of each stretch in nats, {kind}, mean of {PLACES}, budget {BUDGET}"
        renew_rows("long_context", title, rows, lambda row: row["read"], device)


def one_by_one(model: Any, ids: torch.Tensor, device: str) -> None:
    """Rows of the loss of the last tokens of each stretch, read one by one densely and by blocks."""
    blocks = (BUDGET - 64 - 4) // 16
    arms = {"full cache": (), f"block top-k, {BUDGET} tokens": (gratis.BlockTopK(blocks=blocks, window=64),)}
    means = {}
    for name, methods in arms.items():
        reader, found = Reader(model, methods), []
        for start in track(range(0, FULL, SEGMENT), description=f"{name}, one by one"):
            stop = start + SEGMENT - ONE_BY_ONE
            reader.read(ids[:, start:stop], CHUNK)
            found.append(reader.losses(ids[:, stop : start + SEGMENT + 1], 1).mean(1).cpu())
        means[name] = torch.stack(found, 1)
    for number, kind in enumerate(KINDS):
        own = {name: value[number * PLACES : (number + 1) * PLACES].mean(0).tolist() for name, value in means.items()}
        rows = [
            {"read": (at + 1) * SEGMENT, **{name: round(values[at], 3) for name, values in own.items()}}
            for at in range(FULL // SEGMENT)
        ]
        title = f"loss of the last {ONE_BY_ONE} tokens of each stretch in nats, {kind}, mean of {PLACES}"
        renew_rows("long_context", title, rows, lambda row: row["read"], device)


KINDS = {"documentation": documentation, "source code": source_code}


def texts(device: str) -> tuple[Any, torch.Tensor]:
    """The model, and (texts, length + 1) ids: pieces of each kind, which overlap where it is short."""
    model = gratis.open("smollm2", dtype="float32", device=device)
    tokenizer, rows = gratis.subjects.tokenizer_of(model), []
    for text in KINDS.values():
        known = len(tokenizer(text(), add_special_tokens=False, verbose=False).input_ids)
        step = min(STREAMED, (known - STREAMED - 1) // (PLACES - 1))
        rows += [tokens_of(tokenizer, text(), STREAMED + 1, place * step) for place in range(PLACES)]
    return model, torch.cat(rows).to(device)


PARTS: dict[str, Callable[[str], None]] = {
    "decoding": decoding,
    "bfloat16": half_precision,
    **{f"streaming:{name}": lambda device, name=name: streaming(name) for name in ARMS},  # type: ignore[misc]
    **{f"loss:{name}": lambda device, name=name: loss(name, device) for name in (*ARMS, TOP_K)},  # type: ignore[misc]
}


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--stream"]:
        print(json.dumps({"rows": stream(sys.argv[2])}))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {list(PARTS)}, or streaming, or loss")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    if unknown := set(given.parts) - {*PARTS, "streaming", "loss"}:
        parser.error(f"no part {sorted(unknown)}: choose among {['streaming', 'loss', *PARTS]}")
    asked = given.parts or [*PARTS]
    for name, measure in PARTS.items():
        if name in asked or name.partition(":")[0] in asked:
            measure(given.device)


if __name__ == "__main__":
    main()
