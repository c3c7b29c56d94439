"""From scenes to pictures, with the mask and box of every sprite; no loop over scenes or pixels.

Each shape is a signed distance (negative inside) in units of the sprite's radius; a pixel's coverage is its distance
to the edge in pixels, clipped, which gives smooth edges and, at one half, masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gratis.contract.errors import ParameterError
from gratis.zoo.sprites.scene import BACKGROUND_COLOURS, BACKGROUND_KINDS, COLOURS, SHAPES, TEXTURES, Scene, Scenes

_Floats = NDArray[np.floating[Any]]
_CHUNK_PIXELS = 1 << 19  # pixels of one chunk: its float arrays stay in the processor's cache
_DARKER = 0.45


@dataclass(frozen=True, slots=True)
class Rendering:
    """Pictures of a batch, and where their sprites are.

    `images`: (batch, side, side, 3) uint8. `masks`: (batch, sprites, side, side) bool, what is seen of each sprite;
    `whole_masks`: the same without occlusion. `boxes`: (batch, sprites, 4) int32, left, top, right, bottom in pixels
    around the mask, right and bottom exclusive; zeros where nothing of the sprite is seen.
    """

    images: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    whole_masks: NDArray[np.bool_]
    boxes: NDArray[np.int32]


def render(scenes: Scenes | Scene | Sequence[Scene], size: int = 32) -> Rendering:
    """Draw scenes at `size` x `size` pixels. One `Scene` is a batch of one. Raises ParameterError for size < 8."""
    if isinstance(scenes, Scene):
        scenes = [scenes]
    if not isinstance(scenes, Scenes):
        scenes = Scenes.of(scenes)
    if size < 8:
        raise ParameterError(f"size must be at least 8 pixels to draw a sprite, not {size}.")
    batch, width = scenes.shape.shape
    images = np.empty((batch, size, size, 3), np.uint8)
    masks = np.zeros((batch, width, size, size), np.bool_)
    whole = np.zeros_like(masks)
    step = max(1, _CHUNK_PIXELS // (size * size * max(width, 1)))
    for start in range(0, batch, step):
        rows = slice(start, start + step)
        images[rows], masks[rows], whole[rows] = _draw(scenes.rows(rows), size)
    return Rendering(images, masks, whole, boxes_of(masks))


def boxes_of(masks: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Boxes (..., 4) around masks (..., height, width): left, top, right, bottom, the last two exclusive."""
    columns: NDArray[np.bool_] = np.any(masks, axis=-2)
    rows: NDArray[np.bool_] = np.any(masks, axis=-1)
    seen: NDArray[np.bool_] = np.any(columns, axis=-1)
    edges = [
        columns.argmax(axis=-1), rows.argmax(axis=-1),
        masks.shape[-1] - columns[..., ::-1].argmax(axis=-1), masks.shape[-2] - rows[..., ::-1].argmax(axis=-1),
    ]  # fmt: skip
    boxes: NDArray[np.int32] = np.where(seen[..., None], np.stack(edges, axis=-1), 0).astype(np.int32)
    return boxes


def _draw(scenes: Scenes, size: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_], NDArray[np.bool_]]:
    batch, width = scenes.shape.shape
    pixels = (np.arange(size, dtype=np.float32) + 0.5) / size
    image = _background(scenes, pixels)
    coverage = np.zeros((batch, width, size, size), np.float32)
    for place in range(width):
        present = np.flatnonzero(scenes.shape[:, place] >= 0)
        if not len(present):
            continue
        u, v = _local(scenes, present, place, pixels)
        distance = np.empty_like(u)
        shapes = scenes.shape[present, place]
        for shape in np.unique(shapes):
            of_shape = shapes == shape
            distance[of_shape] = signed_distance(SHAPES[shape], u[of_shape], v[of_shape])
        in_pixels = distance * (scenes.radius[present, place] * size)[:, None, None]
        coverage[present, place] = np.clip(0.5 - in_pixels, 0, 1)
        tone = _texture(scenes.texture[present, place], u, v)
        colours = np.array(list(COLOURS.values()), np.float32)[scenes.colour[present, place]]
        paint = colours[:, None, None, :] * tone[..., None]
        alpha = coverage[present, place][..., None]
        image[present] = image[present] * (1 - alpha) + paint * alpha
    whole = coverage >= 0.5
    masks = whole.copy()
    hidden = np.zeros((batch, size, size), np.bool_)
    for place in reversed(range(width)):
        masks[:, place] &= ~hidden
        hidden |= whole[:, place]
    return np.clip(image + 0.5, 0, 255).astype(np.uint8), masks, whole


def _local(scenes: Scenes, rows: NDArray[np.int64], place: int, pixels: _Floats) -> tuple[_Floats, _Floats]:
    """Pixel positions in each sprite's own frame, in units of its radius: two arrays (rows, side, side)."""
    radius = scenes.radius[rows, place][:, None, None]
    dx = (pixels[None, None, :] - scenes.x[rows, place][:, None, None]) / radius
    dy = (pixels[None, :, None] - scenes.y[rows, place][:, None, None]) / radius
    cosine = np.cos(scenes.angle[rows, place])[:, None, None]
    sine = np.sin(scenes.angle[rows, place])[:, None, None]
    return dx * cosine + dy * sine, dy * cosine - dx * sine


