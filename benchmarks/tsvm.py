"""TSV-M and R-TSVM beside fusion-bench's TSV-M on the same matrices: CPU seconds with one thread, and agreement.

    OMP_NUM_THREADS=1 python benchmarks/tsvm.py [--rounds 3] [--layers 2] [--tasks 3]

The matrices of some layers of SmolLM2-135M, changed at random at full rank by each task. Every merge runs in a process of
its own, in turns; imports are not counted. Writes benchmarks/results/tsvm.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from measuring import medians, peer_python, run_apart, store
from rich.progress import track
from safetensors.torch import load_file, save_file

SHAPES = {
    "q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576),
    "gate": (1536, 576), "up": (1536, 576), "down": (576, 1536),
}  # fmt: skip
ARMS = ("gratis", "gratis_r", "fusion_bench")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tasks", type=int, default=3)
    parser.add_argument("--peer", type=Path, help="an interpreter that has fusion-bench already")
    flags = parser.parse_args()
    peer = flags.peer or peer_python("fusion-bench", "fusion-bench==0.2.33")
    python = {"gratis": sys.executable, "gratis_r": sys.executable, "fusion_bench": peer}
    script = Path(__file__).parent / "measuring" / "tsvm_once.py"
    seen: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for task in range(flags.tasks):
            generator = torch.Generator().manual_seed(task)
            changes = {
                f"layers.{layer}.{part}": 1e-3 * torch.randn(shape, generator=generator)
                for layer in range(flags.layers)
                for part, shape in SHAPES.items()
            }
            save_file(changes, folder / f"task{task}.safetensors")
        for _ in track(range(flags.rounds), description="merging"):
            for arm in ARMS:
                seen[arm].append(run_apart(python[arm], script, arm, folder))
        ours, theirs = (load_file(folder / f"{arm}.safetensors") for arm in ("gratis", "fusion_bench"))
        off = max(float((ours[n] - theirs[n]).norm() / theirs[n].norm()) for n in theirs)
    middle = {arm: medians(found) for arm, found in seen.items()}
    store(
        "tsvm",
        {
            "repeat": f"OMP_NUM_THREADS=1 python benchmarks/tsvm.py --layers {flags.layers} --tasks {flags.tasks}",
            "merges": [{"arm": arm, "matrices": len(theirs), "tasks": flags.tasks, **middle[arm]} for arm in ARMS],
            "CPU seconds, fusion-bench to": {
                arm: round(middle["fusion_bench"]["CPU s"] / middle[arm]["CPU s"], 2) for arm in ARMS[:2]
            },
            "largest relative difference of a matrix, TSVM to fusion-bench's": float(f"{off:.2g}"),
        },
    )


if __name__ == "__main__":
    main()
