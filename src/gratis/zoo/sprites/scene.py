"""What a sprite scene is: plain descriptions, and the same descriptions as columns for a whole batch.

Lengths are fractions of the image's side, so that one scene renders at any size: `x` runs right, `y` runs down, and
`radius` is that of the circle around the shape. Later sprites lie in front of earlier ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from gratis.contract.errors import ParameterError, suggestion

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring", "star", "hexagon")

COLOURS = {
    "red": (220, 40, 40), "orange": (245, 140, 20), "yellow": (240, 220, 50), "green": (45, 160, 60),
    "cyan": (60, 200, 215), "blue": (40, 80, 215), "purple": (130, 50, 170), "pink": (240, 120, 190),
}  # fmt: skip
"""Colours of sprites, as RGB in 0..255."""

TEXTURES = ("plain", "striped", "checked", "dotted")

SIZES = {"small": 0.11, "medium": 0.165, "large": 0.23}
"""Radius that each size word stands for; a radius is named by the nearest word."""

BACKGROUND_COLOURS = {"white": (240, 240, 240), "grey": (128, 128, 128), "black": (22, 22, 22), "brown": (120, 86, 60)}
"""Colours of backgrounds, none of them a colour of a sprite."""

BACKGROUND_KINDS = ("plain", "gradient", "striped", "noisy")

_SIZE_BOUNDS = tuple((a + b) / 2 for a, b in zip(tuple(SIZES.values())[:-1], tuple(SIZES.values())[1:], strict=True))


def require_name(what: str, name: str, known: Sequence[str]) -> int:
    """The place of `name` among `known`. Raises ParameterError that suggests the nearest one."""
    names = list(known)
    if name not in names:
        raise ParameterError(f"There is no {what} {name!r} in the sprite world{suggestion(name, names)}.")
    return names.index(name)


@dataclass(frozen=True, slots=True)
class Sprite:
    """One coloured shape. `angle` turns it clockwise, in radians; `texture` is drawn in a darker tone of its colour."""

    shape: str
    colour: str
    x: float = 0.5
    y: float = 0.5
    radius: float = SIZES["medium"]
    texture: str = "plain"
    angle: float = 0.0

    def __post_init__(self) -> None:
        require_name("shape", self.shape, SHAPES)
        require_name("colour", self.colour, tuple(COLOURS))
        require_name("texture", self.texture, TEXTURES)
        if not all(math.isfinite(value) for value in (self.x, self.y, self.radius, self.angle)):
            raise ParameterError(f"A {self.colour} {self.shape} has a position, radius or angle that is not finite.")
        if self.radius <= 0:
            raise ParameterError(f"radius of a sprite must be above 0 (a fraction of the side), not {self.radius}.")

    @property
    def size(self) -> str:
        """The word for its radius: small, medium or large."""
        return tuple(SIZES)[int(np.searchsorted(_SIZE_BOUNDS, self.radius))]

    @property
    def position(self) -> tuple[str, str]:
        """Which third it lies in: (top, middle or bottom; left, middle or right)."""
        return ("top", "middle", "bottom")[_third(self.y)], ("left", "middle", "right")[_third(self.x)]


@dataclass(frozen=True, slots=True)
class Background:
    """What lies behind the sprites."""

    colour: str = "grey"
    kind: str = "plain"

    def __post_init__(self) -> None:
        require_name("background colour", self.colour, tuple(BACKGROUND_COLOURS))
        require_name("background kind", self.kind, BACKGROUND_KINDS)


@dataclass(frozen=True, slots=True)
class Scene:
    """Sprites from back to front before a background; `key` seeds what is random in the picture (noise)."""

    sprites: tuple[Sprite, ...] = ()
    background: Background = Background()
    key: int = 0


@dataclass(frozen=True, slots=True)
class Scenes(Sequence[Scene]):
    """A batch of scenes as columns; indexing gives a `Scene`, slicing gives `Scenes`.

    Columns of sprites have shape (batch, sprites): `shape`, `colour` and `texture` hold places in `SHAPES`, `COLOURS`
    and `TEXTURES` (shape is -1 where a scene has fewer sprites), `x`, `y`, `radius` and `angle` are float32. Columns
    of the background have shape (batch,): `background_colour`, `background_kind`, `key`.
    """

    shape: NDArray[np.int8]
    colour: NDArray[np.int8]
    texture: NDArray[np.int8]
    x: NDArray[np.float32]
    y: NDArray[np.float32]
    radius: NDArray[np.float32]
    angle: NDArray[np.float32]
    background_colour: NDArray[np.int8]
    background_kind: NDArray[np.int8]
    key: NDArray[np.int64]

    @classmethod
    def of(cls, scenes: Sequence[Scene]) -> Scenes:
        """The columns of `scenes`."""
        width = max((len(scene.sprites) for scene in scenes), default=0)

        def column(name: str, missing: float, dtype: type, known: Sequence[str] | None = None) -> NDArray[Any]:
            out: NDArray[Any] = np.full((len(scenes), width), missing, dtype)
            for row, scene in enumerate(scenes):
                for place, sprite in enumerate(scene.sprites):
                    value = getattr(sprite, name)
                    out[row, place] = known.index(value) if known is not None else value
            return out

        return cls(
            shape=column("shape", -1, np.int8, SHAPES),
            colour=column("colour", 0, np.int8, tuple(COLOURS)),
            texture=column("texture", 0, np.int8, TEXTURES),
            x=column("x", 0.5, np.float32),
            y=column("y", 0.5, np.float32),
            radius=column("radius", 0.1, np.float32),
            angle=column("angle", 0.0, np.float32),
            background_colour=np.array(
                [tuple(BACKGROUND_COLOURS).index(scene.background.colour) for scene in scenes], np.int8
            ),
            background_kind=np.array([BACKGROUND_KINDS.index(scene.background.kind) for scene in scenes], np.int8),
            key=np.array([scene.key for scene in scenes], np.int64),
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Scenes]) -> Scenes:
        """One batch after the other; all must have the same width."""
        return cls(**{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)})

    def __len__(self) -> int:
        return len(self.key)

    @property
    def present(self) -> NDArray[np.bool_]:
        """Which places hold a sprite: (batch, sprites)."""
        return self.shape >= 0

    @property
    def numbers(self) -> NDArray[np.int64]:
        """How many sprites each scene has: (batch,)."""
        numbers: NDArray[np.int64] = self.present.sum(axis=1)
        return numbers

    @property
    def size(self) -> NDArray[np.int64]:
        """Place of each sprite's size word in `SIZES`: (batch, sprites)."""
        return np.searchsorted(np.array(_SIZE_BOUNDS), self.radius)

    def rows(self, index: Any) -> Scenes:
        """The scenes that a numpy index selects, as a batch."""
        return Scenes(**{f.name: getattr(self, f.name)[index] for f in fields(Scenes)})

    @overload
    def __getitem__(self, index: int) -> Scene: ...
    @overload
    def __getitem__(self, index: slice) -> Scenes: ...
    def __getitem__(self, index: int | slice) -> Scene | Scenes:
        if isinstance(index, slice):
            return self.rows(index)
        sprites = tuple(
            Sprite(
                shape=SHAPES[self.shape[index, place]],
                colour=tuple(COLOURS)[self.colour[index, place]],
                x=float(self.x[index, place]),
                y=float(self.y[index, place]),
                radius=float(self.radius[index, place]),
                texture=TEXTURES[self.texture[index, place]],
                angle=float(self.angle[index, place]),
            )
            for place in np.flatnonzero(self.present[index])
        )
        background = Background(
            tuple(BACKGROUND_COLOURS)[self.background_colour[index]], BACKGROUND_KINDS[self.background_kind[index]]
        )
        return Scene(sprites, background, int(self.key[index]))

    def __iter__(self) -> Iterator[Scene]:
        return (self[index] for index in range(len(self)))


def _third(value: float) -> int:
    return min(max(int(value * 3), 0), 2)
