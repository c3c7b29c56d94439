"""Tokens per second and peak memory of a billion weights on a CUDA device, at 8k, 32k and 128k tokens of history.

    python benchmarks/long_context_gpu.py [--seconds 90] [--lengths 8192 …] [--arms InfLLM …] [--tiny --device cpu]

A Llama of the shape of Llama 3.2 1B in bfloat16 with random weights: time and memory only, what it writes means nothing.
The full cache reads its prompt at once, with FlashAttention by way of torch's scaled_dot_product_attention; the bounded
ones read it 2,048 tokens at a time. Then single tokens are written, with a synchronisation after each; the figure is
their median. cuDNN's attention, which plans anew for every length, is off but where torch chooses by itself. Peak
memory is that of torch's allocator above the weights. What does not run is stored with the reason. Writes
benchmarks/results/long_context_gpu.json row by row.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from measuring import renew, renew_rows
from measuring.reading import twin
from rich.progress import track
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

import gratis

LENGTHS, CHUNK, STEPS = (8192, 32768, 131072), 2048, 24
BUDGET = 4096
INFLLM: dict[str, Any] = {"window": BUDGET // 2, "sinks": 128, "block": 128, "blocks": 15, "chunk": None}
SHAPE: dict[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "max_position_embeddings": 131072 + 1024,
    "tie_word_embeddings": True, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
TINY = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
TINY |= {"num_hidden_layers": 2, "vocab_size": 256}
KERNELS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
TITLE = f"writing after a history, {BUDGET} tokens attended to"


@dataclass(frozen=True)
class Arm:
    """Methods for a length, the attention of the model, its kernels (None: torch's choice), and pieces of the prompt."""

    methods: Callable[[int], tuple[Any, ...]]
    attention: str = "sdpa"
    kernels: tuple[SDPBackend, ...] | None = KERNELS
    chunk: int | None = None


ARMS = {
    "full cache, FlashAttention": Arm(lambda length: (), kernels=(SDPBackend.FLASH_ATTENTION,)),
    "sliding window": Arm(lambda length: (gratis.SlidingWindow(budget=BUDGET),), chunk=CHUNK),
    "LaCache": Arm(lambda length: (gratis.LaCache(budget=BUDGET),), chunk=CHUNK),
    "InfLLM, blocks in main memory": Arm(lambda length: (gratis.InfLLM(**INFLLM),), chunk=CHUNK),
    "InfLLM, representatives there too": Arm(
        lambda length: (gratis.InfLLM(**INFLLM, representatives_in="memory"),), chunk=CHUNK
    ),
    "block top-k, a quarter": Arm(
        lambda length: (gratis.BlockTopK(blocks=max(1, (length // 4 - 64 - 4) // 16), window=64),)
    ),
    "full cache, torch's choice, in pieces": Arm(lambda length: (), kernels=None, chunk=CHUNK),
    "full cache, flex attention": Arm(lambda length: (), attention="flex_attention", chunk=CHUNK),
}


class Clock:
    """Wall time and the allocator's peak of a device that works asynchronously."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.start()

    def start(self) -> None:
        """Begin to measure."""
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._begin = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since the start, once the device is done."""
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - self._begin

    def memory(self) -> float:
        """Bytes in use, 0 where there is no allocator to ask."""
        return float(torch.cuda.memory_allocated()) if self.cuda else 0.0

    def peak(self) -> float:
        """Largest number of bytes in use since the start."""
        return float(torch.cuda.max_memory_allocated()) if self.cuda else 0.0


@torch.no_grad()
def measure(model: Any, ids: Tensor, arm: Arm, steps: int) -> dict[str, Any]:
    """The figures of one arm for a history of all but the last `steps` + 1 of ids (1, length)."""
    length = ids.shape[1] - steps - 1
    clock = Clock(ids.device)
    base, cache = clock.memory(), None
    with sdpa_kernel(list(arm.kernels)) if arm.kernels is not None and clock.cuda else nullcontext():
        for piece in ids[:, :length].split(arm.chunk or length, 1):
            out = model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
        reading, read_peak = clock.seconds, clock.peak()
        took, write_peak = [], 0.0
        for step in range(steps + 1):
            clock.start()
            model(ids[:, length + step : length + step + 1], past_key_values=cache, use_cache=True)
            took.append(clock.seconds)
            write_peak = max(write_peak, clock.peak())
    found = {
        "tokens read per second": round(length / reading),
        "tokens written per second": round(1 / statistics.median(took[1:]), 1),
    }
    if clock.cuda:
        found |= {
            "peak memory reading, MB": round((read_peak - base) / 1e6),
            "peak memory writing, MB": round((write_peak - base) / 1e6),
            "held, MB": round((clock.memory() - base) / 1e6),
        }
    return found


def prepared(model: Any, arm: Arm, length: int) -> Any:
    """A model for one arm that shares the weights of `model`."""
    own = twin(model)
    own.set_attn_implementation(arm.attention)
    if methods := arm.methods(length):
        gratis.attach(own, *methods)
    return own


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seconds", type=float, default=3600, help="leave out what has not begun by then")
    parser.add_argument("--tiny", action="store_true", help="a model of two narrow layers, to try the script")
    given = parser.parse_args()
    begin = time.perf_counter()
    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("This benchmark needs a CUDA device; none is here. --tiny --device cpu tries the script.")
    torch.manual_seed(0)
    with torch.device(given.device):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, **(TINY if given.tiny else {})})).eval()
        torch.set_default_dtype(torch.float32)
    weights = sum(parameter.numel() for parameter in model.parameters())
    renew("long_context_gpu", {"weights, billions": round(weights / 1e9, 3), "dtype": "bfloat16"}, given.device)
    cases = [(name, length) for length in given.lengths for name in given.arms if "flex" not in name]
    cases += [(name, length) for length in given.lengths for name in given.arms if "flex" in name]
    for name, length in track(cases, description="arms and lengths"):
        ids = torch.randint(0, model.config.vocab_size, (1, length + STEPS + 1), device=given.device)
        row: dict[str, Any] = {"history": length, "arm": name}
        try:
            if time.perf_counter() - begin > given.seconds:
                raise TimeoutError(f"left out, as {given.seconds:g} s were over")
            # Kernels are chosen and loaded at the first use; what a method remembers of that text goes with its model.
            measure(prepared(model, ARMS[name], length), ids[:, : 2 * CHUNK + 2], ARMS[name], 1)
            gc.collect()
            own = prepared(model, ARMS[name], length)
            row |= measure(own, ids, ARMS[name], STEPS)
        except (RuntimeError, ImportError, TimeoutError, ValueError, gratis.GratisError) as error:
            row["did not run"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        own = None
        gc.collect()
        if given.device == "cuda":
            torch.cuda.empty_cache()
        renew_rows(
            "long_context_gpu", TITLE, [row], lambda row: (row["history"], list(ARMS).index(row["arm"])), given.device
        )


if __name__ == "__main__":
    main()
