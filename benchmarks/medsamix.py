"""MedSAMix's searches on the zoo's segmenters: the paper's forest, optuna and chance, one mean score or a front of looks.

    python benchmarks/medsamix.py [--device cuda] [--jobs 6] [--trials 80] [--seeds 3]

Three small SAM models, granularity 2; every search sees 40 pictures of each look and is reported on 200 others. Beside
them the single models, their average, and task arithmetic at the best of ten scales on the search's pictures. Writes
benchmarks/results/medsamix.json.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch
from measuring import store
from rich.progress import track

import gratis
from gratis.subjects.merging import merge_state_dicts
from gratis.tasks.segmentation_merging import MODELS, SegmentationMerging

OPTIMIZERS = ("forest", "optuna", "random")
REGIMES = ("single", "multi")


def _task(regime: str, device: str, pictures: int) -> Any:
    torch.set_num_threads(1)
    return SegmentationMerging(pictures=pictures, regime=regime, device=device)


def searched(regime: str, optimizer: str, seed: int, trials: int, device: str, pictures: int) -> dict[str, Any]:
    """One search and what it came to on unseen pictures."""
    task = _task(regime, device, pictures)
    method = gratis.MedSAMix(layer_granularity=2, n_trials=trials, optimizer=optimizer, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with task.applied(task.subject(), method) as merged:
            found = task.measure(merged, seed=0)
    return {
        "regime": regime, "optimizer": optimizer, "seed": seed,
        **{name: round(value, 4) for name, value in found.metrics.items()},
        **{key: round(v, 4) if isinstance(v, float) else v for key, v in found.details.items()},
    }  # fmt: skip


def alone(device: str, pictures: int) -> list[dict[str, Any]]:
    """The single models, their average, and tuned task arithmetic."""
    task = _task("single", device, pictures)
    model, states, seen, unseen = task.subject()
    rows = []

    def row(what: str, state: Any) -> dict[str, Any]:
        model.load_state_dict(state)
        found = task.measure((model, unseen, {}), seed=0)
        return {
            "model": what, **{name: round(value, 4) for name, value in found.metrics.items()},
            **{key: round(v, 4) for key, v in found.details.items()},
        }  # fmt: skip

    for name, state in zip(MODELS, states, strict=True):
        rows.append(row(name, state))
    rows.append(row("average", merge_state_dicts(gratis.Average(), states, states[0])))
    scales = [number / 10 for number in range(1, 11)]
    summed = {s: merge_state_dicts(gratis.TaskArithmetic(scale=s), states[1:], states[0]) for s in scales}

    def on_search(state: Any) -> float:
        model.load_state_dict(state)
        return task.measure((model, seen, {}), seed=0).metrics["dice"]

    best = max(scales, key=lambda s: on_search(summed[s]))
    rows.append(row(f"task arithmetic, scale {best}", summed[best]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("--trials", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=200, help="unseen pictures of each look")
    flags = parser.parse_args()
    plan = list(itertools.product(REGIMES, OPTIMIZERS, range(flags.seeds)))
    rows = []
    with ProcessPoolExecutor(flags.jobs, multiprocessing.get_context("spawn")) as pool:
        beside = pool.submit(alone, flags.device, flags.pictures)
        running = [pool.submit(searched, *one, flags.trials, flags.device, flags.pictures) for one in plan]
        for future in track(as_completed(running), total=len(running), description="searching"):
            rows.append(future.result())
            print(rows[-1], flush=True)
        singles = beside.result()
    rows.sort(key=lambda row: (row["regime"], row["optimizer"], row["seed"]))
    best_single = max(row["dice"] for row in singles[: len(MODELS)])
    summary = []
    for regime, optimizer in itertools.product(REGIMES, OPTIMIZERS):
        own = [row for row in rows if (row["regime"], row["optimizer"]) == (regime, optimizer)]
        chance = {row["seed"]: row for row in rows if (row["regime"], row["optimizer"]) == (regime, "random")}
        summary.append(
            {
                "regime": regime,
                "optimizer": optimizer,
                "dice, mean of seeds": round(statistics.fmean(row["dice"] for row in own), 4),
                "above the best single model": round(statistics.fmean(row["dice"] for row in own) - best_single, 4),
                "seeds at least as good as chance, unseen pictures": sum(
                    row["dice"] >= chance[row["seed"]]["dice"] for row in own
                ),
                "seeds at least as good as chance, search's pictures": sum(
                    row["score on the search's pictures"] >= chance[row["seed"]]["score on the search's pictures"]
                    for row in own
                ),
            }
        )
    device = torch.cuda.get_device_name() if flags.device.startswith("cuda") else "cpu"
    store(
        "medsamix",
        {
            "repeat": f"python benchmarks/medsamix.py --device {flags.device} --trials {flags.trials}",
            "device": device,
            "without a search": singles,
            "searches, by regime and optimiser": summary,
            "searches": rows,
        },
    )


if __name__ == "__main__":
    main()
