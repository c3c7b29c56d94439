import numpy as np
import pytest

from gratis.contract.errors import InputError, ParameterError
from gratis.zoo.sprites import (
    COLOURS,
    DOMAINS,
    SHAPES,
    SIZES,
    TEXTURES,
    Background,
    Scene,
    Scenes,
    Sprite,
    World,
    agreement,
    ambiguous_caption,
    caption,
    consistent,
    parse,
    render,
    shift,
    words,
)  # fmt: skip
from gratis.zoo.sprites.page import page, png

BUSY = World(
    sprites=(0, 4), textures=TEXTURES, background_kinds=("plain", "gradient", "striped", "noisy"), distinct=("kind",),
    turn=0.5, seed=3,
)  # fmt: skip


def test_a_scene_depends_on_its_number_alone():
    whole = BUSY.scenes(0, 600)
    part = BUSY.scenes(250, 270)
    assert [*part] == [*whole[250:270]]
    assert BUSY[257] == whole[257]
    np.testing.assert_array_equal(render(part, 32).images, render(whole, 32).images[250:270])
    assert [*World(seed=4).scenes(0, 9)] != [*World(seed=5).scenes(0, 9)]


def test_columns_and_descriptions_are_the_same_scenes():
    scenes = BUSY.scenes(0, 50)
    again = Scenes.of([*scenes])
    assert [*again] == [*scenes]
    np.testing.assert_array_equal(render([*scenes], 32).images, render(scenes, 32).images)


def test_constraints_hold():
    scenes = BUSY.scenes(0, 2000)
    assert set(scenes.numbers.tolist()) == {0, 1, 2, 3, 4}
    for scene in scenes:
        kinds = [(sprite.colour, sprite.shape) for sprite in scene.sprites]
        assert len(set(kinds)) == len(kinds)
        for place, one in enumerate(scene.sprites):
            assert one.radius <= one.x <= 1 - one.radius + 1e-6
            for other in scene.sprites[:place]:
                assert np.hypot(one.x - other.x, one.y - other.y) >= one.radius + other.radius + 0.02 - 1e-5
    held = World(without=(("red", "circle"),)).scenes(0, 5000)
    pairs = {(sprite.colour, sprite.shape) for scene in held for sprite in scene.sprites}
    assert len(pairs) == len(COLOURS) * len(SHAPES) - 1
    assert ("red", "circle") not in pairs
    only = World(only=(("red", "circle"),)).scenes(0, 20)
    assert {(sprite.colour, sprite.shape) for scene in only for sprite in scene.sprites} == {("red", "circle")}


def test_sizes_are_named_as_drawn():
    scenes = World(sizes=("small",), radius_jitter=0.14).scenes(0, 500)
    assert {sprite.size for scene in scenes for sprite in scene.sprites} == {"small"}
    assert {Sprite("circle", "red", radius=radius).size for radius in SIZES.values()} == set(SIZES)


@pytest.mark.parametrize(
    ("shape", "area"),
    [("circle", np.pi), ("square", 1.6**2), ("ring", np.pi * (1 - 0.25)), ("diamond", 1.4), ("triangle", 27**0.5 / 4),
     ("cross", 4 * 0.95 * 0.31 * 2 - 0.62**2), ("hexagon", 2 * 3**0.5 * 0.85**2),
     ("star", 10 * 0.5 * 0.45 * np.sin(np.pi / 5))],
)  # fmt: skip
def test_masks_have_the_area_of_the_shape(shape, area):
    radius = 0.4
    mask = render(Scene((Sprite(shape, "red", radius=radius),)), 256).masks[0, 0]
    assert mask.mean() == pytest.approx(area * radius**2, rel=0.02)


def test_boxes_fit_masks_and_the_front_hides_the_back():
    back = Sprite("square", "red", 0.4, 0.5, 0.25)
    front = Sprite("circle", "blue", 0.6, 0.5, 0.25)
    drawn = render(Scene((back, front)), 64)
    assert not (drawn.masks[0, 0] & drawn.masks[0, 1]).any()
    assert (drawn.whole_masks[0, 0] & drawn.whole_masks[0, 1]).any()
    assert tuple(drawn.images[0][drawn.masks[0, 1]].max(axis=0)) >= COLOURS["blue"]
    left, top, right, bottom = drawn.boxes[0, 1]
    rows, columns = np.nonzero(drawn.masks[0, 1])
    assert (left, top, right, bottom) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    hidden = render(Scene((Sprite("circle", "red", radius=0.1), Sprite("circle", "blue", radius=0.3))), 32)
    assert not hidden.masks[0, 0].any()
    assert hidden.boxes[0, 0].tolist() == [0, 0, 0, 0]


def test_a_turned_sprite_turns_clockwise():
    upright = render(Scene((Sprite("triangle", "red", radius=0.4),)), 64).masks[0, 0]
    right = render(Scene((Sprite("triangle", "red", radius=0.4, angle=np.pi / 2),)), 64).masks[0, 0]
    np.testing.assert_array_equal(np.rot90(upright, -1), right)


