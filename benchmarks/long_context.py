"""Time, memory and loss against the length of a text: full cache, sliding window, LaCache, InfLLM, block top-k.

    OMP_NUM_THREADS=1 python benchmarks/long_context.py [decoding] [streaming] [gpu]

On the embedded language model and documentation prose. "decoding": at several lengths all arms read the same next
tokens one by one, in turns, on models that share their weights. "streaming", or "streaming:LaCache" for one arm: each
arm reads 32,768 tokens in a process of its own whose memory is watched (the full cache stops at 12,288, past the
window). "gpu" needs a CUDA device: a randomly initialised model of a billion weights in bfloat16, for time and memory
only. Writes benchmarks/results/long_context.json; named parts renew only their own figures.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time
from typing import Any

import torch
from measuring import renew, run_apart, stored
from measuring.reading import Reader
from rich.progress import track

import gratis
from gratis.subjects.text import documentation, tokens_of
from gratis.trials.memory import PeakMemory, resident_bytes

REPEAT = "OMP_NUM_THREADS=1 python benchmarks/long_context.py"
BUDGET, CHUNK = 1024, 256
INFLLM = {"window": 512, "sinks": 32, "block": 32, "blocks": 15, "lookup": 128}
ARMS: dict[str, tuple[Any, ...]] = {
    "full cache": (),
    "sliding window": (gratis.SlidingWindow(budget=BUDGET),),
    "LaCache": (gratis.LaCache(budget=BUDGET),),
    "InfLLM": (gratis.InfLLM(**INFLLM),),
}
TOP_K = "block top-k, a quarter"
HISTORIES, STEPS, THREADED = (1000, 2000, 4000, 8000), 32, 24
STREAMED, FULL, SEGMENT = 32768, 12288, 2048
GPU_LENGTHS, GPU_STEPS = (8192, 32768, 131072), 32


def quarter(length: int) -> gratis.BlockTopK:
    """Block top-k that attends to a fourth of `length` tokens."""
    return gratis.BlockTopK(blocks=max(1, (length // 4 - 64 - 4) // 16), window=64)


def decoding() -> dict[str, Any]:
    """Time per token and loss by length, stored length by length; returned, the ratios with two threads at the longest."""
    model = gratis.open("smollm2")
    ids = tokens_of(gratis.subjects.tokenizer_of(model), documentation(), HISTORIES[-1] + STEPS + THREADED + 2)
    readers = {name: Reader(model, methods) for name, methods in ARMS.items()}
    times, losses = [], []
    for history in track(HISTORIES, description="lengths"):
        for reader in readers.values():
            reader.read(ids[:, reader.at : history], CHUNK)
        sparse = Reader(model, (quarter(history),))
        sparse.cache, sparse.at = copy.deepcopy(readers["full cache"].cache), history
        arms = {**readers, TOP_K: sparse}
        seen, loss = steps(arms, ids, STEPS)
        times.append(
            {"history": history, **{f"{n}, ms": round(1e3 * statistics.median(s), 1) for n, s in seen.items()}}
        )
        losses.append({"history": history, **{f"{n}, nats": round(statistics.fmean(s), 3) for n, s in loss.items()}})
        renew("long_context", {"repeat": REPEAT, **tables(times, losses)})
    torch.set_num_threads(2)
    both, _ = steps(arms, ids, THREADED, clock=time.perf_counter)
    torch.set_num_threads(1)
    wall = {name: statistics.median(values) for name, values in both.items()}
    return {
        f"full cache over each at {HISTORIES[-1]}, two threads, wall time": {
            name: round(wall["full cache"] / value, 2) for name, value in wall.items()
        }
    }


def tables(times: list[dict[str, Any]], losses: list[dict[str, Any]]) -> dict[str, Any]:
    """What is stored of the lengths measured so far."""
    last = times[-1]
    names = [key.removesuffix(", ms") for key in last if key != "history"]
    return {
        f"time per decoded token, budget {BUDGET}, one thread": times,
        f"loss of the next {STEPS} tokens": losses,
        f"full cache over each at {last['history']}, one thread": {
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
                losses[name].append(float(torch.nn.functional.cross_entropy(logits.float(), ids[0, reader.at][None])))
    return seconds, losses


def streaming() -> dict[str, Any]:
    """Rows of loss, memory and time by stretch of the text, each arm in its own process, stored as soon as it is done."""
    for name in track(list(ARMS), description="streams"):
        renew("long_context", streamed(name))
    return {}


def streamed(name: str) -> dict[str, Any]:
    """The tables of the streamed text with the columns of one arm renewed."""
    rows: list[dict[str, Any]] = run_apart(sys.executable, __file__, "--stream", name)["rows"]
    old, made = stored("long_context"), {}
    titles = {
        "loss, nats": "loss of each stretch",
        "memory above the model, MB": "memory of the process above the model, peak of each stretch",
        "keys and values near, MB": "keys and values on the model's device",
        "ms per token": "time to read a token",
    }
    for key, title in titles.items():
        title = f"{title}, streamed, budget {BUDGET}"
        table = {row["read"]: row for row in old.get(title, [])}
        for row in rows:
            table.setdefault(row["read"], {"read": row["read"]})[name] = row[key]
        ordered = {read: {arm: table[read][arm] for arm in ARMS if arm in table[read]} for read in sorted(table)}
        made[title] = [{"read": read, **values} for read, values in ordered.items()]
    return made


def stream(name: str) -> list[dict[str, Any]]:
    """One arm's stretches."""
    model = gratis.open("smollm2")
    length = FULL if name == "full cache" else STREAMED
    ids = tokens_of(gratis.subjects.tokenizer_of(model), documentation(), length + 1)
    Reader(model, ()).read(ids[:, :64])
    reader, rows = Reader(model, ARMS[name]), []
    base = resident_bytes()
    for start in range(0, length, SEGMENT):
        losses, seconds = [], 0.0
        with PeakMemory() as peak:
            for at in range(start, start + SEGMENT, CHUNK):
                logits = reader.read(ids[:, at : at + CHUNK], logits=True)
                seconds += reader.seconds
                losses.append(torch.nn.functional.cross_entropy(logits, ids[0, at + 1 : at + CHUNK + 1]).item())
        rows.append(
            {
                "read": start + SEGMENT,
                "loss, nats": round(statistics.fmean(losses), 3),
                "memory above the model, MB": round((peak.peak - base) / 1e6, 1),
                "keys and values near, MB": round(near_bytes(reader.cache) / 1e6, 1),
                "ms per token": round(1e3 * seconds / SEGMENT, 2),
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


def gpu() -> dict[str, Any]:
    """Tokens per second and peak memory on a CUDA device, with weights that mean nothing."""
    if not torch.cuda.is_available():
        raise SystemExit("the part 'gpu' needs a CUDA device; none is here")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=32000, max_position_embeddings=131072 + 2 * GPU_STEPS, rope_theta=500000.0,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_device("cuda")
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    rows = []
    for length in GPU_LENGTHS:
        ids = torch.randint(0, 32000, (1, length + GPU_STEPS + 1))
        arms = {
            **ARMS,
            "InfLLM": (gratis.InfLLM(window=4096, blocks=16, hot_blocks=32),),
            TOP_K: (quarter(length),),
        }
        for name, methods in arms.items():
            reader = Reader(model, methods)
            torch.cuda.reset_peak_memory_stats()
            base = torch.cuda.memory_allocated()
            for at in range(0, length, 2048):
                reader.read(ids[:, at : min(at + 2048, length)])
            took = []
            for step in range(GPU_STEPS + 1):
                torch.cuda.synchronize()
                begin = time.perf_counter()
                reader.read(ids[:, length + step : length + step + 1])
                torch.cuda.synchronize()
                took.append(time.perf_counter() - begin)
            rows.append(
                {
                    "length": length,
                    "arm": name,
                    "tokens per second": round(1 / statistics.median(took[1:]), 1),
                    "peak memory above the model, MB": round((torch.cuda.max_memory_allocated() - base) / 1e6),
                }
            )
            del reader
    return {"on a GPU": {"device": torch.cuda.get_device_name(0), "dtype": "bfloat16"}, "on a GPU, by length": rows}


PARTS = {"decoding": decoding, "streaming": streaming, "gpu": gpu}


def main() -> None:
    if sys.argv[1:2] == ["--stream"]:
        torch.set_num_threads(1)
        print(json.dumps({"rows": stream(sys.argv[2])}))
        return
    torch.set_num_threads(1)
    cuda = ["gpu"] if torch.cuda.is_available() else []
    wanted = sys.argv[1:] or ["decoding", "streaming", *cuda]
    arms = {f"streaming:{name}": name for name in ARMS}
    if unknown := set(wanted) - set(PARTS) - set(arms):
        raise SystemExit(f"no part {sorted(unknown)}: choose among {[*PARTS, *arms]}")
    for part in wanted:
        found = streamed(arms[part]) if part in arms else PARTS[part]()
        renew("long_context", {"repeat": REPEAT, **found})


if __name__ == "__main__":
    main()
