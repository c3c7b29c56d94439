"""DeepCache beside the authors' package of that name: the same latents, and at least its speed-up.

    OMP_NUM_THREADS=1 python benchmarks/deepcache.py

A random U-Net of Stable Diffusion's shape with a fifth of its width, 24 DDIM steps with guidance; each arm in a
process of its own, in turns, one thread, process CPU seconds. Writes benchmarks/results/deepcache.json.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from measuring import medians, peer_python, run_apart, store
from rich.progress import track

STEPS, ROUNDS = 24, 3


def main() -> None:
    script = Path(__file__).parent / "measuring" / "cached_sampling.py"
    peer = peer_python("deepcache", "DeepCache==0.1.1", "diffusers==0.42.1", "transformers==5.23.0")
    python = {"gratis": sys.executable, "deepcache": peer}
    seen: dict[str, list[dict[str, Any]]] = {arm: [] for arm in python}
    with tempfile.TemporaryDirectory() as folder:
        for _ in track(range(ROUNDS), description="rounds"):
            for arm, interpreter in python.items():
                seen[arm].append(run_apart(interpreter, script, arm, folder, STEPS))
        latents = {arm: torch.load(Path(folder) / f"latents-{arm}.pt", weights_only=True) for arm in python}
    middle = {arm: medians(rows) for arm, rows in seen.items()}
    rows = []
    for setting, ours in latents["gratis"].items():
        interval, branch = setting.split()
        theirs, whole = latents["deepcache"][setting], latents["gratis"]["1 0"]
        speed = {arm: middle[arm]["1 0"] / middle[arm][setting] for arm in python}
        rows.append(
            {
                "interval": interval,
                "branch": branch,
                "gratis, CPU s": round(middle["gratis"][setting], 2),
                "DeepCache 0.1.1, CPU s": round(middle["deepcache"][setting], 2),
                "gratis, speed-up": round(speed["gratis"], 2),
                "DeepCache 0.1.1, speed-up": round(speed["deepcache"], 2),
                "largest difference between them": float((ours - theirs).abs().max()),
                "relative change by caching": round(float((ours - whole).norm() / whole.norm()), 4),
            }
        )
    store(
        "deepcache",
        {"repeat": "OMP_NUM_THREADS=1 python benchmarks/deepcache.py", f"{STEPS} steps": rows},
    )


if __name__ == "__main__":
    main()
