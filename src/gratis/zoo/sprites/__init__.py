"""A procedural world of coloured shapes: pictures of which everything is known.

    from gratis.zoo.sprites import World, caption, render

    world = World(sprites=(1, 3), textures=("plain", "striped"), distinct=("kind",), seed=0)
    scenes = world.scenes(0, 1000)          # columns; scenes[3] is a Scene of Sprites
    drawn = render(scenes, size=32)         # drawn.images, drawn.masks, drawn.whole_masks, drawn.boxes
    caption(scenes[3])                      # "a large striped red circle at the top left and ..."

A scene is a description (`Scene`, `Sprite`, `Background`) in fractions of the picture's side; `render` draws a whole
batch at any size with one mask and box per sprite; `World` draws scenes under constraints, each determined by the
seed and its number alone; captions are complete (`caption`) or leave things open (`ambiguous_caption`), and
`agreement` and `consistent` say what of a caption is true; `shift` shows the same pictures in another domain.
`python -m gratis.zoo.sprites page.html` writes a page of samples. Needs numpy alone (matching captions and the
domain "blur": scipy).
"""

from __future__ import annotations

from gratis.zoo.sprites.captions import (
    ATTRIBUTES,
    Agreement,
    agreement,
    ambiguous_caption,
    caption,
    consistent,
    describe,
    parse,
    words,
)
from gratis.zoo.sprites.domains import DOMAINS, shift
from gratis.zoo.sprites.rendering import Rendering, boxes_of, render
from gratis.zoo.sprites.scene import (
    BACKGROUND_COLOURS,
    BACKGROUND_KINDS,
    COLOURS,
    SHAPES,
    SIZES,
    TEXTURES,
    Background,
    Scene,
    Scenes,
    Sprite,
)
from gratis.zoo.sprites.world import World

__all__ = [
    "ATTRIBUTES", "BACKGROUND_COLOURS", "BACKGROUND_KINDS", "COLOURS", "DOMAINS", "SHAPES", "SIZES", "TEXTURES",
    "Agreement", "Background", "Rendering", "Scene", "Scenes", "Sprite", "World", "agreement", "ambiguous_caption",
    "boxes_of", "caption", "consistent", "describe", "parse", "render", "shift", "words",
]  # fmt: skip
