"""Every merge method on three fine-tunes that pull against each other: helpful, honest, harmless.

    python benchmarks/three_h.py [--device cuda] [--jobs 6] [--size 100] [--methods ties tsvm]

Three fine-tunes of SmolLM2-135M-Instruct (trained into the cache where they are missing), merged by every method of the
catalogue: all three, and each two by those that take two and by the usual ones. Each merge is measured as its defaults
leave it and, where its scale can be turned, at the scale that serves requests of the training best. Rows are written as
they come (`--rows`), and a run goes on from them. Writes benchmarks/results/three_h.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from measuring import store
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor

import gratis
from gratis.contract.catalogue import catalogue
from gratis.contract.errors import GratisError
from gratis.contract.method import Merge, MergePart
from gratis.methods.merging.fisher import fisher_information
from gratis.methods.merging.matrices import interference, is_matrix
from gratis.methods.merging.reg_mean import gram_matrices
from gratis.subjects import tokenizer_of
from gratis.subjects.chat_answers import answers, chat
from gratis.subjects.checkpoints import Checkpoint
from gratis.subjects.embedded import embedded_folder
from gratis.subjects.folders import cache_folder
from gratis.subjects.merging import merge_into
from gratis.tasks.three_h import ASPECTS, LONGEST, SIDES, requests
from gratis.trials.environment import environment
from gratis.trials.statistics import paired_interval
from gratis.zoo.train.three_h import RATE, STEPS, expert_folder, folder_of

SCALES = (0.3, 0.6, 1.0, 1.5)
FOR_TWO = ("average", "task-arithmetic", "ties", "dare-ties", "model-stock", "tsvm", "r-tsvm", "instruction-vector")
EXEMPT = {"medsamix": "a search: see segmentation-merging", "passthrough": "copies one model"}
SLOW = ("reg-mean", "fisher", "wudi", "tsvm", "r-tsvm", "iso-c", "nu-slerp", "arcee-fusion")
STATISTICS = ("information", "grams")
"""Parameters of Fisher and RegMean that name files."""
SAMPLES, CLASSES = 32, 8
"""Requests behind Fisher information and Gram matrices, and next tokens over which Fisher information is taken."""


def jobs_of(methods: Sequence[str], made: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is measured, the slow first: {"method", "parameters", "experts"}."""
    found: list[dict[str, Any]] = [{"method": "", "parameters": {}, "experts": ()}]
    found += [{"method": "", "parameters": {}, "experts": (aspect,)} for aspect in ASPECTS]
    for name, entry in catalogue.entries.items():
        if entry.family != "merging" or name in EXEMPT or (methods and name not in methods):
            continue
        for count in (3, 2):
            for experts in itertools.combinations(ASPECTS, count):
                parameters = _parameters(name, experts, made)
                method = catalogue.resolve(name).load()(**parameters)
                # Fused into the first of two, where the method takes one.
                if not any(_takes(method, number) for number in {count, count - 1 if count == 2 else count}):
                    continue
                takes_three = any(job["method"] == name and len(job["experts"]) == 3 for job in found)
                if count == 3 or not takes_three or name in FOR_TWO:
                    found.append({"method": name, "parameters": parameters, "experts": experts})
        if name == "wudi":
            found.append({"method": name, "parameters": {"solver": "pseudo-inverse"}, "experts": ASPECTS})
        if name == "r-tsvm":
            for parts in ({"outlier": "none"}, {"rank": "equal"}, {"outlier": "clip"}):
                found.append({"method": name, "parameters": parts, "experts": ASPECTS})
    return sorted(found, key=lambda job: (len(job["experts"]) == 2, job["method"] not in ("", *SLOW)))


def _takes(method: Merge, count: int) -> bool:
    try:
        method.check_experts(count)
    except GratisError:
        return False
    return True


def _parameters(name: str, experts: Sequence[str], made: Mapping[str, Any]) -> dict[str, Any]:
    key = {"fisher": "information", "reg-mean": "grams"}.get(name)
    return {key: tuple(str(_statistics_file(name, aspect, made)) for aspect in experts)} if key else {}


