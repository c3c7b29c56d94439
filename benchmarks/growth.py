"""What growing a model layer by layer costs and gives, against training all layers at once for as many steps.

    python benchmarks/growth.py [--device cuda] [--together 16] [--seeds 0 1]

Each row is a training of the zoo's character model: so many steps for each layer, then so many of low-rank updates of all
layers at once; 3,100 steps in all. An optimiser holds states for what is trained at once. A training takes 7 to 17
minutes of one CPU thread, or under a minute on a GPU. Writes benchmarks/results/growth.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from measuring import renew
from rich.progress import track

from gratis.tasks.two_texts import KINDS

PLANS = {
    "all layers at once": ["--how", "whole"],
    "775 steps a layer": ["--steps", "775", "--rank", "0"],
    "700 steps a layer, 300 of rank 8": ["--steps", "700", "--rank", "8", "--last-steps", "300"],
    "400 steps a layer, 1,500 of rank 16": ["--steps", "400", "--rank", "16", "--last-steps", "1500"],
    "200 steps a layer, 2,300 of rank 8": ["--steps", "200", "--rank", "8", "--last-steps", "2300"],
    "200 steps a layer, 2,300 of rank 16": ["--steps", "200", "--rank", "16", "--last-steps", "2300"],
    "200 steps a layer, 2,300 of rank 32": ["--steps", "200", "--rank", "32", "--last-steps", "2300"],
}


def trained(plan: str, kind: str, seed: int, device: str, out: Path) -> dict[str, Any]:
    """The figures that the training script writes on the model's card."""
    name = f"{kind}-{seed}-{list(PLANS).index(plan)}"
    command = [sys.executable, "-m", "gratis.zoo.train.growing", "--data", kind, "--seed", str(seed)]
    command += ["--device", device, "--out", str(out), "--name", name, *PLANS[plan]]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads((out / name / "figures.json").read_text(encoding="utf-8"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--together", type=int, default=1, help="trainings that run side by side")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    wish = parser.parse_args()
    runs = [(plan, kind, seed) for plan in PLANS for kind in KINDS for seed in wish.seeds]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(wish.together) as pool:
        waiting = [pool.submit(trained, *run, wish.device, Path(name)) for run in runs]
        figures = {run: made.result() for run, made in zip(track(runs, "training"), waiting, strict=True)}
    rows = []
    whole = next(iter(PLANS))
    for plan in PLANS:
        row: dict[str, Any] = {"plan": plan}
        for kind in KINDS:
            bits = [figures[plan, kind, seed][f"bits per character of {kind}"] for seed in wish.seeds]
            at_once = [figures[whole, kind, seed][f"bits per character of {kind}"] for seed in wish.seeds]
            behind = [mine / theirs - 1 for mine, theirs in zip(bits, at_once, strict=True)]
            row |= {f"bits of {kind}": round(statistics.fmean(bits), 4)}
            row |= {f"behind, {kind}, %": round(100 * statistics.fmean(behind), 1)}
        first = figures[plan, KINDS[0], wish.seeds[0]]
        row["trained at once, of whole"] = round(
            first["largest number trained at once"]
            / figures[whole, KINDS[0], wish.seeds[0]]["largest number trained at once"],
            3,
        )
        row["after the layers, code"] = first.get("after stage 4, 4 layers", "")
        rows.append(row)
    renew("growth", {"character models of four layers": rows}, wish.device)


if __name__ == "__main__":
    main()
