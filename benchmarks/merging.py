"""Merging three 135M models: MB per CPU second and memory, beside mergekit and a plain loop in torch.

    OMP_NUM_THREADS=1 python benchmarks/merging.py [--rounds 3]

The embedded language model and three perturbed copies of it, in bfloat16 and float32. Each merge runs in a process of
its own with one thread, in turns; imports are not counted. Writes benchmarks/results/merging.json.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from measuring import medians, peer_python, run_apart, store
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer

from gratis.subjects.embedded import embedded_folder

METHODS = ("task_arithmetic", "ties", "dare_ties")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
ARMS = ("gratis", "plain", "mergekit")
SPEED = "MB of experts per CPU s"


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    script = Path(__file__).parent / "measuring" / "merge_once.py"
    peer = peer_python("mergekit", "mergekit==0.1.5", "transformers==5.23.0")
    python = {"gratis": sys.executable, "plain": sys.executable, "mergekit": peer, "copy": sys.executable}
    rows, ratios, scopes, copies = [], [], [], []
    with tempfile.TemporaryDirectory() as name:
        for label, dtype in DTYPES.items():
            folder = Path(name) / label
            inputs = models(folder, dtype)
            out = folder / "out"

            def measured(arm: str, method: str, inputs: list[Path] = inputs, out: Path = out) -> dict[str, Any]:
                found = run_apart(python[arm], script, arm, method, *inputs, out)
                shutil.rmtree(out)
                return found

            for method in METHODS:
                seen: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
                for _ in track(range(rounds), description=f"{label} {method}"):
                    for arm in ARMS:
                        seen[arm].append(measured(arm, method))
                middle = {arm: medians(found) for arm, found in seen.items()}
                rows += [{"dtype": label, "method": method, "arm": arm, **middle[arm]} for arm in ARMS]
                speed = {arm: middle[arm][SPEED] for arm in ARMS}
                ratios.append(
                    {
                        "dtype": label,
                        "method": method,
                        "gratis / mergekit": round(speed["gratis"] / speed["mergekit"], 2),
                        "gratis / plain torch": round(speed["gratis"] / speed["plain"], 2),
                    }
                )
            pairs = [("gratis", "ties"), ("gratis", "ties_per_tensor"), ("copy", "ties")]
            own: dict[tuple[str, str], list[dict[str, Any]]] = {pair: [] for pair in pairs}
            for _ in track(range(rounds), description=f"{label} scopes and a plain copy"):
                for pair in pairs:
                    own[pair].append(measured(*pair))
            speed = {pair: medians(found)[SPEED] for pair, found in own.items()}
            time = {pair: medians(found)["CPU s"] for pair, found in own.items()}
            scopes.append({"dtype": label, "global / per tensor": round(time[pairs[0]] / time[pairs[1]], 2)})
            copies.append({"dtype": label, "TIES / plain copy": round(speed[pairs[0]] / speed[pairs[2]], 3)})
    store(
        "merging",
        {
            "repeat": "OMP_NUM_THREADS=1 python benchmarks/merging.py",
            "three models merged": rows,
            "MB per CPU second, ratios": ratios,
            "CPU seconds of TIES with a global threshold and with one per tensor": scopes,
            "MB per CPU second, TIES to a plain copy of the same bytes": copies,
        },
    )


if __name__ == "__main__":
    main()
