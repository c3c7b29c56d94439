"""DeepCache beside the authors' package of that name: the same latents, and at least its speed-up.

    OMP_NUM_THREADS=1 python benchmarks/deepcache.py

A random U-Net of Stable Diffusion's shape with a fifth of its width, 24 DDIM steps with guidance; both on the same torch
and diffusers, in turns in one process, one thread, process CPU seconds. The package itself lives in an environment of
its own. Writes benchmarks/results/deepcache.json.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from measuring import peer_python, run_apart, store

STEPS, ROUNDS = 24, 5
PACKAGE = "DeepCache 0.1.1"


def main() -> None:
    script = Path(__file__).parent / "measuring" / "cached_sampling.py"
    peer = peer_python("deepcache", "DeepCache==0.1.1", "diffusers==0.42.1", "transformers==5.23.0")
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([str(peer), "-c", ask], capture_output=True, text=True, check=True).stdout.strip()
    seen = run_apart(sys.executable, script, site, STEPS, ROUNDS)
    rows = [
        {
            "interval": row["interval"],
            "branch": row["branch"],
            "gratis, CPU s": round(row["gratis"], 2),
            f"{PACKAGE}, CPU s": round(row["deepcache"], 2),
            "gratis, speed-up": round(seen["untouched"] / row["gratis"], 2),
            f"{PACKAGE}, speed-up": round(seen["untouched"] / row["deepcache"], 2),
            "largest difference between them": row["difference"],
            "relative change by caching": round(row["change"], 4),
        }
        for row in seen["rows"]
    ]
    store(
        "deepcache",
        {
            "repeat": "OMP_NUM_THREADS=1 python benchmarks/deepcache.py",
            "untouched, CPU s": round(seen["untouched"], 2),
            f"{STEPS} steps": rows,
        },
    )


if __name__ == "__main__":
    main()
