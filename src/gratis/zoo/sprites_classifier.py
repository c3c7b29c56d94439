"""`sprites-classifier`: what colour and shape the one sprite of a picture has, the judge of generated pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gratis.contract.errors import InputError
from gratis.zoo.sprites import COLOURS, SHAPES


@dataclass(frozen=True, slots=True)
class Seen:
    """What a classifier saw: places in `COLOURS` and `SHAPES`, and its probability of that pair, each (batch,)."""

    colour: Tensor
    shape: Tensor
    probability: Tensor


@torch.no_grad()
def classify(model: Any, images: Tensor) -> Seen:
    """Colour and shape of each picture, from the joint classes (colour, shape) of the zoo's classifier.

    images: (batch, height, width, 3), uint8 in 0..255 or floating in 0..1, as pipelines with `output_type="np"`
    return them. Raises InputError for other shapes.
    """
    if images.ndim != 4 or images.shape[-1] != 3:
        raise InputError(f"Pictures must have shape (batch, height, width, 3), not {tuple(images.shape)}.")
    scaled = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    pixels = scaled.permute(0, 3, 1, 2) * 2 - 1
    found = []
    for part in pixels.split(256):
        found.append(model(pixel_values=part.to(model.device, model.dtype)).logits.float().softmax(-1).cpu())
    joint = torch.cat(found).view(-1, len(COLOURS), len(SHAPES))
    return Seen(joint.sum(2).argmax(1), joint.sum(1).argmax(1), joint.flatten(1).amax(1))
