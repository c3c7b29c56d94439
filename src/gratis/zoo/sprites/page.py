"""A self-contained page that shows samples of the sprite world: pictures, masks, boxes, captions, domains."""

from __future__ import annotations

import base64
import html
import struct
import zlib

import numpy as np
from numpy.typing import NDArray

from gratis.zoo.sprites import page_models
from gratis.zoo.sprites.captions import ambiguous_caption, caption
from gratis.zoo.sprites.domains import DOMAINS, shift
from gratis.zoo.sprites.rendering import Rendering, render
from gratis.zoo.sprites.scene import COLOURS, SHAPES, SIZES, TEXTURES, Background, Scene, Scenes, Sprite
from gratis.zoo.sprites.world import World

_MASK_COLOURS = np.array([[230, 80, 60], [60, 150, 230], [240, 190, 40], [90, 190, 90], [170, 90, 200]], np.uint8)

_STYLE = """
:root{color-scheme:light dark;--ink:#1d2330;--soft:#5d6675;--paper:#fbfbf9;--card:#fff;--line:#e2e4e8}
@media (prefers-color-scheme:dark){:root{--ink:#e8eaee;--soft:#9aa3b2;--paper:#15181d;--card:#1e2229;--line:#2d333c}}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:68rem;margin:0 auto;padding:1.5rem 1rem 4rem}h1{font-size:1.8rem;margin:.2em 0}
h2{font-size:1.2rem;margin:2.2em 0 .4em}p{max-width:44rem;color:var(--soft);margin:.3em 0 1em}
.grid{display:grid;gap:.8rem;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr))}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.5rem}
figure .pictures{display:flex;gap:.4rem;position:relative}img,svg{display:block;width:100%;height:auto;
image-rendering:pixelated;border-radius:.25rem}figure .pictures>div{flex:1;position:relative;min-width:0}
svg{position:absolute;inset:0}figcaption{font-size:.82rem;color:var(--soft);margin-top:.4rem;overflow-wrap:anywhere}
.wide{grid-template-columns:repeat(auto-fill,minmax(16rem,1fr))}
"""


def png(image: NDArray[np.uint8]) -> bytes:
    """A picture (height, width, 3) uint8 as a PNG file."""
    height, width, _ = image.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), image.reshape(height, width * 3)], axis=1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(rows.tobytes(), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def page(seed: int = 0, size: int = 64, models: bool = False) -> str:
    """The page as HTML; it loads nothing. Worlds are drawn from `seed`, pictures at `size` pixels.

    `models` adds what the zoo's models make of them, which takes some seconds; raises UnknownNameError where those
    models are not installed, and MissingExtraError without diffusers.
    """
    sections = [_shapes(size), _textures(size), _worlds(seed, size), _ambiguous(seed, size), _domains(seed, size)]
    if models:
        sections += page_models.sections(seed, _figure, _section)
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'><title>Sprite world</title>"
        f"<style>{_STYLE}</style><main><h1>Sprite world</h1><p>Pictures of which everything is known: what is in them, "
        f"where, and what can truly be said of them. Scenes of seed {seed}, drawn at {size} × {size} pixels.</p>"
        f"{''.join(sections)}</main></html>"
    )


def _figure(images: list[NDArray[np.uint8]], text: str, boxes: NDArray[np.int32] | None = None) -> str:
    cells = []
    for place, image in enumerate(images):
        side = image.shape[0]
        frames = "".join(
            f"<rect x='{left}' y='{top}' width='{right - left}' height='{bottom - top}' fill='none' stroke='#111' "
            "stroke-width='1.6'/>"
            f"<rect x='{left}' y='{top}' width='{right - left}' height='{bottom - top}' fill='none' stroke='#fff' "
            "stroke-width='.7'/>"
            for left, top, right, bottom in (boxes if boxes is not None and place == 0 else [])
            if right > left
        )
        source = base64.b64encode(png(image)).decode()
        overlay = f"<svg viewBox='0 0 {side} {side}'>{frames}</svg>" if frames else ""
        cells.append(f"<div><img alt='{html.escape(text)}' src='data:image/png;base64,{source}'>{overlay}</div>")
    return f"<figure><div class='pictures'>{''.join(cells)}</div><figcaption>{html.escape(text)}</figcaption></figure>"


def _section(title: str, text: str, figures: list[str], wide: bool = False) -> str:
    grid = "grid wide" if wide else "grid"
    return f"<h2>{title}</h2><p>{text}</p><div class='{grid}'>{''.join(figures)}</div>"


def _shapes(size: int) -> str:
    scenes = [
        Scene((Sprite(shape, colour, radius=0.38),), Background("white"))
        for shape, colour in zip(SHAPES, COLOURS, strict=True)
    ]
    images = render(scenes, size).images
    names = [f"{scene.sprites[0].colour} {scene.sprites[0].shape}" for scene in scenes]
    return _section(
        "Shapes and colours", "Every shape occurs in every colour.",
        [_figure([image], name) for image, name in zip(images, names, strict=True)],
    )  # fmt: skip


def _textures(size: int) -> str:
    scenes = [
        Scene((Sprite("square", "blue", radius=SIZES[word] * 1.5, texture=texture),), Background("white", kind))
        for texture, word, kind in zip(
            TEXTURES, ("large", "large", "large", "medium"), ("plain", "gradient", "striped", "noisy"), strict=True
        )
    ]
    images = render(scenes, size).images
    names = [f"{scene.sprites[0].texture} sprite, {scene.background.kind} background" for scene in scenes]
    return _section(
        "Textures and backgrounds", "Both vary on their own.",
        [_figure([image], name) for image, name in zip(images, names, strict=True)],
    )  # fmt: skip


def _sample(seed: int, size: int, overlap: bool) -> tuple[Scenes, Rendering]:
    world = World(
        sprites=(1, 4), textures=TEXTURES, background_kinds=("plain", "gradient", "noisy"),
        gap=-0.12 if overlap else 0.02, turn=0.5, distinct=("kind",), seed=seed,
    )  # fmt: skip
    scenes = world.scenes(0, 12)
    return scenes, render(scenes, size)


def _worlds(seed: int, size: int) -> str:
    scenes, drawn = _sample(seed, size, overlap=True)
    figures = []
    for row, scene in enumerate(scenes):
        mask = np.full((size, size, 3), 40, np.uint8)
        for place in range(drawn.masks.shape[1]):
            mask[drawn.masks[row, place]] = _MASK_COLOURS[place]
        figures.append(_figure([drawn.images[row], mask], caption(scene, background=True), drawn.boxes[row]))
    return _section(
        "Scenes with masks, boxes and captions", "Sprites may hide one another: a mask is what is seen.", figures, True
    )


def _ambiguous(seed: int, size: int) -> str:
    scenes = World(textures=TEXTURES, seed=seed).scenes(0, 8)
    images = render(scenes, size).images
    often = {"colour": 0.5, "size": 0.3, "texture": 0.2, "position": 0.3}
    return _section(
        "Ambiguous captions", "True, but saying only some of what is to be seen; four people, one picture.",
        [
            _figure([images[row]], " · ".join(ambiguous_caption(scene, often, seed=person) for person in range(4)))
            for row, scene in enumerate(scenes)
        ],
    )  # fmt: skip


def _domains(seed: int, size: int) -> str:
    _, drawn = _sample(seed, size, overlap=False)
    return _section(
        "Domains", "The same scenes under shifts; labels stay.",
        [_figure([shift(drawn.images[2:3], name)[0], shift(drawn.images[5:6], name)[0]], name) for name in DOMAINS],
    )  # fmt: skip
