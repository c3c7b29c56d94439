"""Merging three 135M models: MB per CPU second and memory, beside mergekit and a plain loop in torch.

    OMP_NUM_THREADS=1 python benchmarks/merging.py [--rounds 3] [--dtypes bfloat16] [--methods ties] [--no-scopes]
    OMP_NUM_THREADS=1 python benchmarks/merging.py --large [--rounds 1] [--arms gratis mergekit]

The embedded language model and three perturbed copies of it, in bfloat16 and float32. Each merge runs in a process of
its own with one thread, in turns; imports are not counted. `--large`: TIES over checkpoints of three billion random
weights in bfloat16, made on the fly (24 GB of disk, and 6 more for what is merged). Writes
benchmarks/results/merging.json, of which parts can be renewed alone.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import medians, peer_python, run_apart, store, stored
from rich.progress import track
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from gratis.subjects.embedded import embedded_folder

METHODS = ("task_arithmetic", "ties", "dare_ties")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
ARMS = ("gratis", "torch", "plain", "mergekit")
"""`torch` is gratis without its compiled loops."""
SPEED = "MB of experts per CPU s"
RATIOS = "MB per CPU second, ratios"
SCOPES = "CPU seconds of TIES with a global threshold and with one per tensor"
COPIES = "MB per CPU second, TIES to a plain copy of the same bytes"
LARGE = "TIES over three checkpoints of three billion weights, bfloat16"
SPEEDS = "TIES on one thread beside memory and disk, wall time"


def models(folder: Path, dtype: torch.dtype) -> list[Path]:
    """A base and three experts whose weights differ from it by 2 % of their spread."""
    source = embedded_folder("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(source)
    made = []
    for number in range(4):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        generator = torch.Generator().manual_seed(number)
        if number:
            with torch.no_grad():
                for weight in model.parameters():
                    weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.02 * float(weight.std()))
        path = folder / f"model{number}"
        model.to(dtype).save_pretrained(path)
        tokenizer.save_pretrained(path)
        made.append(path)
    return made


def large_models(folder: Path) -> list[Path]:
    """A base and three experts of three billion weights, the shape of Llama 3.2 3B with a smaller vocabulary."""
    source = embedded_folder("smollm2")
    tokenizer, made = AutoTokenizer.from_pretrained(source), []
    config = LlamaConfig(
        vocab_size=49152, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, dtype="bfloat16", bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        shapes = {name: tuple(weight.shape) for name, weight in LlamaForCausalLM(config).named_parameters()}
    # Weights are stretches of one long row of random numbers: drawing billions takes longer than merging them.
    drawn = torch.randn(1 << 28, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    for number in range(4):
        tensors, at = {}, 0
        for name, shape in shapes.items():
            size = torch.Size(shape).numel()
            at = (at + 7919) % (len(drawn) - size - 500_000)
            weight = drawn[at : at + size]
            if number:
                weight = weight + 0.02 * drawn[at + 104_729 * number : at + 104_729 * number + size]
            tensors[name] = weight.to(torch.bfloat16).view(shape)
        path = folder / f"model{number}"
        path.mkdir()
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(path)
        tokenizer.save_pretrained(path)
        made.append(path)
    return made


def large(python: dict[str, str], script: Path, rounds: int, arms: list[str]) -> None:
    """TIES over three billion weights, stored arm by arm: a run takes the better part of an hour."""
    with tempfile.TemporaryDirectory() as name:
        inputs, out = large_models(Path(name)), Path(name) / "out"
        seen: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
        for _ in range(rounds):
            for arm in track(seen, description="three billion weights"):
                seen[arm].append(run_apart(python[arm], script, arm, "ties", *inputs, out))
                shutil.rmtree(out)
                store("merging", {**stored("merging"), LARGE: large_rows(seen)})


def large_rows(seen: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What was measured so far, beside the stored rows of other arms."""
    fresh = {arm: {"arm": arm, "rounds": len(found), **medians(found)} for arm, found in seen.items() if found}
    rows = {**{row["arm"]: row for row in stored("merging").get(LARGE, [])}, **fresh}
    if "gratis" in rows:
        rows = {
            arm: {**row, "gratis over it": round(rows["gratis"][SPEED] / row[SPEED], 3)} for arm, row in rows.items()
        }
    return list(rows.values())


