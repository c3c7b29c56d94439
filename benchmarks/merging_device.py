"""Merging on a CUDA device beside the processor: the same bytes, and MB per second of wall time.

    python benchmarks/merging_device.py [--device cuda] [--threads 4] [--layers 30] [--folder FOLDER]

Three checkpoints of random numbers with the shapes of a 135M model, near a fourth. Each merge runs twice and the quicker
one counts; reading, computing, writing and checksums are all in it. Writes benchmarks/results/merging_device.json.
"""

from __future__ import annotations

import argparse
import filecmp
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measuring import store
from safetensors.torch import save_file

import gratis
from gratis.subjects.merging import merge

METHODS = {
    "task-arithmetic": gratis.TaskArithmetic(),
    "ties": gratis.TIES(density=0.5),
    "ties, per tensor": gratis.TIES(density=0.5, scope="tensor"),
    "dare-ties": gratis.DARETIES(density=0.5),
}
HIDDEN, INNER, KEYS, WORDS = 576, 1536, 192, 49152


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Of the tensors, by name."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (WORDS, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(layers):
        parts = {
            "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KEYS, HIDDEN),
            "self_attn.v_proj": (KEYS, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER),
            "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
        }  # fmt: skip
        found |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in parts.items()}
    return found


def checkpoints(folder: Path, layers: int, dtype: torch.dtype, device: str) -> list[Path]:
    """A base and three models whose weights differ from it by 2 % of their spread."""
    made = []
    for number in range(4):
        generator = torch.Generator(device).manual_seed(0)
        other = torch.Generator(device).manual_seed(number)
        tensors = {}
        for name, shape in shapes(layers).items():
            values = torch.randn(shape, generator=generator, device=device).mul_(0.04)
            if number:
                values.add_(torch.randn(shape, generator=other, device=device), alpha=0.02 * 0.04)
            tensors[name] = values.to(dtype).cpu()
        path = folder / f"model{number}"
        path.mkdir()
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        made.append(path)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--folder", type=Path, default=None, help="where the checkpoints are made")
    wish = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=wish.folder) as name:
        for dtype in (torch.bfloat16, torch.float32):
            folder = Path(name) / str(dtype)
            folder.mkdir()
            base, *experts = checkpoints(folder, wish.layers, dtype, wish.device)
            size = sum(file.stat().st_size for e in experts for file in e.glob("*.safetensors")) / 1e6
            for label, method in METHODS.items():
                outs, seconds = [folder / "out0", folder / "out1"], [float("inf")] * 2
                for number, device in enumerate(("cpu", wish.device)):
                    for _ in range(2):
                        shutil.rmtree(outs[number], ignore_errors=True)
                        begin = time.perf_counter()
                        merge(method, base=base, experts=experts, out=outs[number], threads=wish.threads, device=device)
                        seconds[number] = min(seconds[number], time.perf_counter() - begin)
                one, other = (out / "model.safetensors" for out in outs)
                cpu, there = seconds
                same = filecmp.cmp(one, other, shallow=False)
                rows.append(
                    {
                        "dtype": str(dtype).removeprefix("torch."),
                        "method": label,
                        "same bytes": same,
                        "MB of experts per s, processor": round(size / cpu, 1),
                        "MB of experts per s, device": round(size / there, 1),
                        "device / processor": round(cpu / there, 2),
                    }
                )
                print(rows[-1], flush=True)
            shutil.rmtree(folder)
    content: dict[str, Any] = {
        "repeat": "python benchmarks/merging_device.py",
        "device": torch.cuda.get_device_name() if wish.device.startswith("cuda") else wish.device,
        "threads": wish.threads,
        "three models merged": rows,
    }
    store("merging_device", content)


if __name__ == "__main__":
    main()