def test_captions_are_true_and_complete():
    red = Sprite("circle", "red", 0.1, 0.1, SIZES["large"], "striped")
    orange = Sprite("star", "orange", 0.5, 0.5, SIZES["small"])
    scene = Scene((red, orange), Background("black"))
    assert caption(scene, background=True) == (
        "a large striped red circle at the top left and a small plain orange star in the middle on a black background"
    )
    assert caption(scene, ("colour",)) == "a red circle and an orange star"
    assert caption(Scene()) == "nothing"
    for other in BUSY.scenes(0, 200):
        text = caption(other, background=True)
        assert set(text.split()) <= set(words())
        assert agreement(text, other).false == 0
        assert agreement(text, other).stated == 5 * len(other.sprites) + 1


def test_captions_parse_back():
    sprites, background = parse("a large red circle at the left and a small star on a grey background")
    assert sprites == [
        {"size": "large", "colour": "red", "shape": "circle", "position": "middle left"},
        {"size": "small", "shape": "star"},
    ]
    assert background == "grey"
    assert parse("nothing") == ([], None)
    assert parse("red red a a")[0] == [{"colour": "red"}]
    with pytest.raises(InputError, match="zebra"):
        parse("a red zebra")


def test_agreement_counts_what_is_false():
    scene = Scene((Sprite("circle", "red"), Sprite("star", "blue", 0.2, 0.2)), Background("white"))
    assert agreement("a blue star and a red circle", scene).false == 0
    assert agreement("a red star and a blue circle", scene).false == 2
    assert agreement("a red circle and a blue star and a green ring", scene).false == 2
    assert agreement("a star on a black background", scene).false == 1
    assert consistent("a star", [scene, Scene((Sprite("ring", "red"),))]) == [True, False]


def test_ambiguous_captions_vary_with_the_seed_and_stay_true():
    scene = World(seed=1)[5]
    often = {"colour": 0.5, "size": 0.5, "position": 0.5}
    said = {ambiguous_caption(scene, often, seed=person) for person in range(40)}
    assert len(said) == 8
    assert all(agreement(text, scene).false == 0 for text in said)
    assert ambiguous_caption(scene, often, seed=7) == ambiguous_caption(scene, often, seed=7)
    assert ambiguous_caption(scene, {}) == caption(scene, ())
    with pytest.raises(ParameterError, match="within 0 to 1"):
        ambiguous_caption(scene, {"colour": 1.5})


@pytest.mark.parametrize("domain", DOMAINS)
def test_domains_keep_shape_and_strength_zero_keeps_everything(domain):
    images = render(BUSY.scenes(0, 6), 32).images
    np.testing.assert_array_equal(shift(images, domain, strength=0), images)
    moved = shift(images, domain, seed=2)
    assert moved.dtype == np.uint8
    assert moved.shape == images.shape
    np.testing.assert_array_equal(moved, shift(images, domain, seed=2))
    assert (moved != images).any() == (domain != "clear")


def test_noise_of_a_row_does_not_depend_on_the_batch_and_is_standard():
    noisy = World(background_kinds=("noisy",), backgrounds=("grey",)).scenes(0, 4)
    np.testing.assert_array_equal(render(noisy[2:3], 32).images[0], render(noisy, 32).images[2])
    from gratis.zoo.sprites.rendering import lattice_noise

    noise = lattice_noise(np.arange(40), 32)
    assert abs(noise.mean()) < 0.02
    assert noise.std() == pytest.approx(1, abs=0.02)
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.1


@pytest.mark.parametrize(
    "fields",
    [{"shapes": ("circel",)}, {"colours": ()}, {"shapes": "circle"}, {"sprites": (3, 1)}, {"radius_jitter": 0.3},
     {"margin": 0.4}, {"seed": -1}, {"only": (("red", "circle"),), "without": (("red", "circle"),)},
     {"distinct": ("position",)}],
)  # fmt: skip
def test_worlds_that_cannot_be_are_refused(fields):
    with pytest.raises(ParameterError):
        World(**fields)


def test_refusals_say_what_was_meant():
    with pytest.raises(ParameterError, match="did you mean 'circle'"):
        Sprite("circel", "red")
    with pytest.raises(InputError, match="no room"):
        World(sprites=(12, 12), sizes=("large",)).scenes(0, 1)
    with pytest.raises(ParameterError, match="8 pixels"):
        render(Scene(), 4)
    with pytest.raises(InputError, match="uint8"):
        shift(np.zeros((2, 8, 8, 3)), "fog")


def test_the_page_stands_alone():
    text = page(seed=1, size=16)
    assert text.count("<img") > 40
    assert "http" not in text.replace("http-equiv", "")
    assert png(np.zeros((2, 3, 3), np.uint8)).startswith(b"\x89PNG")
