"""What can be said of a scene, complete or ambiguous, and whether what was said is true."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gratis.contract.errors import InputError, ParameterError
from gratis.zoo.sprites.scene import (
    BACKGROUND_COLOURS,
    COLOURS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    Scenes,
    Sprite,
    require_name,
)

ATTRIBUTES = ("size", "texture", "colour", "shape", "position")
"""What a caption may say of a sprite, in the order in which it says it. The shape is always said."""

_OF_WORD = {
    **{word: ("size", word) for word in SIZES}, **{word: ("texture", word) for word in TEXTURES},
    **{word: ("colour", word) for word in COLOURS}, **{word: ("shape", word) for word in SHAPES},
}  # fmt: skip
_POSITIONS = {
    (row, column): (
        "in the middle" if row == column == "middle"
        else "at the " + " ".join(word for word in (row, column) if word != "middle")
    )
    for row in ("top", "middle", "bottom") for column in ("left", "middle", "right")
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Agreement:
    """How a caption agrees with a scene: statements made, and how many of them are true of it."""

    stated: int
    true: int

    @property
    def false(self) -> int:
        """Statements that are not true of the scene."""
        return self.stated - self.true


def words() -> tuple[str, ...]:
    """Every word that a caption can contain, sorted."""
    phrases = " ".join(_POSITIONS.values()).split()
    return tuple(sorted({"a", "an", "and", "on", "background", "nothing", *_OF_WORD, *BACKGROUND_COLOURS, *phrases}))


def describe(sprite: Sprite, attributes: Collection[str] = ATTRIBUTES) -> str:
    """One sprite in words, for example "a large striped red circle at the top left"."""
    for name in attributes:
        require_name("attribute", name, ATTRIBUTES)
    parts = [getattr(sprite, name) for name in ATTRIBUTES[:4] if name in attributes or name == "shape"]
    place = [_POSITIONS[sprite.position]] if "position" in attributes else []
    return " ".join(["an" if parts[0][0] in "aeiou" else "a", *parts, *place])


def caption(scene: Scene, attributes: Collection[str] = ATTRIBUTES, background: bool = False) -> str:
    """The whole scene in words: its sprites from back to front joined by "and", and the background if wished."""
    said = " and ".join(describe(sprite, attributes) for sprite in scene.sprites) or "nothing"
    return f"{said} on a {scene.background.colour} background" if background else said


def ambiguous_caption(scene: Scene, probabilities: Mapping[str, float], seed: int = 0, background: float = 0.0) -> str:
    """A true caption that says each attribute of each sprite only with its probability (absent: never).

    `background` is the probability of naming the background. The same scene and seed give the same caption; other
    seeds give other captions of the same scene, as several people would.
    """
    for name, probability in {**probabilities, "background": background}.items():
        if name != "background":
            require_name("attribute", name, ATTRIBUTES)
        if not 0 <= probability <= 1:
            raise ParameterError(f"The probability of saying {name} must be within 0 to 1, not {probability}.")
    generator = np.random.default_rng([scene.key, seed])
    said = []
    for sprite in scene.sprites:
        draws = dict(zip(ATTRIBUTES, generator.random(len(ATTRIBUTES)), strict=True))
        said.append(describe(sprite, [name for name in ATTRIBUTES if draws[name] < probabilities.get(name, 0.0)]))
    text = " and ".join(said) or "nothing"
    return f"{text} on a {scene.background.colour} background" if generator.random() < background else text


def parse(text: str) -> tuple[list[dict[str, str]], str | None]:
    """What a caption says: one dict of attributes per sprite, and the background's colour or None.

    A position is "row column", for example "top left". Words outside the captions' vocabulary raise InputError;
    anything in the vocabulary is read as far as it makes sense, so that a model's broken captions can be scored.
    """
    sprites: list[dict[str, str]] = []
    background = None
    if strange := [word for word in text.split() if word not in words()]:
        raise InputError(f"The word {strange[0]!r} is not one that captions of sprites use.")
    head, _, tail = text.partition(" on a ")
    if tail.split()[1:2] == ["background"] and tail.split()[0] in BACKGROUND_COLOURS:
        background = tail.split()[0]
    for phrase in head.split(" and "):
        said = {_OF_WORD[word][0]: word for word in phrase.split() if word in _OF_WORD}
        places = [position for position, place in _POSITIONS.items() if phrase.endswith(place)]
        if places:
            said["position"] = " ".join(places[0])
        if said:
            sprites.append(said)
    return sprites, background


def agreement(text: str, scene: Scene) -> Agreement:
    """How much of a caption is true of `scene`, its sprites matched to the scene's one to one in the best way."""
    said, background = parse(text)
    stated = sum(len(sprite) for sprite in said) + (background is not None)
    true = int(background is not None and background == scene.background.colour)
    facts = [{name: _fact(sprite, name) for name in ATTRIBUTES} for sprite in scene.sprites]
    agreeing = [[sum(fact[name] == value for name, value in sprite.items()) for fact in facts] for sprite in said]
    return Agreement(stated, true + _best_matching(agreeing))


def consistent(text: str, scenes: Scenes | Sequence[Scene]) -> list[bool]:
    """Of which scenes everything that the caption says is true: what the caption leaves open."""
    return [(found := agreement(text, scene)).true == found.stated for scene in scenes]


def _fact(sprite: Sprite, name: str) -> str:
    return " ".join(sprite.position) if name == "position" else str(getattr(sprite, name))


def _best_matching(values: list[list[int]]) -> int:
    """Largest sum over a one-to-one matching of rows to columns."""
    if not values or not values[0]:
        return 0
    from scipy.optimize import linear_sum_assignment

    table = np.array(values)
    rows, columns = linear_sum_assignment(table, maximize=True)
    return int(table[rows, columns].sum())
