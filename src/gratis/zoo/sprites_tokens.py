"""`sprites-prior` and `sprites-vq`: pictures of one sprite as 64 tokens, from a prompt of six words.

`sprites-vq` (a diffusers `VQModel`) turns 32 x 32 pictures into 8 x 8 codes and back; `sprites-prior` (a
`LlamaForCausalLM`) writes the codes from left to right and top to bottom. A prompt is always
`<bos> size colour shape row column background <image>`; any word may be `<any>`, and the prompt of `<any>` alone is
the unconditional side of classifier-free guidance, of the same length as every other prompt.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gratis.contract.errors import InputError, ParameterError
from gratis.zoo.sprites import BACKGROUND_COLOURS, COLOURS, SHAPES, SIZES, Scene, World

CODES = 256
SIDE = 8
TOKENS = SIDE * SIDE
WORLD = World(sizes=("medium", "large"), seed=13)
SLOTS = ("size", "colour", "shape", "row", "column", "background")
_WORDS = tuple(dict.fromkeys((*SIZES, *COLOURS, *SHAPES, "top", "middle", "bottom", "left", "right")))
VOCABULARY = (
    "<any>", "<image>", *_WORDS, *BACKGROUND_COLOURS, *(f"<image_{code}>" for code in range(CODES)),
)  # fmt: skip
"""Words after the tokenizer's four special tokens."""

FIRST_CODE = 4 + VOCABULARY.index("<image_0>")
"""Token id of code 0; codes have consecutive ids."""

PROMPT = len(SLOTS) + 2


def said(scene: Scene, slots: Collection[str] = SLOTS) -> list[str]:
    """The six words for a scene's sprite; `<any>` for slots left out. Raises InputError unless it holds one sprite."""
    if len(scene.sprites) != 1:
        raise InputError(f"The prior knows scenes with one sprite, not {len(scene.sprites)}.")
    sprite = scene.sprites[0]
    row, column = sprite.position
    words = (sprite.size, sprite.colour, sprite.shape, row, column, scene.background.colour)
    return [word if slot in slots else "<any>" for slot, word in zip(SLOTS, words, strict=True)]


def prompts(tokenizer: Any, words: Sequence[Sequence[str]]) -> Tensor:
    """Token ids (batch, 8) of prompts of six words each, in the order of `SLOTS`."""
    for row in words:
        if len(row) != len(SLOTS):
            raise InputError(f"A prompt has six words ({', '.join(SLOTS)}; <any> leaves one open), not {len(row)}.")
    rows = [tokenizer.convert_tokens_to_ids(["<bos>", *row, "<image>"]) for row in words]
    ids = torch.tensor(rows)
    if (ids == tokenizer.unk_token_id).any():
        row, column = (ids == tokenizer.unk_token_id).nonzero()[0].tolist()
        raise ParameterError(f"The prior does not know the word {words[row][column - 1]!r}.")
    return ids


def unconditional(tokenizer: Any, batch: int) -> Tensor:
    """Token ids (batch, 8) of the prompt that says nothing."""
    return prompts(tokenizer, [["<any>"] * len(SLOTS)] * batch)


def pixels(images: Tensor) -> Tensor:
    """Pictures (batch, 32, 32, 3) in 0..255 as (batch, 3, 32, 32) in -1..1."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def encode(vq: Any, images: NDArray[np.uint8]) -> Tensor:
    """Codes (batch, 64) of pictures (batch, 32, 32, 3) uint8."""
    found = []
    for part in torch.from_numpy(images).split(256):
        latents = vq.encode(pixels(part.to(vq.device)).to(vq.dtype)).latents
        found.append(vq.quantize(latents)[2][2].view(len(part), TOKENS))
    return torch.cat(found)


@torch.no_grad()
def decode(vq: Any, tokens: Tensor) -> NDArray[np.uint8]:
    """Pictures (batch, 32, 32, 3) uint8 of the prior's tokens (batch, 64): token ids, not codes.

    Raises InputError where a token is not one of the image.
    """
    codes = tokens - FIRST_CODE
    if tokens.ndim != 2 or tokens.shape[1] != TOKENS or (codes < 0).any() or (codes >= CODES).any():
        raise InputError(f"A picture is {TOKENS} image tokens ({FIRST_CODE} to {FIRST_CODE + CODES - 1}).")
    found = []
    for part in codes.to(vq.device).split(256):
        latents = vq.quantize.get_codebook_entry(part.reshape(-1), (len(part), SIDE, SIDE, vq.config.vq_embed_dim))
        found.append(vq.decode(latents, force_not_quantize=True).sample)
    seen = torch.cat(found).float().clamp(-1, 1)
    return ((seen.permute(0, 2, 3, 1) + 1) * 127.5 + 0.5).to(torch.uint8).cpu().numpy()


@torch.no_grad()
def sample(
    prior: Any, prompt: Tensor, guidance: float = 3.0, temperature: float = 1.0, seed: int = 0, tokenizer: Any = None
) -> Tensor:
    """Image tokens (batch, 64) drawn one by one, the plain way: the reference that faster decoders are held to.

    Guided logits are u + guidance (c - u), c with the prompt and u with the unconditional one, before the temperature;
    only image tokens can be drawn. `tokenizer` is needed for guidance other than 1.
    """
    generator = torch.Generator(prompt.device).manual_seed(seed)
    guided = guidance != 1
    rows = torch.cat([prompt, unconditional(tokenizer, len(prompt)).to(prompt.device)]) if guided else prompt
    past, tokens = None, []
    for _ in range(TOKENS):
        out = prior(input_ids=rows, past_key_values=past, use_cache=True)
        logits = out.logits[:, -1, FIRST_CODE : FIRST_CODE + CODES].float()
        if guided:
            with_prompt, without = logits.chunk(2)
            logits = without + guidance * (with_prompt - without)
        drawn = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator) + FIRST_CODE
        tokens.append(drawn)
        rows, past = torch.cat([drawn, drawn]) if guided else drawn, out.past_key_values
    return torch.cat(tokens, dim=1)
