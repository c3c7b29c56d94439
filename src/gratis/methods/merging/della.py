"""Drop small changes more often than large ones, rescale what is kept, elect a sign and average.

P. T. Deep, R. Bhardwaj and S. Poria, "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based
Sampling", 2024 (MagPrune).
"""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from gratis.contract.card import Card, Claim
from gratis.contract.errors import ParameterError
from gratis.contract.method import Merge, MergePart
from gratis.contract.parameters import param
from gratis.methods.merging.dare import BLOCK
from gratis.methods.merging.ties import elect_and_average


class DELLA(Merge):
    """TIES whose trimming is a random choice: within each row, larger changes are kept with a higher probability.

    What is kept is divided by its probability, so that the expected change is the change itself.
    """

    card = Card(
        title="DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling",
        authors="Deep, Bhardwaj, Poria",
        year=2024,
        seed=26,
        paper="arXiv:2406.11617",
        acts_on="checkpoints",
        free_of=("training", "data"),
        summary="one model from several fine-tunes: small changes dropped more often, conflicts resolved by sign",
        unchanged_when={"scale": 0.0},
        examples={"density": 0.7},
        differs="Divides by the probability, as the paper does; some libraries match norms instead, which is biased.",
        limits="Rows are those of reshape(first dimension, -1); a vector is one row, and rows of one entry keep it with d.",
        claims=(
            Claim(
                name="one model serves three ways of showing digits better than the base does",
                task="digits-merging",
                metric="accuracy",
                compare="difference",
                at_least=0.05,
                parameters={},
            ),
        ),
    )

    density: float = param(0.7, above=0, below=1, help="mean probability that an entry is kept (d)", search=(0.3, 0.9))
    spread: float = param(
        0.07, at_least=0, below=0.5, help="the row's largest is kept with d + spread, its smallest with d - spread (e)"
    )
    divisor: Literal["count", "weight", "none"] = param(
        "count", help="average over the number of experts that agree, over the sum of their weights, or add them up"
    )
    scale: float = param(1.1, at_least=0, help="factor of the merged task vector (lambda)", search=(0.3, 2.0))
    seed: int = param(0, at_least=0, help="seed of the random choice")

    def check_parameters(self) -> None:
        check_spread(type(self).__name__, self.density, self.spread)

    def unit(self, tensor: str, shape: tuple[int, ...]) -> Literal["row", "tensor"]:
        return "row" if len(shape) > 1 else "tensor"

    def prepare(self, expert: Tensor, number: int, part: MergePart) -> None:
        sample(expert, self.density, self.spread, self.seed, number, part)

    def combine(self, experts: list[Tensor], part: MergePart) -> Tensor:
        return elect_and_average(experts, part, self.divisor, "positive").mul_(self.scale)


def check_spread(owner: str, density: float, spread: float) -> None:
    """Raise ParameterError where a probability would leave (0, 1)."""
    if not (density - spread > 0 and density + spread < 1):
        raise ParameterError(f"{owner}: density - spread must be above 0 and density + spread below 1.")


def sample(delta: Tensor, density: float, spread: float, seed: int, model: int, part: MergePart) -> None:
    """MagPrune of whole rows, flat, in place: keep with the probability of the rank, divide by it."""
    width = part.shape[-1] if len(part.shape) == 1 else len(delta) if not part.shape else _width(part.shape)
    rows = delta.view(-1, width) if width else delta.view(0, 0)
    if not rows.numel():
        return
    if width == 1:
        keep = torch.full_like(rows, density)
    else:
        ranks = rows.abs().argsort(stable=True, dim=1).argsort(dim=1).to(torch.float32)
        keep = ranks.mul_(2 * spread / (width - 1)).add_(density - spread)
    drawn = torch.from_numpy(uniform(seed, model, part.tensor, part.start, len(delta))).to(delta.device)
    rows.mul_((drawn.view_as(rows) < keep).to(torch.float32)).div_(keep)


def _width(shape: tuple[int, ...]) -> int:
    width = 1
    for size in shape[1:]:
        width *= size
    return width


def uniform(seed: int, model: int, tensor: str, start: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """(count,) random numbers in [0, 1) that depend only on seed, model, tensor and flat index."""
    key = hashlib.blake2b(f"{seed}/{model}/{tensor}".encode(), digest_size=16).digest()
    words = list(np.frombuffer(key, dtype=np.uint64))
    first, last = start // BLOCK, (start + count - 1) // BLOCK
    bits = [
        np.random.Philox(key=words, counter=[0, block, 2, 0]).random_raw(BLOCK // 2).view(np.uint32)
        for block in range(first, last + 1)
    ]
    chosen = np.concatenate(bits)[start - first * BLOCK :][:count]
    numbers: np.ndarray[tuple[int], np.dtype[np.float32]] = (chosen >> 8).astype(np.float32) * np.float32(2**-24)
    return numbers
