"""What every training script of the zoo shares: the optimiser's loop, the average of weights, writing the folder."""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"


def arguments(description: str, steps: int, batch: int, rate: float) -> argparse.Namespace:
    """The flags of every script: --steps, --batch, --rate, --seed, --threads, --minutes, --out."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, default=steps, help="optimiser steps")
    parser.add_argument("--batch", type=int, default=batch, help="examples per step")
    parser.add_argument("--rate", type=float, default=rate, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder that gets the model's folder")
    found = parser.parse_args()
    torch.set_num_threads(found.threads)
    torch.manual_seed(found.seed)
    return found


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
        for mean, now in zip(self.module.parameters(), self.source.parameters(), strict=True):
            mean.lerp_(now, 1 - decay)
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
    say: str = "loss",
) -> dict[str, float]:
    """Minimise `loss_at(step)` by AdamW with linear warm-up and a cosine to zero, in bfloat16 autocast on the CPU.

    Prints loss and steps per second; returns steps, wall and CPU seconds and the mean loss of the last tenth.
    """
    averages = list(averages)
    weights = [weight for weight in parameters if weight.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.99), weight_decay=decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(step / max(steps, 1), 1)))),
    )
    wall, cpu, recent, last = time.perf_counter(), time.process_time(), 0.0, []
    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_at(step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        schedule.step()
        for average in averages:
            average.update()
        value = float(loss.detach())
        recent = value if step == 0 else 0.98 * recent + 0.02 * value
        if step >= steps - max(steps // 10, 1):
            last.append(value)
        if step % 100 == 0 or step == steps - 1:
            pace = (step + 1) / (time.process_time() - cpu)
            print(f"{say} step {step:6d} {recent:.4f}  {pace:.2f} steps per CPU second", flush=True)
    return {
        "steps": steps,
        "seconds": round(time.perf_counter() - wall, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "loss": round(sum(last) / max(len(last), 1), 5),
    }


def save_half(model: Any, folder: Path) -> None:
    """`save_pretrained` with weights stored as float16; the model in memory stays as it is."""
    copy.deepcopy(model).to(torch.float16).save_pretrained(folder, safe_serialization=True)


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
    precision: str = "bfloat16 autocast",
) -> None:
    """The model's README.md and its figures as figures.json, both from what this run measured.

    `script` is the training module's name where it differs from the model's, `flags` what it was called with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    rows = "\n".join(f"| {key.replace('_', ' ')} | {value} |" for key, value in figures.items())
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
| --- | --- |
{rows}

Figures were printed by the training run that wrote these weights (torch {torch.__version__}, {precision}, CPU).
"""
    (folder / "README.md").write_text(text, encoding="utf-8")
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=1))