def signed_distance(shape: str, u: _Floats, v: _Floats) -> _Floats:
    """Distance to the edge of a shape of radius 1 at the origin, negative inside; `v` runs down.

    Near the edge it is exact or a lower bound, which is all that smooth edges need.
    """
    if shape == "circle":
        return np.hypot(u, v) - 1
    if shape == "ring":
        return np.abs(np.hypot(u, v) - 0.75) - 0.25
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - np.float32(0.8)
    if shape == "diamond":
        across, down = 0.7, 1.0
        diamond: _Floats = (np.abs(u) / across + np.abs(v) / down - 1) / float(np.hypot(1 / across, 1 / down))
        return diamond
    if shape == "triangle":
        triangle: _Floats = np.maximum(v - 0.5, np.abs(u) * float(np.sqrt(0.75)) - v * 0.5 - 0.5)
        return triangle
    if shape == "cross":
        a, b = np.abs(u), np.abs(v)
        arm, half = np.float32(0.95), np.float32(0.31)
        return np.minimum(np.maximum(a - arm, b - half), np.maximum(a - half, b - arm))
    if shape == "hexagon":
        slanted = np.abs(v) * np.float32(np.sqrt(0.75)) + np.abs(u) * 0.5
        return np.maximum(slanted, np.abs(u)) - np.float32(0.85)
    if shape == "star":
        return _star_distance(u, v)
    raise ParameterError(f"There is no shape {shape!r} in the sprite world.")


def _star_distance(u: _Floats, v: _Floats, inner: float = 0.45) -> _Floats:
    """A five-pointed star, tip up: fold the plane into half of one arm, then one straight edge from tip to notch."""
    sector = np.float32(2 * np.pi / 5)
    around = np.arctan2(u, -v)
    folded = np.abs(around - sector * np.round(around / sector))
    radius = np.hypot(u, v)
    notch = np.array([inner * np.cos(sector / 2), inner * np.sin(sector / 2)])
    edge = notch - np.array([1.0, 0.0])
    normal = (np.array([edge[1], -edge[0]]) / np.hypot(*edge)).astype(np.float32)
    distance: _Floats = (radius * np.cos(folded) - 1) * normal[0] + radius * np.sin(folded) * normal[1]
    return distance


def _texture(texture: NDArray[np.int8], u: _Floats, v: _Floats) -> _Floats:
    """Brightness of a sprite's paint, 1 or `_DARKER`, in its own frame: (rows, side, side)."""
    tone = np.ones_like(u)
    for index in np.unique(texture):
        rows = texture == index
        a, b = u[rows], v[rows]
        if TEXTURES[index] == "striped":
            dark = np.floor((a + b) * np.float32(1.8)) % 2 == 1
        elif TEXTURES[index] == "checked":
            dark = (np.floor(a * np.float32(2.2)) + np.floor(b * np.float32(2.2))) % 2 == 1
        elif TEXTURES[index] == "dotted":
            pitch = np.float32(0.62)
            dark = np.hypot(a - pitch * np.round(a / pitch), b - pitch * np.round(b / pitch)) < 0.19
        else:
            continue
        tone[rows] = np.where(dark, np.float32(_DARKER), np.float32(1))
    return tone


def _background(scenes: Scenes, pixels: _Floats) -> _Floats:
    """Background paint (batch, side, side, 3), 0..255."""
    size = len(pixels)
    base = np.array(list(BACKGROUND_COLOURS.values()), np.float32)[scenes.background_colour]
    tone = np.zeros((len(scenes), size, size), np.float32)
    ramp = pixels - 0.5
    for index in np.unique(scenes.background_kind):
        rows = scenes.background_kind == index
        kind = BACKGROUND_KINDS[index]
        if kind == "gradient":
            tone[rows] = 60 * ramp[None, :, None]
        elif kind == "striped":
            tone[rows] = np.where(np.floor(pixels * 8) % 2 == 1, np.float32(16), np.float32(-16))[None, :, None]
        elif kind == "noisy":
            tone[rows] = 18 * lattice_noise(scenes.key[rows], size)
    paint: _Floats = np.clip(base[:, None, None, :] + tone[..., None], 0, 255)
    return paint


def lattice_noise(keys: NDArray[np.int64], size: int, stream: int = 0) -> _Floats:
    """Standard normal noise (batch, size, size) that depends only on each row's key, the stream and the pixel.

    A counter hashed per pixel (the finaliser of splitmix64), so that a row is the same in every batch.
    """
    counter = np.arange(size * size, dtype=np.uint64)[None, :]
    with np.errstate(over="ignore"):
        state = (keys.astype(np.uint64)[:, None] * np.uint64(0xD1342543DE82EF95)) ^ np.uint64(stream * 0x632BE5AB + 1)
        state = (state + counter) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    first = ((state >> np.uint64(40)).astype(np.float32) + 0.5) / np.float32(1 << 24)
    second = (state & np.uint64(0xFFFFFF)).astype(np.float32) / np.float32(1 << 24)
    normal: _Floats = np.sqrt(-2 * np.log(first)) * np.cos(np.float32(2 * np.pi) * second)
    return normal.reshape(len(keys), size, size)
