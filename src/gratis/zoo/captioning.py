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

SHAPES = ("circle", "square", "triangle", "star")
WORLD = World(shapes=SHAPES, sizes=("medium", "large"), textures=TEXTURES, seed=14)
"""Fewer shapes than colours: a colour tells more about the picture than the shape that is always said."""

SAID = {"shape": 1.0, "colour": 0.4, "size": 0.15, "texture": 0.2, "position": 0.2}
BACKGROUND = 0.15
TOKENS = 20


def reference(scene: Scene, person: int = 0) -> str:
    """The ambiguous caption that one of many people would give to the scene."""
    return ambiguous_caption(scene, SAID, seed=person, background=BACKGROUND)


def pixel_values(images: NDArray[np.uint8] | Tensor) -> Tensor:
    """Pictures (batch, 32, 32, 3) in 0..255 as the captioner wants them: (batch, 3, 32, 32) in -1..1."""
    return torch.as_tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def captions(model: Any, tokenizer: Any, images: NDArray[np.uint8], guidance: float = 1.0) -> list[str]:
    """The captioner's greedy captions, the plain way: the reference that guided captioning is held to.

    Log-probabilities are u + guidance (c - u), c with the picture and u without it. Every step reads all words again.
    """
    seen = model.encoder(pixel_values=pixel_values(images).to(model.device)).last_hidden_state
    sides = torch.cat([seen, torch.zeros_like(seen)])
    start = [[model.config.decoder_start_token_id]]
    ids = torch.tensor(start * len(images), device=model.device)
    ended = torch.zeros(len(ids), 1, dtype=torch.bool, device=model.device)
    for _ in range(TOKENS):
        logits = model.decoder(input_ids=ids.repeat(2, 1), encoder_hidden_states=sides).logits[:, -1].float()
        with_picture, without = logits.log_softmax(-1).chunk(2)
        word = (without + guidance * (with_picture - without)).argmax(-1, keepdim=True)
        word = word.masked_fill(ended, tokenizer.eos_token_id)
        ended |= word == tokenizer.eos_token_id
        ids = torch.cat([ids, word], dim=1)
    return list(tokenizer.batch_decode(ids, skip_special_tokens=True))
