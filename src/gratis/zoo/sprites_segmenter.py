"""`sprites-segmenter` and its specialists: what pixels belong to the sprite in a box, a small `SamModel`.

Four ways of seeing the sprite world, each a task: plain scenes; patterned backgrounds and sprites; scenes of little
contrast; and thin shapes on grainy backgrounds, which none of the models was made for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gratis.contract.errors import InputError, ParameterError, suggestion
from gratis.zoo.sprites import TEXTURES, World, render, shift

SIDE = 64
"""Pixels of a picture's side."""

_LOOKS: dict[str, tuple[World, str, float]] = {
    "clean": (World(sprites=(1, 3), turn=0.5, seed=31), "clear", 0.0),
    "textured": (
        World(sprites=(1, 3), turn=0.5, textures=TEXTURES[1:], background_kinds=("striped", "noisy"), seed=32),
        "noise", 0.6,
    ),
    "faded": (World(sprites=(1, 3), turn=0.5, backgrounds=("grey", "brown"), seed=33), "faded", 2.0),
    "thin": (
        World(
            sprites=(1, 3), turn=0.5, shapes=("cross", "ring", "star"), background_kinds=("noisy",),
            sizes=("small", "medium"), seed=34,
        ),
        "faded", 0.8,
    ),
}  # fmt: skip

LOOKS = tuple(_LOOKS)
"""Names of the tasks."""


@dataclass(frozen=True, slots=True)
class Boxed:
    """Pictures with one sprite each to be found.

    `images`: (batch, 3, 64, 64) in -1..1. `boxes`: (batch, 1, 4) left, top, right, bottom in pixels around the sprite.
    `masks`: (batch, 64, 64) bool, what is seen of it.
    """

    images: Tensor
    boxes: Tensor
    masks: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def first(self, count: int) -> Boxed:
        """The first `count`: smaller sets lie within larger ones."""
        return Boxed(self.images[:count], self.boxes[:count], self.masks[:count])


def boxed(look: str, start: int, stop: int) -> Boxed:
    """Scenes `start` to `stop` - 1 of a look, with the box of the sprite that is seen best. Raises ParameterError."""
    if look not in _LOOKS:
        raise ParameterError(f"There is no look {look!r}{suggestion(look, LOOKS)}.")
    world, domain, strength = _LOOKS[look]
    drawn = render(world.scenes(start, stop), SIDE)
    pictures = shift(drawn.images, domain, strength, seed=start)
    rows = np.arange(stop - start)
    seen = drawn.masks.reshape(*drawn.masks.shape[:2], -1).sum(-1).argmax(1)
    return Boxed(
        torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1,
        torch.from_numpy(drawn.boxes[rows, seen]).float()[:, None],
        torch.from_numpy(drawn.masks[rows, seen]),
    )


def segment(model: Any, images: Tensor, boxes: Tensor) -> Tensor:
    """Mask logits (batch, height, width) at the pictures' size: one mask per box, `multimask_output=False`."""
    if boxes.ndim != 3 or boxes.shape[1:] != (1, 4):
        raise InputError(f"Boxes must have shape (batch, 1, 4), not {tuple(boxes.shape)}.")
    found = model(pixel_values=images, input_boxes=boxes, multimask_output=False).pred_masks
    enlarged = F.interpolate(found[:, 0].float(), images.shape[-2:], mode="bilinear", align_corners=False)
    return enlarged[:, 0]


def dice(logits: Tensor, masks: Tensor) -> Tensor:
    """Dice score of each picture, (batch,): 2 |P and G| / (|P| + |G|), P where the logit is positive; both empty: 1."""
    found = logits > 0
    both = (found & masks).flatten(1).sum(1).double()
    size = (found.flatten(1).sum(1) + masks.flatten(1).sum(1)).double()
    return torch.where(size > 0, 2 * both / size.clamp_min(1), torch.ones_like(size))


@torch.no_grad()
def scores(model: Any, pictures: Boxed, batch: int = 64) -> Tensor:
    """Dice score of each picture, (pictures,)."""
    made = []
    for at in range(0, len(pictures), batch):
        rows = slice(at, at + batch)
        images, boxes = pictures.images[rows].to(model.device), pictures.boxes[rows].to(model.device)
        made.append(dice(segment(model, images, boxes).cpu(), pictures.masks[rows]))
    return torch.cat(made)