def _statistics_file(name: str, aspect: str, made: Mapping[str, Any]) -> Path:
    folder = folder_of(aspect, **made)
    return folder.with_name(f"{folder.name}-{name}.safetensors")


class Bench:
    """A live model, the checkpoints, and requests; one per process."""

    def __init__(self, device: str, size: int, made: Mapping[str, Any], tuning: int) -> None:
        torch.set_num_threads(1)
        self.device, self.made = device, made
        self.model = gratis.open("smollm2", dtype="float32", device=device)
        self.tokenizer = tokenizer_of(self.model)
        self.base = embedded_folder("smollm2")
        self.folders = {aspect: expert_folder(aspect, **made) for aspect in ASPECTS}
        self.weights = self.model.state_dict()
        self.before = {name: tensor.clone() for name, tensor in self.weights.items()}
        self.trained = [
            name for name, w in self.before.items() if is_matrix(name, tuple(w.shape), ("embed", "lm_head"))
        ]
        self.test = {aspect: requests(aspect, "test", size) for aspect in ASPECTS}
        self.tuning = {aspect: requests(aspect, "train", tuning, seed=1) for aspect in ASPECTS}

    def right(self, asked: Mapping[str, Sequence[Any]]) -> dict[str, list[float]]:
        """1 or 0 for every request of every aspect."""
        found = {}
        for aspect, own in asked.items():
            texts = answers(self.model, self.tokenizer, [request.prompt for request in own], LONGEST, batch=50).texts
            found[aspect] = [float(request.right(text)) for request, text in zip(own, texts, strict=True)]
        return found

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in tensors.items():
                self.weights[name].copy_(tensor)

    def merge(self, method: Merge, experts: Sequence[str]) -> None:
        """Merge into the live model; whole matrices on its device where the method works on these alone."""
        base, folders = self.base, [self.folders[aspect] for aspect in experts]
        if not _takes(method, len(experts)):
            base, *folders = folders
        whole = all(method.unit(name, tuple(self.before[name].shape)) == "tensor" for name in self.trained)
        plain = type(method).survey is Merge.survey and not method.measures and method.kept_share() is None
        plain = plain and method.needs_base and method.differences and base == self.base
        if self.device == "cpu" or not (whole and plain):
            merge_into(self.weights, method, folders, base)
            return
        # The other tensors (embeddings, norms) were not trained.
        checkpoints = [Checkpoint(folder) for folder in folders]
        self.put(self.before)
        for name in self.trained:
            changes = [c.tensor(name).to(self.device).float() - self.before[name] for c in checkpoints]
            part = MergePart(name, 0, (1.0,) * len(changes), shape=tuple(changes[0].shape))
            merged = method.combine([change.flatten() for change in changes], part)
            with torch.no_grad():
                self.weights[name].add_(merged.view(changes[0].shape))

    def measure(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """One row: good answers by aspect, as merged and at the best scale."""
        began = time.perf_counter()
        row: dict[str, Any] = {**job, "experts": list(job["experts"]), "parameters": dict(job["parameters"])}
        if not job["method"]:
            self.put(self.before)
            if job["experts"]:
                checkpoint = Checkpoint(self.folders[job["experts"][0]])
                self.put({name: checkpoint.tensor(name) for name in checkpoint.places if name in self.weights})
            return {**row, "right": self.right(self.test)}
        method = catalogue.resolve(job["method"]).load()(**job["parameters"])
        if "task" in method.parameters():
            # One model per task out of one file: each is asked for its own aspect.
            right = {}
            for task, aspect in enumerate(job["experts"]):
                self.merge(method.replace(task=task), job["experts"])
                right |= self.right({aspect: self.test[aspect]})
            return {**row, "right": right, "one model per aspect": True}
        self.merge(method, job["experts"])
        row["merge seconds"] = round(time.perf_counter() - began, 1)
        row["right"] = self.right(self.test)
        scale = method.parameters().get("scale")
        if method.needs_base and method.differences and scale and job["method"] != "passthrough":
            self._tuned(row, scale)
        row["seconds"] = round(time.perf_counter() - began, 1)
        return row

    def _tuned(self, row: dict[str, Any], scale: float) -> None:
        """The merged change is linear in the scale: one merge serves every scale."""
        merged = {
            name: tensor.clone() for name, tensor in self.weights.items() if not torch.equal(tensor, self.before[name])
        }

        def turn(to: float) -> None:
            self.put({name: self.before[name].lerp(tensor, to / scale) for name, tensor in merged.items()})

        seen = {}
        for to in sorted({*SCALES, scale}):
            turn(to)
            right = self.right({aspect: self.tuning[aspect] for aspect in row["experts"]})
            seen[to] = statistics.fmean(statistics.fmean(values) for values in right.values())
        best = max(seen, key=lambda to: (seen[to], -abs(to - scale)))
        row["scales"] = {str(to): round(share, 4) for to, share in seen.items()}
        row["scale"], row["default scale"] = best, scale
        if best != scale:
            turn(best)
            row["right at scale"] = self.right(self.test)

    def statistics_files(self, name: str, aspect: str) -> None:
        """Fisher information or Gram matrices of a fine-tune on its own training requests."""
        path = _statistics_file(name, aspect, self.made)
        if path.is_file():
            return
        model = gratis.open(str(self.folders[aspect]), dtype="float32", device=self.device)
        model.set_attn_implementation("eager")
        tokenizer = tokenizer_of(model)
        texts = []
        for request in requests(aspect, "train", SAMPLES, seed=2):
            answer = request.answer or "Sure."
            texts.append(chat(tokenizer, request.prompt) + answer[: len(answer) // 2])
        examples = [
            tokenizer(t, return_tensors="pt", add_special_tokens=False)["input_ids"].to(self.device) for t in texts
        ]
        if name == "reg-mean":
            tensors = gram_matrices(model, examples, lambda m, ids: m(input_ids=ids))
            tensors.pop("lm_head.weight", None)
        else:
            model.requires_grad_(False)
            for key, weight in model.named_parameters():
                weight.requires_grad_(is_matrix(key, tuple(weight.shape), ("embed", "lm_head")))

            def likeliest(m: Any, ids: Tensor) -> Tensor:
                logits = m(input_ids=ids).logits[0, -1].float()
                return logits[logits.topk(CLASSES).indices].log_softmax(-1)

            tensors = fisher_information(model, examples, likeliest)
        temporary = path.with_suffix(".partial")
        save_file({key: tensor.contiguous().cpu() for key, tensor in tensors.items()}, temporary)
        temporary.replace(path)


_bench: Bench | None = None


def _begin(device: str, size: int, made: Mapping[str, Any], tuning: int) -> None:
    global _bench
    _bench = Bench(device, size, made, tuning)


def _run(job: dict[str, Any]) -> dict[str, Any]:
    assert _bench is not None
    try:
        for key in ("fisher", "reg-mean"):
            if job["method"] == key:
                for aspect in job["experts"]:
                    _bench.statistics_files(key, aspect)
        return _bench.measure(job)
    except (GratisError, RuntimeError, ArithmeticError) as error:
        return {**job, "experts": list(job["experts"]), "error": f"{type(error).__name__}: {str(error)[:300]}"}


def conflicts(made: Mapping[str, Any], device: str) -> list[dict[str, Any]]:
    """How the fine-tunes' changes collide: signs, angles, and the overlap of their singular vectors, by pair and all."""
    base = Checkpoint(embedded_folder("smollm2"))
    changes: dict[str, dict[str, Tensor]] = {}
    for aspect in ASPECTS:
        tuned = Checkpoint(expert_folder(aspect, **made))
        changes[aspect] = {
            name: (tuned.tensor(name).to(device).float() - base.tensor(name).to(device).float())
            for name, place in base.places.items()
            if is_matrix(name, place.shape, ("embed", "lm_head"))
        }
    rows = []
    for count in (2, 3):
        for experts in itertools.combinations(ASPECTS, count):
            dots = torch.zeros(count, count, dtype=torch.float64)
            against = strong = strong_against = entries = 0
            overlap = []
            for place, name in enumerate(changes["honest"]):
                stacked = torch.stack([changes[aspect][name].flatten() for aspect in experts])
                dots += (stacked.double() @ stacked.double().T).cpu()
                signs = (stacked > 0).any(0) & (stacked < 0).any(0)
                threshold = stacked.abs().mean(1, keepdim=True) + 2 * stacked.abs().std(1, keepdim=True)
                large = (stacked.abs() > threshold).sum(0) >= 2
                against += int(signs.sum())
                strong += int(large.sum())
                strong_against += int((signs & large).sum())
                entries += signs.numel()
                if place % 21 == 0:
                    deltas = [changes[aspect][name] for aspect in experts]
                    rank = min(deltas[0].shape) // count
                    whole = sum(float(torch.linalg.svdvals(delta)[:rank].sum()) for delta in deltas)
                    overlap.append(interference(deltas, rank) / whole)
            norms = dots.diagonal().sqrt()
            cosines = dots / (norms[:, None] * norms[None, :])
            off = [float(cosines[i, j]) for i in range(count) for j in range(i)]
            rows.append(
                {
                    "fine-tunes": " and ".join(experts),
                    "cosine of the changes": round(statistics.fmean(off), 4),
                    "share of entries of opposite sign": round(against / entries, 4),
                    "of entries that are large in two": round(strong_against / max(strong, 1), 4),
                    "interference of singular vectors, per singular value": round(statistics.fmean(overlap), 3),
                }
            )
    sizes = {
        aspect: round(
            sum(float(c.double().square().sum()) for c in changes[aspect].values()) ** 0.5
            / sum(float(base.tensor(name).double().square().sum()) for name in changes[aspect]) ** 0.5,
            4,
        )
        for aspect in ASPECTS
    }
    return [*rows, {"size of the change, as a share of the weights": sizes}]


def table(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rows side by side: shares by aspect, mean, share of the specialists' own, and intervals against the average."""
    own = {
        aspect: statistics.fmean(row["right"][aspect])
        for row in rows
        for aspect in ASPECTS
        if not row["method"] and row["experts"] == [aspect] and "right" in row
    }
    average = {tuple(row["experts"]): row for row in rows if row["method"] == "average" and "right" in row}

    def line(row: dict[str, Any], right: Mapping[str, list[float]], scale: float | None) -> dict[str, Any]:
        among = row["experts"] if row["method"] else list(ASPECTS)
        shares = {aspect: statistics.fmean(values) for aspect, values in right.items()}
        made: dict[str, Any] = {
            "method": row["method"]
            or (f"the {row['experts'][0]} one alone" if row["experts"] else "before fine-tuning"),
            "parameters": {k: v for k, v in row["parameters"].items() if k not in STATISTICS},
            **({"scale": scale} if scale is not None else {}),
            **{aspect: round(share, 3) for aspect, share in shares.items()},
            "mean": round(statistics.fmean(shares[aspect] for aspect in among if aspect in shares), 3),
        }
        if all(own.get(aspect) for aspect in among):
            made["share of the specialists'"] = round(
                statistics.fmean(shares[a] / own[a] for a in among if a in shares), 3
            )
        beside = average.get(tuple(row["experts"]))
        if beside is not None and row["method"] and set(right) == set(beside["right"]):
            a = [value for aspect in among for value in right[aspect]]
            b = [value for aspect in among for value in beside["right"][aspect]]
            interval = paired_interval(a, b)
            if interval is not None:
                low, high = interval
                made["against the average"] = (
                    f"{statistics.fmean(a) - statistics.fmean(b):+.3f} ({low:+.3f} to {high:+.3f})"
                )
                made["verdict"] = "better" if low > 0 else "worse" if high < 0 else "no difference"
        return made

    def lines(chosen: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        made = []
        for row in chosen:
            tuned = "scale" in row
            made.append(line(row, row["right"], row.get("default scale")))
            if tuned and "right at scale" in row:
                made.append(line(row, row["right at scale"], row["scale"]))
        return sorted(made, key=lambda found: -found["mean"])

    good = [row for row in rows if "right" in row]
    sides = [
        {
            "model": row["experts"][0] if row["experts"] else "before fine-tuning",
            **{
                f"{side} requests": round(statistics.fmean(row["right"][aspect][place::2]), 3)
                for aspect in ASPECTS
                for place, side in enumerate(SIDES[aspect])
            },
        }
        for row in good
        if not row["method"]
    ]
    pairs = {
        " and ".join(experts): lines([row for row in good if row["method"] and tuple(row["experts"]) == experts])
        for experts in itertools.combinations(ASPECTS, 2)
    }
    return {
        "before merging": lines([row for row in good if not row["method"]]),
        "before merging, by side": sides,
        "all three merged": lines([row for row in good if row["method"] and len(row["experts"]) == 3]),
        "two merged": pairs,
        "failed": [{"method": row["method"], "error": row["error"]} for row in rows if "error" in row],
        "left out": [{"method": name, "why": why} for name, why in EXEMPT.items()],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("--size", type=int, default=100, help="test requests of each aspect")
    parser.add_argument("--tuning", type=int, default=20, help="training requests of each aspect that choose the scale")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of the fine-tunes")
    parser.add_argument("--rate", type=float, default=RATE, help="learning rate of the fine-tunes")
    parser.add_argument("--methods", nargs="*", default=[], help="only these")
    parser.add_argument("--rows", type=Path, default=None, help="rows as they come")
    parser.add_argument("--gather", action="store_true", help="only write the table of the rows that are there")
    flags = parser.parse_args()
    made = {"steps": flags.steps, "rate": flags.rate}
    if flags.rows is None:
        flags.rows = cache_folder() / f"three_h-{flags.steps}-{flags.rate:g}-{flags.size}.jsonl"
    rows = [json.loads(text) for text in flags.rows.read_text().splitlines()] if flags.rows.is_file() else []
    if not flags.gather:
        measure(flags, made, rows)
    gather(flags, made, rows)


def measure(flags: argparse.Namespace, made: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Add to the rows what they lack, and write each down as it comes."""
    for aspect in ASPECTS:
        expert_folder(aspect, device=flags.device, **made)
    done = {_key(row) for row in rows if "right" in row}
    wanted = [job for job in jobs_of(flags.methods, made) if _key(job) not in done]
    flags.rows.parent.mkdir(parents=True, exist_ok=True)
    began = (flags.device, flags.size, made, flags.tuning)
    spawn = multiprocessing.get_context("spawn")
    with open(flags.rows, "a") as file, ProcessPoolExecutor(flags.jobs, spawn, _begin, began) as pool:

        def add(row: dict[str, Any]) -> None:
            rows.append(json.loads(json.dumps(row)))
            file.write(json.dumps(row) + "\n")
            file.flush()

        if not any("conflicts" in row for row in rows):
            around = environment()
            add({key: around[key] for key in ("processor", "cores", "memory_gb", "system", "python", "versions")})
            add({"device": torch.cuda.get_device_name() if flags.device.startswith("cuda") else "cpu"})
            add({"fine-tunes": {a: json.loads((folder_of(a, **made) / "figures.json").read_text()) for a in ASPECTS}})
            add({"conflicts": conflicts(made, flags.device)})
        running = [pool.submit(_run, job) for job in wanted]
        for future in track(as_completed(running), total=len(running), description="merging and asking"):
            add(future.result())


def gather(flags: argparse.Namespace, made: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Write the table of the rows, and what was not measured."""
    around: dict[str, Any] = {}
    for row in rows:
        if "method" not in row:
            around |= row
    versions = around.pop("versions", {})
    machine = {key: around.pop(key) for key in ("processor", "cores", "memory_gb", "system", "python") if key in around}
    merged = [row for row in rows if "method" in row]
    done = {_key(row) for row in merged}
    left = [job for job in jobs_of(flags.methods, made) if _key(job) not in done]
    store(
        "three_h",
        {
            "machine": machine,
            "versions": versions,
            "repeat": f"python benchmarks/three_h.py --device {'cpu' if around.get('device') == 'cpu' else 'cuda'}",
            "requests of each aspect": flags.size,
            **around,
            **table(merged),
            "not measured": [f"{job['method']}: {' and '.join(job['experts'])}" for job in left],
        },
    )


def _key(row: Mapping[str, Any]) -> str:
    parameters = {name: value for name, value in row["parameters"].items() if name not in STATISTICS}
    return json.dumps([row["method"], parameters, list(row["experts"])])


if __name__ == "__main__":
    main()
