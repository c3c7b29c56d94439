"""What every training script of the zoo shares: flags, batches, the optimiser's loop, averaged weights, the folder."""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PACED = 20
"""Steps that `--pace` takes."""

_RULE = "| --- | --- |\n"

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"


def arguments(
    description: str,
    steps: int,
    batch: int,
    rate: float,
    more: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> argparse.Namespace:
    """The flags of every script (--steps, --batch, --rate, --seed, --threads, --device, --seconds, --pace, --out) and
    `more`.

    `--seconds` is for machines lent for a while: the learning rate then reaches zero at the latest when they are over.
    `--pace` changes no weights: a few steps tell what the training costs here, for the card in `--out`.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, default=steps, help="optimiser steps")
    parser.add_argument("--batch", type=int, default=batch, help="examples per step")
    parser.add_argument("--rate", type=float, default=rate, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", default="cpu", help="where the training runs: cpu or cuda")
    parser.add_argument("--seconds", type=float, default=math.inf, help="longest wall time of the steps")
    parser.add_argument("--pace", action="store_true", help="only note in the card what a training costs here")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder that gets the model's folder")
    more(parser)
    found = parser.parse_args()
    if found.pace:
        found.steps = PACED
    torch.set_num_threads(found.threads)
    torch.manual_seed(found.seed)
    torch.set_float32_matmul_precision("high")
    return found


class Examples:
    """Columns of one training set, kept where the training runs; `draw` gives batches in a new order every pass."""

    def __init__(self, *columns: Tensor, batch: int, seed: int, device: str) -> None:
        self.columns = [column.to(device) for column in columns]
        self.batch = min(batch, len(columns[0]))
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)
        self.order: list[Tensor] = []

    def draw(self) -> list[Tensor]:
        """The next batch: the same rows of each column."""
        if not self.order:
            shuffled = torch.randperm(len(self.columns[0]), generator=self.generator).to(self.device)
            self.order = [part for part in shuffled.split(self.batch) if len(part) == self.batch]
        rows = self.order.pop()
        return [column[rows] for column in self.columns]


class Average:
    """Exponential moving average of a module's weights, in float32."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.source = module
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the source; the first updates move faster, so that the start is forgotten."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.module.parameters()), list(self.source.parameters()), 1 - decay)
        for kept, current in zip(self.module.buffers(), self.source.buffers(), strict=True):
            kept.copy_(current)


def fit(
    loss_at: Callable[[int], Tensor],
    parameters: Iterable[nn.Parameter],
    *,
    steps: int,
    rate: float,
    averages: Iterable[Average] = (),
    decay: float = 0.01,
    warmup: int = 100,
    seconds: float = math.inf,
    say: str = "loss",
) -> dict[str, float]:
    """Minimise `loss_at(step)` by AdamW with linear warm-up and a cosine to zero, in float32.

    It ends after `steps`, or when `seconds` of wall time are over where that is sooner; the cosine follows. Prints loss
    and pace; returns the steps taken, wall and CPU seconds and the mean loss of the last tenth.
    """
    averages = list(averages)
    weights = [weight for weight in parameters if weight.requires_grad]
    on_gpu = weights[0].is_cuda
    optimiser = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.99), weight_decay=decay, fused=on_gpu)
    wall, cpu = time.perf_counter(), time.process_time()
    losses: list[Tensor] = []
    progress = 0.0
    while progress < 1:
        step = len(losses)
        for group in optimiser.param_groups:
            group["lr"] = rate * min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * progress)))
        loss = loss_at(step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        for average in averages:
            average.update()
        losses.append(loss.detach())
        progress = max((step + 1) / steps, (time.perf_counter() - wall) / seconds)
        if step % 100 == 0 or progress >= 1:
            recent = torch.stack(losses[-100:]).mean().item()
            pace = (step + 1) / (time.process_time() - cpu)
            print(f"{say} step {step:6d} {recent:.4f}  {pace:.2f} steps per CPU second", flush=True)
    return {
        "steps": len(losses),
        "seconds": round(time.perf_counter() - wall, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "loss": round(torch.stack(losses[-max(len(losses) // 10, 1) :]).mean().item(), 5),
    }


def note_pace(folder: Path, figures: dict[str, float]) -> None:
    """Add to a model's card what its training costs on this machine's processor, from `figures` of a few steps of it."""
    known = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    pace = figures["cpu_seconds"] / figures["steps"]
    known |= {
        "CPU seconds per step": round(pace, 3),
        "CPU minutes of a training": round(pace * known["steps"] / 60, 1),
    }
    head, _, rest = (folder / "README.md").read_text(encoding="utf-8").partition(_RULE)
    tail = rest[rest.index("\n\n") :]
    (folder / "README.md").write_text(f"{head}{_RULE}{_rows(known)}{tail}", encoding="utf-8")
    (folder / "figures.json").write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    print(f"{known['CPU minutes of a training']} CPU minutes for {known['steps']} steps")


def _rows(figures: dict[str, Any]) -> str:
    return "\n".join(f"| {key.replace('_', ' ')} | {value} |" for key, value in figures.items())


def started(folder: Path | None) -> dict[str, Any]:
    """What the training of the model in `folder`, which another goes on from, has cost, and where it ran."""
    if folder is None:
        return {}
    before = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    return {name: before[name] for name in ("trained on", "steps", "seconds", "cpu_seconds")}


def together(runs: Sequence[dict[str, Any]], device: str) -> dict[str, Any]:
    """Steps and seconds of stages that followed one another, where they ran, and the last one's loss."""
    before = runs[0].get("trained on")
    costs = {
        name: round(sum(run.get(name, 0) for run in runs), 1 if name != "steps" else None)
        for name in ("steps", "seconds", "cpu_seconds")
    }
    where = _name_of(device) if before is None else f"{before}, the last stage {_name_of(device)}"
    return {"trained on": where, **costs, "loss": runs[-1]["loss"]}


def _name_of(device: str) -> str:
    return "CPU" if device == "cpu" else torch.cuda.get_device_name(device)


def save_half(model: Any, folder: Path) -> None:
    """`save_pretrained` with weights stored as float16; the model in memory stays as it is."""
    copy.deepcopy(model).to("cpu", torch.float16).save_pretrained(folder, safe_serialization=True)


def write_card(
    folder: Path,
    name: str,
    what: str,
    data: str,
    use: str,
    figures: dict[str, Any],
    *,
    script: str = "",
    flags: str = "",
    precision: str = "float32",
    device: str = "cpu",
) -> None:
    """The model's README.md and its figures as figures.json, both from what this run measured.

    `script` is the training module's name where it differs from the model's, `flags` what it was called with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"trained on": _name_of(device), **figures}
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    text = f"""---
license: apache-2.0
library_name: {"diffusers" if (folder / "model_index.json").exists() else "transformers"}
---
# {name}

{what}

- Data: {data}
- Train it anew: `python -m gratis.zoo.train.{script or name.replace("-", "_")}{flags}`
- Use: {use}
- Weights: {size / 1e6:.2f} MB, float16, licence Apache-2.0

| figure | value |
{_RULE}{_rows(figures)}

Trained and measured by this command in {precision}, torch {torch.__version__}. CPU times are those of one thread.
"""
    (folder / "README.md").write_text(text, encoding="utf-8")
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=1))
