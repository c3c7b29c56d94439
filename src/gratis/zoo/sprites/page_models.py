"""The page's sections on what the zoo's models make of the sprite world: as tokens, drawn from words, captioned."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Figure = Callable[[list[NDArray[np.uint8]], str], str]
Section = Callable[[str, str, list[str]], str]

_SHOWN = 12


def sections(seed: int, figure: Figure, section: Section) -> list[str]:
    """Sections as HTML, made by the page's own `figure` and `section`; scenes begin at a million plus 1,000 x seed."""
    start = 1_000_000 + 1000 * seed
    return [_tokens(start, figure, section), _drawn(start, figure, section), _captioned(start, figure, section)]


def _tokens(start: int, figure: Figure, section: Section) -> str:
    from gratis import zoo
    from gratis.zoo.sprites.rendering import render
    from gratis.zoo.sprites_tokens import FIRST_CODE, WORLD, decode, encode

    vq = zoo.load("sprites-vq")
    images = render(WORLD.scenes(start, start + _SHOWN), 32).images
    codes = encode(vq, images)
    again = decode(vq, codes + FIRST_CODE)
    return section(
        "As 64 tokens", "Each picture, and what <code>sprites-vq</code> makes of its 8 × 8 codes.",
        [figure([image, copy], f"{len(set(row.tolist()))} different codes")
         for image, copy, row in zip(images, again, codes, strict=True)],
    )  # fmt: skip


def _drawn(start: int, figure: Figure, section: Section) -> str:
    from gratis import zoo
    from gratis.subjects import tokenizer_of
    from gratis.zoo.sprites_tokens import WORLD, decode, prompts, said, sample

    vq, prior = zoo.load("sprites-vq"), zoo.load("sprites-prior")
    tokenizer = tokenizer_of(prior)
    words = [said(scene) for scene in WORLD.scenes(start, start + _SHOWN)]
    asked = prompts(tokenizer, words)
    plain, guided = (
        decode(vq, sample(prior, asked, guidance, seed=start, tokenizer=tokenizer)) for guidance in (1.0, 2.0)
    )
    return section(
        "Drawn from words",
        "<code>sprites-prior</code> writes the tokens after six words; left without guidance, right with guidance 2.",
        [figure([left, right], " ".join(row)) for left, right, row in zip(plain, guided, words, strict=True)],
    )


def _captioned(start: int, figure: Figure, section: Section) -> str:
    from gratis import zoo
    from gratis.subjects import tokenizer_of
    from gratis.zoo.captioning import WORLD, captions
    from gratis.zoo.sprites.rendering import render

    model = zoo.load("sprites-captioner")
    tokenizer = tokenizer_of(model)
    images = render(WORLD.scenes(start, start + _SHOWN), 32).images
    said = zip(*(captions(model, tokenizer, images, guidance) for guidance in (1.0, 1.5, 2.0)), strict=True)
    return section(
        "Captioned", "What <code>sprites-captioner</code> says, greedily, with guidance 1, 1.5 and 2. "
        "Strong guidance can break the grammar: nothing here cuts implausible words.",
        [figure([image], " · ".join(texts)) for image, texts in zip(images, said, strict=True)],
    )  # fmt: skip
