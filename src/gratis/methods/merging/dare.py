"""Drop most of each task vector at random and rescale the rest.

L. Yu, B. Yu, H. Yu, F. Huang and Y. Li, "Language Models are Super Mario: Absorbing Abilities from Homologous Models as
a Free Lunch", ICML 2024, section 3.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gratis.contract.card import Card, Claim
from gratis.contract.method import Merge, MergePart
from gratis.contract.parameters import param
from gratis.methods.merging.task_arithmetic import weighted_sum
from gratis.subjects.compiled import compiled_loops

BLOCK = 65536
"""Elements that share one random stream; stretches begin at multiples of it."""


class DARE(Merge):
    """Task arithmetic over sparsified task vectors: an entry is kept with probability `density` and divided by it.

    The result is the same for a seed whatever the chunks, threads or order of tensors.
    """

    card = Card(
        title="Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
        authors="Yu, Yu, Yu, Huang, Li",
        year=2024,
        seed=26,
        paper="ICML 2024, arXiv:2311.03099",
        acts_on="checkpoints",
        free_of=("training", "data"),
        summary="one model from several fine-tunes, with most of each difference dropped at random",
        unchanged_when={"scale": 0.0},
        examples={"density": 0.5, "scale": 0.4},
        differs="Rescales by the probability, as the paper does; some libraries match norms instead, which is biased.",
        limits="On large changes (long fine-tuning) dropping most of them loses what was learned.",
        claims=(
            Claim(
                name="keeps the accuracy of task arithmetic within 0.05 with half of each task vector dropped",
                task="digits-merging",
                metric="accuracy",
                compare="difference",
                at_least=-0.05,
                against="task-arithmetic",
                against_parameters={"scale": 0.4},
                parameters={"density": 0.5, "scale": 0.4},
            ),
        ),
    )

    density: float = param(0.5, above=0, at_most=1, help="probability that an entry is kept", search=(0.05, 1.0))
    scale: float = param(0.3, at_least=0, help="factor of the sum of task vectors (lambda)", search=(0.05, 1.5))
    seed: int = param(0, at_least=0, help="seed of the random choice")

    def prepare(self, expert: Tensor, number: int, part: MergePart) -> None:
        drop(expert, self.density, self.seed, number, part)

    def combine(self, experts: list[Tensor], part: MergePart) -> Tensor:
        return weighted_sum(experts, part.weights).mul_(self.scale)


def drop(delta: Tensor, density: float, seed: int, model: int, part: MergePart) -> None:
    """Keep each entry of a stretch with probability `density` and divide it by that, in place.

    The choice depends only on seed, tensor, model and flat index.
    """
    if density >= 1:
        return
    threshold = max(round(density * 2**32), 1)
    key = hashlib.blake2b(f"{seed}/{model}/{part.tensor}".encode(), digest_size=16).digest()
    low, high = np.frombuffer(key, dtype=np.uint64)
    scale = np.float32(2**32 / threshold)
    drawn = [
        _kept(threshold, min(BLOCK, len(delta) - begin), [low, high], (part.start + begin) // BLOCK)
        for begin in range(0, len(delta), BLOCK)
    ]
    kept = drawn[0] if len(drawn) == 1 else np.concatenate(drawn)
    if (loops := compiled_loops(delta)) is not None:
        loops.scale_kept(delta, kept, scale)
    elif delta.is_cuda:
        delta.mul_(torch.from_numpy(kept).to(delta.device).to(torch.float32).mul_(float(scale)))
    else:
        delta.mul_(torch.from_numpy(np.multiply(kept, scale, dtype=np.float32)))


def _kept(threshold: int, count: int, key: list[np.uint64], block: int) -> NDArray[np.bool_]:
    """Which of a block's entries have a random number of 32 bits below `threshold`.

    The first byte decides for all but one in 256; the other three are drawn for those alone.
    """
    first, rest = threshold >> 24, threshold & 0xFFFFFF
    bytes_drawn = (
        np.random.Philox(key=key, counter=[0, block, 0, 0]).random_raw((BLOCK + 7) // 8).view(np.uint8)[:count]
    )
    kept = bytes_drawn < first
    undecided = np.flatnonzero(bytes_drawn == first) if rest else ()
    if len(undecided):
        more = np.random.Philox(key=key, counter=[0, block, 1, 0]).random_raw((len(undecided) + 1) // 2)
        kept[undecided] = (more.view(np.uint32)[: len(undecided)] & 0xFFFFFF) < rest
    return kept