def bandwidth(folder: Path) -> dict[str, float]:
    """MB per second of wall time that one thread copies in memory, and that the disk takes in and gives back."""
    source, target = torch.ones(64_000_000), torch.empty(64_000_000)
    target.copy_(source)
    copied = min(_seconds(lambda: target.copy_(source)) for _ in range(5))
    data, path = memoryview(source.numpy()).cast("B"), folder / "probe"

    def written() -> None:
        with open(path, "wb", buffering=0) as file:
            file.write(data)
            os.fsync(file.fileno())

    def read() -> None:
        with open(path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while file.read(1 << 22):
                pass

    size = len(data) / 1e6
    found = {
        "memory, copied": size / copied, "disk, written": size / _seconds(written), "disk, read": size / _seconds(read)
    }  # fmt: skip
    path.unlink()
    return {what: round(speed) for what, speed in found.items()}


def _seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def turned(arms: Sequence[str], number: int) -> list[str]:
    """The arms in a round's order: who begins pays for what the one before left to be written."""
    begin = number % len(arms)
    return [*arms[begin:], *arms[:begin]]


def beside_limits(
    label: str, measured: Callable[[str, str], dict[str, Any]], rounds: int, folder: Path
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Rows of TIES' two scopes, of TIES beside a plain copy, and of TIES beside what memory and disk can do."""
    pairs = [("gratis", "ties"), ("gratis", "ties_per_tensor"), ("copy", "ties")]
    seen: dict[tuple[str, str], list[dict[str, Any]]] = {pair: [] for pair in pairs}
    for _ in track(range(rounds), description=f"{label} scopes and a plain copy"):
        for pair in pairs:
            seen[pair].append(measured(*pair))
    whole, per_tensor, copy = (medians(seen[pair]) for pair in pairs)
    found = bandwidth(folder)
    # Base and three experts are read, one model is written.
    moved = 5 / 3 * whole["MB of experts per wall s"]
    return (
        {"dtype": label, "global / per tensor": round(whole["CPU s"] / per_tensor["CPU s"], 2)},
        {"dtype": label, "TIES / plain copy": round(whole[SPEED] / copy[SPEED], 3)},
        {
            "dtype": label,
            "TIES, MB read and written per s": round(moved),
            **{f"{what}, MB/s": speed for what, speed in found.items()},
            "of the memory's": round(moved / found["memory, copied"], 3),
            "of the disk's": round(moved / found["disk, written"], 3),
        },
    )


def joined(title: str, rows: list[dict[str, Any]], by: tuple[str, ...]) -> list[dict[str, Any]]:
    """Stored rows with these in the place of those that say the same thing."""
    old = {tuple(row.get(key) for key in by): row for row in stored("merging").get(title, [])}
    return list({**old, **{tuple(row[key] for key in by): row for row in rows}}.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--no-scopes", action="store_true", help="leave out TIES' two scopes and the plain copy")
    parser.add_argument("--large", action="store_true", help="only three billion weights, with TIES")
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=("copy", *ARMS),
        default=["copy", *ARMS],
        help="of --large; `torch` is gratis without its compiled loops",
    )
    wish = parser.parse_args()
    rounds = wish.rounds
    script = Path(__file__).parent / "measuring" / "merge_once.py"
    peer = peer_python("mergekit", "mergekit==0.1.5", "transformers==5.23.0")
    python = {**dict.fromkeys(("copy", *ARMS), sys.executable), "mergekit": peer}
    if wish.large:
        large(python, script, rounds, wish.arms)
        return
    rows, ratios, scopes, copies, speeds = [], [], [], [], []
    with tempfile.TemporaryDirectory() as name:
        for label in wish.dtypes:
            folder = Path(name) / label
            inputs = models(folder, DTYPES[label])
            out = folder / "out"

            def measured(arm: str, method: str, inputs: list[Path] = inputs, out: Path = out) -> dict[str, Any]:
                found = run_apart(python[arm], script, arm, method, *inputs, out)
                shutil.rmtree(out)
                return found

            for method in wish.methods:
                seen: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
                for number in track(range(rounds), description=f"{label} {method}"):
                    for arm in turned(ARMS, number):
                        seen[arm].append(measured(arm, method))
                middle = {arm: medians(found) for arm, found in seen.items()}
                rows += [
                    {"dtype": label, "method": method, "arm": arm, "rounds": rounds, **middle[arm]} for arm in ARMS
                ]
                speed = {arm: middle[arm][SPEED] for arm in ARMS}
                ratios.append(
                    {
                        "dtype": label,
                        "method": method,
                        "gratis / mergekit": round(speed["gratis"] / speed["mergekit"], 2),
                        "gratis / plain torch": round(speed["gratis"] / speed["plain"], 2),
                        "gratis / gratis without compiled loops": round(speed["gratis"] / speed["torch"], 2),
                    }
                )
            if not wish.no_scopes:
                scope, copied, moved = beside_limits(label, measured, rounds, folder)
                scopes.append(scope)
                copies.append(copied)
                speeds.append(moved)
    same = {"three models merged": ("dtype", "method", "arm"), RATIOS: ("dtype", "method")}
    same |= {SCOPES: ("dtype",), COPIES: ("dtype",), SPEEDS: ("dtype",)}
    fresh = {"three models merged": rows, RATIOS: ratios, SCOPES: scopes, COPIES: copies, SPEEDS: speeds}
    content = {title: joined(title, fresh[title], by) for title, by in same.items()}
    kept = {LARGE: stored("merging")[LARGE]} if LARGE in stored("merging") else {}
    store("merging", {"repeat": "OMP_NUM_THREADS=1 python benchmarks/merging.py", **content, **kept})


if __name__ == "__main__":
    main()
