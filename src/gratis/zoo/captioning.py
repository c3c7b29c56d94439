"""What `sprites-captioner` says of pictures, with the picture or without it.

The captioner learned from ambiguous captions: each names the shape, and colour, size, texture, position and background
only sometimes, so that its likeliest caption says little. Half of its training pictures had their encoder's output
replaced by zeros; zeros are therefore its honest "no picture".
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gratis.zoo.sprites import TEXTURES, Scene, World, ambiguous_caption

WORLD = World(sizes=("medium", "large"), textures=TEXTURES, seed=14)
SAID = {"shape": 1.0, "colour": 0.4, "size": 0.25, "texture": 0.25, "position": 0.25}
BACKGROUND = 0.15
TOKENS = 20


def reference(scene: Scene, person: int = 0) -> str:
    """The ambiguous caption that one of many people would give to the scene."""
    return ambiguous_caption(scene, SAID, seed=person, background=BACKGROUND)


def pixel_values(images: NDArray[np.uint8]) -> Tensor:
    """Pictures (batch, 32, 32, 3) uint8 as the captioner wants them: (batch, 3, 32, 32) in -1..1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def captions(model: Any, tokenizer: Any, images: NDArray[np.uint8]) -> list[str]:
    """The captioner's greedy captions."""
    out = model.generate(pixel_values=pixel_values(images), max_new_tokens=TOKENS, do_sample=False)
    return list(tokenizer.batch_decode(out, skip_special_tokens=True))
