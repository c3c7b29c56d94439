"""A law of scenes: draw any scene of an endless, seeded sequence, under constraints."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gratis.contract.errors import InputError, ParameterError
from gratis.zoo.sprites.scene import (
    BACKGROUND_COLOURS,
    BACKGROUND_KINDS,
    COLOURS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    Scenes,
    require_name,
)

_BLOCK = 256
_ROUNDS = 400
_DISTINCT = ("shape", "colour", "texture", "kind")


@dataclass(frozen=True, slots=True)
class World:
    """An endless sequence of scenes. `world[i]` is a scene, `world.scenes(a, b)` the batch of scenes a to b - 1.

    Scene i depends on the world's fields and i alone, not on what else is drawn with it, so that splits are ranges
    (0 to 50,000 for training, a million onwards for testing) and nothing needs to be stored.

    - `sprites`: fewest and most sprites of a scene, drawn uniformly.
    - `shapes`, `colours`, `textures`, `sizes`, `backgrounds`, `background_kinds`: what may occur, drawn uniformly.
    - `without`: pairs (colour, shape) that never occur: hold them out here and put them into `only` of a test world to
      measure whether a model composes.
    - `only`: pairs (colour, shape) to which scenes are restricted; empty for no restriction.
    - `distinct`: among "shape", "colour", "texture" and "kind" (colour and shape together): no two sprites of a scene
      share it.
    - `gap`: least distance between the circles around two sprites; negative values allow overlap. None: no limit.
    - `margin`: least distance of a sprite's circle from the image's edge; negative lets sprites leave the picture.
    - `turn`: largest turn of a sprite in radians, drawn uniformly to both sides.
    - `radius_jitter`: relative spread of the radius around its size word, below 0.15 so that the word stays true.
    - `seed`.
    """

    sprites: tuple[int, int] = (1, 1)
    shapes: tuple[str, ...] = SHAPES
    colours: tuple[str, ...] = tuple(COLOURS)
    textures: tuple[str, ...] = ("plain",)
    sizes: tuple[str, ...] = tuple(SIZES)
    backgrounds: tuple[str, ...] = ("white", "grey", "black")
    background_kinds: tuple[str, ...] = ("plain",)
    without: tuple[tuple[str, str], ...] = ()
    only: tuple[tuple[str, str], ...] = ()
    distinct: tuple[str, ...] = ()
    gap: float | None = 0.02
    margin: float = 0.0
    turn: float = 0.0
    radius_jitter: float = 0.08
    seed: int = 0

    def __post_init__(self) -> None:
        for what, names, known in (
            ("shape", self.shapes, SHAPES), ("colour", self.colours, tuple(COLOURS)),
            ("texture", self.textures, TEXTURES), ("size", self.sizes, tuple(SIZES)),
            ("background colour", self.backgrounds, tuple(BACKGROUND_COLOURS)),
            ("background kind", self.background_kinds, BACKGROUND_KINDS),
            ("distinct attribute", self.distinct, _DISTINCT),
        ):  # fmt: skip
            if isinstance(names, str):
                raise ParameterError(f"{what}s of a world are a tuple of names, not the text {names!r}.")
            if not names and what != "distinct attribute":
                raise ParameterError(f"A world needs at least one {what}.")
            for name in names:
                require_name(what, name, known)
        fewest, most = self.sprites
        if not 0 <= fewest <= most <= 16:
            raise ParameterError(f"sprites must be a range (fewest, most) within 0 to 16, not {self.sprites}.")
        if not 0 <= self.radius_jitter < 0.15:
            raise ParameterError(f"radius_jitter must be at least 0 and below 0.15, not {self.radius_jitter}.")
        if self.margin + max(SIZES[size] for size in self.sizes) * (1 + self.radius_jitter) >= 0.5:
            raise ParameterError(f"margin {self.margin} leaves no place for a sprite: choose a smaller one.")
        if self.seed < 0:
            raise ParameterError(f"seed must be at least 0, not {self.seed}.")
        if not len(self._pairs()):
            raise ParameterError("without and only leave no pair of colour and shape: allow at least one.")

    def __getitem__(self, index: int) -> Scene:
        return self.scenes(index, index + 1)[0]

    def scenes(self, start: int, stop: int) -> Scenes:
        """Scenes `start` to `stop` - 1. Raises InputError where the constraints leave no room for the sprites."""
        if not 0 <= start <= stop:
            raise InputError(f"A range of scenes needs 0 <= start <= stop, not {start} to {stop}.")
        first, last = start // _BLOCK, max(start, stop - 1) // _BLOCK
        batch = Scenes.concatenate([self._block(block) for block in range(first, last + 1)])
        return batch[start - first * _BLOCK : stop - first * _BLOCK]

    def _pairs(self) -> NDArray[np.int64]:
        """Allowed pairs (colour, shape) as places: (pairs, 2)."""
        allowed = {(colour, shape) for colour in self.colours for shape in self.shapes}
        for colour, shape in (*self.only, *self.without):
            require_name("colour", colour, tuple(COLOURS))
            require_name("shape", shape, SHAPES)
        allowed = (allowed & set(self.only) if self.only else allowed) - set(self.without)
        places = sorted((tuple(COLOURS).index(colour), SHAPES.index(shape)) for colour, shape in allowed)
        return np.array(places, np.int64).reshape(-1, 2)

    def _block(self, block: int) -> Scenes:
        """Scenes of one block: all are drawn, then those that break a constraint are drawn anew until none does."""
        generator = np.random.default_rng([self.seed, block])
        scenes = self._draw(generator, block)
        for _ in range(_ROUNDS):
            broken = np.flatnonzero(self._broken(scenes))
            if not len(broken):
                return scenes
            again = self._draw(generator, block)
            for field in fields(Scenes):
                getattr(scenes, field.name)[broken] = getattr(again, field.name)[broken]
        raise InputError(
            f"This world leaves no room for its sprites (up to {self.sprites[1]}, gap {self.gap}): allow fewer or "
            "smaller sprites, a smaller gap, or fewer distinct attributes."
        )

    def _draw(self, generator: np.random.Generator, block: int) -> Scenes:
        width = self.sprites[1]
        grid = (_BLOCK, width)
        pairs = self._pairs()[generator.integers(len(self._pairs()), size=grid)]
        radius = _pick(generator, [SIZES[size] for size in self.sizes], grid, np.float32)
        radius = radius * (1 + self.radius_jitter * generator.uniform(-1, 1, grid))
        reach = self.margin + radius
        count = generator.integers(self.sprites[0], width + 1, size=_BLOCK)
        absent = np.arange(width)[None, :] >= count[:, None]
        return Scenes(
            shape=np.where(absent, -1, pairs[..., 1]).astype(np.int8),
            colour=pairs[..., 0].astype(np.int8),
            texture=_pick(generator, [TEXTURES.index(name) for name in self.textures], grid, np.int8),
            x=(reach + generator.random(grid) * (1 - 2 * reach)).astype(np.float32),
            y=(reach + generator.random(grid) * (1 - 2 * reach)).astype(np.float32),
            radius=radius.astype(np.float32),
            angle=(self.turn * generator.uniform(-1, 1, grid)).astype(np.float32),
            background_colour=_pick(
                generator, [tuple(BACKGROUND_COLOURS).index(name) for name in self.backgrounds], _BLOCK, np.int8
            ),
            background_kind=_pick(
                generator, [BACKGROUND_KINDS.index(name) for name in self.background_kinds], _BLOCK, np.int8
            ),
            key=np.arange(block * _BLOCK, (block + 1) * _BLOCK) + (self.seed << 40),
        )

    def _broken(self, scenes: Scenes) -> NDArray[np.bool_]:
        """Which scenes break a constraint on pairs of sprites: (batch,)."""
        width = scenes.shape.shape[1]
        both = scenes.present[:, :, None] & scenes.present[:, None, :] & np.triu(np.ones((width, width), np.bool_), 1)
        clash = np.zeros_like(both)
        if self.gap is not None:
            apart = np.hypot(
                scenes.x[:, :, None] - scenes.x[:, None, :], scenes.y[:, :, None] - scenes.y[:, None, :]
            ) - (scenes.radius[:, :, None] + scenes.radius[:, None, :])
            clash |= apart < self.gap
        for name in self.distinct:
            kind = scenes.colour.astype(np.int64) * len(SHAPES) + scenes.shape
            column: NDArray[Any] = kind if name == "kind" else getattr(scenes, name)
            clash |= np.equal(column[:, :, None], column[:, None, :])
        broken: NDArray[np.bool_] = np.any(clash & both, axis=(1, 2))
        return broken


def _pick(
    generator: np.random.Generator, values: list[int] | list[float], size: int | tuple[int, ...], dtype: type
) -> NDArray:
    return np.array(values, dtype)[generator.integers(len(values), size=size)]
