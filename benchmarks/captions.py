"""What guidance does to captions: guidance by strength, readings without the picture, the cut, a language model, costs.

    OMP_NUM_THREADS=1 python benchmarks/captions.py [--pictures 256]

Captions of the zoo's captioner for held-out pictures. Writes benchmarks/results/captions.json.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from measuring import renew
from rich.progress import track

import gratis
from gratis.tasks.picture_captions import SIDE, PictureCaptions
from gratis.zoo.captioning import WORLD, pixel_values
from gratis.zoo.sprites import render

OTHERS, FIRST = 16, 3_000_000
STRENGTHS = (0.0, 1.0, 1.5, 2.0, 3.0, 4.0)


def arms() -> dict[str, Any]:
    """The methods by what the table calls them; None is the captioner as it is."""
    others = pixel_values(render(WORLD.scenes(FIRST, FIRST + OTHERS), SIDE).images)
    method = gratis.GuidedCaptioning
    found: dict[str, Any] = {"plain": None}
    found |= {f"trained, gamma {gamma:g}": method(gamma=gamma) for gamma in STRENGTHS if gamma != 1}
    found |= {f"trained, gamma {gamma:g}, cut 0.1": method(gamma=gamma, cut=0.1) for gamma in (2.0, 3.0, 4.0)}
    found |= {f"{null}, gamma 2": method(gamma=2.0, null=null) for null in ("absent", "grey")}
    found["mean of 16 pictures, gamma 2"] = method(gamma=2.0, null="mean", pictures=others)
    for gamma in (1.5, 2.0, 3.0):
        found[f"16 others, gamma {gamma:g}"] = method(gamma=gamma, null="others", pictures=others)
    found["16 others, gamma 3, cut 0.1"] = method(gamma=3.0, null="others", pictures=others, cut=0.1)
    for alpha, beta in ((1.0, 1.0), (1.0, 2.0), (0.5, 2.0)):
        name = f"language model, alpha {alpha:g}, beta {beta:g}"
        found[name] = method(lm="zoo:sprites-language", alpha=alpha, beta=beta)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--pictures", type=int, default=256)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    model = gratis.open("zoo:sprites-captioner")
    task = PictureCaptions(pictures=chosen.pictures)
    rows = []
    for name, method in track(arms().items(), description="captions"):
        begin = time.process_time()
        with task.applied(model, method) as subject:
            found = task.measure(subject, seed=0)
        seconds = time.process_time() - begin
        rows.append({"captions": name, **{key: round(value, 3) for key, value in found.metrics.items()},
                     "cpu_seconds": round(seconds, 2)})  # fmt: skip
    renew("captions", {f"{chosen.pictures} pictures": rows})


if __name__ == "__main__":
    main()
