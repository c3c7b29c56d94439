"""LAME: what adapting costs beside the classifier, what the sparse path saves, and what it gains over smoothing.

    OMP_NUM_THREADS=1 python benchmarks/lame.py

Times are process CPU seconds of one thread, medians of interleaved runs. Peers are what is used today without
training: the mean of the last predictions (temporal smoothing) and scikit-learn's LabelSpreading from the predictions
that the classifier is sure of. Writes benchmarks/results/lame.json.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.semi_supervised import LabelSpreading

import gratis
from gratis.subjects.streams import adapted_labels, batches, in_runs, order_of, shuffled
from gratis.subjects.vision import imagenet_backbone, read_features
from gratis.trials.environment import environment

ROUNDS = 7
SEEDS = 5


def median_seconds(arms: dict[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, float]:
    """CPU seconds of each arm, run in turns after a warm-up."""
    seen: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, run in arms.items():
            begin = time.process_time()
            run()
            if number:
                seen[name].append(time.process_time() - begin)
    return {name: statistics.median(values) for name, values in seen.items()}


def cost_beside_the_classifier() -> list[dict[str, Any]]:
    model = imagenet_backbone()
    rows = []
    for size in (16, 64):
        images = torch.randn(size, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        logits, features = read_features(model, "_fc", images)
        took = median_seconds(
            {
                "forward": lambda images=images: read_features(model, "_fc", images),
                "adapt": lambda pair=(logits, features): gratis.LAME().adapt(*pair, logits=True),
            }
        )
        rows.append(
            {
                "batch": size,
                "classes": logits.shape[1],
                "forward pass, ms": round(1e3 * took["forward"], 2),
                "LAME, ms": round(1e3 * took["adapt"], 2),
                "LAME / forward pass": round(took["adapt"] / took["forward"], 4),
            }
        )
    return rows


def dense(p: torch.Tensor, f: torch.Tensor, neighbors: int = 5) -> torch.Tensor:
    """The same updates over the full distance and affinity matrices."""
    f = f / f.norm(dim=1, keepdim=True)
    distance = torch.cdist(f, f, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    w = torch.zeros_like(distance).scatter_(1, distance.topk(neighbors, largest=False).indices, 1.0)
    unary = -torch.log(p + 1e-10)
    y, energy = torch.softmax(-unary, 1), [torch.inf, torch.inf]
    for step in range(100):
        pairwise = w @ y
        y = torch.softmax(pairwise - unary, 1)
        energy.append(float((unary * y - pairwise * y + y * torch.log(y.clamp_min(1e-20))).sum()))
        if step > 1 and abs(energy[-1] - energy[-2]) <= 1e-8 * abs(energy[-2]):
            break
    return y


def sparse_against_dense() -> list[dict[str, Any]]:
    rows = []
    for samples in (128, 1024, 4096):
        generator = torch.Generator().manual_seed(0)
        classes = torch.randint(0, 100, (samples,), generator=generator)
        centres = torch.randn(100, 256, generator=generator, dtype=torch.float64)
        f = centres[classes] + 2 * torch.randn(samples, 256, generator=generator, dtype=torch.float64)
        p = torch.softmax(
            3 * torch.eye(100, dtype=torch.float64)[classes]
            + torch.randn(samples, 100, generator=generator, dtype=torch.float64),
            1,
        )
        sparse = gratis.LAME().adapt(p, f).probabilities
        apart = float((sparse - dense(p, f)).abs().max())
        took = median_seconds(
            {"sparse": lambda p=p, f=f: gratis.LAME().adapt(p, f), "dense": lambda p=p, f=f: dense(p, f)}, 3
        )
        rows.append(
            {
                "batch": samples,
                "sparse, ms": round(1e3 * took["sparse"], 1),
                "dense, ms": round(1e3 * took["dense"], 1),
                "dense / sparse": round(took["dense"] / took["sparse"], 2),
                "largest difference of a probability": f"{apart:.1e}",
            }
        )
    return rows


def smoothed(p: NDArray[Any], window: int = 5) -> NDArray[Any]:
    """Labels from the mean of the last `window` predictions along the stream."""
    total = np.cumsum(np.vstack([np.zeros(p.shape[1]), p]), axis=0)
    end = np.arange(1, len(p) + 1)
    return np.asarray((total[end] - total[np.maximum(end - window, 0)]).argmax(1))


def spread(p: NDArray[Any], f: NDArray[Any], size: int, sure: float = 0.9) -> NDArray[Any]:
    """Labels from LabelSpreading within each batch, started from the predictions that are sure."""
    out = p.argmax(1)
    for rows in batches(np.arange(len(p)), size):
        known = np.where(p[rows].max(1) > sure, p[rows].argmax(1), -1)
        if len(np.unique(known[known >= 0])) > 1:
            model = LabelSpreading(kernel="knn", n_neighbors=min(5, len(rows))).fit(f[rows], known)
            out[rows] = np.where(known < 0, model.predict(f[rows]), known)
        elif (known >= 0).any():
            out[rows] = known.max()
    return out


def in_turns(order: NDArray[Any], count: int) -> NDArray[Any]:
    """`order` as `count` cameras would deliver it: cut into as many parts, which take turns."""
    length = len(order) // count
    return order[: length * count].reshape(count, length).T.flatten()


def against_smoothing() -> list[dict[str, Any]]:
    task = gratis.task_catalogue["digits-stream"]()
    network, images, labels = task.subject()
    rows = []
    streams: dict[str, Callable[[NDArray[Any], np.random.Generator], NDArray[Any]]] = {
        "in runs of one class": in_runs,
        "two such streams in turns": lambda y, generator: in_turns(in_runs(y, generator), 2),
        "three such streams in turns": lambda y, generator: in_turns(in_runs(y, generator), 3),
        "shuffled": lambda y, generator: shuffled(len(y), generator),
    }
    for name, ordered in streams.items():
        accuracy: dict[str, list[float]] = {}
        took: dict[str, float] = {}
        for seed in range(SEEDS):
            generator = np.random.default_rng(seed)
            noisy = images + task.noise * generator.standard_normal(images.shape)
            features = np.maximum(noisy @ network.coefs_[0] + network.intercepts_[0], 0)
            order = ordered(labels, generator)
            p, f, truth = network.predict_proba(noisy)[order], features[order], labels[order]
            parts = batches(np.arange(len(p)), 16)
            arms: dict[str, Callable[[], NDArray[Any]]] = {
                "classifier alone": lambda p=p: p.argmax(1),
                "temporal smoothing, 5": lambda p=p: smoothed(p),
                "temporal smoothing, 15": lambda p=p: smoothed(p, 15),
                "LabelSpreading": lambda p=p, f=f: spread(p, f, 16),
                "LAME": lambda p=p, f=f, parts=parts: np.concatenate(
                    [gratis.LAME().adapt(p[rows], f[rows]).labels for rows in parts]
                ),
                "LAME with guard": lambda p=p, f=f, parts=parts: np.concatenate(
                    [gratis.LAME(guard=True).adapt(p[rows], f[rows]).labels for rows in parts]
                ),
            }
            for arm, run in arms.items():
                accuracy.setdefault(arm, []).append(float((run() == truth).mean()))
            took = took or median_seconds(arms, 1)
        for arm, values in accuracy.items():
            rows.append(
                {
                    "stream": name,
                    "prediction": arm,
                    "accuracy, %": round(100 * statistics.fmean(values), 1),
                    "lowest of five seeds": round(100 * min(values), 1),
                    "CPU ms per stream": round(1e3 * took[arm], 1),
                }
            )
    return rows


def gains_by_stream() -> list[dict[str, Any]]:
    """Points of accuracy gained over the classifier alone: mean and lowest over draws of data and order."""
    rows = []
    methods = {"LAME": gratis.LAME(), "with guard": gratis.LAME(guard=True)}
    tasks = gratis.task_catalogue
    for data, seeds, orders in (("digits", 20, 1), ("photographs", 3, 20)):
        task = tasks["digits-stream" if data == "digits" else "image-stream"]()
        subject = task.subject()
        gains: dict[tuple[bool, bool, int, str], list[float]] = {}
        alone = []
        for seed in range(seeds):
            generator = np.random.default_rng(seed)
            if data == "digits":
                network, images, truth = subject
                noisy = images + task.noise * generator.standard_normal(images.shape)
                features = np.maximum(noisy @ network.coefs_[0] + network.intercepts_[0], 0)
                p = network.predict_proba(noisy)
            else:
                p, features, truth, _ = task.predicted(subject, generator)
            alone.append(100 * float((p.argmax(1) == truth).mean()))
            for runs, shifted, size, _ in itertools.product((True, False), (False, True), (16, 64), range(orders)):
                order = order_of(truth, generator, runs=runs, shifted=shifted)
                plain = adapted_labels(None, p, features, order, size) == truth[order]
                for name, method in methods.items():
                    right = adapted_labels(method, p, features, order, size) == truth[order]
                    gain = 100 * float(right.mean() - plain.mean())
                    gains.setdefault((runs, shifted, size, name), []).append(gain)
        for runs, shifted, size in itertools.product((True, False), (False, True), (16, 64)):
            row: dict[str, Any] = {
                "data": f"{data}, alone {min(alone):.0f} to {max(alone):.0f} %",
                "stream": ("in runs" if runs else "shuffled") + (", some classes rare" if shifted else ""),
                "batch": size,
            }
            for name in methods:
                values = gains[runs, shifted, size, name]
                row |= {f"{name}, mean": round(statistics.fmean(values), 1), f"{name}, lowest": round(min(values), 1)}
            rows.append(row)
    return rows


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)
    result = {
        "date": date.today().isoformat(),
        "machine": environment(),
        "repeat": "OMP_NUM_THREADS=1 python benchmarks/lame.py",
        "cost beside the classifier (EfficientNet-Lite0)": cost_beside_the_classifier(),
        "sparse path against the dense one": sparse_against_dense(),
        "digits stream, batches of 16": against_smoothing(),
        "points of accuracy gained, by stream": gains_by_stream(),
    }
    for title, rows in result.items():
        if isinstance(rows, list):
            print(f"\n{title}")
            for row in rows:
                print("  " + ", ".join(f"{key} {value}" for key, value in row.items()))
    print(f"\nrepeat: {result['repeat']}")
    path = Path(__file__).parent / "results" / "lame.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
